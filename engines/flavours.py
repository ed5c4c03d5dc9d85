"""The two flavours of TensorRT, and everything in which they differ.

`tensorrt` compiles on the GPU that will run the plan; `tensorrt-rtx` compiles for GeForce and RTX
GPUs anywhere, and once more, in seconds, on the GPU itself. A `Flavour` answers for either. What
only one of them can do is found by looking whether the library has it: here, and nowhere else. This
is also the only file that imports them.
"""

import logging
from collections import deque
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Protocol, cast

import torch

from wantrt.engines import api
from wantrt.errors import (
    BuildError,
    RuntimeUnavailableError,
    SettingsError,
    UnsupportedTaskError,
)
from wantrt.linked import refuse_other_names
from wantrt.names import check_name

refuse_other_names(__spec__)

log = logging.getLogger("wantrt.tensorrt")

LIBRARIES = {  # flavour -> module, oldest major version that we speak to, the GPUs it is for
    "tensorrt": ("tensorrt", 11, "data-centre GPUs"),
    "tensorrt-rtx": ("tensorrt_rtx", 1, "GeForce and RTX GPUs"),
}
ELSEWHERE = (  # what a machine can do that lacks what the flavour needs
    "Compile ahead of time for GeForce and RTX GPUs: wantrt build --runtime tensorrt-rtx\n"
    "Or run on the CPU: --runtime onnxruntime"
)
DATA_CENTRE = ("sm90", "sm100", "sm103")
NO_BFLOAT16 = ("sm75",)
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")  # with no GPU to compile for; all have bf16
HARMLESS = ("has Int64 binding", "Unused Input", "RemoveDeadLayers")  # said of every graph of ours
ERRORS_KEPT = 4


def why_missing(name: str) -> str | None:
    """What keeps the flavour's library from being imported here, in a line; quick."""
    module, _, gpus = LIBRARIES[name]
    if find_spec(module) is None:
        return f"{module} is not installed; for {gpus}: pip install 'wantrt[{name}]'"
    return None


@cache
def find_flavour(name: str) -> "Flavour":
    """The flavour, imported once a process. name: "tensorrt" or "tensorrt-rtx".

    Raises SettingsError for another name, RuntimeUnavailableError if it cannot build here.
    """
    check_name("TensorRT flavour", name, LIBRARIES)
    if missing := why_missing(name):
        raise RuntimeUnavailableError(f"{missing}\n{ELSEWHERE}")
    module_name, oldest, gpus = LIBRARIES[name]
    try:
        module = cast(Module, import_module(module_name))
    except (ImportError, OSError) as error:
        raise RuntimeUnavailableError(
            f"{module_name} does not load: {error}\n"
            f"Install it anew, for {gpus}: pip install --force-reinstall 'wantrt[{name}]'"
        ) from error
    if int(module.__version__.split(".")[0]) < oldest:
        raise RuntimeUnavailableError(
            f"{module_name} {module.__version__} is too old: wantrt needs {oldest} or later. "
            f"For {gpus}: pip install --upgrade 'wantrt[{name}]'"
        )
    flavour = Flavour(name, module)
    if not flavour.builds_without_gpu and not torch.cuda.is_available():
        raise RuntimeUnavailableError(
            f"{name} compiles on the GPU that runs the plan, and torch finds none here.\n"
            f"{ELSEWHERE}"
        )
    return flavour


class Module(Protocol):
    """What we use of the Python module itself. `RTX`: see engines/api.py."""

    __name__: str
    __version__: str
    ILogger: type
    IProgressMonitor: type

    def Builder(self, logger: api.Logger) -> api.Builder: ...
    def OnnxParser(self, network: api.NetworkDefinition, logger: api.Logger) -> api.OnnxParser: ...
    def Runtime(self, logger: api.Logger) -> api.Runtime: ...

    @property
    def BuilderFlag(self) -> api.BuilderFlag: ...
    @property
    def DataType(self) -> api.DataType: ...
    @property
    def ExecutionContextAllocationStrategy(self) -> api.ExecutionContextAllocationStrategy: ...
    @property
    def LayerInformationFormat(self) -> api.LayerInformationFormat: ...
    @property
    def LayerType(self) -> api.LayerType: ...
    @property
    def MemoryPoolType(self) -> api.MemoryPoolType: ...
    @property
    def NetworkDefinitionCreationFlag(self) -> api.NetworkDefinitionCreationFlag: ...
    @property
    def TensorIOMode(self) -> api.TensorIOMode: ...


class RTXModule(Module, Protocol):
    @property
    def ComputeCapability(self) -> api.RTXComputeCapability: ...
    @property
    def DynamicShapesKernelSpecializationStrategy(
        self,
    ) -> api.RTXDynamicShapesKernelSpecializationStrategy: ...
    @property
    def EngineValidity(self) -> api.RTXEngineValidity: ...


class Flavour:
    """One of the two libraries, typed, and what it can do.

    builds_without_gpu: it compiles for `served_targets` on any machine; the other only for the GPU
    of this one. has_timing_cache: it tries kernels while it builds, and remembers the times.
    takes_plugins: it takes kernels of ours into a plan.
    """

    def __init__(self, name: str, module: Module) -> None:
        self.name = name
        self.version = module.__version__
        self.module = module
        self._rtx = cast(RTXModule, module) if hasattr(module, "ComputeCapability") else None
        self._logger, self._errors = _make_logger(module.ILogger)
        self.builds_without_gpu = self._rtx is not None
        # Where kernels are compiled when a context is made, nothing is timed at build.
        self.has_timing_cache = not hasattr(module, "IRuntimeCache")
        self.takes_plugins = hasattr(module, "QuickPluginCreationRequest")
        types = module.DataType
        self._dtypes = {
            types.FLOAT: torch.float32,
            types.HALF: torch.float16,
            types.BF16: torch.bfloat16,
            types.INT64: torch.int64,
        }

    # -- Making its objects --

    def builder(self) -> api.Builder:
        return self.module.Builder(self._logger)

    def parser(self, network: api.NetworkDefinition) -> api.OnnxParser:
        return self.module.OnnxParser(network, self._logger)

    def runtime(self) -> api.Runtime:
        return self.module.Runtime(self._logger)

    def progress_monitor(self, listener: api.ProgressMonitor) -> api.ProgressMonitor:
        """An IProgressMonitor that passes every call on to `listener`."""
        methods = {
            "phase_start": lambda _, *call: listener.phase_start(*call),
            "step_complete": lambda _, *call: listener.step_complete(*call),
            "phase_finish": lambda _, *call: listener.phase_finish(*call),
        }
        return cast(
            api.ProgressMonitor, type("Monitor", (self.module.IProgressMonitor,), methods)()
        )

    # -- What only one of them has: the same object under its richer type, None where it lacks it --

    def rtx_config(self, config: api.BuilderConfig) -> api.RTXBuilderConfig | None:
        """Takes compute capabilities."""
        has = hasattr(config, "set_compute_capability")
        return cast(api.RTXBuilderConfig, config) if has else None

    def rtx_runtime_config(self, config: api.RuntimeConfig) -> api.RTXRuntimeConfig | None:
        """Keeps the kernels compiled on this GPU in a runtime cache."""
        has = hasattr(config, "create_runtime_cache")
        return cast(api.RTXRuntimeConfig, config) if has else None

    def forbid_allocation(self, config: api.BuilderConfig) -> None:
        """Let the plan compute in the memory that it is given, and in no other.

        For large tensors TensorRT-RTX would else allocate while it runs: then the plan cannot be
        captured, and what it needs is known to nobody beforehand.
        """
        flags = self.module.BuilderFlag
        if hasattr(flags, "REQUIRE_USER_ALLOCATION"):
            config.set_flag(cast(api.RTXBuilderFlag, flags).REQUIRE_USER_ALLOCATION)

    def compile_at_once(self, config: api.RuntimeConfig) -> None:
        """Have kernels for new shapes before a run with these shapes, where they are compiled then.

        Otherwise runs take general kernels until others have been compiled in the background: the
        same prompt would not always give the same bits, and a graph keep the slow ones.
        """
        rtx_config = self.rtx_runtime_config(config)
        if self._rtx is not None and rtx_config is not None:
            strategies = self._rtx.DynamicShapesKernelSpecializationStrategy
            rtx_config.dynamic_shapes_kernel_specialization_strategy = strategies.EAGER

    def rtx_context(self, context: api.ExecutionContext) -> api.RTXExecutionContext | None:
        """Says whether it can be captured."""
        has = hasattr(context, "is_stream_capturable")
        return cast(api.RTXExecutionContext, context) if has else None

    def is_invalid(self, runtime: api.Runtime, plan: bytes) -> bool:
        """Whether TensorRT knows beforehand that the plan does not run on this GPU."""
        if self._rtx is None or not hasattr(runtime, "get_engine_validity"):
            return False
        validity, _ = cast(api.RTXRuntime, runtime).get_engine_validity(plan)
        return validity == self._rtx.EngineValidity.INVALID

    def plugin_module(self) -> api.FullPluginModule:
        """`tensorrt.plugin`. Raises SettingsError where it has none."""
        if not self.takes_plugins:
            raise SettingsError(f"{self.name} takes no plugins: build without them")
        return cast(api.FullPluginModule, import_module(f"{self.module.__name__}.plugin"))

    def network_flags(self, plugins: bool) -> int:
        """How a network is made: strongly typed, there is no other kind."""
        if not plugins:
            return 0
        flags = self.module.NetworkDefinitionCreationFlag
        preferred = cast(api.FullNetworkDefinitionCreationFlag, flags).PREFER_AOT_PYTHON_PLUGINS
        return 1 << int(preferred)

    # -- Types and modes --

    def torch_dtype(self, dtype: api.Enum) -> torch.dtype:
        """Raises BuildError for a type that none of our tensors has."""
        if dtype not in self._dtypes:
            raise BuildError(f"a tensor is {dtype.name}, which none of ours should be")
        return self._dtypes[dtype]

    def own_dtype(self, dtype: torch.dtype) -> api.Enum:
        return next(own for own, known in self._dtypes.items() if known == dtype)

    def is_input(self, mode: api.Enum) -> bool:
        return mode == self.module.TensorIOMode.INPUT

    # -- Targets --

    @property
    def served_targets(self) -> tuple[str, ...]:
        """Those it compiles for anywhere; empty: it compiles for the GPU of this machine."""
        if self._rtx is None:
            return ()
        names = self._rtx.ComputeCapability.__members__
        return tuple(name.lower() for name in names if name.startswith("SM"))

    def choose_targets(self, requested: Sequence[str] = ()) -> tuple[str, ...]:
        """The targets to compile for: as requested, or the GPU of this machine, or all common ones.

        requested: "sm89", in any case. For a flavour that compiles on its own GPU the answer is the
        name of that GPU. Raises SettingsError for a target that it does not serve.
        """
        wanted = tuple(dict.fromkeys(target.lower() for target in requested))
        here = gpu_target()
        if self._rtx is None:
            if here is None or set(wanted) - {here}:
                raise SettingsError(
                    f"{self.name} compiles for the GPU of this machine alone"
                    f"{f' ({here})' if here else ''}: leave --target out and build on the GPU that "
                    "shall run it.\nSeveral targets, without a GPU: --runtime tensorrt-rtx "
                    f"--target {','.join(DEFAULT_TARGETS)}"
                )
            return (torch.cuda.get_device_name(),)
        wanted = wanted or ((here,) if here else DEFAULT_TARGETS)
        for target in wanted:
            if target not in self.served_targets:
                elsewhere = (
                    f"\n{target} is a data-centre GPU: --runtime tensorrt serves it, on a machine "
                    "that has one."
                )
                raise SettingsError(
                    f"{self.name} does not compile for {target}; it serves "
                    f"{', '.join(self.served_targets)}."
                    f"{elsewhere if target in DATA_CENTRE else ''}"
                )
        return wanted

    def set_targets(self, config: api.BuilderConfig, targets: Sequence[str]) -> None:
        """targets: of `choose_targets`. Raises BuildError."""
        rtx_config = self.rtx_config(config)
        if self._rtx is None or rtx_config is None:
            return
        rtx_config.num_compute_capabilities = len(targets)
        for index, target in enumerate(targets):
            capability = self._rtx.ComputeCapability.__members__[target.upper()]
            if not rtx_config.set_compute_capability(capability, index):
                raise BuildError(
                    f"{self.name} {self.version} refuses to compile for {target}: "
                    f"{self.last_errors()}"
                )

    # -- Errors --

    def report(self, error: BaseException) -> None:
        """Keep an error of ours that cannot fly through TensorRT, for `last_errors`."""
        self._errors.append(str(error))

    def last_errors(self) -> str:
        """The last errors that TensorRT logged, one a line, and forget them."""
        text = "\n".join(self._errors)
        self._errors.clear()
        return text


def check_precision(precision: str, targets: Sequence[str]) -> None:
    """Raises UnsupportedTaskError or SettingsError for what TensorRT does not compile for these.

    targets: of `choose_targets`; a name of a GPU is that of this machine.
    """
    if precision == "fp8":
        raise UnsupportedTaskError("precision fp8 is not there yet. Take bf16.")
    if precision == "fp32":
        raise SettingsError(
            "TensorRT has no fused attention in fp32. Take bf16, or fp16 for Turing (sm75)."
        )
    capabilities = {target if target.startswith("sm") else gpu_target() for target in targets}
    lacking = [target for target in NO_BFLOAT16 if target in capabilities]
    if precision == "bf16" and lacking:
        raise SettingsError(
            f"{', '.join(lacking)} has no bf16. Build for it apart: --precision fp16 "
            f"--target {','.join(lacking)}"
        )


def gpu_target() -> str | None:
    """The compute capability of the GPU of this machine, "sm89"; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    major, minor = torch.cuda.get_device_capability()
    return f"sm{major}{minor}"


@cache
def _make_logger(base: type) -> tuple[api.Logger, deque[str]]:
    """A logger of TensorRT's that writes to Python's, and the last errors that passed through it.

    base: the module's ILogger. One a process: TensorRT ignores a second while the first lives.
    """
    errors: deque[str] = deque(maxlen=ERRORS_KEPT)
    levels = {
        "INTERNAL_ERROR": logging.ERROR,
        "ERROR": logging.ERROR,
        "WARNING": logging.WARNING,
    }

    def write(logger: object, severity: api.Enum, message: str) -> None:
        level = levels.get(severity.name, logging.DEBUG)
        if level == logging.ERROR:
            errors.append(message)
        if any(phrase in message for phrase in HARMLESS):
            level = logging.DEBUG
        log.log(level, "%s", message)

    return cast(api.Logger, type("Logger", (base,), {"log": write})()), errors
