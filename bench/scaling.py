"""Time and memory over tokens, batch and steps, beside the floor's own growth.

    wantrt bench scaling --size 64x64,128x128,192x192 --frames 25,49        # nano, which ships
    wantrt bench scaling --variant 1.3B --checkpoint random:0 --size 832x480,1280x720 \\
        --frames 17,81,121 --steps 3

Three axes, one varied at a time: tokens (every size with every number of frames), batch (the first
of them without guidance), steps (the first of them with every number of steps). Guidance is a batch
of two, or, of more tokens than wantrt.config.GUIDANCE_BATCH_TOKENS, two passes of the model in a
step: `batch` and `passes`. Cases of all axes run from few tokens to many, as the host's allocators
keep what they had; a GPU's memory is given back before each.

The last rows are fits: step time as a power of tokens, and as constant + linear + quadratic; the
same power of the floor says how much of the growth is the model's and not ours; memory as a line.
They need three different numbers of tokens, the polynomial four.
"""

import gc
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

from wantrt.bench.bundles import choose_bundle, describe_bundle
from wantrt.bench.memory import Peaks
from wantrt.bench.options import (
    BUNDLE,
    PROMPT,
    RESIDENCY,
    RESULT,
    RUNTIME,
    SEED,
    SIZES,
    options,
    repeats,
)
from wantrt.bench.rates import Rates, measure_rates
from wantrt.bench.request import (
    Served,
    check_request,
    describe_request,
    floor_row,
    make_request,
    serve,
)
from wantrt.bench.result import Cell, Row, Table, number, run, spread, start, text
from wantrt.bundle import Bundle
from wantrt.cli.build import list_of, parse_count
from wantrt.cli.command import command as bench_command
from wantrt.cli.console import Console
from wantrt.config import Size
from wantrt.linked import refuse_other_names
from wantrt.runtime.loading import choose_for
from wantrt.runtime.pipeline import Pipeline
from wantrt.runtime.settings import Settings
from wantrt.runtime.sizes import dit_symbols
from wantrt.session import PRECISIONS

refuse_other_names(__spec__)


def or_fit(cell: Cell, **fits: str) -> Cell:
    """A cell that shows, in the row of a fit, its numbers by these formats."""

    def shown(row: Row) -> str:
        found = [told.format(row[key]) for key, told in fits.items() if key in row]
        return " ".join(found) or cell(row)

    return shown


TABLE = Table(
    (
        ("case", text("name")),
        ("tokens L", number("tokens", 0)),
        ("batch", number("batch", 0)),
        ("steps", number("steps", 0)),
        (
            "step ms",
            or_fit(
                number("step_ms", 1), exponent="~ L^{:.2f}", ratio="x{:.2f}", per_step_ms="{:.1f}"
            ),
        ),
        (
            "floor ms",
            or_fit(number("floor_ms", 1), floor_exponent="~ L^{:.2f}", floor_ratio="x{:.2f}"),
        ),
        ("floor", number("floor_fraction", 1, "%", 100)),
        ("decode s", number("vae_decode_s")),
        ("peak MiB", or_fit(lambda row: peak_mib(row), mib_per_token="{:.3f} L")),
    )
)


def peak_mib(row: Row) -> str:
    """Of the GPU where there is one, else of the host."""
    keys = ("peak_gpu_bytes", "peak_gpu_device_bytes", "peak_rss_bytes")
    return next((f"{row[key] / 2**20:,.0f}" for key in keys if key in row), "")


@dataclass(frozen=True)
class Case:
    """A request, and which axis it is a point of."""

    axis: str
    settings: Settings


def make_cases(
    bundle: Bundle,
    runtime: str,
    asked: dict[str, Any],
    sizes: Sequence[Size],
    frames: Sequence[int],
    steps: Sequence[int],
) -> list[Case]:
    """The first size, frames and steps are where the other axes are varied."""

    def case(axis: str, **changed: Any) -> Case:
        first = {"size": sizes[0], "num_frames": frames[0], "num_inference_steps": steps[0]}
        return Case(axis, make_request(bundle, runtime, {**asked, **first, **changed}))

    tokens = [case("tokens", size=size, num_frames=n) for size in sizes for n in frames]
    others = [case("steps", num_inference_steps=count) for count in steps[1:]]
    if is_guided(tokens[0].settings):
        low = {"guidance_scale_2": 1.0} if len(bundle.variant.experts) > 1 else {}
        others.insert(0, case("batch", guidance_scale=1.0, **low))
    # of equally many, the unguided first, which take less
    return sorted(others + tokens, key=lambda case: symbols_of(bundle, case.settings)["L"])


def symbols_of(bundle: Bundle, settings: Settings) -> dict[str, int]:
    """L: tokens, and B: the batch of a step."""
    frames = settings.denoised_frames(bundle.variant)
    return dit_symbols(bundle.variant, settings.size, frames, is_guided(settings))


def is_guided(settings: Settings) -> bool:
    return any(scale != 1.0 for scale in settings.guidance_scales)


def measure(
    pipe: Pipeline, cases: Sequence[Case], rates: Rates, *, warmup: int = 2, runs: int = 5
) -> Iterator[Row]:
    """A row a case, and the fits of those that are whole.

    After an interruption, the row of a case is of the requests that were served.
    """
    rows: list[Row] = []
    for case in cases:
        pipe.denoiser.forget()
        pipe.decoder.forget()
        gc.collect()
        pipe.device.release()
        peaks, served = Peaks(pipe.device.torch_device), []
        try:
            for _ in range(warmup):
                serve(pipe, case.settings, peaks.look)
            for _ in range(runs):
                served.append(serve(pipe, case.settings))
        except (Exception, KeyboardInterrupt):
            if served:
                yield case_row(pipe.bundle, case, served, peaks, rates)
            yield from fits(rows)
            raise
        rows.append(case_row(pipe.bundle, case, served, peaks, rates))
        yield rows[-1]
    yield from fits(rows)


def case_row(
    bundle: Bundle, case: Case, served: Sequence[Served], peaks: Peaks, rates: Rates
) -> Row:
    settings = case.settings
    seconds = {
        name: spread([one.seconds[name] for one in served])
        for name in ("denoise_s", "vae_decode_s", "e2e_s")
    }
    size, symbols = "{}x{}".format(*settings.size), symbols_of(bundle, settings)
    floors = floor_row(bundle, settings, rates, seconds)
    step_ms = spread([step for one in served for step in one.step_ms])
    what = {"tokens": "", "batch": ", unguided", "steps": f", {settings.num_inference_steps} steps"}
    return {
        "name": f"{size}x{settings.num_frames}{what[case.axis]}",
        "axis": case.axis,
        "size": size,
        "frames": settings.num_frames,
        "tokens": symbols["L"],
        "batch": symbols["B"],
        "passes": 2 // symbols["B"] if is_guided(settings) else 1,
        "steps": settings.num_inference_steps,
        "step_ms": step_ms,
        "floor_ms": floors["step_floor_ms"],
        "floor_fraction": floors["step_floor_ms"] / step_ms["median"],
        "flops": floors["flops"],
        "weight_bytes": floors["weight_bytes"],
        **seconds,
        "vae_decode_floor_s": floors["vae_decode_floor_s"],
        "vae_decode_floor_fraction": floors["vae_decode_floor_fraction"],
        **peaks.row(),
    }


# -- Fits -----------------------------------------------------------------------------------------


def fits(rows: Sequence[Row]) -> list[Row]:
    """What the rows of each axis say together; nothing where they are too few."""
    found = (fit_tokens(rows), fit_batch(rows), fit_steps(rows))
    return [{"axis": "fit", **fit} for fit in found if fit is not None]


def fit_tokens(rows: Sequence[Row]) -> Row | None:
    """Time and memory over tokens."""
    points = {row["tokens"]: row for row in rows if row["axis"] == "tokens"}
    if len(points) < 3:
        return None
    tokens = list(points)
    step_ms = [row["step_ms"]["median"] for row in points.values()]
    row: Row = {
        "name": "fit over tokens",
        "points": len(tokens),
        "exponent": exponent(tokens, step_ms),
        "floor_exponent": exponent(tokens, [row["floor_ms"] for row in points.values()]),
    }
    for key in ("peak_gpu_bytes", "peak_gpu_device_bytes", "peak_rss_bytes"):
        if all(key in point for point in points.values()):
            slope, _ = np.polyfit(tokens, [point[key] for point in points.values()], 1)
            row |= {"memory": key, "mib_per_token": float(slope) / 2**20}
            break
    if len(tokens) > 3:
        constant, linear, quadratic = polynomial(tokens, step_ms)
        fitted = [constant + linear * n + quadratic * n**2 for n in tokens]
        errors = [abs(f / m - 1) for f, m in zip(fitted, step_ms, strict=True)]
        row |= {
            "constant_ms": constant,
            "linear_ms_per_token": linear,
            "quadratic_ms_per_token2": quadratic,
            "largest_error_fraction": max(errors),
        }
    return row


def exponent(tokens: Sequence[float], values: Sequence[float]) -> float:
    """x of values ~ tokens^x, by least squares of the logarithms."""
    return float(np.polyfit(np.log(tokens), np.log(values), 1)[0])


def polynomial(tokens: Sequence[float], values: Sequence[float]) -> tuple[float, float, float]:
    """a, b, c of a + b L + c L², by least squares of the relative errors."""
    c, b, a = np.polyfit(tokens, values, 2, w=1 / np.asarray(values))
    return float(a), float(b), float(c)


def fit_batch(rows: Sequence[Row]) -> Row | None:
    """What guidance costs: a step with it and a step without."""
    alone = next((row for row in rows if row["axis"] == "batch"), None)
    guided = [row for row in same_video(rows, alone) if row["axis"] == "tokens"] if alone else []
    if alone is None or not guided:
        return None
    (both,) = guided
    return {
        "name": "guided / unguided",
        "ratio": both["step_ms"]["median"] / alone["step_ms"]["median"],
        "floor_ratio": both["floor_ms"] / alone["floor_ms"],
    }


def fit_steps(rows: Sequence[Row]) -> Row | None:
    """Denoising over steps: what one more costs, and what is paid once."""
    others = [row for row in rows if row["axis"] == "steps"]
    if not others:
        return None
    found = {
        row["steps"]: row["denoise_s"]["median"]
        for row in same_video(rows, others[0])
        if row["axis"] != "batch"
    }
    if len(found) < 2:
        return None
    slope, constant = np.polyfit(list(found), list(found.values()), 1)
    return {
        "name": "fit over steps",
        "points": len(found),
        "per_step_ms": float(slope * 1e3),
        "once_ms": float(constant * 1e3),
    }


def same_video(rows: Sequence[Row], row: Row) -> list[Row]:
    return [r for r in rows if (r["size"], r["frames"]) == (row["size"], row["frames"])]


# -- The command ----------------------------------------------------------------------------------


@bench_command()
@options(
    *(BUNDLE, RUNTIME, RESIDENCY, PROMPT, SIZES),
    click.option("--frames", metavar="N,…", callback=list_of(parse_count), help="At each size."),
    click.option(
        "--steps",
        metavar="N,…",
        default="4,8",
        show_default=True,
        callback=list_of(parse_count),
        help="The first for all cases; the others at the first size and frames.",
    ),
    *(SEED, repeats(), RESULT),
)
def command(
    console: Console,
    bundle: Path | None,
    variant: str | None,
    checkpoint: str | None,
    precision: str | None,
    trust_plans: bool,
    runtime: str,
    residency: str,
    prompt: str,
    sizes: tuple[Size, ...] | None,
    frames: tuple[int, ...] | None,
    steps: tuple[int, ...],
    seed: int,
    warmup: int,
    runs: int,
    out: Path,
    note: str | None,
) -> int:
    """Time and memory over tokens, batch and steps, fitted beside the floor's growth."""
    choice = choose_bundle(
        *(bundle, variant, checkpoint, precision),
        runtimes=[runtime],
        draw=residency == "resident",
        sizes=sizes,
        frames=frames,
    )
    asked: dict[str, Any] = {"prompt": prompt, "seed": seed}
    sizes, frames = sizes or (choice.variant.size,), frames or (choice.variant.num_frames,)
    for size in sizes:
        for count in frames:
            check_request(choice.variant, {**asked, "size": size, "num_frames": count})
    for number_of_steps in steps:
        check_request(choice.variant, {**asked, "num_inference_steps": number_of_steps})
    with console.progress() as progress:
        loaded = choice.open(progress)
    chosen = choose_for(loaded, runtime)
    cases = make_cases(loaded, chosen.name, asked, sizes, frames, steps)
    settings = {
        **describe_bundle(loaded),
        "cases": [{"axis": c.axis, **describe_request(c.settings)} for c in cases],
        "runtime": chosen.name,
        "residency": residency,
        "warmup": warmup,
        "runs": runs,
    }
    result = start("scaling", settings, note)
    dtype = PRECISIONS[loaded.precision[loaded.variant.experts[0].name]]
    rates = measure_rates(chosen.make_device().torch_device, dtype)
    result.machine["rates"] = asdict(rates)
    with Pipeline.load(loaded, chosen.name, residency=residency, trust_plans=trust_plans) as pipe:
        rows = measure(pipe, cases, rates, warmup=warmup, runs=runs)
        return run(console, result, rows, TABLE, out)
