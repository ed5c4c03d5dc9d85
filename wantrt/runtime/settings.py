"""The settings of one generation: what was asked for, completed and checked before any work.

Precedence: what the caller gives, then what the bundle recorded, then the variant's row. Under the
diffusers convention the recorded ``scheduler_config.json`` gives solver and shift, and the defaults
are those of the diffusers Wan pipelines.
"""

import logging
import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from wantrt.config import Size, Variant
from wantrt.errors import SettingsError
from wantrt.names import check_name
from wantrt.schedulers.grids import CONVENTIONS, SOLVERS, make_grid
from wantrt.tasks.source import NO_SOURCE, Source, choose_size

log = logging.getLogger("wantrt")

DIFFUSERS_STEPS = 50
DIFFUSERS_GUIDANCE_SCALE = 5.0
DIFFUSERS_SOLVERS = {  # scheduler class -> our name
    "UniPCMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpm++",
    "FlowMatchEulerDiscreteScheduler": "euler",
}
MAX_AXIS = 1024  # patches an axis of RoPE can tell apart


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides what a generation gives, besides the weights and the runtime."""

    prompt: str
    negative_prompt: str
    size: Size  # (width, height) in pixels
    num_frames: int
    num_inference_steps: int
    guidance_scales: tuple[float, ...]  # one per expert, high noise first
    flow_shift: float
    solver: str
    convention: str
    seed: int
    noise: str  # the device whose generator draws the noise: "cpu" or "cuda"
    fit: str | None = None  # how an image or a video is brought to the size
    context_scale: float = 1.0  # how strongly a controlling video steers (VACE)
    source: Source = NO_SOURCE

    def latent_shape(self, variant: Variant) -> tuple[int, int, int, int]:
        """(C, F, H, W) in latent cells of what is denoised; references come before the video."""
        width, height = self.size
        vae = variant.vae
        return (
            vae.z_dim,
            (self.num_frames - 1) // vae.temporal_stride + 1 + len(self.source.references),
            height // vae.spatial_stride,
            width // vae.spatial_stride,
        )

    def denoised_frames(self, variant: Variant) -> int:
        """Frames of a video whose latent is what is denoised: VACE's references add to it."""
        return self.num_frames + len(self.source.references) * variant.vae.temporal_stride

    def as_dict(self) -> dict[str, Any]:
        """Plain values; of the source, the names of its files."""
        return {**asdict(replace(self, source=NO_SOURCE)), "source": dict(self.source.names)}


def resolve(
    variant: Variant,
    recorded: Mapping[str, Any],
    *,
    prompt: str,
    negative_prompt: str | None = None,
    size: Size | None = None,
    num_frames: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_scale_2: float | None = None,
    guidance_scales: Sequence[float] | None = None,
    flow_shift: float | None = None,
    solver: str | None = None,
    convention: str = "official",
    seed: int | None = None,
    noise: str = "cpu",
    fit: str | None = None,
    context_scale: float | None = None,
    source: Source = NO_SOURCE,
) -> Settings:
    """Complete and check the settings of one generation.

    source: what `open_source` gave. `recorded` is the bundle's ``settings``, which may hold a
    ``scheduler_config``. Raises SettingsError with the nearest valid values.
    """
    check_name("convention", convention, CONVENTIONS)
    check_name("noise device", noise, ("cpu", "cuda"))
    asked_size = size
    size, num_frames, fit = choose_size(variant, source, size, num_frames, fit, convention)
    check_size(variant, size)
    check_frames(variant, num_frames)
    if not prompt.strip():
        log.warning("the prompt is empty: the video will show anything")
    if context_scale is not None and variant.task != "vace":
        raise SettingsError(f"context_scale is for VACE models; {variant.name} is none")
    scales = _choose_scales(variant, convention, guidance_scale, guidance_scale_2, guidance_scales)
    steps, shift, kind = variant.num_inference_steps, variant.flow_shift_for(size), variant.solver
    negative = variant.negative_prompt
    if convention == "diffusers":
        scheduler = recorded.get("scheduler_config", {})
        steps, negative = DIFFUSERS_STEPS, ""
        written = (scheduler.get(key) for key in ("flow_shift", "shift"))
        shift = next((value for value in written if value is not None), shift)
        kind = DIFFUSERS_SOLVERS.get(scheduler.get("_class_name", ""), kind)
    solver = kind if solver is None else solver
    check_name("solver", solver, SOLVERS)
    settings = Settings(
        prompt=prompt,
        negative_prompt=negative if negative_prompt is None else negative_prompt,
        size=size,
        num_frames=num_frames,
        num_inference_steps=steps if num_inference_steps is None else num_inference_steps,
        guidance_scales=scales,
        flow_shift=float(shift if flow_shift is None else flow_shift),
        solver=solver,
        convention=convention,
        seed=secrets.randbelow(2**32) if seed is None else seed,
        noise=noise,
        fit=fit,
        context_scale=1.0 if context_scale is None else float(context_scale),
        source=source,
    )
    make_grid(solver, convention, settings.num_inference_steps, settings.flow_shift)  # it checks
    if not math.isfinite(settings.context_scale):
        raise SettingsError(f"context_scale is {context_scale}; use a finite number (1 is usual)")
    if not all(map(math.isfinite, settings.guidance_scales)):
        raise SettingsError(f"guidance is {settings.guidance_scales}; use finite numbers (Wan: 5)")
    if not 0 <= settings.seed < 2**64:
        raise SettingsError(f"seed is {seed}; use 0 to 2**64 - 1")
    if noise == "cuda" and not _has_cuda():
        raise SettingsError("noise cuda needs a GPU, and torch finds none; use --noise cpu")
    if asked_size is not None:
        warn_of_size(variant, asked_size)
    return settings


def _choose_scales(
    variant: Variant,
    convention: str,
    first: float | None,
    others: float | None,
    every: Sequence[float] | None,
) -> tuple[float, ...]:
    """The guidance scale of each expert: of the first, of those after it, or of every one."""
    count = len(variant.experts)
    if others is not None and count == 1:
        raise SettingsError(
            f"guidance_scale_2 is for the experts after the first; {variant.name} has one expert"
        )
    if every is not None:
        if (first, others) != (None, None):
            raise SettingsError("guidance_scales are all of them; give no other guidance_scale")
        if len(every) != count or not all(type(scale) in (int, float) for scale in every):
            raise SettingsError(
                f"guidance_scales are {list(every)}; {variant.name} takes {count} number(s), one "
                "an expert"
            )
        return tuple(map(float, every))
    defaults = [expert.guidance_scale for expert in variant.experts]
    if convention == "diffusers":
        defaults = [DIFFUSERS_GUIDANCE_SCALE if first is None else first] * count
    return tuple(
        default if asked is None else asked
        for default, asked in zip(defaults, [first] + [others] * (count - 1), strict=True)
    )


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def check_size(variant: Variant, size: Size) -> None:
    """Width and height: positive multiples of the variant's step, at most 1024 patches each."""
    step = variant.size_step
    largest = MAX_AXIS * step
    if all(0 < side <= largest and side % step == 0 for side in size):
        return
    nearest = (min(max(round(side / step), 1) * step, largest) for side in size)
    raise SettingsError(
        f"size {size[0]}x{size[1]} is not a multiple of {step} from {step} to {largest}; "
        f"nearest: {'x'.join(map(str, nearest))}"
    )


def warn_of_size(variant: Variant, size: Size) -> None:
    """Say in one line that a size is none of those that the variant was trained for.

    What a checkpoint of dimensions of its own was trained for is not known.
    """
    if variant.name != "custom" and size not in variant.sizes:
        log.warning(
            "%dx%d is not a size of %s (%s): the result may look worse",
            *size,
            variant.name,
            ", ".join(f"{width}x{height}" for width, height in variant.sizes),
        )


def check_frames(variant: Variant, num_frames: int) -> None:
    """Frames: one, and then whole groups of the VAE's temporal stride."""
    stride = variant.vae.temporal_stride
    largest = (MAX_AXIS - 1) * stride + 1
    if 1 <= num_frames <= largest and (num_frames - 1) % stride == 0:
        return
    below = min(max(num_frames - 1, 0) // stride * stride + 1, largest)
    options = [str(below)] + ([str(below + stride)] if below < largest and num_frames > 0 else [])
    raise SettingsError(
        f"{num_frames} frames is not {stride}n + 1; nearest: {' or '.join(options)}"
    )
