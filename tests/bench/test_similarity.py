"""PSNR and SSIM against scikit-image, and where they are known without it."""

import math

import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from tests.tasks.pictures import film
from wantrt.bench.similarity import psnr, ssim

FILM = film(3, 48, 37)


def noisy(strength):
    noise = np.random.default_rng(0).normal(0, strength, FILM.shape)
    return np.clip(FILM + noise, 0, 255).astype(np.uint8)


@pytest.mark.parametrize("strength", [0.5, 3, 40])
def test_as_scikit_image_has_them(strength):
    frames = noisy(strength)
    assert psnr(frames, FILM) == pytest.approx(
        peak_signal_noise_ratio(FILM, frames, data_range=255), abs=1e-9
    )
    theirs = [
        structural_similarity(
            expected,
            frame,
            channel_axis=2,
            data_range=255,
            gaussian_weights=True,
            use_sample_covariance=False,
        )
        for expected, frame in zip(FILM, frames, strict=True)
    ]
    assert ssim(frames, FILM) == pytest.approx(np.mean(theirs), abs=1e-9)


def test_equal_videos():
    assert psnr(FILM, FILM) == math.inf
    assert ssim(FILM, FILM) == pytest.approx(1)


def test_plain_frames():
    """Without contrast SSIM is its luminance: (2ab + C1) / (a² + b² + C1)."""
    dark, light = (np.full((2, 16, 16, 3), value, np.uint8) for value in (60, 70))
    assert psnr(light, dark) == pytest.approx(20 * math.log10(255 / 10))
    c1 = (0.01 * 255) ** 2
    assert ssim(light, dark) == pytest.approx((2 * 60 * 70 + c1) / (60**2 + 70**2 + c1))
