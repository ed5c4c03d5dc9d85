"""The runtimes: what each needs, and the loader that turns a component into sessions.

A new runtime is a loader and an entry in `RUNTIMES`. Heavy imports sit inside the functions.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from wantrt.errors import RuntimeUnavailableError
from wantrt.names import check_name

if TYPE_CHECKING:
    from torch import Tensor

    from wantrt.bundle import Bundle
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
    order of preference. `load` gives one session for each instance of a component. `compiled`: it
    runs plans, so it serves a bundle that has some for it.
    """

    name: str
    precisions: tuple[str, ...]
    missing: Callable[[], str | None]
    on_gpu: Callable[[], bool]
    make_device: Callable[[], "Device"]
    load: Loader
    compiled: bool = False


def choose_runtime(
    requested: str | None, precisions: Iterable[str], plans: Collection[str] | None = None
) -> Runtime:
    """The runtime asked for, or the best of this machine that serves a bundle.

    precisions: of the bundle's parts. plans: the runtimes it has plans for; None: no bundle is
    spoken of. Raises SettingsError for an unknown name, RuntimeUnavailableError with the remedy.
    """
    needed = set(precisions)
    if requested is not None and requested != "auto":
        check_name("runtime", requested, RUNTIMES)
        runtime = RUNTIMES[requested]
        if missing := runtime.missing():
            raise RuntimeUnavailableError(f"runtime {requested} cannot run here: {missing}")
        if unserved := _unserved(runtime, needed, plans):
            raise RuntimeUnavailableError(f"runtime {requested} {unserved}")
        return runtime
    usable = [
        runtime
        for runtime in RUNTIMES.values()
        if runtime.missing() is None and not _unserved(runtime, needed, plans)
    ]
    if usable:
        return max(usable, key=lambda runtime: runtime.on_gpu())  # the first of equals
    raise RuntimeUnavailableError(
        f"no runtime of this machine serves {', '.join(sorted(needed))}: "
        + "; ".join(
            f"{r.name}: {r.missing() or 'other precision, or no plans'}" for r in RUNTIMES.values()
        )
    )


def choose_for(bundle: "Bundle", requested: str | None) -> Runtime:
    """`choose_runtime` for a bundle."""
    plans = {plan.runtime for c in bundle.manifest.components for plan in c.plans}
    try:
        return choose_runtime(requested, bundle.precision.values(), plans)
    except RuntimeUnavailableError as error:
        raise RuntimeUnavailableError(
            f"{error}\nThe bundle is {bundle.path}"
            + (f", with plans for {', '.join(sorted(plans))}." if plans else ", without plans.")
        ) from None


def _unserved(runtime: Runtime, precisions: set[str], plans: Collection[str] | None) -> str | None:
    """What keeps a runtime from serving a bundle, None if nothing does."""
    if runtime.compiled:
        if plans is None or runtime.name in plans:
            return None
        return (
            "runs plans, and the bundle has none for it. Make them in place: "
            f"wantrt build --runtime {runtime.name} --out BUNDLE, with the --variant or "
            "--checkpoint that the bundle was built with."
        )
    if other := precisions - set(runtime.precisions):
        return (
            f"does not run {', '.join(sorted(other))}. "
            f"Build for it: wantrt build --runtime {runtime.name}"
        )
    return None


def _missing_onnxruntime() -> str | None:
    if find_spec("onnxruntime") is None:
        return "onnxruntime is not installed: pip install 'wantrt[cpu]'"
    return None


def _missing_tensorrt(name: str) -> str | None:
    from wantrt.engines.flavours import why_missing

    if missing := why_missing(name):
        return missing
    if not _has_cuda():
        return (
            "no GPU: torch finds none (or is a CPU build). "
            "Plans run on a GPU; on the CPU take --runtime onnxruntime or torch"
        )
    return None


def _make_cpu() -> "Device":
    from wantrt.device import CPUDevice

    return CPUDevice()


def _make_cuda() -> "Device":
    from wantrt.device import CUDADevice

    return CUDADevice()


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


def _load_tensorrt(
    name: str,
    component: "Component",
    files: Files,
    weights: "Mapping[str, Tensor]",
    device: "Device",
) -> "Sequence[Session]":
    from wantrt.engines.flavours import find_flavour
    from wantrt.engines.session import load_sessions

    return load_sessions(component, files.plans, weights, device, find_flavour(name))


def _tensorrt(name: str) -> Runtime:
    return Runtime(
        name=name,
        precisions=("bf16", "fp16"),
        missing=partial(_missing_tensorrt, name),
        on_gpu=lambda: True,
        make_device=_make_cuda,
        load=partial(_load_tensorrt, name),
        compiled=True,
    )


RUNTIMES = {  # best first
    runtime.name: runtime
    for runtime in (
        _tensorrt("tensorrt"),
        _tensorrt("tensorrt-rtx"),
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
