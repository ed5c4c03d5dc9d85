"""The runtimes: what each needs, and the loader that turns a component into sessions.

A new runtime is a loader and an entry in `RUNTIMES`. Heavy imports sit inside the functions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from wantrt.errors import RuntimeUnavailableError, UnsupportedTaskError
from wantrt.names import check_name

if TYPE_CHECKING:
    from torch import Tensor

    from wantrt.device import Device
    from wantrt.manifest import PlanRecord
    from wantrt.models.components import Component
    from wantrt.session import Session

Loader = Callable[["Component", "Files", "Mapping[str, Tensor]", "Device"], "Sequence[Session]"]


@dataclass(frozen=True)
class Files:
    """What a component runs from: its graph, and the plans of one runtime, each with its path."""

    graph: Path
    plans: "tuple[tuple[PlanRecord, Path], ...]" = ()


@dataclass(frozen=True)
class Runtime:
    """How components run.

    `missing` says what keeps this machine from using it, None if nothing does. `precisions` in
    order of preference. `load` gives one session for each instance of a component.
    """

    name: str
    precisions: tuple[str, ...]
    missing: Callable[[], str | None]
    on_gpu: Callable[[], bool]
    make_device: Callable[[], "Device"]
    load: Loader


def choose_runtime(requested: str | None, precisions: Iterable[str]) -> Runtime:
    """The runtime asked for, or the best of this machine that serves all `precisions` of a bundle.

    Raises SettingsError for an unknown name, RuntimeUnavailableError with the remedy.
    """
    needed = set(precisions)
    if requested is not None and requested != "auto":
        check_name("runtime", requested, (*RUNTIMES, *COMING))
        if requested in COMING:
            raise UnsupportedTaskError(
                f"runtime {requested} is not there yet; today: {', '.join(RUNTIMES)}"
            )
        runtime = RUNTIMES[requested]
        if missing := runtime.missing():
            raise RuntimeUnavailableError(f"runtime {requested} cannot run here: {missing}")
        if unserved := needed - set(runtime.precisions):
            raise RuntimeUnavailableError(
                f"runtime {requested} does not run {', '.join(sorted(unserved))}. "
                f"Build for it: wantrt build --runtime {requested}"
            )
        return runtime
    usable = [
        runtime
        for runtime in RUNTIMES.values()
        if runtime.missing() is None and needed <= set(runtime.precisions)
    ]
    if usable:
        return max(usable, key=lambda runtime: runtime.on_gpu())  # the first of equals
    raise RuntimeUnavailableError(
        f"no runtime of this machine serves {', '.join(sorted(needed))}: "
        + "; ".join(f"{r.name}: {r.missing() or 'other precision'}" for r in RUNTIMES.values())
    )


def _missing_onnxruntime() -> str | None:
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'wantrt[cpu]'"
    return None


def _make_cpu() -> "Device":
    from wantrt.device import CPUDevice

    return CPUDevice()


def _make_cuda_or_cpu() -> "Device":
    from wantrt.device import CPUDevice, CUDADevice

    return CUDADevice() if _has_cuda() else CPUDevice()


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _load_onnxruntime(
    component: "Component",
    files: Files,
    weights: "Mapping[str, Tensor]",
    device: "Device",
) -> "Sequence[Session]":
    from wantrt.runtime.onnxruntime_session import load_sessions

    return load_sessions(component, files.graph, weights, device)


def _load_torch(
    component: "Component",
    files: Files,
    weights: "Mapping[str, Tensor]",
    device: "Device",
) -> "Sequence[Session]":
    from wantrt.runtime.torch_session import load_sessions

    return load_sessions(component, files.graph, weights, device)


RUNTIMES = {  # best first
    runtime.name: runtime
    for runtime in (
        Runtime(
            name="onnxruntime",
            precisions=("fp32",),
            missing=_missing_onnxruntime,
            on_gpu=lambda: False,
            make_device=_make_cpu,
            load=_load_onnxruntime,
        ),
        Runtime(
            name="torch",
            precisions=("bf16", "fp32", "fp16"),
            missing=lambda: None,
            on_gpu=_has_cuda,
            make_device=_make_cuda_or_cpu,
            load=_load_torch,
        ),
    )
}
COMING = ("tensorrt", "tensorrt-rtx")
