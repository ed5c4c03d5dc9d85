"""How alike two videos are: PSNR and SSIM, as the field computes them.

LPIPS, which is often beside them, is left out: no package brings the weights of the network that it
needs with it, and a measurement that downloads them from elsewhere cannot be repeated.
"""

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

Frames = NDArray[np.uint8]  # [T, H, W, 3]

PEAK = 255.0
SIGMA, RADIUS = 1.5, 5  # of the Gaussian window, 11x11
C1, C2 = (0.01 * PEAK) ** 2, (0.03 * PEAK) ** 2


def psnr(frames: Frames, reference: Frames) -> float:
    """In dB over all values of a video; infinite for equal ones."""
    error = np.mean((frames.astype(np.float64) - reference) ** 2)
    return float("inf") if error == 0 else float(10 * np.log10(PEAK**2 / error))


def ssim(frames: Frames, reference: Frames) -> float:
    """Mean over all windows, channels and frames; 1 for equal videos.

    Wang, Bovik, Sheikh, Simoncelli: Image Quality Assessment, 2004: a Gaussian window of 11x11 that
    lies within the picture, whose sides must be at least 11 long.
    """
    return float(np.mean([_ssim(a, b) for a, b in zip(frames, reference, strict=True)]))


def _ssim(frame: NDArray[np.uint8], reference: NDArray[np.uint8]) -> float:
    x, y = (
        torch.tensor(f, dtype=torch.float64).permute(2, 0, 1)[:, None] for f in (frame, reference)
    )
    offset = torch.arange(-RADIUS, RADIUS + 1, dtype=torch.float64)
    line = torch.exp(-(offset**2) / (2 * SIGMA**2))
    line /= line.sum()

    def blurred(plane: torch.Tensor) -> torch.Tensor:
        return F.conv2d(F.conv2d(plane, line.view(1, 1, -1, 1)), line.view(1, 1, 1, -1))

    mean_x, mean_y = blurred(x), blurred(y)
    var_x = blurred(x * x) - mean_x**2
    var_y = blurred(y * y) - mean_y**2
    covariance = blurred(x * y) - mean_x * mean_y
    likeness = (2 * mean_x * mean_y + C1) * (2 * covariance + C2)
    return float((likeness / ((mean_x**2 + mean_y**2 + C1) * (var_x + var_y + C2))).mean())
