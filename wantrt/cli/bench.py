"""``wantrt bench``: the benchmark suite. Each of its commands is a module of bench/."""

from collections.abc import Callable
from importlib import import_module

import click

COMMANDS = {
    "latency": "one video after another: seconds of every stage, memory, share of the floor",
    "throughput": "many requests: videos an hour, waiting, percentiles",
    "scaling": "time and memory over sizes, frames, batch and steps, beside the floor",
    "startup": "fresh processes: import, load, first and second video",
    "build": "compiling bundles: time, memory, bytes, again, after a change",
    "kernels": "each Triton kernel beside torch, torch.compile and a copy (GPU)",
    "block": "one transformer block: products, attention, the rest, beside the floor (GPU)",
    "vae": "decoder and encoder: milliseconds and memory of a chunk by size",
    "text": "the text encoder: seconds and memory of a prompt",
    "quality": "one bundle's videos beside another's: PSNR, SSIM, beside the noise floor",
    "compare": "the same video by wantrt and by diffusers, alternating in one run",
    "report": "a page with plots, and tables, of results that lie in folders",
}
MODULES = {"report": "page"}  # of bench/, where the name is another
BARE = ("kernels", "block")  # run on machines without click too, and read their options themselves


class Suite(click.Group):
    """Loads the module of a command when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module = import_module(f"wantrt.bench.{MODULES.get(cmd_name, cmd_name)}")
        if cmd_name in BARE:
            return _passed_on(cmd_name, module.main)
        found: click.Command = module.command
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


def _passed_on(name: str, main: Callable[[list[str]], None]) -> click.Command:
    @click.command(name, add_help_option=False, context_settings={"ignore_unknown_options": True})
    @click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
    def passed_on(arguments: tuple[str, ...]) -> None:
        main(list(arguments))

    return passed_on


@click.group(cls=Suite)
def bench() -> None:
    """Measure, so that anybody can repeat it.

    Every command prints the card of the machine, a table, and one line of JSON; it keeps them in
    --out. `wantrt bench report` makes a page of what lies there.
    """
