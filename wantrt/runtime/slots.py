"""Slots: experts have the device's memory in turn, and the next one's weights arrive in time.

Under `phase` the experts of a model share slots on the device: one for each instance of a component
(wantrt/models/components.py), as large as the largest of them needs it. While the device works at
an expert's steps, the host packs the next one's weights into pinned memory. In the expert's last
step a slot is overwritten, by the side stream, as soon as its work is done; the next expert's first
step waits, slot by slot, for its own weights alone. So a copy hides behind the rest of one step and
the beginning of the next, and the memory is that of one expert.

That last step runs ordinarily: between the stacks of a replayed graph nothing can be told. Weights
that nobody sent ahead (the first expert's) are copied at their first use.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import ceil

import torch
from torch import Tensor

from wantrt.device import Device
from wantrt.models.components import Component
from wantrt.pieces import available_memory
from wantrt.runtime.binding import weights_of_instances
from wantrt.runtime.loading import Files, Loader
from wantrt.runtime.streaming import Layout
from wantrt.session import Range, Session, Tensors, TensorSpec

log = logging.getLogger("wantrt")

Key = tuple[str, int]  # component, instance
BEFORE_STEPS = ("dit_time", "dit_condition")  # run once; their slots are free in the steps


def slot_sizes(experts: Iterable[Iterable[Component]]) -> dict[Key, int]:
    """The bytes of every slot that the experts, given by their components, need together."""
    sizes: dict[Key, int] = {}
    for component in (component for components in experts for component in components):
        nbytes = Layout.of(dict(component.module.named_parameters())).nbytes
        for index in range(len(component.instances)):
            key = component.name, index
            sizes[key] = max(nbytes, sizes.get(key, 0))
    return sizes


class Slots:
    """The device memory of all slots, there from the first use on until `free`."""

    def __init__(self, sizes: Mapping[Key, int], device: Device) -> None:
        self.sizes, self.device = sizes, device
        self._blocks: dict[Key, Tensor] = {}

    def load(
        self, component: Component, files: Files, load: Loader, weights: Tensors
    ) -> "list[SlotSession]":
        """One session for each instance, bound to its slot; weights wait on the host (mapped)."""
        stacks = [
            Weights(self._block((component.name, index)), own, self.device)
            for index, own in enumerate(weights_of_instances(component, weights))
        ]
        names = [{name: f"{index}: {name}" for name in s.there} for index, s in enumerate(stacks)]
        bound = {
            names[index][name]: tensor
            for index, stack in enumerate(stacks)
            for name, tensor in stack.there.items()
        }
        sessions = load(replace(component, instances=names), files, bound, self.device)
        return [SlotSession(*pair) for pair in zip(sessions, stacks, strict=True)]

    def free(self) -> None:
        self._blocks.clear()

    def _block(self, key: Key) -> Tensor:
        if key not in self._blocks:
            self._blocks[key] = self.device.empty((self.sizes[key],), torch.uint8)
        return self._blocks[key]


class Weights:
    """The weights of one session: where they come from, and their slot. there: views by name."""

    def __init__(self, slot: Tensor, weights: Tensors, device: Device) -> None:
        layout = Layout.of(weights)
        self.device, self.nbytes = device, layout.nbytes
        self.there = layout.tensors(slot)
        self._slot, self._layout, self._mapped = slot, layout, weights
        self._packed: Tensor | None = None  # in pinned memory
        self._unused, self._copied = device.event(), device.event()
        self._sent = self._arrived = False

    def pack(self) -> None:
        """Into pinned memory, from where the device copies by itself."""
        if self._packed is None:
            self._packed = self._layout.pack(self._mapped, self.device)

    def send(self) -> None:
        """Copy them, on the side stream, after what was given to the stream up to here."""
        self._unused.record()
        with self.device.side_stream():
            self._unused.wait()
            self._copy()
            self._copied.record()
        self._sent = True

    def arrive(self) -> None:
        """What follows on the stream finds them in the slot."""
        if self._arrived:
            return
        if self._sent:
            self._copied.wait()
        else:
            self._copy()
        self._arrived = True

    def _copy(self) -> None:
        if self._packed is not None:
            self._slot[: self.nbytes].copy_(self._packed, non_blocking=True)
            return
        for name, tensor in self.there.items():  # the host takes part, and waits
            tensor.copy_(self._mapped[name])


class SlotSession:
    """See `wantrt.session.Session`. Its weights are in their slot when it runs."""

    def __init__(self, session: Session, weights: Weights) -> None:
        self._session, self.weights = session, weights

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._session.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._session.outputs

    @property
    def serves(self) -> Sequence[Mapping[str, Range]]:
        return self._session.serves

    def prepare(self, symbols: Mapping[str, int]) -> None:
        self._session.prepare(symbols)

    def bind(self, name: str, tensor: Tensor) -> None:
        """For inputs; the weights are the slot's."""
        self._session.bind(name, tensor)

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]:
        self.weights.arrive()
        return self._session.run(inputs, outputs)


class Handover:
    """From the expert that runs to the next one: what it does not need any more is overwritten."""

    def __init__(self, running: Iterable[Key], following: Mapping[Key, Weights]) -> None:
        """Both by slot. Pinned memory that cannot be had is said once; then copies are slower."""
        self._running = {key for key in running if key[0] not in BEFORE_STEPS}
        self._following = dict(following)
        self._unpacked = list(following)
        needed, available = sum(w.nbytes for w in following.values()), available_memory()
        if needed > available:
            self._give_up(
                f"it takes {needed / 2**30:.1f} GiB, and {available / 2**30:.1f} are available"
            )

    def prepare(self, steps_left: int) -> None:
        """Pack a share, while the device computes a step: all in as many calls as are left."""
        for key in self._unpacked[: ceil(len(self._unpacked) / steps_left)]:
            self._pack(key)
            if key not in self._running:
                self._send(key)

    def done(self, component: str, instance: int) -> None:
        """The running expert has used a slot for the last time."""
        self._running.discard((component, instance))
        for key in [key for key in self._following if key not in self._running]:
            self._send(key)

    def _send(self, key: Key) -> None:
        self._pack(key)
        self._following.pop(key).send()

    def _pack(self, key: Key) -> None:
        if key not in self._unpacked:
            return
        self._unpacked.remove(key)
        try:
            self._following[key].pack()
        except RuntimeError as error:  # what torch says of pinned memory that is refused
            self._give_up(str(error).splitlines()[0])

    def _give_up(self, reason: str) -> None:
        self._unpacked.clear()
        log.warning(
            "no pinned memory for the weights of the next expert: %s. They are copied from "
            "ordinary memory, and the change of experts takes longer",
            reason,
        )
