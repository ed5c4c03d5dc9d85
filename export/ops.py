"""The models' fusable operations as nodes of a graph, each with its definition.

A node of domain ``wantrt`` carries the reference itself, traced, as its function body: ONNX Runtime
and TensorRT-RTX put the body in the node's place; a TensorRT that has a plugin of the node's name
takes that. The other operations map one to one to standard ONNX operators. Where a definition needs
what torch has no function for, here is one that a trace sees whole.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from wantrt.export.tracing import Traced
from wantrt.linked import refuse_other_names
from wantrt.models import ops
from wantrt.models.ops import Ops, merge_heads, rms_norm, split_heads
from wantrt.schedulers.solver import guided_step

refuse_other_names(__spec__)


@dataclass(frozen=True)
class Node:
    """`body` as a function that a trace records as one node of type `name`.

    The type also says which optional tensors are there, as a plugin has them all or none: it ends
    in ``Rows`` with a `token_row`, and does not begin with ``Gated`` without a `gate`.
    """

    name: str
    body: Callable[..., Any]  # of a module: a component is sent to the process that compiles it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        arguments = inspect.signature(self.body).bind(*args, **kwargs).arguments
        traced = [value for value in arguments.values() if isinstance(value, Traced)]
        if not traced:
            return self.body(**arguments)
        node_type = self.name + ("Rows" if arguments.get("token_row") is not None else "")
        if arguments.get("gate", True) is None:
            node_type = node_type.removeprefix("Gated")
        results = traced[0].tracer.function(node_type, self.body, arguments)
        return results if len(results) > 1 else results[0]


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int) -> Tensor:
    """`rope` on heads that lie side by side. x: [B, L, C] float32; cos, sin: [B, L, D/2]."""
    if has_torch_function((x,)):
        return handle_torch_function(rotary_embedding, (x,), x, cos, sin, num_heads)
    return merge_heads(ops.rope(split_heads(x, num_heads), cos.unsqueeze(1), sin.unsqueeze(1)))


def _rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """As `wantrt.models.ops.rope`, on heads put side by side."""
    num_heads = x.shape[1]
    cos, sin = cos.expand(x.shape[0], -1, -1), sin.expand(x.shape[0], -1, -1)
    rotated = rotary_embedding(merge_heads(x).float(), cos, sin, num_heads)
    return split_heads(rotated.to(x.dtype), num_heads)


def _norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """q and k of `wantrt.models.ops.qk_norm_rope`, rotated before the heads are split."""
    dim = q_weight.shape[0]
    cos, sin = cos.expand(qkv.shape[0], -1, -1), sin.expand(qkv.shape[0], -1, -1)

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        x = rotary_embedding(rms_norm(x.float(), weight, eps), cos, sin, num_heads)
        return split_heads(x.to(qkv.dtype), num_heads)

    return normed(qkv[:, :, :dim], q_weight), normed(qkv[:, :, dim : 2 * dim], k_weight)


def qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `wantrt.models.ops.qk_norm_rope`; v, which nothing is done to, stays outside the node."""
    q, k = QK_NORM_ROPE(qkv, q_weight, k_weight, cos, sin, num_heads, eps)
    return q, k, split_heads(qkv[:, :, 2 * q_weight.shape[0] :], num_heads)


def root_of_channels(x: Tensor) -> Tensor:
    """√C of x [B, C, ...], read from x at run time: one definition of a node serves every C."""
    if has_torch_function((x,)):
        return handle_torch_function(root_of_channels, (x,), x)
    return torch.tensor([x.shape[1] ** 0.5], device=x.device)


def _rms_silu(x: Tensor, gamma: Tensor) -> Tensor:
    """As `wantrt.models.ops.rms_silu`."""
    normed = F.normalize(x.float(), dim=1) * root_of_channels(x)
    return F.silu(normed * gamma.float().view(-1, *(1 for _ in x.shape[2:]))).to(x.dtype)


QK_NORM_ROPE = Node("QkNormRope", _norm_rope)
ROPE = Node("Rope", _rope)
RMS_NORM = Node("RmsNorm", rms_norm)
GUIDE_AND_STEP = Node("GuideAndStep", guided_step)

ONNX_OPS = Ops(
    qk_norm_rope=qk_norm_rope,
    modulate=Node("Modulate", ops.modulate),
    gated_residual=Node("GatedResidual", ops.gated_residual),
    gated_residual_modulate=Node("GatedResidualModulate", ops.gated_residual_modulate),
    gated_residual_norm=Node("GatedResidualNorm", ops.gated_residual_norm),
    rms_silu=Node("RmsSilu", _rms_silu),
)
