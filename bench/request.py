"""One request to a loaded pipeline, timed: its stages, every step, the first frame, all frames.

The seconds of a stage are the pipeline's own. The prompt is embedded anew each time, as a new
prompt would be. A step is over when the device says so: on a GPU the host waits for it once a step,
which costs the way there and back, some 20 µs of a step's milliseconds or seconds.
"""

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from wantrt.bench.floor import Cost, decode_cost, step_cost
from wantrt.bench.rates import Rates
from wantrt.bench.result import Row
from wantrt.bundle import Bundle
from wantrt.config import Size, Variant
from wantrt.linked import refuse_other_names
from wantrt.runtime.pipeline import Frames, Pipeline, Progress
from wantrt.runtime.settings import Settings, resolve
from wantrt.runtime.sizes import resolve_for, served_sizes
from wantrt.schedulers.grids import make_grid, split_steps
from wantrt.session import PRECISIONS
from wantrt.tasks.source import INPUTS, open_source
from wantrt.verify import synthetic_source

refuse_other_names(__spec__)

STAGES = {  # of the pipeline's timings -> as the field calls them
    "text_s": "text_s",
    "encode_s": "image_encode_s",
    "denoise_s": "denoise_s",
    "decode_s": "vae_decode_s",
}


@dataclass(frozen=True)
class Served:
    """seconds: of the stages, and `first_frame_s`, `e2e_s`: from the prompt to pixels in memory."""

    seconds: dict[str, float]
    step_ms: list[float]
    chunks: list[Frames]


def serve(pipe: Pipeline, settings: Settings, look: Callable[[], None] = lambda: None) -> Served:
    """Generate a video. look: called after every step and chunk, within what is timed."""
    pipe.text_encoder.forget()
    timings: dict[str, float] = {}
    steps: list[float] = []  # the moments at which they were over; the first: of the start

    def on_progress(progress: Progress) -> None:
        if progress.stage == "denoise":
            if not steps:
                steps.append(start + sum(timings.values()))
            pipe.device.synchronize()
            steps.append(time.perf_counter())
        look()

    chunks: list[Frames] = []
    first_frame_s = 0.0
    start = time.perf_counter()
    for frames in pipe.stream(settings, callback=on_progress, timings=timings):
        first_frame_s = first_frame_s or time.perf_counter() - start
        chunks.append(frames)
    seconds = {STAGES[name]: value for name, value in timings.items()}
    seconds |= {"first_frame_s": first_frame_s, "e2e_s": time.perf_counter() - start}
    step_ms = [(end - begin) * 1e3 for begin, end in pairwise(steps)]
    return Served(seconds, step_ms, chunks)


# -- What is asked for ----------------------------------------------------------------------------


def check_request(variant: Variant, asked: Mapping[str, Any]) -> None:
    """Raises what `make_request` would raise, as far as it does not depend on the bundle."""
    given = given_of(asked)
    sources = {name: given.pop(name) for name in INPUTS if name in given}
    if not sources:
        sources = missing_source(variant, variant.size, variant.num_frames, {})
    with _unwarned():
        resolve(variant, {}, source=open_source(variant, **sources), **given)


def make_request(bundle: Bundle, runtime: str, asked: Mapping[str, Any]) -> Settings:
    """The settings of a request; noise is the source of a task that needs one, unless one is given.

    asked: arguments of `Pipeline`; what is None or empty has its default. Raises SettingsError,
    MediaError.
    """
    variant, given = bundle.variant, given_of(asked)
    served = [served.smallest for served in served_sizes(bundle, runtime)]
    size, frames = served[0] if served else (variant.size, variant.num_frames)
    size, frames = given.get("size", size), given.get("num_frames", frames)
    with _unwarned():
        return resolve_for(bundle, runtime, **given, **missing_source(variant, size, frames, given))


@contextmanager
def _unwarned() -> Iterator[None]:
    """Without warnings of sizes that a model was not trained for: they take as long as others."""
    log = logging.getLogger("wantrt")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


def describe_request(settings: Settings) -> dict[str, Any]:
    """What of it decides a measurement; of a source, what there is."""
    return {
        "size": "{}x{}".format(*settings.size),
        "frames": settings.num_frames,
        "steps": settings.num_inference_steps,
        "guidance_scales": settings.guidance_scales,
        "solver": settings.solver,
        "prompt": settings.prompt,
        "seed": settings.seed,
        "source": sorted(settings.source.names),
    }


def given_of(asked: Mapping[str, Any]) -> dict[str, Any]:
    """Without the options that were left out."""
    return {name: value for name, value in asked.items() if value not in (None, ())}


def missing_source(
    variant: Variant, size: Size, num_frames: int, given: Mapping[str, Any]
) -> dict[str, Any]:
    """TI2V makes videos from prompts alone, as it is measured elsewhere; VACE is there to steer."""
    if variant.task == "ti2v" or any(name in given for name in INPUTS):
        return {}
    return synthetic_source(variant, size, num_frames)


# -- The floor ------------------------------------------------------------------------------------


def denoise_costs(bundle: Bundle, settings: Settings) -> list[Cost]:
    """Of every step, in their order."""
    variant = bundle.variant
    frames, count = settings.denoised_frames(variant), settings.num_inference_steps
    grid = make_grid(settings.solver, settings.convention, count, settings.flow_shift)
    costs: list[Cost] = []
    for expert, scale, steps in zip(
        variant.experts,
        settings.guidance_scales,
        split_steps(grid, variant.boundary_ratios),
        strict=True,
    ):
        dtype = PRECISIONS[bundle.precision[expert.name]]
        step = step_cost(variant, expert.name, settings.size, frames, scale != 1.0, dtype)
        costs += [step] * len(steps)
    return costs


def floor_row(bundle: Bundle, settings: Settings, rates: Rates, measured: Row) -> Row:
    """Floors of denoising, decoding and both, and how much of what was `measured` they are.

    flops, weight_bytes: of a step. Text and source are not in the floor of the whole: they are
    short, and it stays a floor.
    """
    variant = bundle.variant
    steps = denoise_costs(bundle, settings)
    dtype = PRECISIONS[bundle.precision["vae"]]
    decode = decode_cost(variant, settings.size, settings.num_frames, dtype)
    denoise_s, decode_s = sum(step.seconds(rates) for step in steps), decode.seconds(rates)
    floors = {"denoise": denoise_s, "vae_decode": decode_s, "e2e": denoise_s + decode_s}
    row: Row = {
        "step_floor_ms": denoise_s / len(steps) * 1e3,
        "flops": sum(step.flops for step in steps) / len(steps),
        "weight_bytes": sum(step.weight_bytes for step in steps) / len(steps),
    }
    for name, seconds in floors.items():
        row[f"{name}_floor_s"] = seconds
        row[f"{name}_floor_fraction"] = seconds / measured[f"{name}_s"]["median"]
    return row
