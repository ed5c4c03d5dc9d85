"""Memory and energy of a GPU, as its driver counts them (NVML, by the package nvidia-ml-py)."""

import os
from typing import Any

import torch

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)


class NVML:
    """Counters of the GPU that torch uses."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def find(cls, device: torch.device) -> "NVML | None":
        """None on a CPU, without nvidia-ml-py, and where the driver refuses."""
        if device.type != "cuda":
            return None
        try:
            import pynvml
        except ImportError:
            return None
        uuid = torch.cuda.get_device_properties(device).uuid
        try:
            pynvml.nvmlInit()
            return cls(pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
        except pynvml.NVMLError:
            return None

    def process_bytes(self) -> int | None:
        """Memory that this process holds now; None where processes are hidden, as in containers."""
        try:
            running = self._library.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._library.NVMLError:
            return None
        own = [p.usedGpuMemory for p in running if p.pid == os.getpid() and p.usedGpuMemory]
        return sum(own) or None

    def device_bytes(self) -> int:
        """Memory that is taken on the device, by whomever."""
        return int(self._library.nvmlDeviceGetMemoryInfo(self._handle).used)

    def energy_j(self) -> float | None:
        """Joules since the driver was loaded; None for GPUs older than Volta."""
        try:
            return float(self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle)) / 1e3
        except self._library.NVMLError:
            return None
