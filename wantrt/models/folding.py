"""Positions into channels and back: what the Wan 2.2 VAE does without parameters.

It folds pixels into channels before the encoder (`patchify`), and beside each of its stages runs a
shortcut that changes the resolution by averaging (`average_down`) or repeating (`duplicate_up`).
Nothing here remembers anything: of a stream, only its start is special.

Source: ``wan/modules/vae2_2.py`` (``patchify``, ``AvgDown3D``, ``DupUp3D``) of Wan-Video/Wan2.2.
"""

import torch.nn.functional as F
from torch import Tensor

Factors = tuple[int, int]  # by how much frames, and height and width, become fewer or more


def patchify(pixels: Tensor, size: int) -> Tensor:
    """[B, C, T, H, W] -> [B, C·size², T, H/size, W/size]; columns of a patch before its rows."""
    if size == 1:
        return pixels
    x = pixels.unflatten(4, (-1, size)).unflatten(3, (-1, size))  # [B, C, T, H, row, W, column]
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def unpatchify(x: Tensor, size: int) -> Tensor:
    """The inverse of `patchify`."""
    if size == 1:
        return x
    x = x.unflatten(1, (-1, size, size))  # [B, C, column, row, T, H, W]
    return x.permute(0, 1, 4, 5, 3, 6, 2).flatten(5, 6).flatten(3, 4)


def average_down(x: Tensor, starts_stream: bool, out_channels: int, factors: Factors) -> Tensor:
    """[B, C, T, H, W] -> [B, C', T/ft, H/fs, W/fs]: channels and offsets, averaged in groups.

    Channel c at offset (dt, dh, dw) is c·ft·fs² + dt·fs² + dh·fs + dw of C·ft·fs², of which every
    output channel is the mean of as many as there are for it. The first frame of a stream stands
    alone: zeros take the place of those before it.
    """
    time, space = factors
    if starts_stream and time > 1:
        x = F.pad(x, (0, 0, 0, 0, time - 1, 0))
    if time * space > 1:
        x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))
        x = x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)
    group = x.shape[1] // out_channels
    return x if group == 1 else x.unflatten(1, (out_channels, group)).mean(dim=2)


def duplicate_up(x: Tensor, starts_stream: bool, out_channels: int, factors: Factors) -> Tensor:
    """[B, C, T, H, W] -> [B, C', ft·T, fs·H, fs·W]: every value repeated, C' a divisor of C.

    Where C' is C, all of an output channel's offsets (dt, dh, dw) have the value of one input
    channel; where C' is smaller, the C / C' channels in its place are told apart by the first of
    these offsets. A stream's first frame stays one: the last of those it becomes.
    """
    time, space = factors
    sources, split = x.shape[1] // out_channels, []
    for factor in (time, space, space):
        split.append(min(factor, sources))
        sources //= split[-1]
    x = x.unflatten(1, (out_channels, *split)).permute(0, 1, 5, 2, 6, 3, 7, 4)
    x = x.expand(-1, -1, -1, time, -1, space, -1, space)  # [B, C', T, dt, H, dh, W, dw]
    x = x.flatten(6, 7).flatten(4, 5).flatten(2, 3)
    return x[:, :, time - 1 :] if starts_stream and time > 1 else x
