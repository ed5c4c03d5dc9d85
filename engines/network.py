"""A graph as TensorRT shall see it: sizes filled in, and weights inside it where they are baked.

The graph on disk stays as it is; these are edits of a copy in memory. Baked weights are not copied:
the model only says that they lie elsewhere, and the parser is given their addresses.
"""

from collections.abc import Collection, Iterable, Mapping
from math import prod
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper

from wantrt.errors import BuildError
from wantrt.linked import refuse_other_names
from wantrt.session import Range, TensorSpec

refuse_other_names(__spec__)

NODE_DOMAIN = "wantrt"  # of nodes that bring their definition along
PLUGIN_NAMESPACE = "wantrt_plugins"  # another, so that a plan without plugins finds none
ELSEWHERE = "baked.bin"  # no such file: the parser is given the addresses


def read_graph(path: Path) -> onnx.ModelProto:
    """Raises BuildError for a file that is no graph."""
    try:
        return onnx.load(path, load_external_data=False)
    except (OSError, DecodeError) as error:
        raise BuildError(
            f"cannot read the graph {path}: {error}. Make it anew: wantrt build --check"
        ) from error


def fill_sizes(
    model: onnx.ModelProto, tensors: Mapping[str, TensorSpec], symbols: Mapping[str, Range]
) -> None:
    """Replace every dimension whose symbols have one size by that size.

    tensors: the inputs and outputs of the component. What has a range stays a name: dynamic.
    """
    fixed = {symbol: low for symbol, (low, _, high) in symbols.items() if low == high}
    for value in (*model.graph.input, *model.graph.output):
        if value.name not in tensors:
            continue  # a weight
        shape = value.type.tensor_type.shape.dim
        for dimension, size in zip(shape, tensors[value.name].shape, strict=True):
            if isinstance(size, str) and symbols_of(size) <= set(fixed):
                dimension.dim_value = prod(
                    int(factor) if factor.isdigit() else fixed[factor] for factor in size.split("*")
                )


def symbols_of(size: str) -> set[str]:
    """The symbols of a dimension: "F*2*h" has F and h."""
    return {factor for factor in size.split("*") if not factor.isdigit()}


def allow_decomposition(model: onnx.ModelProto) -> None:
    """Tell TensorRT which attentions have no fused kernel: its parser reads this attribute.

    It is no attribute of the standard operator, so a graph on disk has it as node metadata.
    """
    for node in attentions(model):
        if is_decomposable(node):
            node.attribute.append(helper.make_attribute("TRT_decomposable", 1))


def separate_queries(model: onnx.ModelProto) -> None:
    """Give every attention queries of its own, where a second one takes the same (text and image).

    TensorRT-RTX 1.7 crashes on two attentions to one tensor of queries. Only arithmetic keeps two
    apart, so zero is added to the second's; TensorRT finds and merges copies.
    TODO: drop once test_two_attentions_of_the_same_queries passes without.
    """
    taken: set[str] = set()
    for node in attentions(model):
        query = node.input[0]
        if query in taken:
            index = list(model.graph.node).index(node)
            zero, own = f"{node.name}_zero", f"{node.name}_query"
            model.graph.initializer.append(
                helper.make_tensor(f"{zero}_float", TensorProto.FLOAT, [], [0.0])
            )
            model.graph.node.insert(index, helper.make_node("Add", [query, zero], [own]))
            typed = helper.make_node("CastLike", [f"{zero}_float", query], [zero])
            model.graph.node.insert(index, typed)
            node.input[0] = own
        taken.add(query)


def turn_into_plugins(model: onnx.ModelProto, names: Collection[str]) -> list[str]:
    """Let nodes of these types be plugins: they lose their definition. Returns their types.

    Not left to the parser, which would take a definition where it knows no plugin, and a plugin
    wherever this process has registered one.
    """
    found = set()
    for node in model.graph.node:
        if node.domain == NODE_DOMAIN and node.op_type in names:
            found.add(node.op_type)
            node.domain = PLUGIN_NAMESPACE
            for key, value in (("namespace", PLUGIN_NAMESPACE), ("version", "1")):
                node.attribute.append(helper.make_attribute(f"plugin_{key}", value))
    if found:
        model.opset_import.append(helper.make_opsetid(PLUGIN_NAMESPACE, 1))
    return sorted(found)


def attentions(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    return [node for node in model.graph.node if node.op_type == "Attention"]


def is_decomposable(node: onnx.NodeProto) -> bool:
    return any(entry.key == "decomposable" for entry in node.metadata_props)


def turn_into_constants(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Make constants of weights that are inputs; their values are given to the parser apart.

    Raises KeyError for a name that is no input.
    """
    declared = {value.name: value for value in model.graph.input}
    offset = 0
    for name in sorted(names):
        declaration = declared[name]
        model.graph.input.remove(declaration)
        tensor = declaration.type.tensor_type
        constant = model.graph.initializer.add(
            name=name,
            data_type=tensor.elem_type,
            dims=[dimension.dim_value for dimension in tensor.shape.dim],
            data_location=TensorProto.EXTERNAL,
        )
        length = nbytes(constant)
        for key, value in (("location", ELSEWHERE), ("offset", offset), ("length", length)):
            constant.external_data.add(key=key, value=str(value))
        offset += length


def nbytes(constant: TensorProto) -> int:
    item_bytes = int(helper.tensor_dtype_to_np_dtype(constant.data_type).itemsize)
    return prod(constant.dims) * item_bytes
