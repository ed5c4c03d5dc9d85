"""LayerNorm fused with adaLN modulation: ``norm(x) * (1 + scale) + shift``.

Twice in every DiT block. Bound by memory: x is read once and the result written once, the rows of
modulation stay in the cache. One program holds one token in registers.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from wantrt.kernels.arguments import (
    FLOATS,
    refuse,
    require,
    require_contiguous,
    require_device,
    require_rank,
)
from wantrt.linked import refuse_other_names
from wantrt.models.ops import modulate as modulate_reference

refuse_other_names(__spec__)

__all__ = ["modulate", "modulate_reference"]


@triton.jit
def _modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    token_row_ptr,
    seq_len,
    batch_stride,
    row_stride,
    out_ptr,
    EPS: tl.constexpr,
    PER_TOKEN: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)  # of all batches: b * L + l
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    x = tl.load(x_ptr + token * CHANNELS + channel, mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, axis=0) / CHANNELS
    centred = tl.where(inside, x - mean, 0.0)
    variance = tl.sum(centred * centred, axis=0) / CHANNELS
    normed = centred * (1.0 / tl.sqrt(variance + EPS))

    offset = (token // seq_len) * batch_stride
    if PER_TOKEN:
        offset += tl.load(token_row_ptr + token % seq_len) * row_stride
    scale = tl.load(scale_ptr + offset + channel, mask=inside, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + offset + channel, mask=inside, other=0.0).to(tl.float32)
    out = normed * (1.0 + scale) + shift
    tl.store(out_ptr + token * CHANNELS + channel, out.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("wantrt::modulate", mutates_args=())
def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    token_row: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """Same contract as `modulate_reference`; x contiguous, token_row int64 with values below R.

    shift and scale may be views, such as `unbind` gives, of equal strides and contiguous channels.
    Raises ExecutionError for tensors that do not fit together.
    """
    _check(x, shift, scale, token_row, dtype)
    batch, seq_len, channels = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    if out.numel() == 0:
        return out
    block = triton.next_power_of_2(channels)
    _modulate_kernel[(batch * seq_len,)](
        x,
        shift,
        scale,
        token_row if token_row is not None else x,  # not read where all tokens take row 0
        seq_len,
        shift.stride(0),
        shift.stride(1),
        out,
        EPS=eps,
        PER_TOKEN=token_row is not None,
        CHANNELS=channels,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return out


@modulate.register_fake
def _(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    token_row: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _check(
    x: Tensor, shift: Tensor, scale: Tensor, token_row: Tensor | None, dtype: torch.dtype
) -> None:
    op = "modulate"
    require_rank(op, "x", x, "B L C")
    require_rank(op, "shift", shift, "B R C")
    require(op, "x", x, tuple(x.shape), x.device)
    require_contiguous(op, "x", x)
    batch, seq_len, channels = x.shape
    rows = shift.shape[1] if token_row is not None else 1
    for name, tensor in (("shift", shift), ("scale", scale)):
        require(op, name, tensor, (batch, rows, channels), x.device)
        if channels > 1 and tensor.stride(2) != 1:
            refuse(op, f"the channels of {name} are not contiguous: call .contiguous()")
    if shift.stride() != scale.stride():
        refuse(op, f"shift has strides {shift.stride()}, scale {scale.stride()}: make both equal")
    if token_row is not None:
        require(op, "token_row", token_row, (seq_len,), x.device, (torch.int64,))
        require_contiguous(op, "token_row", token_row)
    if dtype not in FLOATS:
        refuse(op, f"dtype is {dtype}, expected one of {FLOATS}")
    require_device(op, x, interpreted=triton.knobs.runtime.interpret)
