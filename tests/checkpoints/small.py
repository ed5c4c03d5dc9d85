"""Small generated checkpoints, and the folders made of them."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

import torch

from wantrt.checkpoints import Checkpoint, open_checkpoint
from wantrt.checkpoints.layouts import write_diffusers, write_official

SMALL = (
    "random:0:dim=48,ffn_dim=80,num_heads=2,num_layers=2,vae.encoder_dim=8,vae.decoder_dim=12,"
    "text_encoder.vocab_size=100,text_encoder.dim=32,text_encoder.attention_dim=64,"
    "text_encoder.ffn_dim=40,text_encoder.num_heads=4,text_encoder.num_layers=2"
)
WRITERS = {"official": write_official, "diffusers": write_diffusers}


@cache
def make_small(variant: str = "t2v-1.3b") -> Checkpoint:
    return open_checkpoint(SMALL, variant)


def write_small(
    folder: Path,
    layout: str,
    dtype: torch.dtype = torch.float32,
    variant: str = "t2v-1.3b",
    shard_bytes: int = 1 << 30,
) -> Path:
    """A folder of one's own: written once for all tests, then copied."""
    master = _master(layout, dtype, variant, shard_bytes)
    shutil.copytree(master.name, folder, dirs_exist_ok=True)
    return folder


@cache
def _master(
    layout: str, dtype: torch.dtype, variant: str, shard_bytes: int
) -> tempfile.TemporaryDirectory[str]:
    master = tempfile.TemporaryDirectory()
    WRITERS[layout](make_small(variant), Path(master.name), dtype, shard_bytes)
    return master
