"""Streaming VAE decoder: latent in, frames out as they are decoded.

The feature caches live in two banks. A chunk reads one and writes the other, then they change
places: nothing is copied, and memory does not grow with the length of the video.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from wantrt.config import VAEConfig
from wantrt.device import Device
from wantrt.session import Session


class Decoder:
    def __init__(
        self, config: VAEConfig, sessions: Mapping[str, Sequence[Session]], device: Device
    ) -> None:
        self.config, self.device = config, device
        self.first = sessions["vae_decoder_first"][0]
        self.next = sessions["vae_decoder_next"][0]

    def decode(self, latent: Tensor) -> Iterator[Tensor]:
        """Yield pixels [1, 3, T, H, W] in [−1, 1]: 1 frame, then 4 at a time.

        latent: [1, z, F, h, w], normalised as the DiT sees it. A chunk is valid until the next.
        """
        cells = {"h": latent.shape[3], "w": latent.shape[4]}
        bank, spare = self._bank(cells), self._bank(cells)
        for index in range(latent.shape[2]):
            inputs = {"latent": latent[:, :, index : index + 1].contiguous()}
            outputs = {f"new_cache_{slot}": cache for slot, cache in enumerate(spare)}
            session = self.first if index == 0 else self.next
            if index > 0:
                inputs |= {f"cache_{slot}": cache for slot, cache in enumerate(bank)}
            yield session.run(inputs, outputs)["pixels"]
            bank, spare = spare, bank

    def _bank(self, cells: Mapping[str, int]) -> list[Tensor]:
        specs = [spec for name, spec in self.next.inputs.items() if name.startswith("cache_")]
        return [self.device.empty(spec.concrete(cells), spec.dtype) for spec in specs]


def to_frames(pixels: Tensor) -> Tensor:
    """[1, 3, T, H, W] in [−1, 1] -> uint8 [T, H, W, 3], truncated as the official code does."""
    frames = ((pixels[0] + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    return frames.permute(1, 2, 3, 0).contiguous().cpu()
