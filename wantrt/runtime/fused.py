"""Which form of the fusable operations a device runs: Triton kernels on CUDA, torch elsewhere."""

import logging
from functools import cache
from importlib.util import find_spec

import torch

from wantrt.models.ops import TORCH_OPS, Ops
from wantrt.schedulers.solver import Step, guide_and_step

log = logging.getLogger("wantrt")


def ops_for(device: torch.device) -> Ops:
    """What the reference modules run with on `device`."""
    if not _has_kernels(device):
        return TORCH_OPS
    from wantrt.kernels.ops import kernel_ops

    return kernel_ops()


def step_for(device: torch.device) -> Step:
    """Guidance and the solver's step on `device`."""
    if not _has_kernels(device):
        return guide_and_step
    from wantrt.kernels.guide_and_step import guide_and_step as kernel

    return kernel


@cache
def _has_kernels(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    if find_spec("triton") is None:
        log.warning(
            "Triton is not installed, so plain torch stands in for the fused kernels on %s, more "
            "slowly: pip install triton",
            device,
        )
        return False
    return True
