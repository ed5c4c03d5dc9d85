"""Attention must stay fused: a plan in which it fell apart needs L² memory and many times as long.

TensorRT keeps an attention fused or fails to build it, unless its node allows decomposition. So it
suffices to count, in the network that it parsed, the attentions that may not decompose: each block
of a DiT has two, three with an image, and each layer of the text and the image encoder one. How
many there must be comes from the component, never from the graph that is being checked. The VAE has
one head of 384 channels or more, for which no fused kernel exists; it is the known exception.
"""

import logging
import re

import onnx
import torch

from wantrt.engines import api
from wantrt.engines.flavours import Flavour
from wantrt.engines.network import attentions, is_decomposable
from wantrt.engines.requests import is_float32
from wantrt.errors import BuildError
from wantrt.linked import refuse_other_names
from wantrt.models.clip import ImageBlock
from wantrt.models.components import Component
from wantrt.models.dit import CrossAttention, SelfAttention
from wantrt.models.umt5 import TextLayer

refuse_other_names(__spec__)

log = logging.getLogger(__name__)

FUSED_KERNEL = re.compile(r"mha|flash|fused.?attention", re.IGNORECASE)


def required_fusions(component: Component) -> int:
    """How many attentions of the component must be fused."""
    attending = (SelfAttention, CrossAttention, TextLayer, ImageBlock)
    modules = dict(component.module.named_modules())
    with_image = sum(name.endswith(".image_kv") for name in modules)
    return sum(isinstance(module, attending) for module in modules.values()) + with_image


def check_network(
    flavour: Flavour,
    component: Component,
    model: onnx.ModelProto,
    network: api.NetworkDefinition,
) -> None:
    """Raises BuildError unless the parsed network has every attention that must be fused."""
    required = required_fusions(component)
    decomposable = [node for node in attentions(model) if is_decomposable(node)]
    fused = count_attentions(flavour, network) - len(decomposable)
    if fused == required:
        return
    raise BuildError(
        f"{component.name}: {fused} of {required} attentions would be fused: "
        f"{_reason(component, decomposable)}.\n"
        "A plan like this is slow and needs memory for every pair of tokens, so none was made. "
        "Build the graph again with: wantrt build --check"
    )


def count_attentions(flavour: Flavour, network: api.NetworkDefinition) -> int:
    """TensorRT's attentions in a network, decomposable or not; each ends in one such layer."""
    last = flavour.module.LayerType.ATTENTION_OUTPUT
    layers = (network.get_layer(index) for index in range(network.num_layers))
    return sum(layer.type == last for layer in layers)


def look_into_plan(flavour: Flavour, component: Component, plan: api.HostMemory) -> int | None:
    """Ask the engine inspector for fused attention kernels, where the plan can be loaded.

    Says in the log what it found; None where it cannot look. A second opinion, not a gate: kernels
    are called differently in every version, TensorRT-RTX chooses them only on the GPU that runs the
    plan, and these names have not yet been seen on one.
    """
    required = required_fusions(component)
    if not required or not torch.cuda.is_available():
        return None
    engine = flavour.runtime().deserialize_cuda_engine(plan)
    if engine is None:
        flavour.last_errors()
        return None  # compiled for other GPUs
    layers = engine.create_engine_inspector().get_engine_information(
        flavour.module.LayerInformationFormat.JSON
    )
    count = len(FUSED_KERNEL.findall(layers))
    level = logging.WARNING if 0 < count < required else logging.INFO
    said = "%s: the engine inspector names %d fused attention kernels, expected %d"
    log.log(level, said, component.name, count, required)
    return count


def _reason(component: Component, decomposable: list[onnx.NodeProto]) -> str:
    if not decomposable:
        return "the graph computes attention by other operators"
    if is_float32(component):
        return "q, k and v are float32, for which TensorRT has no fused kernel; take bf16"
    return "a head is wider than 256 channels, for which TensorRT has no fused kernel"
