"""Guidance and noise: few lines, and every seed's pixels hang on them."""

import pytest
import torch

from wantrt.errors import SettingsError
from wantrt.schedulers.guidance import guide
from wantrt.schedulers.noise import draw_noise

SHAPE = (16, 3, 5, 7)


@pytest.mark.parametrize("scale", [0.0, 1.0, 5.0, torch.tensor([5.0])], ids=str)
def test_guidance_is_computed_in_float32(scale):
    torch.manual_seed(0)
    conditional, unconditional = torch.randn(2, 1, *SHAPE).bfloat16()
    expected = unconditional.double() + float(scale) * (conditional - unconditional.double())
    actual = guide(conditional, unconditional, scale)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), expected, rtol=1e-6, atol=1e-5)


def test_noise_is_what_both_conventions_draw():
    noise = draw_noise(SHAPE, seed=42)
    official = torch.randn(SHAPE, generator=torch.Generator().manual_seed(42))
    diffusers = torch.randn((1, *SHAPE), generator=torch.Generator().manual_seed(42))
    assert noise.dtype == torch.float32
    assert noise.shape == (1, *SHAPE)
    assert torch.equal(noise[0], official)
    assert torch.equal(noise, diffusers)
    assert not torch.equal(noise, draw_noise(SHAPE, seed=43))


def test_noise_leaves_the_global_generator_alone():
    torch.manual_seed(7)
    expected = torch.randn(3)
    torch.manual_seed(7)
    draw_noise(SHAPE, seed=1)
    assert torch.equal(torch.randn(3), expected)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_bad_seed_is_refused(seed):
    with pytest.raises(SettingsError, match="seed is"):
        draw_noise(SHAPE, seed)
    draw_noise(SHAPE, 2**64 - 1)
