"""One transformer block at 32,760 tokens on a GPU: ours, the reference, diffusers; and the floor.

    python -m wantrt.bench.block [--models 14b,1.3b] [--samples 10] [--minutes 7]

Contenders get equal generated weights in bfloat16, equal inputs, and the fastest exact attention
that torch has on this machine (each of its backends is timed first): the reference modules in eager
torch and compiled, diffusers' block eager and compiled, and ours with kernels, launched from Python
and captured as a graph. Beside each time stand the share of this machine's measured rate of matrix
products, the time split into products, attention and the rest (torch.profiler, by kernel names),
and the error against the reference in float32; below, the floor: FLOPs at the rate of products,
bytes of the rest at the copy bandwidth, both measured in the same run. Runs take turns. A table
goes to stderr, a JSON object last to stdout and to the folder --out; status 1 says that ours failed
or was less accurate than the reference or diffusers in bfloat16.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wantrt.bench.block_contenders import (
    Inputs,
    Run,
    diffusers_block,
    make_inputs,
    make_weights,
    our_block,
)
from wantrt.bench.block_cost import BlockCost, block_cost
from wantrt.bench.gpu import (
    Row,
    capture,
    compare,
    copy_bandwidth,
    first_line,
    matrix_rate,
    output_options,
    positive,
    require_gpu,
    state,
    state_under,
    time_in_turn,
    usable,
)
from wantrt.bench.kernel_cases import Random
from wantrt.bench.kernel_times import breakdown, kernel_times, split
from wantrt.bench.result import Result, Table, number, publish, spread, start, text
from wantrt.config import DIT_1_3B, DIT_14B, DiTConfig
from wantrt.linked import refuse_other_names
from wantrt.models.ops import TORCH_OPS, Ops

refuse_other_names(__spec__)

DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
LATENT = (21, 60, 104)  # 832x480, 81 frames: 32,760 tokens
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
OURS = ("kernels", "kernels captured")
OTHERS = ("reference", "diffusers")  # in bfloat16: what ours must be as near to float32 as
MARGIN = 1.05  # of their error: that of another order of rounding


TABLE = Table(
    (
        ("block", text("name")),
        ("ms", number("ms", 3)),
        ("p10", number("ms", 3, part="p10")),
        ("p90", number("ms", 3, part="p90")),
        ("products", number("gemm_ms", 3)),
        ("attention", number("attention_ms", 3)),
        ("rest", number("rest_ms", 3)),
        ("floor", number("floor_fraction", 0, " %", 100)),
        ("error", lambda row: f"{row['error_rms']:.1e}" if row.get("error_rms") else ""),
        ("", text("problem")),
    )
)


@dataclass(frozen=True)
class Model:
    config: DiTConfig
    rest_aim: float  # the most of a block's time that the rest should take
    rate_aim: float | None  # the least of the measured matrix rate that the block should reach


MODELS = {"14b": Model(DIT_14B, 0.05, 0.78), "1.3b": Model(DIT_1_3B, 0.10, None)}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(sys.argv[1:] if arguments is None else arguments)
    require_gpu("wantrt.bench.block")
    told = {"models": options.models, "samples": options.samples, "dtype": DTYPE}
    result = start("block", told, options.note)
    with torch.inference_mode(), publish(result, options.out):
        measure_all(result, options.models, options.samples, options.minutes)
    if not all(row.get("passed", True) for row in result.rows):
        raise SystemExit(1)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    def models(text: str) -> list[str]:
        for part in text.split(","):
            if part not in MODELS:
                raise argparse.ArgumentTypeError(f"{part!r} is not one of {', '.join(MODELS)}")
        return text.split(",")

    parser = argparse.ArgumentParser(
        prog="python -m wantrt.bench.block", description=str(__doc__).split("\n")[0]
    )
    parser.add_argument("--models", type=models, default=list(MODELS), metavar="14b,1.3b")
    parser.add_argument("--samples", type=positive, default=10, help="timed, of each contender")
    parser.add_argument(
        "--minutes", type=float, default=7.0, help="nothing is compiled or begun after them"
    )
    output_options(parser)
    return parser.parse_args(arguments)


def measure_all(result: Result, models: Sequence[str], samples: int, minutes: float) -> None:
    """Rows of each model (also to stderr), the machine's best rates, and what was left out."""
    deadline = time.monotonic() + 60 * minutes
    copy_rate, matmul_rate = copy_bandwidth(), matrix_rate()
    result.machine["rates"] = {"matrix": matmul_rate, "copy": copy_rate}
    tell(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}: copy "
        f"{copy_rate / 1e9:,.0f} GB/s, bf16 product {matmul_rate / 1e12:.0f} TFLOP/s"
    )
    left_out = []
    for name in models:
        if time.monotonic() > deadline or not usable():
            left_out.append(name)
            continue
        torch.cuda.empty_cache()
        try:
            found = measure(MODELS[name], samples, copy_rate, matmul_rate, deadline)
        except Exception as error:  # what was measured before is still to be written
            found = {"passed": False, "problem": first_line(error)}
        show(name, found)
        result.rows += rows_of(name, found)
    if usable():
        result.machine["rates_at_the_end"] = {"matrix": matrix_rate()}
        result.machine["gpu_state_at_the_end"] = state()
    if left_out:
        result.partial = f"no time was left, or the GPU failed, for {', '.join(left_out)}"


def rows_of(model: str, found: Row) -> list[Row]:
    """The floor, torch's attentions and the contenders, each a flat row."""
    if "problem" in found:
        return [{"name": model, **found}]
    floor = found["floor_ms"]
    parts = {f"{part}_ms": floor[part] for part in ("gemm", "attention", "rest")}
    shape = {key: found[key] for key in ("tokens", "text_rows", "channels")}
    rows: list[Row] = [{"name": f"{model}: floor", **shape, "ms": floor["all"], **parts}]
    for backend, row in found["attention"].items():
        rows.append({"name": f"{model}: attention of torch, {backend}", **flat(row)})
    for contender, row in found["contenders"].items():
        given = {"name": f"{model}: {contender}", "contender": contender, **flat(row)}
        if "ms" in row:
            given["floor_fraction"] = round(floor["all"] / row["ms"]["median"], 4)
        if contender in OURS:
            given["passed"] = found["passed"]
        rows.append(given)
    return rows


def flat(row: Row) -> Row:
    """Errors and parts as keys of the row, kernels as a line of text."""
    found: Row = {}
    for key, value in row.items():
        if key == "error":
            found |= {f"error_{kind}": size for kind, size in value.items()}
        elif key == "split_ms":
            found |= {f"{part}_ms": ms for part, ms in value.items()}
        elif key == "state_under_load":
            found |= {f"under_load_{name}": told for name, told in value.items()}
        elif key.endswith("_kernels"):
            kernels = (f"{k['kernel']} {k['us']:g} us x{k['launches']:g}" for k in value)
            found[key] = "; ".join(kernels)
        else:
            found[key] = value
    return found


def measure(
    model: Model, samples: int, copy_rate: float, matmul_rate: float, deadline: float
) -> Row:
    """One block: floor, attention backends, contenders."""
    torch._dynamo.reset()  # what was compiled for another model would count against this one
    config = model.config
    random = Random(DEVICE, 0)
    weights = make_weights(config, random)
    given = make_inputs(config, LATENT, DTYPE, random)
    tokens = given.x.shape[1]
    cost = block_cost(config, tokens, config.text_len, DTYPE)
    attention = time_attention(config, tokens, samples)
    order = sorted(
        (n for n in attention if "ms" in attention[n]),
        key=lambda n: attention[n]["ms"]["median"],
    )
    row: Row = {
        "tokens": tokens,
        "text_rows": config.text_len,
        "channels": config.dim,
        "gemm_tflop": round(cost.gemm_flops / 1e12, 3),
        "attention_tflop": round(cost.attention_flops / 1e12, 3),
        "rest_gb": round(cost.rest_bytes / 1e9, 3),
        "floor_ms": cost.floor_ms(matmul_rate, copy_rate),
        "attention": attention,
        "attention_of_torch": order,
    }
    expected = our_block(config, torch.float32, TORCH_OPS, weights, given)()
    with preferred(order):
        found = run_contenders(config, weights, given, expected, samples, deadline)
    for contender in found.values():
        contender.update(shares(contender, cost, matmul_rate))
    return row | {"contenders": found, "passed": passes(found), "aims": aims(model, found)}


def contenders(
    config: DiTConfig, weights: dict[str, Tensor], given: Inputs, dtype: torch.dtype
) -> dict[str, Callable[[], Run]]:
    """Makers of all contenders, by name; the ones that compile last."""

    def reference() -> Run:
        return our_block(config, dtype, TORCH_OPS, weights, given)

    def kernels() -> Run:
        return our_block(config, dtype, our_ops(), weights, given)

    def captured() -> Run:
        return captured_run(kernels())

    def diffusers() -> Run:
        return diffusers_block(config, dtype, weights, given)

    return {
        "kernels": kernels,
        "kernels captured": captured,
        "reference": reference,
        "diffusers": diffusers,
        "reference compiled": lambda: compiled(reference()),
        "diffusers compiled": lambda: compiled(diffusers()),
    }


def our_ops() -> Ops:
    """The operations that the torch runtime uses on a GPU. Needs Triton."""
    from wantrt.kernels.ops import kernel_ops

    return kernel_ops()


def compiled(run: Run) -> Run:
    return torch.compile(run, dynamic=False, fullgraph=True)


def captured_run(run: Run) -> Run:
    """The replay of `run`, and its result, which the next replay overwrites."""
    results: list[Tensor] = []

    def work() -> None:
        results[:] = [run()]

    replay = capture(work)

    def replayed() -> Tensor:
        replay()
        return results[0]

    return replayed


def run_contenders(
    config: DiTConfig,
    weights: dict[str, Tensor],
    given: Inputs,
    expected: Tensor,
    samples: int,
    deadline: float,
) -> dict[str, Row]:
    """Error, kernels and times of each contender; of one that does not run, why."""
    runs: dict[str, Run] = {}
    found: dict[str, Row] = {}
    for name, make in contenders(config, weights, given, DTYPE).items():
        if time.monotonic() > deadline:
            found[name] = {"problem": "no time was left"}
            continue
        try:
            run = make()
            found[name] = {"error": compare([run()], [expected])}
            kernels = kernel_times(run)
            found[name] |= {
                "split_ms": split(kernels),
                "launches": round(sum(kernel.count for kernel in kernels.values())),
                "rest_kernels": breakdown(kernels, "rest"),
                "attention_kernels": breakdown(kernels, "attention"),
                "gemm_kernels": breakdown(kernels, "gemm"),
            }
            runs[name] = run
        except Exception as error:  # not installed, no compiler, no memory: the others still run
            found[name] = {"problem": first_line(error)}
    for name, times in time_in_turn(runs, samples).items():
        found[name]["ms"] = spread(times)
        found[name]["state_under_load"] = state_under(runs[name])
    return found


def shares(row: Row, cost: BlockCost, matmul_rate: float) -> Row:
    """What a contender's times mean."""
    if "ms" not in row:
        return {}
    median_ms = row["ms"]["median"]
    parts = row["split_ms"]
    busy = sum(parts.values())
    return {
        "tflops": round(cost.flops / median_ms / 1e9, 1),
        "of_matrix_rate": round(cost.flops / (median_ms * 1e-3) / matmul_rate, 4),
        "rest_share": round(parts["rest"] / busy, 4) if busy else None,
        "not_in_kernels_ms": round(median_ms - busy, 4),  # gaps; profiling itself adds some
    }


def passes(found: Mapping[str, Row]) -> bool:
    """Ours ran, both ways, and is as near to float32 as reference and diffusers in bfloat16."""
    others = [found[name]["error"]["rms"] for name in OTHERS if "error" in found.get(name, {})]
    if not others or any("ms" not in found.get(name, {}) for name in OURS):
        return False
    return all(found[name]["error"]["rms"] <= MARGIN * min(others) for name in OURS)


def aims(model: Model, found: Mapping[str, Row]) -> Row:
    """The aims, and whether the captured block reaches them (None: it did not run)."""
    row = found.get("kernels captured", {})
    rest, rate = row.get("rest_share"), row.get("of_matrix_rate")
    reached: Row = {
        "rest_share": model.rest_aim,
        "rest_share_reached": None if rest is None else rest <= model.rest_aim,
    }
    if model.rate_aim is not None:
        reached["of_matrix_rate"] = model.rate_aim
        reached["of_matrix_rate_reached"] = None if rate is None else rate >= model.rate_aim
    return reached


def time_attention(config: DiTConfig, tokens: int, samples: int) -> dict[str, Row]:
    """torch's exact attentions at the block's self-attention: times, rate, error of two heads.

    q, k and v are views of [1, L, C].
    """
    random = Random(DEVICE, 1)
    q, k, v = (
        random(1, tokens, config.num_heads, config.head_dim, dtype=DTYPE).transpose(1, 2)
        for _ in range(3)
    )
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        heads = [t[:, :2].float() for t in (q, k, v)]
        expected = F.scaled_dot_product_attention(heads[0], heads[1], heads[2])
    flops = 4 * tokens * tokens * config.dim
    found: dict[str, Row] = {}
    for name, backend in BACKENDS.items():

        def run(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        try:
            error = compare([run()[:, :2]], [expected])
            (times,) = time_in_turn({name: run}, samples).values()
        except RuntimeError as problem:
            found[name] = {"problem": first_line(problem)}
            continue
        found[name] = {"ms": spread(times), "error": error}
        found[name]["tflops"] = round(flops / found[name]["ms"]["median"] / 1e9, 1)
    return found


@contextmanager
def preferred(order: Sequence[str]) -> Iterator[None]:
    """torch's attention takes the first of these backends that can."""
    backends = [*(BACKENDS[name] for name in order), SDPBackend.MATH]
    with sdpa_kernel(backends, set_priority=True):
        yield


def show(name: str, row: Mapping[str, Any]) -> None:
    if "problem" in row:
        tell(f"{name}: {row['problem']}")
        return
    floor = row["floor_ms"]
    tell(f"\n{name}: {row['tokens']:,} tokens x {row['channels']:,}, {row['text_rows']} text rows")
    for backend, found in row["attention"].items():
        told = found.get("problem") or f"{found['ms']['median']:.3f} ms, {found['tflops']} TFLOP/s"
        tell(f"  attention of torch, {backend:10} {told}")
    columns = ("median ms", "p10", "p90", "gemm", "attention", "rest", "rest %", "matrix %")
    tell(f"  {'':20}" + "".join(f"{column:>11}" for column in columns) + "  error")
    for contender, found in row["contenders"].items():
        if "problem" in found:
            tell(f"  {contender:20}  {found['problem']}")
            continue
        parts = found["split_ms"]
        values = (
            *(found["ms"][end] for end in ("median", "p10", "p90")),
            *(parts[key] for key in ("gemm", "attention", "rest")),
            100 * (found["rest_share"] or 0),
            100 * found["of_matrix_rate"],
        )
        numbers = "".join(f"{value:11.2f}" for value in values)
        tell(f"  {contender:20}{numbers}  {found['error']['rms']:.1e}")
    values = (floor["all"], floor["gemm"], floor["attention"], floor["rest"])
    tell("  {:20}{:11.2f}{:33.2f}{:11.2f}{:11.2f}".format("floor", *values))
    for kernel in row["contenders"].get("kernels", {}).get("rest_kernels", ()):
        tell(f"    rest: {kernel['us']:9.1f} us  x{kernel['launches']:<4g} {kernel['kernel'][:90]}")
    tell(f"  {'passed' if row['passed'] else 'FAILED'}; aims: {row['aims']}")


def tell(text: str) -> None:
    print(text, file=sys.stderr)


if __name__ == "__main__":
    main()
