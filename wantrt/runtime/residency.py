"""Residency: what of a bundle is in the device's memory, and when.

`resident`: everything, from loading on. `phase`: the text encoder, then each expert when its steps
come, then the VAE; each is loaded when needed and freed after. `stream`: as `phase`, and the stacks
of the text encoder and of the transformer keep their weights in pinned host memory
(wantrt/runtime/streaming.py); denoising is then not captured.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

from wantrt.device import Device
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
        copies = self.device.event()
        with self.device.side_stream():
            copies.record()
        with self.device.stream():
            copies.wait()
        self.device.synchronize()
        self._sessions = None
        self.device.release()

    def __getitem__(self, component: str) -> Sequence[Session]:
        return self.load()[component]

    def __iter__(self) -> Iterator[str]:
        return iter(self.load())

    def __len__(self) -> int:
        return len(self.load())
