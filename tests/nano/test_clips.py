import random

import numpy as np
import pytest
import torch

from wantrt.nano.clips import (
    centred_paths,
    draw_clips,
    free_paths,
    middle_paths,
    random_scenes,
)
from wantrt.nano.scenes import MOTIONS, SHAPES, Scene, combinations, split


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


@pytest.mark.parametrize("make_paths", [centred_paths, free_paths])
def test_objects_stay_inside_the_picture(make_paths):
    scenes = [Scene(*combination, "white") for combination in combinations()]
    clips = draw_clips(scenes, 11, make_paths=make_paths).float()
    border = torch.cat((clips[:, :, 0], clips[:, :, -1], clips[:, :, :, 0], clips[:, :, :, -1]), 2)
    touched = (border - border.amax((1, 2, 3), True)).abs().amax(-1) > 60  # [B, F, border pixels]
    assert touched.float().mean() < 0.002  # a tip may brush the edge


def test_a_shape_at_rest_in_the_middle_does_not_tell_the_motion():
    images = [
        draw_clips([Scene("red", "star", motion)], 4, num_frames=1, make_paths=middle_paths)
        for motion in MOTIONS
    ]
    assert all(torch.equal(image, images[0]) for image in images)


def test_free_paths_start_in_the_middle_too_whatever_the_motion():
    scenes = [Scene("red", "square", motion) for motion in MOTIONS for _ in range(60)]
    paths = free_paths(scenes, np.random.default_rng(0), 25)
    first = torch.stack((paths.centre_x, paths.centre_y))[:, :, 0].view(2, len(MOTIONS), 60)
    assert ((first - 0.5).abs() < 0.08).any(dim=2).all()
