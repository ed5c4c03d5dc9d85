"""Scratch of a component: what its module allocates while it runs, by running it without memory.

On the meta device a tensor has a size and no bytes, and lives as long as on a GPU: so the peak is
not estimated but counted, for every component there is, in milliseconds and at any size. What lies
outside the modules, the operations between the matrix products, stands here as what it allocates:
its results.

What torch allocates inside an operator is not seen: cuDNN's workspace for convolutions, and
cuBLAS's, of 32 MiB or less. A plan has scratch of its own, which TensorRT tells when it is loaded.
"""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from wantrt.models.components import Component
from wantrt.models.ops import TORCH_OPS, Ops, linear_gelu, split_heads


def scratch_bytes(component: Component, symbols: Mapping[str, int]) -> int:
    """The most that a run holds beside its inputs and weights; its results count.

    component: with `KERNELS` or `REFERENCE` as its operations.
    """
    inputs = [
        torch.empty(spec.concrete(symbols), dtype=spec.dtype, device="meta")
        for spec in component.inputs.values()
    ]
    with torch.no_grad(), Allocations((*inputs, *component.module.parameters())) as allocations:
        component.module(*inputs)
    return allocations.peak_bytes


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors that are made inside, as long as they live.

    Views count once, with what they view; `known` and what they view do not.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live_bytes = self.peak_bytes = 0
        self._counted = {tensor.untyped_storage()._cdata for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        results = func(*args, **(kwargs or {}))
        for result in tree_iter(results):
            if isinstance(result, Tensor):
                self._count(result.untyped_storage())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._counted:
            self._counted.add(storage._cdata)
            self.live_bytes += storage.nbytes()
            finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, address: int, nbytes: int) -> None:
        self._counted.discard(address)
        self.live_bytes -= nbytes


# -- The operations, as what they allocate --------------------------------------------------------


def _attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Fused: no scores. Its result lies in memory tokens first."""
    batch, heads, tokens, _ = q.shape
    return q.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)


def _qk_norm_rope(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    num_heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k = (split_heads(qkv.new_empty(*qkv.shape[:2], len(q_weight)), num_heads) for _ in range(2))
    return q, k, split_heads(qkv.chunk(3, dim=-1)[2], num_heads)


def _linear_gelu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """GELU is part of the product in 16 bits alone."""
    if x.dtype == torch.float32:
        return linear_gelu(x, weight, bias)
    return x.new_empty(*x.shape[:-1], len(weight))


def _residual_and(
    x: Tensor, y: Tensor, gate: Tensor | None, first: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """rest: ends with the dtype of the second result."""
    return torch.empty_like(x), torch.empty_like(x, dtype=rest[-1])


REFERENCE = replace(TORCH_OPS, attention=_attention)
"""Plain torch's, on a CPU."""

KERNELS = Ops(
    attention=_attention,
    rms_norm=lambda x, weight, eps: x.new_empty(x.shape),
    qk_norm_rope=_qk_norm_rope,
    modulate=lambda x, shift, scale, row, eps, dtype: x.new_empty(x.shape, dtype=dtype),
    gated_residual=lambda x, y, gate, row: torch.empty_like(x),
    gated_residual_modulate=_residual_and,
    gated_residual_norm=_residual_and,
    linear_gelu=_linear_gelu,
    rms_silu=lambda x, gamma: torch.empty_like(x),
)
"""Our kernels', on a GPU (kernels/ops.py)."""
