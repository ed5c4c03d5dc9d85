"""The image encoder against transformers, with the same weights through both readers."""

from functools import cache

import pytest
import torch
from transformers import CLIPVisionModel

from tests.models.oracle import cosine, relative_error
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.checkpoint import meta_module
from wantrt.checkpoints.layouts import write_diffusers, write_official
from wantrt.config import ImageEncoderConfig
from wantrt.models.components import image_components

SMALL = (
    "random:0:dim=48,ffn_dim=80,num_heads=2,num_layers=2,vae.encoder_dim=8,vae.decoder_dim=8,"
    "text_encoder.vocab_size=100,text_encoder.dim=32,text_encoder.attention_dim=64,"
    "text_encoder.ffn_dim=40,text_encoder.num_heads=4,text_encoder.num_layers=1,"
    "image_encoder.dim=160,image_encoder.num_heads=2,image_encoder.ffn_dim=224,"
    "image_encoder.num_layers=5,image_encoder.image_size=70"
)
LAYOUTS = ["official", "diffusers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same weights in both layouts."""
    folder = tmp_path_factory.mktemp("clip")
    made = open_checkpoint(SMALL, "i2v-14b-480p")
    write_official(made, folder / "official")
    write_diffusers(made, folder / "diffusers")
    return folder


@cache
def reference(folder):
    path = folder / "diffusers" / "image_encoder"
    return CLIPVisionModel.from_pretrained(path, attn_implementation="eager").eval()


def pixels(count):
    return torch.randn(count, 3, 70, 70, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("layout", LAYOUTS)
@torch.inference_mode()
def test_matches_transformers(folder, layout, count):
    encoder = open_checkpoint(folder / layout).load("image_encoder", torch.float32)
    ours = encoder(pixels(count))
    theirs = reference(folder)(pixels(count), output_hidden_states=True).hidden_states[-2]
    assert ours.shape == theirs.shape == (count, 26, 160)
    assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@torch.inference_mode()
def test_low_precision_is_no_worse_than_theirs(folder, dtype):
    """Ours keeps the residual and the norms in float32."""
    exact = reference(folder)(pixels(2), output_hidden_states=True).hidden_states[-2]
    path = folder / "diffusers" / "image_encoder"
    theirs = CLIPVisionModel.from_pretrained(path, dtype=dtype).eval()
    theirs = theirs(pixels(2).to(dtype), output_hidden_states=True).hidden_states[-2]
    encoder = open_checkpoint(folder / "official").load("image_encoder", dtype)
    ours = encoder(pixels(2))
    assert ours.dtype == torch.float32
    assert cosine(ours, exact) >= cosine(theirs, exact)
    assert relative_error(ours, exact) <= relative_error(theirs, exact)


@torch.inference_mode()
def test_the_component_is_the_module(folder):
    checkpoint = open_checkpoint(folder / "official")
    (component,) = image_components(checkpoint.variant.image_encoder, torch.float32)
    assert set(component.weights) == set(checkpoint.parts["image_encoder"].shapes)
    module = component.module
    module.load_state_dict(dict(checkpoint.read("image_encoder", torch.float32)), assign=True)
    expected = checkpoint.load("image_encoder", torch.float32)(pixels(2))
    assert torch.equal(module(pixels(2))[0], expected)


def test_dimensions_at_full_size():
    (component,) = image_components(ImageEncoderConfig(), torch.float16)
    assert component.inputs["pixels"].shape == ("B", 3, 224, 224)
    assert component.outputs["features"].shape == ("B", 257, 1280)
    assert ImageEncoderConfig().head_dim == 80
    module = meta_module(ImageEncoderConfig(), torch.float16)
    dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
    assert dtypes["blocks.30.qkv.weight"] == torch.float16
    assert dtypes["blocks.30.attn_norm.weight"] == dtypes["embed.positions"] == torch.float32
