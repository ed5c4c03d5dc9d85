"""The command line: ``wantrt info | build | generate | verify | bench``.

Each command parses, calls one function of the library and prints what it did, where it put it and
how long it took. Exit codes: 0 done, 1 failed, 2 bad input, 130 interrupted.
"""

import sys

import click

from wantrt import __version__
from wantrt.cli.bench import bench
from wantrt.cli.build import build
from wantrt.cli.generate import generate
from wantrt.cli.info import info
from wantrt.cli.verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="wantrt", message="%(prog)s %(version)s")
def cli() -> None:
    """Wan videos from text, images and masks, through exported graphs, on any machine.

    \b
    wantrt generate "a red circle moves right"      a video, with the checkpoint that ships
    wantrt info                                     what runs here, and which variants
    wantrt build --variant 1.3B                     a bundle from a released checkpoint
    """


for command in (info, build, generate, verify, bench):
    cli.add_command(command)


def main() -> None:
    """Entry point of the console script."""
    try:
        code = cli.main(prog_name="wantrt", standalone_mode=False)
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "wantrt"
        print(f"wantrt: error: {error.format_message()}\nSee: {where} --help", file=sys.stderr)
        code = 2
    except (click.Abort, KeyboardInterrupt):
        print("wantrt: interrupted", file=sys.stderr)
        code = 130
    sys.exit(code if isinstance(code, int) else 0)
