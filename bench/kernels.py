"""Every kernel on a GPU, beside eager torch, torch.compile and a copy of as many bytes.

    python -m wantrt.bench.kernels [--ops modulate,rope] [--tokens 32760,75600]
        [--channels 5120,1536,3072] [--dtypes bf16,fp32] [--samples 20] [--minutes 8.5]

These ops are bound by memory, so the measure is the share of this machine's copy bandwidth,
measured in the same run: least bytes (kernel_cases.py) by median time. Every contender gets the
same tensors, several sets of them in rotation, together more than four times the L2 cache; all are
captured as graphs and replayed in turn. Errors are those of the largest and of the root mean
square, against the reference in float32, for our kernel and for the reference at the model's dtype:
a kernel must not be worse. A table goes to stderr, a JSON object last to stdout and to the folder
--out; status 1 says that a kernel failed or was less accurate.
"""

import argparse
import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from wantrt.bench.gpu import (
    Row,
    Work,
    capture,
    compare,
    copy_bandwidth,
    first_line,
    l2_bytes,
    matrix_rate,
    output_options,
    positive,
    require_gpu,
    state,
    time_in_turn,
    usable,
)
from wantrt.bench.kernel_cases import (
    HEAD_DIM,
    MODULES,
    Case,
    Random,
    all_cases,
    float32_arguments,
    kernel,
    reference,
)
from wantrt.bench.result import Result, Table, number, publish, spread, start, text
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

DEVICE = torch.device("cuda")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
CONTENDERS = ("kernel", "eager", "compiled", "copy")
CACHES = 4  # how many times the L2 cache all sets together are
SAMPLE_MS = 1.0  # the least a timed sample takes: a replay itself costs microseconds
MOST_CALLS = 256
COPY_SHARE = 0.85  # of the copy bandwidth: the aim
ROUNDING = 1e-6  # float32 sums of another order
MARGIN = 1.05  # of the reference's own rounding error: that of another order of rounding

Sets = Sequence[tuple[Any, ...]]

TABLE = Table(
    (
        ("kernel", text("name")),
        ("µs", number("kernel_us", 1)),
        ("p10", number("kernel_us", 1, part="p10")),
        ("p90", number("kernel_us", 1, part="p90")),
        ("eager", number("eager_us", 1)),
        ("compiled", number("compiled_us", 1)),
        ("copy", number("copy_us", 1)),
        ("of copy", number("copy_fraction", 0, " %", 100)),
        ("of products", number("matrix_fraction", 0, " %", 100)),
        ("error", lambda row: f"{row['kernel_error_rms']:.1e}" if passes(row) else "FAILED"),
    )
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    require_gpu("wantrt.bench.kernels")
    chosen = [
        case
        for case in all_cases(options.tokens, options.channels, options.dtypes)
        if case.op in options.ops
    ]
    told = ("ops", "tokens", "channels", "dtypes", "samples")
    result = start("kernels", {name: getattr(options, name) for name in told}, options.note)
    with torch.inference_mode(), publish(result, options.out):
        measure_all(result, chosen, options.samples, options.minutes)
        for what, names in verdict(result.rows).items():
            if names:
                tell(f"{what.replace('_', ' ')}: " + "; ".join(names))
    if not all(row["passed"] for row in result.rows):
        raise SystemExit(1)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    def ints(text: str) -> list[int]:
        numbers = [int(part) for part in text.split(",")]
        if min(numbers) < 1:
            raise argparse.ArgumentTypeError(f"{text!r} has a number below 1")
        return numbers

    def widths(text: str) -> list[int]:
        numbers = ints(text)
        if any(number % HEAD_DIM for number in numbers):
            raise argparse.ArgumentTypeError(f"{text!r}: heads are {HEAD_DIM} channels wide")
        return numbers

    def dtypes(text: str) -> list[torch.dtype]:
        return [DTYPES[part] for part in one_of(DTYPES)(text)]

    def one_of(known: Iterable[str]) -> Callable[[str], list[str]]:
        def check(text: str) -> list[str]:
            parts = text.split(",")
            for part in parts:
                if part not in known:
                    raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(known)}")
            return parts

        return check

    parser = argparse.ArgumentParser(
        prog="python -m wantrt.bench.kernels", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--ops", type=one_of(MODULES), default=list(MODULES), metavar="OP,..")
    parser.add_argument("--tokens", type=ints, default=[32760, 75600], metavar="N,..")
    parser.add_argument("--channels", type=widths, default=[5120, 1536, 3072], metavar="N,..")
    parser.add_argument("--dtypes", type=dtypes, default=dtypes("bf16,fp32"), metavar="bf16,..")
    parser.add_argument("--samples", type=positive, default=20, help="timed, of each contender")
    parser.add_argument(
        "--minutes", type=float, default=8.5, help="no case is begun after them; the rest is named"
    )
    output_options(parser)
    return parser.parse_args(arguments)


def measure_all(result: Result, cases: Sequence[Case], samples: int, minutes: float) -> None:
    """A row a case (also to stderr), the machine's best rates, and what was left out."""
    deadline = time.monotonic() + 60 * minutes
    copy_rate, matmul_rate = copy_bandwidth(), matrix_rate()
    result.machine["rates"] = {"matrix": matmul_rate, "copy": copy_rate}
    tell(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy "
        f"{copy_rate / 1e9:,.0f} GB/s, bf16 product {matmul_rate / 1e12:.0f} TFLOP/s\n"
        f"{'median µs':62} " + " ".join(f"{name:>10}" for name in CONTENDERS) + "  share, error"
    )
    for case in cases:
        if time.monotonic() > deadline or not usable():
            break
        result.rows.append(measure(case, samples, copy_rate, matmul_rate))
        tell(line(result.rows[-1]))
    if usable():
        result.machine["rates_at_the_end"] = {"copy": copy_bandwidth()}
        result.machine["gpu_state_at_the_end"] = state()
    if left_out := [case.name for case in cases[len(result.rows) :]]:
        result.partial = f"no time was left, or the GPU failed, for: {'; '.join(left_out)}"


def measure(case: Case, samples: int, copy_rate: float, matmul_rate: float) -> Row:
    """One case: times of all contenders, shares of the best rates, errors."""
    row: Row = {"name": case.name, "op": case.op, "bytes_moved": case.bytes_moved}
    torch._dynamo.reset()  # or the ninth shape of an op would run uncompiled
    torch.cuda.empty_cache()
    try:
        runs = {
            "kernel": kernel(case),
            "eager": reference(case.op),
            "compiled": torch.compile(reference(case.op), dynamic=False, fullgraph=True),
        }
        sets = [
            case.make(Random(DEVICE, seed))
            for seed in range(num_sets(case.bytes_moved, l2_bytes()))
        ]
        errors, problems = check(case, runs, sets[0])
        replays, calls = prepare(case, runs, sets, problems)
        times = time_in_turn(replays, samples)
    except Exception as error:  # no kernel, no memory, a fault: the other cases may still run
        return {**row, "passed": False, "problem": first_line(error)}
    row |= {"sets": len(sets), "calls_per_sample": calls}
    for name, sizes in errors.items():
        row |= {f"{name}_error_{kind}": size for kind, size in sizes.items()}
    for name, found in times.items():
        row[f"{name}_us"] = spread([ms * 1e3 / calls for ms in found], 2)
    row |= {f"{name}_problem": problem for name, problem in problems.items()}
    return row | shares(case, row, copy_rate, matmul_rate)


def check(
    case: Case, runs: Mapping[str, Callable[..., Any]], arguments: tuple[Any, ...]
) -> tuple[dict[str, Row], dict[str, str]]:
    """Errors of each contender against the reference in float32; what did not run, and why.

    Arguments are left as they are. This is also the run that compiles.
    """
    exact = float32_arguments(arguments)
    expected = case.outputs(exact, reference(case.op)(*exact))
    errors, problems = {}, {}
    for name, run in runs.items():
        given = tuple(
            a.clone() if index in case.mutated else a for index, a in enumerate(arguments)
        )
        try:
            errors[name] = compare(case.outputs(given, run(*given)), expected)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler may fail in any way; the other rows are still good
            problems[name] = first_line(error)
    return errors, problems


def prepare(
    case: Case, runs: Mapping[str, Callable[..., Any]], sets: Sets, problems: dict[str, str]
) -> tuple[dict[str, Work], int]:
    """Replays of contenders, and how many calls each replay makes, over all sets in rotation.

    Left out are contenders with a problem, which is noted if it shows only here.
    """
    halves = [copy_tensors(case.bytes_moved) for _ in sets]
    rounds: dict[str, tuple[Callable[..., Any], Sets]] = {
        name: (run, sets) for name, run in runs.items() if name not in problems
    }
    rounds["copy"] = (lambda source, target: target.copy_(source), halves)
    (once,) = time_in_turn({"copy": rotation(*rounds["copy"], len(sets))}, 5).values()
    calls = num_calls(len(sets), sorted(once)[len(once) // 2])
    pool = torch.cuda.graph_pool_handle()
    replays: dict[str, Work] = {}
    for name, (run, tensors) in rounds.items():
        try:
            replays[name] = capture(rotation(run, tensors, calls), pool)
        except Exception as error:
            problems[name] = first_line(error)
    return replays, calls


def rotation(run: Callable[..., Any], sets: Sets, calls: int) -> Work:
    """`calls` calls with one set after the other; as many results as sets are alive at once.

    So a result is written over one that left the cache, not over the last one.
    """

    def work() -> None:
        alive: deque[Any] = deque()
        for index in range(calls):
            if len(alive) == len(sets):
                alive.popleft()
            alive.append(run(*sets[index % len(sets)]))

    return work


def num_sets(bytes_moved: int, cache_bytes: int) -> int:
    """Enough sets of tensors to be `CACHES` times the cache; at least two."""
    return max(2, math.ceil(CACHES * cache_bytes / bytes_moved))


def num_calls(sets: int, round_ms: float) -> int:
    """Whole rounds of calls that take `SAMPLE_MS` if a round of one call a set takes `round_ms`."""
    rounds = max(1, min(math.ceil(SAMPLE_MS / max(round_ms, 1e-3)), MOST_CALLS // sets))
    return rounds * sets


def copy_tensors(bytes_moved: int) -> tuple[Tensor, Tensor]:
    """Source and target of a copy that moves so many bytes (to the next 4)."""
    count = math.ceil(bytes_moved / 8)
    return torch.randn(count, device=DEVICE), torch.empty(count, device=DEVICE)


def shares(case: Case, row: Row, copy_rate: float, matmul_rate: float) -> Row:
    """What the times of a row mean."""
    medians = {n: row[f"{n}_us"]["median"] for n in CONTENDERS if f"{n}_us" in row}
    found: Row = {"passed": passes(row)}
    if "kernel" not in medians:
        return found
    seconds = medians["kernel"] * 1e-6
    found["gb_per_s"] = round(case.bytes_moved / seconds / 1e9, 1)
    found["copy_fraction"] = round(case.bytes_moved / seconds / copy_rate, 4)
    if case.flops is not None:
        found["matrix_fraction"] = round(case.flops / seconds / matmul_rate, 4)
    for name in CONTENDERS[1:]:
        if name in medians:  # above 1: the kernel is faster
            found[f"speedup_over_{name}"] = round(medians[name] / medians["kernel"], 4)
    return found


def passes(row: Row) -> bool:
    """Whether the kernel is as near to float32 as the reference at the same dtype."""
    if "kernel_error_rms" not in row or "eager_error_rms" not in row:
        return False
    return bool(row["kernel_error_rms"] <= MARGIN * row["eager_error_rms"] + ROUNDING)


def verdict(rows: Sequence[Row]) -> dict[str, list[str]]:
    """What failed, and what misses an aim: 85 % of the copy bandwidth; torch.compile's speed."""
    return {
        "failed": [row["name"] for row in rows if not row["passed"]],
        "below_aim": [
            row["name"]
            for row in rows
            if "matrix_fraction" not in row and row.get("copy_fraction", 1) < COPY_SHARE
        ],
        "slower_than_compiled": [
            row["name"] for row in rows if row.get("speedup_over_compiled", 1) < 1
        ],
    }


def line(row: Mapping[str, Any]) -> str:
    """A row for people."""
    if "problem" in row:
        return f"{row['name']:62} {row['problem']}"

    def median(name: str) -> str:
        found = row.get(f"{name}_us")
        return f"{found['median']:10.1f}" if found else f"{'-':>10}"

    if "matrix_fraction" in row:
        share = f"{100 * row['matrix_fraction']:6.1f} % matrix"
    elif "copy_fraction" in row:
        share = f"{100 * row['copy_fraction']:6.1f} % copy  "
    else:
        share = f"{'-':>15}"
    error = row.get("kernel_error_rms", math.nan)
    told = "" if row["passed"] else "  FAILED"
    for name in CONTENDERS:
        if f"{name}_problem" in row:
            told += f"  {name}: {row[f'{name}_problem']}"
    times = " ".join(median(name) for name in CONTENDERS)
    return f"{row['name']:62} {times} {share} {error:9.1e}{told}"


def tell(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
