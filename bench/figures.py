"""Which plots the page draws of which command's rows. A figure without data is left out.

A figure looks for keys of rows (`e2e_s`, `floor_fraction`) and not for particular rows: what a
command measures next to them is drawn without a change here.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from wantrt.bench import plots
from wantrt.bench.plots import Axis, Bar, Part, Range, Series, quantity
from wantrt.bench.result import Result, Row
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

STAGES = {  # key -> what it is, and its colour
    "text_s": ("text", "c2"),
    "image_encode_s": ("image", "c4"),
    "denoise_s": ("denoising", "c1"),
    "vae_decode_s": ("VAE decode", "c3"),
}
STARTUP = {
    "python_s": ("Python", "c5"),
    "import_s": ("import", "c4"),
    "load_s": ("load", "c2"),
    "first_s": ("first video", "c1"),
}
BLOCK = {
    "gemm_ms": ("products", "c1"),
    "attention_ms": ("attention", "c2"),
    "rest_ms": ("the rest", "c3"),
}
BUILD_S = {
    "weights_s": ("weights", "c2"),
    "graphs_s": ("graphs", "c3"),
    "plans_s": ("plans", "c1"),
}
BUILD_BYTES = {key.replace("_s", "_bytes"): told for key, told in BUILD_S.items()}
MEMORY = {
    "peak_bytes": ("on top of what was loaded", "c1"),
    "peak_rss_bytes": ("resident, host", "c1"),
    "peak_anonymous_bytes": ("allocated, host", "c2"),
    "peak_gpu_bytes": ("GPU, by NVML", "c3"),
    "peak_gpu_device_bytes": ("GPU, all processes", "c3"),
    "peak_allocated_bytes": ("GPU, by torch's allocator", "c4"),
}
MOST_NAMES = 6  # beside the points of a plot
COLOURS = ("c1", "c2", "c3", "c4", "c5", "c6")


@dataclass(frozen=True)
class Figure:
    title: str
    markup: str
    note: str = ""


Draw = Callable[[Result], "Figure | None"]


def figures(result: Result) -> list[Figure]:
    """The figures of a result, in the order of its command."""
    draws = FIGURES.get(result.name, ANY)
    found = (draw(result) for draw in draws) if result.rows else ()
    return [figure for figure in found if figure is not None]


# -- What rows hold -------------------------------------------------------------------------------


def value(row: Row, key: str) -> float | None:
    """A number of a row, or the median of several. None: it is not there."""
    found = row.get(key)
    found = found.get("median") if isinstance(found, Mapping) else found
    return float(found) if isinstance(found, (int, float)) and not isinstance(found, bool) else None


def spread(row: Row, key: str) -> Mapping[str, float] | None:
    found = row.get(key)
    return found if isinstance(found, Mapping) and "median" in found else None


def ends(row: Row, key: str) -> tuple[float | None, float | None]:
    """p10 and p90 of what was measured several times."""
    several = spread(row, key) or {}
    return several.get("p10"), several.get("p90")


def labels(rows: Sequence[Row]) -> list[str]:
    """A name for each row: its own, and what tells rows of the same name apart."""
    told = []
    for row in rows:
        twins = [other for other in rows if other["name"] == row["name"]]
        keys = [key for key in row if key != "name" and all(is_word(other, key) for other in twins)]
        differing = [key for key in keys if len({str(other.get(key)) for other in twins}) > 1]
        told.append(", ".join([row["name"], *(word(key, row[key]) for key in differing)]))
    return told


def is_word(row: Row, key: str) -> bool:
    """Whether a row's value identifies it: no measured number."""
    return isinstance(row.get(key), (str, bool)) or (
        isinstance(row.get(key), int) and "_" not in key
    )


def word(key: str, found: Any) -> str:
    return found if isinstance(found, str) else f"{key} {found}"


# -- Figures --------------------------------------------------------------------------------------


def stacked(
    title: str, parts: Mapping[str, tuple[str, str]], whole: str | None = None, note: str = ""
) -> Draw:
    """A bar a row of what follows one after the other; `whole`: the key of all of it together.

    Parts that take longer than the whole ran at once: the whole alone is drawn.
    """

    def draw(result: Result) -> Figure | None:
        found = []
        for row, label in zip(result.rows, labels(result.rows), strict=True):
            taken = {key: told for key in parts if (told := value(row, key))}
            total = (value(row, whole) if whole else None) or sum(taken.values())
            if not total:
                continue
            unit = whole or next(iter(taken))
            if sum(taken.values()) > 1.001 * total:
                taken = {}
            pieces = [
                Part(seconds, parts[key][1], f"{parts[key][0]}: {quantity(key, seconds)}")
                for key, seconds in taken.items()
            ]
            if not taken:
                pieces.append(Part(total, "c1", f"all of it: {quantity(unit, total)}"))
            elif (other := total - sum(taken.values())) > 1e-3 * total:
                pieces.append(Part(other, "c6", f"besides: {quantity(unit, other)}"))
            found.append(Bar(label, pieces, quantity(unit, total)))
        return Figure(title, plots.bars(found), note) if found else None

    return draw


def amounts(
    title: str,
    keys: Mapping[str, tuple[str, str]],
    note: str = "",
    mark: tuple[float, str] | None = None,
    most: int = 100,
) -> Draw:
    """A bar for each of the keys of each row; more than `most` of them are left to the table."""

    def draw(result: Result) -> Figure | None:
        found = []
        several = sum(any(key in row for row in result.rows) for key in keys) > 1
        for row, label in zip(result.rows, labels(result.rows), strict=True):
            for key, (what, colour) in keys.items():
                if (told := value(row, key)) is None:
                    continue
                name, group = (what, label) if several else (label, "")
                low, high = ends(row, key)
                text = quantity(key, told)
                found.append(Bar(name, [Part(told, colour, text)], text, group, low, high))
        return Figure(title, plots.bars(found, mark), note) if 0 < len(found) <= most else None

    return draw


def spreads(
    title: str, keys: Mapping[str, tuple[str, str]], mark: tuple[float, str] | None = None
) -> Draw:
    """A range for each of the keys of each row that was measured several times, from zero."""

    def draw(result: Result) -> Figure | None:
        found = []
        for row, label in zip(result.rows, labels(result.rows), strict=True):
            for key, (what, colour) in keys.items():
                if told := spread(row, key):
                    name, group = (what, label) if len(keys) > 1 else (label, "")
                    text = f"{plots.figure(told['median'])} ×" if mark else ""
                    text = text or quantity(key, told["median"])
                    found.append(Range(name, told, colour, text, group))
        axis = Axis(title, next(iter(keys)), zero=True)
        return Figure(title, plots.ranges(found, axis, mark)) if found else None

    return draw


def steps(result: Result) -> Figure | None:
    """How even the steps are: each row's times relative to their median, which stands beside."""
    found = []
    for row, label in zip(result.rows, labels(result.rows), strict=True):
        if (told := spread(row, "step_ms")) and told["median"]:
            relative = {key: told[key] / told["median"] for key in plots.PERCENTILES}
            text = quantity("step_ms", told["median"])
            found.append(Range(label, relative | {"runs": told["runs"]}, "c1", text))
    axis = Axis("Relative to their median", "_fraction")
    return Figure("Step times", plots.ranges(found, axis)) if found else None


def floor(result: Result) -> Figure | None:
    """How much of a time is what the machine's own measured rates need at least."""
    found = []
    for row, label in zip(result.rows, labels(result.rows), strict=True):
        keys = [key for key in row if key.endswith("floor_fraction")]
        for key in keys:
            if (share := value(row, key)) is not None:
                stage = key.removesuffix("floor_fraction").strip("_").replace("_", " ")
                name, group = (stage or "all of it", label) if len(keys) > 1 else (label, "")
                text = f"{share:.1%}"
                found.append(Bar(name, [Part(share, "c1", text)], text, group))
    if not found:
        return None
    note = "The floor: FLOPs and bytes of the work at the best rates measured on this machine."
    return Figure("Floor / measured", plots.bars(found, (1.0, "100 %: the floor")), note)


def roofline(result: Result) -> Figure | None:
    """FLOP/s reached over FLOPs a byte of weights, under the roof of the measured rates."""
    rates = result.machine.get("rates") or {}
    points, told = [], []
    for row, label in zip(result.rows, labels(result.rows), strict=True):
        seconds = main_seconds(row)
        flops, weights = value(row, "flops"), value(row, "weight_bytes")
        if seconds and flops and weights:
            points.append((flops / weights, flops / seconds / 1e12))
            told.append(label)
    if not points or not {"matrix", "copy"} <= rates.keys():
        return None
    roof, copy = rates["matrix"] / 1e12, rates["copy"] / 1e12
    ridge = roof / copy
    left = min(ridge / 4, *(x / 2 for x, _ in points))
    right = max(ridge * 4, *(x * 2 for x, _ in points))
    lines = [
        Series("copies", [(left, left * copy), (ridge, roof)], "c5", dots=False),
        Series("products", [(ridge, roof), (right, roof)], "c2", dots=False),
        Series("measured", points, "c1", told, joined=False),
    ]
    axes = Axis("FLOPs a byte of weights", log=True), Axis("TFLOP/s", log=True)
    return Figure("Roofline", plots.plot(lines, *axes), "roofs: this machine's measured rates")


def main_seconds(row: Row) -> float | None:
    """The time that a row's FLOPs belong to."""
    for key, scale in {"seconds": 1.0, "step_ms": 1e-3, "chunk_ms": 1e-3, "text_s": 1.0}.items():
        if (found := value(row, key)) is not None:
            return found * scale
    return None


def growth(title: str, y_title: str, key: str, floor_key: str | None = None) -> Draw:
    """Something over the number of tokens, both logarithmic, beside the floor's own growth."""

    def draw(result: Result) -> Figure | None:
        rows = [row for row in result.rows if row.get("axis") == "tokens" and value(row, key)]
        points = [(row["tokens"], value(row, key) or 1.0) for row in rows]
        if len({tokens for tokens, _ in points}) < 2:
            return None
        series = [Series("measured", points, "c1")]
        if floors := [(row["tokens"], row[floor_key]) for row in rows if floor_key in row]:
            series.append(Series("floor", floors, "c1", dots=False, dashed=True))
        axes = Axis("tokens", log=True), Axis(y_title, key, log=True)
        return Figure(title, plots.plot(series, *axes))

    return draw


def quality(result: Result) -> Figure | None:
    """PSNR over the speed gained; without one, as bars."""
    told = [(row, psnr) for row in result.rows if (psnr := value(row, "psnr_db")) is not None]
    rows = [(row, psnr) for row, psnr in told if not row.get("noise_floor")]
    if not rows:
        return None
    floors = [psnr for row, psnr in told if row.get("noise_floor")]  # the last is of all of them
    told_floor = "noise floor: the reference with another exact attention"
    mark = (floors[-1], told_floor) if floors else None
    note = "PSNR against the reference's videos from the same latents; higher is nearer."
    names = labels([row for row, _ in rows])
    points = [(gained, psnr) for row, psnr in rows if (gained := value(row, "speedup"))]
    if len(points) == len(rows):
        shown = names if len(rows) <= MOST_NAMES else ["" for _ in names]
        series = [Series("videos", points, "c1", shown, joined=False)]
        axes = Axis("times as fast as the reference"), Axis("PSNR", "psnr_db")
        return Figure("Quality against speed", plots.plot(series, *axes, mark=mark), note)
    found = [
        Bar(name, [Part(psnr, "c1", name)], quantity("psnr_db", psnr))
        for name, (_, psnr) in zip(names, rows, strict=True)
    ]
    return Figure("Quality", plots.bars(found, mark), note)


def engines(result: Result) -> Figure | None:
    """Seconds of the same work by each engine."""
    found = []
    for row in result.rows:
        if (told := value(row, "seconds")) is not None:
            engine, text = str(row.get("engine", "")), quantity("_s", told)
            part, group = Part(told, engine_colour(engine), text), row.get("scope") or row["name"]
            found.append(Bar(engine, [part], text, str(group), *ends(row, "seconds")))
    return Figure("The same work by each engine", plots.bars(found)) if found else None


def engine_colour(engine: str) -> str:
    if engine.startswith("wantrt"):
        return "c1"
    return "c2" if "compiled" in engine else "c5"


def of_rows(key: str, draw: Draw) -> Draw:
    """Of those rows alone that have a key."""
    return lambda result: draw(replace(result, rows=[row for row in result.rows if key in row]))


memory = amounts("Peak memory", MEMORY)
ANY: tuple[Draw, ...] = (
    steps,
    floor,
    roofline,
    memory,
)


def only(keys: Iterable[str], colour: str = "c1") -> dict[str, tuple[str, str]]:
    return {key: (key.rpartition("_")[0].replace("_", " "), colour) for key in keys}


FIGURES: dict[str, tuple[Draw, ...]] = {
    "latency": (
        stacked("Where a video's time goes", STAGES, "e2e_s", "prompt in to pixels out, medians"),
        amounts("To the first pixels", only(["first_frame_s"], "c3")),
        *ANY,
        amounts("Energy of a video", only(["energy_j"], "c6")),
    ),
    "throughput": (
        amounts("Videos an hour", only(["videos_per_hour"])),
        spreads("Latency and waiting", {"latency_s": ("all", "c1"), "queue_s": ("queue", "c2")}),
        memory,
    ),
    "scaling": (
        growth("Step time over tokens", "milliseconds a step", "step_ms", "floor_ms"),
        growth("Memory over tokens", "peak, GPU", "peak_gpu_bytes"),
        growth("Memory over tokens", "peak, GPU, all processes", "peak_gpu_device_bytes"),
        growth("Memory over tokens", "peak, host", "peak_rss_bytes"),
        floor,
        roofline,
    ),
    "startup": (
        stacked("From a fresh process to the first video", STARTUP, "to_first_video_s"),
        amounts("Second video", only(["second_s"], "c3")),
        memory,
    ),
    "build": (
        of_rows("what", stacked("Time to build", BUILD_S, "build_s")),
        of_rows("kind", amounts("Time of each part", only(["build_s"]), most=26)),
        of_rows("what", stacked("Bytes of the bundle", BUILD_BYTES, "bytes")),
        of_rows("what", memory),
    ),
    "kernels": (
        amounts(
            "Share of the copy bandwidth",
            only(["copy_fraction"]),
            "least bytes of the op in its time, of what a copy reaches in the same run",
            (1.0, "100 %: a copy"),
        ),
        amounts(
            "Times as fast as torch.compile",
            only(["speedup_over_compiled"], "c2"),
            mark=(1.0, "as fast"),
        ),
    ),
    "block": (
        stacked("One block", BLOCK, "ms", "by kernel names; times of CUDA events"),
        floor,
        roofline,
        memory,
    ),
    "quality": (quality, amounts("SSIM", only(["ssim"], "c3"))),
    "compare": (
        spreads("Times as fast as the peer", {"ratio": ("", "c1")}, (1.0, "as fast")),
        engines,
        memory,
    ),
    "vae": (amounts("A chunk", only(["chunk_ms"])), floor, roofline, memory),
    "text": (amounts("A prompt", only(["text_s"], "c2")), floor, roofline, memory),
}
