"""Says what a clip shows, by simple image analysis: colour, outline and motion of the one object.

The object is what differs from the picture's border. Its colour is the nearest of the palette; its
outline is told by rotation moments (a shape with n corners has an n-fold moment and no other), its
motion by how place, area and angle change. Knows nothing of prompts or models; numpy alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wantrt.nano.scenes import COLOURS

Array = NDArray[np.float64]

# What `_outline` gives for each shape, measured on drawn clips: strength of the 2-, 3-, 4- and
# 5-fold moments, and the inertia beyond a disc's.
OUTLINES = {
    "circle": (0.0, 0.0, 0.0, 0.0, 0.0),
    "square": (0.0, 0.0, 0.43, 0.0, 0.05),
    "triangle": (0.0, 0.66, 0.0, 0.0, 0.21),
    "star": (0.0, 0.0, 0.0, 0.82, 0.24),
}
OUTLINE_LIMIT = 0.4  # about half the way from one shape to another: further off it is neither
COLOUR_LIMIT = 80.0  # likewise, of 255
CORNERS = {"square": 4, "triangle": 3, "star": 5}


@dataclass(frozen=True)
class Verdict:
    """What one clip shows. None where it is like nothing we know.

    `steady` is the share of frames that by themselves show the clip's colour and shape.
    `colour_drift` is the mean change of the object's colour from frame to frame (of 255),
    `outline_drift` that of its outline (moments, about 0.5 from one shape to another).
    """

    colour: str | None
    shape: str | None
    motion: str | None
    collapsed: bool
    steady: float
    colour_drift: float
    outline_drift: float


@dataclass(frozen=True)
class Track:
    """The object in every frame: RGB colour [F, 3], outline [F, 5], place in picture widths
    [F, 2] (x, y), area as a share of the picture [F], complex moments [F, 6] by fold."""

    colour: Array
    outline: Array
    place: Array
    area: Array
    moments: NDArray[np.complex128]


def judge(frames: NDArray[np.uint8]) -> Verdict:
    """Look at a clip, uint8 [F, height, width, 3]."""
    pixels = frames.astype(np.float64)
    coverage, plain = find_object(pixels)
    area = coverage.mean(axis=(1, 2))
    if area.min() < 0.01 or area.max() > 0.6 or not plain:
        return Verdict(None, None, None, True, 0.0, float("nan"), float("nan"))
    track = follow(pixels, coverage)
    colour = nearest(np.median(track.colour, axis=0), COLOURS, COLOUR_LIMIT)
    shape = nearest(np.median(track.outline, axis=0), OUTLINES, OUTLINE_LIMIT)
    seen = [
        (nearest(c, COLOURS, COLOUR_LIMIT), nearest(o, OUTLINES, OUTLINE_LIMIT))
        for c, o in zip(track.colour, track.outline, strict=True)
    ]
    steady = sum(pair == (colour, shape) for pair in seen) / len(seen)
    drifts = [np.linalg.norm(np.diff(v, axis=0), axis=1) for v in (track.colour, track.outline)]
    return Verdict(
        colour=colour,
        shape=shape,
        motion=tell_motion(track, shape),
        collapsed=False,
        steady=steady,
        colour_drift=float(drifts[0].mean()),
        outline_drift=float(drifts[1].mean()),
    )


def find_object(pixels: Array) -> tuple[Array, bool]:
    """Share of each pixel that the object covers, [F, H, W]; and whether the border is plain."""
    border = np.concatenate(
        [pixels[:, 0], pixels[:, -1], pixels[:, :, 0], pixels[:, :, -1]], axis=1
    )
    background = np.median(border, axis=(0, 1))
    plain = np.median(np.linalg.norm(border - background, axis=-1)) < 20
    distance = np.linalg.norm(pixels - background, axis=-1)
    full = max(float(np.percentile(distance, 97)), 40.0)
    return np.clip((distance / full - 0.2) / 0.6, 0, 1), bool(plain)


def follow(pixels: Array, coverage: Array) -> Track:
    """Measure the object in every frame."""
    height, width = coverage.shape[1:]
    rows, columns = np.mgrid[0.5:height, 0.5:width]
    mass = coverage.sum(axis=(1, 2))
    place = np.stack([(coverage * axis).sum(axis=(1, 2)) / mass for axis in (columns, rows)], 1)
    core = (coverage > 0.9)[..., None]
    colour = (pixels * core).sum(axis=(1, 2)) / np.maximum(core.sum(axis=(1, 2)), 1)
    offset = (columns - place[:, :1, None]) - 1j * (rows - place[:, 1:, None])
    radius = np.abs(offset)
    coverage = coverage * (radius < 2.5 * np.sqrt(mass / np.pi)[:, None, None])  # drop far specks
    weight, reach, moments = coverage.astype(np.complex128), coverage.copy(), []
    for _ in range(6):  # sums of offset**n and of radius**n for n = 0 ... 5
        moments.append(weight.sum(axis=(1, 2)) / reach.sum(axis=(1, 2)))
        weight *= offset
        reach *= radius
    inertia = 2 * np.pi * (coverage * radius**2).sum(axis=(1, 2)) / mass**2 - 1
    outline = np.stack([*np.abs(moments[2:]), inertia], axis=1)
    return Track(colour, outline, place / width, mass / (height * width), np.stack(moments, axis=1))


def tell_motion(track: Track, shape: str | None) -> str | None:
    """The word for how the object moves, None when it stays as it is."""
    ends = max(len(track.area) // 8, 1)
    growth = np.sqrt(track.area[-ends:].mean() / track.area[:ends].mean())
    if growth > 1.35 or growth < 1 / 1.35:
        return "grow" if growth > 1 else "shrink"
    dx, dy = track.place[-ends:].mean(axis=0) - track.place[:ends].mean(axis=0)
    if _hops(track.place[:, 1]) >= 2:
        return "bounce"
    if max(abs(dx), abs(dy)) > 0.12:
        if abs(dx) > abs(dy):
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"
    if shape in CORNERS:
        corners = CORNERS[shape]
        turned = np.unwrap(np.angle(track.moments[:, corners])) / corners
        if abs(turned[-1] - turned[0]) > np.pi / 4:
            return "rotate"
    return None


def nearest(value: Array, known: Mapping[str, Sequence[float]], limit: float) -> str | None:
    """The name of the nearest known value, None if all are further than the limit."""
    distances = {name: float(np.linalg.norm(value - v)) for name, v in known.items()}
    best = min(distances, key=distances.__getitem__)
    return best if distances[best] < limit else None


def _hops(height: Array) -> int:
    """How often the path turns around after going at least an eighth of the picture."""
    turns, direction, extreme = 0, 0, height[0]
    for here in height:
        if direction == 0:
            if abs(here - extreme) > 0.125:
                direction, extreme = int(np.sign(here - extreme)), here
        elif (here - extreme) * direction > 0:
            extreme = here
        elif (extreme - here) * direction > 0.125:
            turns, direction, extreme = turns + 1, -direction, here
    return turns
