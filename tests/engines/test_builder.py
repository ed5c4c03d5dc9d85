"""Every component is compiled by TensorRT-RTX for real GPUs, on a machine that has none."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor

from tests.engines.plans import components, make_request, shapes, variants
from tests.export.components import NAMES, make_inputs, make_weights
from wantrt.config import DIT_14B, DIT_NANO, DiTConfig
from wantrt.engines.requests import has_no_kernels
from wantrt.errors import BuildError, CancelledError
from wantrt.export.graph import export_graph
from wantrt.export.ops import ONNX_OPS
from wantrt.models.components import Component, dit_components

pytest.importorskip("tensorrt_rtx")

import wantrt.engines.builder as builder
from wantrt.engines.builder import build_plan, timing_cache_path
from wantrt.engines.flavours import find_flavour
from wantrt.engines.fusion import required_fusions
from wantrt.engines.network import attentions, fill_sizes, read_graph, separate_queries

STATIC = {"B": (2, 2, 2), "L": (24, 24, 24)}
REDUCED = tuple(name for name in NAMES if " " not in name)


@pytest.fixture(scope="module")
def flavour():
    return find_flavour("tensorrt-rtx")


def dit_stack(config: DiTConfig = DIT_NANO, dtype=torch.bfloat16, stack: int = 1) -> Component:
    parts = dit_components(config, dtype, stack=stack, ops=ONNX_OPS)
    return next(component for component in parts if component.name == "dit_stack")


@pytest.mark.parametrize(
    "variant, name, way",
    [("nano", name, way) for name in NAMES for way in ("bound", "baked", "dynamic")]
    + [("reduced", name, way) for name in REDUCED for way in ("bound", "baked")],
)
def test_every_component_builds(flavour, tmp_path, variant, name, way):
    component = components(variant)[name]
    serving = shapes(variant, component, dynamic=way == "dynamic")[-1]
    request = make_request(component, tmp_path, serving.symbols, baked=way == "baked")
    plan = build_plan(flavour, request)
    assert 50_000 < plan.nbytes < 20_000_000


@pytest.mark.parametrize("variant", ["nano", "reduced"])
def test_fp16_builds_for_turing(flavour, tmp_path, variant):
    built = []
    for component in components(variant, torch.float16).values():
        if component.name.startswith("text_") or has_no_kernels(component, ("sm75",)):
            continue  # the text encoder of an fp16 bundle is float32
        symbols = shapes(variant, component)[0].symbols
        build_plan(flavour, make_request(component, tmp_path, symbols, ("sm75",)))
        built.append(component.name)
    assert set(built) == {
        "dit_condition",
        "dit_patch",
        "dit_stack",
        "vae_decoder_first",
        "vae_decoder_next",
        *(["image_encoder"] if variant == "nano" else []),  # nano's stands for all of CLIP
    }


@pytest.mark.parametrize("name", ["dit_time", "dit_head", "vae_encoder_first", "vae_encoder_next"])
def test_turing_has_no_kernels_where_the_table_says_so(flavour, tmp_path, name):
    """Should this fail with a newer TensorRT, the table in engines/requests.py can shrink."""
    component = components("nano", torch.float16)[name]
    symbols = shapes("nano", component)[0].symbols
    with pytest.raises(BuildError, match=rf"(?s){name} at .* for sm75:.*FP32.*not supported"):
        build_plan(flavour, make_request(component, tmp_path, symbols, ("sm75",)))


def test_text_in_float32_builds_but_for_its_attention(flavour, tmp_path):
    for component in components("nano", torch.float32).values():
        if not component.name.startswith("text_"):
            continue
        request = make_request(component, tmp_path, shapes("nano", component)[0].symbols, ("sm75",))
        if has_no_kernels(component, ("sm75",)):
            assert component.name == "text_stack"
            with pytest.raises(BuildError, match="0 of 1 attentions"):
                build_plan(flavour, request)
        else:
            build_plan(flavour, request)


def test_a_14b_block_builds_without_its_weights(flavour, tmp_path):
    """75,600 tokens: a plan of a few MB that serves all 40 blocks."""
    block = dit_stack(DIT_14B)
    symbols = {"B": (1, 1, 1), "L": (75_600, 75_600, 75_600)}
    plan = build_plan(flavour, make_request(block, tmp_path, symbols))
    assert plan.nbytes < 10_000_000
    assert len(block.instances) == 40


@pytest.mark.parametrize(
    "name", ["dit_condition", "dit_time", "dit_patch", "dit_stack", "dit_head"]
)
def test_a_baked_plan_holds_its_weights(flavour, tmp_path, name):
    """Byte for byte; of the text layers and of convolutions TensorRT-RTX packs some otherwise."""
    component = components("nano")[name]
    symbols = shapes("nano", component)[0].symbols
    request = make_request(component, tmp_path, symbols, baked=True)
    plan = bytes(build_plan(flavour, request))
    assert {w for w, tensor in request.baked.items() if as_bytes(tensor) in plan} == set(
        component.weights
    )
    other = {weight: tensor * 1.5 + 0.25 for weight, tensor in request.baked.items()}
    fine_tuned = bytes(build_plan(flavour, replace(request, baked=other)))
    bound = bytes(build_plan(flavour, replace(request, baked={})))
    for weight, tensor in request.baked.items():
        assert as_bytes(other[weight]) in fine_tuned
        assert as_bytes(tensor) not in fine_tuned
        assert as_bytes(tensor) not in bound


def as_bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def test_a_fine_tuned_vae_gives_another_plan(flavour, tmp_path):
    """Convolutions are packed, so their weights cannot be found; norms and biases can."""
    component = components("nano")["vae_decoder_next"]
    symbols = shapes("nano", component)[0].symbols
    request = make_request(component, tmp_path, symbols, baked=True)
    other = {weight: tensor * 1.5 + 0.25 for weight, tensor in request.baked.items()}
    plan, fine_tuned = (
        bytes(build_plan(flavour, replace(request, baked=baked)))
        for baked in (request.baked, other)
    )
    found = [w for w, tensor in request.baked.items() if as_bytes(tensor) in plan]
    assert len(found) > 20
    assert not any(as_bytes(request.baked[weight]) in fine_tuned for weight in found)


def test_baking_makes_no_copy_of_the_weights():
    """TensorRT itself holds the weights twice: in its network and in the plan. We hold none."""
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("baking.py")],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    measured = json.loads(done.stdout)
    weights = measured["weights_bytes"]
    assert weights > 200e6
    assert weights < measured["plan_bytes"] < 1.1 * weights
    assert measured["peak_bytes"] < 2 * weights + 180e6


# -- Attention ------------------------------------------------------------------------------------


def test_what_must_be_fused_is_known_from_the_component():
    required = {
        (variant, name): required_fusions(component)
        for variant in variants()
        for name, component in components(variant).items()
        if required_fusions(component)
    }
    assert required == {
        ("nano", "text_stack"): 1,
        ("nano", "dit_stack"): 2,
        ("nano", "dit_stack with two rows"): 2,
        ("nano", "image_encoder of CLIP"): 2,
        ("reduced", "text_stack"): 2,
        ("reduced", "dit_stack"): 4,
    }


@pytest.mark.parametrize("rows", ["N", 34], ids=["I2V", "FLF2V"])
def test_two_attentions_of_the_same_queries(flavour, tmp_path, rows):
    """Of text and of image: `separate_queries` says what happens to TensorRT-RTX without it."""
    positions = None if rows == "N" else rows
    block = dit_stack(replace(DIT_NANO, image_dim=160, image_positions=positions))
    assert block.inputs["image_context"].shape == ("B", rows, DIT_NANO.dim)
    assert required_fusions(block) == 3
    for symbols in (STATIC, {"B": (2, 2, 2), "L": (16, 24, 48)}):
        images = {} if positions else {"N": (17, 17, 17)}
        build_plan(flavour, make_request(block, tmp_path, {**symbols, **images}))


def test_queries_of_their_own_change_nothing():
    block = dit_stack(replace(DIT_NANO, image_dim=160), torch.float32)
    model = export_graph(block)
    sizes = {"B": 2, "L": 8, "N": 5}
    given = {**make_inputs(block, sizes), **make_weights(block)}
    feeds = {name: given[name].numpy() for name in (value.name for value in model.graph.input)}
    expected = ReferenceEvaluator(model).run(None, feeds)
    separate_queries(model)
    onnx.checker.check_model(model)
    queries = [node.input[0] for node in attentions(model)]
    assert len(queries) == len(set(queries)) == 3
    (actual,) = ReferenceEvaluator(model).run(None, feeds)
    assert (actual == expected[0]).all()


@pytest.mark.parametrize("count", [1, 2])
def test_attention_of_other_operators_is_refused(flavour, tmp_path, count):
    request = make_request(dit_stack(), tmp_path, STATIC)
    model = read_graph(request.graph)
    spell_out_attention(model, count)
    onnx.save(model, request.graph)
    with pytest.raises(BuildError, match=f"dit_stack: {2 - count} of 2 .* by other operators"):
        build_plan(flavour, request)


def spell_out_attention(model: onnx.ModelProto, count: int) -> None:
    """Replace the first Attention nodes by softmax(q kᵀ scale) v."""
    found = [node for node in model.graph.node if node.op_type == "Attention"]
    for node in found[:count]:
        q, k, v = node.input
        (out,) = node.output
        (scale,) = (attribute.f for attribute in node.attribute if attribute.name == "scale")
        factor = numpy_helper.from_array(torch.tensor(scale).numpy(), f"{out}_f32")
        model.graph.initializer.append(factor)
        index = list(model.graph.node).index(node)
        model.graph.node.remove(node)
        spelled = [
            helper.make_node("Transpose", [k], [f"{out}_kt"], perm=[0, 1, 3, 2]),
            helper.make_node("CastLike", [f"{out}_f32", q], [f"{out}_scale"]),
            helper.make_node("Mul", [q, f"{out}_scale"], [f"{out}_q"]),
            helper.make_node("MatMul", [f"{out}_q", f"{out}_kt"], [f"{out}_scores"]),
            helper.make_node("Softmax", [f"{out}_scores"], [f"{out}_weights"], axis=-1),
            helper.make_node("MatMul", [f"{out}_weights", v], [out]),
        ]
        for offset, spelled_node in enumerate(spelled):
            model.graph.node.insert(index + offset, spelled_node)
    onnx.checker.check_model(model)


def test_float32_attention_is_refused(flavour, tmp_path):
    request = make_request(dit_stack(dtype=torch.float32), tmp_path, STATIC)
    with pytest.raises(BuildError, match=r"0 of 2 .* q, k and v are float32"):
        build_plan(flavour, request)


def test_wide_heads_are_refused(flavour, tmp_path):
    request = make_request(dit_stack(replace(DIT_NANO, dim=640, num_heads=2)), tmp_path, STATIC)
    with pytest.raises(BuildError, match=r"0 of 2 .* wider than 256"):
        build_plan(flavour, request)


# -- Graphs, progress, failures -------------------------------------------------------------------


def test_sizes_are_filled_in(tmp_path):
    component = components("nano")["dit_head"]
    request = make_request(component, tmp_path, shapes("nano", component)[0].symbols)
    model = read_graph(request.graph)
    symbols = {**request.symbols, "h": (4, 4, 6)}
    fill_sizes(model, {**component.inputs, **component.outputs}, symbols)
    left = {
        (value.name, dimension.dim_param)
        for value in (*model.graph.input, *model.graph.output)
        for dimension in value.type.tensor_type.shape.dim
        if dimension.dim_param
    }
    assert left == {("hidden", "F*h*w"), ("latent", "2*h"), ("velocity", "2*h")}


def test_progress_ends_at_a_hundred(flavour, tmp_path):
    heard = []
    request = make_request(dit_stack(), tmp_path, STATIC)
    build_plan(flavour, request, progress=lambda *what: heard.append(what))
    percents = [percent for _, percent, _ in heard]
    assert percents == sorted(percents)
    assert percents[-1] == 100
    assert len(set(percents)) > 10
    assert {(what, total) for what, _, total in heard} == {("plan dit_stack", 100)}


def test_a_build_stops_when_asked(flavour, tmp_path):
    heard = []
    request = make_request(dit_stack(), tmp_path, STATIC)
    with pytest.raises(CancelledError, match="dit_stack"):
        build_plan(flavour, request, lambda *what: heard.append(what), lambda: len(heard) > 3)
    assert len(heard) < 10
    assert build_plan(flavour, request).nbytes


def test_an_exception_waits_until_tensorrt_has_returned(flavour, tmp_path):
    def interrupt(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_plan(flavour, make_request(dit_stack(), tmp_path, STATIC), interrupt)


def test_a_damaged_graph_is_refused(flavour, tmp_path):
    request = make_request(dit_stack(), tmp_path, STATIC)
    model = read_graph(request.graph)
    model.graph.node[3].op_type = "NoSuchOperator"
    onnx.save(model, request.graph)
    with pytest.raises(BuildError, match=r"(?s)does not read .*dit_stack.onnx.*NoSuchOperator"):
        build_plan(flavour, request)
    request.graph.write_bytes(b"\x00 no graph \xff")
    with pytest.raises(BuildError, match=r"dit_stack\.onnx"):
        build_plan(flavour, request)


@pytest.mark.parametrize("wrong", [lambda weight: weight[:1].contiguous(), Tensor.half])
def test_another_weight_than_the_graph_takes_is_refused(flavour, tmp_path, wrong):
    request = make_request(dit_stack(), tmp_path, STATIC, baked=True)
    name = "blocks.0.self_attn.qkv.weight"
    baked = {**request.baked, name: wrong(request.baked[name])}
    with pytest.raises(BuildError, match=f"weight {name} is"):
        build_plan(flavour, replace(request, baked=baked))


def test_rtx_times_nothing_at_build(flavour):
    assert not flavour.has_timing_cache
    assert timing_cache_path(flavour) is None


@pytest.mark.filterwarnings("ignore:.*no-ops in TensorRT-RTX:DeprecationWarning")
def test_a_timing_cache_is_written_and_read_again(flavour, tmp_path, monkeypatch):
    """TensorRT-RTX's is empty, but takes the same calls as the one that matters."""
    path = tmp_path / "timing" / "gpu.cache"
    monkeypatch.setattr(builder, "timing_cache_path", lambda flavour: path)
    request = make_request(dit_stack(), tmp_path, STATIC)
    for _ in range(2):
        assert build_plan(flavour, request).nbytes
        assert path.is_file()


def test_a_timing_cache_of_another_driver_is_started_anew(tmp_path):
    class Config:
        def create_timing_cache(self, content):
            return {"damaged": None}.get(content.decode(), content)

        def set_timing_cache(self, cache, ignore_mismatch):
            return cache == b""

    for content in ("damaged", "of another driver"):
        (path := tmp_path / "gpu.cache").write_text(content)
        assert builder._start_timing_cache(Config(), path) == b""


def test_a_plan_is_deserialised_where_it_lies(flavour, tmp_path):
    """Not from a copy: a baked stack of 14B has 8 GB. Without a driver TensorRT gives None."""
    plan = build_plan(flavour, make_request(dit_stack(), tmp_path, STATIC))
    engine = flavour.runtime().deserialize_cuda_engine(plan)
    said = flavour.last_errors()
    assert engine is not None or "Cuda" in said or "CUDA" in said
