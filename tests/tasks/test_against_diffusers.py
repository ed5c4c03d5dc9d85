"""Every tensor that conditions a model, against the functions of diffusers' own pipelines."""

import pytest
import torch
from PIL import Image

from tests.tasks.pictures import as_pil, film, moving_mask, picture
from wantrt.tasks import flf2v, i2v, ti2v, vace

TOLERANCE = 1e-4
SIZE = (48, 32)


def preprocess(pipe, image, size):
    width, height = size
    return pipe.video_processor.preprocess(Image.fromarray(image), height=height, width=width)


@torch.inference_mode()
def prepare(pipe, image, num_frames, size, last_image=None):
    width, height = size
    cell, z_dim = pipe.vae_scale_factor_spatial, pipe.vae.config.z_dim
    noise = torch.zeros(1, z_dim, (num_frames - 1) // 4 + 1, height // cell, width // cell)
    return pipe.prepare_latents(
        preprocess(pipe, image, size),
        batch_size=1,
        height=height,
        width=width,
        num_frames=num_frames,
        dtype=torch.float32,
        device=torch.device("cpu"),
        latents=noise,
        last_image=None if last_image is None else preprocess(pipe, last_image, size),
    )


def close(actual, expected):
    assert actual.dtype == torch.float32
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("num_frames", [1, 5, 9])
@pytest.mark.parametrize("image_size", [(48, 32), (101, 67), (20, 30)], ids=str)
def test_i2v(theirs, encode, image_size, num_frames):
    image = picture(*image_size)
    _, expected = prepare(theirs.i2v, image, num_frames, SIZE)
    ours = i2v.condition(image, num_frames, SIZE, encode, "diffusers", "stretch")
    close(ours.channels, expected)


@pytest.mark.parametrize("num_frames", [5, 9, 13])
@pytest.mark.parametrize("last_size", [(60, 40), (31, 77)], ids=str)
def test_flf2v(theirs, encode, last_size, num_frames):
    first, last = picture(60, 40), picture(*last_size, seed=3)
    _, expected = prepare(theirs.i2v, first, num_frames, SIZE, last)
    ours = flf2v.condition(first, last, num_frames, SIZE, encode, "diffusers", "stretch")
    close(ours.channels, expected)


@pytest.mark.parametrize("size", [(64, 32), (96, 128)], ids=str)
def test_ti2v(theirs, encode_2_2, size):
    image = picture(90, 50)
    _, expected, mask = prepare(theirs.ti2v, image, 9, size)
    ours = ti2v.condition(image, size, encode_2_2, "diffusers", "stretch")
    assert ours.first_frame.shape == (1, 48, 1, size[1] // 16, size[0] // 16)
    close(ours.first_frame, expected)
    assert mask[0, 0, :, 0, 0].tolist() == [0, 1, 1], "latent frame 0 alone is the image's"


@torch.inference_mode()
def vace_of(pipe, video, mask, references, num_frames, size):
    width, height = size
    masks = None if mask is None else as_pil(mask)
    pixels, masks, references = pipe.preprocess_conditions(
        None if video is None else as_pil(video),
        masks,
        as_pil(references) or None,
        1,
        height,
        width,
        num_frames,
        torch.float32,
        torch.device("cpu"),
    )
    latents = pipe.prepare_video_latents(pixels, masks, references, device="cpu")
    return torch.cat([latents, pipe.prepare_masks(masks, references)], dim=1)


REFERENCES = [picture(40, 56, 7), picture(83, 29, 8), picture(48, 32, 9)]


@pytest.mark.parametrize("references", [[], REFERENCES[:1], REFERENCES], ids=len)
@pytest.mark.parametrize("source", ["nothing", "video", "video and mask"])
def test_vace(theirs, encode, source, references):
    video = None if source == "nothing" else film(9, 48, 32)
    mask = moving_mask(9, 48, 32) if "mask" in source else None
    expected = vace_of(theirs.vace, video, mask, references, 9, SIZE)
    ours = vace.condition(video, mask, references, 9, SIZE, encode, "diffusers", "stretch")
    close(ours.vace_context, expected)
    assert ours.reference_frames == len(references)


@pytest.mark.parametrize(
    "source_size", [(48, 32), (50, 45), (96, 64), (101, 67), (64, 90), (200, 60)], ids=str
)
def test_vace_of_a_source_of_another_size(theirs, encode, source_size):
    video, mask = film(5, *source_size), moving_mask(5, *source_size)
    expected = vace_of(theirs.vace, video, mask, REFERENCES[:1], 5, (64, 48))
    size, frames = vace.video_size_and_frames(source_size, 5, (64, 48), 81, "stretch", "diffusers")
    assert frames == 5
    ours = vace.condition(video, mask, REFERENCES[:1], 5, size, encode, "diffusers", "stretch")
    close(ours.vace_context, expected)
