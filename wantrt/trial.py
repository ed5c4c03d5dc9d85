"""`--weights auto` on a GPU: a stack is compiled both ways, both are run, the faster is kept.

The clock does not care what the weights are, so they are generated: nothing of the checkpoint is
read. What was measured is remembered in the user's cache, for this GPU, library, stack and size.
"""

import json
import logging
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.device import Device
from wantrt.engines.cache import discard, obtain
from wantrt.engines.measure import Measured, compare_weights
from wantrt.engines.requests import PlanRequest, Symbols
from wantrt.export.graph import export_component
from wantrt.folder import Progress, cache_folder, write_json
from wantrt.manifest import PlanRecord
from wantrt.models.components import Component
from wantrt.pieces import make_key
from wantrt.plans import PlanOptions
from wantrt.runtime.loading import RUNTIMES

log = logging.getLogger("wantrt")


@dataclass(frozen=True)
class Trial:
    """What is measured: a stack (made with ONNX_OPS) at the sizes of one plan."""

    stack: Component
    symbols: Symbols
    options: PlanOptions

    @property
    def _memory(self) -> Path:
        """Where the result is remembered."""
        options, stack = self.options, self.stack
        key = make_key(
            (options.flavour.name, options.flavour.version, options.targets, options.tf32),
            (_make_device(options).name, sorted(self.symbols.items())),
            sorted((name, str(spec)) for name, spec in stack.weights.items()),
        )
        return cache_folder() / "measured" / f"{key}.json"

    def recall(self) -> Measured | None:
        try:
            return Measured(**json.loads(self._memory.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None

    def run(self, progress: Progress) -> Measured:
        """Measure, say what was found, and remember it."""
        device = _make_device(self.options)
        generated = GeneratedTensors(0, "trial", self.stack.module)
        weights = {
            name: generated.read(name).to(spec.dtype) for name, spec in self.stack.weights.items()
        }
        alone = replace(self.stack, instances=[{name: name for name in weights}])
        with tempfile.TemporaryDirectory() as folder:
            request = PlanRequest(
                component=alone,
                graph=Path(folder) / "stack.onnx",
                symbols=self.symbols,
                targets=self.options.targets,
                tf32=self.options.tf32,
            )
            export_component(alone, request.graph)
            flavour = self.options.flavour
            bound = obtain(flavour, request, progress)
            baked = obtain(flavour, replace(request, baked=weights), progress)
        record = PlanRecord(
            file="",
            runtime=flavour.name,
            version=flavour.version,
            targets=self.options.targets,
            symbols=dict(self.symbols),
        )
        try:
            measured = compare_weights(
                alone,
                (record, bound.path),
                (replace(record, part="trial", instance=0), baked.path),
                weights,
                device,
                flavour,
            )
        finally:
            discard(baked)  # generated weights are of no use to anybody
            device.release()  # torch keeps what TensorRT needs to compile the rest
        log.info(
            "a stack with its weights bound: %.2f ms, baked: %.2f ms; taking %s",
            measured.bound_s * 1e3,
            measured.baked_s * 1e3,
            measured.faster,
        )
        write_json(self._memory, asdict(measured))
        return measured


def why_not_measured(options: PlanOptions) -> str | None:
    """What keeps this machine from timing the plans; None if nothing does."""
    if RUNTIMES[options.flavour.name].missing():
        return "no GPU here to time them baked"
    here = _make_device(options).architecture
    if options.flavour.builds_without_gpu and here not in options.targets:
        return f"this GPU is {here}, and the plans are for {', '.join(options.targets)}"
    return None


def _make_device(options: PlanOptions) -> Device:
    return RUNTIMES[options.flavour.name].make_device()
