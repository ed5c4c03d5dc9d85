from wantrt.cli.command import command


@command()
def verify(console):
    pass
