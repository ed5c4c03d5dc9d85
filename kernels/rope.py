"""Rotary position embedding: the pairs (2i, 2i+1) of each head turned by the angles of the token.

For graphs where the norm before it is fused elsewhere; `qk_norm_rope` does both. Bound by memory: x
is read once and the result written once. One program holds all heads of one token in registers, so
that the angles are read once.
"""
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from wantrt.kernels.aot import (
    FLOAT32,
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
    require_one_device,
    require_rank,
)
from wantrt.kernels.rows import LAUNCH, load_angles, load_once, rotate_pairs, warps
from wantrt.linked import refuse_other_names
from wantrt.models.ops import rope as rope_reference

refuse_other_names(__spec__)

__all__ = ["require_angles", "rope", "rope_reference"]


@triton.jit
def rope_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    seq_len,
    x_batch_stride,
    x_head_stride,
    x_token_stride,
    out_batch_stride,
    out_head_stride,
    out_token_stride,
    out_ptr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    batch = tl.program_id(0) // seq_len
    token = tl.program_id(0) % seq_len
    channel = tl.arange(0, BLOCK)
    inside = channel < HEADS * HEAD_DIM
    head = (channel // HEAD_DIM).to(tl.int64)
    in_head = channel % HEAD_DIM

    start = batch.to(tl.int64) * x_batch_stride + token.to(tl.int64) * x_token_stride
    x = load_once(x_ptr, start, head * x_head_stride + in_head, inside)
    cos = load_angles(cos_ptr, token, HEADS * HEAD_DIM, HEAD_DIM // 2, BLOCK)
    sin = load_angles(sin_ptr, token, HEADS * HEAD_DIM, HEAD_DIM // 2, BLOCK)
    out = rotate_pairs(x, cos, sin, BLOCK).to(out_ptr.dtype.element_ty)
    start = batch.to(tl.int64) * out_batch_stride + token.to(tl.int64) * out_token_stride
    tl.store(out_ptr + start + (head * out_head_stride + in_head), out, mask=inside)


@torch.library.custom_op("wantrt::rope", mutates_args=())
def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Same contract as `rope_reference`; the result lies in memory in the order of x's axes.

    x: contiguous D, any other strides. Raises ExecutionError for tensors that do not fit together.
    """
    op = "rope"
    require_rank(op, "x", x, "B H L D")
    require(op, "x", x, tuple(x.shape), x.device)
    require_contiguous_channels(op, "x", x)
    batch, num_heads, seq_len, head_dim = x.shape
    require_angles(op, x, seq_len, head_dim, cos, sin)
    require_device(op, x)
    out = torch.empty_like(x)
    if out.stride(-1) != 1:
        refuse(op, f"x overlaps itself (strides {x.stride()}): call .contiguous()")
    block = triton.next_power_of_2(num_heads * head_dim)
    with torch.cuda.device_of(x):
        rope_kernel[(batch * seq_len,)](
            x,
            cos,
            sin,
            seq_len,
            *x.stride()[:3],
            *out.stride()[:3],
            out,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK=block,
            num_warps=warps(block),
            **LAUNCH,
        )
    return out


@rope.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    require_one_device("rope", x, cos, sin)
    return torch.empty_like(x)


def require_angles(
    op: str, x: Tensor, seq_len: int, head_dim: int, cos: Tensor, sin: Tensor
) -> None:
    """cos and sin: [L, D/2] float32, where x is."""
    if head_dim % 2:
        refuse(op, f"a head has {head_dim} channels: they turn in pairs")
    for name, table in (("cos", cos), ("sin", sin)):
        require(op, name, table, (seq_len, head_dim // 2), x.device, (torch.float32,))
        require_contiguous(op, name, table)


def _launch(inputs: Operands, node: Attributes) -> Launch:
    batch, heads, seq_len, head_dim = inputs["x"].shape
    heads, head_dim = static(heads, "the number of heads"), static(head_dim, "their width")
    block = next_power_of_2(heads * head_dim)
    strides = {
        "batch_stride": product(heads * head_dim, seq_len),
        "head_stride": product(head_dim, seq_len),
        "token_stride": head_dim,
    }
    strides = {f"{which}_{name}": s for which in ("x", "out") for name, s in strides.items()}
    return Launch(
        grid=(product(batch, seq_len),),
        constants={"HEADS": heads, "HEAD_DIM": head_dim, "BLOCK": block},
        scalars={"seq_len": seq_len, **strides},
        multiples_of_16=tuple(strides) if head_dim % 16 == 0 else (),
        num_warps=warps(block),
    )


PLUGINS = (
    Plugin(
        name="Rope",
        kernel=rope_kernel,
        inputs={"x": FLOATS, "cos": FLOAT32, "sin": FLOAT32},
        outputs=("out",),
        attributes={},
        infer=lambda inputs, node: (inputs["x"],),
        launch=_launch,
    ),
)
