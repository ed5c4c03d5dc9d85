"""What a command says: results on stdout, progress and warnings on stderr, nothing twice.

For people: lines and tables. With --json: one object, last on stdout. With --quiet: results only.
Rich is imported when something is drawn, so that --help stays quick.
"""

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from wantrt.folder import Progress

if TYPE_CHECKING:
    from rich.console import Console as RichConsole
    from rich.console import RenderableType
    from rich.progress import Progress as Bars

PIPED_WIDTH = 100  # where there is no terminal to ask
COUNTABLE = 10_000  # totals from here on are bytes, better shown in percent


class Console:
    """How one command speaks. `seconds` is the time since it began."""

    def __init__(self, *, as_json: bool, quiet: bool) -> None:
        self.as_json, self.quiet = as_json, quiet
        self._start = time.perf_counter()
        self._errors: RichConsole | None = None
        self._bars: Bars | None = None
        log = logging.getLogger("wantrt")
        log.handlers = [_Warnings(self)]
        log.setLevel(logging.ERROR if quiet else logging.INFO)
        log.propagate = False

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    def print(self, *parts: "RenderableType") -> None:
        """For people, on stdout."""
        if self.as_json:
            return
        from rich.console import Console as RichConsole

        piped = not sys.stdout.isatty()
        console = RichConsole(
            highlight=False, soft_wrap=piped, width=PIPED_WIDTH if piped else None
        )
        with self._without_bars():
            for part in parts:
                console.print(part, markup=False)

    def path(self, path: object) -> None:
        """A path on a line of its own, never wrapped: it can be pasted into the next command."""
        if not self.as_json:
            with self._without_bars():
                print(path, flush=True)

    def result(self, value: dict[str, Any]) -> None:
        """For machines, on stdout."""
        if self.as_json:
            print(json.dumps(value, indent=1, ensure_ascii=False, default=str))

    def say(self, text: str) -> None:
        """For people, on stderr: warnings and errors too. Does not disturb a progress bar."""
        self._stderr().print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def progress(self) -> Iterator[Progress]:
        """A function ``(what, done, total)`` that draws bars with the time left, on a terminal."""
        if self.quiet or not sys.stderr.isatty():
            yield lambda what, done, total: None
            return
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        bars = Bars(
            TextColumn("{task.description:<28}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]:>9}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._stderr(),
            transient=True,
            redirect_stdout=False,  # results go to stdout, wherever the bars are
        )
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            count = f"{done}/{total}" if total < COUNTABLE else f"{done / total:.0%}"
            if what not in tasks:
                for task in tasks.values():
                    bars.update(task, visible=False)
                tasks[what] = bars.add_task(what, count=count)
            bars.update(tasks[what], completed=done, total=total, count=count, visible=True)

        with bars:
            self._bars = bars
            try:
                yield update
            finally:
                self._bars = None

    @contextmanager
    def _without_bars(self) -> Iterator[None]:
        """Take the bars away while something is printed on stdout."""
        bars = self._bars
        if bars is not None:
            for task in bars.tasks:
                bars.update(task.id, visible=False)
            bars.stop()
        yield
        if bars is not None:
            bars.start()

    def _stderr(self) -> "RichConsole":
        if self._errors is None:
            from rich.console import Console as RichConsole

            self._errors = RichConsole(stderr=True)
        return self._errors


class _Warnings(logging.Handler):
    """What the library logs, as a line on stderr."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        kind = "" if record.levelno <= logging.INFO else f"{record.levelname.lower()}: "
        self._console.say(f"wantrt: {kind}{record.getMessage()}")


def gib(size_bytes: float) -> str:
    """A size for people: 1.5 GiB, 240 MiB, 12 KiB."""
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size_bytes >= scale:
            number = size_bytes / scale
            return f"{number:.3g} {unit}" if number < 999.5 else f"{number:.0f} {unit}"
    return f"{size_bytes:.0f} B"
