"""Queries and keys of self-attention: RMS norm over all heads together, then RoPE.

Reads a fused QKV output and writes what attention wants, q and k, each once; v stays where it is.
Bound by memory. One program holds q or k of one token in registers: both at once would take so many
that too few programs share a multiprocessor.
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
    Operand,
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
from wantrt.kernels.rope import require_angles
from wantrt.kernels.rows import (
    LAUNCH,
    load_angles,
    load_once,
    load_shared,
    rms_norm_row,
    rotate_pairs,
    warps,
)
from wantrt.linked import refuse_other_names
from wantrt.models.ops import qk_norm_rope as qk_norm_rope_reference

refuse_other_names(__spec__)

__all__ = ["qk_norm_rope", "qk_norm_rope_reference"]


@triton.jit
def qk_norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    seq_len,
    batch_stride,
    token_stride,
    q_ptr,
    k_ptr,
    EPS: tl.constexpr,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS_FIRST: tl.constexpr,
):
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM
    is_key = tl.program_id(0) % 2
    row = tl.program_id(0) // 2  # b * L + l
    batch = row // seq_len
    token = row % seq_len
    channel = tl.arange(0, BLOCK)
    inside = channel < CHANNELS
    weight_ptr = tl.where(is_key == 1, k_weight_ptr, q_weight_ptr)
    out_ptr = tl.where(is_key == 1, k_ptr, q_ptr)

    start = batch.to(tl.int64) * batch_stride + token.to(tl.int64) * token_stride
    x = load_once(qkv_ptr, start + is_key * CHANNELS, channel, inside)
    cos = load_angles(cos_ptr, token, CHANNELS, HEAD_DIM // 2, BLOCK)
    sin = load_angles(sin_ptr, token, CHANNELS, HEAD_DIM // 2, BLOCK)
    x = rms_norm_row(x, EPS, CHANNELS) * load_shared(weight_ptr, 0, channel, inside)
    out = rotate_pairs(x, cos, sin, BLOCK).to(out_ptr.dtype.element_ty)

    if HEADS_FIRST:
        start = (batch.to(tl.int64) * (HEADS * seq_len) + token) * HEAD_DIM
        head = (channel // HEAD_DIM).to(tl.int64)
        at = start + head * (seq_len * HEAD_DIM) + channel % HEAD_DIM
    else:
        at = row.to(tl.int64) * CHANNELS + channel
    tl.store(out_ptr + at, out, mask=inside)


@torch.library.custom_op("wantrt::qk_norm_rope", mutates_args=())
def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    heads_first: bool,
) -> tuple[Tensor, Tensor]:
    """Same contract as `qk_norm_rope_reference`, without v, which the caller splits off.

    qkv: [B, L, 3C], contiguous channels, any other strides. q and k [B, H, L, D] lie in memory as
    [B, H, L, D] if `heads_first`, else as [B, L, H, D], which merges into [B, L, C] without a copy.
    Raises ExecutionError for tensors that do not fit together.
    """
    op = "qk_norm_rope"
    require_rank(op, "qkv", qkv, "B L 3C")
    require(op, "qkv", qkv, tuple(qkv.shape), qkv.device)
    require_contiguous_channels(op, "qkv", qkv)
    batch, seq_len, width = qkv.shape
    if num_heads < 1 or width % (3 * num_heads):
        refuse(op, f"qkv has {width} channels: not q, k and v of {num_heads} heads")
    head_dim = width // (3 * num_heads)
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        require(op, name, weight, (width // 3,), qkv.device)
        require_contiguous(op, name, weight)
    if q_weight.dtype != k_weight.dtype:
        refuse(op, f"q_weight is {q_weight.dtype}, k_weight {k_weight.dtype}: make them equal")
    require_angles(op, qkv, seq_len, head_dim, cos, sin)
    require_device(op, qkv)
    out = _empty(qkv, num_heads, heads_first), _empty(qkv, num_heads, heads_first)
    block = triton.next_power_of_2(width // 3)
    with torch.cuda.device_of(qkv):
        qk_norm_rope_kernel[(2 * batch * seq_len,)](
            qkv,
            q_weight,
            k_weight,
            cos,
            sin,
            seq_len,
            *qkv.stride()[:2],
            *out,
            EPS=eps,
            HEADS=num_heads,
            HEAD_DIM=head_dim,
            BLOCK=block,
            HEADS_FIRST=heads_first,
            num_warps=warps(block),
            **LAUNCH,
        )
    return out


@qk_norm_rope.register_fake
def _(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
    heads_first: bool,
) -> tuple[Tensor, Tensor]:
    require_one_device("qk_norm_rope", qkv, q_weight, k_weight, cos, sin)
    return _empty(qkv, num_heads, heads_first), _empty(qkv, num_heads, heads_first)


def _empty(qkv: Tensor, num_heads: int, heads_first: bool) -> Tensor:
    batch, seq_len, width = qkv.shape
    head_dim = width // (3 * num_heads)
    if heads_first:
        return qkv.new_empty(batch, num_heads, seq_len, head_dim)
    return qkv.new_empty(batch, seq_len, num_heads, head_dim).transpose(1, 2)


def _infer(inputs: Operands, node: Attributes) -> tuple[Operand, Operand]:
    batch, seq_len, _ = inputs["qkv"].shape
    head_dim = inputs["cos"].shape[1] * 2
    out = Operand((batch, node["num_heads"], seq_len, head_dim), inputs["qkv"].dtype)
    return out, out


def _launch(inputs: Operands, node: Attributes) -> Launch:
    batch, seq_len, width = inputs["qkv"].shape
    width = static(width, "the number of channels")
    block = next_power_of_2(width // 3)
    return Launch(
        grid=(product(2, batch, seq_len),),
        constants={
            "EPS": node["eps"],
            "HEADS": node["num_heads"],
            "HEAD_DIM": width // (3 * node["num_heads"]),
            "BLOCK": block,
            "HEADS_FIRST": True,
        },
        scalars={
            "seq_len": seq_len,
            "batch_stride": product(seq_len, width),
            "token_stride": width,
        },
        multiples_of_16=("batch_stride", "token_stride") if width % 16 == 0 else (),
        num_warps=warps(block),
    )


PLUGINS = (
    Plugin(
        name="QkNormRope",
        kernel=qk_norm_rope_kernel,
        inputs={
            "qkv": FLOATS,
            "q_weight": FLOATS,
            "k_weight": FLOATS,
            "cos": FLOAT32,
            "sin": FLOAT32,
        },
        outputs=("q", "k"),
        attributes={"num_heads": int, "eps": float},
        infer=_infer,
        launch=_launch,
    ),
)
