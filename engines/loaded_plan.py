"""A plan at work: its engine, its execution contexts, and what was last set in those.

Engines are deserialised once a process and shared while something holds them. Scratch memory is the
device's: a plan tells its need when it is loaded, and computes in the common block.
"""

import hashlib
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn
from weakref import WeakValueDictionary, finalize

import torch

from wantrt.device import Device
from wantrt.engines import api
from wantrt.engines.flavours import Flavour
from wantrt.engines.runtime_cache import RuntimeCacheFile
from wantrt.errors import BundleError, ExecutionError
from wantrt.linked import refuse_other_names
from wantrt.manifest import PlanRecord
from wantrt.models.components import Component
from wantrt.session import TensorSpec

refuse_other_names(__spec__)

Region = tuple[tuple[int, ...], int]  # shape and address of a contiguous tensor
Shapes = tuple[tuple[int, ...], ...]  # of the inputs that are not static


@dataclass(frozen=True, eq=False)
class PlanSource:
    """A plan that is not loaded yet, and where it shall run."""

    component: Component
    record: PlanRecord
    path: Path
    flavour: Flavour
    device: Device

    @property
    def bound(self) -> bool:
        """Whether weights are inputs."""
        return self.record.part is None

    def error(self, kind: type[Exception], happened: str, remedy: str) -> Exception:
        """An exception that names component, plan, cause (what TensorRT logged) and remedy."""
        logged = self.flavour.last_errors().replace("\n", "; ")
        cause = f" TensorRT says: {logged}." if logged else ""
        return kind(
            f"{self.component.name}: {happened} (plan {self.path}, made by {self.record.runtime} "
            f"{self.record.version} for {', '.join(self.record.targets)}; this is "
            f"{self.flavour.name} {self.flavour.version} on {self.device.name}).{cause} {remedy}"
        )

    @property
    def build_command(self) -> str:
        """What makes a plan for this machine; a GPU that RTX does not serve needs the other."""
        if self.device.architecture in self.flavour.served_targets:
            return f"wantrt build --runtime {self.flavour.name} --target {self.device.architecture}"
        return "wantrt build --runtime tensorrt"


def load_plan(source: PlanSource) -> "LoadedPlan":
    """The plan of `source`, from the process's own if it is there. Raises BundleError."""
    try:
        status = source.path.stat()
    except OSError as error:
        raise BundleError(f"cannot read {source.path}: {error}. Run wantrt build again.") from error
    file = (source.path.resolve(), status.st_mtime_ns, status.st_size)
    with _LOADING, source.device.stream():
        plan = _PLANS.get((file, id(source.device)))
        if plan is None:
            engine = _ENGINES.get((file, source.device.torch_device))
            if engine is None:
                engine = _ENGINES[file, source.device.torch_device] = _deserialise(source)
            plan = _PLANS[file, id(source.device)] = LoadedPlan(source, engine)
    return plan


@dataclass(frozen=True, eq=False)
class LoadedEngine:
    """A deserialised plan, with the weights that are baked into it."""

    engine: api.Engine
    sha256: str  # of the plan


class LoadedPlan:
    """Engine and contexts of a plan: one context for all runs, until one is captured.

    TensorRT forbids other shapes to a context from which something was captured. So such a context
    keeps its shapes, and runs at others get another one.
    """

    def __init__(self, source: PlanSource, loaded: LoadedEngine) -> None:
        self.source = source
        self._loaded = loaded
        engine = loaded.engine
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        reads = [source.flavour.is_input(engine.get_tensor_mode(name)) for name in names]
        self._inputs = [name for name, read in zip(names, reads, strict=True) if read]
        self._outputs = [name for name, read in zip(names, reads, strict=True) if not read]
        _check_signature(source, engine, self._inputs, self._outputs)
        self._dynamic = [n for n in self._inputs if -1 in tuple(engine.get_tensor_shape(n))]
        self._scratch_bytes = engine.device_memory_size_v2
        source.device.scratch.reserve(self._scratch_bytes)
        self._contexts = [Context(source, loaded)]

    def enqueue(self, inputs: Mapping[str, Region], outputs: Mapping[str, Region]) -> None:
        """Run once on the device's stream. Both maps may hold more than the plan takes.

        Raises ExecutionError.
        """
        for name in self._inputs:
            if name not in inputs:
                happened = f"weight {name} is bound to nothing on the device"
                raise self.source.error(ExecutionError, happened, "Bind it first.")
        context = self._context_for(tuple(inputs[name][0] for name in self._dynamic))
        for name in self._inputs:
            context.set_shape(name, inputs[name][0])
            context.set_address(name, inputs[name][1])
        for name in self._outputs:
            context.set_address(name, outputs[name][1])
        arena = self.source.device.scratch  # a new one after each phase of --residency phase
        arena.reserve(self._scratch_bytes)
        context.set_scratch(arena.block())
        context.enqueue()

    def _context_for(self, shapes: Shapes) -> "Context":
        for context in self._contexts:
            if context.captured in (None, shapes):
                break
        else:
            context = Context(self.source, self._loaded)
            self._contexts.append(context)
        context.shapes = shapes
        return context


class Context:
    """An execution context. Sets what changed since the last run: addresses mostly."""

    def __init__(self, source: PlanSource, loaded: LoadedEngine) -> None:
        self.source = source
        self.shapes: Shapes = ()  # of the next run
        self.captured: Shapes | None = None  # what a captured run had
        self._context, kernels = _make_context(source, loaded)
        self._ran = False  # with the shapes that are set
        self._capturable = True
        self._set_shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._scratch: tuple[int, int] | None = None
        self._kernels = kernels  # outlives the context, which compiles for new shapes
        if kernels is not None:
            kernels.save()
            finalize(self, kernels.save)

    def set_shape(self, name: str, shape: tuple[int, ...]) -> None:
        if self._set_shapes.get(name) == shape:
            return
        if not self._context.set_input_shape(name, shape):
            self._fail(f"input {name} cannot have shape {list(shape)}", _REPORT)
        self._set_shapes[name] = shape
        self._ran = False

    def set_address(self, name: str, address: int) -> None:
        if self._addresses.get(name) == address:
            return
        if not self._context.set_tensor_address(name, address):
            self._fail(f"the address of {name} was refused", _REPORT)
        self._addresses[name] = address

    def set_scratch(self, scratch: tuple[int, int]) -> None:
        if scratch != self._scratch:
            self._context.set_device_memory(*scratch)
            self._scratch = scratch

    def enqueue(self) -> None:
        stream = self.source.device.stream_handle
        capturing = self.source.device.capturing
        if capturing and not self._ran:
            self._fail("the plan has not run at these shapes yet", _UNCAPTURED)
        if capturing and not self._capturable:
            self._fail("the plan cannot be captured", _UNCAPTURED)
        if not self._context.execute_async_v3(stream):
            self._fail("the run could not be enqueued", _REPORT)
        if capturing:
            self.captured = self.shapes
            return
        self._ran = True
        rtx_context = self.source.flavour.rtx_context(self._context)
        if rtx_context is not None:  # asked now: during a capture it is too late
            self._capturable = rtx_context.is_stream_capturable(stream)

    def _fail(self, happened: str, remedy: str) -> NoReturn:
        raise self.source.error(ExecutionError, happened, remedy)


File = tuple[Path, int, int]  # path, time of change, bytes
_LOADING = threading.Lock()
_ENGINES: "WeakValueDictionary[tuple[File, torch.device], LoadedEngine]" = WeakValueDictionary()
# A context computes in its device's scratch memory, on its stream: one for each `Device`. A plan
# holds its device, so that an id in a key stands for the same one as long as the plan lives.
_PLANS: "WeakValueDictionary[tuple[File, int], LoadedPlan]" = WeakValueDictionary()

_REPORT = "Is the bundle sound? wantrt verify --bundle BUNDLE"
_UNCAPTURED = "It runs uncaptured all the same."


def _deserialise(source: PlanSource) -> LoadedEngine:
    content = source.path.read_bytes()
    source.flavour.last_errors()  # what was logged before is about something else
    runtime = source.flavour.runtime()
    remedy = f"Build it for this machine: {source.build_command}"
    if source.flavour.is_invalid(runtime, content):
        raise source.error(BundleError, "the plan does not run on this GPU", remedy)
    engine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise source.error(BundleError, "the plan cannot be loaded", remedy)
    return LoadedEngine(engine, hashlib.sha256(content).hexdigest())


def _make_context(
    source: PlanSource, loaded: LoadedEngine
) -> tuple[api.ExecutionContext, RuntimeCacheFile | None]:
    """A context without memory of its own, with kernels from the runtime cache where there is one.

    TensorRT-RTX compiles kernels for the GPU at hand: here, and for a dynamic plan at the first run
    of new shapes. It takes seconds, unless they are cached.
    """
    config = loaded.engine.create_runtime_config()
    if config is None:
        raise source.error(ExecutionError, "no runtime configuration could be made", _MEMORY)
    strategies = source.flavour.module.ExecutionContextAllocationStrategy
    config.set_execution_context_allocation_strategy(strategies.USER_MANAGED)
    source.flavour.compile_at_once(config)
    kernels = RuntimeCacheFile.attach(source.flavour, config, source.device, loaded.sha256)
    context = loaded.engine.create_execution_context(config)
    if context is None:
        raise source.error(ExecutionError, "no execution context could be made", _MEMORY)
    if not context.set_optimization_profile_async(0, source.device.stream_handle):
        raise source.error(ExecutionError, "its optimisation profile was refused", _REPORT)
    return context, kernels


_MEMORY = "Is the GPU's memory full? --residency phase or stream needs less."


def _check_signature(
    source: PlanSource, engine: api.Engine, inputs: list[str], outputs: list[str]
) -> None:
    """TensorRT takes addresses without types: a plan of other tensors would compute nonsense."""
    component = source.component
    takes: dict[str, TensorSpec] = dict(component.inputs)
    if source.bound:
        takes |= component.weights
    largest = {symbol: size for symbol, (_, _, size) in source.record.symbols.items()}
    for names, specs in ((inputs, takes), (outputs, component.outputs)):
        for name in names:
            dtype = source.flavour.torch_dtype(engine.get_tensor_dtype(name))
            shape = tuple(engine.get_tensor_shape(name))
            if name not in specs or not _fits(dtype, shape, specs[name], largest):
                expected = specs.get(name, "none of this name")
                raise source.error(
                    BundleError,
                    f"the plan has {name}, {dtype} {shape}, expected {expected}",
                    f"Build it again: {source.build_command}",
                )


def _fits(
    dtype: torch.dtype, shape: tuple[int, ...], spec: TensorSpec, largest: Mapping[str, int]
) -> bool:
    """Whether dtype and shape are those of `spec`; a dimension of -1 is any."""
    return (
        dtype == spec.dtype
        and len(shape) == len(spec.shape)
        and all(a in (-1, b) for a, b in zip(shape, spec.concrete(largest), strict=True))
    )
