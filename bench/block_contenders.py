"""One transformer block in several implementations, with the same weights and inputs.

Weights and inputs are random values that bfloat16 holds exactly, so that a difference between
contenders is never one of what they were given. Letters as in wantrt/models/dit.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wantrt.bench.kernel_cases import Random
from wantrt.checkpoints.names import dit_names
from wantrt.config import DiTConfig
from wantrt.linked import refuse_other_names
from wantrt.models.dit import Block, rope_tables
from wantrt.models.ops import TORCH_OPS, Ops

refuse_other_names(__spec__)

Run = Callable[[], Tensor]
# what WanTransformer3DModel keeps in float32 when it is loaded in another dtype
FLOAT32_IN_DIFFUSERS = ("scale_shift_table", "norm1", "norm2", "norm3")


@dataclass(frozen=True)
class Inputs:
    """x [1, L, C] and e6 [1, 1, 6, C] float32; context [1, S, C]; cos, sin [L, D/2] float32."""

    x: Tensor
    e6: Tensor
    context: Tensor
    cos: Tensor
    sin: Tensor


def make_inputs(
    config: DiTConfig, latent: tuple[int, int, int], dtype: torch.dtype, random: Random
) -> Inputs:
    """latent: frames, height and width in cells. context has `dtype`."""
    cos, sin = rope_tables(config, *latent, device=random.device)
    return Inputs(
        x=in_bfloat16(random(1, len(cos), config.dim)),
        e6=in_bfloat16(random(1, 1, 6, config.dim)),
        context=in_bfloat16(random(1, config.text_len, config.dim)).to(dtype),
        cos=cos,
        sin=sin,
    )


def make_weights(config: DiTConfig, random: Random) -> dict[str, Tensor]:
    """Float32, by the names of a `Block`, of a scale that keeps activations of ordinary size."""
    with torch.device("meta"):
        block = Block(config, torch.float32, TORCH_OPS)
    weights = {}
    for name, parameter in block.named_parameters():
        value = random(*parameter.shape)
        if "norm" in name and name.endswith("weight"):
            value = 1 + 0.1 * value
        elif name.endswith("weight"):
            value *= parameter.shape[1] ** -0.5
        else:  # biases, modulation
            value *= 0.1
        weights[name] = in_bfloat16(value)
    return weights


def in_bfloat16(x: Tensor) -> Tensor:
    return x.bfloat16().float()


def our_block(
    config: DiTConfig, dtype: torch.dtype, ops: Ops, weights: dict[str, Tensor], given: Inputs
) -> Run:
    """The reference module with the operations `ops`."""
    with torch.device(given.x.device):
        block = Block(config, dtype, ops).requires_grad_(False)
    block.load_state_dict(weights)  # casts
    context = given.context.to(dtype)
    return lambda: block(given.x, given.e6, None, context, given.cos, given.sin)


def diffusers_block(
    config: DiTConfig, dtype: torch.dtype, weights: dict[str, Tensor], given: Inputs
) -> Run:
    """diffusers' WanTransformerBlock, as its transformer calls it; raises ImportError without it.

    Its residual stream has the dtype of the model.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    with torch.device(given.x.device):
        block = WanTransformerBlock(
            config.dim,
            config.ffn_dim,
            config.num_heads,
            qk_norm="rms_norm_across_heads",
            cross_attn_norm=True,
            eps=config.eps,
        ).requires_grad_(False)
    for name, parameter in block.named_parameters():
        if not any(part in name.split(".") for part in FLOAT32_IN_DIFFUSERS):
            parameter.data = parameter.data.to(dtype)
    block.load_state_dict(diffusers_weights(config, weights))
    block.eval()
    x, context = given.x.to(dtype), given.context.to(dtype)
    temb = given.e6[:, 0].to(dtype)  # [1, 6, C]
    rotary = tuple(
        table.repeat_interleave(2, dim=1)[None, :, None] for table in (given.cos, given.sin)
    )  # [1, L, 1, D] each
    return lambda: block(x, context, temb, rotary)


def diffusers_weights(config: DiTConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same weights under diffusers' names, q, k and v apart."""
    names = dit_names(config)
    found = {}
    for name, weight in weights.items():
        pieces = names.pieces(f"blocks.0.{name}", tuple(weight.shape), "diffusers")
        for piece, part in zip(pieces, weight.chunk(len(pieces)), strict=True):
            found[piece.name.removeprefix("blocks.0.")] = part.reshape(piece.shape)
    return found
