"""Graphs: what a component declares, nothing of its weights, the same bytes every time."""

import hashlib
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import onnx
import pytest
import torch
from onnx.inliner import inline_local_functions

from tests.export.components import NAMES, make_components
from wantrt.config import DIT_14B
from wantrt.errors import UnsupportedTaskError
from wantrt.export.graph import export_component, export_graph
from wantrt.export.ops import ONNX_OPS, qk_norm_rope
from wantrt.export.tracing import ONNX_DTYPE
from wantrt.models import ops as reference
from wantrt.models.components import dit_components

ROOT = Path(__file__).resolve().parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@cache
def components(precision: str):
    return make_components(DTYPES[precision], ONNX_OPS)


def exported(name: str, precision: str) -> bytes:
    return export_graph(components(precision)[name]).SerializeToString(deterministic=True)


def digests() -> list[str]:
    return [hashlib.sha256(exported(name, "bf16")).hexdigest() for name in NAMES]


def precisions(name: str) -> list[str]:
    return [p for p in DTYPES if not (p == "fp16" and name.startswith("text_"))]


@pytest.mark.parametrize("name, precision", [(n, p) for n in NAMES for p in precisions(n)])
def test_graph_is_as_declared(name, precision):
    component = components(precision)[name]
    graph = onnx.load_from_string(exported(name, precision)).graph
    declared_inputs = {**component.inputs, **component.weights}
    assert [value.name for value in graph.input] == list(declared_inputs)
    assert [value.name for value in graph.output] == list(component.outputs)
    for value in (*graph.input, *graph.output):
        spec = {**declared_inputs, **component.outputs}[value.name]
        tensor = value.type.tensor_type
        assert tensor.elem_type == ONNX_DTYPE[spec.dtype]
        assert tuple(d.dim_param or d.dim_value for d in tensor.shape.dim) == spec.shape
    assert not {node.op_type for node in graph.node} & {
        "SplitToSequence",
        "SequenceAt",
        "Loop",
        "If",
    }
    attributes = {a.name for n in graph.node if n.op_type == "Attention" for a in n.attribute}
    assert attributes <= {"scale"}  # TensorRT refuses softmax_precision


@pytest.mark.parametrize("name", NAMES)
def test_what_is_stored_is_architecture(name):
    """Shapes, bounds, ones of a norm without weights, statistics of the latent: a few KB."""
    graph = onnx.load_from_string(exported(name, "fp32")).graph
    assert sum(len(tensor.raw_data) for tensor in graph.initializer) < 4096
    assert not any(node.op_type == "Constant" for node in graph.node)


def test_native_operators():
    def count(name: str, op_type: str) -> int:
        model = inline_local_functions(onnx.load_from_string(exported(name, "bf16")))
        return sum(node.op_type == op_type for node in model.graph.node)

    assert count("dit_stack", "Attention") == 2
    assert count("dit_stack", "RotaryEmbedding") == 2
    assert count("dit_stack", "RMSNormalization") == 4
    assert count("dit_stack", "LayerNormalization") == 3
    assert count("dit_stack", "Gelu") == 1
    assert count("text_stack", "Attention") == 1
    assert count("text_stack", "RMSNormalization") == 2
    assert count("vae_decoder_next", "Attention") == 1


def test_only_unfusable_attention_may_be_decomposed():
    def marked(name: str, precision: str) -> list[bool]:
        graph = onnx.load_from_string(exported(name, precision)).graph
        return [bool(n.metadata_props) for n in graph.node if n.op_type == "Attention"]

    assert marked("dit_stack", "bf16") == marked("dit_stack", "fp16") == [False, False]
    assert marked("text_stack", "bf16") == [False]
    assert marked("dit_stack", "fp32") == [True, True]
    assert marked("vae_decoder_next", "bf16") == [True]


def test_bytes_are_the_same_in_every_process():
    script = "from tests.export.test_graphs import digests; print(*digests())"
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.split() == digests()


@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_weights(name):
    """An exporter that saw equal weights would merge them, and route others wrongly."""
    component = make_components(torch.float32, ONNX_OPS)[name]
    component.module.to_empty(device="cpu")
    for fill in (torch.Tensor.fill_, torch.Tensor.normal_):
        for parameter in component.module.parameters():
            fill(parameter, 1.0)
        assert export_graph(component).SerializeToString(deterministic=True) == exported(
            name, "fp32"
        )


@pytest.mark.parametrize("name", NAMES)
def test_nothing_of_this_machine_is_inside(name):
    data = exported(name, "fp32")
    for trace in (str(ROOT), "site-packages", ".py", torch.__version__):
        assert trace.encode() not in data


def test_file_appears_whole(tmp_path):
    path = tmp_path / "dit_time.onnx"
    export_component(components("fp32")["dit_time"], path)
    assert path.read_bytes() == exported("dit_time", "fp32")
    assert list(tmp_path.iterdir()) == [path]


def test_text_encoder_in_fp16_is_refused():
    with pytest.raises(UnsupportedTaskError, match=r"text_embed in fp16 .* bf16 or fp32"):
        exported("text_embed", "fp16")


def test_a_stack_of_the_14b_model_is_small():
    (stack,) = (
        c for c in dit_components(DIT_14B, torch.bfloat16, ops=ONNX_OPS) if c.name == "dit_stack"
    )
    graph = export_graph(stack)
    assert graph.ByteSize() < 200_000
    assert len(stack.instances) == 4


def test_operators_can_run_as_torch():
    """What export substitutes for the reference's operations computes the same."""
    torch.manual_seed(0)
    qkv, weights = torch.randn(2, 5, 3 * 32), torch.randn(2, 32)
    cos, sin = torch.randn(2, 5, 8)
    arguments = (qkv, weights[0], weights[1], cos, sin, 2, 1e-6)
    for actual, expected in zip(
        qk_norm_rope(*arguments), reference.qk_norm_rope(*arguments), strict=True
    ):
        torch.testing.assert_close(actual, expected)
