"""Both VAEs against diffusers, and streaming against the whole, for frames and odd sizes."""

import pytest
import torch

from tests.models.oracle import Oracle, cosine, relative_error
from wantrt.config import VAE_2_1, VAE_2_2
from wantrt.models.components import vae_components
from wantrt.models.folding import average_down, duplicate_up, patchify, unpatchify
from wantrt.models.vae import VAE

SIZES = [(1, 1, 1), (2, 3, 5), (3, 7, 2), (4, 3, 1)]  # latent frames, height, width


@pytest.fixture(scope="module", params=["t2v-1.3b", "ti2v-5b"])
def oracle(request, tmp_path_factory):
    """The 2.1 and the 2.2 VAE."""
    return Oracle(tmp_path_factory.mktemp("oracle"), request.param)


@pytest.fixture(scope="module")
def ours(oracle):
    return oracle.ours.load("vae", torch.float32)


@pytest.fixture(scope="module")
def theirs(oracle):
    return oracle.vae()


def random_latent(vae, frames, height, width, batch=1):
    generator = torch.Generator().manual_seed(frames)
    z_dim = vae.decoder.config.z_dim
    return torch.randn(batch, z_dim, frames, height, width, generator=generator)


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
    latent = random_latent(ours, *size)
    expected = theirs.decode(normalise(theirs, latent, inverse=True)).sample
    actual, _ = decode_by_chunks(ours, latent)
    cell = ours.decoder.config.spatial_stride
    pixels = (4 * size[0] - 3, cell * size[1], cell * size[2])
    assert actual.shape == expected.shape == (1, 3, *pixels)
    assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.inference_mode()
def test_encode_matches_diffusers(ours, theirs, size):
    frames, height, width = size
    cell, z_dim = ours.encoder.config.spatial_stride, ours.encoder.config.z_dim
    pixels = random_pixels(4 * frames - 3, cell * height, cell * width)
    expected = normalise(theirs, theirs.encode(pixels).latent_dist.mode())
    caches, pieces = None, []
    for piece in (pixels[:, :, :1], *pixels[:, :, 1:].split(4, dim=2)):
        if piece.shape[2]:
            latent, caches = ours.encode(piece, caches)
            pieces.append(latent)
    actual = torch.cat(pieces, dim=2)
    assert actual.shape == expected.shape == (1, z_dim, frames, height, width)
    assert relative_error(actual, expected) <= 1e-4


@pytest.mark.parametrize("chunk", [1, 2, 3])
@torch.inference_mode()
def test_streaming_decode_equals_whole_decode(ours, chunk):
    latent = random_latent(ours, 5, 2, 3, batch=2)
    whole, whole_caches = ours.decode(latent)
    streamed, caches = decode_by_chunks(ours, latent, chunk)
    assert relative_error(streamed, whole) <= 1e-5
    for cache, expected in zip(caches, whole_caches, strict=True):
        torch.testing.assert_close(cache, expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_streaming_encode_equals_whole_encode(ours):
    pixels = random_pixels(13, 48, 80)
    whole, _ = ours.encode(pixels)
    first, caches = ours.encode(pixels[:, :, :1])
    second, caches = ours.encode(pixels[:, :, 1:9], caches)
    third, _ = ours.encode(pixels[:, :, 9:], caches)
    assert relative_error(torch.cat((first, second, third), dim=2), whole) <= 1e-5


@torch.inference_mode()
def test_caches_are_32_and_24_and_keep_their_shapes(ours):
    _, first = ours.decode(random_latent(ours, 1, 2, 3))
    _, second = ours.decode(random_latent(ours, 1, 2, 3), first)
    assert len(first) == len(second) == 32
    assert [cache.shape for cache in first] == [cache.shape for cache in second]
    assert {cache.shape[2] for cache in first} == {2}
    _, first = ours.encode(random_pixels(1, 32, 48))
    _, second = ours.encode(random_pixels(4, 32, 48), first)
    assert len(first) == len(second) == 24
    assert [cache.shape for cache in first] == [cache.shape for cache in second]


@torch.inference_mode()
def test_nothing_is_hidden_in_module_state(ours):
    """Two interleaved streams do not disturb each other."""
    one, other = random_latent(ours, 3, 2, 3), random_latent(ours, 4, 2, 3)[:, :, :3]
    expected, _ = decode_by_chunks(ours, one)
    pieces, caches, other_caches = [], None, None
    for frame in range(3):
        pixels, caches = ours.decode(one[:, :, frame : frame + 1], caches)
        _, other_caches = ours.decode(other[:, :, frame : frame + 1], other_caches)
        pieces.append(pixels)
    assert torch.equal(torch.cat(pieces, dim=2), expected)


@torch.inference_mode()
def test_bfloat16_stays_near_float32(oracle, ours, theirs):
    latent = random_latent(ours, 2, 2, 3)
    exact, _ = decode_by_chunks(ours, latent)
    lower, _ = decode_by_chunks(oracle.ours.load("vae", torch.bfloat16), latent)
    their_lower = theirs.to(torch.bfloat16)
    reference = their_lower.decode(normalise(theirs, latent, inverse=True).bfloat16()).sample
    theirs.to(torch.float32)
    assert cosine(lower, exact) >= cosine(reference, exact) - 1e-5
    assert relative_error(lower, exact) <= 1.1 * relative_error(reference, exact)


# -- At full size ---------------------------------------------------------------------------------

# Of every slot: channels, height in latent cells, and frames where they are not 2.
DECODER_2_1 = [
    *[(16, 1)], *[(384, 1)] * 11,
    *[(192, 2)], *[(384, 2)] * 6,
    *[(192, 4)] * 6,
    *[(96, 8)] * 7,
]  # fmt: skip
DECODER_2_2 = [
    *[(48, 1)], *[(1024, 1)] * 11,
    *[(1024, 2)] * 7,
    *[(1024, 4)], *[(512, 4)] * 5,
    *[(512, 8)], *[(256, 8)] * 6,
]  # fmt: skip
ENCODER_2_1 = [
    *[(3, 8)], *[(96, 8)] * 4,
    *[(96, 4)], *[(192, 4)] * 3,
    *[(192, 2, 1)], *[(192, 2)], *[(384, 2)] * 3,
    *[(384, 1, 1)], *[(384, 1)] * 9,
]  # fmt: skip
ENCODER_2_2 = [
    *[(12, 8)], *[(160, 8)] * 4,
    *[(160, 4)], *[(320, 4)] * 3,
    *[(320, 2, 1)], *[(320, 2)], *[(640, 2)] * 3,
    *[(640, 1, 1)], *[(640, 1)] * 9,
]  # fmt: skip


@pytest.mark.parametrize(
    "vae_config, decoder, encoder",
    [(VAE_2_1, DECODER_2_1, ENCODER_2_1), (VAE_2_2, DECODER_2_2, ENCODER_2_2)],
    ids=["2.1", "2.2"],
)
def test_slots_are_those_of_the_specification(vae_config, decoder, encoder):
    """As the modules leave them, and as the components declare them."""
    height, width, cell = 3, 2, vae_config.spatial_stride
    expected = {
        side: [
            (1, channels, *(frames or [2]), factor * height, factor * width)
            for channels, factor, *frames in slots
        ]
        for side, slots in (("decoder", decoder), ("encoder", encoder))
    }
    with torch.device("meta"):
        vae = VAE(vae_config)
        latent = torch.empty(1, vae_config.z_dim, 1, height, width)
        pixels = torch.empty(1, 3, 4, cell * height, cell * width)
    for side, first, following in (
        (vae.decoder, latent, latent),
        (vae.encoder, pixels[:, :, :1], pixels),
    ):
        name = type(side).__name__.lower()
        _, caches = side(first)
        assert [cache.shape for cache in caches] == expected[name]
        _, caches = side(following, caches)
        assert [cache.shape for cache in caches] == expected[name]
    declared = {
        component.name: [
            spec.concrete({"h": height, "w": width})
            for output, spec in component.outputs.items()
            if output.startswith("new_cache_")
        ]
        for component in vae_components(vae_config, torch.float32)
    }
    for name, slots in declared.items():
        assert slots == expected[name.split("_")[1]]


# -- The parts of 2.2 that have no parameters -----------------------------------------------------


def test_patches_list_columns_before_rows():
    pixels = torch.arange(16).reshape(1, 1, 1, 4, 4)
    patches = patchify(pixels, 2)
    assert patches[0, :, 0, 0, 0].tolist() == [0, 4, 1, 5]
    assert patches.shape == (1, 4, 1, 2, 2)
    assert torch.equal(unpatchify(patches, 2), pixels)


@pytest.mark.parametrize(
    "factors, channels, out_channels",
    [((1, 1), 8, 8), ((1, 1), 8, 4)]
    + [(factors, *both) for factors in ((1, 2), (2, 2)) for both in ((8, 8), (4, 8), (2, 8))],
)
@pytest.mark.parametrize("starts_stream", [True, False])
def test_average_down_is_its_formula(channels, out_channels, factors, starts_stream):
    time, space = factors
    num_frames = 3 if starts_stream else 4
    x = torch.randn(2, channels, num_frames, 4, 6, generator=torch.Generator().manual_seed(0))
    actual = average_down(x, starts_stream, out_channels, factors)
    padding = (time - 1) * starts_stream
    x = torch.cat((torch.zeros(2, channels, padding, 4, 6), x), dim=2)
    group = channels * time * space**2 // out_channels
    expected = torch.zeros(2, out_channels, x.shape[2] // time, 4 // space, 6 // space)
    for index in range(channels * time * space**2):
        rest, dw = divmod(index, space)
        rest, dh = divmod(rest, space)
        channel, dt = divmod(rest, time)
        expected[:, index // group] += x[:, channel, dt::time, dh::space, dw::space] / group
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("factors", [(1, 2), (2, 2)], ids=str)
@pytest.mark.parametrize("channels, out_channels", [(8, 8), (8, 4), (8, 2)])
@pytest.mark.parametrize("starts_stream", [True, False])
def test_duplicate_up_is_its_formula(channels, out_channels, factors, starts_stream):
    time, space = factors
    x = torch.randn(2, channels, 3, 2, 3, generator=torch.Generator().manual_seed(0))
    actual = duplicate_up(x, starts_stream, out_channels, factors)
    offsets = time * space**2
    expected = torch.empty(2, out_channels, 3 * time, 2 * space, 3 * space)
    for index in range(out_channels * offsets):
        rest, dw = divmod(index, space)
        rest, dh = divmod(rest, space)
        channel, dt = divmod(rest, time)
        source = x[:, index * channels // (out_channels * offsets)]
        expected[:, channel, dt::time, dh::space, dw::space] = source
    dropped = (time - 1) * starts_stream
    assert torch.equal(actual, expected[:, :, dropped:])
