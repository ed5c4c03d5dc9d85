"""Settings: completed from the right place, refused with the nearest valid value."""

import logging
from dataclasses import replace

import pytest
import torch

from wantrt.config import NEGATIVE_PROMPT, VARIANTS
from wantrt.errors import SettingsError
from wantrt.runtime.settings import resolve

T2V = VARIANTS["t2v-14b"]
A14B = VARIANTS["t2v-a14b"]


def test_defaults_are_the_row_s():
    settings = resolve(T2V, {}, prompt="a cat")
    assert settings.size == (1280, 720)
    assert (settings.num_frames, settings.num_inference_steps) == (81, 50)
    assert (settings.flow_shift, settings.solver) == (5.0, "unipc")
    assert settings.guidance_scales == (5.0,)
    assert settings.negative_prompt == NEGATIVE_PROMPT
    assert settings.latent_shape(T2V) == (16, 21, 90, 160)


def test_experts_keep_their_own_guidance_unless_it_is_given():
    assert resolve(A14B, {}, prompt="x").guidance_scales == (4.0, 3.0)
    assert resolve(A14B, {}, prompt="x", guidance_scale=7).guidance_scales == (7, 3.0)
    assert resolve(A14B, {}, prompt="x", guidance_scale_2=1.5).guidance_scales == (4.0, 1.5)


def test_diffusers_convention_takes_the_recorded_scheduler():
    recorded = {
        "scheduler_config": {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 7.0}
    }
    settings = resolve(A14B, recorded, prompt="x", convention="diffusers")
    assert (settings.solver, settings.flow_shift) == ("euler", 7.0)
    assert (settings.num_inference_steps, settings.guidance_scales) == (50, (5.0, 5.0))
    assert settings.negative_prompt == ""
    one_given = resolve(A14B, recorded, prompt="x", convention="diffusers", guidance_scale=3)
    assert one_given.guidance_scales == (3, 3)
    official = resolve(A14B, recorded, prompt="x")
    assert (official.solver, official.flow_shift) == ("unipc", 12.0)


def test_i2v_480p_has_its_own_shift():
    variant = VARIANTS["i2v-14b-720p"]
    assert resolve(variant, {}, prompt="x", size=(832, 480)).flow_shift == 3.0
    assert resolve(variant, {}, prompt="x").flow_shift == 5.0


def test_seed_is_drawn_once_and_kept():
    seeds = {resolve(T2V, {}, prompt="x").seed for _ in range(4)}
    assert len(seeds) > 1
    assert resolve(T2V, {}, prompt="x", seed=0).seed == 0


@pytest.mark.parametrize(
    "wrong, offered",
    [
        ({"size": (830, 480)}, "832x480"),
        ({"size": (0, 480)}, "16x480"),
        ({"size": (-16, 480)}, "16x480"),
        ({"size": (832, 99_999)}, "832x16384"),
        ({"num_frames": 80}, "77 or 81"),
        ({"num_frames": 0}, "nearest: 1$"),
        ({"num_frames": -3}, "nearest: 1$"),
        ({"solver": "unipcc"}, "unipc"),
        ({"convention": "oficial"}, "official"),
        ({"noise": "cudo"}, "cuda"),
        ({"guidance_scale_2": 3.0}, "one expert"),
        ({"guidance_scale": float("nan")}, "finite"),
        ({"num_inference_steps": 0}, "use 1 to 1000"),
        ({"flow_shift": 0.0}, "positive number"),
        ({"seed": -1}, "use 0 to"),
    ],
)
def test_wrong_settings_name_what_is_right(wrong, offered):
    with pytest.raises(SettingsError, match=offered):
        resolve(T2V, {}, prompt="x", **wrong)


def test_empty_prompt_is_warned_about(caplog):
    with caplog.at_level(logging.WARNING, logger="wantrt"):
        resolve(T2V, {}, prompt="  ")
    assert "prompt is empty" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_noise_of_a_gpu_needs_one():
    with pytest.raises(SettingsError, match="--noise cpu"):
        resolve(T2V, {}, prompt="x", noise="cuda")


def test_a_recorded_shift_of_null_is_none():
    recorded = {"scheduler_config": {"flow_shift": None, "shift": None}}
    assert resolve(T2V, recorded, prompt="x", convention="diffusers").flow_shift == T2V.flow_shift


def test_a_size_off_the_list_is_allowed_with_one_line(caplog):
    assert resolve(T2V, {}, prompt="a cat", size=(960, 544)).size == (960, 544)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage() == (
        "960x544 is not a size of t2v-14b (1280x720, 720x1280, 832x480, 480x832): "
        "the result may look worse"
    )


def test_what_a_custom_model_was_made_for_is_not_known(caplog):
    resolve(replace(T2V, name="custom"), {}, prompt="a cat", size=(960, 544))
    assert not caplog.records


@pytest.mark.parametrize("size", [None, (832, 480), (720, 1280)])
def test_a_size_of_the_list_is_worth_no_line(size, caplog):
    resolve(T2V, {}, prompt="a cat", size=size)
    assert not caplog.records


@pytest.mark.parametrize(
    "variant, size, nearest",
    [
        ("t2v-14b", (833, 480), "832x480"),
        ("t2v-14b", (8, 480), "16x480"),
        ("ti2v-5b", (1280, 720), "1280x704"),
        ("vace-1.3b", (0, 480), "16x480"),
        ("i2v-a14b", (832, 20_000), "832x16384"),
    ],
)
def test_a_size_that_does_not_fit_the_step_is_refused_with_the_nearest(
    variant, size, nearest, caplog
):
    with pytest.raises(SettingsError, match=f"nearest: {nearest}"):
        resolve(VARIANTS[variant], {}, prompt="a cat", size=size)
    assert not caplog.records
