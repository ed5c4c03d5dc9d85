"""SiLU of the VAE's channel norm: ``silu(x / max(‖x‖₂, 1e-12) * sqrt(C) * gamma)``.

Before every convolution of the VAE. Bound by memory: x is read once and the result written once.
Channels are an inner axis (channels last) or one of large stride (channels first); either way a
program holds all channels of some positions in registers.
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
    ceil_div,
    is_multiple_of_16,
    next_power_of_2,
    product,
    static,
)
from wantrt.kernels.arguments import (
    FLOATS,
    refuse,
    require,
    require_contiguous,
    require_device,
    require_one_device,
    require_rank,
)
from wantrt.kernels.rows import LAUNCH, warps
from wantrt.linked import refuse_other_names
from wantrt.models.ops import rms_silu as rms_silu_reference

refuse_other_names(__spec__)

__all__ = ["positions_first", "positions_last", "rms_silu", "rms_silu_reference"]


def positions_last(block: int) -> int:
    """Positions a program takes where they are the inner axis: 32, 16 of a thousand channels."""
    return min(max(16384 // block, 16), 32)


def positions_first(block: int) -> int:
    """Positions a program takes where channels are the inner axis."""
    return max(4096 // block, 1)


@triton.jit
def _silu_of_norm(x, gamma, AXIS: tl.constexpr, CHANNELS: tl.constexpr):
    """x: float32, zero outside, channels on AXIS."""
    length = tl.sqrt(tl.sum(x * x, axis=AXIS, keep_dims=True))
    normed = x * (CHANNELS**0.5 / tl.maximum(length, 1e-12)) * gamma
    return normed / (1.0 + tl.exp(-normed))


@triton.jit
def channels_first_kernel(
    x_ptr,
    gamma_ptr,
    positions,
    batch_stride,
    channel_stride,
    frame_stride,
    out_ptr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Program (i, t, b) takes POSITIONS of the positions of frame t. x and out: the same strides.

    Frames that follow each other in memory may be taken as one.
    """
    channel = tl.arange(0, BLOCK)[:, None]
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[None, :]
    inside = (channel < CHANNELS) & (position < positions)
    start = tl.program_id(2).to(tl.int64) * batch_stride
    start += tl.program_id(1).to(tl.int64) * frame_stride
    at = start + channel.to(tl.int64) * channel_stride + position
    x = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    gamma = tl.load(gamma_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    out = _silu_of_norm(x, gamma, 0, CHANNELS)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def channels_last_kernel(
    x_ptr,
    gamma_ptr,
    positions,
    out_ptr,
    CHANNELS: tl.constexpr,
    BLOCK: tl.constexpr,
    POSITIONS: tl.constexpr,
):
    """Program i takes POSITIONS of the positions of the whole batch."""
    channel = tl.arange(0, BLOCK)[None, :]
    position = tl.program_id(0).to(tl.int64) * POSITIONS + tl.arange(0, POSITIONS)[:, None]
    inside = (channel < CHANNELS) & (position < positions)
    at = position * CHANNELS + channel
    x = tl.load(x_ptr + at, mask=inside, other=0.0, eviction_policy="evict_first").to(tl.float32)
    gamma = tl.load(gamma_ptr + channel, mask=channel < CHANNELS, other=0.0).to(tl.float32)
    out = _silu_of_norm(x, gamma, 1, CHANNELS)
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)


@torch.library.custom_op("wantrt::rms_silu", mutates_args=())
def rms_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """Same contract as `rms_silu_reference`, for x [B, C, T, H, W]; the result has x's strides.

    x: dense, each frame [H, W] of a channel contiguous (so contiguous, or frames before channels),
    or channels last. Raises ExecutionError for tensors that do not fit together.
    """
    op = "rms_silu"
    require_rank(op, "x", x, "B C T H W")
    require(op, "x", x, tuple(x.shape), x.device)
    batch, channels, frames, height, width = x.shape
    require(op, "gamma", gamma, (channels,), x.device)
    require_contiguous(op, "gamma", gamma)
    require_device(op, x)
    out = torch.empty_like(x)
    block = triton.next_power_of_2(channels)
    if _is_channels_last(x):
        tile, positions = positions_first(block), batch * frames * height * width
        with torch.cuda.device_of(x):
            channels_last_kernel[(triton.cdiv(positions, tile),)](
                x,
                gamma,
                positions,
                out,
                CHANNELS=channels,
                BLOCK=block,
                POSITIONS=tile,
                num_warps=warps(block * tile),
                **LAUNCH,
            )
        return out
    _check_frames(op, x, out)
    positions = height * width
    if frames == 1 or x.stride(2) == positions:
        frames, positions = 1, frames * positions
    tile = positions_last(block)
    with torch.cuda.device_of(x):
        channels_first_kernel[(triton.cdiv(positions, tile), frames, batch)](
            x,
            gamma,
            positions,
            *x.stride()[:3],
            out,
            CHANNELS=channels,
            BLOCK=block,
            POSITIONS=tile,
            num_warps=warps(block * tile),
            **LAUNCH,
        )
    return out


@rms_silu.register_fake
def _(x: Tensor, gamma: Tensor) -> Tensor:
    require_one_device("rms_silu", x, gamma)
    return torch.empty_like(x)


def _is_channels_last(x: Tensor) -> bool:
    return not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last_3d)


def _check_frames(op: str, x: Tensor, out: Tensor) -> None:
    """Raise unless the elements of a frame follow each other and `out` has x's strides."""
    height, width = x.shape[3:]
    frame_is_contiguous = (width == 1 or x.stride(4) == 1) and (height == 1 or x.stride(3) == width)
    if not frame_is_contiguous or out.stride() != x.stride():
        refuse(op, f"x has strides {x.stride()}, neither channels first nor last: .contiguous()")


def _launch(inputs: Operands, node: Attributes) -> Launch:
    batch, channels, *frame = inputs["x"].shape
    channels = static(channels, "the number of channels")
    positions = product(*frame)
    block = next_power_of_2(channels)
    tile = positions_last(block)
    strides = {
        "batch_stride": product(channels, positions),
        "channel_stride": positions,
        "frame_stride": 0,  # all frames are taken as one
    }
    scalars = {"positions": positions, **strides}
    return Launch(
        grid=(ceil_div(positions, tile), 1, batch),
        constants={"CHANNELS": channels, "BLOCK": block, "POSITIONS": tile},
        scalars=scalars,
        multiples_of_16=tuple(scalars) if is_multiple_of_16(positions) else (),
        num_warps=warps(block * tile),
    )


PLUGINS = (
    Plugin(
        name="RmsSilu",
        kernel=channels_first_kernel,
        inputs={"x": FLOATS, "gamma": FLOATS},
        outputs=("out",),
        attributes={},
        infer=lambda inputs, node: (inputs["x"],),
        launch=_launch,
    ),
)
