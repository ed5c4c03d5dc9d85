"""Tables of results: in the page, in Markdown, and in the marked sections of a README.

A section names a result by its path below the folder of results, without .json, and may choose
rows by a text in their first column and columns of the command's table by their titles:

    <!-- bench:latency[onnxruntime]: what, e2e -->
    what stands here is written by `wantrt bench report FOLDER --readme README.md`
    <!-- /bench -->
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from wantrt.bench.plots import quantity
from wantrt.bench.result import Cell, Result, Row, Table, card_line, load
from wantrt.errors import BenchError
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

SECTION = re.compile(
    r"(?P<start><!-- bench:(?P<name>[\w./-]+?)(?:\[(?P<rows>[^\]\n]+)\])?"
    r"(?::(?P<columns>[^\n]*?))? -->\n)"
    r"(?P<body>.*?)(?P<end><!-- /bench -->)",
    re.DOTALL,
)
MARKS = re.compile(r"<!-- bench:[^\n]*?-->|<!-- /bench -->")


def load_all(places: Sequence[Path]) -> dict[str, Result]:
    """Results by their names: paths below the given folders, without .json.

    Raises BenchError: nothing is there, a file is no result, two have one name.
    """
    found: dict[str, Result] = {}
    for place in places:
        if not place.exists():
            raise BenchError(f"{place} is not there; name folders or files of wantrt bench")
        paths = [place] if place.is_file() else sorted(place.rglob("*.json"))
        if not paths:
            raise BenchError(f"{place} holds no results; measure with wantrt bench, --out {place}")
        for path in paths:
            below = path.name if place.is_file() else path.relative_to(place).as_posix()
            name = below.removesuffix(".json")
            if name in found:
                name = path.as_posix().removesuffix(".json")
            found[name] = load(path)
    return found


def table_of(result: Result) -> Table:
    """The command's own table; where this version has none, all that the rows hold."""
    module = f"wantrt.bench.{result.name}"
    if result.name.isidentifier() and find_spec(module):
        table = getattr(import_module(module), "TABLE", None)
        if isinstance(table, Table):
            return table
    return plain_table(result)


def plain_table(result: Result) -> Table:
    keys = dict.fromkeys(key for row in result.rows for key in row)
    return Table([(key, plain(key)) for key in keys])


def plain(key: str) -> Cell:
    """A value as it is; a number with the unit that its key ends with."""

    def cell(row: Row) -> str:
        found = row.get(key)
        found = found.get("median") if isinstance(found, Mapping) else found
        if isinstance(found, (int, float)) and not isinstance(found, bool):
            return quantity(key, found)
        return "" if found is None else str(found)

    return cell


def choose(table: Table, titles: Sequence[str], where: str) -> Table:
    """Only these columns, in this order. Raises BenchError for a title that is none."""
    known = dict(reversed(table.columns))  # of two with one title, the first
    for title in titles:
        if title not in known:
            there = ", ".join(title for title, _ in table.columns if title)
            raise BenchError(f"{where}: no column {title!r}; there are {there}")
    return Table([(title, known[title]) for title in titles])


def lines(result: Result, table: Table) -> list[list[str]]:
    """The cells of a table. Raises BenchError for rows that the command no longer writes so."""
    try:
        return table.lines(result.rows)
    except (KeyError, TypeError, ValueError, AttributeError):
        raise BenchError(
            f"the rows of {result.name} of {result.date} are not as this version writes them; "
            f"measure again with: {result.command}"
        ) from None


def markdown(
    result: Result, columns: Sequence[str] = (), link: str | None = None, rows: str = ""
) -> str:
    """The table, and below it where it was measured, when and how.

    link: to the file. rows: only those with this text in their first column. Raises BenchError.
    """
    table = table_of(result)
    shown = lines(result, table)
    chosen = [row for row, cells in zip(result.rows, shown, strict=True) if rows in cells[0]]
    if not chosen:
        where = f"no row has {rows!r} in its first column" if rows else "it has no rows"
        raise BenchError(f"bench:{result.name}: {where}")
    result = replace(result, rows=chosen)
    if columns:
        table = choose(table, columns, f"bench:{result.name}")
    told = f"{card_line(result)}; {result.date[:10]}; `{result.command}`"
    if link:
        told += f"; [{Path(link).name}]({link})"
    if result.note:
        told += f"; {result.note}"
    if result.partial:
        told = f"**Partial** ({result.partial}). {told}"
    return f"{table.markdown(result.rows)}\n\n{told}"


def fill(content: str, results: Mapping[str, Result], links: str) -> str:
    """A README with its marked sections written anew. links: the folder of results, from there.

    Raises BenchError: a section's result is not there, a column is none, a mark has no partner.
    """

    def section(match: re.Match[str]) -> str:
        name, asked = match["name"], match["columns"] or ""
        if name not in results:
            raise BenchError(
                f"section bench:{name} has no result; there are {', '.join(sorted(results))}"
            )
        titles = [title.strip() for title in asked.split(",") if title.strip()]
        body = markdown(results[name], titles, f"{links}/{name}.json", match["rows"] or "")
        return f"{match['start']}\n{body}\n\n{match['end']}"

    marks = MARKS.findall(content)
    if len(marks) % 2 or any(("/bench" in mark) != bool(i % 2) for i, mark in enumerate(marks)):
        raise BenchError(
            "a section <!-- bench:… --> has no <!-- /bench -->, or the other way round"
        )
    filled, count = SECTION.subn(section, content)
    if 2 * count != len(marks):
        raise BenchError("a mark is not of the form <!-- bench:NAME: column, column -->")
    return filled


def rewrite(readme: Path, results: Mapping[str, Result], folder: Path) -> bool:
    """Write the sections of a README anew. Returns whether anything differed."""
    try:
        before = readme.read_text()
    except OSError as error:
        raise BenchError(f"cannot read {readme}: {error.strerror}") from None
    links = Path(os.path.relpath(folder, readme.resolve().parent)).as_posix()
    after = fill(before, results, links)
    if after != before:
        readme.write_text(after)
    return after != before
