"""Where the time of a GPU goes: torch.profiler's kernels, sorted into products, attention, rest.

Names are all that a profile says about a kernel of cuBLAS or cuDNN, so they decide. The first rule
that fits counts, in this order: what a compiler fused out of pointwise work and reductions is rest,
though its name lists the products beside it; attention before products, for attention kernels are
built with CUTLASS too.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

KINDS = ("gemm", "attention", "rest")
RULES = (
    # Inductor: pointwise, persistent and looped reductions; templates are named triton_tem_
    ("rest", r"^triton_(poi|per|red|for|spl)_"),
    ("rest", r"^(Memcpy|Memset) "),
    ("rest", r"at::native::"),  # pointwise, reductions, norms, copies of eager torch
    # cuDNN; FlashAttention 2 and 3; CUTLASS's memory-efficient attention; FlexAttention; TensorRT
    ("attention", r"sdpa|flash|fmha|flex_attention|mha_v\d|Fmha|AttentionKernel"),
    # cuBLAS: nvjet (Hopper and later), xmma, s16816gemm, small and split products; Inductor's mm
    ("gemm", r"^nvjet_|gemm|gemv|Gemm|splitKreduce|^triton_(tem|mm)_|_matmul|cutlass"),
)
_RULES = tuple((kind, re.compile(pattern)) for kind, pattern in RULES)


@dataclass
class KernelTime:
    """All launches of one kernel in a run."""

    us: float = 0.0
    count: float = 0.0


def classify(name: str) -> str:
    """gemm, attention or rest."""
    for kind, pattern in _RULES:
        if pattern.search(name):
            return kind
    return "rest"


def kernel_times(run: Callable[[], object], repeats: int = 3) -> dict[str, KernelTime]:
    """Microseconds and launches of each kernel in one run, averaged over `repeats`."""
    from torch.profiler import ProfilerActivity, profile

    run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        for _ in range(repeats):
            run()
        torch.cuda.synchronize()
    return collect(found.events(), repeats)


def collect(events: Iterable[Any], repeats: int) -> dict[str, KernelTime]:
    """What ran on the device, without the ranges that cover several kernels."""
    times: dict[str, KernelTime] = {}
    for event in events:
        if event.device_type.name != "CUDA" or event.is_user_annotation:
            continue
        if event.name.startswith("##"):  # a range of torch.compile around a whole graph
            continue
        kernel = times.setdefault(event.name, KernelTime())
        kernel.us += event.time_range.elapsed_us() / repeats
        kernel.count += 1 / repeats
    return times


def split(times: Mapping[str, KernelTime]) -> dict[str, float]:
    """Milliseconds of products, attention and the rest."""
    found = dict.fromkeys(KINDS, 0.0)
    for name, kernel in times.items():
        found[classify(name)] += kernel.us / 1e3
    return {kind: round(ms, 4) for kind, ms in found.items()}


def breakdown(times: Mapping[str, KernelTime], kind: str) -> list[dict[str, Any]]:
    """The kernels of one kind, the longest first."""
    chosen = [(name, kernel) for name, kernel in times.items() if classify(name) == kind]
    return [
        {"kernel": name, "us": round(kernel.us, 1), "launches": round(kernel.count, 2)}
        for name, kernel in sorted(chosen, key=lambda pair: -pair[1].us)
    ]
