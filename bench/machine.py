"""The card of a machine: processor, GPU, clocks, power, driver, versions, commit."""

import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wantrt.bench.gpu import busy_state
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

PACKAGES = (
    *("torch", "onnxruntime", "onnxruntime-gpu", "onnx", "diffusers", "transformers", "triton"),
    *("tensorrt", "tensorrt-rtx-cu13"),
)


def machine() -> dict[str, Any]:
    """Processor, memory, GPU and versions of what takes part in a measurement.

    load: the average of running processes over the last minute, this one included: above
    `threads`, others took part of the processor.
    """
    card: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 1),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {},
    }
    for package in PACKAGES:
        try:
            card["versions"][package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        card["gpu"] = torch.cuda.get_device_name()
        card["gpu_memory_gib"] = round(torch.cuda.mem_get_info()[1] / 2**30, 1)
        card["gpu_state"] = busy_state()  # clocks of an idle GPU say nothing
    return card


def cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None where git cannot say."""
    git = ["git", "-C", str(Path(__file__).resolve().parent)]
    try:
        told = [
            subprocess.run([*git, *asked], capture_output=True, text=True, check=True).stdout
            for asked in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0].strip() + ("+" if told[1].strip() else "")
