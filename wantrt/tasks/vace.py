"""VACE: source video, mask and reference images become one context of 96 channels.

Where the mask is set (255) the video is made anew, elsewhere it is kept. The context is, by
channels, what is kept (16), what is to change (16) and the mask (64); by time, the references and
then the frames. Sources: the official `wan/vace.py` and `wan/utils/vace_processor.py`; diffusers'
`WanVACEPipeline`, which differs in sizes, filters and the order of the references.
"""

import logging
import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from wantrt.config import Size
from wantrt.encoders import Frames
from wantrt.errors import SettingsError
from wantrt.images import Pixels, check_pixels
from wantrt.names import check_name
from wantrt.tasks.conditioning import Conditioning, Encode
from wantrt.tasks.fitting import (
    FITS,
    GREY,
    TEMPORAL_STRIDE,
    WHITE,
    centre_crop,
    check_frames,
    cover_size,
    inner_size,
    letterbox,
    resize_lanczos,
    size_of,
    to_tensor,
)
from wantrt.videos import Footage

log = logging.getLogger("wantrt")

Mask = NDArray[np.uint8]  # [T, H, W]; 255: made anew, 0: kept

CELL = 8  # pixels of a latent cell, each way
STEP = 16  # pixels of a token, each way
CHANNELS = 96


def video_size_and_frames(
    source_size: Size,
    source_frames: int,
    size: Size,
    num_frames: int,
    fit: str,
    convention: str,
    frames_given: bool = False,
) -> tuple[Size, int]:
    """The video's size and number of frames for a source video.

    `size` and `num_frames` are those asked for, else the variant's. Unless `frames_given`, the
    source's length rules, as far as it makes a video no longer than `num_frames` (with fit "area"
    under the official convention: with no more tokens). Raises SettingsError for frames that are
    not 4n + 1 and for a source too narrow to have a size.
    """
    check_name("fit", fit, FITS)
    check_frames(num_frames)
    length = num_frames if frames_given else source_frames
    if fit == "area" and convention != "diffusers":
        return _official_size(source_size, length, size[0] * size[1], num_frames)
    frames = num_frames if frames_given else min(_whole(length), num_frames)
    if fit in ("area", "stretch") and convention == "diffusers":
        return _diffusers_size(source_size, size), frames
    return size, frames


def _official_size(source_size: Size, length: int, area: int, num_frames: int) -> tuple[Size, int]:
    """Small sources stay small and may be longer: the number of tokens is what is limited."""
    width, height = source_size
    tokens = area // STEP**2  # of a latent frame
    most_tokens = tokens * ((num_frames - 1) // TEMPORAL_STRIDE + 1)
    tokens = min(tokens, (height // STEP) * (width // STEP))
    if not tokens:
        raise SettingsError(_too_narrow(source_size))
    latent_frames = min((length - 1) // TEMPORAL_STRIDE + 1, most_tokens // tokens)
    tokens = min(tokens, most_tokens // latent_frames)
    high = round(math.sqrt(tokens * (height / width)))
    wide = int(tokens / high) if high else 0
    if not wide:
        raise SettingsError(_too_narrow(source_size))
    return (wide * STEP, high * STEP), (latent_frames - 1) * TEMPORAL_STRIDE + 1


def _diffusers_size(source_size: Size, size: Size) -> Size:
    """Never larger than the source, in its aspect ratio, cut down to multiples of 16."""
    width, height = source_size
    if width * height > size[0] * size[1]:
        scale = min(size[0] / width, size[1] / height)
        width, height = int(width * scale), int(height * scale)
    if width < STEP or height < STEP:
        raise SettingsError(_too_narrow(source_size))
    return width // STEP * STEP, height // STEP * STEP


def _whole(length: int) -> int:
    return (length - 1) // TEMPORAL_STRIDE * TEMPORAL_STRIDE + 1


def _too_narrow(source_size: Size) -> str:
    width, height = source_size
    return f"a source video of {width}x{height} is too small or too narrow; give a --size and --fit"


def choose_frames(times: Sequence[Fraction], num_frames: int) -> list[int]:
    """Which frames of a source video to read for a video of `num_frames`: indices, ascending.

    times: of each frame, in seconds. A source that is longer is sampled evenly from its first frame
    to its last, as the official code does; of a shorter one all frames are taken.
    """
    if len(times) <= num_frames:
        return list(range(len(times)))
    if num_frames == 1:
        return [0]
    span = times[-1] - times[0]
    ends = [*(time - times[0] for time in times[1:]), span + span / (len(times) - 1)]
    duration = (span + ends[-1]) / 2  # to the middle of the last frame
    chosen, frame = [], 0
    for i in range(num_frames):
        moment = duration * i / (num_frames - 1)
        while ends[frame] < moment:
            frame += 1
        chosen.append(frame)
    return chosen


def read_source(
    video: Footage, mask: Footage | None, num_frames: int
) -> tuple[Frames, Mask | None]:
    """The frames of a source video that a video of `num_frames` takes, and the mask's beside them.

    Raises SettingsError for a mask of another length or size, before anything is read.
    """
    if mask is not None:
        check_mask(video.size, len(video), mask.size, len(mask))
    chosen = choose_frames(video.times, num_frames)
    frames = video.read(chosen)
    if mask is None:
        return frames, None
    return frames, mask.read_mask(chosen if len(mask) > 1 else [0])


def condition(
    video: Frames | None,
    mask: Mask | None,
    references: Sequence[Pixels],
    num_frames: int,
    size: Size,
    encode: Encode,
    convention: str = "official",
    fit: str = "area",
) -> Conditioning:
    """Make the context of a video of `num_frames` and `size`, whose sides are multiples of 16.

    video: uint8 [T, H, W, 3], or None: all is made anew. mask: uint8 [T, H, W], or [1, H, W] for
    all frames, or None: all is made anew, with the video as a guide. references: uint8 [H, W, 3].
    Frames that a shorter video lacks, and with fit "pad" the border around it, are made anew.

    Gives `vace_context` [1, 96, F + references, H, W] and `reference_frames`. Raises SettingsError
    for a mask without a video or of another length or size, and for a video that is too long.
    """
    check_inputs(video, mask, num_frames, size)
    pixels, masks = _fit_source(video, mask, num_frames, size, convention, fit)
    anew = (masks > 0.5).to(pixels.dtype)
    latents = [encode(pixels * (1 - anew)), encode(pixels * anew)]
    context = torch.cat((*latents, mask_channels(masks).to(latents[0].device)), dim=1)
    leading = [_reference_context(image, size, encode, convention) for image in references]
    if convention == "diffusers":
        leading.reverse()  # it puts each reference before the one given before it
    return Conditioning(
        vace_context=torch.cat((*leading, context), dim=2), reference_frames=len(leading)
    )


def check_inputs(video: Frames | None, mask: Mask | None, num_frames: int, size: Size) -> None:
    """Raise SettingsError unless video, mask, length and size go together."""
    check_frames(num_frames)
    if any(side < STEP or side % STEP for side in size):
        raise SettingsError(f"size {size[0]}x{size[1]} is not a multiple of {STEP}")
    if video is None:
        if mask is not None:
            raise SettingsError("a mask needs the video that it is for; give one with --video")
        return
    if not len(video):
        raise SettingsError("the source video has no frames")
    check_pixels(video[0])
    if len(video) > num_frames:
        raise SettingsError(
            f"the source video has {len(video)} frames for a video of {num_frames}; "
            f"give --frames {_whole(len(video) + 3)} or cut it"
        )
    if mask is not None:
        check_mask(size_of(video), len(video), (mask.shape[2], mask.shape[1]), len(mask))


def check_mask(video_size: Size, video_frames: int, mask_size: Size, mask_frames: int) -> None:
    """Raise SettingsError unless a mask has the size of its video, and its length or one frame."""
    if mask_size != video_size:
        raise SettingsError(
            f"the mask is {mask_size[0]}x{mask_size[1]} and the video "
            f"{video_size[0]}x{video_size[1]}; they must be of one size"
        )
    if mask_frames not in (1, video_frames):
        raise SettingsError(
            f"the mask has {mask_frames} frames and the video {video_frames}; "
            "give as many, or one image for all"
        )


def _fit_source(
    video: Frames | None,
    mask: Mask | None,
    num_frames: int,
    size: Size,
    convention: str,
    fit: str,
) -> tuple[Tensor, Tensor]:
    """Pixels fp32 [1, 3, T, height, width] in [-1, 1] and mask fp32 [1, 1, T, …] in [0, 1]."""
    width, height = size
    pixels = torch.full((1, 3, num_frames, height, width), GREY)
    masks = torch.ones(1, 1, num_frames, height, width)
    if video is None:
        return pixels, masks
    if len(video) < num_frames:
        log.warning(
            "the source video has %d of %d frames; the rest is made anew", len(video), num_frames
        )
    for i, frame in enumerate(video):
        pixels[0, :, i] = _fit_frame(frame, size, convention, fit, GREY)
        if mask is not None:
            of_frame = mask[min(i, len(mask) - 1)]
            fitted = _fit_frame(of_frame, size, convention, fit, WHITE)
            masks[0, :, i] = ((fitted + 1) / 2).clamp(0, 1)
    return pixels, masks


def _fit_frame(
    frame: Pixels | Mask, size: Size, convention: str, fit: str, border: float
) -> Tensor:
    """uint8 [H, W, 3] or [H, W] -> fp32 [3 or 1, height, width] in [-1, 1]."""
    resize = resize_lanczos if convention == "diffusers" else _resize_antialiased
    source_size = frame.shape[1], frame.shape[0]
    if fit == "pad":
        return letterbox(resize(frame, inner_size(source_size, size)), size, border)
    if fit == "stretch" or (fit == "area" and convention == "diffusers"):
        return resize(frame, size)
    return centre_crop(resize(frame, cover_size(source_size, size)), size)


def _resize_antialiased(frame: Pixels | Mask, size: Size) -> Tensor:
    """The official filter for videos: bicubic with antialiasing, rounded to 8 bits."""
    if frame.shape[1::-1] != size:
        pixels = torch.from_numpy(np.ascontiguousarray(frame.reshape(1, *frame.shape[:2], -1)))
        resized = F.interpolate(
            pixels.permute(0, 3, 1, 2), size[::-1], mode="bicubic", antialias=True
        )
        frame = resized[0].permute(1, 2, 0).numpy()
    return to_tensor(frame)


def mask_channels(masks: Tensor) -> Tensor:
    """Mask fp32 [1, 1, T, height, width] in latent cells: [1, 64, (T + 3) // 4, H, W].

    Channel 8r + c is the pixel in row r and column c of each cell; in time the nearest is taken.
    """
    frames, height, width = masks.shape[2:]
    cells = F.pixel_unshuffle(masks[0, 0][:, None], CELL)  # [T, 64, H, W]
    shape = ((frames + TEMPORAL_STRIDE - 1) // TEMPORAL_STRIDE, height // CELL, width // CELL)
    return F.interpolate(cells.transpose(0, 1)[None], shape, mode="nearest-exact")


def _reference_context(image: Pixels, size: Size, encode: Encode, convention: str) -> Tensor:
    """A reference in one latent frame [1, 96, 1, H, W]: its latent, and nothing to change."""
    pixels = place_reference(image, size, convention)
    latent = encode(pixels[None, :, None])
    return F.pad(latent, (0, 0, 0, 0, 0, 0, 0, CHANNELS - latent.shape[1]))


def check_reference(size: Size, convention: str) -> None:
    """Raises SettingsError for a reference image that the convention makes nothing of."""
    if convention == "diffusers" and min(size) < CELL:
        raise SettingsError(
            f"a reference image of {size[0]}x{size[1]} is too small; give one of {CELL}x{CELL} "
            "pixels or more"
        )


def place_reference(image: Pixels, size: Size, convention: str = "official") -> Tensor:
    """A reference image uint8 [H, W, 3], whole, on a white canvas fp32 [3, height, width]."""
    check_pixels(image)
    its_size = size_of(image)
    if convention == "diffusers":  # its processor first cuts sizes down to whole cells
        check_reference(its_size, convention)
        its_size = its_size[0] // CELL * CELL, its_size[1] // CELL * CELL
        pixels = resize_lanczos(image, its_size)
    else:
        pixels = to_tensor(image)
    if its_size == size:
        return pixels
    scale = min(size[1] / its_size[1], size[0] / its_size[0])
    inner = (max(int(its_size[1] * scale), 1), max(int(its_size[0] * scale), 1))
    resized = F.interpolate(pixels[None], inner, mode="bilinear", align_corners=False)[0]
    return letterbox(resized, size, WHITE)
