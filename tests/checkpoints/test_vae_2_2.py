"""The VAE of Wan 2.2: recognised as such in both layouts, read, and refused where it cannot be."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.checkpoints.small import make_small, write_small
from tests.checkpoints.test_names import shapes_of
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.configs import Fields, diffusers_vae, official_vae
from wantrt.checkpoints.layouts import diffusers_vae_config, model_index
from wantrt.checkpoints.tensors import Stored
from wantrt.checkpoints.variants import identify
from wantrt.config import VAE_2_1, VAE_2_2, VARIANTS
from wantrt.errors import CheckpointError

LAYOUTS = ["official", "diffusers"]
TI2V = VARIANTS["ti2v-5b"]


@pytest.mark.parametrize("vae", [VAE_2_1, VAE_2_2], ids=["2.1", "2.2"])
def test_dimensions_at_full_size(vae):
    stored = {
        name: Stored(torch.float32, shape) for name, shape in shapes_of(vae, "official").items()
    }
    assert official_vae(stored, "the VAE") == vae
    assert diffusers_vae(Fields(Path("config.json"), diffusers_vae_config(vae))) == vae


def test_the_row_of_the_table_finds_itself():
    found, note = identify("ti2v", [TI2V.experts[0].dit], VAE_2_2, TI2V.text_encoder)
    assert (found, note) == (TI2V, None)
    assert model_index(TI2V)["expand_timesteps"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_come_back(tmp_path, layout):
    made = make_small("ti2v-5b")
    opened = open_checkpoint(write_small(tmp_path, layout, variant="ti2v-5b"))
    assert opened.layout == layout
    assert opened.variant.task == "ti2v"
    assert opened.variant.vae == made.variant.vae == replace(VAE_2_2, encoder_dim=8, decoder_dim=12)
    for (name, ours), (other, theirs) in zip(
        opened.read("vae", torch.float32), made.read("vae", torch.float32), strict=True
    ):
        assert name == other
        assert torch.equal(ours, theirs)


def test_the_official_file_has_its_name(tmp_path):
    write_small(tmp_path, "official", variant="ti2v-5b")
    assert (tmp_path / "Wan2.2_VAE.pth").is_file()


def test_both_layouts_prepare_to_the_same_bytes(tmp_path):
    opened = [
        open_checkpoint(write_small(tmp_path / layout, layout, variant="ti2v-5b"))
        for layout in LAYOUTS
    ]
    assert opened[0].fingerprint == opened[1].fingerprint
    files = [
        checkpoint.write("vae", torch.bfloat16, tmp_path / f"{checkpoint.layout}.safetensors")
        for checkpoint in opened
    ]
    assert files[0][0].read_bytes() == files[1][0].read_bytes()


def test_tensors_that_do_not_fit_are_listed(tmp_path):
    folder = write_small(tmp_path, "official", variant="ti2v-5b")
    tensors = torch.load(folder / "Wan2.2_VAE.pth")
    del tensors["encoder.downsamples.1.downsamples.2.time_conv.bias"]
    tensors["decoder.upsamples.0.upsamples.4.residual.0.gamma"] = torch.ones(48, 1, 1, 1)
    torch.save(tensors, folder / "Wan2.2_VAE.pth")
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(folder)
    for line in (
        "vae: 1 missing",
        "encoder.downsamples.1.downsamples.2.time_conv.bias",
        "vae: 1 unexpected",
        "decoder.upsamples.0.upsamples.4.residual.0.gamma",
    ):
        assert line in str(error.value)


def test_a_vae_of_the_other_kind(tmp_path):
    """Its latent is not the transformer's."""
    folder = write_small(tmp_path / "5b", "official", variant="ti2v-5b")
    other = write_small(tmp_path / "1.3b", "official")
    (folder / "Wan2.2_VAE.pth").unlink()
    (other / "Wan2.1_VAE.pth").rename(folder / "Wan2.1_VAE.pth")
    with pytest.raises(CheckpointError, match="latents of 48 channels, the VAE takes 16"):
        open_checkpoint(folder)


def test_patches_that_are_not_square(tmp_path):
    folder = write_small(tmp_path, "official", variant="ti2v-5b")
    tensors = torch.load(folder / "Wan2.2_VAE.pth")
    tensors["encoder.conv1.weight"] = torch.zeros(8, 6, 3, 3, 3)
    torch.save(tensors, folder / "Wan2.2_VAE.pth")
    with pytest.raises(CheckpointError, match="takes 6 channels"):
        open_checkpoint(folder)


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"dim_mult": [1, 3, 4, 4]}, r"\[1, 3, 4, 4\] times the channels"),
        ({"dim_mult": [4, 2, 1, 1]}, "times the channels"),
        ({"dim_mult": [1, 32, 32, 32]}, "times the channels"),
        ({"is_residual": "yes"}, "'is_residual' is 'yes'"),
        ({"is_residual": False}, "missing"),
        ({"patch_size": 0}, "'patch_size' is 0"),
        ({"patch_size": 4}, "'in_channels' is 12"),
        ({"out_channels": 3}, "'out_channels' is 3"),
    ],
)
def test_impossible_diffusers_configs(tmp_path, change, expected):
    folder = write_small(tmp_path, "diffusers", variant="ti2v-5b")
    path = folder / "vae" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match=expected):
        open_checkpoint(folder)
