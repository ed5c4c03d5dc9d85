"""The `tensorrt` and `tensorrt-rtx` runtimes: a component's plans, run on the addresses of tensors.

All instances of a component share the plans whose weights are inputs ("bound"), each with its one
execution context: instances never run at once, and differ in the addresses they set. A plan with
weights inside ("baked") belongs to one instance. Nothing is copied, nothing waits for the GPU.
"""

from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path

from torch import Tensor

from wantrt.device import ALIGNMENT_BYTES, Device
from wantrt.engines.flavours import Flavour
from wantrt.engines.loaded_plan import LoadedPlan, PlanSource, Region, load_plan
from wantrt.errors import BundleError, ExecutionError, SettingsError
from wantrt.linked import refuse_other_names
from wantrt.manifest import PlanRecord
from wantrt.models.components import Component
from wantrt.runtime.binding import (
    check_tensor,
    output_tensors,
    symbols_of,
    weights_of_instances,
)
from wantrt.session import Range, Tensors, TensorSpec

refuse_other_names(__spec__)


def load_sessions(
    component: Component,
    plans: Sequence[tuple[PlanRecord, Path]],
    weights: Tensors,
    device: Device,
    flavour: Flavour,
) -> list["TensorRTSession"]:
    """One session for each instance of `component`; plans are read when a size first needs them.

    Weights that do not lie on the device (in pinned host memory) wait for `bind`. A component whose
    plans are all baked needs no weights. Raises BundleError.
    """
    sources = [PlanSource(component, record, path, flavour, device) for record, path in plans]
    instances: list[dict[str, Tensor]] = [{} for _ in component.instances]
    if any(source.bound for source in sources):
        instances = weights_of_instances(component, weights)
    sessions = []
    for index, bound in enumerate(instances):
        own = [source for source in sources if source.record.instance in (None, index)]
        if not own:
            raise BundleError(
                f"{component.name}: the bundle has no {flavour.name} plan for instance {index}. "
                f"Build it: wantrt build --runtime {flavour.name}"
            )
        sessions.append(TensorRTSession(component, own, bound, device))
    return sessions


class TensorRTSession:
    """See `wantrt.session.Session`. Runs on the device's stream, which must be the current one."""

    def __init__(
        self,
        component: Component,
        sources: Sequence[PlanSource],
        weights: Mapping[str, Tensor],
        device: Device,
    ) -> None:
        self.component, self.device = component, device
        self._sources = sources
        self._loaded: dict[PlanSource, LoadedPlan] = {}
        self._bindable = dict(component.inputs)
        if any(source.bound for source in sources):
            self._bindable |= component.weights
        self._bound: dict[str, Tensor] = {}  # kept alive: the context knows addresses only
        self._regions: dict[str, Region] = {}  # of what is bound
        for name, weight in weights.items():
            if weight.device == device.torch_device:
                self.bind(name, weight)

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self.component.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.component.outputs

    @property
    def serves(self) -> Sequence[Mapping[str, Range]]:
        return [source.record.symbols for source in self._sources]

    def prepare(self, symbols: Mapping[str, int]) -> None:
        """Load the plan of these sizes now and reserve its scratch memory, as `run` would."""
        self._plan(symbols)

    def bind(self, name: str, tensor: Tensor) -> None:
        """Set an input or, where weights are inputs, a weight; addresses only."""
        if name not in self._bindable:
            raise ExecutionError(f"{self.component.name} takes no {name}: nothing can be bound")
        if name in self.component.weights:
            spec = self.component.weights[name]
            check_tensor(self.component, f"weight {name}", tensor, spec, {})
        self._regions[name] = self._region(f"what is bound to {name}", tensor)
        self._bound[name] = tensor

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]:
        """Enqueue one run; results are there for what comes after it on the stream."""
        values = {**self._bound, **inputs}
        expected = output_tensors(self.component, values, outputs)
        plan = self._plan(symbols_of(self.component, values))
        results = {
            name: self.device.empty(shape, self.component.outputs[name].dtype)
            if given is None
            else given
            for name, (shape, given) in expected.items()
        }
        regions = {name: self._region(f"input {name}", t) for name, t in inputs.items()}
        written = {name: self._region(f"output {name}", t) for name, t in results.items()}
        plan.enqueue({**self._regions, **regions}, written)
        return results

    def _plan(self, symbols: Mapping[str, int]) -> LoadedPlan:
        """The plan with the narrowest ranges that hold `symbols`, loaded."""
        serving = [source for source in self._sources if _holds(source.record.symbols, symbols)]
        if not serving:
            runtime = self._sources[0].record.runtime
            offered = "; ".join(_describe(served) for served in self.serves)
            asked = ", ".join(f"{name} = {size}" for name, size in sorted(symbols.items()))
            raise SettingsError(
                f"{self.component.name}: no plan serves {asked}. The bundle's plans serve "
                f"{offered}. Add one: wantrt build --runtime {runtime} "
                "--size WIDTHxHEIGHT --frames N"
            )
        source = min(serving, key=lambda source: _breadth(source.record.symbols))
        if source not in self._loaded:
            self._loaded[source] = load_plan(source)
        return self._loaded[source]

    def _region(self, what: str, tensor: Tensor) -> Region:
        """Where a tensor lies. Raises ExecutionError if TensorRT could not read it there."""
        if tensor.device != self.device.torch_device:
            raise ExecutionError(
                f"{self.component.name}: {what} lies on {tensor.device}, "
                f"expected {self.device.torch_device}"
            )
        if not tensor.is_contiguous():
            raise ExecutionError(f"{self.component.name}: {what} must be contiguous")
        if tensor.storage_offset() * tensor.itemsize % ALIGNMENT_BYTES:  # torch aligns the rest
            raise ExecutionError(
                f"{self.component.name}: {what} is a view that begins at no multiple of "
                f"{ALIGNMENT_BYTES} bytes; clone it"
            )
        return tuple(tensor.shape), tensor.data_ptr()


def _holds(served: Mapping[str, Range], symbols: Mapping[str, int]) -> bool:
    return all(
        name in served and served[name][0] <= size <= served[name][2]
        for name, size in symbols.items()
    )


def _breadth(served: Mapping[str, Range]) -> int:
    return prod(largest - smallest + 1 for smallest, _, largest in served.values())


def _describe(served: Mapping[str, Range]) -> str:
    return ", ".join(
        f"{name} = {smallest}" + (f"..{largest}" if largest > smallest else "")
        for name, (smallest, _, largest) in served.items()
    )
