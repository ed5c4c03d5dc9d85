"""Which sizes a bundle's plans serve, in the user's words: width, height, frames.

Runtimes without plans serve every size. A plan knows symbols (wantrt/engines/requests.py); a video
is served if every component that has plans has one for it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from wantrt.bundle import Bundle
from wantrt.config import GUIDANCE_BATCH_TOKENS, Size, Variant, require_task
from wantrt.errors import SettingsError
from wantrt.pieces import read_log, variant_to_ask
from wantrt.runtime.settings import Settings, resolve
from wantrt.tasks.source import INPUTS, open_source

DIT_STEP = ("dit_patch", "dit_stack", "dit_head")  # what runs at the size of the video
VAE_DECODER = ("vae_decoder_first", "vae_decoder_next")


@dataclass(frozen=True)
class Served:
    """From one (size, frames) to another, in every dimension; mostly the same."""

    smallest: tuple[Size, int]
    largest: tuple[Size, int]

    def __str__(self) -> str:
        ends = [
            f"{width}x{height} with {frames} frames"
            for (width, height), frames in (self.smallest, self.largest)
        ]
        return ends[0] if ends[0] == ends[1] else f"from {ends[0]} to {ends[1]}"


def served_sizes(bundle: Bundle, runtime: str) -> list[Served]:
    """What the plans for a runtime serve, in the order of their build; empty: any size."""
    variant = bundle.variant
    plans = bundle.plans("dit_patch", variant.experts[0].name, runtime)
    found = [
        Served(*(_video(variant, {s: r[end] for s, r in plan.symbols.items()}) for end in (0, 2)))
        for plan in plans
    ]
    return list(dict.fromkeys(found))


def _video(variant: Variant, symbols: Mapping[str, int]) -> tuple[Size, int]:
    step, stride = variant.size_step, variant.vae.temporal_stride
    latent_frames = symbols["F"] * variant.experts[0].dit.patch_size[0]
    return (symbols["w"] * step, symbols["h"] * step), (latent_frames - 1) * stride + 1


def resolve_for(bundle: Bundle, runtime: str, *, prompt: str, **settings: Any) -> Settings:
    """`wantrt.runtime.settings.resolve` for a bundle on a runtime, and `open_source` before it.

    The default size is the variant's; where plans do not serve that, it is the first one that they
    serve. With plans, a source is fitted to one of their sizes. Raises SettingsError with what
    would do, MediaError.
    """
    variant = bundle.variant
    require_task(variant.task, variant.name)
    given = {name: settings.pop(name) for name in INPUTS if name in settings}
    source = open_source(variant, **given)
    size, frames = settings.pop("size", None), settings.pop("num_frames", None)
    choices = [served.smallest for served in served_sizes(bundle, runtime)]
    defaults = (size or variant.size, variant.num_frames if frames is None else frames)
    if choices and not _is_served(bundle, runtime, *defaults, guided=False):
        for its_size, its_frames in choices:
            if size in (None, its_size) and frames in (None, its_frames):
                defaults = its_size, its_frames
                break
    if choices:
        size, frames = defaults
    resolved = resolve(
        variant,
        bundle.settings,
        prompt=prompt,
        size=size,
        num_frames=frames,
        source=source,
        **settings,
    )
    check_served(bundle, runtime, resolved)
    return resolved


def check_served(bundle: Bundle, runtime: str, settings: Settings) -> None:
    """Raises SettingsError with the sizes that are served and the command that adds this one."""
    guided = any(scale != 1.0 for scale in settings.guidance_scales)
    frames = settings.denoised_frames(bundle.variant)
    if _is_served(bundle, runtime, settings.size, frames, guided):
        return
    width, height = settings.size
    served = "; ".join(map(str, served_sizes(bundle, runtime))) or "others"
    log = read_log(bundle.path)
    source = f" --checkpoint {log.checkpoint}" if log and log.checkpoint else ""
    variant = f" --variant {name}" if (name := variant_to_ask(bundle.variant, log)) else ""
    raise SettingsError(
        f"the {runtime} plans of {bundle.path} do not serve {width}x{height} with "
        f"{frames} frames{' and guidance' if guided else ''}. They serve {served}.\n"
        f"Add it with: wantrt build{variant}{source} --out {bundle.path} --runtime {runtime} "
        f"--size {width}x{height} --frames {frames}"
    )


def _is_served(bundle: Bundle, runtime: str, size: Size, num_frames: int, guided: bool) -> bool:
    cells = vae_symbols(bundle.variant, size)
    if not all(_covers(bundle, name, "vae", runtime, cells) for name in VAE_DECODER):
        return False
    symbols = dit_symbols(bundle.variant, size, num_frames, guided)
    return all(
        _covers(bundle, name, expert.name, runtime, symbols)
        for expert in bundle.variant.experts
        for name in DIT_STEP
    )


def _covers(
    bundle: Bundle, component: str, part: str, runtime: str, symbols: Mapping[str, int]
) -> bool:
    """Whether the component has a plan for these sizes, or none at all and runs on torch."""
    plans = bundle.plans(component, part, runtime)
    return not plans or any(
        all(low <= symbols[symbol] <= high for symbol, (low, _, high) in plan.symbols.items())
        for plan in plans
    )


def vae_symbols(variant: Variant, size: Size) -> dict[str, int]:
    width, height = size
    cell = variant.vae.spatial_stride
    return {"h": height // cell, "w": width // cell}


def dit_symbols(variant: Variant, size: Size, num_frames: int, guided: bool) -> dict[str, int]:
    """Of a denoising step. Guidance is a batch of two where the latent has few enough tokens."""
    width, height = size
    latent_frames = (num_frames - 1) // variant.vae.temporal_stride + 1
    frames = latent_frames // variant.experts[0].dit.patch_size[0]
    symbols = {"F": frames, "h": height // variant.size_step, "w": width // variant.size_step}
    tokens = symbols["F"] * symbols["h"] * symbols["w"]
    batch = 2 if guided and tokens <= GUIDANCE_BATCH_TOKENS else 1
    images = {"N": variant.image_rows} if variant.image_rows else {}
    return {**symbols, **images, "L": tokens, "B": batch}
