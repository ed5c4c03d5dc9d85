"""TensorRT that computes on the CPU: the Python API as far as `engines/` uses it, and its rules.

A "plan" is the graph with its constants. A context computes it with ONNX Runtime, in float32, on
the addresses it was given. It returns None or False where TensorRT does, and raises RuleBroken for
what TensorRT need not notice. `make_module` gives either flavour.
"""

import ctypes
import enum
import json
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from hashlib import sha256
from importlib.machinery import ModuleSpec
from math import prod
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime as ort
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import Tensor

from tests.engines.fake.device import SCRATCH, Allocation, FakeDevice
from wantrt.runtime.rewrite import rewrite_attention
from wantrt.session import TensorSpec

Enum = enum.Enum
Severity = Enum("Severity", "INTERNAL_ERROR ERROR WARNING INFO VERBOSE")
BuilderFlag = Enum("BuilderFlag", "TF32")
RTXBuilderFlag = Enum("BuilderFlag", "TF32 REQUIRE_USER_ALLOCATION")
DataType = Enum("DataType", "FLOAT HALF BF16 INT64")
ExecutionContextAllocationStrategy = Enum(
    "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
)
LayerInformationFormat = Enum("LayerInformationFormat", "ONELINE JSON")
LayerType = Enum("LayerType", "CONSTANT ATTENTION_INPUT ATTENTION_OUTPUT OTHER")
MemoryPoolType = Enum("MemoryPoolType", "WORKSPACE")
TensorIOMode = Enum("TensorIOMode", "NONE INPUT OUTPUT")
ComputeCapability = Enum("ComputeCapability", "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121")
EngineValidity = Enum("EngineValidity", "VALID SUBOPTIMAL INVALID")
DynamicShapesKernelSpecializationStrategy = Enum(
    "DynamicShapesKernelSpecializationStrategy", "LAZY EAGER NONE"
)

DATA_TYPES = {
    TensorProto.FLOAT: (DataType.FLOAT, torch.float32),
    TensorProto.FLOAT16: (DataType.HALF, torch.float16),
    TensorProto.BFLOAT16: (DataType.BF16, torch.bfloat16),
    TensorProto.INT64: (DataType.INT64, torch.int64),
}
HALVES = (TensorProto.BFLOAT16, TensorProto.FLOAT16)
MAGIC = b"fake plan\n"
SCRATCH_BYTES = 2**16
SCRATCH_ALIGNMENT = 256

Shape = tuple[int, ...]


def make_module(name: str, version: str = "") -> ModuleType:
    """A module to put in `sys.modules`: "tensorrt_rtx", or "tensorrt", which lacks some things."""
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    rtx = name == "tensorrt_rtx"
    module.__version__ = version or ("1.7.1.0" if rtx else "11.4.0.0")
    common = (BuilderFlag, DataType, ExecutionContextAllocationStrategy, LayerInformationFormat)
    common += (LayerType, MemoryPoolType, TensorIOMode, ILogger, IProgressMonitor, OnnxParser)
    for member in common:
        setattr(module, member.__name__, member)
    if rtx:
        module.ComputeCapability, module.EngineValidity = ComputeCapability, EngineValidity
        module.BuilderFlag, module.IRuntimeCache = RTXBuilderFlag, RuntimeCache
        strategies = DynamicShapesKernelSpecializationStrategy
        module.DynamicShapesKernelSpecializationStrategy = strategies
    module.Builder = lambda logger: Builder(logger, rtx)
    module.Runtime = lambda logger: (RTXRuntime if rtx else Runtime)(logger, module.__version__)
    return module


class ILogger:
    Severity = Severity

    def log(self, severity: Severity, message: str) -> None: ...


class IProgressMonitor:
    def __init__(self) -> None: ...


# -- Building -------------------------------------------------------------------------------------


class HostMemory(bytes):
    @property
    def nbytes(self) -> int:
        return len(self)


class Layer:
    def __init__(self, name: str, type: LayerType) -> None:
        self.name, self.type = name, type


class Network:
    def __init__(self) -> None:
        self.model = onnx.ModelProto()
        self.layers: list[Layer] = []

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_layer(self, index: int) -> Layer:
        return self.layers[index]


class OnnxParser:
    def __init__(self, network: Network, logger: ILogger) -> None:
        self._network, self._errors = network, list[str]()

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> "ParserError":
        return ParserError(self._errors[index])

    def load_model_proto(self, model: bytes, path: str = "") -> bool:
        self._network.model.ParseFromString(model)
        return True

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        for tensor in self._network.model.graph.initializer:
            if tensor.name == name:
                tensor.raw_data = ctypes.string_at(data, size)
                del tensor.external_data[:]
                tensor.data_location = TensorProto.DEFAULT
                return True
        return False

    def parse_model_proto(self) -> bool:
        graph = self._network.model.graph
        for tensor in graph.initializer:
            if tensor.data_location == TensorProto.EXTERNAL:
                self._errors.append(f"no data for {tensor.name}")
        for node in graph.node:
            if node.op_type == "Attention":
                self._network.layers.append(Layer(node.name, LayerType.ATTENTION_INPUT))
                self._network.layers.append(Layer(node.name, LayerType.ATTENTION_OUTPUT))
            else:
                self._network.layers.append(Layer(node.name, LayerType.OTHER))
        return not self._errors


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text


class OptimizationProfile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Shape, Shape]] = {}  # smallest and largest

    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None:
        self.shapes[input] = tuple(min), tuple(max)


class TimingCache:
    def serialize(self) -> HostMemory:
        return HostMemory(b"times")


class BuilderConfig:
    max_aux_streams = 7
    progress_monitor: Any = None

    def __init__(self) -> None:
        self.profiles: list[OptimizationProfile] = []
        self.flags: set[str] = set()

    def set_flag(self, flag: Enum) -> None:
        self.flags.add(flag.name)

    def clear_flag(self, flag: BuilderFlag) -> None: ...

    def add_optimization_profile(self, profile: OptimizationProfile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def set_memory_pool_limit(self, pool: MemoryPoolType, pool_size: int) -> None: ...

    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache:
        return TimingCache()

    def get_timing_cache(self) -> None:
        return None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        return True


class RTXBuilderConfig(BuilderConfig):
    num_compute_capabilities = 0

    def set_compute_capability(self, capability: ComputeCapability, index: int) -> bool:
        return index < self.num_compute_capabilities


class Builder:
    def __init__(self, logger: ILogger, rtx: bool) -> None:
        self._rtx = rtx

    def create_network(self, flags: int = 0) -> Network:
        return Network()

    def create_builder_config(self) -> BuilderConfig:
        return RTXBuilderConfig() if self._rtx else BuilderConfig()

    def create_optimization_profile(self) -> OptimizationProfile:
        return OptimizationProfile()

    def build_serialized_network(
        self, network: Network, config: BuilderConfig
    ) -> HostMemory | None:
        assert config.max_aux_streams == 0, "auxiliary streams are not captured"
        monitor = config.progress_monitor
        if monitor is not None:
            monitor.phase_start("build", None, 2)
            if not all(monitor.step_complete("build", step) for step in range(2)):
                return None
            monitor.phase_finish("build")
        ranges = config.profiles[0].shapes if config.profiles else {}
        allocates = self._rtx and "REQUIRE_USER_ALLOCATION" not in config.flags
        header = json.dumps({"ranges": ranges, "allocates": allocates}).encode()
        return HostMemory(MAGIC + header + b"\n" + network.model.SerializeToString())


# -- Running --------------------------------------------------------------------------------------


class Runtime:
    """`refuses` names calls that shall fail as TensorRT's do: with None or False."""

    refuses: ClassVar[set[str]] = set()

    def __init__(self, logger: ILogger, version: str) -> None:
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: bytes) -> "Engine | None":
        if "deserialize_cuda_engine" in self.refuses or not serialized_engine.startswith(MAGIC):
            self._logger.log(Severity.ERROR, "the plan was made by another version")
            return None
        return Engine(serialized_engine, self._logger, isinstance(self, RTXRuntime))


class RTXRuntime(Runtime):
    def get_engine_validity(self, blob: bytes) -> tuple[EngineValidity, int]:
        if "get_engine_validity" in self.refuses:
            return EngineValidity.INVALID, 2
        return EngineValidity.VALID, 0


class RuntimeCache:
    made = b"kernels of the fake GPU"

    def __init__(self) -> None:
        self.content = b""

    def serialize(self) -> HostMemory:
        return HostMemory(self.made)

    def deserialize(self, data: bytes) -> bool:
        self.content = data if data == self.made else b""
        return bool(self.content)


class RuntimeConfig:
    strategy = ExecutionContextAllocationStrategy.STATIC

    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy
    ) -> None:
        self.strategy = strategy


class RTXRuntimeConfig(RuntimeConfig):
    cache: RuntimeCache | None = None
    dynamic_shapes_kernel_specialization_strategy = DynamicShapesKernelSpecializationStrategy.LAZY

    def create_runtime_cache(self) -> RuntimeCache:
        return RuntimeCache()

    def set_runtime_cache(self, cache: RuntimeCache) -> bool:
        if "set_runtime_cache" in Runtime.refuses:
            return False
        self.cache = cache
        return True


class Engine:
    """A deserialised plan. `contexts` counts what was made of it."""

    deserialised = 0  # in all

    def __init__(self, plan: bytes, logger: ILogger, rtx: bool) -> None:
        Engine.deserialised += 1
        header, model = plan.removeprefix(MAGIC).split(b"\n", 1)
        self.logger, self.rtx = logger, rtx
        self.contexts = 0
        self.model = onnx.load_model_from_string(model)
        self.ranges = json.loads(header)["ranges"]
        self.allocates = json.loads(header)["allocates"]
        self.name = self.model.graph.name
        self.declared = {
            mode: {value.name: value.type.tensor_type for value in values}
            for mode, values in (
                (TensorIOMode.INPUT, self.model.graph.input),
                (TensorIOMode.OUTPUT, self.model.graph.output),
            )
        }
        # a need that differs from plan to plan, as real ones do
        self.device_memory_size_v2 = SCRATCH_BYTES + 512 * (sha256(plan).digest()[0] + 1)

    @property
    def num_io_tensors(self) -> int:
        return sum(map(len, self.declared.values()))

    def get_tensor_name(self, index: int) -> str:
        return [name for names in self.declared.values() for name in names][index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        for mode, names in self.declared.items():
            if name in names:
                return mode
        return TensorIOMode.NONE

    def get_tensor_dtype(self, name: str) -> DataType:
        return DATA_TYPES[self._type(name).elem_type][0]

    def get_tensor_shape(self, name: str) -> Shape:
        dims = self._type(name).shape.dim
        return tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)

    def spec(self, name: str) -> TensorSpec:
        declared = self._type(name)
        shape = (dim.dim_param or dim.dim_value for dim in declared.shape.dim)
        return TensorSpec(DATA_TYPES[declared.elem_type][1], tuple(shape))

    def create_engine_inspector(self) -> "EngineInspector":
        return EngineInspector()

    def create_runtime_config(self) -> RuntimeConfig | None:
        if "create_runtime_config" in Runtime.refuses:
            return None
        return RTXRuntimeConfig() if self.rtx else RuntimeConfig()

    def create_execution_context(self, runtime_config: RuntimeConfig) -> "Context | None":
        if "create_execution_context" in Runtime.refuses:
            self.logger.log(Severity.ERROR, "out of memory")
            return None
        self.contexts += 1
        return (RTXContext if self.rtx else Context)(self, runtime_config)

    def _type(self, name: str) -> Any:
        return self.declared[self.get_tensor_mode(name)][name]

    @cached_property
    def session(self) -> ort.InferenceSession:
        """The plan in float32, as ONNX Runtime computes it."""
        model = rewrite_attention(self.model)
        in_float32(model)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        return ort.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )


class EngineInspector:
    def get_engine_information(self, format: LayerInformationFormat) -> str:
        return "{}"


class Context:
    """Checks what TensorRT documents, and computes."""

    def __init__(self, engine: Engine, config: RuntimeConfig) -> None:
        self._engine, self._config = engine, config
        self._shapes: dict[str, Shape] = {}
        self._addresses: dict[str, int] = {}
        self._memory: tuple[int, int] | None = None
        self._profile: int | None = None
        self._ran_with: dict[str, Shape] | None = None  # shapes of the last ordinary run
        self._converted: dict[tuple[str, int], tuple[Allocation, int, Any]] = {}
        self._last_use: tuple[FakeDevice, int] | None = None

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        if "set_optimization_profile_async" in Runtime.refuses or profile_index != 0:
            return self._refuse("no such profile")
        self._profile = profile_index
        return True

    def set_input_shape(self, name: str, shape: Shape) -> bool:
        if "set_input_shape" in Runtime.refuses or not self._allows(name, tuple(shape)):
            return self._refuse(f"{name} cannot have shape {tuple(shape)}")
        self._shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, memory: int) -> bool:
        known = self._engine.get_tensor_mode(name) != TensorIOMode.NONE
        if "set_tensor_address" in Runtime.refuses or not known:
            return self._refuse(f"no tensor {name}")
        self._addresses[name] = memory
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        self._memory = memory, size

    def execute_async_v3(self, stream_handle: int) -> bool:
        if "execute_async_v3" in Runtime.refuses:
            return self._refuse("enqueueV3 failed")
        device = FakeDevice.by_stream.get(stream_handle)
        assert device is not None, f"{stream_handle} is the stream of no device"
        self._check(device)
        if device.capturing:
            if self._ran_with != self._shapes:
                device.breaks(f"{self._engine.name}: captured before an ordinary run")
        else:
            self._ran_with = dict(self._shapes)
        shapes, addresses, scratch = self._all_shapes(), dict(self._addresses), self._memory
        reads, writes = (
            {
                name: (addresses[name], prod(shapes[name]) * self._engine.spec(name).dtype.itemsize)
                for name in self._engine.declared[mode]
            }
            for mode in (TensorIOMode.INPUT, TensorIOMode.OUTPUT)
        )
        reference, name, only_inputs = weakref.ref(self), self._engine.name, dict(self._shapes)

        def compute(memory: Mapping[str, Allocation]) -> None:
            context = reference()
            if context is None:
                device.breaks(f"{name}: its context was freed after the capture")
            if context._shapes != only_inputs:
                device.breaks(f"{name}: its context got other shapes after the capture")
            context._compute(shapes, addresses, scratch, memory)

        device.launch(name, reads, {**writes, SCRATCH: scratch}, compute)
        self._last_use = device, device.ticks
        return True

    def _check(self, device: FakeDevice) -> None:
        engine = self._engine
        if self._last_use is not None and self._last_use[0] is not device:
            other, tick = self._last_use
            if other.ticks_done < tick:
                device.breaks(f"{engine.name}: its context is at work on another stream")
        if self._config.strategy != ExecutionContextAllocationStrategy.USER_MANAGED:
            device.breaks(f"{engine.name}: its context has memory of its own")
        if self._profile is None:
            device.breaks(f"{engine.name}: no optimisation profile was chosen")
        for name in engine.declared[TensorIOMode.INPUT]:
            if name not in self._shapes:
                device.breaks(f"{engine.name}: the shape of {name} was not set")
        for names in engine.declared.values():
            for name in names:
                if name not in self._addresses:
                    device.breaks(f"{engine.name}: the address of {name} was not set")
        if self._memory is None:
            device.breaks(f"{engine.name}: scratch memory was not set")
        address, size = self._memory
        if address % SCRATCH_ALIGNMENT:
            device.breaks(f"{engine.name}: scratch memory is not aligned to 256 bytes")
        if size < engine.device_memory_size_v2:
            device.breaks(f"{engine.name}: scratch memory is too small")

    def _compute(
        self,
        shapes: Mapping[str, Shape],
        addresses: Mapping[str, int],
        scratch: tuple[int, int],
        memory: Mapping[str, Allocation],
    ) -> None:
        engine = self._engine
        ctypes.memset(scratch[0], 0xFF, scratch[1])  # whoever keeps something there has lost it
        feeds = {
            name: self._in_float32(name, addresses[name], shapes[name], memory[name])
            for name in engine.declared[TensorIOMode.INPUT]
        }
        names = list(engine.declared[TensorIOMode.OUTPUT])
        for name, result in zip(names, engine.session.run(names, feeds), strict=True):
            into = _at(addresses[name], shapes[name], engine.spec(name).dtype)
            into.copy_(torch.from_numpy(result))

    def _in_float32(
        self, name: str, address: int, shape: Shape, memory: Allocation
    ) -> NDArray[np.generic]:
        """What lies at an address. Weights are turned into float32 once: nobody writes them."""
        value = _at(address, shape, self._engine.spec(name).dtype)
        if value.dtype in (torch.float32, torch.int64):
            return value.numpy()
        known, version, converted = self._converted.get((name, address), (None, 0, None))
        if known is not memory or version != memory.version:
            converted = value.float().numpy()
            self._converted[name, address] = (memory, memory.version, converted)
        return converted

    def _allows(self, name: str, shape: Shape) -> bool:
        engine = self._engine
        if engine.get_tensor_mode(name) != TensorIOMode.INPUT:
            return False
        declared = engine.get_tensor_shape(name)
        low, high = engine.ranges.get(name, (declared, declared))
        return len(shape) == len(low) and all(
            a <= size <= b for a, size, b in zip(low, shape, high, strict=True)
        )

    def _all_shapes(self) -> dict[str, Shape]:
        """Of inputs, and of the outputs that follow from them."""
        engine = self._engine
        symbols: dict[str, int] = {}
        for name, shape in self._shapes.items():
            symbols |= engine.spec(name).symbols(shape)
        outputs = engine.declared[TensorIOMode.OUTPUT]
        return self._shapes | {name: engine.spec(name).concrete(symbols) for name in outputs}

    def _refuse(self, message: str) -> bool:
        self._engine.logger.log(Severity.ERROR, message)
        return False


class RTXContext(Context):
    def is_stream_capturable(self, stream: int) -> bool:
        return "is_stream_capturable" not in Runtime.refuses and not self._engine.allocates


def _at(address: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """The tensor that lies at an address."""
    count = prod(shape)
    content = (ctypes.c_byte * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(content, dtype=dtype, count=count).view(tuple(shape))


def in_float32(model: onnx.ModelProto) -> None:
    """Turn a bf16 or fp16 graph into one of float32: what ONNX Runtime computes on a CPU."""
    graph = model.graph
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.type.tensor_type.elem_type in HALVES:
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type in HALVES:
            tensor.CopyFrom(_tensor_in_float32(tensor))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name in ("to", "dtype", "softmax_precision", "stash_type"):
                attribute.i = TensorProto.FLOAT if attribute.i in HALVES else attribute.i
            elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in HALVES:
                attribute.t.CopyFrom(_tensor_in_float32(attribute.t))
        kept = [a for a in node.attribute if a.name != "TRT_decomposable"]
        del node.attribute[:]
        node.attribute.extend(kept)


def _tensor_in_float32(tensor: TensorProto) -> TensorProto:
    return numpy_helper.from_array(numpy_helper.to_array(tensor).astype("float32"), tensor.name)
