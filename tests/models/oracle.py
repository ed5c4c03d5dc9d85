"""diffusers' and transformers' modules with the weights of one of our checkpoints.

The weights reach both sides through files: written in the official layout for our readers, in the
Diffusers layout for theirs.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import UMT5EncoderModel

from wantrt.checkpoints import Checkpoint, open_checkpoint
from wantrt.checkpoints.layouts import write_diffusers, write_official

DIMENSIONS = (
    "random:0:dim=96,ffn_dim=224,num_heads=4,num_layers=3,text_len=48,"
    "vae.encoder_dim=8,vae.decoder_dim=16,"
    "text_encoder.vocab_size=100,text_encoder.dim=64,text_encoder.attention_dim=96,"
    "text_encoder.ffn_dim=160,text_encoder.num_heads=4,text_encoder.num_layers=3"
)


class Oracle:
    """Our checkpoint (official layout) and their folder (Diffusers layout), of the same weights."""

    def __init__(self, folder: Path, variant: str = "t2v-1.3b") -> None:
        generated = open_checkpoint(DIMENSIONS, variant)
        write_official(generated, folder / "official", shard_bytes=1_000_000)
        write_diffusers(generated, folder / "diffusers", shard_bytes=1_000_000)
        self.ours: Checkpoint = open_checkpoint(folder / "official")
        self._theirs = folder / "diffusers"

    def dit(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return self._load(WanTransformer3DModel, "transformer", dtype)

    def vae(self) -> nn.Module:
        return self._load(AutoencoderKLWan, "vae", torch.float32)

    def text_encoder(self, dtype: torch.dtype = torch.float32) -> nn.Module:
        return UMT5EncoderModel.from_pretrained(self._theirs / "text_encoder", dtype=dtype).eval()

    def _load(self, kind: type, folder: str, dtype: torch.dtype) -> nn.Module:
        return kind.from_pretrained(self._theirs / folder, torch_dtype=dtype).eval()


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value expected."""
    return float((actual.double() - expected.double()).abs().max() / expected.abs().max())


def cosine(actual: Tensor, expected: Tensor) -> float:
    return float(
        torch.cosine_similarity(actual.double().flatten(), expected.double().flatten(), dim=0)
    )
