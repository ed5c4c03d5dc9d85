"""Results as one HTML page that needs nothing else: plots, tables, and the card beside them.

    wantrt bench report [FOLDER OR FILE ...] [--out report.html]
    wantrt bench report bench/results --readme README.md

Every number of a plot stands in the table below it, with the machine, the versions, the commit and
the command that measured it. The page has no script and asks no network; light and dark follow the
reader's system. A result that was interrupted says so.
"""

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wantrt.bench.figures import figures
from wantrt.bench.plots import figure
from wantrt.bench.result import UNFINISHED, Result
from wantrt.bench.tables import lines, load_all, markdown, rewrite, table_of
from wantrt.cli.bench import COMMANDS
from wantrt.cli.command import command as wantrt_command
from wantrt.errors import BenchError
from wantrt.folder import write_atomic
from wantrt.linked import refuse_other_names

if TYPE_CHECKING:
    from wantrt.cli.console import Console

refuse_other_names(__spec__)

STYLE = Path(__file__).with_name("page.css")
OUT = Path("bench-results")


@wantrt_command()
@click.argument("places", nargs=-1, type=click.Path(path_type=Path), metavar="[FOLDER|FILE]…")
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help=f"The page. [default: {OUT}/report.html]",
)
@click.option("--markdown", "as_markdown", is_flag=True, help="Print tables in Markdown instead.")
@click.option(
    "--readme",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the sections <!-- bench:NAME --> of this file anew instead.",
)
def command(
    console: "Console",
    places: tuple[Path, ...],
    out: Path | None,
    as_markdown: bool,
    readme: Path | None,
) -> None:
    """Make a page with plots of results, by default of those in bench-results/."""
    if sum(map(bool, (out, as_markdown, readme))) > 1:
        raise click.UsageError("take one of --out, --markdown and --readme")
    places = places or (OUT,)
    results = load_all(places)
    if as_markdown:
        print("\n\n".join(f"### {name}\n\n{markdown(r)}" for name, r in results.items()))
    elif readme:
        if len(places) > 1 or not places[0].is_dir():
            raise BenchError("--readme takes one folder, which its tables link to")
        changed = rewrite(readme, results, places[0])
        console.print("rewritten" if changed else "nothing to do")
        console.path(readme)
        console.result({"readme": str(readme), "changed": changed})
    else:
        path = out or OUT / "report.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, page(results).encode())
        console.path(path)
        console.result({"page": str(path), "results": list(results)})


def page(results: Mapping[str, Result]) -> str:
    """One page of all results, in the order of the commands, then by their names."""
    order = [*COMMANDS, *(result.name for result in results.values())]
    results = dict(sorted(results.items(), key=lambda item: order.index(item[1].name)))
    dates = sorted(result.date for result in results.values())
    machines = dict.fromkeys(machine_name(result) for result in results.values())
    links = "".join(
        f'<a href="#{escape(name)}">{escape(name)}{" *" if result.partial else ""}</a>'
        for name, result in results.items()
    )
    days = " to ".join(dict.fromkeys(date[:10] for date in (dates[0], dates[-1])))
    body = "".join(section(name, result) for name, result in results.items())
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<title>wantrt bench</title>\n'
        f"<style>\n{STYLE.read_text()}</style>\n</head>\n<body>\n<header>\n<h1>wantrt bench</h1>\n"
        f"<p>{escape('; '.join(machines))}. Measured {escape(days)}.</p>\n"
        f"<nav>{links}</nav>\n</header>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def section(name: str, result: Result) -> str:
    """A result: what it is, its plots beside the card, and its table."""
    why = "it still ran, or was killed" if result.partial == UNFINISHED else result.partial
    partial = f'<p class="partial"><b>Partial.</b> {escape(why)}</p>' if why else ""
    drawn = "".join(
        f"<figure><figcaption>{escape(one.title)}</figcaption>{one.markup}"
        + (f'<p class="hint">{escape(one.note)}</p>' if one.note else "")
        + "</figure>\n"
        for one in figures(result)
    )
    return (
        f'<section id="{escape(name)}">\n<h2>{escape(name)}</h2>\n'
        f"<p>{escape(COMMANDS.get(result.name, ''))}</p>\n{partial}"
        f'<div class="beside"><div class="figures">\n{drawn}</div>\n{card(result)}</div>\n'
        f"{table(result)}</section>\n"
    )


def card(result: Result) -> str:
    """Where, when and how it was measured."""
    told = "".join(f"<dt>{escape(key)}</dt><dd>{html}</dd>" for key, html in card_lines(result))
    return f"<aside><dl>{told}</dl></aside>\n"


def card_lines(result: Result) -> Iterator[tuple[str, str]]:
    """Names and HTML."""
    machine = result.machine
    if "gpu" in machine:
        yield "GPU", escape(f"{machine['gpu']}, {machine.get('gpu_memory_gib', '?')} GiB")
        if state := machine.get("gpu_state"):
            told = (f"{key.replace('_', ' ')} {found}" for key, found in state.items())
            yield "GPU state", "<br>".join(map(escape, told))
    yield (
        "CPU",
        escape(
            f"{machine.get('cpu')}, {machine.get('threads')} of {machine.get('cores')} cores, "
            f"{machine.get('memory_gib')} GiB, load {machine.get('load')}"
        ),
    )
    if rates := machine.get("rates"):
        yield "measured rates", "<br>".join(told_rate(*rate) for rate in rates.items())
    versions = {"python": machine.get("python"), **machine.get("versions", {})}
    yield "versions", "<br>".join(escape(f"{key} {told}") for key, told in versions.items())
    yield "commit", escape(result.commit or "unknown")
    yield "date", escape(result.date.replace("T", " ").replace("Z", " UTC"))
    yield "command", f"<code>{escape(result.command)}</code>"
    summary = f"<summary>{result.config_hash}</summary>"
    yield "settings", f"<details>{summary}{escape(told_settings(result.settings))}</details>"
    if result.note:
        yield "note", escape(result.note)


def told_rate(name: str, rate: float) -> str:
    if name == "copy":
        return f"{figure(rate / 1e9)} GB/s copied"
    return f"{figure(rate / 1e12)} TFLOP/s, {escape(name)}"


def told_settings(settings: Any) -> str:
    """Names and values in a line, what lies within in parentheses."""
    if isinstance(settings, Mapping):
        told = (f"{key} {within(value)}" for key, value in settings.items() if value is not None)
        return ", ".join(told)
    if isinstance(settings, list):
        return ", ".join(map(within, settings))
    return str(settings)


def within(value: Any) -> str:
    return f"({told_settings(value)})" if isinstance(value, (Mapping, list)) else str(value)


def machine_name(result: Result) -> str:
    return str(result.machine.get("gpu") or result.machine.get("cpu") or "unknown machine")


def table(result: Result) -> str:
    """The command's table, which scrolls by itself where it is wider than the page."""
    columns = table_of(result)
    lines(result, columns)  # refuses rows of another version
    columns = columns.used(result.rows)
    titles = "".join(f"<th>{escape(title)}</th>" for title, _ in columns.columns)
    rows = "".join(
        f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in line)}</tr>\n"
        for line in lines(result, columns)
    )
    return (
        f'<div class="scroll" tabindex="0"><table>\n<thead><tr>{titles}</tr></thead>\n'
        f"<tbody>\n{rows}</tbody>\n</table></div>\n"
    )
