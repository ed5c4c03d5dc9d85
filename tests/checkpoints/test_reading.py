"""Both layouts, every way they are stored, give the weights that were written."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.small import make_small, write_small
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.checkpoint import part_configs
from wantrt.checkpoints.layouts import write_diffusers, write_official
from wantrt.config import VARIANTS

LAYOUTS = ["official", "diffusers"]


def dimensions(checkpoint):
    return part_configs(checkpoint.variant)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000], ids=["whole", "sharded"])
def test_weights_come_back(tmp_path, layout, shard_bytes):
    made = make_small()
    opened = open_checkpoint(write_small(tmp_path, layout, shard_bytes=shard_bytes))
    assert opened.layout == layout
    assert dimensions(opened) == dimensions(made)
    for part in made.parts:
        for (name, ours), (other, theirs) in zip(
            opened.read(part, torch.float32), made.read(part, torch.float32), strict=True
        ):
            assert name == other
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_both_layouts_prepare_to_the_same_bytes(tmp_path, stored):
    opened = [open_checkpoint(write_small(tmp_path / layout, layout, stored)) for layout in LAYOUTS]
    assert opened[0].fingerprint == opened[1].fingerprint
    for part in opened[0].parts:
        for dtype in (torch.float32, torch.bfloat16):
            files = [
                checkpoint.write(part, dtype, tmp_path / f"{checkpoint.layout}-{part}.safetensors")
                for checkpoint in opened
            ]
            assert [f.read_bytes() for f in files[0]] == [f.read_bytes() for f in files[1]]


def test_prepared_dtypes_are_those_of_the_module(tmp_path):
    checkpoint = open_checkpoint(write_small(tmp_path, "official", torch.float16))
    (file,) = checkpoint.write("transformer", torch.bfloat16, tmp_path / "out.safetensors")
    written = load_file(file)
    module = checkpoint.parts["transformer"].module(torch.bfloat16)
    assert {n: t.dtype for n, t in written.items()} == {
        name: parameter.dtype for name, parameter in module.named_parameters()
    }
    assert written["blocks.0.modulation"].dtype == torch.float32
    assert written["blocks.0.ffn.up.weight"].dtype == torch.bfloat16


def test_float8_weights_are_read(tmp_path):
    folder = write_small(tmp_path, "official")
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    name = "blocks.0.ffn.0.weight"
    tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, path)
    read = dict(open_checkpoint(folder).read("transformer", torch.float32))
    assert torch.equal(read["blocks.0.ffn.up.weight"], tensors[name].float())


def test_vae_and_umt5_may_be_safetensors_in_the_official_layout(tmp_path):
    write_official(make_small(), tmp_path, pickled=False)
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [
        ".json",
        ".safetensors",
        ".safetensors",
        ".safetensors",
    ]
    assert dimensions(open_checkpoint(tmp_path)) == dimensions(make_small())


def test_pth_of_old_torch_is_read(tmp_path):
    folder = write_small(tmp_path, "official")
    path = folder / "Wan2.1_VAE.pth"
    torch.save(torch.load(path), path, _use_new_zipfile_serialization=False)
    assert dimensions(open_checkpoint(folder)) == dimensions(make_small())


def test_old_diffusers_checkpoints_with_tied_and_unused_tensors(tmp_path):
    folder = write_small(tmp_path, "diffusers")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file(load_file(path) | {"blocks.0.attn2.norm_added_q.weight": torch.ones(48)}, path)
    path = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(path)
    both = tensors | {"encoder.embed_tokens.weight": tensors["shared.weight"].clone()}
    save_file(both, path)
    expected = dict(open_checkpoint(folder).read("text_encoder", torch.float32))
    save_file({n: t for n, t in both.items() if n != "shared.weight"}, path)
    only_tied = dict(open_checkpoint(folder).read("text_encoder", torch.float32))
    assert torch.equal(only_tied["embed.weight"], expected["embed.weight"])


def test_two_experts(tmp_path):
    for layout in LAYOUTS:
        folder = write_small(tmp_path / layout, layout, variant="t2v-a14b")
        checkpoint = open_checkpoint(folder)
        assert list(checkpoint.parts) == ["text_encoder", "high_noise", "low_noise", "vae"]
        assert checkpoint.variant.boundary_ratios == (0.875,)
        high, low = (
            next(checkpoint.read(part, torch.float32))[1] for part in ("high_noise", "low_noise")
        )
        made = make_small("t2v-a14b")
        assert torch.equal(high, next(made.read("high_noise", torch.float32))[1])
        assert torch.equal(low, next(made.read("low_noise", torch.float32))[1])


def test_text_len_of_a_diffusers_transformer(tmp_path):
    """The config may say it; else it is that of the variant with these dimensions, else 512."""
    folder = write_small(tmp_path, "diffusers")
    assert open_checkpoint(folder).variant.experts[0].dit.text_len == 512
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"text_len": 77}))
    assert open_checkpoint(folder).variant.experts[0].dit.text_len == 77
    nano = tmp_path / "nano"
    write_diffusers(open_checkpoint("random:0", "nano"), nano)
    path = nano / "transformer" / "config.json"
    config = json.loads(path.read_text())
    del config["text_len"]
    path.write_text(json.dumps(config))
    assert open_checkpoint(nano).variant == VARIANTS["nano"]


def test_scheduler_and_index_are_recorded(tmp_path):
    checkpoint = open_checkpoint(write_small(tmp_path, "diffusers"))
    assert checkpoint.settings["scheduler_config"]["flow_shift"] == 5.0
    assert checkpoint.settings["model_index"]["_class_name"] == "WanPipeline"


def test_changed_weights_change_the_fingerprint(tmp_path):
    folder = write_small(tmp_path, "official")
    before = open_checkpoint(folder).fingerprint
    assert open_checkpoint(folder).fingerprint == before
    path = folder / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["blocks.1.ffn.2.weight"] *= 1.01
    save_file(tensors, path)
    assert open_checkpoint(folder).fingerprint != before


def test_loaded_weights_may_be_changed_without_changing_the_file(tmp_path):
    folder = write_small(tmp_path, "diffusers")
    module = open_checkpoint(folder).load("vae", torch.float32)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    again = dict(open_checkpoint(folder).read("vae", torch.float32))
    assert again["decoder.conv_in.weight"].abs().sum() > 0
