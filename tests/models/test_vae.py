"""The VAE against diffusers, and its streaming form against itself, for frames and odd sizes."""

import pytest
import torch

from tests.models.oracle import cosine, relative_error

SIZES = [(1, 1, 1), (2, 3, 5), (3, 7, 2), (5, 3, 1)]  # latent frames, height, width


@pytest.fixture(scope="module")
def ours(oracle):
    return oracle.ours.load("vae", torch.float32)


@pytest.fixture(scope="module")
def theirs(oracle):
    return oracle.vae()


def random_latent(frames, height, width, batch=1):
    generator = torch.Generator().manual_seed(frames)
    return torch.randn(batch, 16, frames, height, width, generator=generator)


def random_pixels(num_frames, height, width):
    generator = torch.Generator().manual_seed(num_frames)
    return torch.rand(1, 3, num_frames, height, width, generator=generator) * 2 - 1


def normalise(vae, latent, inverse=False):
    mean = torch.tensor(vae.config.latents_mean).view(1, -1, 1, 1, 1)
    std = torch.tensor(vae.config.latents_std).view(1, -1, 1, 1, 1)
    return latent * std + mean if inverse else (latent - mean) / std


def decode_by_chunks(vae, latent, chunk=1):
    caches, pieces = None, []
    for piece in latent.split(chunk, dim=2):
        pixels, caches = vae.decode(piece, caches)
        pieces.append(pixels)
    return torch.cat(pieces, dim=2), caches


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_decode_matches_diffusers(ours, theirs, size):
    latent = random_latent(*size)
    expected = theirs.decode(normalise(theirs, latent, inverse=True)).sample
    actual, _ = decode_by_chunks(ours, latent)
    assert actual.shape == expected.shape == (1, 3, 4 * size[0] - 3, 8 * size[1], 8 * size[2])
    assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_encode_matches_diffusers(ours, theirs, size):
    frames, height, width = size
    pixels = random_pixels(4 * frames - 3, 8 * height, 8 * width)
    expected = normalise(theirs, theirs.encode(pixels).latent_dist.mode())
    caches, pieces = None, []
    for piece in (pixels[:, :, :1], *pixels[:, :, 1:].split(4, dim=2)):
        if piece.shape[2]:
            latent, caches = ours.encode(piece, caches)
            pieces.append(latent)
    actual = torch.cat(pieces, dim=2)
    assert actual.shape == expected.shape == (1, 16, frames, height, width)
    assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("chunk", [1, 2, 3])
@torch.inference_mode()
def test_streaming_decode_equals_whole_decode(ours, chunk):
    latent = random_latent(5, 2, 3, batch=2)
    whole, whole_caches = ours.decode(latent)
    streamed, caches = decode_by_chunks(ours, latent, chunk)
    assert relative_error(streamed, whole) <= 1e-5
    for cache, expected in zip(caches, whole_caches, strict=True):
        torch.testing.assert_close(cache, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_streaming_encode_equals_whole_encode(ours):
    pixels = random_pixels(13, 24, 40)
    whole, _ = ours.encode(pixels)
    first, caches = ours.encode(pixels[:, :, :1])
    second, caches = ours.encode(pixels[:, :, 1:9], caches)
    third, _ = ours.encode(pixels[:, :, 9:], caches)
    assert relative_error(torch.cat((first, second, third), dim=2), whole) <= 1e-5


@torch.inference_mode()
def test_caches_are_32_and_24_and_keep_their_shapes(ours):
    _, first = ours.decode(random_latent(1, 2, 3))
    _, second = ours.decode(random_latent(1, 2, 3), first)
    assert len(first) == len(second) == 32
    assert [cache.shape for cache in first] == [cache.shape for cache in second]
    assert {cache.shape[2] for cache in first} == {2}
    _, first = ours.encode(random_pixels(1, 16, 24))
    _, second = ours.encode(random_pixels(4, 16, 24), first)
    assert len(first) == len(second) == 24
    assert [cache.shape for cache in first] == [cache.shape for cache in second]


@torch.inference_mode()
def test_nothing_is_hidden_in_module_state(ours):
    """Two interleaved streams do not disturb each other."""
    one, other = random_latent(3, 2, 3), random_latent(4, 2, 3)[:, :, :3]
    expected, _ = decode_by_chunks(ours, one)
    pieces, caches, other_caches = [], None, None
    for frame in range(3):
        pixels, caches = ours.decode(one[:, :, frame : frame + 1], caches)
        _, other_caches = ours.decode(other[:, :, frame : frame + 1], other_caches)
        pieces.append(pixels)
    assert torch.equal(torch.cat(pieces, dim=2), expected)


@torch.inference_mode()
def test_bfloat16_stays_near_float32(oracle, ours, theirs):
    latent = random_latent(2, 2, 3)
    exact, _ = decode_by_chunks(ours, latent)
    lower, _ = decode_by_chunks(oracle.ours.load("vae", torch.bfloat16), latent)
    their_lower = theirs.to(torch.bfloat16)
    reference = their_lower.decode(normalise(theirs, latent, inverse=True).bfloat16()).sample
    theirs.to(torch.float32)
    assert cosine(lower, exact) >= cosine(reference, exact) - 1e-5
    assert relative_error(lower, exact) <= 1.1 * relative_error(reference, exact)
