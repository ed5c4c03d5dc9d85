"""Generated weights: the same in any order, and tame through many layers."""

from dataclasses import replace

import pytest
import torch

from tests.checkpoints.small import SMALL, make_small
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.config import VAE_2_2
from wantrt.errors import SettingsError
from wantrt.models.dit import BlockInputs, rope_tables, run_blocks, timestep_sinusoid
from wantrt.models.vae import VAE


def test_a_tensor_depends_on_seed_part_and_name_alone():
    first = dict(make_small("t2v-a14b").read("high_noise", torch.float32))
    tensors = make_small("t2v-a14b").parts["high_noise"].tensors
    for name in reversed(list(first)):
        assert torch.equal(tensors.read(name), first[name])
    other_part = dict(make_small("t2v-a14b").read("low_noise", torch.float32))
    other_seed = open_checkpoint(SMALL.replace("random:0", "random:1"), "t2v-a14b")
    seed_1 = dict(other_seed.read("high_noise", torch.float32))
    name = "blocks.0.ffn.up.weight"
    assert not torch.equal(first[name], other_part[name])
    assert not torch.equal(first[name], seed_1[name])


def test_a_row_of_the_table_at_its_own_dimensions():
    checkpoint = open_checkpoint("random:3", "t2v-1.3b")
    assert checkpoint.variant.name == "t2v-1.3b"
    name, tensor = next(checkpoint.read("transformer", torch.bfloat16))
    assert (name, tensor.shape, tensor.dtype) == (
        "condition.text.up.weight",
        (1536, 4096),
        torch.bfloat16,
    )


@pytest.mark.parametrize(
    "source",
    ["random:", "random:x", "random:0:dim", "random:0:size=4", "random:0:clip.dim=4",
     "random:0:vae.patch_size=(1)", "random:0:dim=0"],
)  # fmt: skip
def test_what_cannot_be_generated(source):
    with pytest.raises(SettingsError, match="Expected"):
        open_checkpoint(source, "nano")


@pytest.mark.parametrize(
    "dimensions",
    ["dim=64,ffn_dim=160,num_heads=2,num_layers=40,text_encoder.num_layers=24",
     pytest.param("dim=5120,ffn_dim=13824,num_heads=40,num_layers=2", marks=pytest.mark.slow)],
    ids=["40-layers", "14B-width"],
)  # fmt: skip
@torch.inference_mode()
def test_activations_keep_an_ordinary_size(dimensions):
    checkpoint = open_checkpoint(f"random:0:{dimensions}", "nano")
    generator = torch.Generator().manual_seed(0)
    text = checkpoint.load("text_encoder", torch.float32)
    tokens = torch.randint(0, 64, (1, 20), generator=generator)
    embeds = text(tokens, torch.ones(1, 20))
    assert 0.5 < embeds.std() < 2
    padded = torch.nn.functional.pad(embeds, (0, 0, 0, 44))

    dit = checkpoint.load("transformer", torch.bfloat16)
    latent = torch.randn(1, 16, 2, 8, 8, generator=generator)
    e, e6 = dit.time(timestep_sinusoid(torch.tensor([500.0]), dit.config.freq_dim))
    tables = rope_tables(dit.config, *latent.shape[2:])
    given = BlockInputs(e6[None], None, dit.condition(padded)[0], *tables)
    hidden, sizes = dit.patch(latent), []
    for block in dit.blocks:
        hidden = run_blocks([block], hidden, given)
        sizes.append(float(hidden.std()))
    velocity = dit.head(hidden, e[None], None, latent)
    assert all(0.3 < size < 20 for size in sizes), sizes
    assert 0.3 < velocity.std() < 3

    vae = checkpoint.load("vae", torch.float32)
    pixels, _ = vae.decode(latent)
    assert 0.1 < pixels.std() < 1
    assert (pixels.abs() == 1).float().mean() < 0.2  # few clamped
    encoded, _ = vae.encode(pixels)
    assert 0.05 < encoded.std() < 5


@torch.inference_mode()
def test_activations_of_the_2_2_vae_keep_an_ordinary_size():
    """Its shortcuts add up along the stages."""
    with torch.device("meta"):
        vae = VAE(replace(VAE_2_2, encoder_dim=32, decoder_dim=32))
    tensors = GeneratedTensors(0, "vae", vae)
    vae.load_state_dict({name: tensors.read(name) for name in tensors.specs}, assign=True)
    sizes = []
    for stage in (*vae.decoder.up, *vae.encoder.down):
        stream = stage.stream

        def measured(x, caches, stream=stream):
            sizes.append(float((x := stream(x, caches)).std()))
            return x

        stage.stream = measured
    latent = torch.randn(1, 48, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    pixels, _ = vae.decode(latent)
    assert 0.1 < pixels.std() < 1
    assert (pixels.abs() == 1).float().mean() < 0.2  # few clamped
    encoded, _ = vae.encode(pixels)
    assert 0.05 < encoded.std() < 5
    assert len(sizes) == 8
    assert all(0.3 < size < 20 for size in sizes), sizes
