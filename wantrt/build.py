"""The build: checkpoint → weights → graphs → bundle.

A bundle is made of pieces: the tokenizer, the weights of a part, one graph. A second build makes
nothing, a killed one goes on where it stopped, and a damaged piece is made again alone; all give
the same bytes. The manifest is written last: without one there is no bundle.

TensorRT plans will be further pieces, made from the graphs.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from wantrt.bundle import MANIFEST, Bundle
from wantrt.checkpoints import Checkpoint, open_checkpoint
from wantrt.checkpoints.opening import NANO
from wantrt.config import DiTConfig, Variant
from wantrt.errors import BuildError, BundleError, SettingsError
from wantrt.export.graph import export_component
from wantrt.export.ops import ONNX_OPS
from wantrt.folder import Progress, cache_folder, locked, sha256_of, silent, write_atomic
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
    check_space,
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
from wantrt.runtime.loading import choose_runtime
from wantrt.session import PRECISIONS, TensorSpec

TOKENIZER = "tokenizer/tokenizer.json"
GRAPH_BYTES = 2**16  # about; they hold no weights
CODE = ("config.py", "models", "export", "kernels")  # what decides the bytes of a graph
BUILT_FOR = {"onnxruntime": ("fp32",), "torch": ("fp32", "bf16")}  # runtime -> precisions


@dataclass(frozen=True)
class Build:
    """What is to be built, and into which folder. Nothing is written before `run`."""

    checkpoint: Checkpoint
    source: str | None  # the checkpoint as it was asked for
    out: Path
    precision: Mapping[str, str]  # part -> fp32 or bf16
    components: tuple[ComponentRecord, ...]
    pieces: tuple[Piece, ...]

    def missing(self) -> list[Piece]:
        """The pieces that are not there yet, or not as they were made."""
        log = read_log(self.out)
        return [piece for piece in self.pieces if not is_there(self.out, piece, log)]

    def run(
        self,
        *,
        check: bool = False,
        wait: bool = False,
        progress: Progress = silent,
    ) -> Bundle:
        """Build what is missing. With `check`, hash what is there and rebuild what is damaged.

        Raises BuildError: the folder holds something else, is being built by another process
        (unless `wait`), cannot be written, or the disk is too small.
        """
        self._refuse_strangers()
        with locked(self.out, wait):
            try:
                return self._run(check, progress)
            except OSError as error:
                raise BuildError(f"cannot write into {self.out}: {error}") from error

    def _run(self, check: bool, progress: Progress) -> Bundle:
        log = read_log(self.out)
        before = log.pieces if log else {}
        built = {
            piece.name: before[piece.name]
            for piece in self.pieces
            if is_there(self.out, piece, log)
            and (not check or is_sound(self.out, before[piece.name], progress))
        }
        missing = [piece for piece in self.pieces if piece.name not in built]
        check_space(self.out, missing)
        if missing:
            (self.out / MANIFEST).unlink(missing_ok=True)
        for piece in missing:
            forget(self.out, before.get(piece.name))
            built[piece.name] = make(self.out, piece, progress)
            write_log(
                self.out,
                BuildLog(
                    checkpoint=self.source, fingerprint=self.checkpoint.fingerprint, pieces=built
                ),
            )
        remove_strangers(self.out, built)
        self._write_manifest(built)
        return Bundle.load(self.out)

    def _write_manifest(self, built: Mapping[str, Built]) -> None:
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

    def _refuse_strangers(self) -> None:
        """A folder that holds something else stays as it is."""
        if not self.out.exists():
            return
        if not self.out.is_dir():
            raise BuildError(f"{self.out} is a file; name a folder with --out.")
        origin = _origin(self.out)
        if origin is None and {path.name for path in self.out.iterdir()} - {".lock"}:
            raise BuildError(
                f"{self.out} holds other things than a bundle. "
                "Name a new or empty folder with --out."
            )
        if origin not in (None, self.checkpoint.fingerprint):
            raise BuildError(
                f"{self.out} is a bundle of another checkpoint. Name another --out, or delete it."
            )


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
    runtime: str = "auto",
    precision: str | None = None,
    stack: int | None = None,
    with_weights: bool = True,
) -> Build:
    """Open and check the checkpoint, and say what is to be built.

    checkpoint: a folder, a Hugging Face repository id, "random:SEED"; None is the variant's own.
    out: None is `<variant>-<precision>` in the current folder. precision: None is the runtime's
    default. stack: transformer blocks a run; None is the largest divisor of their number up to 10.
    Raises SettingsError, UnsupportedTaskError, CheckpointError.
    """
    chosen = choose_precision(runtime, precision)
    opened = open_checkpoint(checkpoint, variant)
    folder = Path(out) if out is not None else Path(f"{opened.variant.name}-{chosen}")
    parts = dict.fromkeys(opened.parts, chosen)
    pieces = [_tokenizer_piece(opened.tokenizer)] if opened.tokenizer else []
    if with_weights:
        pieces += [_weights_piece(opened, part, chosen) for part in parts]
    components: list[ComponentRecord] = []
    code = _hash_code()
    for sharing in _parts_by_graphs(opened.variant):
        part = sharing[0]
        config = opened.parts[part].config
        depth = stack if isinstance(config, DiTConfig) else None
        for component in part_components(opened.variant, part, PRECISIONS[chosen], depth, ONNX_OPS):
            graph = f"graphs/{component.name}.onnx"
            if graph in {record.graph for record in components}:
                graph = f"graphs/{component.name}-{part}.onnx"  # an expert of other dimensions
            record = _record(component, sharing, graph, getattr(config, "num_layers", 0))
            key = make_key(code, config, chosen, record)
            components.append(record)
            pieces.append(_graph_piece(component, key, graph))
    return Build(opened, checkpoint, folder, parts, tuple(components), tuple(pieces))


def default_bundle(progress: Progress = silent) -> Bundle:
    """The nano checkpoint that ships with wantrt, built once into the user's cache folder."""
    key = make_key(_hash_files(NANO), _hash_code())
    folder = cache_folder() / "bundles" / f"nano-{key[:16]}"
    try:
        return Bundle.load(folder)
    except BundleError:  # not there yet, or damaged
        plan = plan_build(variant="nano", out=folder, precision="fp32")
        return plan.run(wait=True, progress=progress)


def choose_precision(runtime: str, precision: str | None) -> str:
    """The precision to build in. Raises for what `runtime`, or every runtime of today, lacks."""
    if runtime == "auto":
        served = tuple(dict.fromkeys(p for some in BUILT_FOR.values() for p in some))
    else:
        choose_runtime(runtime, ())
        served = BUILT_FOR[runtime]
    if precision is None:
        return "bf16" if choose_runtime(runtime, ()).on_gpu() else "fp32"
    check_name("precision", precision, tuple(PRECISIONS))
    if precision not in served:
        reason = "UMT5 overflows in fp16" if precision == "fp16" else f"{runtime} does not run it"
        raise SettingsError(f"no bundle in {precision}: {reason}. Take {' or '.join(served)}.")
    return precision


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
    return [("text_encoder",), *experts.values(), ("vae",)]


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
