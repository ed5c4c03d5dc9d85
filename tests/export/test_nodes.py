"""The operations that a graph holds as one node each, with their definitions.

Each is exported from its own signature, run by ONNX Runtime as the file stands, and compared with
the torch reference; TensorRT-RTX reads and compiles the same file.
"""

from collections.abc import Callable

import onnx
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from tests.export.components import make_components
from wantrt.export import ops as nodes
from wantrt.export.graph import export_graph
from wantrt.export.ops import ONNX_OPS
from wantrt.export.tracing import DOMAIN
from wantrt.models import ops as reference
from wantrt.models.components import Component
from wantrt.schedulers.solver import guided_step
from wantrt.session import TensorSpec

EPS = 1e-6
FLOAT, INT = torch.float32, torch.int64
SIZES = {"B": 2, "L": 7, "N": 5}
C, HEADS, D = 96, 4, 24

TOKENS, ROWS, VECTOR = ("B", "L", C), ("B", 1, C), (C,)
TABLES = {"cos": ("L", D // 2), "sin": ("L", D // 2)}
LATENT = dict.fromkeys(("sample", "x0", "delta", "conditional"), (1, 4, "L", 2, 2))
GUIDANCE = {"unconditional": (1, 4, "L", 2, 2), "guidance_scale": (1,)}
TABLE = {"rows": ("N", 4), "index": (1,)}


class Call(nn.Module):
    """An operation as a module without weights, its tensors the inputs."""

    def __init__(self, op: Callable, parameters: tuple[str, ...], **options: object) -> None:
        super().__init__()
        self.op, self.parameters_, self.options = op, parameters, options

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        result = self.op(**dict(zip(self.parameters_, tensors, strict=True)), **self.options)
        return result if isinstance(result, tuple) else (result,)


def shaped(**shapes: tuple) -> dict[str, TensorSpec]:
    integers = ("token_row", "index")
    return {n: TensorSpec(INT if n in integers else FLOAT, s) for n, s in shapes.items()}


def two_rows(**shapes: tuple) -> dict[str, TensorSpec]:
    rows = {n: ("B", 2, C) if shape == ROWS else shape for n, shape in shapes.items()}
    return shaped(**rows, token_row=("L",))


def case(node, op, expected, inputs, outputs, **options):
    return pytest.param(node, op, expected, inputs, outputs, options, id=node)


FLOATED = {"eps": EPS, "dtype": FLOAT}
UNGATED = {**FLOATED, "gate": None, "token_row": None}
MODULATION = {"shift": ROWS, "scale": ROWS}
AFFINE = {"weight": VECTOR, "bias": VECTOR}
XY = {"x": TOKENS, "y": TOKENS}
GATED = {**XY, "gate": ROWS}
HEADED = ("B", HEADS, "L", D)

CASES = [
    case(
        *("Modulate", ONNX_OPS.modulate, reference.modulate),
        *(shaped(x=TOKENS, **MODULATION), [TOKENS]),
        **{**FLOATED, "token_row": None},
    ),
    case(
        *("ModulateRows", ONNX_OPS.modulate, reference.modulate),
        *(two_rows(x=TOKENS, **MODULATION), [TOKENS]),
        **FLOATED,
    ),
    case(
        *("GatedResidual", ONNX_OPS.gated_residual, reference.gated_residual),
        *(shaped(**GATED), [TOKENS]),
        token_row=None,
    ),
    case(
        *("GatedResidualRows", ONNX_OPS.gated_residual, reference.gated_residual),
        *(two_rows(**GATED), [TOKENS]),
    ),
    case(
        "GatedResidualModulate",
        *(ONNX_OPS.gated_residual_modulate, reference.gated_residual_modulate),
        *(shaped(**GATED, **MODULATION), [TOKENS, TOKENS]),
        **{**FLOATED, "token_row": None},
    ),
    case(
        "GatedResidualModulateRows",
        *(ONNX_OPS.gated_residual_modulate, reference.gated_residual_modulate),
        *(two_rows(**GATED, **MODULATION), [TOKENS, TOKENS]),
        **FLOATED,
    ),
    case(
        "ResidualModulate",
        *(ONNX_OPS.gated_residual_modulate, reference.gated_residual_modulate),
        *(shaped(**XY, **MODULATION), [TOKENS, TOKENS]),
        **UNGATED,
    ),
    case(
        "GatedResidualNorm",
        *(ONNX_OPS.gated_residual_norm, reference.gated_residual_norm),
        *(shaped(**GATED, **AFFINE), [TOKENS, TOKENS]),
        **{**FLOATED, "token_row": None},
    ),
    case(
        "QkNormRope",
        *(ONNX_OPS.qk_norm_rope, reference.qk_norm_rope),
        shaped(qkv=("B", "L", 3 * C), q_weight=VECTOR, k_weight=VECTOR, **TABLES),
        *([HEADED] * 3,),
        num_heads=HEADS,
        eps=EPS,
    ),
    case(
        *("Rope", nodes.ROPE, reference.rope),
        *(shaped(x=HEADED, **TABLES), [HEADED]),
    ),
    case(
        *("RmsNorm", nodes.RMS_NORM, reference.rms_norm),
        *(shaped(x=TOKENS, weight=VECTOR), [TOKENS]),
        eps=EPS,
    ),
    case(
        *("RmsSilu", ONNX_OPS.rms_silu, reference.rms_silu),
        *(shaped(x=("B", C, 1, "L", 3), gamma=VECTOR), [("B", C, 1, "L", 3)]),
    ),
    case(
        *("GuideAndStep", nodes.GUIDE_AND_STEP, guided_step),
        *(shaped(**LATENT, **GUIDANCE, **TABLE), [(1, 4, "L", 2, 2)] * 3),
    ),
]


def component_of(op, inputs, outputs, options) -> Component:
    specs = {f"out_{i}": TensorSpec(FLOAT, shape) for i, shape in enumerate(outputs)}
    return Component("op", Call(op, tuple(inputs), **options), inputs, specs, [{}])


def make_inputs(inputs: dict[str, TensorSpec]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randint(2, spec.concrete(SIZES), generator=generator)
        if spec.dtype == INT
        else torch.randn(spec.concrete(SIZES), generator=generator)
        for name, spec in inputs.items()
    }


@pytest.mark.parametrize("node, op, expected, inputs, outputs, options", CASES)
def test_the_file_as_it_is_gives_the_reference(node, op, expected, inputs, outputs, options):
    model = export_graph(component_of(op, inputs, outputs, options))
    assert [f.name for f in model.functions] == [node]
    (call,) = (n for n in model.graph.node if n.domain == DOMAIN)
    assert call.op_type == node
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    tensors = make_inputs(inputs)
    actual = session.run(None, {name: tensor.numpy() for name, tensor in tensors.items()})
    results = expected(**tensors, **options)
    results = results if isinstance(results, tuple) else (results,)
    for a, e in zip(actual, results, strict=True):
        torch.testing.assert_close(torch.from_numpy(a), e, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("node, op, expected, inputs, outputs, options", CASES)
def test_tensorrt_rtx_compiles_the_file(node, op, expected, inputs, outputs, options):
    trt = pytest.importorskip("tensorrt_rtx")
    model = export_graph(component_of(op, inputs, outputs, options))
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, logger)
    errors = lambda: [parser.get_error(i).desc() for i in range(parser.num_errors)]  # noqa: E731
    assert parser.parse(model.SerializeToString()), errors()
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM89, 0)
    profile = builder.create_optimization_profile()
    for name, spec in inputs.items():
        shape = spec.concrete(SIZES)
        profile.set_shape(name, shape, shape, shape)
    config.add_optimization_profile(profile)
    assert builder.build_serialized_network(network, config) is not None


def test_which_nodes_the_components_have():
    expected = {
        "dit_stack": {"Modulate", "QkNormRope", "GatedResidualNorm", "ResidualModulate"}
        | {"GatedResidual"},
        "dit_head": {"Modulate"},
        "vae_decoder_next": {"RmsSilu"},
        "vae_encoder_first": {"RmsSilu"},
        "text_stack": set(),
        "dit_patch": set(),
    }
    made = make_components(torch.bfloat16, ONNX_OPS)
    for name, types in expected.items():
        model = export_graph(made[name])
        assert {node.op_type for node in model.graph.node if node.domain == DOMAIN} == types
        assert {function.name for function in model.functions} == types


def test_a_node_tells_a_plugin_what_its_definition_has_inside():
    model = export_graph(make_components(torch.bfloat16, ONNX_OPS)["dit_stack"])
    calls = {node.op_type: node for node in model.graph.node}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in calls["QkNormRope"].attribute}
    assert attributes == {"num_heads": 4, "eps": pytest.approx(1e-6)}
    attributes = {a.name: onnx.helper.get_attribute_value(a) for a in calls["Modulate"].attribute}
    assert attributes == {"dtype": onnx.TensorProto.BFLOAT16, "eps": pytest.approx(1e-6)}


def test_two_definitions_of_a_node_are_refused():
    """TensorRT's parser would silently take the first for both."""

    def twice(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        return tuple(ONNX_OPS.modulate(x, shift, scale, None, eps, FLOAT) for eps in (1e-6, 1e-5))

    inputs = shaped(x=TOKENS, **MODULATION)
    with pytest.raises(AssertionError, match="two definitions of Modulate"):
        export_graph(component_of(twice, inputs, [TOKENS, TOKENS], {}))
