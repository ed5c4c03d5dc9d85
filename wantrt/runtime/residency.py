"""Residency: what of a bundle is in the device's memory, and when.

`resident`: everything, from loading on. `phase`: the text encoder, then the expert whose steps
come, then the VAE; each is loaded when needed and freed after. On a GPU experts follow each other
in the same memory: the next one's weights are packed into pinned host memory while the first runs,
and copied in its last step behind the stacks that are done (wantrt/runtime/slots.py). Experts whose
weights are inside their plans, which cannot be copied, are loaded and freed one by one. `stream`:
as `phase`, and the stacks of the text encoder and of the transformer keep their weights in pinned
host memory (wantrt/runtime/streaming.py), where those of the next expert come when the last one has
left; denoising is then not captured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from wantrt.device import Device
from wantrt.runtime.slots import Handover, Key, Slots, SlotSession, Weights
from wantrt.session import Session

POLICIES = ("resident", "phase", "stream")

Sessions = Mapping[str, Sequence[Session]]


class Part(Mapping[str, Sequence[Session]]):
    """The sessions of a part by component, loaded when one is asked for first."""

    def __init__(self, load: Callable[[], Sessions], device: Device, *, resident: bool) -> None:
        self._load, self.device, self.resident = load, device, resident
        self._sessions: Sessions | None = None

    def load(self) -> Sessions:
        if self._sessions is None:
            with self.device.stream():
                self._sessions = self._load()
        return self._sessions

    def leave(self) -> None:
        """The phase is over: free the sessions, unless they are resident."""
        if not self.resident:
            self.free()

    def free(self) -> None:
        """Drop the sessions and their weights. Nothing that was captured may run them again."""
        if self._sessions is None:
            return
        _finish_copies(self.device)
        self._sessions = None
        self.device.release()

    def hand_over_to(self, following: "Part") -> Handover | None:
        """Let another part take the place of this one, step by step; None: it is loaded after."""
        return None

    def __getitem__(self, component: str) -> Sequence[Session]:
        return self.load()[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self.load())

    def __len__(self) -> int:
        return len(self.load())


class Turns:
    """Experts that have the same slots in turn. They are freed together, when the last has left."""

    def __init__(self, sizes: Mapping[Key, int], device: Device) -> None:
        self.slots, self.device = Slots(sizes, device), device
        self.parts: list[ExpertPart] = []

    def free(self) -> None:
        if any(part.is_loaded for part in self.parts):
            _finish_copies(self.device)
            for part in self.parts:
                part.drop()
            self.slots.free()
            self.device.release()


class ExpertPart(Part):
    """An expert that takes turns with others."""

    def __init__(self, load: Callable[[], Sessions], turns: Turns) -> None:
        super().__init__(load, turns.device, resident=False)
        self._turns, self._has_left = turns, True
        turns.parts.append(self)

    @property
    def is_loaded(self) -> bool:
        return self._sessions is not None

    def load(self) -> Sessions:
        self._has_left = False
        return super().load()

    def leave(self) -> None:
        self._has_left = True
        if all(part._has_left for part in self._turns.parts):
            self._turns.free()

    def free(self) -> None:
        self._turns.free()

    def drop(self) -> None:
        self._sessions = None

    def hand_over_to(self, following: Part) -> Handover | None:
        if not isinstance(following, ExpertPart):
            return None
        return Handover(self._weights(), following._weights())

    def _weights(self) -> dict[Key, Weights]:
        return {
            (component, index): session.weights
            for component, sessions in self.load().items()
            for index, session in enumerate(sessions)
            if isinstance(session, SlotSession)
        }


def _finish_copies(device: Device) -> None:
    """Wait for both streams."""
    copies = device.event()
    with device.side_stream():
        copies.record()
    with device.stream():
        copies.wait()
    device.synchronize()
