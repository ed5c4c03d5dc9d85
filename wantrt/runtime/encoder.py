"""Streaming VAE encoder: pixels in, normalised latent out, one latent frame at a time.

The mirror of decoder.py; it runs once or twice a generation and is not captured. Memory does not
grow with the length of the video, but for the video itself, which stays where it is.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from wantrt.config import VAEConfig
from wantrt.device import Device
from wantrt.session import Session, TensorSpec


def encode(
    config: VAEConfig, sessions: Mapping[str, Sequence[Session]], device: Device, pixels: Tensor
) -> Tensor:
    """Pixels float32 [1, 3, T, height, width] in [−1, 1] -> latent float32 [1, z, F, h, w].

    T = 4n + 1, F = n + 1. The latent is on the device, the pixels may be anywhere.
    """
    height, width = (side // config.spatial_stride for side in pixels.shape[3:])
    first, following = sessions["vae_encoder_first"][0], sessions["vae_encoder_next"][0]

    def make(spec: TensorSpec) -> Tensor:
        return device.empty(spec.concrete({"h": height, "w": width}), spec.dtype)

    caches = {n: s for n, s in following.inputs.items() if n.startswith("cache_")}
    banks = [{name: make(spec) for name, spec in caches.items()} for _ in range(2)]
    latents = []
    chunks = [pixels[:, :, :1], *pixels[:, :, 1:].split(config.temporal_stride, dim=2)]
    for index, chunk in enumerate(c for c in chunks if c.shape[2]):
        session = following if index else first
        old, new = banks[(index + 1) % 2], banks[index % 2]
        latent = make(session.outputs["latent"])
        session.run(
            {"pixels": chunk.to(device.torch_device).contiguous(), **(old if index else {})},
            {"latent": latent, **{f"new_{name}": cache for name, cache in new.items()}},
        )
        latents.append(latent)
    return torch.cat(latents, dim=2)
