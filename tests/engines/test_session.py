"""TensorRT sessions on a fake TensorRT: what they compute, where, and what they refuse."""

import gc
import logging
from functools import partial

import pytest
import torch
from torch import Tensor

from tests.engines.fake.device import FakeDevice
from tests.engines.fake.install import install_tensorrt_rtx
from tests.engines.fake.tensorrt import Engine, Runtime, RuntimeCache, make_module
from tests.export.components import make_components, make_inputs, make_weights
from wantrt.engines.builder import build_plan
from wantrt.engines.flavours import Flavour, find_flavour
from wantrt.engines.requests import PlanRequest
from wantrt.engines.session import TensorRTSession, load_sessions
from wantrt.errors import BundleError, ExecutionError, SettingsError
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.manifest import PlanRecord
from wantrt.runtime import torch_session

NAMES = (
    "text_embed",
    "text_stack",
    "text_head",
    "dit_condition",
    "dit_time",
    "dit_patch",
    "dit_stack",
    "dit_head",
    "vae_decoder_first",
    "vae_decoder_next",
    "vae_encoder_first",
    "vae_encoder_next",
)
SIZES = {"B": 1, "L": 6, "S": 4, "T": 2, "F": 1, "h": 2, "w": 3}


@pytest.fixture(scope="module")
def components():
    return make_components(torch.bfloat16, ONNX_OPS)


@pytest.fixture(scope="module")
def graph_of(components, tmp_path_factory):
    folder = tmp_path_factory.mktemp("graphs")

    def export(name: str):
        path = folder / f"{name}.onnx"
        if not path.exists():
            export_component(components[name], path)
        return path

    return export


@pytest.fixture
def flavour(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield install_tensorrt_rtx(monkeypatch)
    find_flavour.cache_clear()


@pytest.fixture
def device():
    with FakeDevice() as device:
        yield device
        assert device.broken == []


@pytest.fixture
def plan_of(components, graph_of, flavour, tmp_path):
    """A plan, built as the product builds it: static unless `symbols` has ranges."""

    def build(name: str, symbols=None, instance: int | None = None, weights=None):
        component = components[name]
        sizes = {s: (n, n, n) for s, n in SIZES.items() if s in symbols_in(component)}
        sizes |= symbols or {}
        baked = {}
        if instance is not None:
            baked = {n: weights[w] for n, w in component.instances[instance].items()}
        request = PlanRequest(
            component=component,
            graph=graph_of(name),
            symbols=sizes,
            targets=("sm89",),
            baked=baked,
        )
        path = tmp_path / f"{name}-{len(list(tmp_path.iterdir()))}.plan"
        path.write_bytes(memoryview(build_plan(flavour, request)))
        record = PlanRecord(
            file=path.name,
            runtime=flavour.name,
            version=flavour.version,
            targets=("sm89",),
            symbols=sizes,
            part=None if instance is None else "part",
            instance=instance,
        )
        return record, path

    return build


def symbols_in(component) -> set[str]:
    specs = (*component.inputs.values(), *component.outputs.values())
    return {
        factor
        for spec in specs
        for size in spec.shape
        if isinstance(size, str)
        for factor in size.split("*")
        if not factor.isdigit()
    }


def on(device: FakeDevice, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(device.torch_device) for name, tensor in tensors.items()}


def load(component, plans, weights, device, flavour) -> list[TensorRTSession]:
    return load_sessions(component, plans, on(device, weights), device, flavour)


# -- What is computed -----------------------------------------------------------------------------


@pytest.mark.parametrize("weights_are", ["bound", "baked"])
@pytest.mark.parametrize("name", NAMES)
def test_every_component_computes_what_its_module_does(
    components, plan_of, device, flavour, name, weights_are
):
    component, weights = components[name], make_weights(components[name])
    plans = [plan_of(name)]
    if weights_are == "baked":
        count = len(component.instances)
        plans = [plan_of(name, instance=index, weights=weights) for index in range(count)]
    sessions = load(component, plans, weights if weights_are == "bound" else {}, device, flavour)
    references = torch_session.load_sessions(component, None, weights, FakeHost())
    assert len(sessions) == len(component.instances)
    for seed, (session, reference) in enumerate(zip(sessions, references, strict=True)):
        inputs = make_inputs(component, SIZES, seed)
        expected = reference.run(inputs)
        with device.stream():
            actual = {n: t.cpu() for n, t in session.run(on(device, inputs)).items()}
        assert actual.keys() == expected.keys()
        for output, tensor in actual.items():
            assert tensor.dtype == expected[output].dtype
            error = (tensor.float() - expected[output].float()).norm()
            assert error <= 0.02 * expected[output].float().norm(), output


class FakeHost:
    torch_device = torch.device("cpu")


def test_outputs_are_written_where_the_caller_wants_them(components, plan_of, device, flavour):
    component = components["dit_time"]
    plans, weights = [plan_of("dit_time")], make_weights(components["dit_time"])
    (session,) = load(component, plans, weights, device, flavour)
    inputs = on(device, make_inputs(component, SIZES))
    with device.stream():
        owned = session.run(inputs)
        given = {"e6": device.empty(tuple(owned["e6"].shape), torch.float32)}
        assert session.run(inputs, given)["e6"] is given["e6"]
        assert torch.equal(given["e6"], owned["e6"])


def test_stacks_share_an_engine_and_a_context(components, plan_of, device, flavour):
    component = components["dit_stack"]
    before = Engine.deserialised
    weights = make_weights(component)
    plan = plan_of("dit_stack")
    experts = [load(component, [plan], weights, device, flavour) for _ in range(2)]
    inputs = on(device, make_inputs(component, SIZES))
    with device.stream():
        results = [session.run(inputs)["hidden_out"] for s in experts for session in s]
    assert Engine.deserialised == before + 1
    (loaded,) = {id(p): p for s in experts for x in s for p in x._loaded.values()}.values()
    assert loaded._loaded.engine.contexts == 1
    with device.stream():
        assert torch.equal(results[0], results[len(component.instances)])
        assert not torch.equal(results[0], results[1])


def test_devices_share_an_engine_and_no_context(components, plan_of, flavour):
    component, plan = components["dit_time"], plan_of("dit_time")
    before, held = Engine.deserialised, []
    for _ in range(2):
        with FakeDevice() as device:
            (session,) = load(component, [plan], make_weights(component), device, flavour)
            session.prepare({"T": 2})
            held.append(session)
    first, second = (next(iter(session._loaded.values())) for session in held)
    assert Engine.deserialised == before + 1
    assert first._loaded.engine is second._loaded.engine
    assert first._contexts[0] is not second._contexts[0]


def test_a_plan_is_freed_with_its_last_session(components, plan_of, device, flavour):
    component, plan = components["dit_time"], plan_of("dit_time")
    before = Engine.deserialised
    for _ in range(2):
        sessions = load(component, [plan], make_weights(component), device, flavour)
        sessions[0].prepare({"T": 2})
        del sessions
        gc.collect()
    assert Engine.deserialised == before + 2


def test_rebinding_weights(components, plan_of, device, flavour):
    """As streaming does: the weights of every stack in turn, through the same two slots."""
    component = components["dit_stack"]
    weights = make_weights(component)
    plan = plan_of("dit_stack")
    sessions = load(component, [plan], weights, device, flavour)
    on_host = load_sessions(component, [plan], weights, device, flavour)[0]
    inputs = on(device, make_inputs(component, SIZES))
    with device.stream():
        with pytest.raises(ExecutionError, match="is bound to nothing on the device"):
            on_host.run(inputs)
        for instance, session in zip(component.instances, sessions, strict=True):
            slot = on(device, {name: weights[w] for name, w in instance.items()})
            for name, tensor in slot.items():
                on_host.bind(name, tensor)
            actual = on_host.run(inputs)["hidden_out"]
            assert torch.equal(actual, session.run(inputs)["hidden_out"])


def test_the_narrowest_plan_that_serves_is_taken(components, plan_of, device, flavour):
    component = components["dit_stack"]
    ranged = plan_of("dit_stack", {"L": (2, 6, 9)})
    plans = [ranged, plan_of("dit_stack")]
    session, *_ = load(component, plans, make_weights(component), device, flavour)
    with device.stream():
        for tokens, expected in ((6, "6"), (9, "2..9"), (2, "2..9")):
            session.run(on(device, make_inputs(component, {**SIZES, "L": tokens})))
            source = list(session._loaded)[-1 if expected != "6" else 0]
            assert source.record.symbols["L"][2] == (6 if expected == "6" else 9)
    assert [served["L"] for served in session.serves] == [(2, 6, 9), (6, 6, 6)]


def test_capture_replays_all_stacks(components, plan_of, device, flavour):
    component = components["dit_stack"]
    sessions = load(component, [plan_of("dit_stack")], make_weights(component), device, flavour)
    inputs = on(device, make_inputs(component, SIZES))
    hidden, spare = inputs["hidden"], device.empty(tuple(inputs["hidden"].shape), torch.float32)

    def step() -> None:
        tensors = [hidden, spare]
        for session in sessions:
            session.run({**inputs, "hidden": tensors[0]}, {"hidden_out": tensors[1]})
            tensors.reverse()
        if tensors[0] is spare:
            hidden.copy_(spare)

    with device.stream():
        start = hidden.clone()
        step()
        step()
        expected = hidden.clone()
        hidden.copy_(start)
        step()
        replay = device.capture(step)
        hidden.copy_(start)
        replay()
        replay()
        assert torch.equal(hidden, expected)
    assert device.replays == 2


def test_a_captured_context_keeps_its_shapes(components, plan_of, device, flavour):
    """A dynamic plan at two sizes, both captured, replayed in turn."""
    component = components["dit_time"]
    plan = plan_of("dit_time", {"T": (1, 2, 4)})
    (session,) = load(component, [plan], make_weights(component), device, flavour)
    captured = []
    with device.stream():
        for count in (2, 3):
            inputs = on(device, make_inputs(component, {"T": count}))
            expected = session.run(inputs)
            outputs = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
            replay = device.capture(partial(session.run, inputs, outputs))
            captured.append((replay, inputs, outputs, expected))
        session.run(on(device, make_inputs(component, {"T": 4})))
        for replay, _, outputs, expected in captured:
            replay()
            assert all(torch.equal(outputs[name], expected[name]) for name in expected)
    (loaded,) = session._loaded.values()
    assert len(loaded._contexts) == 3  # one for each captured size, and one for all others


def test_a_capture_after_other_shapes_is_refused(components, plan_of, device, flavour):
    component = components["dit_time"]
    plan = plan_of("dit_time", {"T": (1, 2, 4)})
    (session,) = load(component, [plan], make_weights(component), device, flavour)
    two, three = (on(device, make_inputs(component, {"T": count})) for count in (2, 3))
    with device.stream():
        session.run(two)
        session.run(three)
        with pytest.raises(ExecutionError, match="has not run at these shapes yet"):
            device.capture(lambda: session.run(two))


# -- The runtime cache ----------------------------------------------------------------------------


def test_compiled_kernels_are_kept_on_disk(components, plan_of, device, flavour, tmp_path, caplog):
    component, plan = components["dit_time"], plan_of("dit_time")

    def prepare():
        load(component, [plan], make_weights(component), device, flavour)[0].prepare({"T": 2})

    prepare()
    (file,) = (
        p for p in (tmp_path / "cache" / "wantrt" / "runtime-cache").rglob("*") if p.is_file()
    )
    assert file.parent.name == f"Fake-RTX-CUDA-driver-13.0-{flavour.version}"
    assert file.read_bytes() == RuntimeCache.made
    written = file.stat().st_mtime_ns
    prepare()
    assert file.stat().st_mtime_ns == written
    file.write_bytes(b"damaged")
    with caplog.at_level(logging.WARNING):
        prepare()
    assert "compile again" in caplog.text
    assert file.read_bytes() == RuntimeCache.made


def test_kernels_for_new_shapes_are_kept_too(
    components, plan_of, device, flavour, tmp_path, monkeypatch
):
    """A dynamic plan compiles at its runs, before they run: else a seed would not mean the bits."""
    component, plan = components["dit_time"], plan_of("dit_time", {"T": (1, 2, 4)})
    (session,) = load(component, [plan], make_weights(component), device, flavour)
    session.prepare({"T": 2})
    (loaded,) = session._loaded.values()
    strategy = loaded._contexts[0]._context._config.dynamic_shapes_kernel_specialization_strategy
    assert strategy.name == "EAGER"
    monkeypatch.setattr(RuntimeCache, "made", b"and kernels for three timesteps")
    del session, loaded
    gc.collect()
    (file,) = (
        p for p in (tmp_path / "cache" / "wantrt" / "runtime-cache").rglob("*") if p.is_file()
    )
    assert file.read_bytes() == RuntimeCache.made


def test_the_other_flavour_has_no_runtime_cache(components, plan_of, device, flavour, tmp_path):
    other = Flavour("tensorrt", make_module("tensorrt"))
    component = components["dit_time"]
    plans, weights = [plan_of("dit_time")], make_weights(component)
    (session,) = load(component, plans, weights, device, other)
    with device.stream():
        session.run(on(device, make_inputs(component, SIZES)))
    assert not (tmp_path / "cache" / "wantrt" / "runtime-cache").exists()


# -- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "call, kind, cause",
    [
        ("get_engine_validity", BundleError, "does not run on this GPU"),
        ("deserialize_cuda_engine", BundleError, "cannot be loaded.*made by another version"),
        ("create_runtime_config", ExecutionError, "no runtime configuration"),
        ("create_execution_context", ExecutionError, "no execution context.*out of memory"),
        ("set_optimization_profile_async", ExecutionError, "profile was refused.*no such profile"),
        ("set_input_shape", ExecutionError, r"sinusoid cannot have shape \[2, 256\].*says: sinus"),
        ("set_tensor_address", ExecutionError, "address of sinusoid was refused.*no tensor"),
        ("execute_async_v3", ExecutionError, "could not be enqueued.*enqueueV3 failed"),
    ],
)
def test_every_failed_call_is_an_error_that_says_what_to_do(
    components, plan_of, device, flavour, monkeypatch, call, kind, cause
):
    component, plan = components["dit_time"], plan_of("dit_time")
    (session,) = load(component, [plan], make_weights(component), device, flavour)
    monkeypatch.setattr(Runtime, "refuses", {call})
    with device.stream(), pytest.raises(kind, match=cause) as raised:
        session.run(on(device, make_inputs(component, SIZES)))
    message = str(raised.value)
    assert message.startswith("dit_time: ")
    assert str(plan[1]) in message
    assert "wantrt " in message or "--residency" in message
    if kind is BundleError:
        assert "wantrt build --runtime tensorrt-rtx --target sm89" in message
    monkeypatch.setattr(Runtime, "refuses", set())
    with device.stream():
        session.run(on(device, make_inputs(component, SIZES)))  # nothing half set is left


def test_a_refused_runtime_cache_costs_nothing_else(
    components, plan_of, device, flavour, monkeypatch, caplog
):
    component = components["dit_time"]
    plans, weights = [plan_of("dit_time")], make_weights(component)
    monkeypatch.setattr(Runtime, "refuses", {"set_runtime_cache"})
    with caplog.at_level(logging.WARNING):
        load(component, plans, weights, device, flavour)[0].prepare({"T": 2})
    assert "refuses a runtime cache" in caplog.text


def test_a_stream_that_cannot_be_captured(components, plan_of, device, flavour, monkeypatch):
    component = components["dit_time"]
    plans, weights = [plan_of("dit_time")], make_weights(component)
    (session,) = load(component, plans, weights, device, flavour)
    inputs = on(device, make_inputs(component, SIZES))
    monkeypatch.setattr(Runtime, "refuses", {"is_stream_capturable"})
    with device.stream():
        session.run(inputs)
        with pytest.raises(ExecutionError, match="dit_time: the plan cannot be captured"):
            device.capture(lambda: session.run(inputs))
        session.run(inputs)  # runs on, uncaptured


def test_a_plan_that_may_allocate_cannot_be_captured(
    components, plan_of, device, flavour, monkeypatch
):
    """The builder forbids it: TensorRT-RTX would allocate in the run of a plan of large tensors."""
    monkeypatch.setattr(Flavour, "forbid_allocation", lambda *_: None)
    component = components["dit_time"]
    plans, weights = [plan_of("dit_time")], make_weights(component)
    (session,) = load(component, plans, weights, device, flavour)
    inputs = on(device, make_inputs(component, SIZES))
    with device.stream():
        session.run(inputs)
        with pytest.raises(ExecutionError, match="dit_time: the plan cannot be captured"):
            device.capture(lambda: session.run(inputs))


def test_sizes_that_no_plan_serves(components, plan_of, device, flavour):
    component = components["dit_stack"]
    plans, weights = [plan_of("dit_stack")], make_weights(component)
    session, *_ = load(component, plans, weights, device, flavour)
    with pytest.raises(SettingsError, match=r"serves B = 1, L = 7\..* B = 1, L = 6\. .*--size"):
        session.run(on(device, make_inputs(component, {**SIZES, "L": 7})))


def test_tensors_that_do_not_fit_are_named(components, plan_of, device, flavour):
    component = components["dit_time"]
    plans, weights = [plan_of("dit_time")], make_weights(component)
    (session,) = load(component, plans, weights, device, flavour)
    inputs = make_inputs(component, SIZES)
    with pytest.raises(ExecutionError, match="sinusoid lies on cpu, expected cpu:0"):
        session.run(inputs)
    moved = on(device, inputs)["sinusoid"]
    with pytest.raises(ExecutionError, match="sinusoid must be contiguous"):
        session.run({"sinusoid": moved.mT.contiguous().mT})
    behind_another = torch.cat((moved.new_zeros(1), moved.flatten()))[1:].view_as(moved)
    with pytest.raises(ExecutionError, match=r"sinusoid is a view .* clone it"):
        session.run({"sinusoid": behind_another})
    with pytest.raises(ExecutionError, match="input sinusoid is missing"):
        session.run({})
    with pytest.raises(ExecutionError, match="takes no logits"):
        session.bind("logits", moved)
    with pytest.raises(ExecutionError, match=r"weight .* is torch.float32"):
        session.bind(next(iter(component.weights)), moved)


def test_a_gpu_that_the_flavour_does_not_serve(components, plan_of, device, flavour, monkeypatch):
    monkeypatch.setattr(device, "architecture", "sm90", raising=False)
    monkeypatch.setattr(Runtime, "refuses", {"get_engine_validity"})
    component, plan = components["dit_time"], plan_of("dit_time")
    (session,) = load(component, [plan], make_weights(component), device, flavour)
    with pytest.raises(BundleError, match=r"this machine: wantrt build --runtime tensorrt$"):
        session.prepare({"T": 2})


def test_plans_that_do_not_fit_are_named(components, plan_of, device, flavour, tmp_path):
    component, weights = components["dit_time"], make_weights(components["dit_time"])
    other = plan_of("dit_stack")
    (session,) = load(component, [(other[0], other[1])], weights, device, flavour)
    with pytest.raises(SettingsError):
        session.prepare({"T": 2})
    record, path = plan_of("dit_time")
    path.write_bytes(other[1].read_bytes())
    (session,) = load(component, [(record, path)], weights, device, flavour)
    with pytest.raises(BundleError, match=r"dit_time: the plan has hidden, .*wantrt build"):
        session.prepare({"T": 2})
    path.write_bytes(b"no plan")
    with pytest.raises(BundleError, match=r"cannot be loaded.*sm89.*Fake RTX.*wantrt build"):
        session.prepare({"T": 2})
    path.unlink()
    with pytest.raises(BundleError, match="cannot read"):
        session.prepare({"T": 2})
    with pytest.raises(BundleError, match="no tensorrt-rtx plan for instance 0"):
        load(component, [], weights, device, flavour)


def test_the_real_library_without_a_gpu(components, graph_of, device, tmp_path):
    """It says no in its own way (None, and INVALID), and so do we in ours."""
    pytest.importorskip("tensorrt_rtx")
    if torch.cuda.is_available():
        pytest.skip("the plan may run here")
    real, component = find_flavour("tensorrt-rtx"), components["dit_time"]
    request = PlanRequest(
        component=component,
        graph=graph_of("dit_time"),
        symbols={"T": (2, 2, 2)},
        targets=("sm89",),
    )
    path = tmp_path / "dit_time.plan"
    path.write_bytes(memoryview(build_plan(real, request)))
    record = PlanRecord(
        file=path.name,
        runtime=real.name,
        version=real.version,
        targets=("sm89",),
        symbols=dict(request.symbols),
    )
    (session,) = load(component, [(record, path)], make_weights(component), device, real)
    with pytest.raises(BundleError, match=r"does not run on this GPU.*--target sm89"):
        session.prepare({"T": 2})
