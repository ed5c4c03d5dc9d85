"""One measurement as a file: what was measured, by which command, where, when, and the numbers.

A command of the suite is a function that yields rows, a `Table` that shows them to people, and
`run`, which does the rest: the card of the machine, the table, the file, and the same object as one
line of JSON, last on stdout. What was measured before an interruption is kept and marked partial.

A row is a flat dict: `name`, what else identifies it, and numbers whose unit is in their name
(`denoise_s`, `plan_bytes`). A number that was measured several times is what `spread` returns.
"""

import hashlib
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import numpy as np

from wantrt.bench.machine import commit, machine
from wantrt.errors import BenchError
from wantrt.linked import refuse_other_names

if TYPE_CHECKING:
    from wantrt.cli.console import Console

refuse_other_names(__spec__)

SCHEMA = 1
RESULTS = Path(__file__).resolve().parent / "results"

UNFINISHED = "running"
CARD = ("cpu", "threads", "cores", "load", "versions")  # what is told of every machine

Row = dict[str, Any]
Cell = Callable[[Row], str]


@dataclass(kw_only=True)
class Result:
    """What a command of the suite measured. `rows` grow while it runs."""

    name: str  # of the command: "latency"
    settings: dict[str, Any]  # what was measured, without where the result goes
    command: str
    date: str  # ISO 8601, UTC
    commit: str | None
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    note: str | None = None
    partial: str | None = UNFINISHED  # why rows are missing; None: all are there
    schema: int = SCHEMA

    @property
    def config_hash(self) -> str:
        """Equal for measurements of the same thing, whatever the machine."""
        text = json.dumps([self.name, self.settings], sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def as_dict(self) -> dict[str, Any]:
        """What the file holds; what is not a number is null in it: JSON has no NaN."""
        return {"schema": self.schema, "config_hash": self.config_hash} | finite(asdict(self))

    def write(self, folder: Path) -> Path:
        """Write `folder`/NAME.json in the place of an earlier one."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.name}.json"
        unfinished = path.with_suffix(".json.part")
        unfinished.write_text(json.dumps(self.as_dict(), indent=1, ensure_ascii=False) + "\n")
        unfinished.replace(path)
        return path


def start(name: str, settings: Mapping[str, Any], note: str | None = None) -> Result:
    """A result without rows, of this machine, this command and now."""
    return Result(
        name=name,
        settings=finite(dict(settings)),
        command=told_command(),
        date=datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        commit=commit(),
        machine=machine(),
        note=note,
    )


def load(path: Path) -> Result:
    """Read a result. Raises BenchError for what is none, is damaged or of another schema."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise BenchError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise BenchError(f"{path} is no JSON; measure again, or take it out") from None
    schema = found.get("schema") if isinstance(found, dict) else None
    if schema != SCHEMA:
        of = "no result of the suite" if schema is None else f"of schema {schema}, not {SCHEMA}"
        raise BenchError(f"{path} is {of}; measure again with wantrt bench, or take it out")
    given = {key: value for key, value in found.items() if key != "config_hash"}
    try:
        result = Result(**given)
    except TypeError as error:
        raise BenchError(f"{path} is damaged: {error}; measure again, or take it out") from None
    check(result, str(path))
    if result.config_hash != found.get("config_hash"):
        raise BenchError(f"{path} was altered: its settings do not fit its hash; measure again")
    return result


def check(result: Result, where: str) -> None:
    """Raises BenchError where a field or a row is not what the schema says."""
    texts = dict.fromkeys(("name", "command", "date"), str)
    for key, kind in {**texts, "settings": dict, "machine": dict, "rows": list}.items():
        if not isinstance(getattr(result, key), kind):
            raise BenchError(f"{where} is damaged: {key!r} is no {kind.__name__}; measure again")
    if missing := [key for key in CARD if key not in result.machine]:
        raise BenchError(f"{where} is damaged: its machine lacks {missing[0]!r}; measure again")
    for row in result.rows:
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise BenchError(f"{where} is damaged: a row has no name; measure again")


def told_command() -> str:
    """The command line, to be typed again; where its result went and its note are left out."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    name = spec.name.removesuffix(".__main__") if spec is not None else Path(sys.argv[0]).name
    head = ["wantrt"] if name in ("wantrt", "wantrt.cli") else ["python", "-m", name]
    return shlex.join([*head, *without(("--out", "--note"), sys.argv[1:])])


def without(options: Sequence[str], arguments: Sequence[str]) -> list[str]:
    """Arguments of a command without some options, which take a value."""
    kept, skip = [], False
    for argument in arguments:
        if not skip and argument.split("=")[0] not in options:
            kept.append(argument)
        skip = not skip and argument in options
    return kept


def finite(value: Any) -> Any:
    """As JSON can say it."""
    if isinstance(value, Mapping):
        return {str(key): finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def spread(values: Sequence[float], digits: int = 4) -> dict[str, float]:
    """Median, p10, p90, p99, least and most of what was measured several times, and how often."""
    p10, median, p90, p99 = (float(p) for p in np.percentile(values, (10, 50, 90, 99)))
    numbers = {"median": median, "p10": p10, "p90": p90, "p99": p99}
    numbers |= {"min": float(min(values)), "max": float(max(values))}
    return {key: round(value, digits) for key, value in numbers.items()} | {"runs": len(values)}


# -- What people see ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Table:
    """Columns of a result: a title and what of a row stands there."""

    columns: Sequence[tuple[str, Cell]]

    def lines(self, rows: Sequence[Row]) -> list[list[str]]:
        return [[cell(row) for _, cell in self.columns] for row in rows]

    def used(self, rows: Sequence[Row]) -> "Table":
        """Without the columns that are empty in all rows."""
        return Table([column for column in self.columns if any(map(column[1], rows))])

    def markdown(self, rows: Sequence[Row]) -> str:
        titles = [title for title, _ in self.columns]
        marks = ["---", *("---:" for _ in titles[1:])]
        lines = [titles, marks, *self.lines(rows)]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def text(key: str) -> Cell:
    return lambda row: str(row.get(key, "") or "")


def number(
    key: str, digits: int = 2, unit: str = "", scale: float = 1.0, part: str = "median"
) -> Cell:
    """A number, or the median (or another `part`) of several; empty where there is none."""

    def cell(row: Row) -> str:
        value = row.get(key)
        value = value.get(part) if isinstance(value, Mapping) else value
        return "" if value is None else f"{value * scale:,.{digits}f}{unit}"

    return cell


def card_line(result: Result) -> str:
    """The machine in a line."""
    card = result.machine
    state = (f"{key} {told}" for key, told in (card.get("gpu_state") or {}).items())
    gpu = f"{', '.join((card['gpu'], *state))}; " if "gpu" in card else ""
    versions = ", ".join(f"{name} {number}" for name, number in card["versions"].items())
    return (
        f"{gpu}{card['cpu']}, {card['threads']} of {card['cores']} cores, load {card['load']}; "
        f"{versions}; commit {result.commit or 'unknown'}; settings {result.config_hash}"
    )


def run(console: "Console", result: Result, rows: Iterable[Row], table: Table, out: Path) -> int:
    """Measure: take the rows one by one, write and show them. Returns the exit code.

    out: the folder of the file. After an error or an interruption the rows so far are written,
    marked partial, and the error goes on; with none, nothing is written.
    """
    try:
        for row in rows:
            result.rows.append(row)
            result.write(out)
        result.partial = None
    except BaseException as error:
        result.partial = told_error(error)
        if result.rows:
            show(console, result, table, out)
        raise
    show(console, result, table, out)
    return 0


def check_folder(out: Path) -> None:
    """Raises BenchError where no result can be written, before anything is measured."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    try:
        with NamedTemporaryFile(dir=there):
            pass
    except OSError as error:
        raise BenchError(f"cannot write into {out}: {error.strerror}; name another --out") from None


def told_error(error: BaseException) -> str:
    said = str(error).split("\n")[0] or "interrupted"
    return f"{type(error).__name__}: {said}"


@contextmanager
def publish(result: Result, out: Path) -> Iterator[None]:
    """`run` for machines without click and rich: the block within fills in rows, and shows them.

    At its end the file is written and its path goes to stderr, the line of JSON to stdout. The
    block may say in `partial` why rows are missing.
    """
    check_folder(out)
    try:
        yield
        if result.partial == UNFINISHED:
            result.partial = None
    except BaseException as error:
        result.partial = told_error(error)
        raise
    finally:
        if result.rows or result.partial is None:
            print(card_line(result), result.write(out), sep="\n", file=sys.stderr)
            print(json.dumps(result.as_dict(), ensure_ascii=False), flush=True)


def show(console: "Console", result: Result, table: Table, out: Path) -> None:
    from rich.table import Table as RichTable

    table, told = table.used(result.rows), f"{card_line(result)}\n{result.command}"
    drawn = RichTable(title=f"wantrt bench {result.name}", caption=told)
    for index, (title, _) in enumerate(table.columns):
        drawn.add_column(title, justify="right" if index else "left")
    for line in table.lines(result.rows):
        drawn.add_row(*line)
    console.print(drawn)
    if result.partial:
        console.say(f"warning: partial: {result.partial}")
    try:
        console.path(result.write(out))
    finally:  # what was measured is not lost on a full disk
        print(json.dumps(result.as_dict(), ensure_ascii=False), flush=True)
