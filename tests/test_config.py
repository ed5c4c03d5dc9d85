"""The table of variants against the published numbers."""

import pytest
import torch

from wantrt.config import (
    NEGATIVE_PROMPT,
    NEGATIVE_PROMPT_FLF2V,
    NEGATIVE_PROMPT_I2V,
    NEGATIVE_PROMPT_S2V,
    TASKS,
    VAE_2_1,
    VAE_2_2,
    VARIANTS,
    ImageEncoderConfig,
    TextEncoderConfig,
    find_variant,
)
from wantrt.errors import SettingsError
from wantrt.models.dit import DiT
from wantrt.models.umt5 import TextEncoder
from wantrt.models.vae import VAE

S480, S720 = ((832, 480), (480, 832)), ((1280, 720), (720, 1280))

# name: dim, ffn_dim, heads, layers, in, out of each transformer; steps, shift, guidance (high noise
# first), boundary, fps, frames, sizes; CLIP tower or not; negative prompt
SMALL, LARGE = (1536, 8960, 12, 30), (5120, 13824, 40, 40)
PUBLISHED = {
    "t2v-1.3b": (*SMALL, 16, 16, 50, 5, (5,), None, 16, 81, S480, False, NEGATIVE_PROMPT),
    "t2v-14b": (*LARGE, 16, 16, 50, 5, (5,), None, 16, 81, S720 + S480, False, NEGATIVE_PROMPT),
    "i2v-14b-480p": (*LARGE, 36, 16, 40, 5, (5,), None, 16, 81, S480, True, NEGATIVE_PROMPT_I2V),
    "i2v-14b-720p": (
        *(*LARGE, 36, 16, 40, 5, (5,), None, 16, 81, S720 + S480, True, NEGATIVE_PROMPT_I2V),
    ),
    "flf2v-14b": (
        *(*LARGE, 36, 16, 50, 16, (5,), None, 16, 81, S720 + S480, True, NEGATIVE_PROMPT_FLF2V),
    ),
    "vace-1.3b": (*SMALL, 16, 16, 50, 16, (5,), None, 16, 81, S480, False, NEGATIVE_PROMPT),
    "vace-14b": (*LARGE, 16, 16, 50, 16, (5,), None, 16, 81, S720 + S480, False, NEGATIVE_PROMPT),
    "t2v-a14b": (
        *(*LARGE, 16, 16, 40, 12, (4, 3), 0.875, 16, 81, S720 + S480, False, NEGATIVE_PROMPT),
    ),
    "i2v-a14b": (
        *(*LARGE, 36, 16, 40, 5, (3.5, 3.5), 0.9, 16, 81, S720 + S480, False, NEGATIVE_PROMPT),
    ),
    "ti2v-5b": (
        *(3072, 14336, 24, 30, 48, 48, 50, 5, (5,), None, 24, 121),
        *(((1280, 704), (704, 1280)), False, NEGATIVE_PROMPT),
    ),
    "s2v-14b": (
        *(*LARGE, 16, 16, 40, 3, (4.5,), None, 16, 80),
        *(((1024, 704), (704, 1024), *S720, *S480), False, NEGATIVE_PROMPT_S2V),
    ),
    "animate-14b": (*LARGE, 36, 16, 20, 5, (1,), None, 30, 77, S720, True, NEGATIVE_PROMPT),
}


def test_the_table_has_every_released_variant_and_nano() -> None:
    assert list(VARIANTS) == [*PUBLISHED, "nano", "nano-i2v"]
    assert all(name == variant.name for name, variant in VARIANTS.items())


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_have_the_published_numbers(name: str) -> None:
    variant = VARIANTS[name]
    for dit in {expert.dit for expert in variant.experts}:
        row = (
            *(dit.dim, dit.ffn_dim, dit.num_heads, dit.num_layers, dit.in_channels),
            *(dit.out_channels, variant.num_inference_steps, variant.flow_shift),
            tuple(expert.guidance_scale for expert in variant.experts),
            *(
                next(iter(variant.boundary_ratios), None),
                variant.fps,
                variant.num_frames,
                variant.sizes,
            ),
            *(variant.image_encoder is not None, variant.negative_prompt),
        )
        assert row == PUBLISHED[name]
        assert (dit.head_dim, dit.text_dim, dit.text_len, dit.freq_dim) == (128, 4096, 512, 256)
        assert (dit.patch_size, dit.eps) == ((1, 2, 2), 1e-6)
    assert variant.text_encoder == TextEncoderConfig()
    assert variant.image_encoder in (None, ImageEncoderConfig())
    assert variant.vae == (VAE_2_2 if name == "ti2v-5b" else VAE_2_1)
    assert variant.solver == "unipc"


def test_what_only_some_variants_have() -> None:
    assert VARIANTS["flf2v-14b"].experts[0].dit.image_positions == 514
    assert VARIANTS["vace-1.3b"].experts[0].dit.vace_layers == tuple(range(0, 30, 2))
    assert VARIANTS["vace-14b"].experts[0].dit.vace_layers == tuple(range(0, 40, 5))
    assert len(VARIANTS["s2v-14b"].experts[0].dit.audio_layers) == 12
    assert len(VARIANTS["animate-14b"].experts[0].dit.face_layers) == 8
    assert VARIANTS["ti2v-5b"].vae_file == "Wan2.2_VAE.pth"
    for name in ("i2v-14b-480p", "i2v-14b-720p"):
        assert VARIANTS[name].flow_shift_for((832, 480)) == 3
        assert VARIANTS[name].flow_shift_for((1280, 720)) == 5


@pytest.mark.parametrize("name", PUBLISHED)
def test_repositories_are_named_as_published(name: str) -> None:
    variant = VARIANTS[name]
    assert variant.repo_id is not None
    assert variant.repo_id.startswith("Wan-AI/Wan2.")
    if name == "s2v-14b":
        assert variant.diffusers_repo_id is None
    else:
        assert str(variant.diffusers_repo_id).lower() == f"{variant.repo_id}-diffusers".lower()


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("t2v-1.3b", 1_418_996_800),
        ("t2v-14b", 14_288_491_584),
        ("t2v-a14b", 14_288_491_584),
        ("i2v-a14b", 14_288_901_184),
        ("ti2v-5b", 4_999_787_712),
    ],
)
def test_transformers_have_the_published_number_of_parameters(name: str, parameters: int) -> None:
    for expert in VARIANTS[name].experts:
        with torch.device("meta"):
            assert count(DiT(expert.dit)) == parameters


def test_encoders_have_the_published_number_of_parameters() -> None:
    with torch.device("meta"):
        assert count(TextEncoder(TextEncoderConfig())) == 5_680_910_336
        assert count(VAE(VAE_2_1)) == 126_892_531


def count(module: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def test_sizes_are_multiples_of_the_step_and_defaults_are_valid() -> None:
    for variant in VARIANTS.values():
        assert all(side % variant.size_step == 0 for size in variant.sizes for side in size)
        if variant.task in TASKS:
            assert (variant.num_frames - 1) % variant.vae.temporal_stride == 0


@pytest.mark.parametrize(
    "name, found", [("1.3B", "t2v-1.3b"), ("14b", "t2v-14b"), ("T2V-A14B", "t2v-a14b")]
)
def test_variants_are_found_by_alias_in_any_case(name: str, found: str) -> None:
    assert find_variant(name).name == found


def test_unknown_variant_gets_the_nearest_name() -> None:
    with pytest.raises(SettingsError, match="did you mean t2v-a14b"):
        find_variant("t2v-a15b")


def test_custom_is_no_variant_to_ask_for() -> None:
    with pytest.raises(SettingsError, match="Leave the variant out"):
        find_variant("custom")
