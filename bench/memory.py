"""Memory that a process takes, at its peak: of the host, and of a GPU.

`Peaks` reads counters that the kernel, torch and the driver keep anyway; `PeakMemory` samples.
"""

from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Self

import torch

from wantrt.bench.nvml import NVML
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


class Peaks:
    """Peak memory from now on, without a thread that disturbs what is measured.

    peak_rss_bytes: resident pages, those of mapped files (weights, libraries) among them.
    peak_allocated_bytes, peak_reserved_bytes: torch's allocator on a GPU. peak_gpu_bytes: all that
    the process holds there, TensorRT's memory too, as NVML says; NVML keeps no peak, so it is the
    most that was seen at any `look`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.nvml = device, NVML.find(device)
        self._seen: dict[str, int] = {}
        self.reset()

    def reset(self) -> None:
        with suppress(OSError):  # then the peak is that of the whole process
            Path("/proc/self/clear_refs").write_text("5")
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._seen = {}

    def look(self) -> None:
        """See what is held now. Where NVML hides processes, it is all that is taken on the GPU."""
        if self.nvml is None:
            return
        own = self.nvml.process_bytes()
        key = "peak_gpu_device_bytes" if own is None else "peak_gpu_bytes"
        self._seen[key] = max(self._seen.get(key, 0), own or self.nvml.device_bytes())

    def row(self) -> dict[str, int]:
        self.look()
        found = {"peak_rss_bytes": status_bytes("VmHWM"), **self._seen}
        if self.device.type == "cuda":
            found["peak_allocated_bytes"] = torch.cuda.max_memory_allocated(self.device)
            found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved(self.device)
        return found


def anonymous_bytes(process: int | str = "self") -> int:
    return status_bytes("RssAnon", process)


def status_bytes(key: str, process: int | str = "self") -> int:
    """A size in /proc/PID/status: VmRSS, VmHWM (its peak), RssAnon."""
    with open(f"/proc/{process}/status") as lines:
        for line in lines:
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/{process}/status has no {key}: this measurement needs Linux")
