"""``wantrt bench``: the place of the benchmark suite."""

import click

from wantrt.cli.command import command
from wantrt.cli.console import Console
from wantrt.errors import UnsupportedTaskError


@command(context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def bench(console: Console, arguments: tuple[str, ...]) -> None:
    """Measure: latency, throughput, parts. (Not there yet.)"""
    raise UnsupportedTaskError("the benchmark suite is not there yet")
