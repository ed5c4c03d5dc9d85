"""Small plots as HTML and inline SVG that follow the page: its width, its colours, its text size.

Nothing is scaled: positions across are percentages, heights and text are pixels, so the same
markup is readable on a phone and on a desktop. Colours are classes (`c1` to `c6`) that the page
defines for light and dark. Long labels stand above their bars, where they can wrap.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

HEIGHT = 260  # of a plot with two axes, in pixels
BAR, THIN = 14, 22  # heights of a bar and of a range
MOST_TICKS = 6
PERCENTILES = ("median", "p10", "p90", "p99", "min", "max")
UNITS = {  # the end of a key -> what follows the number, and its scale
    "_s": ("s", 1.0),
    "seconds": ("s", 1.0),
    "_ms": ("ms", 1.0),
    "_us": ("µs", 1.0),
    "_j": ("J", 1.0),
    "_db": ("dB", 1.0),
    "_fraction": ("%", 100.0),
}


@dataclass(frozen=True)
class Part:
    """Of a stacked bar: how long, its colour, and what it is."""

    value: float
    colour: str
    title: str


@dataclass(frozen=True)
class Bar:
    label: str
    parts: Sequence[Part]
    text: str  # at the end of the label's line: "12.3 s"
    group: str = ""  # a heading over rows that follow each other
    low: float | None = None  # what repeated measurements spread over
    high: float | None = None


@dataclass(frozen=True)
class Range:
    """Of something measured several times, a line: least to most, p10 to p90, and the median."""

    label: str
    spread: Mapping[str, float]
    colour: str
    text: str
    group: str = ""


@dataclass(frozen=True)
class Series:
    """Points (x, y) of a plot with two axes, joined by lines or not; each may have a label."""

    title: str
    points: Sequence[tuple[float, float]]
    colour: str
    labels: Sequence[str] = ()
    joined: bool = True
    dots: bool = True
    dashed: bool = False


@dataclass(frozen=True)
class Axis:
    """What stands along it, and the key whose unit its numbers have."""

    title: str
    key: str = ""
    log: bool = False
    zero: bool = False  # begins there


def quantity(key: str, value: float) -> str:
    """A number with the unit that its key ends with: three digits."""
    return _with_unit(key, value, figure)


def _with_unit(key: str, value: float, show: Callable[[float], str]) -> str:
    if key.endswith("_bytes") or key == "bytes":
        size, name = _byte_unit(value)
        return f"{show(value / size)} {name}"
    for end, (unit, scale) in UNITS.items():
        if key.endswith(end):
            return f"{show(value * scale)} {unit}"
    return show(value)


def figure(value: float) -> str:
    """Three digits; whole numbers from 1,000 on."""
    if value == 0 or abs(value) >= 999.5:
        return f"{value:,.0f}"
    if abs(value) < 1e-3:
        return f"{value:.1e}"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def _byte_unit(value: float) -> tuple[int, str]:
    units = ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB"))
    return next((unit for unit in units if abs(value) >= unit[0]), (1, "B"))


def _tick(key: str, value: float) -> str:
    return _with_unit(key, value, lambda number: f"{number:,.6g}")


# -- Bars and ranges ------------------------------------------------------------------------------


def bars(rows: Sequence[Bar], mark: tuple[float, str] | None = None) -> str:
    """One bar under the other, from zero. mark: a value to be compared with, and what it is."""
    longest = max(
        [*(sum(part.value for part in row.parts) for row in rows), *(row.high or 0 for row in rows)]
    )
    most = max(longest, mark[0] if mark else 0.0) or 1.0
    drawn = []
    for row in rows:
        start, pieces = 0.0, []
        for part in row.parts:
            pieces.append(
                f'<rect class="{part.colour}" x="{_share(start, most)}" y="0" height="{BAR}" '
                f'width="{_share(part.value, most)}"><title>{escape(part.title)}</title></rect>'
            )
            start += part.value
        if row.low is not None and row.high is not None:
            pieces.append(_line(row.low / most, BAR / 2, row.high / most, BAR / 2, "spread"))
        if mark:
            pieces.append(_line(mark[0] / most, -3, mark[0] / most, BAR + 3, "mark"))
        drawn.append(_labelled(row, BAR, pieces))
    return _grouped(rows, drawn) + _legend(_parts(rows)) + _mark_legend(mark)


def ranges(rows: Sequence[Range], axis: Axis, mark: tuple[float, str] | None = None) -> str:
    """One range under the other on a common scale."""
    ends = [row.spread[end] for row in rows for end in ("min", "max")]
    scale = _Scale.of([*ends, mark[0]] if mark else ends, axis)
    drawn, middle = [], THIN / 2
    for row in rows:
        s, at = row.spread, {key: scale.at(row.spread[key]) for key in PERCENTILES}
        pieces = [
            _line(0, middle, 1, middle, "rule"),
            _line(at["min"], middle, at["max"], middle, f"whole {row.colour}"),
            _line(at["p10"], middle, at["p90"], middle, f"most {row.colour}"),
            f'<circle class="{row.colour} dot" cx="{_share(at["median"])}" cy="{middle}" r="5">'
            f"<title>{escape(_spread_text(axis.key, s))}</title></circle>",
        ]
        if mark:
            pieces.insert(1, _line(scale.at(mark[0]), 0, scale.at(mark[0]), THIN, "mark"))
        drawn.append(_labelled(row, THIN, pieces))
    ticks = f'<svg width="100%" height="18" aria-hidden="true">{_ticks(scale, axis, 0)}</svg>'
    told = f"{axis.title}. Dot: median; thick: p10 to p90; thin: least to most"
    return f'{_grouped(rows, drawn)}{ticks}<p class="hint">{escape(told)}</p>{_mark_legend(mark)}'


def _grouped(rows: Sequence[Bar | Range], drawn: Sequence[str]) -> str:
    """Rows under the headings of their groups."""
    told, group = [], ""
    for row, markup in zip(rows, drawn, strict=True):
        if row.group != group:
            group = row.group
            told.append(f'<div class="group">{escape(group)}</div>')
        told.append(markup)
    return "".join(told)


def _labelled(row: Bar | Range, height: int, pieces: Iterable[str]) -> str:
    told = ", ".join(part for part in (row.group, row.label) if part)
    return (
        f'<div class="row"><div class="label"><span>{escape(row.label)}</span>'
        f"<b>{escape(row.text)}</b></div>"
        f'<svg width="100%" height="{height}" role="img" '
        f'aria-label="{escape(f"{told}: {row.text}")}">{"".join(pieces)}</svg></div>'
    )


def _parts(rows: Sequence[Bar]) -> list[tuple[str, str]]:
    """Colours with what they are, where bars have several."""
    if all(len(row.parts) < 2 for row in rows):
        return []
    return [(part.colour, part.title.partition(":")[0]) for row in rows for part in row.parts]


def _spread_text(key: str, spread: Mapping[str, float]) -> str:
    told = ", ".join(f"{name} {quantity(key, spread[name])}" for name in PERCENTILES)
    return f"{told}; {spread['runs']:.0f} runs" if "runs" in spread else told


# -- Two axes -------------------------------------------------------------------------------------


def plot(series: Sequence[Series], x: Axis, y: Axis, mark: tuple[float, str] | None = None) -> str:
    """Points and lines. mark: a horizontal line at a value of y, and what it is."""
    xs = [point[0] for one in series for point in one.points]
    ys = [point[1] for one in series for point in one.points] + ([mark[0]] if mark else [])
    across, up = _Scale.of(xs, x), _Scale.of(ys, y)

    def down(value: float) -> float:
        return round(HEIGHT * (1 - up.at(value)), 1)

    pieces = []
    for tick in up.ticks():
        pieces.append(_line(0, down(tick), 1, down(tick), "grid"))
        text = escape(_tick(y.key, tick))
        pieces.append(f'<text class="end" x="-8" y="{down(tick) + 4:.1f}">{text}</text>')
    pieces.append(_ticks(across, x, HEIGHT))
    if mark:
        pieces.append(_line(0, down(mark[0]), 1, down(mark[0]), "mark"))
    for one in series:
        pieces += _drawn(one, x, y, across, down)
    named = "; ".join(one.title for one in series)
    return (
        f'<div class="axis">{escape(y.title)}</div>'
        f'<div class="plot"><svg width="100%" height="{HEIGHT + 24}" role="img" '
        f'aria-label="{escape(f"{y.title} over {x.title}: {named}")}">{"".join(pieces)}</svg></div>'
        f'<div class="axis across">{escape(x.title)}</div>'
        + _legend([(f"{one.colour}{' dashed' * one.dashed}", one.title) for one in series])
        + _mark_legend(mark)
    )


def _drawn(
    one: Series, x: Axis, y: Axis, across: "_Scale", down: Callable[[float], float]
) -> list[str]:
    pieces = []
    points = sorted(one.points) if one.joined else one.points
    if one.joined:
        kind = f"join {one.colour}{' dashed' * one.dashed}"
        for (x0, y0), (x1, y1) in pairwise(points):
            pieces.append(_line(across.at(x0), down(y0), across.at(x1), down(y1), kind))
    if not one.dots:
        return pieces
    labels = one.labels or [""] * len(points)
    for (px, py), label in zip(points, labels, strict=True):
        told = f"{label or one.title}: {quantity(x.key, px)}, {quantity(y.key, py)}"
        pieces.append(
            f'<circle class="{one.colour} dot" cx="{_share(across.at(px))}" cy="{down(py)}" r="5">'
            f"<title>{escape(told)}</title></circle>"
        )
        if label:
            left = across.at(px) > 0.5
            pieces.append(
                f'<text class="point {"end" if left else "start"}" x="{_share(across.at(px))}" '
                f'dx="{-9 if left else 9}" y="{down(py) + 4:.1f}">{escape(label)}</text>'
            )
    return pieces


def _ticks(scale: "_Scale", axis: Axis, top: int) -> str:
    """Marks across and their numbers below."""
    return "".join(
        _line(scale.at(tick), top, scale.at(tick), top + 4, "grid")
        + f'<text class="middle" x="{_share(scale.at(tick))}" y="{top + 17}">'
        f"{escape(_tick(axis.key, tick))}</text>"
        for tick in scale.ticks()
    )


@dataclass(frozen=True)
class _Scale:
    """From values to [0, 1]. low, high: in `unit`s, or their logarithms."""

    low: float
    high: float
    log: bool
    unit: float = 1.0  # ticks are round numbers of it

    @classmethod
    def of(cls, values: Sequence[float], axis: Axis) -> "_Scale":
        """A little wider than the values, so that no dot lies on the frame."""
        unit = float(_byte_unit(max(values))[0]) if axis.key.endswith("_bytes") else 1.0
        low, high = min(values) / unit, max(values) / unit
        if axis.log:
            low, high = math.log10(low), math.log10(high)
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 0.5
        start = 0.0 if axis.zero and not axis.log and low >= 0 else low - margin
        return cls(start, high + margin, axis.log, unit)

    def at(self, value: float) -> float:
        position = math.log10(value / self.unit) if self.log else value / self.unit
        return (position - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers within the scale."""
        found = self._decades() if self.log else _round_ticks(self.low, self.high)
        if self.log and len(found) < 3:  # less than a decade
            found = _round_ticks(10**self.low, 10**self.high)
        return [tick * self.unit for tick in found]

    def _decades(self) -> list[float]:
        """1, 2, 5, 10, ... or fewer of them."""
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        found: list[float] = []
        for digits in ((1, 2, 5), (1, 3), (1,)):
            every = [digit * 10.0**decade for decade in decades for digit in digits]
            found = [tick for tick in every if self.low <= math.log10(tick) <= self.high]
            if len(found) <= MOST_TICKS:
                break
        return found[:: math.ceil(len(found) / MOST_TICKS) or 1]


def _round_ticks(low: float, high: float) -> list[float]:
    raw = (high - low) / (MOST_TICKS - 1)
    decade = 10.0 ** math.floor(math.log10(raw))
    step = next(decade * digit for digit in (1, 2, 2.5, 5, 10) if decade * digit >= raw)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step) + 1)]


# -- Shared ---------------------------------------------------------------------------------------


def _legend(items: Iterable[tuple[str, str]]) -> str:
    """Colours and what they are, each once; nothing where there is only one."""
    unique = list(dict.fromkeys(items))
    if len(unique) < 2:
        return ""
    told = "".join(f'<li><i class="{colour}"></i>{escape(title)}</li>' for colour, title in unique)
    return f'<ul class="legend">{told}</ul>'


def _mark_legend(mark: tuple[float, str] | None) -> str:
    return f'<ul class="legend"><li><i class="mark"></i>{escape(mark[1])}</li></ul>' if mark else ""


def _share(value: float, of: float = 1.0) -> str:
    return f"{100 * value / of:.2f}%"


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return (
        f'<line class="{kind}" x1="{_share(x1)}" y1="{y1:g}" x2="{_share(x2)}" y2="{y2:g}"></line>'
    )
