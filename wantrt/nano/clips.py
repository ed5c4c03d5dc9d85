"""Draws the training clips: one antialiased shape that moves over a plain background.

Everything is measured in units of the picture's shorter side and of the clip's duration, so that
any size and any number of frames works. Deterministic: the same seed draws the same bytes.
About 60 clips of 64x64x25 a second on one CPU core.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wantrt.nano.scenes import BACKGROUNDS, COLOURS, RGB, Scene

# shape -> (corners, inner radius / outer radius, outer radius relative to the scene's radius).
# A polygon's inner radius is where the middle of its side lies.
OUTLINES: dict[str, tuple[int, float, float]] = {
    "circle": (64, math.cos(math.pi / 64), 1.0),
    "square": (4, math.cos(math.pi / 4), 1.27),
    "triangle": (3, math.cos(math.pi / 3), 1.40),
    "star": (5, 0.45, 1.38),
}


@dataclass(frozen=True)
class Paths:
    """How shapes move: centre_x, centre_y, radius (shorter sides), angle (radians), each [B, F]."""

    centre_x: Tensor
    centre_y: Tensor
    radius: Tensor
    angle: Tensor


def centred_paths(scenes: list[Scene], rng: np.random.Generator, num_frames: int) -> Paths:
    """Random but readable: the shape always stays inside, and always does what its word says.

    Paths lie around the picture's middle, so that the first frame gives the motion away.
    """
    batch = len(scenes)
    time = np.linspace(0.0, 1.0, num_frames)[None]  # [1, F]
    radius = rng.uniform(0.19, 0.22, (batch, 1))
    travel = rng.uniform(0.30, 0.34, (batch, 1)) * (time - 0.5)
    hop = rng.uniform(0.30, 0.36, (batch, 1)) * np.abs(np.sin(2 * np.pi * time))
    turn = rng.uniform(0.8, 1.1, (batch, 1)) * np.pi * time
    growth = np.exp(rng.uniform(0.42, 0.52, (batch, 1)) * (2 * time - 1))  # [B, F], 0.6 ... 1.6
    when = partial(_when, scenes)

    # Where the motion leaves room, the place varies more.
    x = 0.5 + rng.uniform(-1, 1, (batch, 1)) * (
        0.04 + 0.06 * when("up", "down", "bounce", "rotate")
    )
    y = 0.5 + rng.uniform(-1, 1, (batch, 1)) * (0.04 + 0.06 * when("left", "right", "rotate"))
    x = x + travel * (when("right") - when("left"))
    y = y + travel * (when("down") - when("up")) + (0.18 - hop) * when("bounce")
    exponent = when("grow") - when("shrink")
    radius = radius * growth**exponent * (1 - 0.12 * np.abs(exponent))
    angle = turn * when("rotate")
    return _as_paths(x, y, radius, angle)


def free_paths(scenes: list[Scene], rng: np.random.Generator, num_frames: int) -> Paths:
    """Every motion starts upright, of any size, anywhere where it stays inside the picture.

    From its middle every motion can start: there the first frame gives nothing away.
    """
    batch = len(scenes)
    time = np.linspace(0.0, 1.0, num_frames)[None]  # [1, F]
    when = partial(_when, scenes)
    travel = rng.uniform(0.17, 0.22, (batch, 1)) * time
    hop = rng.uniform(0.18, 0.23, (batch, 1)) * np.abs(np.sin(2 * np.pi * time))
    turn = rng.uniform(0.45, 0.60, (batch, 1)) * np.pi * time
    growth = np.exp(rng.uniform(0.48, 0.62, (batch, 1)) * time)  # up to 1.6 ... 1.9
    scale = growth ** (when("grow") - when("shrink"))
    radius = rng.uniform(0.14, 0.21, (batch, 1)) * scale
    radius *= np.minimum(1, 0.33 / radius.max(axis=1, keepdims=True))
    reach = 1.4 * radius  # as far as a corner

    def place(offset: NDArray[np.float64]) -> NDArray[np.float64]:
        first = (reach - offset).max(axis=1, keepdims=True)
        last = (1 - reach - offset).min(axis=1, keepdims=True)
        return rng.uniform(first, last) + offset

    x = place(travel * (when("right") - when("left")))
    y = place(travel * (when("down") - when("up")) - hop * when("bounce"))
    return _as_paths(x, y, radius, turn * when("rotate"))


def middle_paths(scenes: list[Scene], rng: np.random.Generator, num_frames: int) -> Paths:
    """Shapes that rest near the middle: first frames that suit every motion of `free_paths`."""
    x, y = rng.uniform(0.46, 0.54, (2, len(scenes), 1))
    radius = rng.uniform(0.15, 0.18, (len(scenes), 1))
    return _as_paths(x, y, radius, np.zeros((len(scenes), num_frames)))


MakePaths = Callable[[list[Scene], np.random.Generator, int], Paths]


def draw_clips(
    scenes: list[Scene],
    seed: int,
    size: tuple[int, int] = (64, 64),
    num_frames: int = 25,
    make_paths: MakePaths = centred_paths,
) -> Tensor:
    """Clips of the scenes, uint8 [B, F, height, width, 3]; ``size`` is (height, width)."""
    rng = np.random.default_rng(seed)
    paths = make_paths(scenes, rng, num_frames)
    coverage = draw_coverage([scene.shape for scene in scenes], paths, size)[..., None]
    colour = _shade([COLOURS[scene.colour] for scene in scenes], rng, spread=8)
    background = _shade([BACKGROUNDS[scene.background] for scene in scenes], rng, spread=8)
    return torch.lerp(background, colour, coverage).round_().to(torch.uint8)


def draw_coverage(shapes: list[str], paths: Paths, size: tuple[int, int]) -> Tensor:
    """How much of each pixel the shape covers, float32 in [0, 1], [B, F, height, width]."""
    height, width = size
    unit = min(height, width)
    corners, inner, scale = torch.tensor([OUTLINES[shape] for shape in shapes]).T  # [B] each
    rows = torch.arange(height).view(1, 1, -1, 1) + 0.5 - 0.5 * height
    columns = torch.arange(width).view(1, 1, 1, -1) + 0.5 - 0.5 * width
    dx = columns - unit * (paths.centre_x[..., None, None] - 0.5)
    dy = rows - unit * (paths.centre_y[..., None, None] - 0.5)
    # Fold the plane onto one half of one corner's sector: the outline becomes one straight edge,
    # from the outer corner (r, 0) to the inner one.
    half_sector = (math.pi / corners).view(-1, 1, 1, 1)
    turned = torch.atan2(dx, -dy) - paths.angle[..., None, None]  # clockwise from the top
    turned = turned - (half_sector == math.pi / 4) * (math.pi / 4)  # a square stands on its side
    folded = torch.remainder(turned + half_sector, 2 * half_sector).sub_(half_sector).abs_()
    distance = torch.hypot(dx, dy)
    outer = (unit * paths.radius * scale.view(-1, 1))[..., None, None]
    sine, cosine = half_sector.sin(), half_sector.cos()
    inner = inner.view(-1, 1, 1, 1)
    edge_x, edge_y = inner * cosine - 1, inner * sine  # direction of the edge, outer radius 1
    length = torch.hypot(edge_x, edge_y)
    outside: Tensor = (folded.cos().mul_(distance) - outer) * (edge_y / length)
    outside -= folded.sin_().mul_(distance) * (edge_x / length)
    return outside.neg_().add_(0.5).clamp_(0, 1)


def random_scenes(
    combinations: list[tuple[str, str, str]], count: int, rng: random.Random
) -> list[Scene]:
    """Scenes drawn evenly from (colour, shape, motion) combinations, on random backgrounds."""
    chosen = [combinations[i % len(combinations)] for i in range(count)]
    rng.shuffle(chosen)
    return [Scene(*combination, rng.choice(list(BACKGROUNDS))) for combination in chosen]


def _when(scenes: list[Scene], *motions: str) -> NDArray[np.float64]:
    """One for each scene that has one of the motions, else zero, [B, 1]."""
    return np.array([[float(scene.motion in motions)] for scene in scenes])


def _as_paths(*values: NDArray[np.float64]) -> Paths:
    """x, y, radius and angle, each [B, F] or [B, 1] but for the last."""
    shape = values[-1].shape
    return Paths(*(torch.from_numpy(np.broadcast_to(v, shape).copy()).float() for v in values))


def _shade(colours: list[RGB], rng: np.random.Generator, spread: int) -> Tensor:
    """Each colour a little lighter or darker, float32 [B, 1, 1, 1, 3] in [0, 255]."""
    base = np.array(colours, dtype=np.float32)[:, None, None, None]
    shift = rng.uniform(-spread, spread, (len(colours), 1, 1, 1, 1))
    return torch.from_numpy(np.clip(base + shift, 0, 255).astype(np.float32))
