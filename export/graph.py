"""A component as an ONNX file: every weight a named input, no weight inside, equal bytes each time.

Inputs, weights and outputs have the names, dtypes and shapes that the component declares. What is
stored as an initialiser is architecture: shapes, epsilons, the statistics of the latent.
"""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import torch
from onnx import helper
from torch import Tensor
from torch.func import functional_call

from wantrt.errors import UnsupportedTaskError
from wantrt.export.operators import EMITTERS
from wantrt.export.tracing import DOMAIN, ONNX_DTYPE, OPSET, Traced, Tracer
from wantrt.linked import refuse_other_names
from wantrt.models.components import Component
from wantrt.session import TensorSpec

refuse_other_names(__spec__)

IR_VERSION = 11


def export_component(component: Component, path: Path) -> None:
    """Write the graph of `component` (made with ``ops=ONNX_OPS``); a file appears whole."""
    data = export_graph(component).SerializeToString(deterministic=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    os.replace(partial, path)


def export_graph(component: Component) -> onnx.ModelProto:
    """Trace `component` and return its graph, checked."""
    weights = component.weights
    if component.name.startswith("text_") and any(
        spec.dtype == torch.float16 for spec in weights.values()
    ):
        raise UnsupportedTaskError(
            f"{component.name} in fp16 overflows in its feed-forward. Take bf16 or fp32 for the "
            "text encoder."
        )
    tracer = Tracer(EMITTERS)
    examples = _example_sizes([*component.inputs.values(), *component.outputs.values()])

    def traced(specs: Mapping[str, TensorSpec]) -> dict[str, Tensor]:
        return {
            name: tracer.input(name, spec.dtype, [spec.concrete(sizes) for sizes in examples])
            for name, spec in specs.items()
        }

    with torch.no_grad():
        results = functional_call(
            component.module, traced(weights), tuple(traced(component.inputs).values())
        )
    for (name, spec), result in zip(component.outputs.items(), results, strict=True):
        _check_output(component, name, spec, result, examples)
        tracer.nodes.append(helper.make_node("Identity", [result.value], [name], name=name))

    graph = helper.make_graph(
        tracer.nodes,
        component.name,
        [_declaration(*item) for item in (*component.inputs.items(), *weights.items())],
        [_declaration(*item) for item in component.outputs.items()],
        list(tracer.constants.values()),
    )
    model = helper.make_model(
        graph,
        ir_version=IR_VERSION,
        opset_imports=[
            helper.make_opsetid("", OPSET),
            *([helper.make_opsetid(DOMAIN, 1)] if tracer.functions else []),
        ],
        functions=list(tracer.functions.values()),
        producer_name="wantrt",
    )
    onnx.checker.check_model(model)
    return model


def _example_sizes(specs: Iterable[TensorSpec]) -> tuple[dict[str, int], dict[str, int]]:
    """Two values for every symbol, none in common."""
    symbols = sorted({symbol for spec in specs for symbol in spec.symbols([0] * len(spec.shape))})
    first = {symbol: 3 + 2 * i for i, symbol in enumerate(symbols)}
    return first, {symbol: size + 1 for symbol, size in first.items()}


def _check_output(
    component: Component,
    name: str,
    spec: TensorSpec,
    result: Traced,
    examples: Iterable[Mapping[str, int]],
) -> None:
    actual = [(example.dtype, tuple(example.shape)) for example in result.examples]
    declared = [(spec.dtype, spec.concrete(sizes)) for sizes in examples]
    assert actual == declared, f"{component.name}.{name} is {actual}, declared as {declared}"


def _declaration(name: str, spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, ONNX_DTYPE[spec.dtype], list(spec.shape))
