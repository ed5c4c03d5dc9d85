"""Which checkpoint, which variant: folders, repository ids, generated ones."""

import json
import os

import pytest

from tests.checkpoints.small import make_small, write_small
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.variants import identify
from wantrt.config import DIT_1_3B, DIT_14B, VAE_2_1, VARIANTS, TextEncoderConfig, find_variant
from wantrt.errors import CheckpointError, SettingsError, UnsupportedTaskError

TEXT = TextEncoderConfig()


@pytest.mark.parametrize("name", ["14B", "t2v-14b", "T2V-14B"])
def test_names_and_aliases(name):
    assert find_variant(name).name == "t2v-14b"


def test_unknown_variant_is_told_its_neighbour():
    with pytest.raises(SettingsError, match=r"'t2v-13b'.*did you mean t2v-1.3b\?"):
        find_variant("t2v-13b")


@pytest.mark.parametrize("name", [n for n, row in VARIANTS.items() if row.task == "t2v"])
def test_every_row_finds_itself(name):
    row = VARIANTS[name]
    found, _ = identify(
        row.task, [e.dit for e in row.experts], row.vae, row.text_encoder, requested=None
    )
    assert found == row


def test_one_a14b_expert_looks_like_the_14b_model_and_that_is_said():
    found, note = identify("t2v", [DIT_14B], VAE_2_1, TEXT, source="folder")
    assert found.name == "t2v-14b"
    assert "folder fits t2v-14b and t2v-a14b alike: taken as t2v-14b" in note
    assert identify("t2v", [DIT_1_3B], VAE_2_1, TEXT)[1] is None
    assert identify("t2v", [DIT_14B], VAE_2_1, TEXT, source="Wan-AI/Wan2.1-T2V-14B")[1] is None


def test_a_requested_variant_must_agree(tmp_path):
    folder = write_small(tmp_path, "official")
    with pytest.raises(CheckpointError, match=r"is not t2v-1.3b.*dim 48, not 1536.*VAE"):
        open_checkpoint(folder, "1.3b")
    with pytest.raises(CheckpointError, match="t2v model of 1 expert"):
        open_checkpoint(folder, "t2v-a14b")


def test_other_dimensions_make_a_custom_variant(tmp_path):
    checkpoint = open_checkpoint(write_small(tmp_path, "official"))
    assert checkpoint.variant.name == "custom"
    assert checkpoint.variant.task == "t2v"
    assert checkpoint.variant.experts[0].dit == make_small().variant.experts[0].dit


@pytest.mark.parametrize("variant", ["s2v-14b", "animate-14b"])
def test_tasks_that_are_not_there_yet_say_so_in_one_line(variant):
    with pytest.raises(UnsupportedTaskError) as error:
        open_checkpoint("random:0", variant)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "layout, name, change, task",
    [
        ("official", "config.json", {"model_type": "i2v"}, "i2v"),
        ("official", "config.json", {"_class_name": "WanAnimateModel"}, "animate"),
        ("diffusers", "model_index.json", {"expand_timesteps": True}, "ti2v"),
        ("diffusers", "transformer/config.json", {"pos_embed_seq_len": 514}, "flf2v"),
        ("diffusers", "transformer/config.json", {"vace_layers": [0]}, "vace"),
        ("diffusers", "model_index.json", {"_class_name": "WanImageToVideoPipeline"}, "i2v"),
    ],
)
def test_the_task_is_read_from_the_files(tmp_path, monkeypatch, layout, name, change, task):
    monkeypatch.setattr("wantrt.config.TASKS", ())  # the refusal says which task it would be
    path = write_small(tmp_path, layout) / name
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UnsupportedTaskError, match=f"task {task} is not there yet"):
        open_checkpoint(tmp_path)


# -- The Hugging Face cache -----------------------------------------------------------------------


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """An empty cache folder that huggingface_hub uses, without a network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def put_into_cache(cache, repo_id, folder):
    """As a download leaves it: blobs by hash, snapshots of links, a ref."""
    repo = cache / ("models--" + repo_id.replace("/", "--"))
    snapshot = repo / "snapshots" / ("a" * 40)
    (repo / "blobs").mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(snapshot.name)
    for number, path in enumerate(sorted(p for p in folder.rglob("*") if p.is_file())):
        link = snapshot / path.relative_to(folder)
        link.parent.mkdir(parents=True, exist_ok=True)
        blob = repo / "blobs" / f"{number:064d}"
        blob.write_bytes(path.read_bytes())
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("layout", ["official", "diffusers"])
def test_a_repository_in_the_cache(tmp_path, hub_cache, layout):
    written = write_small(tmp_path / "written", layout)
    snapshot = put_into_cache(hub_cache, "someone/Small-T2V", written)
    checkpoint = open_checkpoint("someone/Small-T2V")
    assert checkpoint.source == "someone/Small-T2V"
    assert checkpoint.fingerprint == open_checkpoint(written).fingerprint
    assert open_checkpoint(snapshot).fingerprint == checkpoint.fingerprint  # named as a folder


def test_a_repository_that_is_not_in_the_cache(hub_cache):
    with pytest.raises(CheckpointError, match="not in the Hugging Face cache"):
        open_checkpoint("someone/Nothing")


def test_a_repository_of_which_a_part_is_missing_says_what(tmp_path, hub_cache):
    written = write_small(tmp_path / "written", "official")
    snapshot = put_into_cache(hub_cache, "someone/Part", written)
    (snapshot / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(CheckpointError, match=r"lacks weights. Looked for \*_VAE"):
        open_checkpoint("someone/Part")


def test_the_official_repository_is_the_default(hub_cache):
    with pytest.raises(CheckpointError, match=r"Wan-AI/Wan2\.1-T2V-1\.3B is not in"):
        open_checkpoint(variant="1.3b")
