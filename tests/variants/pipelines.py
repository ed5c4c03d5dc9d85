"""A generation by diffusers' pipeline and by ours, from the same checkpoint, noise and prompts."""

from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline, WanVACEPipeline
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from tests.tasks.pictures import as_pil
from tests.variants.small import checkpoint_of
from wantrt import Pipeline
from wantrt.config import Size, VAEConfig
from wantrt.runtime.pipeline import Progress

PROMPTS = {"prompt": "a red circle moves right", "negative_prompt": "a blue square"}
IMAGES = ("image", "last_image", "video", "mask", "reference_images")
KINDS = {"t2v": WanPipeline, "i2v": WanImageToVideoPipeline, "vace": WanVACEPipeline}

Result = tuple[Tensor, NDArray[np.float32]]
"""The last latents, and frames in [0, 1], [T, H, W, 3]."""


@cache
def theirs(variant: str, kind: str) -> DiffusionPipeline:
    """diffusers' pipeline of a kind (`KINDS`) with the small checkpoint of a variant."""
    folder = checkpoint_of(variant, "diffusers")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "tokenizer")
    pipe = KINDS[kind].from_pretrained(folder, tokenizer=tokenizer, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run_theirs(variant: str, kind: str, latents: Tensor, **settings: Any) -> Result:
    """`settings` are named as ours are."""
    pipe, given = theirs(variant, kind), dict(settings)
    given["width"], given["height"] = given.pop("size")
    if "context_scale" in given:
        given["conditioning_scale"] = given.pop("context_scale")
    for name in given.keys() & IMAGES:
        one = name in ("image", "last_image")
        given[name] = as_pil([given[name]])[0] if one else as_pil(given[name])
    seen = []

    def keep(_pipe: object, _step: int, _timestep: object, state: dict[str, Tensor]) -> Any:
        seen.append(state["latents"].clone())
        return state

    frames = pipe(**PROMPTS, **given, latents=latents, callback_on_step_end=keep).frames[0]
    if kind == "i2v" and pipe.config.expand_timesteps:  # the first frame comes in after the loop
        seen.append(pipe(**PROMPTS, **given, latents=latents, output_type="latent").frames)
    return seen[-1], frames


def run_ours(pipe: Pipeline, latents: Tensor, **settings: Any) -> Result:
    seen = []

    def keep(progress: Progress) -> None:
        if progress.latents is not None:
            seen.append(progress.latents.clone())

    video = pipe(**PROMPTS, **settings, init_latents=latents, convention="diffusers", callback=keep)
    return seen[-1], video.frames / np.float32(255)


def draw_latents(vae: VAEConfig, size: Size, num_frames: int, references: int = 0) -> Tensor:
    """Noise [1, C, F, H, W]; references have latent frames in front."""
    width, height = (side // vae.spatial_stride for side in size)
    frames = (num_frames - 1) // vae.temporal_stride + 1 + references
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, vae.z_dim, frames, height, width, generator=generator)
