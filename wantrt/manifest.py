"""What a bundle says about itself: the records of manifest.json.

Nothing in it depends on when, where or by whom it was built: the same build gives the same bytes.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from wantrt.config import Variant
from wantrt.errors import BundleError
from wantrt.records import from_plain, to_plain

SCHEMA = 1
PRECISIONS = ("fp32", "bf16", "fp16")
FLAVOURS = ("tensorrt", "tensorrt-rtx")
LARGEST_DIM, LARGEST = 2**20, {"num_layers": 1000}  # above, a number is a mistake or an attack
SYMBOL = re.compile(r"[A-Za-z]\w*")


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """`header_sha256` is that of a safetensors header, which loading can check without the rest."""

    size: int
    sha256: str
    header_sha256: str | None = None


@dataclass(frozen=True, kw_only=True)
class TensorRecord:
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True, kw_only=True)
class PartRecord:
    """A unit of weights: the text encoder, an expert, the VAE. `weights` are files, in order."""

    precision: str
    weights: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class PlanRecord:
    """A graph compiled by TensorRT, in `file`.

    symbols: the sizes it serves, symbol -> (smallest, typical, largest). part and instance: whose
    weights are inside it ("baked"); None: weights are inputs ("bound"), and it serves every
    instance and part of its component. plugins: our kernels are inside it.
    """

    file: str
    runtime: str  # tensorrt or tensorrt-rtx
    version: str  # of that library
    targets: tuple[str, ...]  # "sm89"; for tensorrt the name of the GPU
    symbols: dict[str, tuple[int, int, int]]
    tf32: bool = False  # whether what is float32 may be computed in TF32
    part: str | None = None
    instance: int | None = None
    plugins: bool = False


@dataclass(frozen=True, kw_only=True)
class ComponentRecord:
    """A unit of execution and the parts whose weights it runs with; `stack`: layers a run."""

    name: str
    parts: tuple[str, ...]
    inputs: dict[str, TensorRecord]
    outputs: dict[str, TensorRecord]
    graph: str
    stack: int | None = None
    plans: tuple[PlanRecord, ...] = ()


@dataclass(frozen=True, kw_only=True)
class CheckpointRecord:
    fingerprint: str
    layout: str


@dataclass(frozen=True, kw_only=True)
class Manifest:
    schema: int = SCHEMA
    variant: Variant
    checkpoint: CheckpointRecord
    settings: dict[str, Any]  # what the checkpoint records about sampling
    parts: dict[str, PartRecord]
    components: tuple[ComponentRecord, ...]
    files: dict[str, FileRecord]  # path inside the bundle, "/" between folders
    tokenizer: str | None = None
    tools: dict[str, str] = field(default_factory=dict)  # name -> version


def read_manifest(content: bytes, where: str) -> Manifest:
    """Raises BundleError for what is not a manifest, or one that this version cannot read."""
    try:
        plain = json.loads(content)
        schema = plain["schema"]
        if type(schema) is not int or schema < 1:
            raise ValueError(f"schema is {schema!r}")
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BundleError(f"{where} is not a manifest of wantrt ({error}). Build again.") from error
    if schema > SCHEMA:
        raise BundleError(
            f"{where} has schema {schema}, made by a newer wantrt; this one reads up to {SCHEMA}.\n"
            "Upgrade with: pip install --upgrade wantrt"
        )
    try:
        manifest = from_plain(Manifest, plain)
        _check_meaning(manifest)
    except ValueError as error:
        raise BundleError(f"{where}: {error}. Build again.") from error
    return manifest


def _check_meaning(manifest: Manifest) -> None:
    """Raises ValueError for records that are well formed and describe nothing that can run."""
    variant = manifest.variant
    if not variant.experts or not variant.sizes:
        raise ValueError("the variant has no expert or no size")
    if len(set(variant.parts)) != len(variant.parts):
        raise ValueError("two parts have one name")
    if len(variant.boundary_ratios) != len(variant.experts) - 1:
        raise ValueError("there is not one boundary_ratio between two experts")
    if not all(start > end for start, end in variant.sigma_ranges):
        raise ValueError(f"boundary_ratios {variant.boundary_ratios} do not fall from 1 to 0")
    if set(manifest.parts) != set(variant.parts):
        raise ValueError(f"parts are {sorted(manifest.parts)}, expected {sorted(variant.parts)}")
    if unknown := {part.precision for part in manifest.parts.values()} - set(PRECISIONS):
        raise ValueError(f"unknown precision {', '.join(sorted(unknown))}")
    encoders = filter(None, (variant.text_encoder, variant.image_encoder))
    for config in (*(expert.dit for expert in variant.experts), variant.vae, *encoders):
        for name, value in vars(config).items():
            if type(value) is int and not 0 < value <= LARGEST.get(name, LARGEST_DIM):
                raise ValueError(f"{name} is {value}")
    for dit in (expert.dit for expert in variant.experts):
        if dit.dim % dit.num_heads or dit.head_dim % 2 or len(dit.patch_size) != 3:
            raise ValueError(f"{dit.dim} channels do not make {dit.num_heads} heads")
    if variant.text_encoder.attention_dim % variant.text_encoder.num_heads:
        raise ValueError("the text encoder's attention does not divide into heads")
    if (image := variant.image_encoder) and image.dim % image.num_heads:
        raise ValueError("the image encoder's channels do not divide into heads")
    if not len(variant.vae.latents_mean) == len(variant.vae.latents_std) == variant.vae.z_dim:
        raise ValueError("the VAE's statistics are not one a channel")
    scheduler = manifest.settings.get("scheduler_config", {})
    if not isinstance(scheduler, dict) or not all(
        type(scheduler.get(key)) in (int, float, type(None)) for key in ("flow_shift", "shift")
    ):
        raise ValueError("scheduler_config is no object with numbers for its shift")
    for component in manifest.components:
        for plan in component.plans:
            _check_plan(component, plan)


def _check_plan(component: ComponentRecord, plan: PlanRecord) -> None:
    """Raises ValueError for a plan that its component cannot have."""
    records = (*component.inputs.values(), *component.outputs.values())
    sizes = (size for record in records for size in record.shape if isinstance(size, str))
    symbols = {symbol for size in sizes for symbol in SYMBOL.findall(size)}
    of_one = plan.part in component.parts and plan.instance is not None and plan.instance >= 0
    if (
        plan.runtime not in FLAVOURS
        or not plan.file.startswith("plans/")
        or not plan.targets
        or plan.symbols.keys() != symbols
        or not all(0 < low <= typical <= high for low, typical, high in plan.symbols.values())
        or not (of_one or (plan.part is None and plan.instance is None))
    ):
        raise ValueError(f"{component.name} cannot have the plan {plan.file} as it is described")


def manifest_bytes(manifest: Manifest) -> bytes:
    return (json.dumps(to_plain(manifest), indent=1, ensure_ascii=False) + "\n").encode()
