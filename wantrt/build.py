"""The build: checkpoint → weights → graphs → plans → bundle.

A bundle is made of pieces: the tokenizer, the weights of a part, one graph, one TensorRT plan. A
second build makes nothing, a killed one goes on where it stopped, and a damaged piece is made again
alone; all give the same bytes. The manifest is written last: without one there is no bundle.
"""

import hashlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from wantrt.bundle import BUILD_LOG, MANIFEST, Bundle
from wantrt.checkpoints import Checkpoint, open_checkpoint
from wantrt.config import SHIPPED, DiTConfig, Size, Variant
from wantrt.errors import BuildError, BundleError, SettingsError, UnsupportedTaskError
from wantrt.experts import ExpertRange, parse_experts, write_experts
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.folder import (
    PART_SUFFIX,
    Progress,
    cache_folder,
    locked,
    sha256_of,
    silent,
    write_atomic,
)
from wantrt.manifest import (
    CheckpointRecord,
    ComponentRecord,
    Manifest,
    PartRecord,
    TensorRecord,
    manifest_bytes,
    read_manifest,
)
from wantrt.models.components import Component, part_components
from wantrt.names import check_name
from wantrt.pieces import (
    BuildLog,
    Built,
    Piece,
    Shape,
    check_room,
    fitting_jobs,
    forget,
    is_sound,
    is_there,
    make,
    make_key,
    read_log,
    remove_strangers,
    tool_versions,
    write_log,
)
from wantrt.runtime.loading import RUNTIMES, choose_runtime
from wantrt.session import PRECISIONS, TensorSpec

if TYPE_CHECKING:
    from wantrt.engines.measure import Measured
    from wantrt.plans import PlanOptions, PreparedWeights

log = logging.getLogger("wantrt")

TOKENIZER = "tokenizer/tokenizer.json"
GRAPH_BYTES = 2**16  # about; they hold no weights
CODE = ("config.py", "models", "export")  # what decides the bytes of a graph
TURING = ("sm75",)
UNFINISHED = {".lock", BUILD_LOG + PART_SUFFIX}  # what a build leaves that was killed at its start


@dataclass(frozen=True)
class Build:
    """What is to be built, and into which folder. Nothing is written before `run`."""

    checkpoint: Checkpoint
    source: str | None  # the checkpoint as it was asked for
    variant: str | None  # likewise
    out: Path
    precision: Mapping[str, str]  # part -> fp32, bf16 or fp16
    components: tuple[ComponentRecord, ...]
    pieces: tuple[Piece, ...]
    shapes: tuple[Shape, ...] = ()  # the videos that the plans serve
    to_bake: "PreparedWeights | None" = None
    measured: Mapping[str, float] = field(default_factory=dict)  # see BuildLog
    decide: "Callable[[Progress], Build] | None" = None  # what `run` has to find out first

    def missing(self) -> list[Piece]:
        """The pieces that are not there yet, or not as they were made."""
        log = read_log(self.out)
        return [piece for piece in self.pieces if not is_there(self.out, piece, log)]

    def run(
        self,
        *,
        check: bool = False,
        wait: bool = False,
        jobs: int | None = None,
        progress: Progress = silent,
        receipt: str | None = None,
    ) -> Bundle:
        """Build what is missing. With `check`, hash what is there and rebuild what is damaged.

        jobs: plans compiled at once; None is one a core, as far as memory allows. Where a GPU times
        kernels it is one in any case.
        receipt: see wantrt/receipt.py. Raises BuildError: the folder holds something else, is being
        built by another process (unless `wait`), cannot be written, disk or memory is too small, or
        TensorRT does not build a plan. Ctrl-C ends it between two pieces, and within a plan.
        """
        if self.decide:
            decided = self.decide(progress)
            return decided.run(
                check=check, wait=wait, jobs=jobs, progress=progress, receipt=receipt
            )
        if jobs is not None and jobs < 1:
            raise SettingsError(f"jobs is {jobs}; use 1 or more")
        self._refuse_strangers()
        with locked(self.out, wait):
            try:
                return self._run(check, jobs, progress, receipt)
            except OSError as error:
                raise BuildError(f"cannot write into {self.out}: {error}") from error
            finally:
                if self.to_bake:
                    self.to_bake.close(self.out)

    def _run(
        self, check: bool, jobs: int | None, progress: Progress, receipt: str | None
    ) -> Bundle:
        log = read_log(self.out)
        before = log.pieces if log else {}
        built = {
            piece.name: before[piece.name]
            for piece in self.pieces
            if is_there(self.out, piece, log)
            and (not check or is_sound(self.out, before[piece.name], progress))
        }
        missing = [piece for piece in self.pieces if piece.name not in built]
        baked = {piece.bakes for piece in missing if piece.bakes}
        temporary = self.to_bake.temporary_bytes(baked) if self.to_bake else 0
        jobs = _choose_jobs(jobs, missing)
        check_room(self.out, missing, temporary, jobs)
        if missing:
            (self.out / MANIFEST).unlink(missing_ok=True)
        for piece in missing:  # before the first is made: a killed build must not find them again
            forget(self.out, before.get(piece.name))
        if missing:
            self._write_log(built)
        for name, made in make(self.out, missing, progress, jobs):
            built[name] = made
            self._write_log(built)
        remove_strangers(self.out, built)
        manifest = self._write_manifest(built)
        if receipt is None and log is not None and not missing and built.keys() == before.keys():
            receipt = log.receipt
        self._write_log(built, sha256_of(manifest), receipt)
        return Bundle.load(self.out, checked=False)

    def _write_log(
        self, built: Mapping[str, Built], manifest: str | None = None, receipt: str | None = None
    ) -> None:
        log = BuildLog(
            checkpoint=self.source,
            variant=self.variant,
            fingerprint=self.checkpoint.fingerprint,
            pieces=dict(built),
            shapes=self.shapes,
            measured=dict(self.measured),
            manifest=manifest,
            receipt=receipt,
        )
        if read_log(self.out) != log:
            write_log(self.out, log)

    def _write_manifest(self, built: Mapping[str, Built]) -> Path:
        checkpoint = self.checkpoint
        files = {name: record for piece in built.values() for name, record in piece.files.items()}
        parts = {
            part: PartRecord(
                precision=precision,
                weights=tuple(built[name].files) if (name := f"weights {part}") in built else (),
            )
            for part, precision in self.precision.items()
        }
        manifest = Manifest(
            variant=checkpoint.variant,
            checkpoint=CheckpointRecord(
                fingerprint=checkpoint.fingerprint, layout=checkpoint.layout or "generated"
            ),
            settings=dict(checkpoint.settings),
            parts=parts,
            components=self.components,
            tokenizer=TOKENIZER if TOKENIZER in files else None,
            tools=tool_versions(),
            files=dict(sorted(files.items())),
        )
        path, content = self.out / MANIFEST, manifest_bytes(manifest)
        if not path.is_file() or path.read_bytes() != content:
            write_atomic(path, content)
        return path

    def _refuse_strangers(self) -> None:
        """A folder that holds something else stays as it is."""
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise BuildError(f"{self.out} is a file; name a folder with --out.")
        origin = _origin(self.out)
        if origin is None and {path.name for path in self.out.iterdir()} - UNFINISHED:
            raise BuildError(
                f"{self.out} holds other things than a bundle. "
                "Name a new or empty folder with --out."
            )
        if origin not in (None, self.checkpoint.fingerprint):
            raise BuildError(
                f"{self.out} is a bundle of another checkpoint. Name another --out, or delete it."
            )
        log = read_log(self.out)
        planned = {name for name in log.pieces if name.startswith("plan ")} if log else set()
        if planned and not any(piece.kind == "plan" for piece in self.pieces):
            raise BuildError(
                f"{self.out} has TensorRT plans, which this build would delete. Say --runtime "
                "tensorrt-rtx (or tensorrt) to keep them, or name another --out."
            )


def _choose_jobs(asked: int | None, missing: Sequence[Piece]) -> int:
    """How many plans are compiled at once."""
    if not any(piece.kind == "plan" for piece in missing) or asked == 1:
        return 1
    from wantrt.engines.apart import builds_in_place

    if builds_in_place():
        if asked is not None:
            log.info("plans are compiled one at a time: this machine's GPU times their kernels")
        return 1
    return asked or fitting_jobs(missing)


def _origin(root: Path) -> str | None:
    """The fingerprint of the checkpoint that a finished or unfinished bundle is built from."""
    if log := read_log(root):
        return log.fingerprint
    try:
        manifest = read_manifest((root / MANIFEST).read_bytes(), str(root))
    except (OSError, BundleError):
        return None
    return manifest.checkpoint.fingerprint


def plan_build(
    checkpoint: str | None = None,
    variant: str | None = None,
    out: str | Path | None = None,
    *,
    experts: str | Sequence[ExpertRange] | None = None,
    runtime: str = "auto",
    precision: str | None = None,
    stack: int | None = None,
    with_weights: bool = True,
    sizes: Sequence[Size] | None = None,
    frames: Sequence[int] | None = None,
    targets: Sequence[str] | None = None,
    weights: str = "auto",
    plugins: str = "auto",
    dynamic: bool = False,
    tf32: bool = False,
) -> Build:
    """Open and check the checkpoint, and say what is to be built.

    checkpoint: a folder, a Hugging Face repository id, "random:SEED"; None is the variant's own.
    experts: instead of both, those of a hybrid schedule, as `--experts` takes them or one by one
    (wantrt/experts.py). out: None is `<variant>-<precision>` in the current folder. precision: None
    is the runtime's default. stack: transformer blocks a run; None is the largest divisor of their
    number up to 10.

    For TensorRT's runtimes alone: every size is planned at every number of frames, besides what the
    bundle has plans for already; None is the variant's default. targets: "sm89"; None is the GPU
    of this machine, or what is common. weights: "bound" keeps them apart from the plans, except the
    VAE's, "baked" puts all into them. plugins: "on" takes our kernels into plans of `tensorrt`,
    "off" leaves all to it. "auto" of either takes the faster where that can be measured. dynamic:
    one plan for all sizes. tf32: allow it for what is float32.
    Raises SettingsError, UnsupportedTaskError, CheckpointError, RuntimeUnavailableError.
    """
    for_plans = {
        "--size": sizes,
        "--frames": frames,
        "--target": targets,
        "--weights": weights != "auto",
        "--plugins": plugins != "auto",
        "--dynamic": dynamic,
        "--tf32": tf32,
    }
    runtime = _choose_runtime(
        runtime, precision, [name for name, given in for_plans.items() if given]
    )
    chosen = choose_precision(runtime, precision, targets)
    if experts is not None:
        checkpoint = _experts_as_checkpoint(experts, checkpoint, variant)
    opened = open_checkpoint(checkpoint, variant)
    folder = Path(out) if out is not None else Path(f"{opened.variant.name}-{chosen}")
    parts = {part: _part_precision(part, chosen) for part in opened.parts}
    pieces = [_tokenizer_piece(opened.tokenizer)] if opened.tokenizer else []
    if with_weights:
        pieces += [_weights_piece(opened, part, parts[part]) for part in parts]
    graphs = _plan_graphs(opened, parts, stack)
    pieces += [_graph_piece(graph.component, graph.key, graph.record.graph) for graph in graphs]
    components = tuple(graph.record for graph in graphs)
    build = Build(opened, checkpoint, variant, folder, parts, components, tuple(pieces))
    if not RUNTIMES[runtime].compiled:
        return build
    from wantrt.plans import choose_options

    log = read_log(folder)
    options = choose_options(
        opened.variant,
        runtime,
        chosen,
        sizes=sizes,
        frames=frames,
        targets=targets,
        weights=weights,
        plugins=plugins,
        dynamic=dynamic,
        tf32=tf32,
        known=log.shapes if log and log.fingerprint == opened.fingerprint else (),
    )
    return _with_fastest_plans(
        build, graphs, options, with_weights, weights=weights, plugins=plugins
    )


def open_bundle(
    bundle: str | os.PathLike[str] | None = None, progress: Progress = silent
) -> Bundle:
    """A bundle by its folder, or by the name of a variant that ships with wantrt (None: nano).

    Of a folder and what ships under one name, it is the folder. Raises BundleError.
    """
    if bundle is None:
        return open_shipped("nano", progress)
    name = os.fspath(bundle)
    if name in SHIPPED and not os.path.isdir(name):
        return open_shipped(name, progress)
    return Bundle.load(Path(name))


def open_shipped(name: str, progress: Progress = silent) -> Bundle:
    """The bundle of a variant that ships, built once into the user's cache folder.

    name: one of `SHIPPED`; what lies in the current folder is no matter.
    """
    key = make_key(_hash_files(SHIPPED[name]), _hash_code())
    folder = cache_folder() / "bundles" / f"{name}-{key[:16]}"
    try:
        return Bundle.load(folder)
    except BundleError:  # not there yet, or damaged
        plan = plan_build(variant=name, out=folder, precision="fp32")
        return plan.run(wait=True, progress=progress)


def choose_precision(
    runtime: str, precision: str | None, targets: Sequence[str] | None = None
) -> str:
    """The precision to build in; `_part_precision` says which parts have another.

    Raises SettingsError and UnsupportedTaskError for what `runtime` does not run.
    """
    if RUNTIMES[runtime].compiled:
        from wantrt.engines.flavours import check_precision

        turing = bool(targets) and {target.lower() for target in targets or ()} <= set(TURING)
        chosen = precision or ("fp16" if turing else "bf16")
        check_precision(chosen, ())
        return chosen
    if precision is None:
        return "bf16" if choose_runtime(runtime, ()).on_gpu() else "fp32"
    served = RUNTIMES[runtime].precisions
    if precision not in served:
        raise SettingsError(
            f"no bundle in {precision}: {runtime} does not run it. Take {' or '.join(served)}."
        )
    return precision


def _experts_as_checkpoint(
    experts: str | Sequence[ExpertRange], checkpoint: str | None, variant: str | None
) -> str:
    if checkpoint is not None or variant is not None:
        raise SettingsError(
            "the experts name their checkpoints and variants: leave --checkpoint and --variant out"
        )
    return write_experts(parse_experts(experts) if isinstance(experts, str) else experts)


def _choose_runtime(requested: str, precision: str | None, plan_options: Sequence[str]) -> str:
    """The runtime to build for; `plan_options` are given and mean something to TensorRT alone."""
    check_name("runtime", requested, ("auto", *RUNTIMES))
    if precision is not None:
        check_name("precision", precision, (*PRECISIONS, "fp8"))
    if precision == "fp8":
        raise UnsupportedTaskError(
            f"precision fp8 is not there yet; today: {', '.join(PRECISIONS)}"
        )
    runtime = requested
    if requested == "auto":
        runtime = choose_runtime(None, (precision,) if precision else ()).name
        if RUNTIMES[runtime].compiled and precision == "fp32":
            runtime = "torch"  # plans have no fused attention in fp32
    elif not RUNTIMES[requested].compiled:
        choose_runtime(requested, ())
    if plan_options and not RUNTIMES[runtime].compiled:
        raise SettingsError(
            f"{', '.join(plan_options)}: for TensorRT plans alone, and this builds for {runtime}. "
            "Add --runtime tensorrt-rtx, or leave it out."
        )
    return runtime


def _part_precision(part: str, chosen: str) -> str:
    """The text encoder overflows in fp16. The image encoder is fp16 officially, its norms fp32."""
    return {("text_encoder", "fp16"): "fp32", ("image_encoder", "bf16"): "fp16"}.get(
        (part, chosen), chosen
    )


# -- Pieces ---------------------------------------------------------------------------------------


def _tokenizer_piece(path: Path) -> Piece:
    def copy(root: Path, progress: Progress) -> list[Path]:
        write_atomic(root / TOKENIZER, path.read_bytes())
        return [root / TOKENIZER]

    return Piece("tokenizer", make_key(sha256_of(path)), path.stat().st_size, copy)


def _weights_piece(checkpoint: Checkpoint, part: str, precision: str) -> Piece:
    dtype = PRECISIONS[precision]
    name = f"weights {part}"

    def write(root: Path, progress: Progress) -> list[Path]:
        path = root / "weights" / f"{part}.safetensors"
        path.parent.mkdir(exist_ok=True)
        return checkpoint.write(part, dtype, path, lambda done, total: progress(name, done, total))

    size = sum(tensor.nbytes for tensor in checkpoint.parts[part].module(dtype).parameters())
    return Piece(name, make_key(checkpoint.fingerprint, part, precision), size, write)


@dataclass(frozen=True)
class _Graph:
    """A component of a build, its record without plans, and the key of its graph."""

    component: Component
    record: ComponentRecord
    key: str


def _plan_graphs(
    checkpoint: Checkpoint, precision: Mapping[str, str], stack: int | None
) -> list[_Graph]:
    graphs: list[_Graph] = []
    code = _hash_code()
    for sharing in _parts_by_graphs(checkpoint.variant):
        part = sharing[0]
        config = checkpoint.parts[part].config
        depth = stack if isinstance(config, DiTConfig) else None
        dtype = PRECISIONS[precision[part]]
        for component in part_components(checkpoint.variant, part, dtype, depth, ONNX_OPS):
            path = f"graphs/{component.name}.onnx"
            if path in {graph.record.graph for graph in graphs}:
                path = f"graphs/{component.name}-{part}.onnx"  # an expert of other dimensions
            record = _record(component, sharing, path, getattr(config, "num_layers", 0))
            key = make_key(code, config, precision[part], record)
            graphs.append(_Graph(component, record, key))
    return graphs


def _with_plans(
    build: Build, graphs: Sequence[_Graph], options: "PlanOptions", with_weights: bool
) -> Build:
    from wantrt.plans import PreparedWeights, component_plans

    to_bake = PreparedWeights(build.checkpoint, build.precision, with_weights)
    plans = [
        tuple(
            component_plans(
                build.checkpoint, options, to_bake, graph.component, graph.record, graph.key
            )
        )
        for graph in graphs
    ]
    return replace(
        build,
        components=tuple(
            replace(graph.record, plans=tuple(plan.record for plan in some))
            for graph, some in zip(graphs, plans, strict=True)
        ),
        pieces=(*build.pieces, *(plan.piece for some in plans for plan in some)),
        shapes=options.shapes,
        to_bake=to_bake,
    )


def _with_fastest_plans(
    build: Build,
    graphs: Sequence[_Graph],
    options: "PlanOptions",
    with_weights: bool,
    *,
    weights: str,
    plugins: str,
) -> Build:
    """What is "auto", as it is known to be fastest here; else a build that finds out first."""
    from wantrt.plans import PLUGGED
    from wantrt.trial import make_trials, why_not_measured

    components = [graph.component for graph in graphs]
    trials = make_trials(build.checkpoint.variant, components, options, weights, plugins)
    if trials and (reason := why_not_measured(options)):
        if weights == "auto":
            log.info("weights stay bound, except the VAE's: %s; others: --weights baked", reason)
        trials = []
    if not trials:
        return _with_plans(build, graphs, options, with_weights)

    def take(found: "Sequence[Measured]") -> Build:
        chosen = options
        for trial, measured in zip(trials, found, strict=True):
            way = trial.fastest(measured)
            if trial.component.name == "dit_stack":
                chosen = replace(chosen, baked=way.baked)
            if way.plugins:
                chosen = replace(chosen, plugins=chosen.plugins | PLUGGED[trial.component.name])
        seconds = {
            f"{trial.component.name} {way}": time
            for trial, measured in zip(trials, found, strict=True)
            for way, time in measured.seconds.items()
        }
        return replace(_with_plans(build, graphs, chosen, with_weights), measured=seconds)

    known = [trial.recall() for trial in trials]
    if None not in known:
        return take([measured for measured in known if measured])
    undecided = _with_plans(build, graphs, options, with_weights)
    return replace(
        undecided,
        decide=lambda progress: take([t.recall() or t.run(progress) for t in trials]),
    )


def _graph_piece(component: Component, key: str, graph: str) -> Piece:
    name = f"graph {Path(graph).stem}"

    def export(root: Path, progress: Progress) -> list[Path]:
        progress(name, 0, 1)
        (root / graph).parent.mkdir(exist_ok=True)
        export_component(component, root / graph)
        progress(name, 1, 1)
        return [root / graph]

    return Piece(name, key, GRAPH_BYTES, export)


def _parts_by_graphs(variant: Variant) -> list[tuple[str, ...]]:
    """The parts, those together whose graphs are the same: experts of equal dimensions."""
    experts: dict[DiTConfig, tuple[str, ...]] = {}
    for expert in variant.experts:
        experts[expert.dit] = (*experts.get(expert.dit, ()), expert.name)
    encoders = [(part,) for part in ("text_encoder", "image_encoder") if part in variant.parts]
    return [*encoders, *experts.values(), ("vae",)]


def _record(
    component: Component, parts: tuple[str, ...], graph: str, layers: int
) -> ComponentRecord:
    """`layers`: how many the part has in all."""
    return ComponentRecord(
        name=component.name,
        parts=parts,
        inputs={name: _tensor_record(spec) for name, spec in component.inputs.items()},
        outputs={name: _tensor_record(spec) for name, spec in component.outputs.items()},
        graph=graph,
        stack=layers // len(component.instances) if component.name.endswith("_stack") else None,
    )


def _tensor_record(spec: TensorSpec) -> TensorRecord:
    return TensorRecord(dtype=str(spec.dtype).removeprefix("torch."), shape=spec.shape)


def _hash_code() -> str:
    """Of the modules that decide the bytes of a graph."""
    here = Path(__file__).parent
    return _hash_files(*(here / name for name in CODE))


def _hash_files(*places: Path) -> str:
    """Of files and of all files in folders: names and contents."""
    digest = hashlib.sha256()
    for place in places:
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(f"{path.relative_to(place.parent)} {sha256_of(path)}".encode())
    return digest.hexdigest()
