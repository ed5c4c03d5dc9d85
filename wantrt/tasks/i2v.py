"""Image to video: the image is the first frame, the rest is grey; a mask says which is which.

Serves I2V of Wan 2.1 and 2.2 (A14B) alike; of 2.1 the CLIP features come besides (clip_image.py).
Source: the official `wan/image2video.py`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wantrt.config import Size
from wantrt.images import Pixels
from wantrt.tasks.conditioning import Conditioning, Encode
from wantrt.tasks.fitting import (
    GREY,
    TEMPORAL_STRIDE,
    Resize,
    check_frames,
    fit_image,
    resize_bicubic,
    resize_lanczos,
    size_by_area,
)


def video_size(image_size: Size, size: Size, fit: str, convention: str) -> Size:
    """The video's size: `size`, or with fit "area" one of its area in the image's aspect ratio."""
    if fit == "area":
        return size_by_area(image_size, size[0] * size[1], convention)
    return size


def condition(
    image: Pixels,
    num_frames: int,
    size: Size,
    encode: Encode,
    convention: str = "official",
    fit: str = "area",
) -> Conditioning:
    """Encode [image, grey, grey, …] and mark frame 0 as known.

    image: uint8 [H, W, 3]; `size` is the video's. Gives `channels` [1, 20, F, H, W]. Raises
    SettingsError for a number of frames that is not 4n + 1.
    """
    check_frames(num_frames)
    first = fit_image(image, size, fit, resize_of(convention))
    return encode_known({0: first}, num_frames, encode)


def resize_of(convention: str) -> Resize:
    """The filter for images: official bicubic without antialiasing, diffusers' Lanczos."""
    return resize_lanczos if convention == "diffusers" else resize_bicubic


def encode_known(known: dict[int, Tensor], num_frames: int, encode: Encode) -> Conditioning:
    """The channels behind the noise for a video of which some frames are known.

    known: frame -> pixels fp32 [3, height, width]. All other frames are grey, zero in [-1, 1].
    """
    shape = next(iter(known.values())).shape
    video = torch.full((1, 3, num_frames, *shape[1:]), GREY)
    for frame, pixels in known.items():
        video[0, :, frame] = pixels
    latent = encode(video)
    mask = frame_mask(tuple(known), num_frames, latent.shape[-2], latent.shape[-1])
    return Conditioning(channels=torch.cat((mask.to(latent.device), latent), dim=1))


def frame_mask(known: Sequence[int], num_frames: int, height: int, width: int) -> Tensor:
    """Which pixel frames are known, by latent cell: fp32 [1, 4, F, height, width].

    Channel k of latent frame f > 0 is pixel frame 4f - 3 + k; all four of latent frame 0 are pixel
    frame 0.
    """
    frames = torch.zeros(num_frames)
    frames[list(known)] = 1
    frames = torch.cat((frames[:1].expand(TEMPORAL_STRIDE), frames[1:]))
    mask = frames.view(-1, TEMPORAL_STRIDE).T  # [4, F]
    return mask[None, :, :, None, None].expand(-1, -1, -1, height, width)
