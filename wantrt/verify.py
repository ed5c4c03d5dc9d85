"""Verification: is a bundle, as a runtime runs it, the checkpoint that it was built from?

The reference is always the torch modules in float32 with the weights of the *checkpoint*, never a
runtime's own idea of itself. Checked are: the hash of every file; every weight against its source,
and for NaN; every component at a small odd shape (with plans: at the smallest sizes that they
serve), each time it runs, all outputs; and on request the latents of a few denoising steps, where
errors add up. On a GPU the reference runs there too, in float32 without TF32.

Weights are read from the checkpoint as a stream: at most one stack of layers is in memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from math import isfinite, prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from wantrt.bundle import Bundle
from wantrt.checkpoints import Checkpoint, open_checkpoint
from wantrt.config import DiTConfig, Size, TextEncoderConfig, Variant
from wantrt.device import Device
from wantrt.errors import BundleError, CancelledError
from wantrt.folder import Progress, silent
from wantrt.models.components import Component, part_components
from wantrt.models.dit import rope_tables, timestep_sinusoid
from wantrt.models.umt5 import position_buckets
from wantrt.pieces import read_log, variant_to_ask
from wantrt.runtime.loading import RUNTIMES, Runtime, choose_for
from wantrt.runtime.parts import load_part
from wantrt.runtime.pipeline import Pipeline
from wantrt.runtime.pipeline import Progress as Stage
from wantrt.runtime.residency import Part
from wantrt.runtime.sizes import served_sizes
from wantrt.runtime.torch_session import TorchSession, load_sessions
from wantrt.session import Range, Session, Tensors
from wantrt.tasks.source import TAKES

SYMBOLS = {"B": 2, "S": 11, "N": 7, "T": 3, "F": 2, "h": 3, "w": 5, "L": 30}  # odd; L = F·h·w
PROMPT = "a red circle moves right"
TRAJECTORY_CELLS = 8  # patches along each side of the trajectory's frames
TRAJECTORY_FRAMES = 5


@dataclass(frozen=True)
class Tolerance:
    """relative_error: ‖actual − expected‖ / ‖expected‖ at most; cosine: at least."""

    relative_error: float
    cosine: float


COMPONENT_TOLERANCE = {
    "fp32": Tolerance(1e-4, 0.999999),
    "bf16": Tolerance(3e-2, 0.999),
    "fp16": Tolerance(5e-3, 0.9999),
}
TRAJECTORY_TOLERANCE = {  # errors add up from step to step, and guidance amplifies them
    "fp32": Tolerance(1e-3, 0.99999),
    "bf16": Tolerance(1.5e-1, 0.98),
    "fp16": Tolerance(3e-2, 0.999),
}


@dataclass(frozen=True)
class Comparison:
    """How far something is from its reference: of several outputs and instances, the farthest."""

    name: str
    part: str
    precision: str
    relative_error: float
    cosine: float
    tolerance: Tolerance

    @property
    def ok(self) -> bool:
        return (
            self.relative_error <= self.tolerance.relative_error
            and self.cosine >= self.tolerance.cosine
        )


@dataclass(frozen=True)
class Report:
    """What was found. Weights are named `part/tensor`."""

    runtime: str
    components: tuple[Comparison, ...]
    nonfinite: tuple[str, ...]  # weights that hold NaN or infinity
    different: tuple[str, ...]  # weights that are not the checkpoint's
    trajectory: tuple[Comparison, ...]  # one a step

    @property
    def ok(self) -> bool:
        compared = (*self.components, *self.trajectory)
        return all(c.ok for c in compared) and not self.nonfinite and not self.different


def verify(
    bundle: Bundle,
    checkpoint: str | None = None,
    *,
    runtime: str | None = None,
    steps: int = 0,
    trust_plans: bool = False,
    progress: Progress = silent,
) -> Report:
    """Compare a bundle with its checkpoint, which is None for the one that it was built from.

    trust_plans: see `Pipeline.load`. Raises BundleError for altered files and for another
    checkpoint.
    """
    bundle.check_hashes(progress)
    chosen = choose_for(bundle, runtime)
    opened = open_source(bundle, checkpoint)
    components: list[Comparison] = []
    nonfinite: list[str] = []
    different: list[str] = []
    for part in bundle.precision:
        check = _PartCheck(bundle, opened, part, chosen, trust_plans)
        components += check.run(progress)
        nonfinite += check.nonfinite
        different += check.different
    trajectory: list[Comparison] = []
    if steps:
        trajectory = compare_steps(bundle, opened, chosen, steps, trust_plans, progress)
    return Report(
        chosen.name, tuple(components), tuple(nonfinite), tuple(different), tuple(trajectory)
    )


def open_source(bundle: Bundle, checkpoint: str | None) -> Checkpoint:
    """The checkpoint that a bundle was built from. Raises BundleError if it is another one."""
    log = read_log(bundle.path)
    source = checkpoint or (log.checkpoint if log else None)
    opened = open_checkpoint(source, variant_to_ask(bundle.variant, log))
    if opened.fingerprint != bundle.manifest.checkpoint.fingerprint:
        raise BundleError(
            f"{bundle.path} was built from another checkpoint than {opened.source}. "
            "Name the right one with --checkpoint."
        )
    return opened


class _PartCheck:
    """The components of one part, each compared as soon as its weights have come by."""

    def __init__(
        self,
        bundle: Bundle,
        checkpoint: Checkpoint,
        part: str,
        runtime: Runtime,
        trust_plans: bool,
    ) -> None:
        self.checkpoint, self.part = checkpoint, part
        self.precision = bundle.precision[part]
        self.config = checkpoint.parts[part].config
        self.weights = bundle.weights(part)
        self.device = runtime.make_device()
        self.components = bundle.components(part)
        references = part_components(bundle.variant, part, torch.float32, bundle.stack_of(part))
        with self.device.stream():
            sessions = load_part(bundle, part, runtime, self.device, trust_plans=trust_plans)
        self.pending = [
            _Run(component, reference, session, instance)
            for component, reference in zip(self.components, references, strict=True)
            for session, instance in zip(sessions[component.name], component.instances, strict=True)
        ]
        self.nonfinite: list[str] = []
        self.different: list[str] = []

    def run(self, progress: Progress) -> list[Comparison]:
        worst: dict[str, tuple[float, float]] = {}
        held: dict[str, Tensor] = {}
        for done, (name, tensor) in enumerate(self.checkpoint.read(self.part, torch.float32), 1):
            held[name] = tensor
            self._check_weight(name, tensor)
            for run in [run for run in self.pending if held.keys() >= run.weights]:
                self.pending.remove(run)
                error, cosine = run.compare(held, self.config, self.device)
                worse, lower = worst.get(run.component.name, (0.0, 1.0))
                worst[run.component.name] = (max(worse, error), min(lower, cosine))
            needed = {name for run in self.pending for name in run.weights}
            held = {name: tensor for name, tensor in held.items() if name in needed}
            progress(f"verify {self.part}", done, len(self.weights))
        return [
            Comparison(
                component.name,
                self.part,
                self.precision,
                *worst[component.name],
                COMPONENT_TOLERANCE[self.precision],
            )
            for component in self.components
        ]

    def _check_weight(self, name: str, expected: Tensor) -> None:
        actual = self.weights[name]
        if not bool(torch.isfinite(actual).all()):
            self.nonfinite.append(f"{self.part}/{name}")
        eps, tiny = torch.finfo(actual.dtype).eps, torch.finfo(actual.dtype).tiny
        if not torch.allclose(actual.float(), expected, rtol=eps, atol=tiny, equal_nan=True):
            self.different.append(f"{self.part}/{name}")


@dataclass
class _Run:
    """One instance of a component: the session under test, and how to make its reference."""

    component: Component
    reference: Component
    session: Session
    instance: Mapping[str, str]

    @property
    def weights(self) -> set[str]:
        """The prepared tensors it runs with."""
        return set(self.instance.values())

    def compare(self, held: Tensors, config: object, device: Device) -> tuple[float, float]:
        """The largest relative error and the smallest cosine of its outputs."""
        where = device.torch_device
        inputs = {
            name: tensor.to(where)
            for name, tensor in make_inputs(
                self.component, config, smallest_sizes(self.session.serves)
            ).items()
        }
        reference = TorchSession(
            self.reference,
            {name: held[prepared].to(where) for name, prepared in self.instance.items()},
        )
        specs = self.reference.inputs
        with device.stream():
            with exact_float32():
                expected = reference.run(
                    {name: tensor.to(specs[name].dtype) for name, tensor in inputs.items()}
                )
            actual = self.session.run(inputs)
            distances = [
                distance(actual[name].cpu(), tensor.cpu()) for name, tensor in expected.items()
            ]
        return max(error for error, _ in distances), min(cosine for _, cosine in distances)


@contextmanager
def exact_float32() -> Iterator[None]:
    """cuDNN would use TF32 for float32 convolutions."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = before


def smallest_sizes(serves: Sequence[Mapping[str, Range]]) -> dict[str, int]:
    """SYMBOLS, or what is nearest to them of what a session serves."""
    nearest = [
        {
            symbol: min(max(SYMBOLS.get(symbol, low), low), high)
            for symbol, (low, _, high) in plan.items()
        }
        for plan in serves
    ]
    return SYMBOLS | min(nearest, key=lambda sizes: prod(sizes.values()), default={})


def make_inputs(
    component: Component, config: object, symbols: Mapping[str, int] = SYMBOLS
) -> dict[str, Tensor]:
    """Inputs of ordinary size, always the same, in the dtypes that it takes."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(config, DiTConfig) and config.image_positions is not None:
        symbols = {**symbols, "N": config.image_positions}
    inputs = {}
    for name, spec in component.inputs.items():
        shape = spec.concrete(symbols)
        table = _table(name, shape, config, symbols)
        noise = torch.randn(shape, generator=generator) * (0.3 if name in ("e", "e6") else 1.0)
        inputs[name] = (noise.clamp(-1, 1) if name == "pixels" else noise).to(spec.dtype)
        if table is not None:
            inputs[name] = table.to(spec.dtype)
    return inputs


def _table(
    name: str, shape: tuple[int, ...], config: object, symbols: Mapping[str, int]
) -> Tensor | None:
    """Inputs that are not free: tokens, masks, tables."""
    if isinstance(config, TextEncoderConfig):
        if name == "tokens":
            return torch.arange(shape[0] * shape[1]).view(shape) % config.vocab_size
        if name == "position_buckets":
            return position_buckets(config, shape[0])
        if name == "mask":
            mask = torch.ones(shape)
            mask[-1, -3:] = 0
            return mask
    if isinstance(config, DiTConfig):
        if name == "token_row":
            return torch.arange(shape[0]) % 2
        if name == "sinusoid":
            return timestep_sinusoid(torch.linspace(999, 1, shape[0]), config.freq_dim)
        if name in ("cos", "sin"):
            frames, height, width = (symbols[symbol] for symbol in "Fhw")
            if frames * height * width != shape[0]:  # a stack's plan knows the product alone
                frames, height, width = 1, 1, shape[0]
            _, ph, pw = config.patch_size
            return rope_tables(config, frames, ph * height, pw * width)[name == "sin"]
    return None


def distance(actual: Tensor, expected: Tensor) -> tuple[float, float]:
    """Relative error and cosine, in float64. What is not finite is infinitely far."""
    a, e = actual.double().flatten(), expected.double().flatten()
    norm = float(e.norm())
    error = float((a - e).norm()) / norm if norm else float(a.norm())
    cosine = float(a @ e) / (float(a.norm()) * norm) if norm and float(a.norm()) else 1.0
    return (error, cosine) if isfinite(error) else (float("inf"), 0.0)


# -- The trajectory -------------------------------------------------------------------------------


def compare_steps(
    bundle: Bundle,
    checkpoint: Checkpoint,
    runtime: Runtime,
    steps: int,
    trust_plans: bool,
    progress: Progress,
) -> list[Comparison]:
    """The latent after each of `steps` denoising steps of a small video, with its reference."""
    precisions = list(bundle.precision.values())
    lowest = max(precisions, key=lambda p: TRAJECTORY_TOLERANCE[p].relative_error)
    video = _small_video(bundle, runtime)
    with Pipeline.load(
        bundle.path, runtime.name, residency="phase", trust_plans=trust_plans
    ) as pipe:
        actual = _latents(pipe, video, steps, "steps", progress)
        device = pipe.device
    with _reference(bundle, checkpoint, device) as pipe, exact_float32():
        expected = _latents(pipe, video, steps, "reference steps", progress)
    return [
        Comparison(
            f"step {number}", "latent", lowest, *distance(a, e), TRAJECTORY_TOLERANCE[lowest]
        )
        for number, (a, e) in enumerate(zip(actual, expected, strict=True), 1)
    ]


def _small_video(bundle: Bundle, runtime: Runtime) -> tuple[Size, int]:
    """Size and frames: the smallest that plans serve, or what is small enough everywhere."""
    if served := [one.smallest for one in served_sizes(bundle, runtime.name)]:
        return min(served, key=lambda video: prod(video[0]) * video[1])
    side = TRAJECTORY_CELLS * bundle.variant.size_step
    return (side, side), TRAJECTORY_FRAMES


def _latents(
    pipe: Pipeline, video: tuple[Size, int], steps: int, label: str, progress: Progress
) -> list[Tensor]:
    latents: list[Tensor] = []

    def keep(stage: Stage) -> bool:
        if stage.latents is not None:
            latents.append(stage.latents.cpu().clone())
            progress(label, stage.done, stage.total)
        return len(latents) < steps  # then nothing is decoded

    size, num_frames = video
    with suppress(CancelledError):
        pipe(
            PROMPT,
            size=size,
            num_frames=num_frames,
            num_inference_steps=steps,
            seed=0,
            callback=keep,
            **synthetic_source(pipe.variant, size, num_frames),
        )
    return latents


def synthetic_source(variant: Variant, size: Size, num_frames: int) -> dict[str, Any]:
    """Something of everything that the task takes, by the names of the pipeline's settings."""
    width, height = size
    generator = np.random.default_rng(0)
    frames = generator.integers(0, 256, (num_frames, height, width, 3), dtype=np.uint8)
    mask = np.zeros((1, height, width), np.uint8)
    mask[:, : height // 2] = 255
    everything = {
        "image": frames[0],
        "last_image": frames[-1],
        "video": frames,
        "mask": mask,
    }
    needed, optional = TAKES[variant.task]
    return {name: value for name, value in everything.items() if name in needed + optional}


def _reference(bundle: Bundle, checkpoint: Checkpoint, device: Device) -> Pipeline:
    """The pipeline of the checkpoint itself, in float32 and torch, a part at a time."""

    def part(name: str, prefix: str = "") -> Part:
        def load() -> dict[str, list[TorchSession]]:
            weights = dict(checkpoint.read(name, torch.float32))
            components = part_components(bundle.variant, name, torch.float32, bundle.stack_of(name))
            return {
                c.name: load_sessions(c, None, weights, device)
                for c in components
                if c.name.startswith(prefix)
            }

        return Part(load, device, resident=False)

    parts = {name: part(name) for name in bundle.precision}
    parts["vae_encoder"] = part("vae", "vae_encoder")
    return Pipeline(bundle, RUNTIMES["torch"], device, parts, "phase")
