"""The best rates of this machine, measured: products of matrices, attention, and copies.

A floor is only as honest as the rates it is computed from: these are what torch reaches here, now,
with as many threads as the measurement, on shapes that favour it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrt.bench import gpu
from wantrt.linked import refuse_other_names
from wantrt.runtime.fused import ops_for

refuse_other_names(__spec__)

CPU_SIDE = 2048  # of the matrices
CPU_TOKENS, GPU_TOKENS = 4096, 32760
HEADS, HEAD_DIM = 12, 128
CPU_SAMPLES = 5


@dataclass(frozen=True)
class Rates:
    """FLOP/s, a multiplication and an addition counted as two, and bytes/s read plus written."""

    matrix: float
    attention: float
    copy: float


def measure_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """About two seconds on a GPU, five on a CPU."""
    if device.type == "cuda":
        rates = Rates(
            gpu.matrix_rate(), attention_rate(GPU_TOKENS, device, dtype), gpu.copy_bandwidth()
        )
        torch.cuda.empty_cache()  # what comes next may allocate by itself, as TensorRT does
        return rates
    a, b = (torch.randn(CPU_SIDE, CPU_SIDE, dtype=dtype) for _ in range(2))
    source, target = (torch.empty(2**27, dtype=torch.uint8) for _ in range(2))
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
    (times,) = gpu.time_in_turn({"attention": work}, CPU_SAMPLES).values()
    return flops / (sorted(times)[len(times) // 2] * 1e-3)


def fastest(work: Callable[[], object]) -> float:
    """Seconds of the fastest of a few runs: what the machine can do if nothing disturbs it."""
    work()
    seconds = []
    for _ in range(CPU_SAMPLES):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
