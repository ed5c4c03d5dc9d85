"""What the tensors of a checkpoint are called: prepared, official and Diffusers names, as tables.

A prepared tensor is stored as one tensor or as several to be put one below the other (q, k, v).
Nothing else happens to it: the stored tensors, flattened and joined, are the prepared tensor
flattened, whatever the singleton axes they are stored with. Another task is more rows here.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from wantrt.config import DiTConfig, ImageEncoderConfig, TextEncoderConfig, VAEConfig

Layout = Literal["official", "diffusers", "prepared"]
Shape = tuple[int, ...]


def as_prepared(shape: Shape) -> Shape:
    return shape


def as_table(shape: Shape) -> Shape:
    return (1, *shape)


def as_token(shape: Shape) -> Shape:
    return (1, 1, *shape)


def as_gamma_3d(shape: Shape) -> Shape:
    return (*shape, 1, 1, 1)


def as_gamma_2d(shape: Shape) -> Shape:
    return (*shape, 1, 1)


def as_conv_1x1(shape: Shape) -> Shape:
    return (*shape, 1, 1) if len(shape) == 2 else shape  # a bias stays


@dataclass(frozen=True)
class Row:
    """One entry: what begins with `prepared` begins, in a file, with `official` or `diffusers`.

    ``*`` stands for an index. ``q|k|v`` at the end names tensors that are fused, in that order.
    `stored` gives the shape in the file of a (piece of a) tensor from its prepared shape;
    `stored_diffusers` where Diffusers' is another.
    """

    prepared: str
    official: str
    diffusers: str
    stored: Callable[[Shape], Shape] = as_prepared
    stored_diffusers: Callable[[Shape], Shape] | None = None


@dataclass(frozen=True)
class Piece:
    """A tensor as it is stored."""

    name: str
    shape: Shape


class NameMap:
    """The names of one part's tensors, in every layout.

    `ignored` are patterns of what a file may hold besides: stored, but not part of the model.
    """

    def __init__(self, rows: Sequence[Row], ignored: Sequence[re.Pattern[str]] = ()) -> None:
        self._rows = [(_pattern(row.prepared), row) for row in rows]
        self.ignored = ignored

    def pieces(self, name: str, shape: Shape, layout: Layout) -> list[Piece]:
        """Where the prepared tensor `name` [shape] is stored: its pieces from top to bottom."""
        if layout == "prepared":
            return [Piece(name, shape)]
        row, match = self._find(name)
        *indices, suffix = match.groups()
        template = row.official if layout == "official" else row.diffusers
        stem, _, last = template.rpartition(".")
        names = [f"{stem}.{word}".lstrip(".") for word in last.split("|")]
        stored = row.stored_diffusers if layout == "diffusers" else None
        piece_shape = (stored or row.stored)((shape[0] // len(names), *shape[1:]))
        return [Piece(_fill(name, indices) + suffix, piece_shape) for name in names]

    def finest(self, name: str) -> int:
        """Of how many pieces a prepared tensor is in the layout that splits it most."""
        row, _ = self._find(name)
        return max(template.count("|") + 1 for template in (row.official, row.diffusers))

    def _find(self, name: str) -> tuple[Row, re.Match[str]]:
        for pattern, row in self._rows:
            if match := pattern.fullmatch(name):
                return row, match
        raise KeyError(f"no row of the name map covers {name}")


def _pattern(prepared: str) -> re.Pattern[str]:
    return re.compile(re.escape(prepared).replace(r"\*", r"(\d+)") + r"((?:\..+)?)")


def _fill(template: str, indices: Sequence[str]) -> str:
    for index in indices:
        template = template.replace("*", index, 1)
    return template


# -- The transformer ------------------------------------------------------------------------------


def dit_names(config: DiTConfig) -> NameMap:
    embedder = "condition_embedder"
    image = f"{embedder}.image_embedder"
    return NameMap(
        (
            Row("condition.text.up", "text_embedding.0", f"{embedder}.text_embedder.linear_1"),
            Row("condition.text.down", "text_embedding.2", f"{embedder}.text_embedder.linear_2"),
            Row("condition.image.norm_in", "img_emb.proj.0", f"{image}.norm1"),
            Row("condition.image.up", "img_emb.proj.1", f"{image}.ff.net.0.proj"),
            Row("condition.image.down", "img_emb.proj.3", f"{image}.ff.net.2"),
            Row("condition.image.norm_out", "img_emb.proj.4", f"{image}.norm2"),
            Row("condition.image.positions", "img_emb.emb_pos", f"{image}.pos_embed", as_table),
            Row("time.up", "time_embedding.0", f"{embedder}.time_embedder.linear_1"),
            Row("time.down", "time_embedding.2", f"{embedder}.time_embedder.linear_2"),
            Row("time.modulation", "time_projection.1", f"{embedder}.time_proj"),
            Row(
                "patch.proj",
                "patch_embedding",
                "patch_embedding",
                as_patch(config, config.in_channels),
            ),
            *(_row(*row) for row in BLOCK_ROWS),
            *(_row(*row, container="vace_blocks.*.block") for row in BLOCK_ROWS),
            Row(
                "vace_start.patch.proj",
                "vace_patch_embedding",
                "vace_patch_embedding",
                as_patch(config, config.vace_channels or 0),
            ),
            Row("vace_start.proj", "vace_blocks.0.before_proj", "vace_blocks.0.proj_in"),
            Row("vace_blocks.*.proj", "vace_blocks.*.after_proj", "vace_blocks.*.proj_out"),
            Row("head.modulation", "head.modulation", "scale_shift_table", as_table),
            Row("head.proj", "head.head", "proj_out"),
        )
    )


def as_patch(config: DiTConfig, channels: int) -> Callable[[Shape], Shape]:
    """A linear layer over patches that is stored as a convolution; its bias stays."""
    return lambda shape: (shape[0], channels, *config.patch_size) if len(shape) == 2 else shape


# Of a block: prepared, official, Diffusers.
BLOCK_ROWS: tuple[tuple[str, str, str], ...] = (
    ("modulation", "modulation", "scale_shift_table"),
    ("self_attn.qkv", "self_attn.q|k|v", "attn1.to_q|to_k|to_v"),
    ("self_attn.norm_q", "self_attn.norm_q", "attn1.norm_q"),
    ("self_attn.norm_k", "self_attn.norm_k", "attn1.norm_k"),
    ("self_attn.out", "self_attn.o", "attn1.to_out.0"),
    ("cross_norm", "norm3", "norm2"),  # theirs swap 2 and 3
    ("cross_attn.q", "cross_attn.q", "attn2.to_q"),
    ("cross_attn.kv", "cross_attn.k|v", "attn2.to_k|to_v"),
    ("cross_attn.norm_q", "cross_attn.norm_q", "attn2.norm_q"),
    ("cross_attn.norm_k", "cross_attn.norm_k", "attn2.norm_k"),
    ("cross_attn.image_kv", "cross_attn.k_img|v_img", "attn2.add_k_proj|add_v_proj"),
    ("cross_attn.norm_k_image", "cross_attn.norm_k_img", "attn2.norm_added_k"),
    ("cross_attn.out", "cross_attn.o", "attn2.to_out.0"),
    ("ffn.up", "ffn.0", "ffn.net.0.proj"),
    ("ffn.down", "ffn.2", "ffn.net.2"),
)


def _row(prepared: str, official: str, diffusers: str, container: str = "blocks.*") -> Row:
    """A row of `BLOCK_ROWS` for the blocks in `container`, which theirs name without ``.block``."""
    theirs = container.removesuffix(".block")
    stored = as_table if prepared == "modulation" else as_prepared
    return Row(f"{container}.{prepared}", f"{theirs}.{official}", f"{theirs}.{diffusers}", stored)


# -- The VAE: every layer is a container and, in it, a leaf ---------------------------------------

VAE_LEAVES = (
    Row("norm1.gamma", "residual.0.gamma", "norm1.gamma", as_gamma_3d),
    Row("conv1", "residual.2", "conv1"),
    Row("norm2.gamma", "residual.3.gamma", "norm2.gamma", as_gamma_3d),
    Row("conv2", "residual.6", "conv2"),
    Row("shortcut", "shortcut", "conv_shortcut"),
    Row("conv", "resample.1", "resample.1"),
    Row("time_conv", "time_conv", "time_conv"),
    Row("norm.gamma", "norm.gamma", "norm.gamma", as_gamma_2d),
    Row("qkv", "to_qkv", "to_qkv", as_conv_1x1),
    Row("proj", "proj", "proj", as_conv_1x1),
)


def vae_names(config: VAEConfig) -> NameMap:
    containers = _stages(config) if config.residual else _flat_stages(config)
    rows = [
        Row("encoder.quant_conv", "conv1", "quant_conv"),
        Row("decoder.post_quant_conv", "conv2", "post_quant_conv"),
    ]
    for side in ("encoder", "decoder"):
        middle = f"{side}.mid_block"
        containers += [
            Row(f"{side}.middle.0", f"{side}.middle.0", f"{middle}.resnets.0"),
            Row(f"{side}.middle.1", f"{side}.middle.1", f"{middle}.attentions.0"),
            Row(f"{side}.middle.2", f"{side}.middle.2", f"{middle}.resnets.1"),
        ]
        rows += [
            Row(f"{side}.conv_in", f"{side}.conv1", f"{side}.conv_in"),
            Row(
                f"{side}.norm_out.gamma",
                f"{side}.head.0.gamma",
                f"{side}.norm_out.gamma",
                as_gamma_3d,
            ),
            Row(f"{side}.conv_out", f"{side}.head.2", f"{side}.conv_out"),
        ]
    rows += [
        Row(
            f"{container.prepared}.{leaf.prepared}",
            f"{container.official}.{leaf.official}",
            f"{container.diffusers}.{leaf.diffusers}",
            leaf.stored,
        )
        for container, leaf in product(containers, VAE_LEAVES)
    ]
    return NameMap(rows)


def _flat_stages(config: VAEConfig) -> list[Row]:
    """2.1: layers are counted through all stages, but by Diffusers in the decoder."""
    containers = [Row("encoder.down.*", "encoder.downsamples.*", "encoder.down_blocks.*")]
    for stage, block in product(
        range(len(config.dim_multipliers)), range(config.num_res_blocks + 2)
    ):
        flat = stage * (config.num_res_blocks + 2) + block
        inner = f"resnets.{block}" if block <= config.num_res_blocks else "upsamplers.0"
        containers.append(
            Row(
                f"decoder.up.{flat}",
                f"decoder.upsamples.{flat}",
                f"decoder.up_blocks.{stage}.{inner}",
            )
        )
    return containers


def _stages(config: VAEConfig) -> list[Row]:
    """2.2: layers are counted within a stage; the last may be the change of resolution."""
    containers = []
    for side, way, blocks in (
        ("encoder", "down", config.num_res_blocks),
        ("decoder", "up", config.num_res_blocks + 1),
    ):
        for layer in range(blocks + 1):
            inner = f"resnets.{layer}" if layer < blocks else f"{way}sampler"
            containers.append(
                Row(
                    f"{side}.{way}.*.layers.{layer}",
                    f"{side}.{way}samples.*.{way}samples.{layer}",
                    f"{side}.{way}_blocks.*.{inner}",
                )
            )
    return containers


# -- The text encoder -----------------------------------------------------------------------------


def text_names(config: TextEncoderConfig) -> NameMap:
    official, attention, ffn = "blocks.*", "encoder.block.*.layer.0", "encoder.block.*.layer.1"
    return NameMap(
        (
            Row("embed", "token_embedding", "shared"),
            Row("layers.*.attn_norm", f"{official}.norm1.weight", f"{attention}.layer_norm.weight"),
            Row("layers.*.qkv", f"{official}.attn.q|k|v", f"{attention}.SelfAttention.q|k|v"),
            Row(
                "layers.*.position_bias",
                f"{official}.pos_embedding.embedding.weight",
                f"{attention}.SelfAttention.relative_attention_bias.weight",
            ),
            Row("layers.*.out", f"{official}.attn.o", f"{attention}.SelfAttention.o"),
            Row("layers.*.ffn_norm", f"{official}.norm2.weight", f"{ffn}.layer_norm.weight"),
            Row("layers.*.gate", f"{official}.ffn.gate.0", f"{ffn}.DenseReluDense.wi_0"),
            Row("layers.*.up", f"{official}.ffn.fc1", f"{ffn}.DenseReluDense.wi_1"),
            Row("layers.*.down", f"{official}.ffn.fc2", f"{ffn}.DenseReluDense.wo"),
            Row("head.norm", "norm.weight", "encoder.final_layer_norm.weight"),
        )
    )


# -- The image encoder ----------------------------------------------------------------------------

IMAGE_PREFIX = "visual."  # in the official file, which holds CLIP's text encoder too
HF_IMAGE_PREFIX = "vision_model."  # of every name, in checkpoints of transformers before 5


def image_names(config: ImageEncoderConfig) -> NameMap:
    def as_conv(shape: Shape) -> Shape:
        return (shape[0], 3, config.patch_size, config.patch_size)

    official, theirs = f"{IMAGE_PREFIX}transformer.*", "encoder.layers.*"
    positions = "embeddings.position_embedding.weight"
    rows = (
        Row("embed.proj", f"{IMAGE_PREFIX}patch_embedding", "embeddings.patch_embedding", as_conv),
        Row(
            "embed.class_token",
            f"{IMAGE_PREFIX}cls_embedding",
            "embeddings.class_embedding",
            as_token,
            as_prepared,
        ),
        Row("embed.positions", f"{IMAGE_PREFIX}pos_embedding", positions, as_table, as_prepared),
        Row("embed.norm", f"{IMAGE_PREFIX}pre_norm", "pre_layrnorm"),
        Row("blocks.*.attn_norm", f"{official}.norm1", f"{theirs}.layer_norm1"),
        Row(
            "blocks.*.qkv",
            f"{official}.attn.to_qkv",
            f"{theirs}.self_attn.q_proj|k_proj|v_proj",
        ),
        Row("blocks.*.out", f"{official}.attn.proj", f"{theirs}.self_attn.out_proj"),
        Row("blocks.*.ffn_norm", f"{official}.norm2", f"{theirs}.layer_norm2"),
        Row("blocks.*.up", f"{official}.mlp.0", f"{theirs}.mlp.fc1"),
        Row("blocks.*.down", f"{official}.mlp.2", f"{theirs}.mlp.fc2"),
    )
    last = config.num_layers  # the block that does not run, in both layouts
    ignored = (
        rf"visual\.(transformer\.{last}\..+|post_norm\..+|head)",
        r"textual\..+|log_scale",
        rf"encoder\.layers\.{last}\..+|post_layernorm\..+|visual_projection\.weight",
        r"embeddings\.position_ids",  # a table of old transformers
    )
    return NameMap(rows, [re.compile(pattern) for pattern in ignored])


# -- Exceptions -----------------------------------------------------------------------------------

# A file may lack the first and have the second: the token embedding is tied in Hugging Face's T5.
TIED_NAMES = {"shared.weight": "encoder.embed_tokens.weight"}

# Stored, but not part of the model.
IGNORED_NAMES = (
    re.compile(r"encoder\.embed_tokens\.weight"),
    re.compile(r"blocks\.\d+\.attn2\.norm_added_q\.weight"),  # in old Diffusers checkpoints
)
