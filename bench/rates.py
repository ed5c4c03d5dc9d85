"""The best rates of this machine, measured: products of matrices, attention, and copies.

A floor is only as honest as the rates it is computed from: these are what torch reaches here, now,
with as many threads as the measurement, on shapes that favour it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from wantrt.bench import gpu
from wantrt.linked import refuse_other_names
from wantrt.runtime.fused import ops_for

refuse_other_names(__spec__)

CPU_SIDE = 2048  # of the matrices
CPU_TOKENS, GPU_TOKENS = 4096, 32760
HEADS, HEAD_DIM = 12, 128
SAMPLES = 5  # at least
SAMPLE_S = 1.5  # of samples, on a CPU: its clock and what else runs on it change meanwhile


@dataclass(frozen=True)
class Rates:
    """FLOP/s, a multiplication and an addition counted as two, and bytes/s read plus written."""

    matrix: float
    attention: float
    copy: float


@cache
def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """About two seconds on a GPU, six on a CPU, once."""
    if device.type == "cuda":
        rates = Rates(
            gpu.matrix_rate(dtype), attention_rate(GPU_TOKENS, device, dtype), gpu.copy_bandwidth()
        )
        torch.cuda.empty_cache()  # what comes next may allocate by itself, as TensorRT does
        return rates
    a, b = (torch.randn(CPU_SIDE, CPU_SIDE, dtype=dtype) for _ in range(2))
    source, target = (torch.ones(2**27, dtype=torch.uint8) for _ in range(2))  # pages of their own
    return Rates(
        2 * CPU_SIDE**3 / fastest(lambda: torch.matmul(a, b)),
        attention_rate(CPU_TOKENS, device, dtype),
        2 * source.nbytes / fastest(lambda: target.copy_(source)),
    )


def attention_rate(tokens: int, device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of one self-attention of a 1.3B model, as the runtime calls it."""
    shape = (1, HEADS, tokens, HEAD_DIM)
    q, k, v = (torch.randn(shape, dtype=dtype, device=device) for _ in range(3))
    attend = ops_for(device).attention

    def work() -> Tensor:
        return attend(q, k, v, None, HEAD_DIM**-0.5)

    flops = 4 * tokens**2 * HEADS * HEAD_DIM
    if device.type != "cuda":
        return flops / fastest(work)
    gpu.settle(work)
    (times,) = gpu.time_in_turn({"attention": work}, SAMPLES).values()
    return flops / (sorted(times)[len(times) // 2] * 1e-3)


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest run: what the machine can do if nothing disturbs it."""
    work()
    seconds: list[float] = []
    while len(seconds) < SAMPLES or sum(seconds) < SAMPLE_S:
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
