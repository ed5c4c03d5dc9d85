"""The gated residual, alone and fused with the norm that follows it: ``x + y * gate``.

A residual and a norm always meet in a block, and both are bound by memory. Fused, x and y are read
once and the new x and its norm written once; the new x never comes back from memory. One program
holds one token in registers.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from wantrt.kernels.aot import (
    FLOAT32,
    ROWS,
    Attributes,
    Dtypes,
    Operand,
    Operands,
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
from wantrt.models.ops import gated_residual as gated_residual_reference
from wantrt.models.ops import gated_residual_modulate as gated_residual_modulate_reference
from wantrt.models.ops import gated_residual_norm as gated_residual_norm_reference

refuse_other_names(__spec__)

__all__ = [
    "gated_residual",
    "gated_residual_modulate",
    "gated_residual_modulate_reference",
    "gated_residual_norm",
    "gated_residual_norm_reference",
    "gated_residual_reference",
]


@triton.jit
def _add_gated(x_ptr, y_ptr, gate_ptr, start, row, channel, inside):
    """x + y · gate of one token; without a gate, x + y."""
    x = load_once(x_ptr, start, channel, inside)
    y = load_once(y_ptr, start, channel, inside)
    if gate_ptr is not None:
        y = y * load_shared(gate_ptr, row, channel, inside)
    return x + y


@triton.jit
def gated_residual_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    token_row_ptr,
    seq_len,
    batch_stride,
    row_stride,
    out_ptr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    start = row_start(CHANNELS)
    row = modulation_start(token_row_ptr, seq_len, batch_stride, row_stride)
    x = _add_gated(x_ptr, y_ptr, gate_ptr, start, row, channel, inside)
    tl.store(out_ptr + start + channel, x, mask=inside)


@triton.jit
def gated_residual_modulate_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    token_row_ptr,
    seq_len,
    batch_stride,
    row_stride,
    sum_ptr,
    out_ptr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    start = row_start(CHANNELS)
    row = modulation_start(token_row_ptr, seq_len, batch_stride, row_stride)
    x = _add_gated(x_ptr, y_ptr, gate_ptr, start, row, channel, inside)
    tl.store(sum_ptr + start + channel, x, mask=inside)
    normed = layer_norm(x, inside, EPS, CHANNELS)
    scale = load_shared(scale_ptr, row, channel, inside)
    shift = load_shared(shift_ptr, row, channel, inside)
    out = normed * (1.0 + scale) + shift
    tl.store(out_ptr + start + channel, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def gated_residual_norm_kernel(
    x_ptr,
    y_ptr,
    gate_ptr,
    weight_ptr,
    bias_ptr,
    token_row_ptr,
    seq_len,
    batch_stride,
    row_stride,
    sum_ptr,
    out_ptr,
    EPS: tl.constexpr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    start = row_start(CHANNELS)
    row = modulation_start(token_row_ptr, seq_len, batch_stride, row_stride)
    x = _add_gated(x_ptr, y_ptr, gate_ptr, start, row, channel, inside)
    tl.store(sum_ptr + start + channel, x, mask=inside)
    normed = layer_norm(x, inside, EPS, CHANNELS)
    weight = load_shared(weight_ptr, 0, channel, inside)
    bias = load_shared(bias_ptr, 0, channel, inside)
    out = normed * weight + bias
    tl.store(out_ptr + start + channel, out.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("wantrt::gated_residual", mutates_args=())
def gated_residual(x: Tensor, y: Tensor, gate: Tensor, token_row: Tensor | None) -> Tensor:
    """Same contract as `gated_residual_reference`; x float32; x and y contiguous.

    gate: a view with contiguous channels; token_row: int64 with values below R. Raises
    ExecutionError for tensors that do not fit together.
    """
    op = "gated_residual"
    strides = _check(op, x, y, {"gate": gate}, token_row)
    out = torch.empty_like(x)
    batch, seq_len, channels = x.shape
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x):
        gated_residual_kernel[(batch * seq_len,)](
            x,
            y,
            gate,
            token_row,
            seq_len,
            *strides,
            out,
            CHANNELS=channels,
            BLOCK=block,
            num_warps=warps(block),
            **LAUNCH,
        )
    return out


@torch.library.custom_op("wantrt::gated_residual_modulate", mutates_args=())
def gated_residual_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    token_row: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Same contract as `gated_residual_modulate_reference`; x float32; x and y contiguous.

    gate, shift and scale may be views of equal strides and contiguous channels; token_row: int64
    with values below R. Raises ExecutionError for tensors that do not fit together.
    """
    op = "gated_residual_modulate"
    modulation = {"shift": shift, "scale": scale}
    if gate is not None:
        modulation["gate"] = gate
    strides = _check(op, x, y, modulation, token_row)
    require_dtype(op, dtype)
    out = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    batch, seq_len, channels = x.shape
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x):
        gated_residual_modulate_kernel[(batch * seq_len,)](
            x,
            y,
            gate,
            shift,
            scale,
            token_row,
            seq_len,
            *strides,
            *out,
            EPS=eps,
            CHANNELS=channels,
            BLOCK=block,
            num_warps=warps(block),
            **LAUNCH,
        )
    return out


@torch.library.custom_op("wantrt::gated_residual_norm", mutates_args=())
def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    token_row: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Same contract as `gated_residual_norm_reference`; x float32; x, y and weights contiguous.

    gate: a view with contiguous channels; token_row: int64 with values below R. Raises
    ExecutionError for tensors that do not fit together.
    """
    op = "gated_residual_norm"
    strides = _check(op, x, y, {} if gate is None else {"gate": gate}, token_row)
    batch, seq_len, channels = x.shape
    for name, tensor in (("weight", weight), ("bias", bias)):
        require(op, name, tensor, (channels,), x.device)
        require_contiguous(op, name, tensor)
    require_dtype(op, dtype)
    out = torch.empty_like(x), torch.empty_like(x, dtype=dtype)
    block = triton.next_power_of_2(channels)
    with torch.cuda.device_of(x):
        gated_residual_norm_kernel[(batch * seq_len,)](
            x,
            y,
            gate,
            weight,
            bias,
            token_row,
            seq_len,
            *strides,
            *out,
            EPS=eps,
            CHANNELS=channels,
            BLOCK=block,
            num_warps=warps(block),
            **LAUNCH,
        )
    return out


@gated_residual.register_fake
def _(x: Tensor, y: Tensor, gate: Tensor, token_row: Tensor | None) -> Tensor:
    require_one_device("gated_residual", x, y, gate, token_row)
    return torch.empty_like(x)


@gated_residual_modulate.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    shift: Tensor,
    scale: Tensor,
    token_row: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    require_one_device("gated_residual_modulate", x, y, gate, shift, scale, token_row)
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype)


@gated_residual_norm.register_fake
def _(
    x: Tensor,
    y: Tensor,
    gate: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    token_row: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    require_one_device("gated_residual_norm", x, y, gate, weight, bias, token_row)
    return torch.empty_like(x), torch.empty_like(x, dtype=dtype)


def _check(
    op: str, x: Tensor, y: Tensor, modulation: dict[str, Tensor], token_row: Tensor | None
) -> tuple[int, int]:
    """Check all but the weights; returns the strides of the modulation."""
    require_rank(op, "x", x, "B L C")
    require(op, "x", x, tuple(x.shape), x.device, (torch.float32,))
    require(op, "y", y, tuple(x.shape), x.device)
    for name, tensor in (("x", x), ("y", y)):
        require_contiguous(op, name, tensor)
    strides = require_modulation(op, modulation, x, token_row)
    require_device(op, x)
    return strides


def _sum_and_norm(inputs: Operands, node: Attributes) -> tuple[Operand, ...]:
    x = inputs["x"]
    return x, Operand(x.shape, output_dtype(node))


def _plugins(rows: str, token_row: Dtypes) -> Iterator[Plugin]:
    residual = {"x": FLOAT32, "y": FLOATS}
    gated = {**residual, "gate": FLOAT32}
    yield Plugin(
        name=f"GatedResidual{rows}",
        kernel=gated_residual_kernel,
        inputs={**gated, **token_row},
        outputs=("out",),
        attributes={},
        infer=lambda inputs, node: (inputs["x"],),
        launch=lambda inputs, node: token_launch(inputs["x"], inputs["gate"]),
    )
    for prefix, summands in (("Gated", gated), ("", residual)):
        yield Plugin(
            name=f"{prefix}ResidualModulate{rows}",
            kernel=gated_residual_modulate_kernel,
            inputs={**summands, "shift": FLOAT32, "scale": FLOAT32, **token_row},
            outputs=("sum", "out"),
            attributes={"eps": float, "dtype": int},
            infer=_sum_and_norm,
            launch=lambda inputs, node: token_launch(inputs["x"], inputs["shift"], EPS=node["eps"]),
        )
    yield Plugin(
        name=f"GatedResidualNorm{rows}",
        kernel=gated_residual_norm_kernel,
        inputs={**gated, "weight": FLOATS, "bias": FLOATS, **token_row},
        outputs=("sum", "out"),
        attributes={"eps": float, "dtype": int},
        infer=_sum_and_norm,
        launch=lambda inputs, node: token_launch(inputs["x"], inputs["gate"], EPS=node["eps"]),
    )


PLUGINS = tuple(plugin for rows in ROWS for plugin in _plugins(*rows))
