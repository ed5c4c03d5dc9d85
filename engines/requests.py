"""Which plans a component needs: one for each requested size, static unless a range is asked for.

A component whose shapes do not depend on the size of the video (text, time, condition) has one plan
with a small range.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from wantrt.config import GUIDANCE_BATCH_TOKENS, Size, Variant
from wantrt.errors import SettingsError
from wantrt.linked import refuse_other_names
from wantrt.models.components import Component
from wantrt.session import Range

refuse_other_names(__spec__)

Symbols = Mapping[str, Range]

TYPICAL_PROMPT = 128  # tokens
LONGEST_SCHEDULE = 1000  # steps
FP16_KEYS = 65_504  # the largest fp16: fused attention in fp16 overflows above as many keys
TURING = "sm75"
FLOAT32_COMPONENTS = ("dit_time", "dit_head", "vae_encoder_first", "vae_encoder_next")


@dataclass(frozen=True, kw_only=True)
class PlanRequest:
    """All that decides the bytes of a plan, besides TensorRT itself.

    symbols: the sizes it shall serve; equal ends are static. targets: "sm89", …; for the flavour
    that builds on its own GPU, the name of that GPU. baked: weights that become constants, by their
    names in the graph; empty: they are inputs. plugins: nodes that we have a kernel for are that
    kernel, not their definition; only a flavour that `takes_plugins` can.
    """

    component: Component
    graph: Path
    symbols: Symbols
    targets: tuple[str, ...]
    baked: Mapping[str, Tensor] = field(default_factory=dict)
    tf32: bool = False
    plugins: bool = False


@dataclass(frozen=True)
class Shapes:
    """The sizes of one plan. label: for people, "832x480x81 batch 2"; "" where one plan does."""

    label: str
    symbols: Symbols


def plan_shapes(
    variant: Variant,
    component_name: str,
    sizes: Sequence[Size],
    frames: Sequence[int],
    dynamic: bool = False,
) -> list[Shapes]:
    """What plans a component needs to serve every size at every number of frames.

    sizes: (width, height) in pixels; frames: of the video. Guidance decides the batch, as in the
    denoiser: up to GUIDANCE_BATCH_TOKENS there is a plan for one pass and one for both. dynamic:
    one plan for each batch, from the smallest to the largest of the sizes, fastest at the first.
    """
    if component_name.startswith("text_"):
        text_len = variant.experts[0].dit.text_len
        typical = min(TYPICAL_PROMPT, text_len)
        return [Shapes("", {"B": (1, 1, 1), "S": (1, typical, text_len)})]
    if component_name == "image_encoder":
        return [Shapes("", {"B": (1, 1, 1)})]  # images run one after the other
    if component_name == "dit_time":
        return [Shapes("", {"T": (1, variant.num_inference_steps, LONGEST_SCHEDULE)})]
    if component_name == "dit_condition":
        rows = {symbol: (size,) * 3 for symbol, size in _image_rows(variant).items()}
        return [Shapes("", {"B": (1, 2, 2), **rows})]
    if component_name.startswith("vae_"):
        groups = [[_vae_point(variant, size) for size in sizes]]
    else:
        videos = [(size, count) for size in sizes for count in frames]
        guided = [v for v in videos if num_tokens(variant, *v) <= GUIDANCE_BATCH_TOKENS]
        groups = [
            [_dit_point(variant, component_name, size, count, batch) for size, count in some]
            for batch, some in ((1, videos), (2, guided))
        ]
    if dynamic:
        return [_join(group) for group in groups if group]
    distinct: dict[tuple[tuple[str, int], ...], Shapes] = {}
    for label, point in (point for group in groups for point in group):
        fixed = {symbol: (size, size, size) for symbol, size in point.items()}
        distinct.setdefault(tuple(point.items()), Shapes(label, fixed))
    return list(distinct.values())


def num_tokens(variant: Variant, size: Size, num_frames: int) -> int:
    frames, height, width = _patches(variant, size, num_frames)
    return frames * height * width


def check_tokens(
    variant: Variant, sizes: Sequence[Size], frames: Sequence[int], precision: str
) -> None:
    """Raises SettingsError for a video that is too long for attention in fp16."""
    for width, height in sizes:
        for count in frames:
            tokens = num_tokens(variant, (width, height), count)
            if precision == "fp16" and tokens > FP16_KEYS:
                raise SettingsError(
                    f"{width}x{height} with {count} frames has {tokens:,} tokens; attention in "
                    f"fp16 overflows above {FP16_KEYS:,}. Take a smaller --size or fewer --frames, "
                    "or --precision bf16 on a GPU newer than Turing."
                )


def has_no_kernels(component: Component, targets: Iterable[str]) -> bool:
    """Whether TensorRT cannot build the component for one of the targets: torch runs it instead.

    For Turing there is no float32 matrix product and no float32 3-D convolution, and the time
    embedding, the head and the VAE's encoder are float32 in every precision. A text encoder in
    float32, which is that of an fp16 bundle, has no fused attention on any GPU.
    """
    if component.name == "text_stack":
        return is_float32(component)
    return TURING in targets and component.name in FLOAT32_COMPONENTS


def is_float32(component: Component) -> bool:
    """Whether its matrices are float32; norms and tables are in every precision."""
    return all(spec.dtype == torch.float32 for spec in component.weights.values())


# -- The sizes of one video: a label, and the value of every symbol of the component --------------

Point = tuple[str, dict[str, int]]


def _vae_point(variant: Variant, size: Size) -> Point:
    width, height = size
    cell = variant.vae.spatial_stride
    return f"{width}x{height}", {"h": height // cell, "w": width // cell}


def _dit_point(
    variant: Variant, component_name: str, size: Size, num_frames: int, batch: int
) -> Point:
    label = f"{size[0]}x{size[1]}x{num_frames} batch {batch}"
    if component_name in ("dit_stack", "dit_vace_block"):
        tokens = num_tokens(variant, size, num_frames)
        return label, {"B": batch, "L": tokens, **_image_rows(variant)}
    frames, height, width = _patches(variant, size, num_frames)
    return label, {"B": batch, "F": frames, "h": height, "w": width}


def _image_rows(variant: Variant) -> dict[str, int]:
    """The symbol of what attends to image features, unless their number is fixed in the model."""
    fixed = variant.experts[0].dit.image_positions is not None
    return {"N": variant.image_rows} if variant.image_rows and not fixed else {}


def _patches(variant: Variant, size: Size, num_frames: int) -> tuple[int, int, int]:
    """Frames, height and width of a video in patches of the DiT."""
    width, height = size
    cell = variant.vae.spatial_stride
    patch_frames, patch_height, patch_width = variant.experts[0].dit.patch_size
    latent_frames = (num_frames - 1) // variant.vae.temporal_stride + 1
    return (
        latent_frames // patch_frames,
        height // cell // patch_height,
        width // cell // patch_width,
    )


def _join(points: Sequence[Point]) -> Shapes:
    """One plan from the smallest to the largest, fastest at the first."""
    (first, typical), (last, _) = points[0], points[-1]
    symbols = {
        symbol: (
            min(point[symbol] for _, point in points),
            size,
            max(point[symbol] for _, point in points),
        )
        for symbol, size in typical.items()
    }
    return Shapes(first if len(points) == 1 else f"{first} … {last}", symbols)
