"""Prepared files: whole or not at all, the same bytes every time, resumable."""

import os

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoints.small import SMALL, make_small, write_small
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.writer import write_safetensors
from wantrt.errors import BuildError


def test_written_tensors_are_the_read_ones(tmp_path):
    checkpoint = make_small()
    files = checkpoint.write("transformer", torch.bfloat16, tmp_path / "dit.safetensors")
    assert [file.name for file in files] == ["dit.safetensors"]
    written = load_file(files[0])
    for name, tensor in checkpoint.read("transformer", torch.bfloat16):
        assert torch.equal(written.pop(name), tensor)
    assert not written


def test_shards_and_progress(tmp_path):
    seen = []
    files = make_small().write(
        "vae",
        torch.float32,
        tmp_path / "vae.safetensors",
        progress=lambda done, total: seen.append((done, total)),
        shard_bytes=400_000,
    )
    assert len(files) > 2
    assert files[0].name == f"vae-00001-of-{len(files):05d}.safetensors"
    joined = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert joined.keys() == dict(make_small().read("vae", torch.float32)).keys()
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(tensor.nbytes for tensor in joined.values())


def test_tensors_are_aligned(tmp_path):
    """Sessions bind mapped weights in place; torch needs them at multiples of their item size."""
    (file,) = make_small().write("transformer", torch.bfloat16, tmp_path / "dit.safetensors")
    from wantrt.checkpoints.tensors import read_header

    header = read_header(file)
    assert min(offset for _, offset in header.values()) % 64 == 0
    assert all(offset % stored.dtype.itemsize == 0 for stored, offset in header.values())


def test_a_second_preparation_keeps_what_is_there_and_makes_what_is_not(tmp_path):
    checkpoint = open_checkpoint(write_small(tmp_path / "source", "official"))
    arguments = ("vae", torch.float32, tmp_path / "vae.safetensors")
    files = checkpoint.write(*arguments, shard_bytes=400_000)
    before = [(file.read_bytes(), file.stat().st_ino) for file in files]
    files[1].unlink()
    files[2].write_bytes(files[2].read_bytes()[:-1])
    assert checkpoint.write(*arguments, shard_bytes=400_000) == files
    after = [(file.read_bytes(), file.stat().st_ino) for file in files]
    assert [content for content, _ in after] == [content for content, _ in before]
    assert after[0][1] == before[0][1]  # not written again


def test_files_of_another_checkpoint_are_replaced(tmp_path):
    path = tmp_path / "vae.safetensors"
    make_small().write("vae", torch.float32, path)
    other = open_checkpoint(SMALL.replace("random:0", "random:1"), "t2v-1.3b")
    other.write("vae", torch.float32, path)
    expected = dict(other.read("vae", torch.float32))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in load_file(path).items())


def test_an_interruption_leaves_no_partial_file(tmp_path):
    def interrupt(done, total):
        if done > total // 2:
            raise KeyboardInterrupt

    checkpoint = make_small()
    with pytest.raises(KeyboardInterrupt):
        checkpoint.write("vae", torch.float32, tmp_path / "vae.safetensors", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(tmp_path):
    with pytest.raises(BuildError, match="cannot write"):
        make_small().write("vae", torch.float32, tmp_path / "missing" / "vae.safetensors")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk(tmp_path, monkeypatch):
    from wantrt.checkpoints import writer

    shard = writer.split_into_shards({"a": (torch.float32, (100_000,))}, 1 << 30)[0]
    (tmp_path / ".a.safetensors.partial").symlink_to("/dev/full")
    with pytest.raises(BuildError, match="No space left"):
        write_safetensors(tmp_path / "a.safetensors", shard, lambda name: [torch.zeros(100_000)])
    assert list(tmp_path.iterdir()) == []
