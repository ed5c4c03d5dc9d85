"""The models' fusable operations spelled so that each becomes a native ONNX operator.

``F.scaled_dot_product_attention``, ``F.rms_norm`` and ``F.layer_norm`` of the reference already map
one to one. Rotary embedding does not: torch has no such function, so here is one that a trace sees
whole.
"""

from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from wantrt.linked import refuse_other_names
from wantrt.models.ops import Ops, merge_heads, rms_norm, rope, split_heads

refuse_other_names(__spec__)


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """`rope` on heads that lie side by side. x: [B, L, C] float32; cos, sin: [B, L, D/2]."""
    if has_torch_function((x,)):
        return handle_torch_function(rotary_embedding, (x,), x, cos, sin, num_heads)
    return merge_heads(rope(split_heads(x, num_heads), cos.unsqueeze(1), sin.unsqueeze(1)))


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `wantrt.models.ops.qk_norm_rope`, rotating before the heads are split."""
    q, k, v = qkv.chunk(3, dim=-1)
    cos, sin = cos.expand(qkv.shape[0], -1, -1), sin.expand(qkv.shape[0], -1, -1)
    q = rotary_embedding(rms_norm(q.float(), q_weight, eps), cos, sin, num_heads).to(qkv.dtype)
    k = rotary_embedding(rms_norm(k.float(), k_weight, eps), cos, sin, num_heads).to(qkv.dtype)
    return split_heads(q, num_heads), split_heads(k, num_heads), split_heads(v, num_heads)


ONNX_OPS = Ops(qk_norm_rope=qk_norm_rope)
