"""Parse and build a graph with TensorRT-RTX, which needs no GPU. Nothing is run."""

from collections.abc import Mapping, Sequence

import onnx
import tensorrt_rtx as trt
from onnx import helper

from wantrt.models.components import Component

SYMBOLS = ("B", "L", "S", "T", "F", "h", "w")
LOGGER = trt.Logger(trt.Logger.ERROR)


def build_plan(
    component: Component,
    model: onnx.ModelProto,
    targets: Sequence[str],
    typical: Mapping[str, int],
    largest: Mapping[str, int],
) -> bytes:
    """A plan for `targets` ("SM89"), weights as inputs, every dynamic size from 1 to `largest`."""
    builder = trt.Builder(LOGGER)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, LOGGER)
    parsed = parser.parse(_with_decomposable_attention(model).SerializeToString())
    assert parsed, [parser.get_error(i).desc() for i in range(parser.num_errors)]
    config = builder.create_builder_config()
    config.num_compute_capabilities = len(targets)
    for i, target in enumerate(targets):
        config.set_compute_capability(getattr(trt.ComputeCapability, target), i)
    profile = builder.create_optimization_profile()
    smallest = dict.fromkeys(largest, 1)
    for name, spec in component.inputs.items():
        if any(isinstance(size, str) for size in spec.shape):
            shapes = (spec.concrete(symbols) for symbols in (smallest, typical, largest))
            profile.set_shape(name, *shapes)
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, f"{component.name} does not build for {', '.join(targets)}"
    return bytes(plan)


def _with_decomposable_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """Tell TensorRT which attentions have no fused kernel: the parser reads this attribute.

    It is no attribute of the standard operator, so a graph on disk has it as node metadata.
    """
    marked = onnx.ModelProto()
    marked.CopyFrom(model)
    for node in marked.graph.node:
        if any(entry.key == "decomposable" for entry in node.metadata_props):
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))
    return marked
