"""Streaming VAE decoder: latent in, frames out as they are decoded.

The feature caches live in two banks. A chunk reads one and writes the other, then they change
places: nothing is copied, and memory does not grow with the length of the video. So there are two
kinds of next chunk, even and odd, and each is captured once.
"""

from collections.abc import Generator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from wantrt.config import VAEConfig
from wantrt.device import Device
from wantrt.runtime.capture import Repeated
from wantrt.session import Session, TensorSpec


class Decoder:
    """Decodes one latent after another. Banks and captured chunks of the last size stay, unless
    `keep` is False."""

    def __init__(
        self,
        config: VAEConfig,
        sessions: Mapping[str, Sequence[Session]],
        device: Device,
        *,
        keep: bool = True,
    ) -> None:
        self.config, self.sessions, self.device, self.keep = config, sessions, device, keep
        self._banks: _Banks | None = None
        self._next: list[Repeated] = []  # the next chunk: from bank 0 into 1, and back

    def decode(self, latent: Tensor) -> Generator[Tensor]:
        """Yield pixels [1, 3, T, H, W] in [−1, 1]: 1 frame, then 4 at a time.

        latent: [1, z, F, h, w], normalised as the DiT sees it. A chunk is valid until the next.
        """
        height, width = latent.shape[3:]
        banks = self._banks_for(height, width)
        try:
            for index, cell in enumerate(latent.split(1, dim=2)):
                banks.latent.copy_(cell)
                if index == 0:
                    banks.run_first()
                    yield banks.first_pixels
                else:
                    self._next[(index - 1) % 2]()
                    yield banks.pixels
        finally:
            del banks
            if not self.keep:
                self.forget()

    def forget(self) -> None:
        """Free the banks and what was captured."""
        self._banks, self._next = None, []

    def _banks_for(self, height: int, width: int) -> "_Banks":
        """height, width: latent cells."""
        if self._banks is None or self._banks.size != (height, width):
            self.forget()  # the old ones are freed before the new ones are made
            banks = self._banks = _Banks(height, width, self.sessions, self.device)
            what = f"the decoder's chunk of {height}x{width} cells"
            self._next = [
                Repeated(what, partial(banks.run_next, bank), self.device) for bank in (0, 1)
            ]
        return self._banks


class _Banks:
    """Both banks of caches and the buffers of a chunk, for one size."""

    def __init__(
        self,
        height: int,
        width: int,
        sessions: Mapping[str, Sequence[Session]],
        device: Device,
    ) -> None:
        self.size = (height, width)  # latent cells
        self.first, self.next = sessions["vae_decoder_first"][0], sessions["vae_decoder_next"][0]

        def make(spec: TensorSpec) -> Tensor:
            return device.empty(spec.concrete({"h": height, "w": width}), spec.dtype)

        self.latent = make(self.next.inputs["latent"])
        self.first_pixels = make(self.first.outputs["pixels"])
        self.pixels = make(self.next.outputs["pixels"])
        specs = [spec for name, spec in self.next.inputs.items() if name.startswith("cache_")]
        self.banks = [[make(spec) for spec in specs] for _ in range(2)]

    def run_first(self) -> None:
        """`latent` -> `first_pixels` and bank 0."""
        outputs = {"pixels": self.first_pixels, **_named("new_cache", self.banks[0])}
        self.first.run({"latent": self.latent}, outputs)

    def run_next(self, bank: int) -> None:
        """`latent` and a bank -> `pixels` and the other bank."""
        self.next.run(
            {"latent": self.latent, **_named("cache", self.banks[bank])},
            {"pixels": self.pixels, **_named("new_cache", self.banks[1 - bank])},
        )


def _named(prefix: str, caches: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}_{slot}": cache for slot, cache in enumerate(caches)}


def to_frames(pixels: Tensor) -> Tensor:
    """[1, 3, T, H, W] in [−1, 1] -> uint8 [T, H, W, 3], truncated as the official code does."""
    frames = ((pixels[0] + 1) / 2 * 255).clamp(0, 255).to(torch.uint8)
    return frames.permute(1, 2, 3, 0).contiguous().cpu()
