"""The physical floor of a generation: FLOPs and bytes of its components, and what they must cost.

FLOPs are not a formula: torch counts the products, convolutions and attentions of the reference
modules on the meta device, at full size and without their numbers. A multiplication and an addition
are two; attention counts in full. The floor is those FLOPs at the best rates of the machine
(wantrt/bench/rates.py), or the bytes of the weights read once at the rate of a copy, if that takes
longer. What lies between the products is not in it: a perfect engine would hide all of that.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from wantrt.bench.rates import Rates
from wantrt.config import Size, Variant
from wantrt.linked import refuse_other_names
from wantrt.models.components import Component, part_components
from wantrt.runtime.sizes import dit_symbols, vae_symbols
from wantrt.session import TensorSpec

refuse_other_names(__spec__)

ATTENTION = ("_attention", "bmm")  # ops of torch that are attention, by the end of their names


@dataclass(frozen=True)
class Cost:
    """Of some work: FLOPs of products and convolutions, of attention; bytes of weights read."""

    matrix_flops: int = 0
    attention_flops: int = 0
    weight_bytes: int = 0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.matrix_flops + other.matrix_flops,
            self.attention_flops + other.attention_flops,
            self.weight_bytes + other.weight_bytes,
        )

    def __mul__(self, times: int) -> "Cost":
        return Cost(
            self.matrix_flops * times, self.attention_flops * times, self.weight_bytes * times
        )

    @property
    def flops(self) -> int:
        return self.matrix_flops + self.attention_flops

    def seconds(self, rates: Rates) -> float:
        """The least time that a machine of these rates needs."""
        computing = self.matrix_flops / rates.matrix + self.attention_flops / rates.attention
        return max(computing, self.weight_bytes / rates.copy)


def component_cost(component: Component, symbols: Mapping[str, int]) -> Cost:
    """Of one run of each of its instances, at the given sizes."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        component.module(*(meta(spec, symbols) for spec in component.inputs.values()))
    found = counter.get_flop_counts().get("Global", {})  # nothing is counted: an empty dict
    counts = {str(op): count for op, count in found.items()}
    attention = sum(count for op, count in counts.items() if op.endswith(ATTENTION))
    weights = sum(p.numel() * p.element_size() for p in component.module.parameters())
    return Cost(sum(counts.values()) - attention, attention, weights) * len(component.instances)


def meta(spec: TensorSpec, symbols: Mapping[str, int]) -> Tensor:
    return torch.empty(spec.concrete(symbols), dtype=spec.dtype, device="meta")


def step_cost(
    variant: Variant,
    expert: str,
    size: Size,
    num_frames: int,
    guided: bool,
    dtype: torch.dtype = torch.bfloat16,
) -> Cost:
    """Of one denoising step of an expert; guidance runs the model twice, or a batch of two.

    num_frames: as denoised, VACE's reference images included.
    """
    symbols = dit_symbols(variant, size, num_frames, guided)
    once = ("dit_time", "dit_condition", "dit_vace_start")  # a generation, not a step
    every = [c for c in part_components(variant, expert, dtype) if c.name not in once]
    runs = 2 // symbols["B"] if guided else 1
    return total(every, symbols) * runs


def decode_cost(
    variant: Variant, size: Size, num_frames: int, dtype: torch.dtype = torch.bfloat16
) -> Cost:
    """Of decoding a whole video."""
    return _vae_cost(variant, "vae_decoder", size, num_frames, dtype)


def encode_cost(
    variant: Variant, size: Size, num_frames: int, dtype: torch.dtype = torch.float32
) -> Cost:
    """Of encoding a whole video."""
    return _vae_cost(variant, "vae_encoder", size, num_frames, dtype)


def _vae_cost(
    variant: Variant, which: str, size: Size, num_frames: int, dtype: torch.dtype
) -> Cost:
    symbols = vae_symbols(variant, size)
    components = {c.name: c for c in part_components(variant, "vae", dtype)}
    chunks = (num_frames - 1) // variant.vae.temporal_stride
    first, following = (
        component_cost(components[f"{which}_{name}"], symbols) for name in ("first", "next")
    )
    return first + following * chunks


def text_cost(variant: Variant, dtype: torch.dtype = torch.bfloat16) -> Cost:
    """Of one prompt, padded to its full length. Of the embedding table only its rows are read."""
    symbols = {"B": 1, "S": variant.experts[0].dit.text_len}
    parts = part_components(variant, "text_encoder", dtype)
    return total((c for c in parts if c.name != "text_embed"), symbols)


def image_cost(variant: Variant, dtype: torch.dtype = torch.float16) -> Cost:
    """Of the images that a generation of the variant starts from."""
    if variant.image_encoder is None:
        return Cost()
    return total(part_components(variant, "image_encoder", dtype), {"B": variant.num_images})


def total(components: Iterable[Component], symbols: Mapping[str, int]) -> Cost:
    return sum((component_cost(component, symbols) for component in components), Cost())
