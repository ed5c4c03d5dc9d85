"""What every measurement says beside its numbers: the machine, the versions, the command, the date.

A result is one JSON file in bench/results/, so that a number in the docs can be traced to its run.
"""

import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

import torch

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = (
    *("torch", "onnxruntime", "onnx", "diffusers", "transformers", "triton", "tensorrt"),
    "tensorrt-rtx-cu13",
)


def machine() -> dict[str, Any]:
    """Processor, memory, GPU and versions of what takes part in a measurement."""
    card: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
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
    return card


def cpu_name() -> str:
    with open("/proc/cpuinfo") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def write_result(name: str, measured: dict[str, Any]) -> Path:
    """Write bench/results/`name`.json: what was measured, where, when and by which command."""
    return _write(_describe(name, measured))


def publish(name: str, measured: dict[str, Any]) -> None:
    """`write_result`, whose path goes to stderr, and the same object last on stdout, in one line.

    Not a number is null in it: JSON has no NaN.
    """
    result = _describe(name, _finite(measured))
    print(_write(result), file=sys.stderr)
    print(json.dumps(result), flush=True)


def _describe(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        **measured,
    }


def _write(result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['name']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def commit() -> str | None:
    """The checkout's commit, with "+" where files differ from it; None where git cannot say."""
    git = ["git", "-C", str(RESULTS.parent)]
    try:
        told = [
            subprocess.run([*git, *asked], capture_output=True, text=True, check=True).stdout
            for asked in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain", "-uno"])
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    return told[0].strip() + ("+" if told[1].strip() else "")


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else sys.argv[0]


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
