"""LayerNorm fused with adaLN modulation: ``norm(x) * (1 + scale) + shift``.

Before the first block and in the head; elsewhere it is fused with the residual before it
(gated_residual.py). Bound by memory: x is read once and the result written once, the rows of
modulation stay in the cache. One program holds one token in registers.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from wantrt.kernels.aot import (
    FLOAT32,
    ROWS,
    Operand,
    Plugin,
    output_dtype,
    token_launch,
)
from wantrt.kernels.arguments import (
    FLOATS,
    require,
    require_contiguous,
    require_device,
    require_dtype,
    require_modulation,
    require_one_device,
    require_rank,
)
from wantrt.kernels.rows import (
    LAUNCH,
    layer_norm,
    load_once,
    load_shared,
    modulation_start,
    row_start,
    warps,
)
from wantrt.linked import refuse_other_names
from wantrt.models.ops import modulate as modulate_reference

refuse_other_names(__spec__)

__all__ = ["modulate", "modulate_reference"]


@triton.jit
def modulate_kernel(
    x_ptr,
    shift_ptr,
    scale_ptr,
    token_row_ptr,
    seq_len,
    batch_stride,
    row_stride,
    out_ptr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    start = row_start(CHANNELS)
    row = modulation_start(token_row_ptr, seq_len, batch_stride, row_stride)
    x = load_once(x_ptr, start, channel, inside)
    normed = layer_norm(x, inside, EPS, CHANNELS)
    scale = load_shared(scale_ptr, row, channel, inside)
    shift = load_shared(shift_ptr, row, channel, inside)
    out = normed * (1.0 + scale) + shift
    tl.store(out_ptr + start + channel, out.to(out_ptr.dtype.element_ty), mask=inside)


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
    op = "modulate"
    require_rank(op, "x", x, "B L C")
    require(op, "x", x, tuple(x.shape), x.device)
    require_contiguous(op, "x", x)
    strides = require_modulation(op, {"shift": shift, "scale": scale}, x, token_row)
    require_dtype(op, dtype)
    require_device(op, x)
    batch, seq_len, channels = x.shape
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x):
        modulate_kernel[(batch * seq_len,)](
            x,
            shift,
            scale,
            token_row,
            seq_len,
            *strides,
            out,
            EPS=eps,
            CHANNELS=channels,
            BLOCK=block,
            num_warps=warps(block),
            **LAUNCH,
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
    require_one_device("modulate", x, shift, scale, token_row)
    return torch.empty(x.shape, dtype=dtype, device=x.device)


PLUGINS = tuple(
    Plugin(
        name=f"Modulate{rows}",
        kernel=modulate_kernel,
        inputs={"x": FLOATS, "shift": FLOAT32, "scale": FLOAT32, **token_row},
        outputs=("out",),
        attributes={"eps": float, "dtype": int},
        infer=lambda inputs, node: (Operand(inputs["x"].shape, output_dtype(node)),),
        launch=lambda inputs, node: token_launch(inputs["x"], inputs["shift"], EPS=node["eps"]),
    )
    for rows, token_row in ROWS
)
