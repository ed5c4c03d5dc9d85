"""Memory of the host that a process takes, at its peak."""

from threading import Event, Thread
from types import TracebackType
from typing import Self

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)


class PeakMemory:
    """Watches this process's anonymous memory: what it allocated, without mapped files.

        with PeakMemory() as memory:
            ...
        memory.peak_gib

    Sampled from /proc/self/status (RssAnon) every 5 ms; Linux.
    """

    def __init__(self) -> None:
        self.start_bytes = self.peak_bytes = anonymous_bytes()
        self._done = Event()
        self._thread = Thread(target=self._watch, daemon=True)

    @property
    def peak_gib(self) -> float:
        return round(self.peak_bytes / 2**30, 3)

    def _watch(self) -> None:
        while not self._done.wait(0.005):
            self.peak_bytes = max(self.peak_bytes, anonymous_bytes())

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._done.set()
        self._thread.join()
        self.peak_bytes = max(self.peak_bytes, anonymous_bytes())


def anonymous_bytes(process: int | str = "self") -> int:
    with open(f"/proc/{process}/status") as lines:
        for line in lines:
            if line.startswith("RssAnon"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no RssAnon: this measurement needs Linux")
