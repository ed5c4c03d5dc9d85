"""Options that commands of the suite share, in groups."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from wantrt.bench.result import check_folder
from wantrt.cli.build import list_of
from wantrt.cli.command import size_option
from wantrt.errors import BenchError
from wantrt.jobs import parse_size
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

Decorator = Callable[[Any], Any]


def _writable(ctx: click.Context, param: click.Parameter, value: Path) -> Path:
    """Before anything is built or measured."""
    try:
        check_folder(value)
    except BenchError as error:
        raise click.BadParameter(str(error), ctx, param) from None
    return value


BUNDLE: tuple[Decorator, ...] = (
    click.option(
        "--bundle",
        type=click.Path(path_type=Path),
        help="What is measured: a folder, or what ships. [default: nano]",
    ),
    click.option(
        "--variant",
        metavar="NAME",
        help="Instead: built from --checkpoint into the user's cache folder, once.",
    ),
    click.option("--checkpoint", metavar="SOURCE", help="As for wantrt build: random:0, a folder."),
    click.option("--precision", metavar="NAME", help="Of what is built. [default: the runtime's]"),
    click.option("--trust-plans", is_flag=True, help="Run plans that another machine compiled."),
)
RUNTIME = click.option(
    "--runtime", default="auto", show_default=True, metavar="NAME", help="What runs it."
)
RUNTIMES = click.option(
    "--runtime",
    "runtimes",
    default="auto",
    show_default=True,
    metavar="NAME,…",
    callback=list_of(str),
    help="What runs it; of several, one after the other.",
)
RESIDENCY = click.option(
    "--residency",
    default="resident",
    show_default=True,
    type=click.Choice(["resident", "phase", "stream"]),
    help="What stays in a GPU's memory.",
)
SIZE = click.option("--size", metavar="WxH", callback=size_option, help="[default: the model's]")
SIZES = click.option(
    "--size",
    "sizes",
    metavar="WxH,…",
    callback=list_of(parse_size),
    help="[default: the model's]",
)
FRAMES = click.option("--frames", "num_frames", type=int, metavar="N", help="4n + 1 of them.")
STEPS = click.option(
    "--steps", "num_inference_steps", type=int, metavar="N", help="Denoising steps."
)
PROMPT = click.option("--prompt", default="a red circle moves right", show_default=True)
SEED = click.option("--seed", type=int, default=0, show_default=True)
SAMPLING: tuple[Decorator, ...] = (
    click.option("--guidance-scale", type=float, metavar="X", help="1 is no guidance."),
    click.option("--solver", metavar="NAME", help="unipc, dpm++ or euler."),
)
SOURCE: tuple[Decorator, ...] = (
    click.option("--image", metavar="FILE", help="What the task needs; [default: noise]"),
    click.option("--last-image", metavar="FILE"),
    click.option("--video", metavar="PATH"),
    click.option("--mask", metavar="PATH"),
    click.option("--reference-image", "reference_images", metavar="FILE", multiple=True),
)
RESULT: tuple[Decorator, ...] = (
    click.option(
        "--out",
        type=click.Path(path_type=Path, file_okay=False),
        default="bench-results",
        show_default=True,
        callback=_writable,
        help="Folder of the result.",
    ),
    click.option("--note", metavar="TEXT", help="Goes into the result."),
)


def repeats(warmup: int = 2, runs: int = 5) -> tuple[Decorator, ...]:
    """How often: the first of the warm-ups is the cold request."""
    once = click.IntRange(min=1)
    return (
        click.option("--warmup", type=once, default=warmup, show_default=True, metavar="N"),
        click.option("--runs", type=once, default=runs, show_default=True, metavar="N"),
    )


def options(*groups: Decorator | tuple[Decorator, ...]) -> Decorator:
    """A decorator of a command, with the options of the groups in their order."""

    def decorate(function: Any) -> Any:
        every = [
            one for group in groups for one in (group if isinstance(group, tuple) else (group,))
        ]
        for option in reversed(every):
            function = option(function)
        return function

    return decorate
