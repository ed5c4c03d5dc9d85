"""A pipeline on a device that counts what is allocated on it, phase by phase."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.engines.fake.device import Allocation, FakeDevice
from wantrt.models.ops import TORCH_OPS, Ops, split_heads
from wantrt.runtime.residency import Part, Sessions


class CountingDevice(FakeDevice):
    """Live bytes of tensors on the device, whoever made them, and the most there were by phase.

    phase: the part of the bundle whose sessions were asked for last. Nothing is captured: a
    recording would hold all that it saw.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peaks: dict[str, int] = {}
        self.phase = "before"
        self._hidden = False

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work

    def _register(self, tensor: Tensor, pinned: bool = False) -> Allocation:
        known = self.allocation(tensor)
        allocation = super()._register(tensor, pinned)
        if known is None and not pinned and not self._hidden:
            self.live_bytes += allocation.nbytes
            finalize(tensor.untyped_storage(), self._forget, allocation.nbytes)
            self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live_bytes)
        return allocation

    def _forget(self, nbytes: int) -> None:
        self.live_bytes -= nbytes

    @contextmanager
    def hiding(self) -> Iterator[None]:
        """What is made inside is not counted."""
        before, self._hidden = self._hidden, True
        try:
            yield
        finally:
            self._hidden = before

    def listen(self, names: dict[int, str]) -> None:
        """Learn of phases. names: id of a part -> its name."""
        ask: Callable[[Part, str], Sessions] = Part.__getitem__
        device = self

        def tell(part: Part, component: str) -> Any:
            device.phase = names.get(id(part), device.phase)
            return ask(part, component)

        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(Part, "__getitem__", tell)

    def __exit__(self, *error: object) -> None:
        if hasattr(self, "_patch"):
            self._patch.undo()
        super().__exit__(*error)


def as_kernels(device: CountingDevice) -> Ops:
    """The reference's values; in memory our kernels' form, which allocate their results alone."""

    def alone(reference: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            with device.hiding():
                results = reference(*args)
            return tree_map_only(Tensor, torch.clone, results)

        return run

    def qk_norm_rope(qkv: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        with device.hiding():
            q, k, _ = (t.transpose(1, 2).contiguous() for t in TORCH_OPS.qk_norm_rope(qkv, *rest))
        num_heads = q.shape[2]
        v = split_heads(qkv.chunk(3, dim=-1)[2], num_heads)
        return q.clone().transpose(1, 2), k.clone().transpose(1, 2), v

    return Ops(
        rms_norm=alone(TORCH_OPS.rms_norm),
        qk_norm_rope=qk_norm_rope,
        modulate=alone(TORCH_OPS.modulate),
        gated_residual=alone(TORCH_OPS.gated_residual),
        gated_residual_modulate=alone(TORCH_OPS.gated_residual_modulate),
        gated_residual_norm=alone(TORCH_OPS.gated_residual_norm),
        rms_silu=alone(TORCH_OPS.rms_silu),
    )
