"""Bound or baked: which is faster on this GPU? Both are run side by side, and the clock decides.

Bound weights let one small plan serve all blocks; baked ones may be laid out as the kernels like
them best. No rule says which wins, so a build on a GPU asks it.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from wantrt.device import Device
from wantrt.engines.flavours import Flavour
from wantrt.engines.session import TensorRTSession, load_sessions
from wantrt.errors import BuildError
from wantrt.linked import refuse_other_names
from wantrt.manifest import PlanRecord
from wantrt.models.components import Component
from wantrt.session import Tensors

refuse_other_names(__spec__)

ROUNDS = 7  # alternating, so that a drifting clock meets both
LARGEST_ERROR = 3e-2  # ‖a − b‖ / ‖b‖, as bf16 components may differ from their reference


@dataclass(frozen=True)
class Measured:
    """Median seconds of one run of a component, by where its weights are."""

    bound_s: float
    baked_s: float
    relative_error: float  # of one from the other

    @property
    def faster(self) -> str:
        """ "bound" where they are equal: it is smaller and serves every instance."""
        return "baked" if self.baked_s < self.bound_s else "bound"


def compare_weights(
    component: Component,
    bound: tuple[PlanRecord, Path],
    baked: tuple[PlanRecord, Path],
    weights: Tensors,
    device: Device,
    flavour: Flavour,
) -> Measured:
    """Run the first instance of `component` both ways on `device`, at the typical sizes.

    weights: prepared tensors of the part, anywhere. Raises BuildError if the two disagree.
    """
    typical = {symbol: size for symbol, (_, size, _) in bound[0].symbols.items()}
    with torch.inference_mode(), device.stream():
        moved = {name: tensor.to(device.torch_device) for name, tensor in weights.items()}
        (first, *_) = load_sessions(component, [bound], moved, device, flavour)
        (second, *_) = load_sessions(component, [baked], {}, device, flavour)
        inputs = _make_inputs(component, typical, device)
        results = [
            {name: t.clone() for name, t in session.run(inputs).items()}
            for session in (first, second)
        ]
        device.synchronize()
        error = max(_distance(results[1][name], expected) for name, expected in results[0].items())
        seconds: tuple[list[float], list[float]] = ([], [])
        for _ in range(ROUNDS):
            for session, into in zip((first, second), seconds, strict=True):
                into.append(_time(session, inputs, results[0], device))
    if not error <= LARGEST_ERROR:
        raise BuildError(
            f"{component.name}: its bound and its baked plan differ by {error:.1e} of scale "
            f"(at most {LARGEST_ERROR:.0e}). Take one with --weights, and run wantrt verify on it."
        )
    return Measured(median(seconds[0]), median(seconds[1]), error)


def _make_inputs(
    component: Component, symbols: Mapping[str, int], device: Device
) -> dict[str, Tensor]:
    inputs = {}
    for name, spec in component.inputs.items():
        shape = spec.concrete(symbols)
        if spec.dtype == torch.int64:  # token ids, rows: the first always exists
            values = torch.zeros(shape, dtype=spec.dtype)
        else:
            values = torch.randn(shape).to(spec.dtype)
        inputs[name] = values.to(device.torch_device)
    return inputs


def _time(session: TensorRTSession, inputs: Tensors, outputs: Tensors, device: Device) -> float:
    start = time.perf_counter()
    session.run(inputs, outputs)
    device.synchronize()
    return time.perf_counter() - start


def _distance(actual: Tensor, expected: Tensor) -> float:
    expected = expected.float()
    return float((actual.float() - expected).norm() / expected.norm())
