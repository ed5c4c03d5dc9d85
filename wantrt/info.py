"""What there is: this machine, its runtimes, and what a bundle holds and needs."""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from wantrt.bundle import Bundle
from wantrt.config import TASKS, Size, Variant
from wantrt.runtime.loading import RUNTIMES
from wantrt.tasks.source import usage

if TYPE_CHECKING:
    from wantrt.runtime.memory import Memory

WORKS, NOT_YET = "works", "not yet"

PACKAGES = {  # runtime -> what provides it
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "torch": ("torch",),
    "tensorrt": ("tensorrt-cu13", "tensorrt"),
    "tensorrt-rtx": ("tensorrt-rtx-cu13",),
}


@dataclass(frozen=True, kw_only=True)
class Machine:
    platform: str
    python: str
    cpu: str
    threads: int
    memory_bytes: int
    gpus: tuple[str, ...]  # name, memory, driver


@dataclass(frozen=True, kw_only=True)
class RuntimeInfo:
    """`status`: "works", or what is missing."""

    name: str
    version: str | None
    precisions: tuple[str, ...]
    status: str


@dataclass(frozen=True, kw_only=True)
class SizeInfo:
    """One size: what the transformer sees, and the device memory that a guided generation takes.

    runtimes: those whose plans serve it; empty where none is needed. memory: residency -> bytes.
    """

    size: Size
    num_frames: int
    tokens: int
    runtimes: tuple[str, ...]
    memory: "dict[str, Memory]"


def describe_machine() -> Machine:
    return Machine(
        platform=f"{platform.system()} {platform.machine()}",
        python=platform.python_version(),
        cpu=_cpu_name(),
        threads=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        gpus=_gpus(),
    )


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> tuple[str, ...]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ()
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ()
    return tuple(line.strip() for line in answer.stdout.splitlines() if line.strip())


def describe_runtimes() -> list[RuntimeInfo]:
    return [
        RuntimeInfo(
            name=runtime.name,
            version=_version(runtime.name),
            precisions=runtime.precisions,
            status=runtime.missing() or WORKS,
        )
        for runtime in RUNTIMES.values()
    ]


def _version(runtime: str) -> str | None:
    for package in PACKAGES[runtime]:
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return None


def variant_status(variant: Variant) -> str:
    """What works today."""
    return WORKS if variant.task in TASKS else NOT_YET


def describe_sizes(variant: Variant, precision: Mapping[str, str]) -> list[SizeInfo]:
    """The variant's own sizes. `precision`: part -> fp32, bf16 or fp16."""
    return [describe_size(variant, precision, size, variant.num_frames) for size in variant.sizes]


def describe_size(
    variant: Variant,
    precision: Mapping[str, str],
    size: Size,
    num_frames: int,
    stacks: Mapping[str, int | None] | None = None,
    runtimes: tuple[str, ...] = (),
) -> SizeInfo:
    from wantrt.runtime.memory import phases, predict
    from wantrt.runtime.residency import POLICIES
    from wantrt.runtime.sizes import dit_symbols

    of_phases = phases(variant, precision, size, num_frames, stacks)
    return SizeInfo(
        size=size,
        num_frames=num_frames,
        tokens=dit_symbols(variant, size, num_frames, guided=True)["L"],
        runtimes=runtimes,
        memory={policy: predict(of_phases, policy) for policy in POLICIES},
    )


def describe_bundle_sizes(bundle: Bundle) -> list[SizeInfo]:
    """The sizes that the bundle's plans serve, in their order, then the variant's others."""
    from wantrt.runtime.sizes import served_sizes

    variant = bundle.variant
    videos: dict[tuple[Size, int], list[str]] = {}
    for runtime in RUNTIMES.values():
        for served in served_sizes(bundle, runtime.name) if runtime.compiled else ():
            for end in dict.fromkeys((served.smallest, served.largest)):
                videos.setdefault(end, []).append(runtime.name)
    for size in variant.sizes:
        videos.setdefault((size, variant.num_frames), [])
    stacks = {part: bundle.stack_of(part) for part in bundle.precision}
    return [
        describe_size(variant, bundle.precision, *video, stacks, tuple(dict.fromkeys(names)))
        for video, names in videos.items()
    ]


def describe_bundle(bundle: Bundle) -> dict[str, object]:
    """What `wantrt info BUNDLE` says, as plain data."""
    files = bundle.manifest.files
    return {
        "path": str(bundle.path),
        "variant": bundle.variant.name,
        "task": bundle.variant.task,
        "starts_from": usage(bundle.variant.task),
        "experts": {
            expert.name: {
                "sigmas": sigmas,
                "guidance_scale": expert.guidance_scale,
                "dim": expert.dit.dim,
                "num_layers": expert.dit.num_layers,
            }
            for expert, sigmas in zip(
                bundle.variant.experts, bundle.variant.sigma_ranges, strict=True
            )
        },
        "checkpoint": asdict(bundle.manifest.checkpoint),
        "fingerprint": bundle.fingerprint,
        "settings": bundle.settings,
        "parts": {
            name: {
                "precision": part.precision,
                "files": len(part.weights),
                "bytes": sum(files[file].size for file in part.weights),
            }
            for name, part in bundle.manifest.parts.items()
        },
        "components": {
            Path(c.graph).stem: {
                "parts": c.parts,
                "layers_a_run": c.stack,
                "graph": c.graph,
                "bytes": files[c.graph].size if c.graph else 0,
            }
            for c in bundle.manifest.components
        },
        "bytes": sum(record.size for record in files.values()),
        "tools": bundle.manifest.tools,
        "sizes": [plain_size(size) for size in describe_bundle_sizes(bundle)],
    }


def plain_size(size: SizeInfo) -> dict[str, object]:
    plain = asdict(size)
    for policy, memory in size.memory.items():
        plain["memory"][policy]["total_bytes"] = memory.total_bytes
    return plain
