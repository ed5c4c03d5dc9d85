"""What a task hands to the denoising loop: plain tensors, whatever they were made of."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass

from torch import Tensor

Encode = Callable[[Tensor], Tensor]
"""The VAE's encoder: pixels fp32 [1, 3, T, height, width] in [-1, 1], T = 4n + 1 -> normalised
latent fp32 [1, z, F, H, W], F = n + 1."""


@dataclass(frozen=True, eq=False)
class Conditioning:
    """Everything but text that steers a generation; None where a task has no such thing.

    channels: fp32 [1, 20, F, H, W], mask 4 and condition latent 16, behind the noisy latent.
    image_features: fp32 [1, 257 or 514, 1280], CLIP's.
    vace_context: fp32 [1, 96, F + reference_frames, H, W]; vace_scale multiplies its hints.
    reference_frames: latent frames in front, dropped before decoding.
    first_frame: fp32 [1, 48, 1, H, W], normalised latent, imposed on latent frame 0.
    """

    channels: Tensor | None = None
    image_features: Tensor | None = None
    vace_context: Tensor | None = None
    vace_scale: float = 1.0
    reference_frames: int = 0
    first_frame: Tensor | None = None

    @property
    def kind(self) -> Hashable:
        """Equal where the same buffers and the same captured work serve both."""
        features = self.image_features
        return (
            self.channels is not None,
            None if features is None else features.shape[1],
            self.vace_context is not None,
            self.first_frame is not None,
        )


NO_CONDITIONING = Conditioning()
