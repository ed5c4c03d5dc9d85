"""The operations between the matrix products, as arguments of the models.

A model takes an `Ops` and calls nothing else for these, so the same module runs as plain torch (the
defaults here: the definition of correct), with Triton kernels on a GPU, or as nodes of a graph for
export. Letters: B batch, L tokens, C channels, H heads, D head_dim, R modulation rows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """softmax(q kᵀ · scale + bias) v. q: [B, H, L, D]; k, v: [B, H, S, D]; bias: [B, H, L, S]."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last axis, computed in float32, returned in x's dtype. weight: [C]."""
    return F.rms_norm(x.float(), x.shape[-1:], weight.float(), eps).to(x.dtype)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (2i, 2i+1) of each head. x: [B, H, L, D]; cos, sin: [L, D/2], float32."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # [B, H, L, D/2] each
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).to(x.dtype)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a fused QKV output into what attention wants: q and k normed and rotated, v as it is.

    qkv: [B, L, 3C]; weights: [C], the RMS norm spans all heads; cos, sin: [L, D/2]. Arithmetic in
    float32. Returns q, k, v: [B, H, L, D] in qkv's dtype.
    """
    q, k, v = qkv.chunk(3, dim=-1)
    q = rope(split_heads(rms_norm(q.float(), q_weight, eps), num_heads), cos, sin)
    k = rope(split_heads(rms_norm(k.float(), k_weight, eps), num_heads), cos, sin)
    return q.to(qkv.dtype), k.to(qkv.dtype), split_heads(v, num_heads)


def modulate(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    token_row: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> Tensor:
    """LayerNorm(x) · (1 + scale) + shift, in float32, returned in `dtype`.

    x: [B, L, C]; shift, scale: [B, R, C]; token_row: [L], the row of each token, None when R = 1.
    """
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + per_token(scale, token_row)) + per_token(shift, token_row)).to(dtype)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, token_row: Tensor | None) -> Tensor:
    """x + y · gate, in float32. x, y: [B, L, C]; gate: [B, R, C]; token_row as in `modulate`."""
    return x.float() + y.float() * per_token(gate, token_row)


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
    """`gated_residual` (x + y without a gate) and `modulate` of the result: returns both."""
    x = _residual(x, y, gate, token_row)
    return x, modulate(x, shift, scale, token_row, eps, dtype)


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
    """`gated_residual` and the affine LayerNorm of the result, in `dtype`. weight, bias: [C]."""
    x = _residual(x, y, gate, token_row)
    return x, F.layer_norm(x, x.shape[-1:], weight.float(), bias.float(), eps).to(dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU (tanh) of a linear layer. x: [..., I]; weight: [O, I]; bias: [O]."""
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def rms_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """SiLU of `channel_norm`, with nothing rounded between the two."""
    return F.silu(_channel_norm(x, gamma)).to(x.dtype)


def channel_norm(x: Tensor, gamma: Tensor) -> Tensor:
    """x / max(‖x‖₂, 1e-12) · √C · γ over channels (official ``RMS_norm``), in float32.

    x: [B, C, ...]; gamma: [C]. Returned in x's dtype.
    """
    return _channel_norm(x, gamma).to(x.dtype)


@dataclass(frozen=True)
class Ops:
    """The fusable operations; the defaults are the reference."""

    attention: Callable[[Tensor, Tensor, Tensor, Tensor | None, float], Tensor] = attention
    rms_norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm
    qk_norm_rope: Callable[
        [Tensor, Tensor, Tensor, Tensor, Tensor, int, float], tuple[Tensor, Tensor, Tensor]
    ] = qk_norm_rope
    modulate: Callable[[Tensor, Tensor, Tensor, Tensor | None, float, torch.dtype], Tensor] = (
        modulate
    )
    gated_residual: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = gated_residual
    gated_residual_modulate: Callable[
        [Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, float, torch.dtype],
        tuple[Tensor, Tensor],
    ] = gated_residual_modulate
    gated_residual_norm: Callable[
        [Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None, float, torch.dtype],
        tuple[Tensor, Tensor],
    ] = gated_residual_norm
    linear_gelu: Callable[[Tensor, Tensor, Tensor], Tensor] = linear_gelu
    rms_silu: Callable[[Tensor, Tensor], Tensor] = rms_silu


TORCH_OPS = Ops()


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, L, C] -> [B, H, L, D]."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """[B, H, L, D] -> [B, L, C]."""
    return x.transpose(1, 2).flatten(2)


def per_token(rows: Tensor, token_row: Tensor | None) -> Tensor:
    """Modulation rows as something that broadcasts over tokens: [B, 1, C] or [B, L, C]."""
    return rows if token_row is None else rows[:, token_row]


def _residual(x: Tensor, y: Tensor, gate: Tensor | None, token_row: Tensor | None) -> Tensor:
    return x.float() + y.float() if gate is None else gated_residual(x, y, gate, token_row)


def _channel_norm(x: Tensor, gamma: Tensor) -> Tensor:
    scale = gamma.float().view(-1, *(1 for _ in x.shape[2:]))
    return F.normalize(x.float(), dim=1) * (gamma.shape[0] ** 0.5) * scale
