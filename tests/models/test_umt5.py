"""The text encoder against transformers, with the same weights through both readers."""

import pytest
import torch

from tests.models.oracle import cosine, relative_error
from wantrt.config import TextEncoderConfig
from wantrt.models.umt5 import position_buckets


def padded_tokens(lengths, width):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(2, 100, (len(lengths), width), generator=generator)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return tokens * mask, mask


@pytest.mark.parametrize(
    "lengths, width", [([1], 1), ([7], 7), ([1, 19, 40], 40), ([5, 300], 320)], ids=str
)
@torch.inference_mode()
def test_matches_transformers(oracle, lengths, width):
    tokens, mask = padded_tokens(lengths, width)
    ours = oracle.ours.load("text_encoder", torch.float32)(tokens, mask.float())
    theirs = oracle.text_encoder()(tokens, attention_mask=mask.long()).last_hidden_state
    assert relative_error(ours[mask], theirs[mask]) <= 1e-5
    assert (ours[~mask] == 0).all()


@torch.inference_mode()
def test_padding_does_not_matter(oracle):
    encoder = oracle.ours.load("text_encoder", torch.float32)
    tokens, mask = padded_tokens([9], 64)
    short = encoder(tokens[:, :9], mask[:, :9].float())
    assert relative_error(encoder(tokens, mask.float())[:, :9], short) <= 1e-6


@torch.inference_mode()
def test_bfloat16_is_no_worse_than_theirs(oracle):
    tokens, mask = padded_tokens([40, 25], 40)
    exact = oracle.text_encoder()(tokens, attention_mask=mask.long()).last_hidden_state[mask]
    theirs = oracle.text_encoder(torch.bfloat16)(tokens, attention_mask=mask.long())
    ours = oracle.ours.load("text_encoder", torch.bfloat16)(tokens, mask.float())[mask]
    their_states = theirs.last_hidden_state[mask]
    assert cosine(ours, exact) >= cosine(their_states, exact)
    assert relative_error(ours, exact) <= 1.1 * relative_error(their_states, exact)


def test_position_buckets():
    """T5's table: exact up to 7, logarithmic to 128, all further distances alike."""
    buckets = position_buckets(TextEncoderConfig(), 300)
    assert buckets[0, 0] == 0
    assert buckets[10, 3] == 7  # a key before the query
    assert buckets[3, 10] == 16 + 7  # a key after it
    assert buckets[10, 2] == 8
    assert buckets[0, 299] == buckets[0, 128] == 31
    assert buckets.max() == 31
