"""The models' fusable operations as they run on CUDA: our kernels, torch's attention and products.

Imports without Triton; `kernel_ops` needs it.
"""

from collections.abc import Sequence
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wantrt.errors import RuntimeUnavailableError
from wantrt.linked import refuse_other_names
from wantrt.models import ops
from wantrt.models.ops import Ops, split_heads

refuse_other_names(__spec__)

# In order of preference; each takes the shapes and dtypes that it can. All are exact.
ATTENTIONS = [
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.MATH,
]


@cache
def kernel_ops() -> Ops:
    """The operations for tensors on CUDA; each has the contract of its reference.

    They demand of strides and dtypes what the models give, and raise ExecutionError for the rest.
    Raises RuntimeUnavailableError without Triton.
    """
    try:
        import triton  # noqa: F401
    except ImportError as error:
        raise RuntimeUnavailableError(
            "the kernels need Triton, which is not installed: pip install triton"
        ) from error
    from wantrt.kernels.gated_residual import gated_residual_norm
    from wantrt.kernels.modulate import modulate
    from wantrt.kernels.rms_norm import rms_norm
    from wantrt.kernels.rms_silu import rms_silu

    return Ops(
        attention=attention,
        rms_norm=rms_norm,
        qk_norm_rope=qk_norm_rope,
        modulate=modulate,
        gated_residual=gated_residual,
        gated_residual_modulate=gated_residual_modulate,
        gated_residual_norm=gated_residual_norm,
        linear_gelu=linear_gelu,
        rms_silu=rms_silu,
    )


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See `wantrt.models.ops.attention`. The order of preference holds in here alone.

    A bias is the text encoder's, whose attention is small: its layout is no matter for cuDNN.
    """
    backends = ATTENTIONS if bias is None else ATTENTIONS[1:]
    with sdpa_kernel(backends, set_priority=True):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `wantrt.models.ops.qk_norm_rope`. v is a view of qkv, q and k lie in memory like it."""
    from wantrt.kernels.qk_norm_rope import qk_norm_rope as kernel

    # tokens first: attention leaves its result in the order of q, and then heads merge for free
    q, k = kernel(qkv, q_weight, k_weight, cos, sin, num_heads, eps, heads_first=False)
    return q, k, split_heads(qkv.chunk(3, dim=-1)[2], num_heads)


def gated_residual(x: Tensor, y: Tensor, gate: Tensor, token_row: Tensor | None) -> Tensor:
    """See `wantrt.models.ops.gated_residual`."""
    from wantrt.kernels.gated_residual import gated_residual as kernel

    return kernel(x, y, _alike(gate)[0], token_row)


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
    """See `wantrt.models.ops.gated_residual_modulate`."""
    from wantrt.kernels.gated_residual import gated_residual_modulate as kernel

    if gate is not None:
        gate, shift, scale = _alike(gate, shift, scale)
    return kernel(x, y, gate, shift, scale, token_row, eps, dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """See `wantrt.models.ops.linear_gelu`; in 16 bits on CUDA, GELU is part of the product.

    There `_addmm_activation` computes the tanh form, with the product not yet rounded to 16 bits.
    On a CPU it computes the other form, the one of erf, so there it is not used.
    """
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16):
        return ops.linear_gelu(x, weight, bias)
    flat = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
    return flat.unflatten(0, x.shape[:-1])


def _alike(*modulation: Tensor) -> Sequence[Tensor]:
    """Tensors [B, R, C] with contiguous channels and equal strides, copied if they are not yet.

    A block's own are. The gate of a hint is not: it is one number, expanded.
    """
    first = modulation[0].stride()
    if first[-1] == 1 and all(tensor.stride() == first for tensor in modulation):
        return modulation
    return torch.stack(modulation, dim=2).unbind(2)
