from wantrt.cli.command import command


@command()
def build(console):
    pass
