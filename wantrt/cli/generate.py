from wantrt.cli.command import command


@command()
def generate(console):
    pass
