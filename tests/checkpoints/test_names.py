"""The name maps, at full size, against the published counts and against diffusers' own modules."""

from functools import cache
from math import prod

import diffusers
import pytest
import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5Config, UMT5EncoderModel

from wantrt.checkpoints.checkpoint import Part, part_configs
from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.checkpoints.layouts import (
    diffusers_dit_config,
    diffusers_text_config,
    diffusers_vae_config,
    unprepared,
)
from wantrt.config import VARIANTS

ROWS = [  # those that differ: the experts of A14B are two of 14B
    VARIANTS[name]
    for name in (
        *("t2v-1.3b", "t2v-14b", "i2v-14b-480p", "flf2v-14b", "vace-1.3b", "vace-14b"),
        *("i2v-a14b", "ti2v-5b", "nano"),
    )
]
PUBLISHED = {  # variant -> part -> (stored tensors, parameters)
    "t2v-1.3b": {"transformer": (825, 1_418_996_800)},
    "t2v-14b": {"transformer": (1095, 14_288_491_584)},
    "i2v-14b-480p": {"transformer": (1303, 16_394_878_784)},
    "i2v-14b-720p": {"transformer": (1303, 16_394_878_784)},
    "flf2v-14b": {"transformer": (1304, 16_395_536_704)},
    "vace-1.3b": {"transformer": (1264, 2_153_972_032)},
    "vace-14b": {"transformer": (1331, 17_337_592_896)},
    "ti2v-5b": {"transformer": (825, 4_999_787_712), "vae": (196, 704_688_668)},
    "t2v-a14b": {"high_noise": (1095, 14_288_491_584), "low_noise": (1095, 14_288_491_584)},
    "i2v-a14b": {"high_noise": (1095, 14_288_901_184), "low_noise": (1095, 14_288_901_184)},
}
ENCODERS = {"text_encoder": (242, 5_680_910_336), "vae": (194, 126_892_531)}


def stored_shapes(variant, part, layout):
    return shapes_of(part_configs(variant)[part], layout)


@cache
def shapes_of(config, layout):
    generated = Part("", config, GeneratedTensors(0, "", meta(config)), "prepared")
    plan, _ = unprepared(generated, layout, torch.float32)
    return {name: shape for name, (_, shape) in plan.items()}


def meta(config):
    return Part("", config, None, "prepared").module(torch.float32)


@pytest.mark.parametrize("layout", ["official", "diffusers"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_the_published_ones(name, layout):
    for part, (tensors, parameters) in (ENCODERS | PUBLISHED[name]).items():
        shapes = stored_shapes(VARIANTS[name], part, layout)
        assert len(shapes) == tensors
        assert sum(prod(shape) for shape in shapes.values()) == parameters


@pytest.mark.parametrize("variant", ROWS, ids=lambda variant: variant.name)
def test_diffusers_names_and_shapes_are_those_of_its_modules(variant):
    dit = diffusers_dit_config(variant.experts[0].dit)
    with torch.device("meta"):
        theirs = {
            variant.experts[0].name: getattr(diffusers, dit["_class_name"]).from_config(dit),
            "vae": AutoencoderKLWan.from_config(diffusers_vae_config(variant.vae)),
            "text_encoder": UMT5EncoderModel(
                UMT5Config(**diffusers_text_config(variant.text_encoder))
            ),
        }
    for part, module in theirs.items():
        expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict().items()}
        expected.pop("encoder.embed_tokens.weight", None)  # tied to shared.weight
        assert stored_shapes(variant, part, "diffusers") == expected


@pytest.mark.parametrize(
    "part, name, shape",
    [
        ("transformer", "patch_embedding.weight", (1536, 16, 1, 2, 2)),
        ("transformer", "blocks.29.modulation", (1, 6, 1536)),
        ("transformer", "blocks.0.cross_attn.k.bias", (1536,)),
        ("transformer", "head.head.weight", (64, 1536)),
        ("vae", "decoder.upsamples.4.residual.2.weight", (384, 192, 3, 3, 3)),
        ("vae", "decoder.upsamples.3.time_conv.weight", (768, 384, 3, 1, 1)),
        ("vae", "decoder.upsamples.11.resample.1.weight", (96, 192, 3, 3)),
        ("vae", "encoder.downsamples.0.residual.0.gamma", (96, 1, 1, 1)),
        ("vae", "encoder.middle.1.norm.gamma", (384, 1, 1)),
        ("vae", "encoder.middle.1.to_qkv.weight", (1152, 384, 1, 1)),
        ("text_encoder", "blocks.23.pos_embedding.embedding.weight", (32, 64)),
        ("text_encoder", "blocks.0.attn.v.weight", (4096, 4096)),
        ("text_encoder", "blocks.0.ffn.gate.0.weight", (10240, 4096)),
    ],
)
def test_official_names_and_shapes(part, name, shape):
    assert stored_shapes(VARIANTS["t2v-1.3b"], part, "official")[name] == shape


@pytest.mark.parametrize(
    "name, shape",
    [
        ("encoder.conv1.weight", (160, 12, 3, 3, 3)),
        ("encoder.downsamples.0.downsamples.2.resample.1.weight", (160, 160, 3, 3)),
        ("encoder.downsamples.1.downsamples.0.shortcut.weight", (320, 160, 1, 1, 1)),
        ("encoder.downsamples.2.downsamples.2.time_conv.weight", (640, 640, 3, 1, 1)),
        ("decoder.upsamples.1.upsamples.3.resample.1.weight", (1024, 1024, 3, 3)),
        ("decoder.upsamples.0.upsamples.3.time_conv.weight", (2048, 1024, 3, 1, 1)),
        ("decoder.upsamples.2.upsamples.0.shortcut.weight", (512, 1024, 1, 1, 1)),
        ("decoder.upsamples.3.upsamples.0.shortcut.weight", (256, 512, 1, 1, 1)),
        ("decoder.head.2.weight", (12, 256, 3, 3, 3)),
    ],
)
def test_official_names_and_shapes_of_the_2_2_vae(name, shape):
    assert stored_shapes(VARIANTS["ti2v-5b"], "vae", "official")[name] == shape
