"""Every component at nano's dimensions, with weights and inputs to run it on."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.config import DIT_NANO, TEXT_ENCODER_NANO, VAE_2_2, VAE_NANO, ImageEncoderConfig
from wantrt.models.components import (
    Component,
    dit_components,
    image_components,
    text_components,
    vae_components,
)
from wantrt.models.ops import TORCH_OPS, Ops

TWO_ROWS = " with two rows"  # the stack and the head of a model whose tokens differ in noise level
OF_2_2 = " of 2.2"  # the VAE with shortcuts along its stages
VAE_SMALL_2_2 = replace(VAE_2_2, encoder_dim=8, decoder_dim=8, num_res_blocks=1)
OF_CLIP = " of CLIP"  # which nano has not
IMAGE_ENCODER_SMALL = ImageEncoderConfig(
    image_size=56, dim=160, num_heads=2, ffn_dim=224, num_layers=2
)
NAMES = (
    "text_embed",
    "text_stack",
    "text_head",
    "dit_condition",
    "dit_time",
    "dit_patch",
    "dit_stack",
    "dit_head",
    "dit_stack" + TWO_ROWS,
    "dit_head" + TWO_ROWS,
    "vae_decoder_first",
    "vae_decoder_next",
    "vae_encoder_first",
    "vae_encoder_next",
    "vae_decoder_first" + OF_2_2,
    "vae_decoder_next" + OF_2_2,
    "vae_encoder_first" + OF_2_2,
    "vae_encoder_next" + OF_2_2,
    "image_encoder" + OF_CLIP,
)


def make_components(dtype: torch.dtype, ops: Ops = TORCH_OPS) -> dict[str, Component]:
    """By name: what has layers runs one at a time, so that a stack has several instances."""
    two_rows = dit_components(DIT_NANO, dtype, stack=1, rows=2, ops=ops)
    variants = {c.name + TWO_ROWS: c for c in two_rows if c.name in ("dit_stack", "dit_head")}
    variants |= {c.name + OF_2_2: c for c in vae_components(VAE_SMALL_2_2, dtype, ops=ops)}
    variants |= {c.name + OF_CLIP: c for c in image_components(IMAGE_ENCODER_SMALL, dtype, ops)}
    return {
        component.name: component
        for component in (
            *text_components(TEXT_ENCODER_NANO, dtype, stack=1, ops=ops),
            *dit_components(DIT_NANO, dtype, stack=1, ops=ops),
            *vae_components(VAE_NANO, dtype, ops=ops),
        )
    } | variants


def make_weights(component: Component) -> dict[str, Tensor]:
    """Generated weights by their prepared names, other ones for every instance."""
    weights = {}
    for seed, instance in enumerate(component.instances):
        generated = GeneratedTensors(seed, "test", component.module)
        for name, prepared in instance.items():
            weights[prepared] = generated.read(name).to(component.weights[name].dtype)
    return weights


def make_inputs(
    component: Component, symbols: Mapping[str, int], seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs; whole numbers are 0 or 1, which is a token, a bucket and a row."""
    generator = torch.Generator().manual_seed(seed)
    inputs = {}
    for name, spec in component.inputs.items():
        shape = spec.concrete(symbols)
        if spec.dtype == torch.int64:
            inputs[name] = torch.randint(0, 2, shape, generator=generator)
        elif name == "mask":
            inputs[name] = (torch.arange(shape[1]) < max(1, shape[1] - 2)).float().expand(shape)
        else:
            inputs[name] = torch.randn(shape, generator=generator).to(spec.dtype)
    return {name: tensor.contiguous() for name, tensor in inputs.items()}
