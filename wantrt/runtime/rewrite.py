"""Attention as ONNX Runtime runs it best on a CPU; done to a graph when it is loaded.

Graphs are written in standard operators, for every runtime. ONNX Runtime holds every score of the
standard Attention at once, L² a head: 3.1 GiB at 8,192 tokens and 12 heads. Its own
MultiHeadAttention needs memory linear in L and is four times faster.
"""

from collections.abc import Sequence

import onnx
from onnx import helper, numpy_helper
from onnx.inliner import inline_local_functions

SWAP_HEADS = [0, 2, 1, 3]  # [B, L, H, D] <-> [B, H, L, D]


def rewrite_attention(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` with its Attention nodes replaced, and its functions put where they are called."""
    model = inline_local_functions(model)
    graph = model.graph
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = node.attribute[0].t

    def heads_of(name: str) -> tuple[str, str, onnx.TensorProto] | None:
        """Where `name` is x [B, L, C] split into heads: x, and the sizes it was reshaped to."""
        swap = producers.get(name)
        if swap is None or swap.op_type != "Transpose" or swap.attribute[0].ints != SWAP_HEADS:
            return None
        split = producers[swap.input[0]]
        if split.op_type != "Reshape" or split.input[1] not in constants:
            return None
        return split.input[0], split.input[1], constants[split.input[1]]

    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        if node.op_type != "Attention":
            nodes.append(node)
            continue
        split = [heads_of(name) for name in node.input[:3]]
        if all(split):
            names, sizes, values = zip(*(found for found in split if found), strict=True)
            nodes += _attend_joined(node, names, sizes[0], values[0])
        elif len(node.input) == 3:
            nodes += _attend_as_batch(node)
        else:
            nodes.append(node)
    del graph.node[:]
    graph.node.extend(_without_unread(nodes, {value.name for value in graph.output}))
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    return model


def _without_unread(nodes: list[onnx.NodeProto], read: set[str]) -> list[onnx.NodeProto]:
    """`nodes` less those whose results nothing reads: ONNX Runtime would run them."""
    kept = []
    for node in reversed(nodes):
        if read & set(node.output):
            kept.append(node)
            read |= set(node.input)
    return kept[::-1]


def _attend_joined(
    node: onnx.NodeProto, inputs: Sequence[str], sizes: str, values: onnx.TensorProto
) -> list[onnx.NodeProto]:
    """MultiHeadAttention takes heads side by side, [B, L, C]: it reads what was to be split.

    The result is split again for those who read it. They join it at once, and ONNX Runtime lets
    the two transposes cancel.
    """
    num_heads = int(numpy_helper.to_array(values)[2])
    bias = ["", "", node.input[3]] if len(node.input) > 3 else []
    joined, split = f"{node.name}_joined", f"{node.name}_split"
    return [
        _multi_head_attention(node, [*inputs, *bias], joined, num_heads),
        helper.make_node("Reshape", [joined, sizes], [split]),
        helper.make_node("Transpose", [split], [node.output[0]], perm=SWAP_HEADS),
    ]


def _attend_as_batch(node: onnx.NodeProto) -> list[onnx.NodeProto]:
    """Heads that lie apart, [B, H, L, D], become a batch of B·H with one head."""
    nodes, folded = [], []
    minus_one = f"{node.name}_minus_one"
    nodes.append(helper.make_node("Constant", [], [minus_one], value_ints=[-1]))
    for name in node.input:
        inner, shape, rows = (f"{node.name}_{name}_{part}" for part in ("inner", "shape", "rows"))
        folded.append(rows)
        nodes += [
            helper.make_node("Shape", [name], [inner], start=2),  # [L, D]
            helper.make_node("Concat", [minus_one, inner], [shape], axis=0),
            helper.make_node("Reshape", [name, shape], [rows]),  # [B·H, L, D]
        ]
    result, shape = f"{node.name}_rows", f"{node.name}_shape"
    return [
        *nodes,
        _multi_head_attention(node, folded, result, num_heads=1),
        helper.make_node("Shape", [node.input[0]], [shape]),
        helper.make_node("Reshape", [result, shape], [node.output[0]]),
    ]


def _multi_head_attention(
    node: onnx.NodeProto, inputs: Sequence[str], output: str, num_heads: int
) -> onnx.NodeProto:
    (scale,) = (attribute.f for attribute in node.attribute if attribute.name == "scale")
    return helper.make_node(
        "MultiHeadAttention",
        inputs,
        [output],
        name=node.name,
        domain="com.microsoft",
        num_heads=num_heads,
        scale=scale,
    )
