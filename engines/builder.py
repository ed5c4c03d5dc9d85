"""Graph to plan: one component, for given sizes and targets, its weights bound or baked.

Strongly typed: precision is what the graph says. On a machine without a GPU only TensorRT-RTX
builds; 10 blocks of 14B take a few seconds and half a GiB, because bound weights are inputs and
baked ones are read where they lie.
"""

import logging
import re
from collections.abc import Callable
from pathlib import Path

import onnx
import torch
from onnx.inliner import inline_local_functions
from torch import Tensor

from wantrt.engines import api
from wantrt.engines.flavours import Flavour
from wantrt.engines.fusion import check_network, look_into_plan
from wantrt.engines.network import (
    allow_decomposition,
    fill_sizes,
    read_graph,
    separate_queries,
    turn_into_constants,
    turn_into_plugins,
)
from wantrt.engines.plugins import plugin_names, register_plugins
from wantrt.engines.requests import PlanRequest
from wantrt.errors import BuildError, CancelledError
from wantrt.folder import Progress, cache_folder, silent, write_atomic
from wantrt.linked import refuse_other_names
from wantrt.models.components import Component

refuse_other_names(__spec__)

log = logging.getLogger(__name__)

PERCENT = 100


def build_plan(
    flavour: Flavour,
    request: PlanRequest,
    progress: Progress = silent,
    cancelled: Callable[[], bool] = lambda: False,
) -> api.HostMemory:
    """Compile a plan; `memoryview` of the result gives its bytes.

    `progress` hears percents of the component's build. `cancelled` is asked at every step, so that
    a signal handler need only set a flag: an exception must not fly through TensorRT. Raises
    BuildError with the cause and TensorRT's words, CancelledError.
    """
    name = request.component.name
    flavour.last_errors()
    builder = flavour.builder()
    if request.plugins:
        register_plugins(flavour)
    network = builder.create_network(flavour.network_flags(request.plugins))
    parser = flavour.parser(network)  # keeps what it parsed alive until the plan is built
    _parse(flavour, request, parser, network)
    config = _configure(flavour, request, builder)
    watcher = _Watcher(lambda percent: progress(f"plan {name}", percent, PERCENT), cancelled)
    config.progress_monitor = flavour.progress_monitor(watcher)
    timing_cache = timing_cache_path(flavour)
    times = _start_timing_cache(config, timing_cache)
    plan = builder.build_serialized_network(network, config)
    if watcher.error is not None:
        raise watcher.error
    if plan is None and watcher.stopped:
        flavour.last_errors()
        raise CancelledError(f"the build of {name} was stopped")
    if plan is None:
        raise BuildError(
            f"{flavour.name} {flavour.version} does not build {_describe(request)}:\n"
            f"{flavour.last_errors()}\n"
            "If it is the memory that is short, build a smaller --size; a lasting failure is worth "
            "a report with these lines."
        )
    if timing_cache and times:
        write_atomic(timing_cache, bytes(memoryview(times.serialize())))
    look_into_plan(flavour, request.component, plan)
    progress(f"plan {name}", PERCENT, PERCENT)
    return plan


def timing_cache_path(flavour: Flavour) -> Path | None:
    """Where times of kernels are kept, for one version and one GPU; None if none are taken."""
    if not flavour.has_timing_cache or not torch.cuda.is_available():
        return None
    gpu = re.sub(
        r"[^A-Za-z0-9.]+", "-", torch.cuda.get_device_name()
    )  # there is an "RTX 6000/8000"
    return cache_folder() / "timing" / f"{flavour.name}-{flavour.version}-{gpu}.cache"


def _parse(
    flavour: Flavour,
    request: PlanRequest,
    parser: api.OnnxParser,
    network: api.NetworkDefinition,
) -> None:
    component = request.component
    model = read_graph(request.graph)
    fill_sizes(model, {**component.inputs, **component.outputs}, request.symbols)
    allow_decomposition(model)
    separate_queries(model)
    turn_into_constants(model, request.baked)
    if request.plugins:
        _use_plugins(component, model)
    # The parser would do it too, with a warning for every node of a definition that is used twice.
    model = inline_local_functions(model)
    read = parser.load_model_proto(model.SerializeToString(), "")
    for name, tensor in request.baked.items():
        _check_weight(component, name, tensor)
        read = read and parser.load_initializer(name, tensor.data_ptr(), tensor.nbytes)
    if not (read and parser.parse_model_proto()):
        raise BuildError(
            f"{flavour.name} {flavour.version} does not read {request.graph}:\n"
            f"{flavour.last_errors()}\n"
            "If the file is damaged, make it anew: wantrt build --check"
        )
    check_network(flavour, component, model, network)


def _use_plugins(component: Component, model: onnx.ModelProto) -> None:
    used = turn_into_plugins(model, plugin_names())
    if not used:
        raise BuildError(f"{component.name} has no node that a plugin could take: build it without")
    log.info("%s: plugins for %s", component.name, ", ".join(used))


def _check_weight(component: Component, name: str, tensor: Tensor) -> None:
    """TensorRT reads bytes at an address: it cannot see whether they are what it takes them for."""
    spec = component.weights[name]
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape:
        raise BuildError(
            f"{component.name}: weight {name} is {tensor.dtype} {list(tensor.shape)}, expected "
            f"{spec.dtype} {list(spec.shape)}. Make the weights anew: wantrt build --check"
        )
    assert tensor.is_contiguous()
    assert tensor.device.type == "cpu"


def _configure(flavour: Flavour, request: PlanRequest, builder: api.Builder) -> api.BuilderConfig:
    config = builder.create_builder_config()
    if not request.tf32:
        config.clear_flag(flavour.module.BuilderFlag.TF32)
    config.max_aux_streams = 0  # one stream: a captured step must hold everything
    flavour.forbid_allocation(config)
    flavour.set_targets(config, request.targets)
    if torch.cuda.is_available():  # else kernels are chosen without trying them
        free, _ = torch.cuda.mem_get_info()
        config.set_memory_pool_limit(flavour.module.MemoryPoolType.WORKSPACE, free)
    ranges = {symbol for symbol, (low, _, high) in request.symbols.items() if low != high}
    if ranges:
        profile = _make_profile(request, builder)
        if config.add_optimization_profile(profile) < 0:
            raise BuildError(
                f"{flavour.name} refuses the sizes of {_describe(request)}:\n"
                f"{flavour.last_errors()}"
            )
    return config


def _make_profile(request: PlanRequest, builder: api.Builder) -> api.OptimizationProfile:
    """The smallest, typical and largest shape of every input that has a dynamic size."""
    profile = builder.create_optimization_profile()
    for name, spec in request.component.inputs.items():
        shapes = [
            spec.concrete({symbol: sizes[which] for symbol, sizes in request.symbols.items()})
            for which in range(3)
        ]
        if shapes[0] != shapes[2]:
            profile.set_shape(name, *shapes)
    return profile


def _start_timing_cache(config: api.BuilderConfig, path: Path | None) -> api.TimingCache | None:
    if path is None:
        return None
    known = path.read_bytes() if path.is_file() else b""
    for content in (known, b""):  # what is damaged, or of another GPU or driver, is started anew
        cache = config.create_timing_cache(content)
        if cache is not None and config.set_timing_cache(cache, False):
            return cache
    return None


def _describe(request: PlanRequest) -> str:
    sizes = ", ".join(
        f"{symbol}={low}" if low == high else f"{symbol}={low}…{high}"
        for symbol, (low, _, high) in request.symbols.items()
    )
    targets = ", ".join(request.targets)
    return f"{request.component.name} at {sizes or 'its only size'} for {targets}"


class _Watcher:
    """Hears of the build's phases, which lie in one another, and says whether to go on.

    TensorRT calls it from C++, so nothing may be raised: what goes wrong is kept in `error`.
    """

    def __init__(self, report: Callable[[int], None], cancelled: Callable[[], bool]) -> None:
        self._report, self._cancelled = report, cancelled
        self._phases: dict[
            str, tuple[int, int]
        ] = {}  # active ones, outermost first: done, of how many
        self._percent = -1
        self.stopped = False
        self.error: BaseException | None = None

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        self._phases[phase_name] = (0, max(num_steps, 1))

    def phase_finish(self, phase_name: str) -> None:
        self._phases.pop(phase_name, None)

    def step_complete(self, phase_name: str, step: int) -> bool:
        try:
            _, steps = self._phases[phase_name]
            self._phases[phase_name] = (min(step + 1, steps), steps)
            done = 0.0
            for finished, steps in reversed(self._phases.values()):
                done = min((finished + done) / steps, 1.0)
            if (percent := int(PERCENT * done)) > self._percent:
                self._percent = percent
                self._report(percent)
            self.stopped = self.stopped or self._cancelled()
        except BaseException as error:
            self.error = error
            self.stopped = True
        return not self.stopped
