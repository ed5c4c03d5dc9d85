"""Second stage: encodes the training clips once, because the transformer sees each many times."""

import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from wantrt.config import VAEConfig
from wantrt.models.vae import VAE, Caches
from wantrt.nano.clips import MakePaths, centred_paths, draw_clips, random_scenes
from wantrt.nano.processes import barrier, rank, world_size
from wantrt.nano.scenes import Scene, split
from wantrt.nano.train_vae import to_signal

CHUNK = 64  # clips of one file
AT_ONCE = 4  # clips encoded together: they fit into a core's cache, which makes it twice as fast


def training_scenes(count: int, seed: int) -> list[Scene]:
    """The scenes of the training clips, in the order of their latents."""
    return random_scenes(split()[0], count, random.Random(seed))


def draw_pixels(
    scenes: list[Scene], seed: int, make_paths: MakePaths = centred_paths
) -> Callable[[slice], Tensor]:
    """Draws the clips of some of the scenes, [B, 3, T, H, W] in [-1, 1]; always the same ones."""

    def pixels(chosen: slice) -> Tensor:
        drawn = draw_clips(scenes[chosen], seed + chosen.start, make_paths=make_paths)
        return to_signal(drawn.permute(0, 4, 1, 2, 3))

    return pixels


@torch.no_grad()
def encode_clips(vae: VAE, pixels: Callable[[slice], Tensor], count: int, folder: Path) -> Tensor:
    """Latent means [count, z, F, H/8, W/8] in float16, not normalised.

    One file a chunk in `folder`, so that a second run goes on; the processes share the work.
    """
    folder.mkdir(exist_ok=True)
    starts = range(0, count, CHUNK)
    for start in starts[rank() :: world_size()]:
        file = folder / f"{start:06}.pt"
        if not file.exists():
            clips = pixels(slice(start, min(start + CHUNK, count)))
            moments = [vae.encoder.stream(few, Caches(None)) for few in clips.split(AT_ONCE)]
            torch.save(torch.cat(moments).chunk(2, dim=1)[0].half(), file)
    barrier()
    return torch.cat([torch.load(folder / f"{start:06}.pt", weights_only=True) for start in starts])


def normalise(latents: Tensor, config: VAEConfig) -> Tensor:
    """Latent means as the transformer sees them, in float16. latents: [N, z, F, H, W]."""
    mean, deviation = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (config.latents_mean, config.latents_std)
    )
    return ((latents.float() - mean) / deviation).half()


@torch.no_grad()
def latent_statistics(
    vae: VAE, latents: Tensor, clips: Tensor
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each latent channel, for the VAE's config; four decimals.

    The deviation counts the encoder's own uncertainty (from a few `clips` [B, 3, T, H, W]): a
    channel that the clips do not need stays small instead of being blown up to unit noise.
    """
    means = latents.float().transpose(0, 1).flatten(1)  # [z, values]
    log_variance = vae.encoder.stream(clips, Caches(None)).chunk(2, dim=1)[1]
    spread = log_variance.exp().transpose(0, 1).flatten(1).mean(dim=1)
    deviation = (means.var(dim=1) + spread).sqrt()
    return _rounded(means.mean(dim=1)), _rounded(deviation)


def _rounded(values: Tensor) -> tuple[float, ...]:
    """As they are written into the table of variants."""
    return tuple(round(value, 4) for value in values.tolist())
