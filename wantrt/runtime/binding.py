"""What the sessions of every runtime have in common: the tensors they are given, checked."""

from collections.abc import Mapping

from torch import Tensor

from wantrt.errors import BundleError, ExecutionError
from wantrt.models.components import Component
from wantrt.session import Tensors, TensorSpec


def weights_of_instances(component: Component, weights: Tensors) -> list[dict[str, Tensor]]:
    """For each instance of `component`, its weights by their names in the graph; nothing copied."""
    instances = []
    for instance in component.instances:
        bound = {}
        for name, spec in component.weights.items():
            prepared = instance[name]
            if prepared not in weights:
                raise BundleError(f"{component.name}: no weight {prepared}. {_REBUILD}")
            if not _fits(weights[prepared], spec, {}):
                raise BundleError(
                    f"{component.name}: weight {prepared} is {describe(weights[prepared])}, "
                    f"expected {spec.dtype} {spec.shape}. {_REBUILD}"
                )
            bound[name] = weights[prepared]
        instances.append(bound)
    return instances


_REBUILD = "The weights belong to another model or precision: run wantrt build again."


def output_tensors(
    component: Component, inputs: Tensors, given: Tensors | None
) -> dict[str, tuple[tuple[int, ...], Tensor | None]]:
    """Check the tensors of a run. Returns each output's shape and the tensor given for it."""
    symbols = symbols_of(component, inputs)
    for name, spec in component.inputs.items():
        check_tensor(component, f"input {name}", inputs[name], spec, symbols)
    given = given or {}
    for name in given.keys() - component.outputs.keys():
        raise ExecutionError(f"{component.name} has no output {name}")
    readers = {tensor.data_ptr(): name for name, tensor in inputs.items()}
    for name, tensor in given.items():
        check_tensor(component, f"output {name}", tensor, component.outputs[name], symbols)
        if tensor.data_ptr() in readers:
            raise ExecutionError(
                f"{component.name}: output {name} lies where input {readers[tensor.data_ptr()]} "
                "does; give it a tensor of its own"
            )
    return {
        name: (spec.concrete(symbols), given.get(name)) for name, spec in component.outputs.items()
    }


def symbols_of(component: Component, inputs: Tensors) -> dict[str, int]:
    """What the sizes of a run are, as its inputs tell. Raises ExecutionError for a missing one."""
    symbols: dict[str, int] = {}
    for name, spec in component.inputs.items():
        if name not in inputs:
            raise ExecutionError(f"{component.name}: input {name} is missing; bind it or pass it")
        if inputs[name].dim() == len(spec.shape):
            symbols = spec.symbols(inputs[name].shape) | symbols
    return symbols


def check_tensor(
    component: Component, what: str, tensor: Tensor, spec: TensorSpec, symbols: Mapping[str, int]
) -> None:
    """Raises ExecutionError unless dtype and shape are those of `spec`."""
    if not _fits(tensor, spec, symbols):
        known = ", ".join(f"{symbol} = {size}" for symbol, size in symbols.items())
        raise ExecutionError(
            f"{component.name}: {what} is {describe(tensor)}, expected {spec.dtype} {spec.shape}"
            + (f" with {known}" if known else "")
        )


def _fits(tensor: Tensor, spec: TensorSpec, symbols: Mapping[str, int]) -> bool:
    return (
        tensor.dtype == spec.dtype
        and tensor.dim() == len(spec.shape)
        and tuple(tensor.shape) == spec.concrete(symbols)
    )


def describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"
