"""What there is: this machine, its runtimes, and what a bundle holds and needs. Imports no torch,
except for the memory of a bundle.
"""

import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from math import prod
from pathlib import Path

from wantrt.bundle import Bundle
from wantrt.config import GUIDANCE_BATCH_TOKENS, TASKS, Expert, Size, Variant
from wantrt.runtime.loading import COMING, RUNTIMES

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
    """`status`: "works", what is missing, or "not yet"."""

    name: str
    version: str | None
    precisions: tuple[str, ...]
    status: str


@dataclass(frozen=True, kw_only=True)
class SizeInfo:
    """One size: what the transformer sees and what a run needs beside the weights, in bytes.

    Activations are estimates for both guidance passes in a batch.
    """

    size: Size
    num_frames: int
    tokens: int
    denoise_bytes: int
    decode_bytes: int


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
    """Those that work today and those that are coming."""
    today = [
        RuntimeInfo(
            name=runtime.name,
            version=_version(runtime.name),
            precisions=runtime.precisions,
            status=runtime.missing() or WORKS,
        )
        for runtime in RUNTIMES.values()
    ]
    coming = [
        RuntimeInfo(name=name, version=_version(name), precisions=(), status=NOT_YET)
        for name in COMING
    ]
    return today + coming


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
    """`precision`: part -> fp32, bf16 or fp16."""
    return [describe_size(variant, precision, size, variant.num_frames) for size in variant.sizes]


def describe_size(
    variant: Variant, precision: Mapping[str, str], size: Size, num_frames: int
) -> SizeInfo:
    width, height = (side // variant.size_step for side in size)
    latent_frames = (num_frames - 1) // variant.vae.temporal_stride + 1
    tokens = latent_frames * width * height
    passes = 2 if tokens <= GUIDANCE_BATCH_TOKENS else 1
    widest = max(_bytes_per_token(e, ELEMENT_BYTES[precision[e.name]]) for e in variant.experts)
    return SizeInfo(
        size=size,
        num_frames=num_frames,
        tokens=tokens,
        denoise_bytes=passes * tokens * widest,
        decode_bytes=_decode_bytes(variant, size, ELEMENT_BYTES[precision["vae"]]),
    )


ELEMENT_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


def _bytes_per_token(expert: Expert, element: int) -> int:
    """The widest moment of a DiT block: the residual twice in float32, and beside it either
    q, k, v, their rotated copies and the output of attention, or the feed-forward before and after
    its activation.
    """
    attention, feed_forward = 6 * expert.dit.dim, expert.dit.dim + 2 * expert.dit.ffn_dim
    return 2 * 4 * expert.dit.dim + element * max(attention, feed_forward)


def _decode_bytes(variant: Variant, size: Size, element: int) -> int:
    """Two banks of caches, and four feature maps of a chunk at full resolution."""
    import torch

    from wantrt.models.components import vae_components

    components = vae_components(variant.vae, torch.float32)
    (decoder,) = (c for c in components if c.name == "vae_decoder_next")
    width, height = (side // variant.vae.spatial_stride for side in size)
    banks = (
        2
        * element
        * sum(
            prod(spec.concrete({"h": height, "w": width}))
            for name, spec in decoder.inputs.items()
            if name.startswith("cache")
        )
    )
    frame = size[0] * size[1] * variant.vae.decoder_dim * element
    return banks + 4 * (variant.vae.temporal_stride + 2) * frame


def describe_bundle(bundle: Bundle) -> dict[str, object]:
    """What `wantrt info BUNDLE` says, as plain data."""
    files = bundle.manifest.files
    return {
        "path": str(bundle.path),
        "variant": bundle.variant.name,
        "task": bundle.variant.task,
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
        "sizes": [asdict(size) for size in describe_sizes(bundle.variant, bundle.precision)],
    }
