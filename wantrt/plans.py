"""Plans as pieces of a build: which there are, what each costs, and how it is made.

The key of a piece is made of what is at hand without work (the checkpoint's fingerprint stands for
its weights), so a build that has nothing to do finds out quickly. What is compiled goes through the
plan cache, whose keys hold the bytes themselves: bundles share plans, fine-tunes never do.
"""

import logging
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path

from torch import Tensor

from wantrt.checkpoints import Checkpoint
from wantrt.checkpoints.tensors import Renamed, SafetensorsFiles, StoredTensors
from wantrt.config import Size, Variant
from wantrt.engines.cache import hash_code, obtain
from wantrt.engines.flavours import Flavour, check_precision, find_flavour
from wantrt.engines.plugins import hash_plugins
from wantrt.engines.requests import (
    PlanRequest,
    Symbols,
    check_tokens,
    has_no_kernels,
    plan_shapes,
)
from wantrt.folder import PART_SUFFIX, Progress
from wantrt.manifest import ComponentRecord, PlanRecord
from wantrt.models.components import Component
from wantrt.names import check_name
from wantrt.pieces import Piece, Shape, make_key
from wantrt.runtime.settings import check_frames, check_size, warn_of_size
from wantrt.session import PRECISIONS

log = logging.getLogger("wantrt")

WEIGHTS = ("auto", "bound", "baked")
PLUGINS = ("auto", "off", "on")
# What our kernels may be plugins of: the component that is timed, and those that follow it.
PLUGGED = {
    "dit_stack": frozenset(("dit_stack", "dit_head")),
    "vae_decoder_next": frozenset(
        ("vae_decoder_first", "vae_decoder_next", "vae_encoder_first", "vae_encoder_next")
    ),
}
PREPARED = ".prepared"  # folder below the bundle's, for weights that are baked and not kept
BUILDER_BYTES = 2**30  # what TensorRT takes for a bound plan, about
BOUND_BYTES, BOUND_LAYER_BYTES = 2**20, 2**18  # a bound plan, and each layer in it, a target; about


@dataclass(frozen=True, kw_only=True)
class PlanOptions:
    """What the plans of a bundle shall be.

    baked: all weights, not those of the VAE alone. plugins: the components that our kernels are in.
    """

    flavour: Flavour
    targets: tuple[str, ...]
    shapes: tuple[Shape, ...]
    baked: bool
    dynamic: bool
    tf32: bool
    plugins: frozenset[str] = frozenset()

    def bakes(self, component: Component) -> bool:
        return self.baked or component.name.startswith("vae_")

    def symbols(self, variant: Variant, component: Component) -> list[tuple[str, Symbols]]:
        """The sizes of every plan of a component, each with its label."""
        if self.dynamic:
            sizes = [shape[:2] for shape in self.shapes]
            groups = [(sizes, [frames for *_, frames in self.shapes])]
        else:
            groups = [([shape[:2]], [shape[2]]) for shape in self.shapes]
        found: dict[str, tuple[str, Symbols]] = {}
        for sizes, frames in groups:
            for plan in plan_shapes(variant, component.name, sizes, frames, self.dynamic):
                found.setdefault(repr(plan.symbols), (plan.label, plan.symbols))
        return list(found.values())


def choose_options(
    variant: Variant,
    runtime: str,
    precision: str,
    *,
    sizes: Sequence[Size] | None,
    frames: Sequence[int] | None,
    targets: Sequence[str] | None,
    weights: str,
    plugins: str,
    dynamic: bool,
    tf32: bool,
    known: Sequence[Shape] = (),
) -> PlanOptions:
    """Complete and check what is asked. `known`: the videos that the bundle's plans serve already.

    Raises SettingsError, UnsupportedTaskError, RuntimeUnavailableError.
    """
    check_name("way of having the weights", weights, WEIGHTS)
    check_name("choice of plugins", plugins, PLUGINS)
    for size in sizes or ():
        check_size(variant, size)
        warn_of_size(variant, size)
    for count in frames or ():
        check_frames(variant, count)
    flavour = find_flavour(runtime)
    if plugins == "on":
        flavour.plugin_module()  # refuses where there is none
    chosen = flavour.choose_targets(targets or ())
    check_precision(precision, chosen)
    asked = [
        (*size, count)
        for size in sizes or (variant.size,)
        for count in frames or (variant.num_frames,)
    ]
    if known and sizes is None and frames is None:
        asked = []
    shapes = tuple(dict.fromkeys((*known, *asked)))
    if targets is None:
        log.info("compiling plans for %s; others: --target", ", ".join(chosen))
    for width, height, count in shapes:
        check_tokens(variant, [(width, height)], [count], precision)
    return PlanOptions(
        flavour=flavour,
        targets=chosen,
        shapes=shapes,
        baked=weights == "baked",
        dynamic=dynamic,
        tf32=tf32,
        plugins=frozenset().union(*PLUGGED.values()) if plugins == "on" else frozenset(),
    )


class PreparedWeights:
    """The weights of a checkpoint as they are baked: those of the bundle, mapped.

    A bundle without weights gets those of the parts that are baked in a file that is deleted at the
    end of the build.
    """

    def __init__(
        self, checkpoint: Checkpoint, precision: Mapping[str, str], with_weights: bool
    ) -> None:
        self._checkpoint, self._precision = checkpoint, precision
        self._with_weights = with_weights
        self._open: dict[str, StoredTensors] = {}
        self._lock = threading.Lock()  # plans may be made at once

    def read(
        self, root: Path, part: str, names: Mapping[str, str], progress: Progress
    ) -> Mapping[str, Tensor]:
        """names: parameter -> prepared tensor, an instance of a component."""
        with self._lock:
            if part not in self._open:
                self._open[part] = SafetensorsFiles(self._files(root, part, progress))
        return Renamed(self._open[part], names)

    def _files(self, root: Path, part: str, progress: Progress) -> list[Path]:
        if self._with_weights:
            folder = root / "weights"
            shards = sorted(folder.glob(f"{part}-?????-of-?????.safetensors"))
            return shards or [folder / f"{part}.safetensors"]
        folder = root / PREPARED
        folder.mkdir(exist_ok=True)
        return self._checkpoint.write(
            part,
            PRECISIONS[self._precision[part]],
            folder / f"{part}.safetensors",
            lambda done, total: progress(f"weights {part}", done, total),
        )

    def close(self, root: Path) -> None:
        self._open.clear()
        shutil.rmtree(root / PREPARED, ignore_errors=True)

    def temporary_bytes(self, parts: Iterable[str]) -> int:
        """What `read` writes on the disk for these parts."""
        if self._with_weights:
            return 0
        return sum(
            tensor.nbytes
            for part in set(parts)
            for tensor in self._checkpoint.parts[part]
            .module(PRECISIONS[self._precision[part]])
            .parameters()
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One plan of a component: for whom it is compiled, and for which sizes."""

    component: Component
    graph: str  # in the bundle
    graph_key: str
    label: str
    symbols: Symbols
    options: PlanOptions
    weights: PreparedWeights
    fingerprint: str  # of the checkpoint
    part: str | None = None  # whose weights are baked; None: they are bound
    instance: int | None = None
    siblings: int = 1  # plans of this component and size, by whose weights are baked

    @cached_property
    def key(self) -> str:
        options = self.options
        return make_key(
            hash_code(),
            self.graph_key,
            sorted(self.symbols.items()),
            (options.flavour.name, options.flavour.version, options.targets, options.tf32),
            (self.fingerprint, self.part, self.instance) if self.part else None,
            hash_plugins() if self._plugins else None,
        )

    @property
    def _plugins(self) -> bool:
        return self.component.name in self.options.plugins

    @property
    def record(self) -> PlanRecord:
        flavour = self.options.flavour
        return PlanRecord(
            file=f"plans/{flavour.name}-{flavour.version}/{self.key[:32]}.plan",
            runtime=flavour.name,
            version=flavour.version,
            targets=self.options.targets,
            symbols=dict(self.symbols),
            tf32=self.options.tf32,
            part=self.part,
            instance=self.instance,
            plugins=self._plugins,
        )

    @property
    def piece(self) -> Piece:
        baked = self._weight_bytes if self.part else 0
        layers = len({name.split(".")[1] for name in self.component.weights if _in_layer(name)})
        bound = (BOUND_BYTES + layers * BOUND_LAYER_BYTES) * len(self.options.targets)
        return Piece(
            name=self._name,
            key=self.key,
            size=baked + bound,
            make=self.make,
            memory=BUILDER_BYTES + 2 * baked,
            gpu_memory=0 if self.options.flavour.builds_without_gpu else self._gpu_bytes,
            bakes=self.part,
        )

    @property
    def _name(self) -> str:
        words = ["plan", Path(self.graph).stem, self.label]
        if self.part and self.siblings > 1:
            words.append(f"{self.part} {self.instance}")
        return " ".join(filter(None, words))

    @property
    def _weight_bytes(self) -> int:
        return sum(
            spec.dtype.itemsize * prod(spec.concrete({}))
            for spec in self.component.weights.values()
        )

    @property
    def _gpu_bytes(self) -> int:
        """What TensorRT needs at least to try kernels: weights, inputs and outputs."""
        largest = {symbol: size for symbol, (_, _, size) in self.symbols.items()}
        specs = (*self.component.inputs.values(), *self.component.outputs.values())
        return self._weight_bytes + sum(
            spec.dtype.itemsize * prod(spec.concrete(largest)) for spec in specs
        )

    def make(self, root: Path, progress: Progress) -> list[Path]:
        """Take the plan from the cache, where it is compiled if need be, into the bundle."""
        baked: Mapping[str, Tensor] = {}
        if self.part is not None and self.instance is not None:
            names = self.component.instances[self.instance]
            baked = self.weights.read(root, self.part, names, progress)
        request = PlanRequest(
            component=self.component,
            graph=root / self.graph,
            symbols=self.symbols,
            targets=self.options.targets,
            baked=baked,
            tf32=self.options.tf32,
            plugins=self._plugins,
        )
        entry = obtain(self.options.flavour, request, progress)
        path = root / self.record.file
        path.parent.mkdir(parents=True, exist_ok=True)
        place(entry.path, path)
        return [path]


def component_plans(
    checkpoint: Checkpoint,
    options: PlanOptions,
    weights: PreparedWeights,
    component: Component,
    record: ComponentRecord,
    graph_key: str,
) -> Iterator[Plan]:
    """The plans of a component; none where TensorRT has no kernels for it."""
    if has_no_kernels(component, options.targets):
        return
    bake = options.bakes(component)
    owners: list[tuple[str, int] | tuple[None, None]] = [(None, None)]
    if bake:
        instances = range(len(component.instances))
        owners = [(part, instance) for part in record.parts for instance in instances]
    for label, symbols in options.symbols(checkpoint.variant, component):
        for part, instance in owners:
            yield Plan(
                component=component,
                graph=record.graph,
                graph_key=graph_key,
                label=label,
                symbols=symbols,
                options=options,
                weights=weights,
                fingerprint=checkpoint.fingerprint if bake else "",
                part=part,
                instance=instance,
                siblings=len(owners),
            )


def place(source: Path, path: Path) -> None:
    """Have a file at another place too: a second name where the file system can, else a copy."""
    part = path.with_name(path.name + PART_SUFFIX)
    part.unlink(missing_ok=True)
    try:
        os.link(source, part)
    except OSError:
        shutil.copyfile(source, part)
    part.replace(path)


def _in_layer(name: str) -> bool:
    return name.startswith(("blocks.", "layers."))
