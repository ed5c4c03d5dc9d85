"""The image encoder in checkpoints: found, read in both layouts, and refused where it cannot be."""

import json
import pickle
import shutil
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, CLIPVisionModel

from tests.checkpoints.test_names import shapes_of
from wantrt.build import plan_build
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.configs import Fields, diffusers_image_encoder, official_image_encoder
from wantrt.checkpoints.layouts import (
    OFFICIAL_IMAGE_FILE,
    diffusers_image_config,
    write_diffusers,
    write_official,
)
from wantrt.checkpoints.tensors import Stored
from wantrt.config import VARIANTS, ImageEncoderConfig
from wantrt.errors import CheckpointError, SettingsError

FULL = ImageEncoderConfig()
SMALL = (
    "random:0:dim=48,ffn_dim=80,num_heads=2,num_layers=2,vae.encoder_dim=8,vae.decoder_dim=8,"
    "text_encoder.vocab_size=100,text_encoder.dim=32,text_encoder.attention_dim=64,"
    "text_encoder.ffn_dim=40,text_encoder.num_heads=4,text_encoder.num_layers=1,"
    "image_encoder.dim=160,image_encoder.num_heads=2,image_encoder.ffn_dim=96,"
    "image_encoder.num_layers=3,image_encoder.image_size=42"
)
LAYOUTS = ["official", "diffusers"]
WRITERS = {"official": write_official, "diffusers": write_diffusers}


@pytest.fixture(scope="module")
def masters(tmp_path_factory):
    """variant, layout -> a folder that stays as it is."""
    folders = {}
    for variant in ("i2v-14b-480p", "flf2v-14b"):
        made = open_checkpoint(SMALL, variant)
        for layout in LAYOUTS:
            folders[variant, layout] = tmp_path_factory.mktemp(layout)
            WRITERS[layout](made, folders[variant, layout])
    return folders


@pytest.fixture
def official(masters, tmp_path):
    return copied(masters["i2v-14b-480p", "official"], tmp_path / "official")


@pytest.fixture
def diffusers(masters, tmp_path):
    return copied(masters["i2v-14b-480p", "diffusers"], tmp_path / "diffusers")


def copied(master: Path, folder: Path) -> Path:
    shutil.copytree(master, folder)
    return folder


def error_of(source):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source)
    return str(error.value)


def tensors_of(checkpoint):
    """Copies: what is read is a view of a file, and the file is going to be changed."""
    return {n: tensor.clone() for n, tensor in checkpoint.read("image_encoder", torch.float32)}


def change_pth(folder, change):
    path = folder / OFFICIAL_IMAGE_FILE
    tensors = torch.load(path)
    change(tensors)
    torch.save(tensors, path)


def change_config(folder, **values):
    path = folder / "image_encoder" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


# -- Names and dimensions at full size ------------------------------------------------------------


@pytest.mark.parametrize("layout, count", [("official", 377), ("diffusers", 501)])
def test_counts_are_the_published_ones(layout, count):
    shapes = shapes_of(FULL, layout)
    assert len(shapes) == count
    assert sum(prod(shape) for shape in shapes.values()) == 611_086_080


def test_diffusers_names_and_shapes_are_those_of_transformers():
    with torch.device("meta"):
        theirs = CLIPVisionModel(CLIPVisionConfig(**diffusers_image_config(FULL))).state_dict()
    idle = {name for name in theirs if name.startswith(("encoder.layers.31.", "post_layernorm."))}
    assert sum(tensor.numel() for tensor in theirs.values()) == 632_076_800 - 1280 * 1024
    assert shapes_of(FULL, "diffusers") == {
        name: tuple(tensor.shape) for name, tensor in theirs.items() if name not in idle
    }


@pytest.mark.parametrize(
    "name, shape",
    [
        ("visual.cls_embedding", (1, 1, 1280)),
        ("visual.patch_embedding.weight", (1280, 3, 14, 14)),
        ("visual.pos_embedding", (1, 257, 1280)),
        ("visual.pre_norm.bias", (1280,)),
        ("visual.transformer.30.norm2.weight", (1280,)),
        ("visual.transformer.0.attn.to_qkv.weight", (3840, 1280)),
        ("visual.transformer.0.attn.to_qkv.bias", (3840,)),
        ("visual.transformer.0.attn.proj.weight", (1280, 1280)),
        ("visual.transformer.0.mlp.0.weight", (5120, 1280)),
        ("visual.transformer.0.mlp.2.weight", (1280, 5120)),
    ],
)
def test_official_names_and_shapes(name, shape):
    assert shapes_of(FULL, "official")[name] == shape


def test_full_size_is_recognised():
    stored = {n: Stored(torch.float32, s) for n, s in shapes_of(FULL, "official").items()}
    assert official_image_encoder(stored, "CLIP") == FULL  # cut down to what runs
    stored |= {
        name.replace(".30.", ".31."): spec for name, spec in stored.items() if ".30." in name
    }
    stored["visual.post_norm.weight"] = Stored(torch.float32, (1280,))
    assert official_image_encoder(stored, "CLIP") == FULL
    values = diffusers_image_config(FULL)
    assert values["num_hidden_layers"] == 32
    assert diffusers_image_encoder(Fields(Path("config.json"), values)) == FULL


def test_the_variants_with_an_image_encoder():
    with_image = {name for name, row in VARIANTS.items() if "image_encoder" in row.parts}
    assert with_image == {"i2v-14b-480p", "i2v-14b-720p", "flf2v-14b", "animate-14b"}
    assert VARIANTS["i2v-14b-480p"].image_rows == 257
    assert VARIANTS["flf2v-14b"].image_rows == 514


# -- Reading --------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["i2v-14b-480p", "flf2v-14b"])
def test_weights_come_back_from_both_layouts(masters, variant):
    made = open_checkpoint(SMALL, variant)
    opened = [open_checkpoint(masters[variant, layout]) for layout in LAYOUTS]
    assert opened[0].fingerprint == opened[1].fingerprint
    for checkpoint in opened:
        assert list(checkpoint.parts) == ["text_encoder", "image_encoder", "transformer", "vae"]
        assert checkpoint.variant.image_encoder == made.variant.image_encoder
        assert checkpoint.variant.experts == made.variant.experts
        for part in made.parts:
            expected = dict(made.read(part, torch.float32))
            actual = dict(checkpoint.read(part, torch.float32))
            assert list(actual) == list(expected)
            assert all(torch.equal(actual[name], expected[name]) for name in expected), part


def test_what_is_not_computed_may_be_there_or_not(official, diffusers):
    expected = tensors_of(open_checkpoint(official))

    def grow(tensors):
        tensors["visual.head"] = torch.ones(160, 1024)
        tensors["textual.token_embedding.weight"] = torch.ones(7, 3)
        tensors["log_scale"] = torch.ones(())

    change_pth(official, grow)
    assert_equal(tensors_of(open_checkpoint(official)), expected)
    path = diffusers / "image_encoder" / "model.safetensors"
    tensors = {
        name: tensor
        for name, tensor in load_file(path).items()
        if not name.startswith(("encoder.layers.3.", "post_layernorm."))
    }
    save_file(tensors, path)
    assert_equal(tensors_of(open_checkpoint(diffusers)), expected)


def test_an_official_file_cut_down_to_what_runs(official):
    expected = tensors_of(open_checkpoint(official))

    def cut(tensors):
        for name in [n for n in tensors if n.startswith(("visual.post", "visual.transformer.3."))]:
            del tensors[name]

    change_pth(official, cut)
    assert_equal(tensors_of(open_checkpoint(official)), expected)


def test_names_of_older_transformers(diffusers):
    expected = tensors_of(open_checkpoint(diffusers))
    path = diffusers / "image_encoder" / "model.safetensors"
    older = {f"vision_model.{name}": tensor for name, tensor in load_file(path).items()}
    older["vision_model.embeddings.position_ids"] = torch.arange(10)[None]
    older["visual_projection.weight"] = torch.ones(1024, 160)
    save_file(older, path)
    assert_equal(tensors_of(open_checkpoint(diffusers)), expected)


def assert_equal(actual, expected):
    assert list(actual) == list(expected)
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_bundles_have_it_in_fp16_where_the_transformer_is_bf16(masters, tmp_path):
    source = str(masters["i2v-14b-480p", "official"])
    for precision, expected in (("bf16", "fp16"), ("fp16", "fp16"), ("fp32", "fp32")):
        plan = plan_build(
            checkpoint=source, out=tmp_path / precision, precision=precision, runtime="torch"
        )
        assert plan.precision["image_encoder"] == expected


# -- What does not fit ----------------------------------------------------------------------------


def test_a_missing_file_is_named(official, diffusers):
    (official / OFFICIAL_IMAGE_FILE).unlink()
    (official / "Wan2.1_VAE.pth").unlink()
    message = error_of(official)
    assert "models_clip*" in message
    assert "*_VAE" in message
    (diffusers / "image_encoder" / "model.safetensors").unlink()
    assert "image_encoder/model" in error_of(diffusers)


def test_a_missing_config_is_named(diffusers):
    (diffusers / "image_encoder" / "config.json").unlink()
    assert "image_encoder/config.json" in error_of(diffusers)


def test_misfits_are_listed_by_name(official):
    def damage(tensors):
        del tensors["visual.pre_norm.bias"]
        tensors["visual.transformer.1.mlp.2.weight"] = torch.ones(160, 5)
        tensors["visual.transformer.0.attn.proj.bias"] = torch.ones(160, dtype=torch.int8)
        tensors["visual.extra"] = torch.ones(3)
        tensors["visual.transformer.2.gate"] = torch.ones(3)

    change_pth(official, damage)
    message = error_of(official)
    assert "image_encoder: 1 missing\n  visual.pre_norm.bias" in message
    assert "image_encoder: 2 misshapen" in message
    assert "visual.transformer.1.mlp.2.weight is (160, 5), expected (160, 96)" in message
    assert "visual.transformer.0.attn.proj.bias is torch.int8" in message
    assert "image_encoder: 2 unexpected" in message


class Harmful:
    def __reduce__(self):
        return print, ("executed",)


def test_a_pickle_of_other_objects_is_not_executed(official, capsys):
    path = official / OFFICIAL_IMAGE_FILE
    path.write_bytes(pickle.dumps({"visual.head": Harmful()}, 2))
    assert "executed" not in error_of(official)
    torch.save({"visual.head": Harmful()}, path)
    assert "not tensors" in error_of(official)
    assert "executed" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "damaged or incomplete"),
        (b"PK\x03\x04 broken", "damaged or incomplete"),
        (pickle.dumps([], 2), "damaged or incomplete"),
    ],
    ids=["empty", "zip", "no dictionary"],
)
def test_a_damaged_file(official, content, words):
    (official / OFFICIAL_IMAGE_FILE).write_bytes(content)
    message = error_of(official)
    assert OFFICIAL_IMAGE_FILE in message
    assert words in message


def test_a_file_of_another_model(official):
    shutil.copyfile(official / "Wan2.1_VAE.pth", official / OFFICIAL_IMAGE_FILE)
    message = error_of(official)
    assert f"the image encoder of {official} has no tensor visual.patch_embedding.weight" in message


@pytest.mark.parametrize(
    "values, words",
    [
        ({"hidden_act": "quick_gelu"}, "hidden_act"),
        ({"hidden_act": None}, "quick_gelu"),
        ({"num_attention_heads": 3}, "3 heads"),
        ({"num_hidden_layers": 1}, "one block"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"num_channels": 4}, "num_channels"),
        ({"patch_size": 100}, "larger than the image"),
        ({"model_type": "clip"}, "model_type"),
        ({"image_size": 56}, "misshapen"),
        ({"num_hidden_layers": 9}, "missing"),
    ],
    ids=str,
)
def test_impossible_dimensions(diffusers, values, words):
    change_config(diffusers, **values)
    assert words in error_of(diffusers)


def test_parts_that_do_not_fit_each_other(diffusers):
    path = diffusers / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_dim": 96}))
    assert "image features of 96 channels, the image encoder gives 160" in error_of(diffusers)


def test_positions_of_another_image_size(masters, tmp_path):
    folder = copied(masters["flf2v-14b", "diffusers"], tmp_path / "folder")
    path = folder / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pos_embed_seq_len": 514}))
    assert "positions for 514 rows of image features" in error_of(folder)


def test_a_variant_without_the_encoder_that_it_needs():
    small = SMALL.partition(",image_encoder")[0]
    with pytest.raises(SettingsError, match=r"\[vae\.\|text_encoder\.\]field"):
        open_checkpoint(f"{small},image_encoder.dim=160", "t2v-1.3b")


def test_generated_dimensions_that_cannot_be(tmp_path):
    with pytest.raises(CheckpointError, match="7 heads"):
        open_checkpoint(SMALL + ",image_encoder.num_heads=7", "i2v-14b-480p")
