"""Which way of compiling a component is fastest on this GPU? All are run side by side.

Bound weights let one small plan serve all blocks; baked ones may be laid out as the kernels like
them best. A kernel of ours in a plan saves passes over memory, but TensorRT fuses nothing across
it. No rule says which wins, so a build on a GPU asks it.
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
    """Median seconds of one run of a component, by the way it was compiled, simplest first."""

    seconds: dict[str, float]
    relative_error: float  # the largest of a way, from the first

    @property
    def fastest(self) -> str:
        """The first of equals."""
        return min(self.seconds, key=self.seconds.__getitem__)


def compare_plans(
    component: Component,
    plans: Mapping[str, tuple[PlanRecord, Path]],
    weights: Tensors,
    device: Device,
    flavour: Flavour,
) -> Measured:
    """Run the first instance of `component` by each of `plans` on `device`, at the typical sizes.

    plans: by the way they were compiled, at least two. weights: prepared tensors of the part,
    anywhere. Raises BuildError if a plan disagrees with the first.
    """
    records = [record for record, _ in plans.values()]
    typical = {symbol: size for symbol, (_, size, _) in records[0].symbols.items()}
    seconds: dict[str, list[float]] = {way: [] for way in plans}
    with torch.inference_mode(), device.stream():
        moved = {name: tensor.to(device.torch_device) for name, tensor in weights.items()}
        sessions = {
            way: load_sessions(component, [plan], {} if plan[0].part else moved, device, flavour)[0]
            for way, plan in plans.items()
        }
        inputs = _make_inputs(component, typical, device)
        results = {
            way: {name: t.clone() for name, t in session.run(inputs).items()}
            for way, session in sessions.items()
        }
        device.synchronize()
        simplest, first = next(iter(results.items()))
        errors = {
            way: max(_distance(result[name], first[name]) for name in first)
            for way, result in results.items()
            if way != simplest
        }
        for _ in range(ROUNDS):
            for way, session in sessions.items():
                seconds[way].append(_time(session, inputs, first, device))
    for way, error in errors.items():
        if not error <= LARGEST_ERROR:
            raise BuildError(
                f"{component.name}: its plan {way} differs by {error:.1e} of scale from the one "
                f"{simplest} (at most {LARGEST_ERROR:.0e}). Choose with --weights and "
                "--plugins, and run wantrt verify on the bundle."
            )
    return Measured({way: median(times) for way, times in seconds.items()}, max(errors.values()))


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
