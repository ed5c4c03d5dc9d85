"""Second stage: encodes the training clips once, because the transformer sees each many times."""

import random
from pathlib import Path

import torch
from torch import Tensor

from wantrt.models.vae import VAE, Caches
from wantrt.nano.clips import draw_clips, random_scenes
from wantrt.nano.scenes import Scene, split
from wantrt.nano.train_vae import to_signal

CHUNK = 16  # clips encoded at once


def training_scenes(count: int, seed: int) -> list[Scene]:
    """The scenes of the training clips, in the order of their latents."""
    return random_scenes(split()[0], count, random.Random(seed))


@torch.no_grad()
def encode_clips(vae: VAE, scenes: list[Scene], seed: int, file: Path) -> Tensor:
    """Latent means [N, z, F, H/8, W/8] in float16, not normalised; resumable through `file`."""
    parts = torch.load(file, weights_only=True) if file.exists() else []
    for i in range(sum(map(len, parts)), len(scenes), CHUNK):
        clips = to_signal(draw_clips(scenes[i : i + CHUNK], seed + i).permute(0, 4, 1, 2, 3))
        parts.append(vae.encoder.stream(clips, Caches(None)).chunk(2, dim=1)[0].half())
        if len(parts) % 32 == 0:
            torch.save(parts, file)
    torch.save(parts, file)
    return torch.cat(parts)


@torch.no_grad()
def latent_statistics(
    vae: VAE, latents: Tensor, clips: Tensor
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """(mean, standard deviation) of each latent channel, for the VAE's config.

    The deviation counts the encoder's own uncertainty (from a few `clips` [B, 3, T, H, W]): a
    channel that the clips do not need stays small instead of being blown up to unit noise.
    """
    means = latents.float().transpose(0, 1).flatten(1)  # [z, values]
    log_variance = vae.encoder.stream(clips, Caches(None)).chunk(2, dim=1)[1]
    spread = log_variance.exp().transpose(0, 1).flatten(1).mean(dim=1)
    deviation = (means.var(dim=1) + spread).sqrt()
    return tuple(means.mean(dim=1).tolist()), tuple(deviation.tolist())
