"""Where a run starts: Gaussian noise that depends on the seed alone.

The official code draws [C, F, H, W] from a generator on the GPU, diffusers the same count of
numbers with a batch of 1 in front: for one device and seed they are the same values. A CPU and a
CUDA generator give different ones; the CPU is the default because its noise is the same everywhere.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wantrt.errors import SettingsError


def draw_noise(shape: Sequence[int], seed: int, device: torch.device | str = "cpu") -> Tensor:
    """Standard normal float32 [1, C, F, H, W] on `device`, whose generator draws it.

    shape: (C, F, H, W) in latent cells. Raises SettingsError for a seed outside 0..2**64-1.
    """
    if not 0 <= seed < 2**64:
        raise SettingsError(f"seed is {seed}; use 0 to 2**64 - 1")
    generator = torch.Generator(device=device).manual_seed(seed)
    noise = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device=device)
    return noise.unsqueeze(0)  # [1, C, F, H, W]
