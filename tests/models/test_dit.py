"""The transformer against diffusers, with the same weights through both readers."""

from dataclasses import replace

import pytest
import torch

from tests.models.oracle import cosine, relative_error
from wantrt.config import DIT_1_3B
from wantrt.models.dit import rope_tables, timestep_sinusoid

SHAPES = [
    (1, 1, 2, 2),
    (1, 3, 6, 10),
    (2, 2, 14, 6),
    (1, 5, 18, 22),
]  # batch, frames, height, width


def inputs(batch, frames, height, width, text_dim=64, text_len=48, tokens=20):
    generator = torch.Generator().manual_seed(1)
    latent = torch.randn(batch, 16, frames, height, width, generator=generator)
    text = torch.randn(batch, text_len, text_dim, generator=generator)
    text[:, tokens:] = 0
    return latent, text


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("timestep", [999, 500, 0])
@torch.inference_mode()
def test_matches_diffusers(oracle, shape, timestep):
    latent, text = inputs(*shape)
    times = torch.full((latent.shape[0],), timestep)
    ours = oracle.ours.load("transformer", torch.float32)(latent, times[:, None].float(), text)
    theirs = oracle.dit()(latent, times, text).sample
    assert ours.shape == theirs.shape == latent.shape
    assert relative_error(ours, theirs) <= 1e-4


@torch.inference_mode()
def test_a_block_matches_diffusers(oracle):
    ours, theirs = oracle.ours.load("transformer", torch.float32), oracle.dit()
    config = ours.config
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 3 * 4 * 5, config.dim, generator=generator)
    context = torch.randn(2, config.text_len, config.dim, generator=generator)
    e6 = torch.randn(2, 6, config.dim, generator=generator)
    cos, sin = rope_tables(config, 3, 8, 10)
    rotary = theirs.rope(torch.empty(1, 16, 3, 8, 10))
    for our_block, their_block in zip(ours.blocks, theirs.blocks, strict=True):
        actual = our_block(hidden, e6[:, None], None, context, cos, sin)
        assert relative_error(actual, their_block(hidden, context, e6, rotary)) <= 1e-5


@torch.inference_mode()
def test_bfloat16_is_no_worse_than_theirs(oracle):
    latent, text = inputs(1, 3, 12, 16)
    times = torch.tensor([700])
    exact = oracle.dit()(latent, times, text).sample
    lower = oracle.dit(torch.bfloat16)(latent.bfloat16(), times, text.bfloat16()).sample
    ours = oracle.ours.load("transformer", torch.bfloat16)(latent, times[:, None].float(), text)
    assert cosine(ours, exact) >= cosine(lower, exact)
    assert relative_error(ours, exact) <= 1.1 * relative_error(lower, exact)


@torch.inference_mode()
def test_rows_of_modulation_equal_two_separate_timesteps(oracle):
    """Row 0 for the first frame's tokens, row 1 for the rest; equal rows give the plain model."""
    dit = oracle.ours.load("transformer", torch.float32)
    latent, text = inputs(1, 3, 6, 10)
    token_row = (torch.arange(3 * 3 * 5) >= 15).long()
    plain = dit(latent, torch.tensor([[600.0]]), text)
    same = dit(latent, torch.tensor([[600.0, 600.0]]), text, token_row)
    different = dit(latent, torch.tensor([[0.0, 600.0]]), text, token_row)
    assert relative_error(same, plain) <= 1e-6
    assert relative_error(different, plain) > 1e-2


@torch.inference_mode()
def test_per_token_timesteps_match_diffusers(oracle):
    """As TI2V runs it: the first frame is clean (t = 0), the others are not."""
    latent, text = inputs(1, 3, 6, 10)
    token_row = (torch.arange(3 * 3 * 5) >= 15).long()
    ours = oracle.ours.load("transformer", torch.float32)(
        latent, torch.tensor([[0.0, 600.0]]), text, token_row
    )
    theirs = oracle.dit()(latent, (600 * token_row)[None], text).sample
    assert relative_error(ours, theirs) <= 1e-4


def test_rope_axes_split_a_head_as_44_42_42():
    config = replace(DIT_1_3B, num_layers=1)
    cos, sin = rope_tables(config, 2, 6, 8)
    assert cos.shape == sin.shape == (2 * 3 * 4, 64)
    angle = torch.atan2(sin, cos).double()
    last = 1 * 12 + 2 * 4 + 3  # frame 1, row 2, column 3
    k = torch.arange(22, dtype=torch.float64)
    torch.testing.assert_close(angle[last, :22], 10000 ** (-k / 22), atol=1e-6, rtol=0)
    k = torch.arange(21, dtype=torch.float64)
    torch.testing.assert_close(angle[last, 22:43], 2 * 10000 ** (-k / 21), atol=1e-6, rtol=0)
    torch.testing.assert_close(angle[last, 43:], 3 * 10000 ** (-k / 21), atol=1e-6, rtol=0)


def test_timestep_sinusoid_is_cosine_first_and_exact():
    table = timestep_sinusoid(torch.tensor([999.0, 0.0]), 256)
    assert table.shape == (2, 256)
    assert (table[1, :128] == 1).all()
    assert (table[1, 128:] == 0).all()
    i = torch.arange(128, dtype=torch.float64)
    expected = (999 * 10000 ** (-i / 128)).cos().float()
    torch.testing.assert_close(table[0, :128], expected, atol=1e-7, rtol=0)
