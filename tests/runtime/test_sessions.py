"""Sessions of both runtimes: bound weights, callers' outputs, memory, and what they refuse."""

import gc

import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from safetensors.torch import load_file, save_file

from tests.export.components import make_components, make_inputs, make_weights
from wantrt.bench.memory import PeakMemory, anonymous_bytes
from wantrt.config import DiTConfig
from wantrt.device import CPUDevice
from wantrt.errors import BundleError, ExecutionError, RuntimeUnavailableError
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.models.components import dit_components
from wantrt.runtime import onnxruntime_session, torch_session
from wantrt.runtime.rewrite import rewrite_attention

LOADERS = {"torch": torch_session.load_sessions, "onnxruntime": onnxruntime_session.load_sessions}
SIZES = {"B": 1, "L": 6, "S": 4, "T": 2, "F": 1, "h": 2, "w": 3}


@pytest.fixture(scope="module")
def components():
    return make_components(torch.float32, ONNX_OPS)


@pytest.fixture(scope="module")
def graph_of(components, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")

    def export(name: str):
        path = folder / f"{name}.onnx"
        if not path.exists():
            export_component(components[name], path)
        return path

    return export


@pytest.fixture(params=LOADERS)
def load(request, components, graph_of):
    """Load the sessions of a component, by name, in each of the runtimes."""

    def load(name: str, weights=None):
        component = components[name]
        weights = make_weights(component) if weights is None else weights
        return LOADERS[request.param](component, graph_of(name), weights, CPUDevice())

    return load


def test_one_session_an_instance(load, components):
    sessions = load("dit_stack")
    component = components["dit_stack"]
    assert len(sessions) == len(component.instances) > 1
    assert sessions[0].inputs == component.inputs
    assert sessions[0].outputs == component.outputs


def test_outputs_are_written_where_the_caller_wants_them(load, components):
    (session,) = load("dit_time")
    inputs = make_inputs(components["dit_time"], SIZES)
    owned = session.run(inputs)
    given = {name: torch.full_like(tensor, torch.nan) for name, tensor in owned.items()}
    assert session.run(inputs, {"e6": given["e6"]})["e6"] is given["e6"]
    assert torch.equal(given["e6"], owned["e6"])
    assert given["e"].isnan().all()
    owned["e"].add_(1)  # results are ordinary tensors


def test_what_is_bound_stays(load, components):
    (session,) = load("text_head")
    inputs = make_inputs(components["text_head"], SIZES)
    expected = session.run(inputs)["text_embeds"]
    session.bind("mask", inputs["mask"])
    assert torch.equal(session.run({"hidden": inputs["hidden"]})["text_embeds"], expected)
    session.bind("head.norm", torch.zeros_like(make_weights(components["text_head"])["head.norm"]))
    assert not session.run({"hidden": inputs["hidden"]})["text_embeds"].any()


def test_caches_ping_pong(load, components):
    """Two banks that change places give what fresh tensors give."""
    (first,), (following,) = load("vae_decoder_first"), load("vae_decoder_next")
    latents = [torch.randn(first.inputs["latent"].concrete(SIZES)) for _ in range(3)]
    caches = {n: spec for n, spec in following.inputs.items() if n.startswith("cache_")}

    def as_inputs(outputs):
        return {slot: outputs[f"new_{slot}"] for slot in caches}

    fresh = first.run({"latent": latents[0]})
    expected = [fresh := following.run({"latent": z, **as_inputs(fresh)}) for z in latents[1:]]

    banks = [
        {f"new_{n}": torch.full(spec.concrete(SIZES), torch.nan) for n, spec in caches.items()}
        for _ in range(2)
    ]
    first.run({"latent": latents[0]}, banks[0])
    for i, z in enumerate(latents[1:]):
        actual = following.run({"latent": z, **as_inputs(banks[i % 2])}, banks[(i + 1) % 2])
        assert torch.equal(actual["pixels"], expected[i]["pixels"])


def test_runs_are_bit_identical(load, components):
    session = load("dit_stack")[0]
    inputs = make_inputs(components["dit_stack"], SIZES)
    first, second = (session.run(inputs)["hidden_out"].clone() for _ in range(2))
    assert torch.equal(first, second)


# -- Refusals -------------------------------------------------------------------------------------


def test_tensors_that_do_not_fit_are_named(load, components):
    (session,) = load("text_head")
    inputs = make_inputs(components["text_head"], SIZES)
    with pytest.raises(ExecutionError, match="text_head: input mask is missing"):
        session.run({"hidden": inputs["hidden"]})
    with pytest.raises(ExecutionError, match=r"input mask is torch.float64 \(1, 4\), expected"):
        session.run({**inputs, "mask": inputs["mask"].double()})
    with pytest.raises(ExecutionError, match=r"input mask .*\(1, 3\).* with B = 1, S = 4"):
        session.run({**inputs, "mask": inputs["mask"][:, :3].contiguous()})
    with pytest.raises(ExecutionError, match="output text_embeds is"):
        session.run(inputs, {"text_embeds": torch.empty(3)})
    with pytest.raises(ExecutionError, match="no output logits"):
        session.run(inputs, {"logits": torch.empty(3)})


def test_output_over_an_input_is_refused(load, components):
    session = load("dit_stack")[0]
    inputs = make_inputs(components["dit_stack"], SIZES)
    with pytest.raises(ExecutionError, match="hidden_out lies where input hidden does"):
        session.run(inputs, {"hidden_out": inputs["hidden"]})


def test_weights_that_do_not_fit_are_named(load, components):
    weights = make_weights(components["text_head"])
    with pytest.raises(BundleError, match=r"text_head: no weight head.norm.*wantrt build"):
        load("text_head", {})
    with pytest.raises(BundleError, match=r"weight head.norm is torch.float32 \(5,\), expected"):
        load("text_head", {**weights, "head.norm": torch.ones(5)})
    with pytest.raises(BundleError, match=r"weight head.norm is torch.bfloat16"):
        load("text_head", {"head.norm": weights["head.norm"].bfloat16()})


def test_onnxruntime_refuses_half_precision(graph_of):
    component = make_components(torch.bfloat16, ONNX_OPS)["dit_stack"]
    weights = make_weights(component)
    with pytest.raises(RuntimeUnavailableError, match="wantrt build --runtime onnxruntime"):
        onnxruntime_session.load_sessions(component, graph_of("dit_stack"), weights, CPUDevice())


def test_onnxruntime_names_a_damaged_graph(components, tmp_path):
    path = tmp_path / "text_head.onnx"
    path.write_bytes(b"not a graph")
    weights = make_weights(components["text_head"])
    with pytest.raises(BundleError, match=r"text_head: .*text_head\.onnx.*wantrt build"):
        onnxruntime_session.load_sessions(components["text_head"], path, weights, CPUDevice())


def test_onnxruntime_has_the_threads_of_torch(components, graph_of, monkeypatch):
    """And they sleep when they have nothing to do: the next component has its own."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    component = components["text_head"]
    (session,) = onnxruntime_session.load_sessions(
        component, graph_of("text_head"), make_weights(component), CPUDevice()
    )
    options = session._session.get_session_options()
    assert options.intra_op_num_threads == 3
    assert options.get_session_config_entry("session.intra_op.allow_spinning") == "0"


def test_onnxruntime_wants_contiguous_inputs(components, graph_of):
    component = components["text_head"]
    (session,) = onnxruntime_session.load_sessions(
        component, graph_of("text_head"), make_weights(component), CPUDevice()
    )
    inputs = make_inputs(component, SIZES)
    with pytest.raises(ExecutionError, match="hidden must be contiguous"):
        session.run({**inputs, "hidden": inputs["hidden"].mT.contiguous().mT})


# -- Memory ---------------------------------------------------------------------------------------


def test_attention_memory_is_linear_in_tokens(tmp_path):
    """8,192 tokens, 12 heads: all scores at once would be 3 GiB."""
    tokens = 8192
    stack, path = small_stack(tmp_path, dim=96, num_heads=12)
    weights = make_weights(stack)
    (session,) = onnxruntime_session.load_sessions(stack, path, weights, CPUDevice())
    inputs = make_inputs(stack, {"B": 1, "L": tokens})
    with PeakMemory() as memory:
        session.run(inputs)
    hidden_bytes = inputs["hidden"].nbytes
    assert memory.peak_bytes - memory.start_bytes < 40 * hidden_bytes  # 120 MiB


def test_weights_stay_on_disk(tmp_path):
    """Loading binds the mapped file: anonymous memory does not grow by the weights (36 MB)."""
    stack, path = small_stack(tmp_path, dim=768, num_heads=6)
    save_file(make_weights(stack), tmp_path / "weights.safetensors")
    gc.collect()
    before = anonymous_bytes()
    weights = load_file(tmp_path / "weights.safetensors")
    (session,) = onnxruntime_session.load_sessions(stack, path, weights, CPUDevice())
    session.run(make_inputs(stack, SIZES))
    grown = anonymous_bytes() - before
    assert grown < sum(tensor.nbytes for tensor in weights.values()) / 2


def small_stack(folder, dim, num_heads):
    """One block, and its graph."""
    config = DiTConfig(
        dim=dim, ffn_dim=4 * dim, num_heads=num_heads, num_layers=1, text_dim=32, text_len=8
    )
    made = dit_components(config, torch.float32, ops=ONNX_OPS)
    (stack,) = (component for component in made if component.name == "dit_stack")
    path = folder / "dit_stack.onnx"
    export_component(stack, path)
    return stack, path


# -- The rewritten attention ----------------------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_attention_on_split_heads(bias):
    """[B, L, C] split into heads, as in the DiT and the text encoder."""
    x = [torch.randn(2, length, 12) for length in (7, 5, 5)]
    mask = torch.randn(2, 3, 7, 5)
    heads = helper.make_tensor("heads", TensorProto.INT64, [4], [0, 0, 3, 4])
    joined = helper.make_tensor("joined", TensorProto.INT64, [3], [0, 0, 12])
    nodes = []
    for name in "qkv":
        nodes.append(helper.make_node("Reshape", [f"{name}3", "heads"], [f"{name}4"]))
        nodes.append(helper.make_node("Transpose", [f"{name}4"], [name], perm=[0, 2, 1, 3]))
    nodes.append(
        helper.make_node("Attention", [*"qkv", *["mask"][:bias]], ["y4"], name="a", scale=0.3)
    )
    nodes.append(helper.make_node("Transpose", ["y4"], ["y3"], perm=[0, 2, 1, 3]))
    nodes.append(helper.make_node("Reshape", ["y3", "joined"], ["y"]))
    feeds = dict(zip(("q3", "k3", "v3"), x, strict=True)) | ({"mask": mask} if bias else {})
    actual = run_rewritten(nodes, feeds, [heads, joined], result_rank=3)
    q, k, v = (t.unflatten(-1, (3, 4)).transpose(1, 2) for t in x)
    expected = F.scaled_dot_product_attention(q, k, v, mask if bias else None, scale=0.3)
    torch.testing.assert_close(actual, expected.transpose(1, 2).flatten(2))


def test_attention_on_frames():
    """[B, T, HW, C], heads apart from the beginning, as in the VAE."""
    x = torch.randn(3, 1, 2, 6, 8)
    nodes = [helper.make_node("Attention", [*"qkv"], ["y"], name="a", scale=0.3)]
    actual = run_rewritten(nodes, dict(zip("qkv", x, strict=True)), [], result_rank=4)
    torch.testing.assert_close(actual, F.scaled_dot_product_attention(*x, scale=0.3))


def run_rewritten(nodes, feeds, constants, result_rank):
    graph = helper.make_graph(
        nodes,
        "attention",
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, list(x.shape))
            for n, x in feeds.items()
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [None] * result_rank)],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    model = rewrite_attention(model)
    operators = [node.op_type for node in model.graph.node]
    assert "MultiHeadAttention" in operators
    assert "Attention" not in operators
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (result,) = session.run(None, {name: x.numpy() for name, x in feeds.items()})
    return torch.from_numpy(result)
