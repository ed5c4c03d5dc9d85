import random

import pytest
import torch

from wantrt.nano.clips import draw_clips, random_scenes
from wantrt.nano.scenes import SHAPES, Scene, combinations, split


def test_the_same_seed_draws_the_same_bytes():
    scenes = random_scenes(split()[0], 6, random.Random(0))
    assert torch.equal(draw_clips(scenes, 3), draw_clips(scenes, 3))
    assert not torch.equal(draw_clips(scenes, 3), draw_clips(scenes, 4))


@pytest.mark.parametrize(
    "size, num_frames", [((64, 64), 25), ((96, 96), 33), ((48, 80), 9)], ids=["usual", "big", "odd"]
)
def test_any_size_and_length(size, num_frames):
    clips = draw_clips(
        [Scene("red", "star", "rotate"), Scene("blue", "circle", "up")], 0, size, num_frames
    )
    assert clips.shape == (2, num_frames, *size, 3)
    assert clips.dtype == torch.uint8


def test_outlines_are_antialiased_and_of_similar_area():
    clips = draw_clips([Scene("blue", shape, "left", "white") for shape in SHAPES], 0).float()
    redness = clips[:, 12, :, :, 0]
    level = (redness - redness.amin((1, 2), True)) / (
        redness.amax((1, 2), True) - redness.amin((1, 2), True)
    )
    inside = 1 - level
    area = inside.mean((1, 2))
    assert area.min() > 0.08
    assert area.max() < 0.22
    assert (((inside > 0.1) & (inside < 0.9)).sum((1, 2)) > 4).all()


def test_objects_stay_inside_the_picture():
    scenes = [Scene(*combination, "white") for combination in combinations()]
    clips = draw_clips(scenes, 11).float()
    border = torch.cat((clips[:, :, 0], clips[:, :, -1], clips[:, :, :, 0], clips[:, :, :, -1]), 2)
    touched = (border - border.amax((1, 2, 3), True)).abs().amax(-1) > 60  # [B, F, border pixels]
    assert touched.float().mean() < 0.002  # a tip may brush the edge
