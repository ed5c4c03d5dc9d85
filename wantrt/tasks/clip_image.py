"""An image as the image encoder takes it: square, small, normalised with CLIP's statistics.

The two conventions differ wherever an image is not square: the official code squeezes it whole into
the square, without antialiasing; the image processor that diffusers uses shrinks it to cover the
square and cuts off the rest. Both take the image at its original size, not the video's.
"""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wantrt.images import Pixels
from wantrt.models.clip import IMAGE_MEAN, IMAGE_STD
from wantrt.names import check_name
from wantrt.tasks.fitting import centre_crop, size_of, to_tensor


def clip_pixels(
    images: Sequence[Pixels], convention: str = "official", image_size: int = 224
) -> Tensor:
    """Images uint8 [H, W, 3], each of its own size -> float32 [B, 3, image_size, image_size]."""
    ways = {"official": squeeze, "diffusers": cover}
    check_name("convention", convention, ways)
    return normalise(torch.stack([ways[convention](image, image_size) for image in images]))


def squeeze(image: Pixels, image_size: int) -> Tensor:
    """Bicubic without antialiasing, aspect ratio lost; it may overshoot [0, 1] and is not clamped.

    image: uint8 [H, W, 3] -> float32 [3, image_size, image_size].
    Source: the official ``wan/modules/clip.py``, ``CLIPModel.visual``.
    """
    square = (image_size, image_size)
    pixels = to_tensor(image)[None]
    return F.interpolate(pixels, square, mode="bicubic", align_corners=False)[0] * 0.5 + 0.5


def cover(image: Pixels, image_size: int) -> Tensor:
    """Pillow's bicubic to `image_size` along the shorter side, and the middle of that.

    image: uint8 [H, W, 3] -> float32 [3, image_size, image_size] in [0, 1].
    Source: transformers' ``CLIPImageProcessorPil``, as laion/CLIP-ViT-H-14 configures it.
    """
    from PIL import Image

    width, height = size_of(image)
    shorter = min(width, height)
    size = (image_size * width // shorter, image_size * height // shorter)
    resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    return centre_crop(_unit_range(np.asarray(resized)), (image_size, image_size))


def normalise(pixels: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] -> mean 0 and deviation 1 over CLIP's training images."""
    mean, std = (
        torch.tensor(values, device=pixels.device)[:, None, None]
        for values in (IMAGE_MEAN, IMAGE_STD)
    )
    return (pixels - mean) / std


def _unit_range(image: Pixels) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
