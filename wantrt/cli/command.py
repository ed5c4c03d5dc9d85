"""What all commands share: --json, --quiet, --debug, and errors without a traceback."""

import traceback
from collections.abc import Callable
from typing import Any

import click

from wantrt import errors
from wantrt.cli.console import Console
from wantrt.jobs import parse_size

FAILURES = (  # exit 1; every other WantrtError is bad input, exit 2
    errors.BuildError,
    errors.ExecutionError,
    errors.CancelledError,
    errors.RuntimeUnavailableError,
)


class Command(click.Command):
    """A command whose function takes a `Console` first and may return its exit code."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [
            click.Option(["--json", "as_json"], is_flag=True, help="One JSON object on stdout."),
            click.Option(["--quiet", "-q"], is_flag=True, help="No progress, no warnings."),
            click.Option(["--debug"], is_flag=True, help="Show the traceback of an error."),
        ]

    def invoke(self, ctx: click.Context) -> Any:
        debug = ctx.params.pop("debug")
        console = Console(as_json=ctx.params.pop("as_json"), quiet=ctx.params.pop("quiet"))
        ctx.params["console"] = console
        try:
            return super().invoke(ctx)
        except Exception as error:
            if isinstance(error, (click.ClickException, click.exceptions.Exit)):
                raise
            if debug:
                traceback.print_exc()
            console.say(f"wantrt: error: {describe(error)}")
            console.result({"error": {"type": type(error).__name__, "message": str(error)}})
            return exit_code(error)


def command(**attributes: Any) -> Callable[[Callable[..., int | None]], click.Command]:
    return click.command(cls=Command, **attributes)


def exit_code(error: Exception) -> int:
    bad_input = isinstance(error, errors.WantrtError) and not isinstance(error, FAILURES)
    return 2 if bad_input else 1


def describe(error: Exception) -> str:
    """One error for people. What we did not foresee says where to look."""
    if isinstance(error, errors.WantrtError):
        return str(error)
    return f"{type(error).__name__}: {error} (unforeseen; --debug shows where)"


def size_option(
    ctx: click.Context, param: click.Parameter, value: str | None
) -> tuple[int, int] | None:
    """Callback of an option that takes WIDTHxHEIGHT."""
    try:
        return None if value is None else parse_size(value)
    except errors.SettingsError as error:
        raise click.BadParameter(str(error), ctx, param) from None
