"""What the image encoder sees of an image: against transformers and the official formula."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPImageProcessor

from wantrt.checkpoints.layouts import image_processor_config
from wantrt.config import ImageEncoderConfig
from wantrt.errors import SettingsError
from wantrt.tasks.clip_image import clip_pixels

SIZES = [(224, 224), (832, 480), (480, 832), (225, 224), (301, 97), (64, 48), (9, 40), (1280, 720)]


def picture(width, height):
    """Noise over a gradient: hard edges, which tell filters apart."""
    generator = np.random.default_rng(width * height)
    noise = generator.integers(0, 120, (height, width, 3))
    gradient = np.linspace(0, 135, width)[None, :, None]
    return (noise + gradient).astype(np.uint8)


@pytest.mark.parametrize("image_size", [224, 56])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_diffusers_convention_is_the_image_processor(size, image_size):
    image = picture(*size)
    settings = image_processor_config(ImageEncoderConfig(image_size=image_size))
    processor = CLIPImageProcessor(**settings)
    expected = processor(images=Image.fromarray(image), return_tensors="pt").pixel_values
    actual = clip_pixels([image], "diffusers", image_size)
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape == (1, 3, image_size, image_size)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_official_convention_is_its_formula(size):
    """As in ``CLIPModel.visual``: the whole image, bicubic, no antialiasing, no clamp."""
    image = picture(*size)
    x = torch.from_numpy(image).permute(2, 0, 1) / 255
    x = (x - 0.5) / 0.5
    x = F.interpolate(x[None], size=(224, 224), mode="bicubic", align_corners=False)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    expected = (x * 0.5 + 0.5 - mean) / std
    torch.testing.assert_close(clip_pixels([image]), expected, rtol=0, atol=1e-5)


def test_official_bicubic_by_hand():
    """Keys' kernel with a = -0.75 at half-pixel centres, edges repeated, in float64."""
    image = picture(50, 31)
    x = image / 255.0
    for axis in (0, 1):
        x = np.moveaxis(_bicubic(np.moveaxis(x, axis, 0), 24), 0, axis)
    pixels = clip_pixels([image], "official", 24)[0].permute(1, 2, 0).double().numpy()
    unnormalised = pixels * [0.26862954, 0.26130258, 0.27577711]
    unnormalised += [0.48145466, 0.4578275, 0.40821073]
    assert np.abs(unnormalised - x).max() < 1e-5


def _bicubic(x, size):
    def kernel(t):
        a, t = -0.75, np.abs(t)
        near = (a + 2) * t**3 - (a + 3) * t**2 + 1
        far = a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
        return np.where(t <= 1, near, np.where(t < 2, far, 0))

    centres = (np.arange(size) + 0.5) * len(x) / size - 0.5
    first = np.floor(centres).astype(int)
    out = np.zeros((size, *x.shape[1:]))
    for tap in range(-1, 3):
        weights = kernel(centres - (first + tap))
        out += weights[:, None, None] * x[np.clip(first + tap, 0, len(x) - 1)]
    return out


def test_the_conventions_see_different_parts():
    """The ends of a wide image: there in one, cut off in the other."""
    image = np.zeros((100, 400, 3), np.uint8)
    image[:, :100] = image[:, -100:] = 255
    black, white = (
        clip_pixels([np.full((5, 5, 3), value, np.uint8)])[0, 0, 2, 2] for value in (0, 255)
    )
    squeezed, cropped = (clip_pixels([image], c)[0, 0] for c in ("official", "diffusers"))
    assert torch.isclose(squeezed[:, 0], white, atol=1e-5).all()
    assert torch.isclose(cropped[:, 5:-5], black, atol=1e-5).all()


def test_images_of_several_sizes_make_one_batch():
    first, last = picture(832, 480), picture(97, 301)
    for convention in ("official", "diffusers"):
        both = clip_pixels([first, last], convention)
        assert both.shape == (2, 3, 224, 224)
        assert torch.equal(both[:1], clip_pixels([first], convention))
        assert torch.equal(both[1:], clip_pixels([last], convention))


def test_an_unknown_convention():
    with pytest.raises(SettingsError, match="official"):
        clip_pixels([picture(9, 9)], "offical")
