"""Dimensions of a checkpoint: from its ``config.json`` files, else from the shapes of its tensors.

The official transformer has a ``config.json`` that leaves out what never varies; the official VAE
and UMT5 have none, and every dimension of theirs shows in a shape.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from wantrt.checkpoints.names import IMAGE_PREFIX
from wantrt.checkpoints.tensors import Stored
from wantrt.config import (
    VAE_2_1,
    VARIANTS,
    DiTConfig,
    ImageEncoderConfig,
    TextEncoderConfig,
    VAEConfig,
)
from wantrt.errors import CheckpointError

Specs = Mapping[str, Stored]

MAX_LAYERS = 1000  # beyond it, and beyond MAX_DIM, a number in a file is a mistake or an attack
MAX_DIM = 1 << 20


class Fields:
    """A ``config.json`` whose values are checked as they are read."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def __contains__(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None, at_most: int = MAX_DIM) -> int:
        value = self.values.get(key, default)
        value = default if value is None else value
        if value is None:
            raise CheckpointError(f"{self.path} has no {key!r}. Expected a positive integer there.")
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value <= at_most:
            raise self._wrong(key, f"an integer from 1 to {at_most}")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key, default)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 < value < math.inf:
            raise self._wrong(key, "a positive number")
        return float(value)

    def sequence(self, key: str, kind: type | tuple[type, ...], default: Sequence[Any]) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, list | tuple) or not all(isinstance(item, kind) for item in value):
            raise self._wrong(key, f"a list like {list(default)}")
        return tuple(value)

    def demand(self, key: str, *allowed: object) -> None:
        """Refuse a value that the reference modules do not compute; a missing one is the usual."""
        if key in self.values and self.values[key] not in allowed:
            raise self._wrong(key, " or ".join(repr(value) for value in allowed))

    def _wrong(self, key: str, expected: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} says {key!r} is {self.values.get(key)!r}. Expected {expected}."
        )


def shape_of(specs: Specs, name: str, ndim: int, where: str) -> tuple[int, ...]:
    """The shape of a tensor from which dimensions are read."""
    if name not in specs:
        raise CheckpointError(
            f"{where} has no tensor {name}, which gives its dimensions. It holds "
            f"{len(specs)} tensors{', such as ' + next(iter(specs)) if specs else ''}. "
            "Is it a file of another model or layout?"
        )
    shape = specs[name].shape
    if len(shape) != ndim:
        raise CheckpointError(f"{where}: {name} is {shape}. Expected {ndim} axes.")
    return shape


# -- Transformer ----------------------------------------------------------------------------------


def official_dit(config: Fields, specs: Specs, where: str) -> DiTConfig:
    """From the official ``config.json``; text and image widths from the embeddings' shapes."""
    config.demand("qk_norm", True)
    config.demand("cross_attn_norm", True)
    dit = DiTConfig(
        dim=config.integer("dim"),
        ffn_dim=config.integer("ffn_dim"),
        num_heads=config.integer("num_heads"),
        num_layers=config.integer("num_layers", at_most=MAX_LAYERS),
        in_channels=config.integer("in_dim"),
        out_channels=config.integer("out_dim"),
        text_dim=shape_of(specs, "text_embedding.0.weight", 2, where)[1],
        text_len=config.integer("text_len", 512),
        freq_dim=config.integer("freq_dim", 256),
        patch_size=config.sequence("patch_size", int, (1, 2, 2)),
        eps=config.number("eps", 1e-6),
        image_dim=_optional(specs, "img_emb.proj.0.weight", 0),
        image_positions=_optional(specs, "img_emb.emb_pos", 1),
        vace_layers=config.sequence("vace_layers", int, ()),
        vace_channels=config.integer("vace_in_dim") if "vace_in_dim" in config else None,
    )
    return checked_dit(dit, str(config.path))


def diffusers_dit(config: Fields) -> DiTConfig:
    """From the Diffusers ``config.json``.

    It has no key for the number of text rows: it is the one that an otherwise equal variant has,
    unless the file says `text_len` (diffusers ignores what it does not know).
    """
    config.demand("qk_norm", "rms_norm_across_heads")
    config.demand("cross_attn_norm", True)
    heads = config.integer("num_attention_heads")
    dit = DiTConfig(
        dim=heads * config.integer("attention_head_dim"),
        ffn_dim=config.integer("ffn_dim"),
        num_heads=heads,
        num_layers=config.integer("num_layers", at_most=MAX_LAYERS),
        in_channels=config.integer("in_channels"),
        out_channels=config.integer("out_channels", 16),
        text_dim=config.integer("text_dim", 4096),
        freq_dim=config.integer("freq_dim", 256),
        patch_size=config.sequence("patch_size", int, (1, 2, 2)),
        eps=config.number("eps", 1e-6),
        image_dim=config.integer("image_dim") if "image_dim" in config else None,
        image_positions=config.integer("pos_embed_seq_len")
        if "pos_embed_seq_len" in config
        else None,
        vace_layers=config.sequence("vace_layers", int, ()),
        vace_channels=config.integer("vace_in_channels") if "vace_in_channels" in config else None,
    )
    if "text_len" in config:
        dit = replace(dit, text_len=config.integer("text_len"))
        return checked_dit(dit, str(config.path))
    known = (expert.dit for variant in VARIANTS.values() for expert in variant.experts)
    lengths = (other.text_len for other in known if replace(other, text_len=dit.text_len) == dit)
    dit = replace(dit, text_len=next(lengths, dit.text_len))
    return checked_dit(dit, str(config.path))


def checked_dit(dit: DiTConfig, where: str) -> DiTConfig:
    """`dit` if these are dimensions that a transformer can have."""
    if len(dit.patch_size) != 3 or dit.patch_size[0] != 1 or len({*dit.patch_size[1:]}) != 1:
        raise CheckpointError(f"{where}: patch_size is {dit.patch_size}. Expected (1, 2, 2).")
    if dit.dim % dit.num_heads or dit.head_dim % 2:
        raise CheckpointError(
            f"{where}: {dit.dim} channels do not make {dit.num_heads} heads of an even width."
        )
    if dit.freq_dim % 2:
        raise CheckpointError(f"{where}: freq_dim is {dit.freq_dim}. Expected an even number.")
    return dit


def _optional(specs: Specs, name: str, axis: int) -> int | None:
    return specs[name].shape[axis] if name in specs else None


# -- VAE ------------------------------------------------------------------------------------------


def official_vae(specs: Specs, where: str) -> VAEConfig:
    """From names and shapes. The latent's statistics are those of the VAE with as many channels."""
    dim, in_channels = shape_of(specs, "encoder.conv1.weight", 5, where)[:2]
    patch_size = math.isqrt(in_channels // 3)
    if in_channels != 3 * patch_size**2:
        raise CheckpointError(
            f"{where}: the encoder takes {in_channels} channels. Expected 3 for every pixel of a "
            "square patch: 3 (Wan 2.1) or 12 (Wan 2.2)."
        )
    down = "encoder.downsamples"
    indices = range(_count(specs, rf"{down}\.(\d+)\.", where))
    layers = [f"{down}.{index}" for index in indices]
    residual = any(name.startswith(f"{down}.0.downsamples.") for name in specs)
    if residual:
        layers = [
            f"{stage}.downsamples.{index}"
            for stage in layers
            for index in range(_count(specs, rf"{stage}\.downsamples\.(\d+)\.", where))
        ]
    stages: list[list[int]] = [[]]  # output channels of the residual blocks, stage by stage
    temporal = []
    for prefix in layers:
        if f"{prefix}.resample.1.weight" in specs:
            temporal.append(f"{prefix}.time_conv.weight" in specs)
            stages.append([])
        else:
            stages[-1].append(shape_of(specs, f"{prefix}.residual.2.weight", 5, where)[0])
    blocks = {len(stage) for stage in stages}
    if len(blocks) != 1 or 0 in blocks or any(stage[-1] % dim for stage in stages):
        raise CheckpointError(
            f"{where}: the encoder's stages have {[len(s) for s in stages]} blocks of {stages} "
            f"channels. Expected equally many in each, of multiples of {dim} channels."
        )
    multipliers = tuple(stage[-1] // dim for stage in stages)
    out_dim = shape_of(specs, "decoder.head.2.weight", 5, where)[1]
    vae = VAEConfig(
        z_dim=shape_of(specs, "conv2.weight", 5, where)[0],
        encoder_dim=dim,
        decoder_dim=out_dim // multipliers[0],
        latents_mean=(),
        latents_std=(),
        dim_multipliers=multipliers,
        num_res_blocks=len(stages[0]),
        temporal_downsample=tuple(temporal),
        patch_size=patch_size,
        residual=residual,
    )
    return with_statistics(checked_vae(vae, where))


def diffusers_vae(config: Fields) -> VAEConfig:
    """From the Diffusers ``config.json``; what it leaves out has the defaults of the class."""
    config.demand("attn_scales", [])
    config.demand("is_residual", False, True)
    patch_size = config.integer("patch_size", 1, at_most=16)
    config.demand("in_channels", 3 * patch_size**2)
    config.demand("out_channels", 3 * patch_size**2)
    dim = config.integer("base_dim", VAE_2_1.encoder_dim)
    vae = VAEConfig(
        z_dim=config.integer("z_dim", VAE_2_1.z_dim),
        encoder_dim=dim,
        decoder_dim=config.integer("decoder_base_dim", dim),
        latents_mean=config.sequence("latents_mean", (int, float), ()),
        latents_std=config.sequence("latents_std", (int, float), ()),
        dim_multipliers=config.sequence("dim_mult", int, VAE_2_1.dim_multipliers),
        num_res_blocks=config.integer("num_res_blocks", VAE_2_1.num_res_blocks, at_most=MAX_LAYERS),
        temporal_downsample=config.sequence("temperal_downsample", bool, (False, True, True)),
        patch_size=patch_size,
        residual=bool(config.values.get("is_residual")),
    )
    if len(vae.temporal_downsample) != len(vae.dim_multipliers) - 1:
        raise CheckpointError(
            f"{config.path}: temperal_downsample has {len(vae.temporal_downsample)} values. "
            f"Expected one fewer than dim_mult, which has {len(vae.dim_multipliers)}."
        )
    if not all(0 < multiplier <= MAX_LAYERS for multiplier in vae.dim_multipliers):
        raise CheckpointError(
            f"{config.path}: dim_mult is {list(vae.dim_multipliers)}. Expected numbers from 1 to "
            f"{MAX_LAYERS}."
        )
    checked_vae(vae, str(config.path))
    if not vae.latents_mean and not vae.latents_std:
        return with_statistics(vae)
    if len(vae.latents_mean) != vae.z_dim or len(vae.latents_std) != vae.z_dim:
        raise CheckpointError(
            f"{config.path}: latents_mean has {len(vae.latents_mean)} and latents_std "
            f"{len(vae.latents_std)} values. Expected z_dim = {vae.z_dim} of each."
        )
    if (
        not all(map(math.isfinite, (*vae.latents_mean, *vae.latents_std)))
        or min(vae.latents_std) <= 0
    ):
        raise CheckpointError(
            f"{config.path}: expected finite latents_mean, and latents_std above 0, by which "
            "latents are divided."
        )
    return vae


def checked_vae(vae: VAEConfig, where: str) -> VAEConfig:
    """`vae` if the shortcuts of its stages have as many channels as they need."""
    if not vae.residual:
        return vae
    multipliers = vae.dim_multipliers
    positions = [8 if temporal else 4 for temporal in vae.temporal_downsample]  # that become one
    down = zip(pairwise((1, *multipliers)), (*positions, 1), strict=True)
    up = zip(pairwise((multipliers[-1], *multipliers[::-1])), positions[::-1], strict=False)
    if any(dim * factor % out_dim for (dim, out_dim), factor in down) or any(
        dim % out_dim or out_dim * factor % dim for (dim, out_dim), factor in up
    ):
        raise CheckpointError(
            f"{where}: the stages have {list(multipliers)} times the channels of the first. "
            "Expected a VAE with shortcuts to double them, or to leave them, from one to the next."
        )
    return vae


def with_statistics(vae: VAEConfig) -> VAEConfig:
    """The VAE with the latent statistics of the known one it equals, or of one as many channels."""
    known = [variant.vae for variant in VARIANTS.values()]
    equals = [row for row in known if _replace_statistics(vae, row) == row]
    alike = [row for row in known if row.z_dim == vae.z_dim]
    for row in (*equals, *alike):
        return _replace_statistics(vae, row)
    return replace(vae, latents_mean=(0.0,) * vae.z_dim, latents_std=(1.0,) * vae.z_dim)


def _replace_statistics(vae: VAEConfig, other: VAEConfig) -> VAEConfig:
    return replace(vae, latents_mean=other.latents_mean, latents_std=other.latents_std)


def _count(specs: Specs, pattern: str, where: str) -> int:
    """One more than the largest index that the pattern finds."""
    found = [int(match[1]) for name in specs if (match := re.match(pattern, name))]
    if not found or max(found) >= MAX_LAYERS:
        raise CheckpointError(f"{where} has no tensors like {pattern}. Is it of another model?")
    return max(found) + 1


# -- Text encoder ---------------------------------------------------------------------------------


def official_text_encoder(specs: Specs, where: str) -> TextEncoderConfig:
    """From shapes; the position table [buckets, heads] gives the number of heads."""
    vocab_size, dim = shape_of(specs, "token_embedding.weight", 2, where)
    buckets, heads = shape_of(specs, "blocks.0.pos_embedding.embedding.weight", 2, where)
    text_encoder = TextEncoderConfig(
        vocab_size=vocab_size,
        dim=dim,
        attention_dim=shape_of(specs, "blocks.0.attn.q.weight", 2, where)[0],
        ffn_dim=shape_of(specs, "blocks.0.ffn.fc1.weight", 2, where)[0],
        num_heads=heads,
        num_layers=_count(specs, r"blocks\.(\d+)\.", where),
        num_buckets=buckets,
    )
    return checked_text_encoder(text_encoder, where)


def diffusers_text_encoder(config: Fields) -> TextEncoderConfig:
    """From the ``config.json`` of Hugging Face's UMT5."""
    config.demand("model_type", "umt5")
    config.demand("feed_forward_proj", "gated-gelu")
    heads = config.integer("num_heads")
    return TextEncoderConfig(
        vocab_size=config.integer("vocab_size", at_most=1 << 24),
        dim=config.integer("d_model"),
        attention_dim=heads * config.integer("d_kv"),
        ffn_dim=config.integer("d_ff"),
        num_heads=heads,
        num_layers=config.integer("num_layers", at_most=MAX_LAYERS),
        num_buckets=config.integer("relative_attention_num_buckets", 32),
        max_distance=config.integer("relative_attention_max_distance", 128),
        eps=config.number("layer_norm_epsilon", 1e-6),
    )


def checked_text_encoder(text_encoder: TextEncoderConfig, where: str) -> TextEncoderConfig:
    """`text_encoder` if its attention falls into whole heads."""
    if text_encoder.attention_dim % text_encoder.num_heads:
        raise CheckpointError(
            f"{where}: {text_encoder.attention_dim} channels of attention do not make "
            f"{text_encoder.num_heads} heads."
        )
    return text_encoder


# -- Image encoder --------------------------------------------------------------------------------

IMAGE_HEAD_DIM = 80  # of ViT-H/14: the one dimension that no shape shows


def official_image_encoder(specs: Specs, where: str) -> ImageEncoderConfig:
    """From shapes. The last block does not run; a file without the norm behind it is without it."""
    dim, _, patch_size, _ = shape_of(specs, f"{IMAGE_PREFIX}patch_embedding.weight", 4, where)
    num_tokens = shape_of(specs, f"{IMAGE_PREFIX}pos_embedding", 3, where)[1]
    num_blocks = _count(specs, rf"{re.escape(IMAGE_PREFIX)}transformer\.(\d+)\.", where)
    unused = 1 if f"{IMAGE_PREFIX}post_norm.weight" in specs else 0
    image_encoder = ImageEncoderConfig(
        image_size=math.isqrt(num_tokens - 1) * patch_size,
        patch_size=patch_size,
        dim=dim,
        num_heads=max(dim // IMAGE_HEAD_DIM, 1),
        ffn_dim=shape_of(specs, f"{IMAGE_PREFIX}transformer.0.mlp.0.weight", 2, where)[0],
        num_layers=num_blocks - unused,
    )
    return checked_image_encoder(image_encoder, where)


def diffusers_image_encoder(config: Fields) -> ImageEncoderConfig:
    """From the ``config.json`` of Hugging Face's CLIP; what it leaves out has its defaults."""
    config.demand("model_type", "clip_vision_model")
    config.demand("num_channels", 3)
    if "hidden_act" not in config:
        raise CheckpointError(
            f"{config.path} has no 'hidden_act', which means 'quick_gelu'. Expected 'gelu' there."
        )
    config.demand("hidden_act", "gelu")
    image_encoder = ImageEncoderConfig(
        image_size=config.integer("image_size", 224),
        patch_size=config.integer("patch_size", 32),
        dim=config.integer("hidden_size", 768),
        num_heads=config.integer("num_attention_heads", 12),
        ffn_dim=config.integer("intermediate_size", 3072),
        num_layers=config.integer("num_hidden_layers", 12, at_most=MAX_LAYERS) - 1,
        eps=config.number("layer_norm_eps", 1e-5),
    )
    return checked_image_encoder(image_encoder, str(config.path))


def checked_image_encoder(image_encoder: ImageEncoderConfig, where: str) -> ImageEncoderConfig:
    """`image_encoder` if a block runs, heads are whole and patches cover the image."""
    if image_encoder.num_layers < 1:
        raise CheckpointError(
            f"{where}: the image encoder has one block, the last, which does not run. Expected two."
        )
    if image_encoder.dim % image_encoder.num_heads:
        raise CheckpointError(
            f"{where}: {image_encoder.dim} channels of the image encoder do not make "
            f"{image_encoder.num_heads} heads."
        )
    if image_encoder.image_size < image_encoder.patch_size:
        raise CheckpointError(
            f"{where}: patches of {image_encoder.patch_size} pixels are larger than the image of "
            f"{image_encoder.image_size}."
        )
    return image_encoder


def differences(ours: object, theirs: object) -> list[str]:
    """The fields in which two configs of one class differ, as ``dim 1536, not 256``.

    None is a part that a variant has not.
    """
    if ours is None or theirs is None:
        return ["missing" if theirs is None else "present"]
    return [
        f"{field.name} {getattr(theirs, field.name)}, not {getattr(ours, field.name)}"
        for field in fields(ours)  # type: ignore[arg-type]
        if getattr(ours, field.name) != getattr(theirs, field.name)
    ]
