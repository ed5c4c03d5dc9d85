"""RMS norm over the last axis: ``x / sqrt(mean(x²) + eps) * weight``.

For the queries and keys of cross-attention, and the text encoder. Bound by memory: x is read once
and the result written once. One program holds one row in registers.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from wantrt.kernels.aot import (
    Attributes,
    Launch,
    Operands,
    Plugin,
    next_power_of_2,
    product,
    static,
)
from wantrt.kernels.arguments import (
    FLOATS,
    refuse,
    require,
    require_contiguous,
    require_contiguous_channels,
    require_device,
    require_elements,
    require_one_device,
)
from wantrt.kernels.rows import LAUNCH, load_once, load_shared, rms_norm_row, row_start, warps
from wantrt.linked import refuse_other_names
from wantrt.models.ops import rms_norm as rms_norm_reference

refuse_other_names(__spec__)

__all__ = ["rms_norm", "rms_norm_reference"]


@triton.jit
def rms_norm_kernel(
    x_ptr,
    weight_ptr,
    x_stride,
    out_ptr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    x = load_once(x_ptr, row_start(x_stride), channel, inside)
    out = rms_norm_row(x, EPS, CHANNELS) * load_shared(weight_ptr, 0, channel, inside)
    at = row_start(CHANNELS) + channel
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("wantrt::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Same contract as `rms_norm_reference`; the result is contiguous.

    x: [.., C], contiguous channels, rows at equal distances: a chunk of the last axis will do.
    Raises ExecutionError for tensors that do not fit together.
    """
    op = "rms_norm"
    if x.dim() == 0:
        refuse(op, "x has no axes, expected [.., C]")
    require_elements(op, "x", x)
    require(op, "x", x, tuple(x.shape), x.device)
    require_contiguous_channels(op, "x", x)
    channels = x.shape[-1]
    require(op, "weight", weight, (channels,), x.device)
    require_contiguous(op, "weight", weight)
    require_device(op, x)
    try:
        rows = x.view(-1, channels)
    except RuntimeError:
        refuse(op, f"the rows of x are not at equal distances ({x.stride()}): call .contiguous()")
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x):
        rms_norm_kernel[(rows.shape[0],)](
            x,
            weight,
            rows.stride(0),
            out,
            EPS=eps,
            CHANNELS=channels,
            BLOCK=block,
            num_warps=warps(block),
            **LAUNCH,
        )
    return out


@rms_norm.register_fake
def _(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    require_one_device("rms_norm", x, weight)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _launch(inputs: Operands, node: Attributes) -> Launch:
    *rows, channels = inputs["x"].shape
    channels = static(channels, "the number of channels")
    block = next_power_of_2(channels)
    return Launch(
        grid=(product(1, *rows),),
        constants={"EPS": node["eps"], "CHANNELS": channels, "BLOCK": block},
        scalars={"x_stride": channels},
        multiples_of_16=("x_stride",) if channels % 16 == 0 else (),
        num_warps=warps(block),
    )


PLUGINS = (
    Plugin(
        name="RmsNorm",
        kernel=rms_norm_kernel,
        inputs={"x": FLOATS, "weight": FLOATS},
        outputs=("out",),
        attributes={"eps": float},
        infer=lambda inputs, node: (inputs["x"],),
        launch=_launch,
    ),
)
