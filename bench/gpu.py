"""Measuring on a GPU: times that can be compared, and what this machine can do at best.

Contenders are captured as CUDA graphs, so that no launch from Python is timed (the runtime replays
graphs too), and replayed in turn, so that clocks and heat meet all of them alike. Best rates are
measured, not looked up: a copy of 1 GiB, and a product of 8192 x 8192 matrices. Data is
random: a GPU multiplies zeros faster.
"""

import math
import subprocess
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

COPY_BYTES = 2**30
MATRIX_SIDE = 8192
WARM_UP = 3
SETTLE_MS = 500.0  # of work before a best rate is measured: clocks follow power, not at once
LOAD_MS = 1500.0  # of work, queued before the GPU's state is asked for
ASKED = (
    *("driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem"),
    *("temperature.gpu", "power.draw", "power.limit"),
)

Work = Callable[[], object]
Row = dict[str, Any]


def require_gpu(measurement: str) -> None:
    """Leave the process with a message and status 1 where torch sees no CUDA device."""
    if not torch.cuda.is_available():
        raise SystemExit(
            f"{measurement} measures a CUDA GPU, and torch {torch.__version__} sees none here.\n"
            "Run the same command on a machine that has one."
        )


def positive(text: str) -> int:
    """An option of a command line: a whole number above 0."""
    number = int(text)
    if number < 1:
        raise ArgumentTypeError(f"{text} is below 1")
    return number


def output_options(parser: ArgumentParser) -> None:
    """Those of every command of the suite, for the ones that run without click."""
    parser.add_argument("--out", type=Path, default=Path("bench-results"), help="folder")
    parser.add_argument("--note", help="kept with the result")


def capture(work: Work, pool: Any = None) -> Callable[[], None]:
    """Run `work` to warm it up, record it and return its replay.

    Graphs that are never replayed at once may share the memory of `pool`.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            work()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        work()
    return graph.replay


def time_in_turn(works: Mapping[str, Work], samples: int) -> dict[str, list[float]]:
    """Milliseconds of `samples` runs of each, one of each at a time, after a warm-up."""
    marks: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {n: [] for n in works}
    for _ in range(WARM_UP + samples):
        for name, work in works.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            work()
            end.record()
            marks[name].append((start, end))
    torch.cuda.synchronize()
    return {
        name: [start.elapsed_time(end) for start, end in pairs[WARM_UP:]]
        for name, pairs in marks.items()
    }


def usable() -> bool:
    """False after a fault on the device: whatever is asked of it then fails."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What went wrong, short enough for a table."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def l2_bytes() -> int:
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size)


def copy_bandwidth(samples: int = 20) -> float:
    """Bytes a second of a large copy: read and written bytes together."""
    sets = [tuple(torch.randn(COPY_BYTES // 4, device="cuda") for _ in range(2)) for _ in range(2)]

    def work() -> None:
        for source, target in sets:
            target.copy_(source)

    settle(work)
    (times,) = time_in_turn({"copy": work}, samples).values()
    return 2 * len(sets) * COPY_BYTES / (float(np.median(times)) * 1e-3)


def matrix_rate(dtype: torch.dtype = torch.bfloat16, samples: int = 20) -> float:
    """FLOP/s of a large product, a multiplication and an addition counted as two."""
    shape = (MATRIX_SIDE, MATRIX_SIDE)
    a, b, out = (torch.randn(shape, dtype=dtype, device="cuda") for _ in range(3))

    def work() -> None:
        for _ in range(5):
            torch.matmul(a, b, out=out)

    settle(work)
    (times,) = time_in_turn({"matmul": work}, samples).values()
    return 5 * 2 * MATRIX_SIDE**3 / (float(np.median(times)) * 1e-3)


def settle(work: Work, about_ms: float = SETTLE_MS) -> None:
    """Run `work` for about so long; the last of it may still be running."""
    work()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    for _ in range(math.ceil(about_ms / max(start.elapsed_time(end), 0.01))):
        work()


def state_under(work: Work) -> Row:
    """The GPU's `state` while it is busy with `work`."""
    settle(work, LOAD_MS)
    found = state()
    torch.cuda.synchronize()
    return found


def busy_state() -> Row:
    """The GPU's `state` while it multiplies matrices."""
    a, out = (torch.randn(2 * (MATRIX_SIDE // 2,), device="cuda").bfloat16() for _ in range(2))
    return state_under(lambda: torch.matmul(a, a, out=out))


def state() -> Row:
    """Driver, clocks, temperature and power as nvidia-smi reports them; empty where it cannot."""
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    command = ["nvidia-smi", f"--query-gpu={','.join(ASKED)}", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(
            [*command, "-i", f"GPU-{uuid}"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_state(answer.stdout)


def parse_state(line: str) -> Row:
    """One line of nvidia-smi's csv, without header and units, in the order of `ASKED`."""
    values = [value.strip() for value in line.strip().split(",")]
    if len(values) != len(ASKED):
        return {}
    units = ("", "mhz", "mhz", "mhz", "c", "w", "w")
    found: Row = {}
    for name, unit, value in zip(ASKED, units, values, strict=True):
        key = "_".join(part for part in (name.replace(".", "_"), unit) if part)
        try:
            found[key] = float(value) if unit else value
        except ValueError:
            found[key] = None  # "[N/A]"
    return found


def compare(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> dict[str, float]:
    """Of the worst output: max |Δ| / max |expected|, and the same of root mean squares."""
    worst = {"max": 0.0, "rms": 0.0}
    for a, e in zip(actual, expected, strict=True):
        delta, scale = (a.float() - e.float()).abs(), e.float().abs()
        found = {
            "max": float(delta.max() / scale.max()),
            "rms": float(torch.linalg.vector_norm(delta) / torch.linalg.vector_norm(scale)),
        }
        # a NaN is the worst of all, and max() would lose it
        worst = {k: v if math.isnan(v) else max(worst[k], v) for k, v in found.items()}
        if math.isnan(worst["max"]):
            break
    return worst
