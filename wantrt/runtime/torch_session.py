"""The `torch` runtime: a component's reference module itself, with its weights bound.

It runs no graph. With our kernels as the module's ops it is a GPU runtime; without, it is the
definition of correct that the other runtimes are compared with.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from wantrt.device import Device
from wantrt.models.components import Component
from wantrt.runtime.binding import output_tensors, weights_of_instances
from wantrt.session import Range, Tensors, TensorSpec


def load_sessions(
    component: Component, graph: Path | None, weights: Tensors, device: Device
) -> list["TorchSession"]:
    """One session for each instance of `component`; weights stay where they are on a CPU."""
    return [
        TorchSession(component, {n: w.to(device.torch_device) for n, w in bound.items()})
        for bound in weights_of_instances(component, weights)
    ]


class TorchSession:
    """See `wantrt.session.Session`. Runs under no_grad, so results may be changed in place."""

    def __init__(self, component: Component, weights: Mapping[str, Tensor]) -> None:
        self.component = component
        self._weights = dict(weights)
        self._bound: dict[str, Tensor] = {}

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self.component.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self.component.outputs

    @property
    def serves(self) -> Sequence[Mapping[str, Range]]:
        return ()

    def prepare(self, symbols: Mapping[str, int]) -> None:
        pass

    def bind(self, name: str, tensor: Tensor) -> None:
        into = self._weights if name in self._weights else self._bound
        into[name] = tensor

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]:
        values = {**self._bound, **inputs}
        expected = output_tensors(self.component, values, outputs)
        arguments = tuple(values[name] for name in self.component.inputs)
        with torch.no_grad():
            results = functional_call(self.component.module, self._weights, arguments)
            return {
                name: result if given is None else given.copy_(result)
                for (name, (_, given)), result in zip(expected.items(), results, strict=True)
            }
