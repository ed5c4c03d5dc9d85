"""The fake TensorRT and the fake device can fail: every rule that they keep, broken and caught."""

import pytest
import torch
from torch import Tensor

from tests.engines.fake import tensorrt as fake
from tests.engines.fake.device import FakeDevice, RuleBroken
from tests.export.components import make_components, make_inputs, make_weights
from wantrt.engines import api
from wantrt.engines.builder import build_plan
from wantrt.engines.flavours import Flavour
from wantrt.engines.requests import PlanRequest
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS

SIZES = {"T": 2}


@pytest.fixture(scope="module")
def component():
    return make_components(torch.bfloat16, ONNX_OPS)["dit_time"]


@pytest.fixture(scope="module")
def plan(component, tmp_path_factory):
    """dit_time for 1 to 4 timesteps."""
    path = tmp_path_factory.mktemp("graph") / "dit_time.onnx"
    export_component(component, path)
    request = PlanRequest(
        component=component, graph=path, symbols={"T": (1, 2, 4)}, targets=("sm89",)
    )
    flavour = Flavour("tensorrt-rtx", fake.make_module("tensorrt_rtx"))
    return bytes(memoryview(build_plan(flavour, request)))


@pytest.fixture
def device():
    with FakeDevice() as device:
        yield device


class Run:
    """One run of the plan by TensorRT's own API, a step at a time, so that each can go wrong."""

    def __init__(self, device: FakeDevice, component, plan: bytes) -> None:
        self.device = device
        runtime = fake.make_module("tensorrt_rtx").Runtime(fake.ILogger())
        self.engine = runtime.deserialize_cuda_engine(plan)
        self.config = self.engine.create_runtime_config()
        self.config.set_execution_context_allocation_strategy(
            fake.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        tensors = {**make_weights(component), **make_inputs(component, SIZES)}
        self.inputs = {name: t.to(device.torch_device) for name, t in tensors.items()}
        self.outputs = {
            name: device.empty(spec.concrete(SIZES), spec.dtype)
            for name, spec in component.outputs.items()
        }
        self.size = self.engine.device_memory_size_v2
        self.scratch = device.empty((self.size + 512,), torch.uint8)
        self.context = self.engine.create_execution_context(self.config)

    @property
    def aligned(self) -> int:
        return self.scratch.data_ptr() + -self.scratch.data_ptr() % 256

    def prepare(self, leave_out: str = "") -> None:
        if leave_out != "profile":
            assert self.context.set_optimization_profile_async(0, self.device.stream_handle)
        for name, tensor in self.inputs.items():
            if leave_out != f"shape of {name}":
                assert self.context.set_input_shape(name, tuple(tensor.shape))
        for name, tensor in {**self.inputs, **self.outputs}.items():
            if leave_out != f"address of {name}":
                assert self.context.set_tensor_address(name, tensor.data_ptr())
        if leave_out != "scratch":
            self.context.set_device_memory(self.aligned, self.size)

    def enqueue(self) -> None:
        assert self.context.execute_async_v3(self.device.stream_handle)


@pytest.fixture
def run(device, component, plan):
    return Run(device, component, plan)


def test_who_keeps_the_rules_breaks_none(run, device):
    run.prepare()
    with device.stream():
        run.enqueue()
        expected = run.outputs["e"].cpu()
        replay = device.capture(run.enqueue)
        run.outputs["e"].zero_()
        replay()
        assert torch.equal(run.outputs["e"].cpu(), expected)
    assert expected.isfinite().all()
    assert device.broken == []


# -- Before a run ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "leave_out, rule",
    [
        ("profile", "no optimisation profile was chosen"),
        ("shape of sinusoid", "the shape of sinusoid was not set"),
        ("address of sinusoid", "the address of sinusoid was not set"),
        ("address of e6", "the address of e6 was not set"),
        ("scratch", "scratch memory was not set"),
    ],
)
def test_everything_is_set(run, device, leave_out, rule):
    run.prepare(leave_out)
    with pytest.raises(RuleBroken, match=rule):
        run.enqueue()
    assert len(device.broken) == 1  # known even if somebody had caught it


def test_scratch_memory_is_aligned(run):
    run.prepare()
    run.context.set_device_memory(run.aligned + 16, run.size)
    with pytest.raises(RuleBroken, match="not aligned"):
        run.enqueue()


def test_scratch_memory_is_large_enough(run):
    run.prepare()
    run.context.set_device_memory(run.aligned, run.size - 1)
    with pytest.raises(RuleBroken, match="scratch memory is too small"):
        run.enqueue()


def test_scratch_memory_is_as_large_as_was_said(run):
    run.prepare()
    run.context.set_device_memory(run.aligned, 2 * run.size + 2**20)
    with pytest.raises(RuleBroken, match=r"scratch memory needs .* smaller"):
        run.enqueue()


def test_contexts_have_no_memory_of_their_own(run):
    run.config.strategy = fake.ExecutionContextAllocationStrategy.STATIC
    run.prepare()
    with pytest.raises(RuleBroken, match="memory of its own"):
        run.enqueue()


def test_shapes_are_in_range(run):
    run.prepare()
    width = run.inputs["sinusoid"].shape[1]
    assert not run.context.set_input_shape("sinusoid", (5, width))
    assert not run.context.set_input_shape("sinusoid", (2, width + 1))
    assert not run.context.set_input_shape("e", (2, width))
    assert not run.context.set_tensor_address("logits", 0)


# -- Addresses ------------------------------------------------------------------------------------


def test_memory_lives(run):
    run.prepare()
    del run.outputs["e"]
    with pytest.raises(RuleBroken, match="e is in no live memory"):
        run.enqueue()


def test_memory_is_large_enough(run, device):
    run.outputs["e"] = device.empty((2,), torch.float32)
    run.prepare()
    with pytest.raises(RuleBroken, match=r"e needs .* its memory is smaller"):
        run.enqueue()


def test_memory_is_aligned(run, device):
    sinusoid = run.inputs["sinusoid"]
    wide = torch.cat((sinusoid, sinusoid)).flatten()
    run.inputs["sinusoid"] = wide[16 : 16 + sinusoid.numel()].view_as(sinusoid)
    run.prepare()
    with pytest.raises(RuleBroken, match="sinusoid is not aligned"):
        run.enqueue()


@pytest.mark.parametrize("pinned", [False, True])
def test_memory_is_the_devices(run, device, pinned):
    shape = tuple(run.inputs["sinusoid"].shape)
    run.inputs["sinusoid"] = device.pinned(shape, torch.float32) if pinned else torch.ones(shape)
    run.prepare()
    with pytest.raises(RuleBroken, match=r"sinusoid (lies in host memory|is in no live memory)"):
        run.enqueue()


def test_a_context_runs_once_at_a_time(run, device):
    run.prepare()
    run.enqueue()
    with FakeDevice() as other, pytest.raises(RuleBroken, match="at work on another stream"):
        run.context.execute_async_v3(other.stream_handle)


# -- Order ----------------------------------------------------------------------------------------


def test_outputs_are_read_after_synchronisation(run, device):
    run.prepare()
    run.enqueue()
    with pytest.raises(RuleBroken, match=r"the default stream uses it while the stream may"):
        run.outputs["e"].cpu()
    with pytest.raises(RuleBroken):
        run.outputs["e"].sum().item()
    device.synchronize()
    assert run.outputs["e"].cpu().isfinite().all()


def test_a_read_in_the_stream_waits_for_it(run, device):
    run.prepare()
    with device.stream():
        run.enqueue()
        assert run.outputs["e"].cpu().isfinite().all()


def test_inputs_are_not_overwritten_too_early(run, device):
    run.prepare()
    run.enqueue()
    with device.side_stream(), pytest.raises(RuleBroken, match="while the stream may"):
        run.inputs["sinusoid"].zero_()


def test_device_tensors_are_no_arrays(device):
    with pytest.raises(TypeError, match="numpy"):
        device.empty((2,), torch.float32).numpy()


def test_operands_lie_on_one_device(device):
    with pytest.raises(RuleBroken, match="operands on the device and on the host"):
        device.empty((2,), torch.float32) + torch.ones(2)


# -- Copies beside the stream, as streamed weights need them --------------------------------------


class Slot:
    """A slot on the device, what it is filled from, and the events between."""

    def __init__(self, device: FakeDevice) -> None:
        self.device = device
        self.source = device.pinned((4,), torch.float32)
        self.source.fill_(1)
        self.tensor = device.empty((4,), torch.float32)
        self.filled, self.unused = device.event(), device.event()

    def fill(self, wait: bool = True) -> None:
        with self.device.stream():
            self.unused.record()
        with self.device.side_stream():
            if wait:
                self.unused.wait()
            self.tensor.copy_(self.source, non_blocking=True)
            self.filled.record()

    def read(self, wait: bool = True) -> Tensor:
        with self.device.stream():
            if wait:
                self.filled.wait()
            return (self.tensor + 1).cpu()


def test_a_slot_between_events(device):
    slot = Slot(device)
    for value in (1, 2):
        slot.source.fill_(value)
        slot.fill()
        assert slot.read().tolist() == [value + 1] * 4
    assert device.broken == []


def test_a_slot_read_before_it_is_filled(device):
    slot = Slot(device)
    slot.fill()
    with pytest.raises(RuleBroken, match="the stream uses it while the side stream may"):
        slot.read(wait=False)


def test_a_slot_filled_while_it_is_read(device):
    slot = Slot(device)
    slot.fill()
    with device.stream():
        slot.filled.wait()
        _ = slot.tensor + 1
    with pytest.raises(RuleBroken, match="the side stream uses it while the stream may"):
        slot.fill(wait=False)


def test_a_source_overwritten_while_it_is_copied(device):
    slot = Slot(device)
    slot.fill()
    with pytest.raises(RuleBroken, match="the host uses it while the side stream may"):
        slot.source.fill_(2)


# -- Capture --------------------------------------------------------------------------------------


def test_capture_comes_after_an_ordinary_run(run, device):
    run.prepare()
    with pytest.raises(RuleBroken, match="captured before an ordinary run"):
        device.capture(run.enqueue)
    assert not device.capturing
    with device.stream():
        run.enqueue()
    device.capture(run.enqueue)


def test_a_new_shape_needs_an_ordinary_run(run, device):
    run.prepare()
    with device.stream():
        run.enqueue()
    run.context.set_input_shape("sinusoid", (1, run.inputs["sinusoid"].shape[1]))
    with pytest.raises(RuleBroken, match="captured before an ordinary run"):
        device.capture(run.enqueue)


@pytest.mark.parametrize("freed", ["sinusoid", "e", "scratch", "context"])
def test_what_was_captured_stays(run, device, freed):
    run.prepare()
    with device.stream():
        run.enqueue()
        replay = device.capture(run.enqueue)
        replay()
        if freed in ("scratch", "context"):
            delattr(run, freed)
        else:
            (run.inputs if freed in run.inputs else run.outputs).pop(freed)
        with pytest.raises(RuleBroken, match="was freed after the capture"):
            replay()


def test_shapes_of_a_capture_stay(run, device):
    run.prepare()
    with device.stream():
        run.enqueue()
        replay = device.capture(run.enqueue)
        run.context.set_input_shape("sinusoid", (1, run.inputs["sinusoid"].shape[1]))
        with pytest.raises(RuleBroken, match="got other shapes after the capture"):
            replay()


def test_tensors_of_a_capture_stay(device):
    held = {name: device.empty((3,), torch.float32) for name in "xy"}
    with device.stream():
        held["x"].fill_(1)
        replay = device.capture(lambda: held["y"].copy_(held["x"] * 2))
        replay()
        assert held["y"].tolist() == [2, 2, 2]
        held.pop("x")
        with pytest.raises(RuleBroken, match="a tensor that was freed after the capture"):
            replay()


def test_a_replay_repeats_operations_and_no_python(device):
    x = device.empty((3,), torch.float32)
    by = 1.0
    calls = []

    def work() -> None:
        calls.append(1)
        x.add_(by)

    with device.stream():
        x.zero_()
        replay = device.capture(work)
        assert x.tolist() == [0, 0, 0]  # recorded, not run
        by = 100.0
        replay()
        replay()
        assert x.tolist() == [2, 2, 2]
    assert calls == [1]


@pytest.mark.parametrize(
    "forbidden",
    [
        lambda d, x: x.cpu(),
        lambda d, x: x.sum().item(),
        lambda d, x: x.tolist(),
        lambda d, x: bool(x.all()),
        lambda d, x: x.copy_(torch.ones(3)),
        lambda d, x: torch.ones(3).to(d.torch_device),
        lambda d, x: torch.tensor([1.0], device=d.torch_device),
        lambda d, x: d.synchronize(),
        lambda d, x: d.event().record(),
        lambda d, x: d.side_stream().__enter__(),
        lambda d, x: d.capture(lambda: None),
    ],
    ids=[
        "cpu",
        "item",
        "tolist",
        "bool",
        "copy",
        "to",
        "tensor",
        "sync",
        "event",
        "side",
        "nested",
    ],
)
def test_a_capture_waits_for_nothing(device, forbidden):
    x = device.empty((3,), torch.float32)
    with pytest.raises(RuleBroken):
        device.capture(lambda: forbidden(device, x))
    assert not device.capturing


def test_the_flavours_differ_where_the_real_ones_do():
    """The other one has no targets, no runtime cache, no probes."""
    rtx, other = (fake.make_module(name) for name in ("tensorrt_rtx", "tensorrt"))
    for name in ("ComputeCapability", "EngineValidity", "IRuntimeCache"):
        assert hasattr(rtx, name)
        assert not hasattr(other, name)
    assert hasattr(rtx.BuilderFlag, "REQUIRE_USER_ALLOCATION")
    assert not hasattr(other.BuilderFlag, "REQUIRE_USER_ALLOCATION")
    assert not hasattr(other.Runtime(None), "get_engine_validity")
    assert not hasattr(other.Builder(None).create_builder_config(), "set_compute_capability")


@pytest.mark.parametrize(
    "declared, theirs",
    [
        (api.Builder, fake.Builder),
        (api.NetworkDefinition, fake.Network),
        (api.OnnxParser, fake.OnnxParser),
        (api.RTXBuilderConfig, fake.RTXBuilderConfig),
        (api.RTXRuntime, fake.RTXRuntime),
        (api.Engine, fake.Engine),
        (api.RTXRuntimeConfig, fake.RTXRuntimeConfig),
        (api.RTXRuntimeCache, fake.RuntimeCache),
        (api.RTXExecutionContext, fake.RTXContext),
    ],
)
def test_the_fake_has_all_that_we_use(declared, theirs):
    names = {name for base in declared.__mro__ for name in vars(base) if name[0] != "_"}
    names |= {name for base in declared.__mro__ for name in vars(base).get("__annotations__", {})}
    made_at_load = {"device_memory_size_v2"}
    assert names - set(dir(theirs)) - made_at_load == set()
