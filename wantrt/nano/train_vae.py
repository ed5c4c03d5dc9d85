"""First stage: the VAE, on crops of drawn clips at their full length.

Crops in space generalise to whole pictures, short clips do not generalise to long ones. The KL term
is far stronger than a VAE for compression would use: channels the clips do not need go quiet, the
others become smooth, and the decoder forgives what the transformer later gets slightly wrong.
About 0.9 s a step on two CPU cores.
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrt.config import VAEConfig
from wantrt.models.vae import VAE, Caches, FrameAttention, ResidualBlock
from wantrt.nano.clips import draw_clips, random_scenes
from wantrt.nano.loop import train
from wantrt.nano.scenes import split

CROP = 32
BATCH = 4
POOL = 768  # clips the crops are cut from
LEARNING_RATE = 1e-3
KL_WEIGHT = 1e-3


def train_vae(config: VAEConfig, file: Path, num_steps: int, seed: int = 0) -> VAE:
    """Train a VAE whose latent statistics are still those of no clip; `file` as in `loop.train`."""
    torch.manual_seed(seed)
    model = VAE(config)
    initialise(model)
    channels_last(model)
    pool = training_pixels(POOL, seed)

    def loss() -> Tensor:
        return vae_loss(model, random_crops(pool, BATCH))

    weights = train(
        model, loss, file, num_steps=num_steps, lr=LEARNING_RATE, average=0.99, seed=seed
    )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def vae_loss(model: VAE, pixels: Tensor) -> Tensor:
    """Loss of a batch of pixels [B, 3, T, H, W] in [-1, 1]."""
    moments = model.encoder.stream(pixels, Caches(None))
    mean, log_variance = moments.chunk(2, dim=1)
    log_variance = log_variance.clamp(-12, 4)
    latent = mean + torch.randn_like(mean) * (0.5 * log_variance).exp()
    difference = model.decoder.stream(latent, Caches(None)) - pixels
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
    edges = sum(difference.diff(dim=axis).abs().mean() for axis in (2, 3, 4))
    return difference.abs().mean() + difference.square().mean() + 0.25 * edges + KL_WEIGHT * kl


def refine_decoder(vae: VAE, file: Path, num_steps: int, seed: int = 0) -> None:
    """Train the decoder alone, for sharper edges; the encoder, and so the latents, stay.

    What counts here is each crop's root mean square error, which is its PSNR. The latents carry a
    part of the encoder's uncertainty, so that the decoder stays forgiving.
    """
    decoder = vae.decoder.requires_grad_(True).train()
    pool = training_pixels(POOL, seed + 1)

    def loss() -> Tensor:
        pixels = random_crops(pool, BATCH)
        with torch.no_grad():
            mean, log_variance = vae.encoder.stream(pixels, Caches(None)).chunk(2, dim=1)
            latent = mean + 0.3 * torch.randn_like(mean) * (0.5 * log_variance).exp()
        difference = decoder.stream(latent, Caches(None)) - pixels
        return difference.square().flatten(1).mean(dim=1).sqrt().mean() + difference.abs().mean()

    weights = train(
        decoder, loss, file, num_steps=num_steps, lr=LEARNING_RATE, average=0.99, seed=seed
    )
    decoder.load_state_dict(weights)
    decoder.eval().requires_grad_(False)


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Start near the identity: signals of ordinary size, quiet residual branches, no time mixing.

    Default initialisation loses 15 dB in the minutes that we can spend.
    """
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.Linear)):
            nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            nn.init.zeros_(module.bias)  # type: ignore[arg-type]
    for module in model.modules():
        if isinstance(module, ResidualBlock):
            module.conv2.weight.mul_(0.3)
        elif isinstance(module, FrameAttention):
            nn.init.zeros_(module.proj.weight)
        elif isinstance(module, nn.Conv3d) and module.kernel_size == (3, 1, 1):
            channels = module.in_channels
            nn.init.zeros_(module.weight)
            identity = torch.eye(channels).repeat(module.out_channels // channels, 1)
            module.weight[:, :, 2, 0, 0] = identity
    if isinstance(model, VAE):
        z_dim = model.encoder.config.z_dim
        model.encoder.quant_conv.bias[z_dim:] = -5.0  # type: ignore[index]


def channels_last(model: nn.Module) -> None:
    """Lay convolutions out by pixel, which on a CPU is a third faster for our few channels."""
    layouts = {4: torch.channels_last, 5: torch.channels_last_3d}
    for weight in model.parameters():
        if weight.ndim in layouts:
            weight.data = weight.data.to(memory_format=layouts[weight.ndim])


def training_pixels(count: int, seed: int) -> Tensor:
    """Clips of all training combinations, uint8 [count, 3, F, H, W]."""
    scenes = random_scenes(split()[0], count, random.Random(seed))
    parts = [draw_clips(scenes[i : i + 32], seed + i) for i in range(0, count, 32)]
    return torch.cat([part.permute(0, 4, 1, 2, 3) for part in parts])


def held_out_pixels(count: int) -> Tensor:
    """Clips of held-out combinations in [-1, 1], [count, 3, F, H, W]."""
    scenes = random_scenes(split()[1], count, random.Random(1))
    return to_signal(draw_clips(scenes, 1).permute(0, 4, 1, 2, 3))


def to_signal(pixels: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1]."""
    return pixels.float().div_(127.5).sub_(1)


def random_crops(pool: Tensor, count: int) -> Tensor:
    """Random windows of random clips, float32 [count, 3, F, CROP, CROP] in [-1, 1]."""
    clips, rows, columns = (
        torch.randint(limit, (count,)).tolist()
        for limit in (pool.shape[0], pool.shape[3] - CROP + 1, pool.shape[4] - CROP + 1)
    )
    windows = [
        pool[clip, :, :, row : row + CROP, column : column + CROP]
        for clip, row, column in zip(clips, rows, columns, strict=True)
    ]
    return to_signal(torch.stack(windows)).to(memory_format=torch.channels_last_3d)


@torch.no_grad()
def reconstruct(model: VAE, pixels: Tensor) -> Tensor:
    """Encode and decode whole clips [B, 3, T, H, W], one at a time."""
    return torch.cat([model.decode(model.encode(clip)[0])[0] for clip in pixels.split(1)])


def clip_psnr(pixels: Tensor, decoded: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each clip in dB, [B]; signals span [-1, 1]."""
    error = F.mse_loss(decoded, pixels, reduction="none").flatten(1).mean(dim=1)
    return 10 * torch.log10(4 / error)
