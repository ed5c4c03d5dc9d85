"""Which size a video gets from what it is made of, and pixels brought to that size.

Four ways to fit (`FITS`): *area* lets the video's size follow the image, at a given area; *crop*
covers a given size and cuts off the rest; *pad* puts the whole image on black; *stretch* ignores
the aspect ratio, as the diffusers pipelines do. Formulas of sizes and filters: the official Wan2.1
and Wan2.2 code (`wan/image2video.py`, `wan/utils/utils.py`) and diffusers' `VideoProcessor`.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from wantrt.config import Size
from wantrt.errors import SettingsError
from wantrt.images import Pixels
from wantrt.names import check_name

FITS = ("crop", "pad", "area", "stretch")
TEMPORAL_STRIDE = 4  # pixel frames in a latent frame, of either VAE
BLACK, GREY, WHITE = -1.0, 0.0, 1.0  # in the range of pixels that the VAE sees

Resize = Callable[[Pixels, Size], Tensor]


def choose_fit(fit: str | None, size_given: bool, convention: str) -> str:
    """The fit that was asked for, or what the convention does without one.

    Official: the size follows the image, unless a size was given, which is then kept by cropping.
    Diffusers: the image is stretched.
    """
    if fit is not None:
        check_name("fit", fit, FITS)
        return fit
    if convention == "diffusers":
        return "stretch"
    return "crop" if size_given else "area"


def check_frames(num_frames: int, fewest: int = 1) -> None:
    """Raise SettingsError, with the nearest that will do, unless it is 4n + 1 and not too few."""
    stride = TEMPORAL_STRIDE
    if num_frames >= fewest and (num_frames - 1) % stride == 0:
        return
    below = (num_frames - 1) // stride * stride + 1
    options = [str(count) for count in (below, below + stride) if count >= fewest] or [str(fewest)]
    raise SettingsError(
        f"{num_frames} frames is not {stride}n + 1 and at least {fewest}; "
        f"nearest: {' or '.join(options)}"
    )


def size_of(image: Pixels) -> Size:
    """(width, height) of pixels [..., H, W, 3]."""
    return image.shape[-2], image.shape[-3]


def size_by_area(image_size: Size, area: int, convention: str, step: int = 16) -> Size:
    """A size (multiples of `step`) of at most about `area` pixels in the image's aspect ratio.

    Official: in float64 and in this order, so that an image of exactly 832x480, at its own area,
    becomes 832x464: the root is 479.99999999999994. Diffusers: the recipe of its documentation,
    which rounds the root first. Raises SettingsError for an image too narrow to have such a size.
    """
    _check_area(area)
    width, height = image_size
    aspect = height / width
    high, wide = math.sqrt(area * aspect), math.sqrt(area / aspect)
    if convention == "diffusers":
        return _not_empty((round(wide) // step * step, round(high) // step * step), image_size)
    patch = 2
    stride = step // patch
    latent_height = round(high // stride // patch * patch)
    latent_width = round(wide // stride // patch * patch)
    return _not_empty((latent_width * stride, latent_height * stride), image_size)


def best_output_size(image_size: Size, area: int, step: int = 32) -> Size:
    """The official size of TI2V: multiples of `step`, at most `area`, nearest in aspect ratio.

    Raises SettingsError for an image too narrow to have such a size.
    """
    _check_area(area)
    width, height = image_size
    ratio = width / height
    wide = (area * ratio) ** 0.5
    high = area / wide
    width_1 = int(wide // step * step)
    height_2 = int(high // step * step)
    if not width_1 or not height_2:
        raise SettingsError(_too_narrow(image_size))
    by_width = (width_1, int(area / width_1 // step * step))
    by_height = (int(area / height_2 // step * step), height_2)
    if not by_width[1] or not by_height[0]:
        raise SettingsError(_too_narrow(image_size))

    def error(size: Size) -> float:
        its_ratio = size[0] / size[1]
        return max(ratio / its_ratio, its_ratio / ratio)

    return by_width if error(by_width) < error(by_height) else by_height


def _not_empty(size: Size, image_size: Size) -> Size:
    if not all(size):
        raise SettingsError(_too_narrow(image_size))
    return size


def _check_area(area: int) -> None:
    if area < 1:
        raise SettingsError("a video's width and height must be positive; give another --size")


def _too_narrow(image_size: Size) -> str:
    width, height = image_size
    return f"an image of {width}x{height} is too narrow for a video; crop it, or give a --size"


def resize_bicubic(image: Pixels, size: Size) -> Tensor:
    """The official I2V filter: bicubic without antialiasing, in fp32; it may overshoot [-1, 1].

    image: uint8 [H, W, 3] -> fp32 [3, height, width].
    """
    width, height = size
    pixels = to_tensor(image)[None]
    return F.interpolate(pixels, (height, width), mode="bicubic", align_corners=False)[0]


def resize_lanczos(image: Pixels, size: Size) -> Tensor:
    """Pillow's Lanczos filter, which rounds to 8 bits: diffusers' default, and official TI2V's.

    image: uint8 [H, W, 3] or [H, W] -> fp32 [3 or 1, height, width] in [-1, 1].
    """
    from PIL import Image

    return to_tensor(np.array(Image.fromarray(image).resize(size, Image.Resampling.LANCZOS)))


def to_tensor(image: Pixels) -> Tensor:
    """uint8 [H, W, 3] or [H, W] -> fp32 [3 or 1, H, W] in [-1, 1]."""
    if image.ndim == 2:
        image = image[:, :, None]
    pixels = torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1)
    return pixels.float() / 255 * 2 - 1


def fit_image(image: Pixels, size: Size, fit: str, resize: Resize) -> Tensor:
    """Bring an image uint8 [H, W, 3] to `size`: fp32 [3, height, width], about in [-1, 1].

    *area* is like *stretch* here: the size has already followed the image, up to rounding.
    """
    check_name("fit", fit, FITS)
    if fit == "crop":
        covering = cover_size(size_of(image), size)
        return centre_crop(resize(image, covering), size)
    if fit == "pad":
        return letterbox(resize(image, inner_size(size_of(image), size)), size, BLACK)
    return resize(image, size)


def cover_size(image_size: Size, size: Size) -> Size:
    """The smallest size of the image's aspect ratio that covers `size`."""
    scale = max(size[0] / image_size[0], size[1] / image_size[1])
    width, height = (round(side * scale) for side in image_size)
    return max(width, size[0]), max(height, size[1])


def inner_size(image_size: Size, size: Size) -> Size:
    """The largest size of the image's aspect ratio that fits into `size`."""
    scale = min(size[0] / image_size[0], size[1] / image_size[1])
    width, height = (max(round(side * scale), 1) for side in image_size)
    return min(width, size[0]), min(height, size[1])


def centre_crop(pixels: Tensor, size: Size) -> Tensor:
    """[..., H, W] -> [..., height, width]; an odd pixel more is lost at the right and bottom."""
    width, height = size
    top, left = (pixels.shape[-2] - height) // 2, (pixels.shape[-1] - width) // 2
    return pixels[..., top : top + height, left : left + width]


def letterbox(pixels: Tensor, size: Size, border: float) -> Tensor:
    """[..., H, W] in the middle of [..., height, width], on a border of one value."""
    width, height = size
    canvas = pixels.new_full((*pixels.shape[:-2], height, width), border)
    top, left = (height - pixels.shape[-2]) // 2, (width - pixels.shape[-1]) // 2
    canvas[..., top : top + pixels.shape[-2], left : left + pixels.shape[-1]] = pixels
    return canvas
