"""Our plugins driven through TensorRT's own Python, which runs over stubs of its libraries.

TensorRT's C++ is missing: its parser, its builder, and the launch. No plugin has yet run inside
TensorRT; here is everything up to that.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
import torch
from onnx import TensorProto, helper

pytest.importorskip("triton")

from tests.engines.plans import components, make_request
from tests.engines.stubs import make_stubs, run_on_stubs
from tests.kernels.compiler import empty_cache  # noqa: F401  a fixture
from tests.kernels.plugin_cases import BATCH, TOKENS, make_node
from wantrt.engines import builder as builder_module
from wantrt.engines.cache import plan_key
from wantrt.engines.flavours import find_flavour
from wantrt.engines.network import NODE_DOMAIN, PLUGIN_NAMESPACE, turn_into_plugins
from wantrt.engines.plugins import plugin_names
from wantrt.errors import BuildError, RuntimeUnavailableError, SettingsError
from wantrt.kernels.aot import ONNX_DTYPES, Operand
from wantrt.kernels.nodes import PLUGINS
from wantrt.kernels.ptx import compile_kernel

NAMES = {
    torch.float32: "FLOAT",
    torch.float16: "HALF",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
}
ONNX_TYPES = {**ONNX_DTYPES, TensorProto.INT64: torch.int64}
BF16 = torch.bfloat16
SYMBOLS = {"B": BATCH, "L": TOKENS}
Case = dict[str, Any]


def make_case(name: str, dynamic: bool = False) -> Case:
    """A node of the 1.3B model; dynamic: batch and tokens are known when the plan runs."""
    inputs, attributes = make_node(name, "1.3B", BF16)
    symbols = {size: symbol for symbol, size in SYMBOLS.items()} if dynamic else {}
    return {
        "plugin": f"{PLUGIN_NAMESPACE}::{name}",
        "inputs": [
            [NAMES[each.dtype], [symbols.get(size, size) for size in each.shape]]
            for each in inputs.values()
        ],
        "attributes": attributes,
        "symbols": SYMBOLS,
    }


DYNAMIC = [name for name in PLUGINS if name not in ("GuideAndStep", "RmsSilu")]
CASES = {
    **{name: make_case(name) for name in PLUGINS},
    **{f"dynamic {name}": make_case(name, dynamic=True) for name in DYNAMIC},
}


@pytest.fixture(scope="module")
def stubs(tmp_path_factory, empty_cache) -> Path:  # noqa: F811
    return make_stubs(tmp_path_factory.mktemp("stubs"))


def drive(stubs: Path, cases: list[Case], target: str = "sm90") -> Case:
    return run_on_stubs("-m", "tests.engines.drive_plugins", target, libraries=stubs, given=cases)


@pytest.fixture(scope="module")
def driven(stubs: Path) -> Case:
    return drive(stubs, list(CASES.values()))


@pytest.fixture(scope="module")
def results(driven: Case) -> Mapping[str, Case]:
    return dict(zip(CASES, driven["cases"], strict=True))


@pytest.mark.slow
def test_all_are_registered_once_and_none_needs_python_to_run(driven: Case) -> None:
    """Twice asked for (the driver does). A plugin of TensorRT's may be called back at every run."""
    assert driven["registered"] == sorted(f"{PLUGIN_NAMESPACE}::{name}" for name in PLUGINS)
    assert driven["python"] == []
    assert driven["flags"] == [0, 1 << 2]  # PREFER_AOT_PYTHON_PLUGINS


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_what_a_build_asks(case: str, results: Mapping[str, Case]) -> None:
    """Types, shapes, formats, the kernel, its launch and its scalars, static and dynamic."""
    result, name = results[case], case.split()[-1]
    assert "error" not in result, result
    inputs, attributes = make_node(name, "1.3B", BF16)
    plugin = PLUGINS[name]
    outputs = plugin.infer_outputs(inputs, attributes)
    assert result["outputs"] == [[NAMES[out.dtype], list(out.shape)] for out in outputs]
    operands = [*inputs.values(), *outputs]
    assert result["formats"] == [[NAMES[each.dtype], "LINEAR"] for each in operands]
    assert result["tactics"] == []  # the default alone
    assert set(result["aliased"]) == {-1}

    eps = attributes.get("eps")
    if eps is not None:  # the parser hands it on in float32
        attributes["eps"] = torch.tensor(eps).item()
    binding = plugin.bind(inputs, attributes)
    kernel = compile_kernel(binding.source, 90)
    assert (result["kernel"], result["ptx"]) == (kernel.name, kernel.ptx)
    launch = dict(result["launch"])
    grid = [launch.pop(f"grid_{axis}") for axis in "xyz"]
    assert grid == [*binding.grid, 1, 1][:3]
    assert launch == {
        "block_x": kernel.num_threads,
        "block_y": 1,
        "block_z": 1,
        "shared_mem": kernel.shared_bytes,
    }
    assert result["scalars"] == list(binding.scalars)
    (entry,) = re.findall(r"\.entry \w+\((.*?)\n\)", result["ptx"], re.DOTALL)
    kinds = re.findall(r"\.param \.(\w+)", entry)
    scalars = ["u32"] * len(binding.scalars)
    assert kinds == ["u64"] * len(inputs) + scalars + ["u64"] * len(outputs)


def spoil(name: str, index: int, dtype: str, shape: list[int] | None = None) -> Case:
    case = make_case(name)
    inputs = [list(each) for each in case["inputs"]]
    inputs[index] = [dtype, shape or inputs[index][1]]
    return {**case, "inputs": inputs}


@pytest.mark.slow
def test_what_is_refused_is_said_in_the_error_of_the_build(stubs: Path) -> None:
    """TensorRT swallows what a plugin raises."""
    of_dtype = make_case("Modulate")
    of_dtype["attributes"] = {**of_dtype["attributes"], "dtype": 11}
    expected = [
        (spoil("Modulate", 1, "BF16"), "shift is torch.bfloat16, expected torch.float32"),
        (spoil("Modulate", 0, "INT8"), "a tensor is INT8"),
        (spoil("ModulateRows", 3, "FLOAT"), "token_row is torch.float32, expected torch.int64"),
        (spoil("Modulate", 0, "BF16", [2, 64, "L"]), "number of channels must be known"),
        (of_dtype, "no kernel writes the ONNX data type 11"),
    ]
    found = drive(stubs, [case for case, _ in expected])["cases"]
    for (_, message), result in zip(expected, found, strict=True):
        assert message in result["error"]
        assert message in result["reported"]


@pytest.mark.slow
def test_a_gpu_without_kernels_is_refused(stubs: Path) -> None:
    (result,) = drive(stubs, [make_case("Modulate")], target="sm75")["cases"]
    assert "not for sm75: build without plugins" in result["reported"]


# -- The graph ------------------------------------------------------------------------------------


COMPONENTS = ("dit_stack", "dit_head", "vae_decoder_next", "vae_encoder_first")


@pytest.mark.parametrize("dtype", [BF16, torch.float16], ids=str)
@pytest.mark.parametrize("name", COMPONENTS)
def test_nodes_are_those_that_the_plugins_describe(
    name: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Inputs with their dtypes and known channels, outputs with theirs, attributes."""
    request = make_request(components("nano", dtype)[name], tmp_path, {})
    model = onnx.shape_inference.infer_shapes(onnx.load(request.graph), data_prop=True)
    values = (*model.graph.input, *model.graph.value_info, *model.graph.output)
    known = {value.name: value.type.tensor_type for value in values}

    def operand(value: str) -> Operand:
        sizes = [each.dim_value or each.dim_param or "?" for each in known[value].shape.dim]
        return Operand(tuple(sizes), ONNX_TYPES[known[value].elem_type])

    nodes = [node for node in model.graph.node if node.domain == NODE_DOMAIN]
    assert nodes
    for node in nodes:
        plugin = PLUGINS[node.op_type]
        inputs = dict(zip(plugin.inputs, map(operand, node.input), strict=True))
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        assert attributes.keys() == plugin.attributes.keys()
        outputs = plugin.infer_outputs(inputs, attributes)  # checks dtypes and attributes
        assert [each.dtype for each in outputs] == [operand(value).dtype for value in node.output]
        static = {
            key: Operand(
                tuple(size if isinstance(size, int) else 8 for size in each.shape), each.dtype
            )
            for key, each in inputs.items()
        }
        plugin.bind(static, attributes)


@pytest.mark.parametrize("name", COMPONENTS)
def test_the_parser_is_given_plugins_for_all_nodes(name: str, tmp_path: Path) -> None:
    """And without them definitions for all."""
    request = make_request(components("nano")[name], tmp_path, {})
    whole = onnx.load(request.graph)
    count = sum(node.domain == NODE_DOMAIN for node in whole.graph.node)
    given = []
    parser = SimpleNamespace(load_model_proto=lambda model, path: given.append(model))
    flavour = SimpleNamespace(name="", version="", last_errors=str)
    for plugins in (False, True):
        with pytest.raises(BuildError, match="does not read"):
            builder_module._parse(flavour, replace(request, plugins=plugins), parser, None)
        model = onnx.load_from_string(given[-1])
        domains = [node.domain for node in model.graph.node]
        assert not model.functions
        assert NODE_DOMAIN not in domains
        assert domains.count(PLUGIN_NAMESPACE) == (count if plugins else 0)


def test_nodes_become_plugins() -> None:
    """In a namespace of their own, so that a definition is never taken in their place."""

    def node(kind: str, domain: str) -> onnx.NodeProto:
        return helper.make_node(kind, ["x"], ["y"], domain=domain, eps=1e-6)

    nodes = [node("Modulate", NODE_DOMAIN), node("Unknown", NODE_DOMAIN), node("Modulate", "")]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    assert turn_into_plugins(model, plugin_names()) == ["Modulate"]
    first, *others = model.graph.node
    assert first.domain == PLUGIN_NAMESPACE != NODE_DOMAIN
    attributes = {each.name: helper.get_attribute_value(each) for each in first.attribute}
    assert attributes.pop("eps") == pytest.approx(1e-6)
    assert attributes == {
        "plugin_namespace": PLUGIN_NAMESPACE.encode(),
        "plugin_version": b"1",
    }
    assert [each.domain for each in others] == [NODE_DOMAIN, ""]
    assert {each.domain for each in model.opset_import} == {"", PLUGIN_NAMESPACE}


# -- The request ----------------------------------------------------------------------------------


def test_a_plan_with_plugins_has_a_key_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx")
    import wantrt.engines.cache as cache

    flavour = find_flavour("tensorrt-rtx")
    request = make_request(components("nano")["dit_stack"], tmp_path, {})
    with_plugins = replace(request, plugins=True)
    keys = {plan_key(flavour, request), plan_key(flavour, with_plugins)}
    monkeypatch.setattr(cache, "hash_plugins", lambda: "kernels changed, or Triton")
    assert plan_key(flavour, request) in keys
    keys |= {plan_key(flavour, with_plugins)}
    assert len(keys) == 3


def test_a_flavour_without_plugins_refuses_them(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    flavour = find_flavour("tensorrt-rtx")
    assert not flavour.takes_plugins
    component = components("nano")["dit_stack"]
    request = replace(make_request(component, tmp_path, {}), plugins=True)
    with pytest.raises(SettingsError, match="tensorrt-rtx takes no plugins: build without them"):
        builder_module.build_plan(flavour, request)


def test_a_graph_without_such_nodes_is_refused(tmp_path: Path) -> None:
    component = components("nano")["dit_time"]
    request = make_request(component, tmp_path, {})
    with pytest.raises(BuildError, match="dit_time has no node that a plugin could take"):
        builder_module._use_plugins(component, onnx.load(request.graph))


def test_without_triton_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wantrt.engines.plugins.find_spec", lambda name: None)
    with pytest.raises(RuntimeUnavailableError, match="pip install triton"):
        plugin_names()
