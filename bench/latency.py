"""One video after another by one loaded pipeline: stages, steps, memory, energy, the floor.

    wantrt bench latency                                             # nano, which ships
    wantrt bench latency --runtime onnxruntime,torch
    wantrt bench latency --variant 14B --checkpoint random:0 --size 832x480 --steps 5

`e2e_s` is from the prompt to all pixels in the host's memory, `first_frame_s` to the first of them,
and the stages lie within. Writing the file (`video_encode_s`) is apart: it can run beside the next
chunk. The first request after loading is `cold_e2e_s`, and a warm-up as others are. Floors are
those of bench/floor.py at this machine's own rates (bench/rates.py).
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from wantrt.bench.bundles import choose_bundle, describe_bundle
from wantrt.bench.memory import Peaks
from wantrt.bench.options import (
    BUNDLE,
    FRAMES,
    PROMPT,
    RESIDENCY,
    RESULT,
    RUNTIMES,
    SAMPLING,
    SEED,
    SIZE,
    SOURCE,
    STEPS,
    options,
    repeats,
)
from wantrt.bench.rates import Rates, measure_rates
from wantrt.bench.request import (
    check_request,
    describe_request,
    floor_row,
    make_request,
    serve,
)
from wantrt.bench.result import Row, Table, number, run, spread, start, text
from wantrt.bundle import Bundle
from wantrt.cli.command import command as bench_command
from wantrt.cli.console import Console
from wantrt.linked import refuse_other_names
from wantrt.media import Video
from wantrt.runtime.loading import choose_for
from wantrt.runtime.pipeline import Frames, Pipeline
from wantrt.runtime.settings import Settings
from wantrt.session import PRECISIONS

refuse_other_names(__spec__)

TABLE = Table(
    (
        ("video", text("name")),
        ("text s", number("text_s", 3)),
        ("denoise s", number("denoise_s")),
        ("step ms", number("step_ms", 1)),
        ("decode s", number("vae_decode_s")),
        ("first s", number("first_frame_s")),
        ("e2e s", number("e2e_s")),
        ("p90", number("e2e_s", part="p90")),
        ("floor", number("e2e_floor_fraction", 0, "%", 100)),
        ("MiB", number("peak_rss_bytes", 0, scale=2**-20)),
        ("GPU GiB", number("peak_gpu_bytes", 1, scale=2**-30)),
        ("all GPU GiB", number("peak_gpu_device_bytes", 1, scale=2**-30)),
        ("J", number("energy_j", 0)),
    )
)


def measure(
    bundle: Bundle,
    requests: Mapping[str, Settings],
    rates: Mapping[str, Rates],
    *,
    residency: str = "resident",
    warmup: int = 2,
    runs: int = 5,
    trust_plans: bool = False,
) -> Iterator[Row]:
    """A row a runtime. requests, rates: runtime -> what is asked of it, and its device's rates.

    What a runtime has shown when it is interrupted is a row, too.
    """
    for runtime, settings in requests.items():
        begun = time.perf_counter()
        pipe = Pipeline.load(bundle, runtime, residency=residency, trust_plans=trust_plans)
        load_s = time.perf_counter() - begun
        with pipe:
            seen = Seen(pipe, settings, load_s)
            try:
                for _ in range(warmup):
                    seen.warm_up()
                for _ in range(runs):
                    seen.run()
            except (Exception, KeyboardInterrupt):
                if seen.seconds:
                    yield seen.row(rates[runtime])
                raise
            yield seen.row(rates[runtime])


class Seen:
    """What the requests to a pipeline have shown so far."""

    def __init__(self, pipe: Pipeline, settings: Settings, load_s: float) -> None:
        self.pipe, self.settings, self.load_s = pipe, settings, load_s
        self.cold_e2e_s: float | None = None
        self.seconds: dict[str, list[float]] = defaultdict(list)
        self.step_ms: list[float] = []
        self.peaks = Peaks(pipe.device.torch_device)

    def warm_up(self) -> None:
        """Also sees what memory the GPU holds, which takes time that no run shall have."""
        served = serve(self.pipe, self.settings, self.peaks.look)
        if self.cold_e2e_s is None:
            self.cold_e2e_s = served.seconds["e2e_s"]

    def run(self) -> None:
        energy = self._energy_j()
        served = serve(self.pipe, self.settings)
        if energy is not None:
            self.seconds["energy_j"].append((self._energy_j() or 0.0) - energy)
        for name, seconds in served.seconds.items():
            self.seconds[name].append(seconds)
        self.step_ms += served.step_ms
        self.seconds["video_encode_s"].append(self._write(served.chunks))

    def row(self, rates: Rates) -> Row:
        bundle, settings = self.pipe.bundle, self.settings
        size = "{}x{}".format(*settings.size)
        measured: Row = {name: spread(values) for name, values in self.seconds.items()}
        return {
            "name": f"{bundle.variant.name} {size}x{settings.num_frames} {self.pipe.runtime.name}",
            "variant": bundle.variant.name,
            "runtime": self.pipe.runtime.name,
            "size": size,
            "frames": settings.num_frames,
            "steps": settings.num_inference_steps,
            **measured,
            "step_ms": spread(self.step_ms),
            "cold_e2e_s": self.cold_e2e_s,
            "load_s": self.load_s,
            **floor_row(bundle, settings, rates, measured),
            **self.peaks.row(),
        }

    def _energy_j(self) -> float | None:
        return self.peaks.nvml.energy_j() if self.peaks.nvml else None

    def _write(self, chunks: Sequence[Frames]) -> float:
        """Seconds that an mp4 of the video takes."""
        video = Video(np.concatenate(chunks), self.pipe.variant.fps)
        with tempfile.TemporaryDirectory() as folder:
            begun = time.perf_counter()
            video.save(Path(folder) / "video.mp4")
            return time.perf_counter() - begun


@bench_command()
@options(
    *(BUNDLE, RUNTIMES, RESIDENCY, PROMPT, SIZE, FRAMES, STEPS, SAMPLING, SOURCE, SEED),
    *(repeats(), RESULT),
)
def command(
    console: Console,
    bundle: Path | None,
    variant: str | None,
    checkpoint: str | None,
    precision: str | None,
    trust_plans: bool,
    runtimes: tuple[str, ...],
    residency: str,
    warmup: int,
    runs: int,
    out: Path,
    note: str | None,
    **asked: Any,
) -> int:
    """One video after another: seconds of every stage, memory, energy, and the floor."""
    choice = choose_bundle(
        *(bundle, variant, checkpoint, precision),
        runtimes=runtimes,
        draw=residency == "resident",
        sizes=[asked["size"]] if asked["size"] else None,
        frames=[asked["num_frames"]] if asked["num_frames"] else None,
    )
    check_request(choice.variant, asked)
    with console.progress() as progress:
        loaded = choice.open(progress)
    chosen = [choose_for(loaded, runtime) for runtime in runtimes]
    requests = {runtime.name: make_request(loaded, runtime.name, asked) for runtime in chosen}
    settings = {
        **describe_bundle(loaded),
        **describe_request(next(iter(requests.values()))),
        "runtimes": list(requests),
        "residency": residency,
        "warmup": warmup,
        "runs": runs,
    }
    result = start("latency", settings, note)
    dtype = PRECISIONS[loaded.precision[loaded.variant.experts[0].name]]
    rates = {r.name: measure_rates(r.make_device().torch_device, dtype) for r in chosen}
    result.machine["rates"] = asdict(rates[chosen[0].name])
    rows = measure(
        loaded,
        requests,
        rates,
        residency=residency,
        warmup=warmup,
        runs=runs,
        trust_plans=trust_plans,
    )
    return run(console, result, rows, TABLE, out)
