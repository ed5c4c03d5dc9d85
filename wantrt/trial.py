"""`--weights auto`, `--plugins auto`: compile a component every way, run all, keep the fastest.

The clock does not care what the weights are, so they are generated: nothing of the checkpoint is
read. What was measured is remembered in the user's cache, for this GPU, library, component and
size.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import product
from math import prod
from pathlib import Path

from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.config import Variant
from wantrt.device import Device
from wantrt.engines.cache import discard, obtain
from wantrt.engines.measure import Measured, compare_plans
from wantrt.engines.plugins import hash_plugins
from wantrt.engines.requests import PlanRequest, Symbols, has_no_kernels
from wantrt.export.graph import export_component
from wantrt.folder import Progress, cache_folder, write_json
from wantrt.manifest import PlanRecord
from wantrt.models.components import Component
from wantrt.pieces import make_key
from wantrt.plans import PLUGGED, PlanOptions
from wantrt.runtime.loading import RUNTIMES

log = logging.getLogger("wantrt")


@dataclass(frozen=True)
class Way:
    """A way of compiling a component: its weights inside or not, our kernels as plugins or not."""

    baked: bool
    plugins: bool

    def __str__(self) -> str:
        return ("baked" if self.baked else "bound") + (" with plugins" if self.plugins else "")


@dataclass(frozen=True)
class Trial:
    """What is measured: a component (made with ONNX_OPS), at the sizes of one plan, in `ways`."""

    component: Component
    symbols: Symbols
    options: PlanOptions
    ways: Sequence[Way]

    def fastest(self, measured: Measured) -> Way:
        return next(way for way in self.ways if str(way) == measured.fastest)

    @property
    def _memory(self) -> Path:
        """Where the result is remembered."""
        options, component = self.options, self.component
        key = make_key(
            (options.flavour.name, options.flavour.version, options.targets, options.tf32),
            (_make_device(options).name, sorted(self.symbols.items())),
            (component.name, len(component.instances), sorted(map(str, self.ways))),
            sorted((name, str(spec)) for name, spec in component.weights.items()),
            hash_plugins() if any(way.plugins for way in self.ways) else None,
        )
        return cache_folder() / "measured" / f"{key}.json"

    def recall(self) -> Measured | None:
        try:
            measured = Measured(**json.loads(self._memory.read_bytes()))
        except (OSError, ValueError, TypeError):
            return None
        return measured if list(measured.seconds) == [str(way) for way in self.ways] else None

    def run(self, progress: Progress) -> Measured:
        """Measure, say what was found, and remember it."""
        device = _make_device(self.options)
        generated = GeneratedTensors(0, "trial", self.component.module)
        weights = {
            name: generated.read(name).to(spec.dtype)
            for name, spec in self.component.weights.items()
        }
        alone = replace(self.component, instances=[{name: name for name in weights}])
        flavour = self.options.flavour
        record = PlanRecord(
            file="",
            runtime=flavour.name,
            version=flavour.version,
            targets=self.options.targets,
            symbols=dict(self.symbols),
        )
        plans, baked = {}, []
        try:
            with tempfile.TemporaryDirectory() as folder:
                request = PlanRequest(
                    component=alone,
                    graph=Path(folder) / "graph.onnx",
                    symbols=self.symbols,
                    targets=self.options.targets,
                    tf32=self.options.tf32,
                )
                export_component(alone, request.graph)
                for way in self.ways:
                    request = replace(
                        request, baked=weights if way.baked else {}, plugins=way.plugins
                    )
                    entry = obtain(flavour, request, progress)
                    plans[str(way)] = record, entry.path
                    if way.baked:
                        plans[str(way)] = replace(record, part="trial", instance=0), entry.path
                        baked.append(entry)
            measured = compare_plans(alone, plans, weights, device, flavour)
        finally:
            for entry in baked:
                discard(entry)  # generated weights are of no use to anybody
            device.release()  # torch keeps what TensorRT needs to compile the rest
        log.info(
            "%s: %s; taking %s",
            self.component.name,
            ", ".join(f"{way} {time * 1e3:.2f} ms" for way, time in measured.seconds.items()),
            measured.fastest,
        )
        write_json(self._memory, asdict(measured))
        return measured


def make_trials(
    variant: Variant,
    components: Sequence[Component],
    options: PlanOptions,
    weights: str,
    plugins: str,
) -> list[Trial]:
    """What is to be measured for the choices that are "auto"; nothing where there is no choice."""
    trials = []
    for component in {c.name: c for c in reversed(components)}.values():  # the first of a name
        if component.name not in PLUGGED or has_no_kernels(component, options.targets):
            continue
        baked = [False, True] if weights == "auto" else [options.baked]
        if options.bakes(component) and not options.baked:
            baked = [True]  # the VAE
        plugged = [component.name in options.plugins]
        if plugins == "auto" and options.flavour.takes_plugins and find_spec("triton"):
            plugged = [False, True]
        ways = [Way(*way) for way in product(baked, plugged)]
        sizes = [symbols for _, symbols in options.symbols(variant, component)]
        if len(ways) > 1 and sizes:
            trials.append(Trial(component, max(sizes, key=_count), options, ways))
    return trials


def _count(symbols: Symbols) -> int:
    """Of tokens or cells, whichever a component has."""
    return prod(typical for _, typical, _ in symbols.values())


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
