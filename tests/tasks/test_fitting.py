"""Sizes and filters against numbers and formulas that do not come from wantrt."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.tasks.pictures import picture
from wantrt.errors import SettingsError
from wantrt.tasks import fitting, flf2v, i2v, ti2v
from wantrt.tasks.fitting import best_output_size, choose_fit, fit_image, size_by_area

AREA_480P, AREA_720P, AREA_TI2V = 480 * 832, 720 * 1280, 704 * 1280


@pytest.mark.parametrize(
    "image_size, area, expected",
    [
        ((832, 480), AREA_480P, (832, 464)),  # the root of 480 * 480 in float64 is below 480
        ((480, 832), AREA_480P, (480, 832)),
        ((1280, 720), AREA_720P, (1280, 720)),
        ((1920, 1080), AREA_720P, (1280, 720)),
        ((1024, 1024), AREA_480P, (624, 624)),  # 631.9
        ((4000, 3000), AREA_480P, (720, 544)),  # 729.6 x 547.2
        ((64, 64), 64 * 64, (64, 64)),
    ],
    ids=str,
)
def test_official_size_by_area(image_size, area, expected):
    assert size_by_area(image_size, area, "official") == expected
    size = (area // 16, 16)
    assert i2v.video_size(image_size, size, "area", "official") == expected
    assert flf2v.video_size(image_size, size, "crop", "official") == size


def test_diffusers_recipe_has_no_float_trap():
    assert size_by_area((832, 480), AREA_480P, "diffusers") == (832, 480)
    assert size_by_area((1024, 1024), AREA_480P, "diffusers") == (624, 624)
    assert ti2v.video_size((1920, 1080), (1280, 704), "area", "diffusers") == (1248, 704)


@pytest.mark.parametrize(
    "image_size, expected",
    [
        ((1920, 1080), (1248, 704)),
        ((1280, 704), (1280, 704)),
        ((704, 1280), (704, 1280)),
        ((1024, 1024), (960, 928)),
    ],
    ids=str,
)
def test_best_output_size(image_size, expected):
    assert best_output_size(image_size, AREA_TI2V) == expected
    assert ti2v.video_size(image_size, (1280, 704), "area", "official") == expected
    assert ti2v.video_size(image_size, (1280, 704), "crop", "official") == (1280, 704)


SIDES = st.integers(1, 10_000)


@given(SIDES, SIDES, st.integers(64, 1280), st.integers(64, 1280), st.booleans())
def test_sizes_are_whole_within_the_area_and_alike(width, height, wide, high, official):
    area, image_size = wide * high, (width, height)
    convention = "official" if official else "diffusers"
    for step, size_of in (
        (16, lambda: size_by_area(image_size, area, convention)),
        (32, lambda: best_output_size(image_size, area)),
    ):
        try:
            size = size_of()
        except SettingsError:
            assert max(width / height, height / width) * step**2 > area / 4, "too narrow by far"
            continue
        assert all(side > 0 and side % step == 0 for side in size)
        assert size[0] * size[1] <= area * 1.05, "diffusers rounds up before it rounds down"
        if official and max(width / height, height / width) < 2 and area > 150_000:
            assert size[0] / size[1] == pytest.approx(width / height, rel=0.2)


@pytest.mark.parametrize("size", [(0, 64), (64, -64)], ids=str)
@pytest.mark.parametrize("task", [i2v, ti2v])
def test_no_area(task, size):
    with pytest.raises(SettingsError, match="must be positive"):
        task.video_size((64, 64), size, "area", "official")


@pytest.mark.parametrize("size_of_task", [i2v.video_size, ti2v.video_size])
@pytest.mark.parametrize("convention", ["official", "diffusers"])
@pytest.mark.parametrize("image_size", [(10_000, 1), (1, 10_000)], ids=str)
def test_too_narrow(size_of_task, image_size, convention):
    with pytest.raises(SettingsError, match=r"too narrow .*--size") as caught:
        size_of_task(image_size, (64, 64), "area", convention)
    assert "\n" not in str(caught.value)


def test_choice_of_fit():
    assert choose_fit(None, False, "official") == "area"
    assert choose_fit(None, True, "official") == "crop"
    assert choose_fit(None, True, "diffusers") == choose_fit(None, False, "diffusers") == "stretch"
    assert choose_fit("pad", True, "diffusers") == "pad"
    with pytest.raises(SettingsError, match=r"unknown fit 'corp'; did you mean crop\?"):
        choose_fit("corp", True, "official")


def cubic_weights(length, new_length):
    """Bicubic interpolation, a = -0.75, half-pixel centres, edges repeated: [new_length, length]"""
    a = -0.75
    weights = np.zeros((new_length, length))
    for i in range(new_length):
        centre = (i + 0.5) * length / new_length - 0.5
        base = math.floor(centre)
        for tap in range(base - 1, base + 3):
            d = abs(centre - tap)
            if d <= 1:
                weight = (a + 2) * d**3 - (a + 3) * d**2 + 1
            else:
                weight = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
            weights[i, min(max(tap, 0), length - 1)] += weight
    return weights


@pytest.mark.parametrize("size", [(48, 32), (16, 80), (101, 67)], ids=str)
def test_official_filter_is_bicubic_without_antialiasing(size):
    image = picture(101, 67)
    width, height = size
    rows, columns = cubic_weights(67, height), cubic_weights(101, width)
    values = image / 127.5 - 1
    expected = np.einsum("yh,hwc,xw->cyx", rows, values, columns)
    actual = fit_image(image, size, "area", fitting.resize_bicubic)
    np.testing.assert_allclose(actual.numpy(), expected, atol=1e-5)


def test_ti2v_covers_and_crops_with_lanczos():
    """1920x1080 covers 1248x704 as 1252x704: two columns are lost on either side."""
    image = picture(192, 108)
    scaled = Image.fromarray(image).resize((125, 70), Image.Resampling.LANCZOS)
    expected = np.asarray(scaled.crop((0, 3, 125, 67)), np.float64) / 127.5 - 1
    actual = ti2v.condition(image, (125, 64), lambda pixels: pixels).first_frame
    assert actual.shape == (1, 3, 1, 64, 125)
    np.testing.assert_allclose(actual[0, :, 0].permute(1, 2, 0), expected, atol=1e-6)


@pytest.mark.parametrize("resize", [fitting.resize_bicubic, fitting.resize_lanczos])
@pytest.mark.parametrize("image_size", [(90, 30), (30, 90)], ids=str)
def test_pad_keeps_all_of_the_image_on_black(image_size, resize):
    white = np.full((*image_size[::-1], 3), 255, np.uint8)
    fitted = fit_image(white, (60, 60), "pad", resize)
    assert fitted.shape == (3, 60, 60)
    inside = fitted if image_size[0] > image_size[1] else fitted.mT
    assert torch.all(inside[:, 20:40] > 0.99)
    assert torch.all(inside[:, :20] == -1)
    assert torch.all(inside[:, 40:] == -1)


def test_crop_keeps_the_middle():
    stripes = np.repeat(np.arange(90, dtype=np.uint8), 3).reshape(1, 90, 3).repeat(30, axis=0)
    fitted = fit_image(stripes, (30, 30), "crop", fitting.resize_lanczos)
    levels = ((fitted[:, 7] + 1) * 127.5).round()
    assert torch.equal(levels, torch.arange(30.0, 60.0).expand(3, 30))


@pytest.mark.parametrize("fit", ["crop", "pad", "area", "stretch"])
@pytest.mark.parametrize("resize", [fitting.resize_bicubic, fitting.resize_lanczos])
@pytest.mark.parametrize("image_size", [(1, 1), (1, 300), (997, 3), (61, 59)], ids=str)
def test_every_fit_gives_the_size(image_size, resize, fit):
    fitted = fit_image(picture(*image_size), (64, 48), fit, resize)
    assert (fitted.shape, fitted.dtype) == ((3, 48, 64), torch.float32)
