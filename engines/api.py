"""The part of TensorRT's Python API that wantrt uses, in types.

Both flavours ship without type information. Our code speaks to them only through these protocols:
mypy refuses what is not declared here, and `tests/engines/test_api_surface.py` looks up every
member declared here in the real bindings of both flavours. What only one of them has stands in a
class whose name begins with `RTX` or, for the data-centre flavour, `Full`; `engines/flavours.py`
alone asks for it, by probing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Protocol, SupportsInt

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

Shape = Sequence[int]


# -- Enumerations, with the members that we name --------------------------------------------------


class Enum(Protocol):
    """A member of any enumeration."""

    @property
    def name(self) -> str: ...


class BuilderFlag(Protocol):
    @property
    def TF32(self) -> Enum: ...


class DataType(Protocol):
    @property
    def FLOAT(self) -> Enum: ...
    @property
    def HALF(self) -> Enum: ...
    @property
    def BF16(self) -> Enum: ...
    @property
    def INT64(self) -> Enum: ...


class ExecutionContextAllocationStrategy(Protocol):
    @property
    def USER_MANAGED(self) -> Enum: ...


class LayerInformationFormat(Protocol):
    @property
    def JSON(self) -> Enum: ...


class LayerType(Protocol):
    @property
    def ATTENTION_OUTPUT(self) -> Enum: ...


class MemoryPoolType(Protocol):
    @property
    def WORKSPACE(self) -> Enum: ...


class NetworkDefinitionCreationFlag(Protocol):
    """The one member that we name is not in both flavours."""


class Severity(Protocol):
    """ILogger.Severity"""

    @property
    def INTERNAL_ERROR(self) -> Enum: ...
    @property
    def ERROR(self) -> Enum: ...
    @property
    def WARNING(self) -> Enum: ...


class TensorIOMode(Protocol):
    @property
    def INPUT(self) -> Enum: ...


class RTXComputeCapability(Protocol):
    """The targets: SM75, SM80, …, besides CURRENT and NONE."""

    @property
    def __members__(self) -> Mapping[str, Enum]: ...


class RTXBuilderFlag(BuilderFlag, Protocol):
    @property
    def REQUIRE_USER_ALLOCATION(self) -> Enum: ...


class FullNetworkDefinitionCreationFlag(NetworkDefinitionCreationFlag, Protocol):
    @property
    def PREFER_AOT_PYTHON_PLUGINS(self) -> SupportsInt: ...


class RTXDynamicShapesKernelSpecializationStrategy(Protocol):
    @property
    def EAGER(self) -> Enum: ...


class RTXEngineValidity(Protocol):
    @property
    def INVALID(self) -> Enum: ...


class Logger(Protocol):
    """ILogger: TensorRT calls it."""

    def log(self, severity: Enum, msg: str) -> None: ...


# -- Building -------------------------------------------------------------------------------------


class HostMemory(Protocol):
    """IHostMemory: a plan in memory. Bytes through the buffer protocol: `memoryview(plan)`."""

    @property
    def nbytes(self) -> int: ...

    def __buffer__(self, flags: int, /) -> memoryview: ...


class Layer(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def type(self) -> Enum: ...


class NetworkDefinition(Protocol):
    @property
    def num_layers(self) -> int: ...
    def get_layer(self, index: int) -> Layer: ...


class OnnxParser(Protocol):
    def load_model_proto(self, model: bytes, path: str = "") -> bool: ...
    def load_initializer(self, name: str, data: int, size: int) -> bool: ...
    def parse_model_proto(self) -> bool: ...


class OptimizationProfile(Protocol):
    def set_shape(self, input: str, min: Shape, opt: Shape, max: Shape) -> None: ...


class TimingCache(Protocol):
    def serialize(self) -> HostMemory: ...


class ProgressMonitor(Protocol):
    """IProgressMonitor: TensorRT calls it. Phases lie in one another; no call may raise.

    `step_complete` answers whether the build shall go on.
    """

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...
    def step_complete(self, phase_name: str, step: int) -> bool: ...
    def phase_finish(self, phase_name: str) -> None: ...


class BuilderConfig(Protocol):
    max_aux_streams: int
    progress_monitor: ProgressMonitor

    def set_flag(self, flag: Enum) -> None: ...
    def clear_flag(self, flag: Enum) -> None: ...
    def add_optimization_profile(self, profile: OptimizationProfile) -> int: ...
    def set_memory_pool_limit(self, pool: Enum, pool_size: int) -> None: ...
    def create_timing_cache(self, serialized_timing_cache: bytes) -> TimingCache | None: ...
    def get_timing_cache(self) -> TimingCache | None: ...
    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool: ...


class RTXBuilderConfig(BuilderConfig, Protocol):
    num_compute_capabilities: int

    def set_compute_capability(self, capability: Enum, index: int) -> bool: ...


class Builder(Protocol):
    def create_network(self, flags: int = 0) -> NetworkDefinition: ...
    def create_builder_config(self) -> BuilderConfig: ...
    def create_optimization_profile(self) -> OptimizationProfile: ...
    def build_serialized_network(
        self, network: NetworkDefinition, config: BuilderConfig
    ) -> HostMemory | None: ...


# -- Plugins: `tensorrt.plugin`, whose classes we also name in signatures --------------------------


class FullShapeExpr(Protocol):
    """A size: a number, or an expression in sizes that are known when the plan runs."""

    @property
    def is_fake(self) -> bool: ...
    @property
    def is_constant(self) -> bool: ...
    def constant_value(self) -> int: ...


class FullShapeExprs(Protocol):
    def __iter__(self) -> Iterator[FullShapeExpr]: ...


class FullTensorDesc(Protocol):
    @property
    def dtype(self) -> Enum: ...
    @property
    def shape_expr(self) -> FullShapeExprs: ...


class FullSymInt32(Protocol):
    """An argument of a kernel."""


class FullSymIntExprs(Protocol):
    def __setitem__(self, index: int, value: FullSymInt32) -> None: ...


class FullPluginModule(Protocol):
    """`tensorrt.plugin`. The three that take a plugin's name decorate its functions."""

    TensorDesc: type
    KernelLaunchParams: type
    SymIntExprs: type
    SymInt32: type
    AutoTuneCombination: type

    def register(self, plugin_id: str) -> Callable[[object], object]: ...
    def autotune(self, plugin_id: str) -> Callable[[object], object]: ...
    def aot_impl(self, plugin_id: str) -> Callable[[object], object]: ...
    def from_shape_expr(
        self, shape_expr: tuple[FullShapeExpr | int, ...], dtype: Enum
    ) -> FullTensorDesc: ...


# -- Running --------------------------------------------------------------------------------------


class RTXRuntimeCache(Protocol):
    """IRuntimeCache: kernels compiled for this GPU when a context was made."""

    def serialize(self) -> HostMemory | None: ...
    def deserialize(self, data: bytes) -> bool: ...


class RuntimeConfig(Protocol):
    def set_execution_context_allocation_strategy(self, strategy: Enum) -> None: ...


class RTXRuntimeConfig(RuntimeConfig, Protocol):
    dynamic_shapes_kernel_specialization_strategy: Enum

    def create_runtime_cache(self) -> RTXRuntimeCache | None: ...
    def set_runtime_cache(self, cache: RTXRuntimeCache) -> bool: ...


class ExecutionContext(Protocol):
    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool: ...
    def set_input_shape(self, name: str, shape: Shape) -> bool: ...
    def set_tensor_address(self, name: str, memory: int) -> bool: ...
    def set_device_memory(self, memory: int, size: int) -> None: ...
    def execute_async_v3(self, stream_handle: int) -> bool: ...


class RTXExecutionContext(ExecutionContext, Protocol):
    def is_stream_capturable(self, stream: int) -> bool: ...


class EngineInspector(Protocol):
    def get_engine_information(self, format: Enum) -> str: ...


class Engine(Protocol):
    """ICudaEngine."""

    @property
    def num_io_tensors(self) -> int: ...
    @property
    def device_memory_size_v2(self) -> int: ...
    def get_tensor_name(self, index: int) -> str: ...
    def get_tensor_mode(self, name: str) -> Enum: ...
    def get_tensor_dtype(self, name: str) -> Enum: ...
    def get_tensor_shape(self, name: str) -> Shape: ...
    def create_engine_inspector(self) -> EngineInspector: ...
    def create_runtime_config(self) -> RuntimeConfig | None: ...
    def create_execution_context(
        self, runtime_config: RuntimeConfig
    ) -> ExecutionContext | None: ...


class Runtime(Protocol):
    def deserialize_cuda_engine(self, serialized_engine: bytes | HostMemory) -> Engine | None: ...


class RTXRuntime(Runtime, Protocol):
    def get_engine_validity(self, blob: bytes) -> tuple[Enum, int]: ...
