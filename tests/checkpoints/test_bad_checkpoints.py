"""Damaged, foreign and hostile checkpoints: one clear error, before anything long."""

import json
import pickle
from collections import OrderedDict

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.small import write_small
from wantrt.checkpoints import find_nonfinite, open_checkpoint
from wantrt.errors import CheckpointError

DIT = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def official(tmp_path):
    return write_small(tmp_path / "checkpoint", "official")


@pytest.fixture
def diffusers(tmp_path):
    return write_small(tmp_path / "checkpoint", "diffusers", shard_bytes=50_000)


def error_of(source):
    with pytest.raises(CheckpointError) as error:
        open_checkpoint(source)
    return str(error.value)


# -- Missing --------------------------------------------------------------------------------------


def test_a_folder_without_a_checkpoint_says_what_was_looked_for(tmp_path):
    message = error_of(tmp_path)
    assert "transformer/config.json" in message
    assert "config.json" in message


def test_a_source_that_is_nothing(tmp_path):
    assert "no such folder" in error_of(tmp_path / "nowhere")


def test_all_missing_files_are_named_at_once(official):
    (official / "Wan2.1_VAE.pth").unlink()
    (official / DIT).unlink()
    message = error_of(official)
    assert "*_VAE.safetensors" in message
    assert DIT in message


def test_missing_shards_are_named(diffusers):
    shards = sorted((diffusers / "transformer").glob("*-of-*.safetensors"))
    shards[0].unlink()
    shards[1].unlink()
    message = error_of(diffusers)
    assert shards[0].name in message
    assert shards[1].name in message


@pytest.mark.parametrize("name", ["vae/config.json", "text_encoder/config.json"])
def test_missing_configs_are_named(diffusers, name):
    (diffusers / name).unlink()
    assert name in error_of(diffusers)


# -- Tensors --------------------------------------------------------------------------------------


def test_misfits_of_all_parts_are_listed_by_name_in_one_error(official):
    tensors = load_file(official / DIT)
    del tensors["blocks.1.ffn.2.bias"], tensors["blocks.0.self_attn.k.weight"]
    tensors["blocks.0.modulation"] = tensors["blocks.0.modulation"][:, :5].contiguous()
    tensors["blocks.7.extra"] = torch.zeros(3)
    tensors["head.head.bias"] = tensors["head.head.bias"].to(torch.int8)
    save_file(tensors, official / DIT)
    vae = torch.load(official / "Wan2.1_VAE.pth")
    del vae["decoder.conv1.bias"]
    torch.save(vae, official / "Wan2.1_VAE.pth")
    message = error_of(official)
    for line in (
        "transformer: 2 missing",
        "blocks.1.ffn.2.bias",
        "blocks.0.self_attn.k.weight",
        "blocks.0.modulation is (1, 5, 48), expected (1, 6, 48)",
        "transformer: 1 unexpected",
        "blocks.7.extra",
        "head.head.bias is torch.int8, expected floating point",
        "vae: 1 missing",
        "decoder.conv1.bias",
    ):
        assert line in message


def test_parts_of_different_models(tmp_path, official):
    config = json.loads((official / "config.json").read_text())
    tensors = load_file(official / DIT)
    tensors["text_embedding.0.weight"] = torch.zeros(48, 64)
    save_file(tensors, official / DIT)
    assert config["dim"] == 48
    assert "takes text features of 64 channels, the text encoder gives 32" in error_of(official)


def test_weights_that_are_not_finite_are_found(official):
    tensors = load_file(official / DIT)
    tensors["blocks.1.ffn.0.weight"][3, 4] = float("nan")
    tensors["blocks.0.cross_attn.v.bias"][0] = float("inf")
    save_file(tensors, official / DIT)
    checkpoint = open_checkpoint(official)
    found = find_nonfinite(checkpoint.read("transformer", torch.bfloat16))
    assert found == ["blocks.0.cross_attn.kv.bias", "blocks.1.ffn.up.weight"]
    assert find_nonfinite(checkpoint.read("vae", torch.float32)) == []


# -- Configs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"dim": None}, "has no 'dim'"),
        ({"dim": "48"}, "'dim' is '48'"),
        ({"dim": -1}, "an integer from 1"),
        ({"num_layers": 10**9}, "an integer from 1 to 1000"),
        ({"num_heads": 7}, "heads"),
        ({"model_type": "x2v"}, "model_type is 'x2v'"),
        ({"num_layers": 3}, "blocks.2.modulation"),
        ({"qk_norm": False}, "'qk_norm' is False"),
        ({"model_type": ["t2v"]}, "model_type is ['t2v']"),
        ({"eps": float("nan")}, "'eps' is nan"),
        ({"freq_dim": 33}, "freq_dim is 33"),
        ({"patch_size": [2, 2, 2]}, "patch_size is (2, 2, 2)"),
        ({"in_dim": 36}, "not text to video"),
    ],
)
def test_impossible_configs(official, change, expected):
    path = official / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert expected in error_of(official)


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "[" * 100_000])
def test_configs_that_are_no_json_object(official, text):
    (official / "config.json").write_text(text)
    assert "config.json" in error_of(official)


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("vae/config.json", {"dim_mult": [1, 2, 4, -4]}, "dim_mult is [1, 2, 4, -4]"),
        ("vae/config.json", {"dim_mult": [1, 2, 4, 1 << 40]}, "dim_mult"),
        ("vae/config.json", {"latents_std": [0.0] * 16}, "latents_std above 0"),
        ("vae/config.json", {"latents_mean": [float("inf")] * 16}, "finite latents_mean"),
        ("scheduler/scheduler_config.json", {"flow_shift": "5"}, "'flow_shift' is '5'"),
        ("model_index.json", {"transformer_2": ["diffusers", "X"]}, "no transformer_2/config.json"),
    ],
)
def test_impossible_diffusers_configs(diffusers, name, change, expected):
    path = diffusers / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert expected in error_of(diffusers)


def test_text_encoder_whose_attention_falls_into_no_whole_heads(official):
    path = official / "models_t5_umt5-xxl-enc-bf16.pth"
    tensors = torch.load(path)
    for layer in range(2):
        tensors[f"blocks.{layer}.pos_embedding.embedding.weight"] = torch.zeros(32, 5)
    torch.save(tensors, path)
    assert "64 channels of attention do not make 5 heads" in error_of(official)


# -- Safetensors ----------------------------------------------------------------------------------


def test_truncated_file(official):
    content = (official / DIT).read_bytes()
    for length in (0, 5, 100, len(content) - 1):
        (official / DIT).write_bytes(content[:length])
        assert "damaged or incomplete" in error_of(official)


def test_header_that_claims_gigabytes(official):
    (official / DIT).write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    assert "its header claims 1,099,511,627,776 bytes" in error_of(official)


@pytest.mark.parametrize(
    "header",
    [
        b"not json",
        b"[1, 2]",
        b'{"a": {"dtype": "F32", "shape": [1000000000, 1000], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F32", "shape": [4], "data_offsets": [16, 32]}}',
        b'{"a": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}',
        b'{"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}}',
        b'{"a": {"shape": [4]}}',
        b'{"a": 5}',
    ],
)
def test_headers_that_lie(official, header):
    (official / DIT).write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 16)
    assert "damaged or incomplete" in error_of(official)


def test_index_that_names_files_outside(tmp_path, diffusers):
    secret = tmp_path / "secret.safetensors"
    save_file({"a": torch.zeros(1)}, secret)
    index = diffusers / "transformer" / f"{DIT}.index.json"
    for name in ("../../secret.safetensors", str(secret)):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        assert "leads out of the checkpoint folder" in error_of(diffusers)
    index.write_text(json.dumps({"weight_map": ["a"]}))
    assert "no weight_map" in error_of(diffusers)


def test_links_out_of_the_folder_are_refused(tmp_path, official):
    (official / DIT).rename(tmp_path / "elsewhere.safetensors")
    (official / DIT).symlink_to(tmp_path / "elsewhere.safetensors")
    assert "leads out of the checkpoint folder" in error_of(official)


def test_links_inside_the_folder_are_followed(official):
    (official / DIT).rename(official / "real.safetensors")
    (official / DIT).symlink_to("real.safetensors")
    open_checkpoint(official)


def test_two_files_for_one_part(official):
    (official / "old_VAE.pth").write_bytes((official / "Wan2.1_VAE.pth").read_bytes())
    assert "Wan2.1_VAE.pth and old_VAE.pth both lie" in error_of(official)


# -- Pickles --------------------------------------------------------------------------------------


class Hostile:
    """Its unpickling would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles_that_would_run_code(tmp_path, official, zipped):
    made = tmp_path / "made"
    path = official / "Wan2.1_VAE.pth"
    if zipped:
        torch.save({"conv1.weight": Hostile(made)}, path)
    else:
        path.write_bytes(pickle.dumps(Hostile(made), protocol=2))
    assert str(path) in error_of(official)
    assert not made.exists()


@pytest.mark.parametrize(
    "content",
    [
        {"conv1.weight": torch.zeros(1), "note": "hello"},
        {"state_dict": OrderedDict(a=torch.zeros(1))},
        [torch.zeros(1)],
        {"conv1.weight": torch.zeros(1, device="meta")},
        {"conv1.weight": torch.zeros(1).expand(1_000_000, 1_000)},
    ],
    ids=["text", "nested", "list", "meta", "expanded"],
)
def test_pickles_of_other_things(official, content):
    torch.save(content, official / "Wan2.1_VAE.pth")
    message = error_of(official)
    assert "Wan2.1_VAE.pth" in message
    assert "xpected" in message or "damaged" in message


def test_truncated_pickle(official):
    path = official / "models_t5_umt5-xxl-enc-bf16.pth"
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2):
        path.write_bytes(content[:length])
        assert path.name in error_of(official)


def test_pth_of_another_model(official):
    torch.save({"some.weight": torch.zeros(3)}, official / "Wan2.1_VAE.pth")
    message = error_of(official)
    assert "encoder.conv1.weight" in message
    assert "some.weight" in message
