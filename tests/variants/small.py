"""Every variant in small: checkpoints in both layouts with generated weights, and their bundles."""

import tempfile
from functools import cache
from pathlib import Path

from tests.checkpoints.small import WRITERS
from wantrt.build import plan_build
from wantrt.checkpoints import open_checkpoint
from wantrt.config import VARIANTS
from wantrt.nano.tokenizer import save_tokenizer

DIMENSIONS = (
    "random:0:dim=48,ffn_dim=80,num_heads=2,num_layers={layers},"
    "vae.encoder_dim=8,vae.decoder_dim=8,vae.num_res_blocks=1,"
    "text_encoder.vocab_size=100,text_encoder.dim=32,text_encoder.attention_dim=32,"
    "text_encoder.ffn_dim=40,text_encoder.num_heads=2,text_encoder.num_layers=1"
)
IMAGE_ENCODER = (
    "image_encoder.dim=160,image_encoder.num_heads=2,image_encoder.ffn_dim=64,"
    "image_encoder.num_layers=2"
)
# Two hints each; at places that are not regular where stacks without one are wanted.
LAYERS = {"vace-1.3b": 4, "vace-14b": 6}
LAYOUTS = ("official", "diffusers")
TOKENIZERS = {"official": "google/umt5-xxl", "diffusers": "tokenizer"}


@cache
def checkpoint_of(variant: str, layout: str) -> Path:
    """A folder, not to be changed. Its text encoder knows the words of nano's captions."""
    dimensions = DIMENSIONS.format(layers=LAYERS.get(variant, 2))
    if VARIANTS[variant].image_encoder:
        dimensions = f"{dimensions},{IMAGE_ENCODER}"
    folder = _temporary() / variant / layout
    WRITERS[layout](open_checkpoint(dimensions, variant), folder)
    save_tokenizer(folder / TOKENIZERS[layout])
    return folder


@cache
def bundle_of(variant: str, layout: str = "diffusers") -> Path:
    """The fp32 bundle of a small checkpoint, not to be changed."""
    out = _temporary() / variant / f"bundle-{layout}"
    plan_build(str(checkpoint_of(variant, layout)), out=out, precision="fp32").run()
    return out


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="wantrt-variants-")


def _temporary() -> Path:
    return Path(_folder().name)
