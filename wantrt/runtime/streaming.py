"""Streamed stacks: weights in pinned host memory, two slots on the device, one stack ahead.

While a stack computes, the weights of the next one are copied into the other slot on the device's
side stream. A stack is a few gigabytes and computes for longer than it is copied at the lengths
that need streaming, so the copies hide. The order is kept by events, and which slot holds which
stack changes from step to step: work on streamed sessions is never captured.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import Tensor

from wantrt.device import ALIGNMENT_BYTES, Device
from wantrt.models.components import Component
from wantrt.runtime.binding import weights_of_instances
from wantrt.runtime.loading import Files, Loader
from wantrt.session import Range, Session, Tensors, TensorSpec


def stream_sessions(
    component: Component, files: Files, load: Loader, weights: Tensors, device: Device
) -> "list[StreamedSession]":
    """One session for each instance; those of `load` are two, one bound to each slot.

    weights: on the host; they are copied into pinned memory.
    """
    ring = Ring(weights_of_instances(component, weights), device)
    in_slots = replace(
        component,
        instances=[
            {name: f"slot {slot}: {name}" for name in tensors}
            for slot, tensors in enumerate(ring.slots)
        ],
    )
    bound = {
        f"slot {slot}: {name}": tensor
        for slot, tensors in enumerate(ring.slots)
        for name, tensor in tensors.items()
    }
    sessions = load(in_slots, files, bound, device)
    return [StreamedSession(sessions, ring, index) for index in range(len(component.instances))]


class Ring:
    """The weights of stacks that run in turn, over and over, in two slots on the device.

    slots: the tensors of each by name. One slot if there is one stack.
    """

    def __init__(self, stacks: Sequence[Tensors], device: Device) -> None:
        self.device = device
        layout = Layout.of(stacks[0])
        count = min(2, len(stacks))
        self._host = [layout.pack(stack, device) for stack in stacks]
        self._blocks = [device.empty((layout.nbytes,), torch.uint8) for _ in range(count)]
        self.slots = [layout.tensors(block) for block in self._blocks]
        self._holds: list[int | None] = [None] * count  # which stack
        self._filled = [device.event() for _ in range(count)]
        self._unused = [device.event() for _ in range(count)]

    def acquire(self, index: int) -> int:
        """The slot with stack `index`: work that follows on the stream finds its weights there.

        Call it before each piece of that work, as often as you like: the next stack is copied into
        the other slot as soon as what was given to the stream before this call is done.
        """
        if index not in self._holds:
            self._copy(index, slot=0)
        slot = self._holds.index(index)
        self._filled[slot].wait()
        following = (index + 1) % len(self._host)
        if following not in self._holds:
            self._copy(following, slot=1 - slot)
        return slot

    def _copy(self, index: int, slot: int) -> None:
        self._unused[slot].record()  # by all work up to here
        with self.device.side_stream():
            self._unused[slot].wait()
            self._blocks[slot].copy_(self._host[index], non_blocking=True)
            self._filled[slot].record()
        self._holds[slot] = index


class StreamedSession:
    """See `wantrt.session.Session`. Its weights are on the device when it runs."""

    def __init__(self, in_slots: Sequence[Session], ring: Ring, index: int) -> None:
        self._in_slots, self._ring, self._index = in_slots, ring, index

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._in_slots[0].inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._in_slots[0].outputs

    @property
    def serves(self) -> Sequence[Mapping[str, Range]]:
        return self._in_slots[0].serves

    def prepare(self, symbols: Mapping[str, int]) -> None:
        for session in self._in_slots:
            session.prepare(symbols)

    def bind(self, name: str, tensor: Tensor) -> None:
        """For inputs that all stacks share; the weights are the ring's."""
        for session in self._in_slots:
            session.bind(name, tensor)

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]:
        return self._in_slots[self._ring.acquire(self._index)].run(inputs, outputs)


@dataclass(frozen=True)
class Layout:
    """Where the tensors of a stack lie in one block of bytes, so that a stack is one copy."""

    offsets: Mapping[str, int]
    specs: Mapping[str, tuple[torch.dtype, torch.Size]]
    nbytes: int

    @classmethod
    def of(cls, stack: Tensors) -> "Layout":
        offsets, end = {}, 0
        for name, tensor in stack.items():
            offsets[name] = end
            end += tensor.nbytes + -tensor.nbytes % ALIGNMENT_BYTES
        return cls(offsets, {name: (t.dtype, t.shape) for name, t in stack.items()}, end)

    def tensors(self, block: Tensor) -> dict[str, Tensor]:
        """Views of a block, uint8 [nbytes]."""
        views = {}
        for name, (dtype, shape) in self.specs.items():
            nbytes = prod(shape) * dtype.itemsize
            views[name] = block.narrow(0, self.offsets[name], nbytes).view(dtype).view(shape)
        return views

    def pack(self, stack: Tensors, device: Device) -> Tensor:
        """A stack in pinned memory of its own."""
        block = device.pinned((self.nbytes,), torch.uint8)
        for name, own in self.tensors(block).items():
            own.copy_(stack[name])
        return block
