import random

import numpy as np
import pytest

from wantrt.nano.clips import centred_paths, draw_clips, free_paths, random_scenes
from wantrt.nano.judge import judge
from wantrt.nano.scenes import BACKGROUNDS, Scene, combinations

ASPECTS = ("colour", "shape", "motion")


@pytest.fixture(scope="module", params=[centred_paths, free_paths])
def judged(request):
    """300 drawn clips of every combination, what they show and what the judge says."""
    scenes = random_scenes(combinations(), 300, random.Random(5))
    clips = draw_clips(scenes, 99, make_paths=request.param).numpy()
    return scenes, [judge(clip) for clip in clips]


def right(scenes, verdicts):
    return {
        aspect: np.mean(
            [
                getattr(s, aspect) == getattr(v, aspect)
                for s, v in zip(scenes, verdicts, strict=True)
            ]
        )
        for aspect in ASPECTS
    }


def test_right_on_real_clips(judged):
    shares = right(*judged)
    assert min(shares.values()) >= 0.99
    assert not any(verdict.collapsed for verdict in judged[1])


def test_at_chance_when_prompts_are_shuffled(judged):
    scenes, verdicts = judged
    shuffled = random.Random(0).sample(scenes, len(scenes))
    shares = right(shuffled, verdicts)
    for aspect, chance in zip(ASPECTS, (1 / 8, 1 / 4, 1 / 8), strict=True):
        assert abs(shares[aspect] - chance) < 0.08


def test_real_clips_are_steady(judged):
    assert np.mean([verdict.steady for verdict in judged[1]]) > 0.99
    assert np.mean([verdict.outline_drift for verdict in judged[1]]) < 0.02


def test_a_flickering_clip_is_not_steady():
    red, blue = draw_clips(
        [Scene("red", "square", "left"), Scene("blue", "star", "left")], 1
    ).numpy()
    mixed = red.copy()
    mixed[::3] = blue[::3]
    verdict = judge(mixed)
    assert verdict.steady < 0.8
    assert verdict.colour_drift > 50


def test_nothing_and_noise_are_collapsed():
    assert judge(np.full((25, 64, 64, 3), 200, dtype=np.uint8)).collapsed
    noise = np.random.default_rng(0).integers(0, 256, (25, 64, 64, 3), dtype=np.uint8)
    assert judge(noise).collapsed


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_mild_noise_does_not_change_the_verdict(background):
    clip = draw_clips([Scene("green", "triangle", "grow", background)], 2).numpy()[0]
    noise = np.random.default_rng(1).normal(0, 6, clip.shape)
    verdict = judge(np.clip(clip + noise, 0, 255).astype(np.uint8))
    assert (verdict.colour, verdict.shape, verdict.motion) == ("green", "triangle", "grow")


def test_another_size():
    scenes = random_scenes(combinations(), 40, random.Random(6))
    clips = draw_clips(scenes, 7, size=(96, 96), num_frames=33).numpy()
    assert min(right(scenes, [judge(clip) for clip in clips]).values()) >= 0.97
