"""A bundle: the folder that `wantrt build` makes and everything else reads.

    manifest.json    what it is: wantrt/manifest.py
    build-log.json   what the building machine did; neither checked nor needed
    tokenizer/  graphs/  weights/

Loading checks the manifest, that every file is there with its size, headers of weights and hashes
of the rest, and that nothing lies outside the folder: milliseconds. Weights, tens of gigabytes, are
hashed when written and by `check_hashes` (`wantrt verify`, `wantrt build --check`).
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from wantrt.config import Variant
from wantrt.errors import BundleError
from wantrt.folder import Progress, remembered_sha256, sha256_of, silent
from wantrt.manifest import ComponentRecord, FileRecord, Manifest, PlanRecord, read_manifest

if TYPE_CHECKING:
    from torch import Tensor

    from wantrt.models.components import Component
    from wantrt.models.ops import Ops

MANIFEST = "manifest.json"
BUILD_LOG = "build-log.json"
FOLDERS = ("tokenizer", "graphs", "weights", "plans")
LARGEST_MANIFEST_BYTES = 2**26
LARGEST_HEADER_BYTES = 10**8  # safetensors' own limit


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle; `fingerprint` (of the manifest) stands for all that is in it."""

    path: Path
    manifest: Manifest
    fingerprint: str

    @classmethod
    def load(cls, path: str | Path, *, checked: bool = True) -> "Bundle":
        """Raises BundleError for what is missing, altered, foreign, or made by a newer wantrt.

        checked: False is for the build, which has just looked at every file.
        """
        root = Path(path)
        content = _read_manifest_file(root)
        manifest = read_manifest(content, str(root / MANIFEST))
        bundle = cls(root, manifest, hashlib.sha256(content).hexdigest())
        bundle._check_references()
        if checked:
            bundle._check_files()
        return bundle

    @property
    def variant(self) -> Variant:
        return self.manifest.variant

    @property
    def settings(self) -> dict[str, object]:
        """What the checkpoint records about sampling (Diffusers' scheduler_config.json)."""
        return self.manifest.settings

    @property
    def precision(self) -> dict[str, str]:
        """Part -> fp32, bf16 or fp16."""
        return {name: part.precision for name, part in self.manifest.parts.items()}

    @property
    def stack(self) -> dict[str, int]:
        """Component -> layers a run, for those that run several times."""
        return {c.name: c.stack for c in self.manifest.components if c.stack is not None}

    @property
    def tokenizer(self) -> Path:
        if self.manifest.tokenizer is None:
            raise BundleError(
                f"{self.path} has no tokenizer: its checkpoint had none. "
                "Build it from a checkpoint with a tokenizer.json."
            )
        return self.path / self.manifest.tokenizer

    def graph(self, component: str, part: str) -> Path:
        """The ONNX file that `component` of `part` runs."""
        return self.path / self._record(component, part).graph

    def plans(self, component: str, part: str, runtime: str) -> tuple[PlanRecord, ...]:
        """The plans of `component` that serve `part` on `runtime`, in the order of their build."""
        return tuple(
            plan
            for plan in self._record(component, part).plans
            if plan.runtime == runtime and plan.part in (None, part)
        )

    def _record(self, component: str, part: str) -> ComponentRecord:
        for record in self.manifest.components:
            if record.name == component and part in record.parts:
                return record
        raise BundleError(f"{self.path} has no component {component} of {part}. Build again.")

    def components(self, part: str, ops: "Ops | None" = None) -> "list[Component]":
        """The components of a part, cut as they were for this bundle.

        ops: what their modules run with, plain torch if None.
        """
        from wantrt.models.components import part_components
        from wantrt.models.ops import TORCH_OPS
        from wantrt.session import PRECISIONS

        dtype = PRECISIONS[self.precision[part]]
        return part_components(self.variant, part, dtype, self.stack_of(part), ops or TORCH_OPS)

    def stack_of(self, part: str) -> int | None:
        """Layers a run of the part's stack, if it has one."""
        sizes = [c.stack for c in self.manifest.components if part in c.parts and c.stack]
        return sizes[0] if sizes else None

    def weights(self, part: str) -> "dict[str, Tensor]":
        """Prepared tensors by name, memory-mapped: pages are read when a tensor is used."""
        files = self.manifest.parts[part].weights
        if not files:
            raise BundleError(
                f"{self.path} has no weights of {part}: it was built with --no-weights. "
                "Run the same wantrt build without that option; it adds them."
            )
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        tensors: dict[str, Tensor] = {}
        for name in files:
            try:
                tensors |= load_file(self.path / name)
            except (SafetensorError, OSError) as error:
                raise _altered(self.path / name, str(error)) from error
        return tensors

    def check_hashes(self, progress: Progress = silent) -> None:
        """Hash every file, weights too. Raises BundleError that names all that were altered."""
        altered = [
            name
            for name, record in self.manifest.files.items()
            if remembered_sha256(self.path / name, progress) != record.sha256
        ]
        if altered:
            raise _altered(self.path, f"sha256 differs: {', '.join(altered)}")

    def _check_references(self) -> None:
        """What the manifest speaks of is in its list of files and inside the folder."""
        manifest = self.manifest
        needed = {f for part in manifest.parts.values() for f in part.weights}
        needed |= {component.graph for component in manifest.components}
        needed |= {plan.file for component in manifest.components for plan in component.plans}
        needed |= {manifest.tokenizer} if manifest.tokenizer else set()
        if unlisted := sorted(needed - set(manifest.files)):
            raise BundleError(f"{self.path / MANIFEST} does not list {', '.join(unlisted)}.")
        for name in manifest.files:
            if not is_inside(name):
                raise BundleError(f"{self.path / MANIFEST} names {name}, outside of its folders.")

    def _check_files(self) -> None:
        root = self.path.resolve()
        missing = [name for name in self.manifest.files if not (self.path / name).is_file()]
        if missing:
            raise BundleError(f"{self.path} lacks {', '.join(missing)}. {_build_again(self.path)}")
        for name, record in self.manifest.files.items():
            if (self.path / name).resolve() != root / name:
                raise BundleError(
                    f"{self.path / name} is a link, and links are not followed. "
                    "Put the file itself there."
                )
            check_file(self.path / name, record)
        if foreign := sorted(set(list_files(self.path)) - set(self.manifest.files)):
            raise BundleError(
                f"{self.path} holds what its manifest does not know: {', '.join(foreign)}.\n"
                "Delete it, or build again: wantrt build removes what is not the bundle's."
            )


def is_inside(name: str) -> bool:
    """Whether a path of a record stays in the bundle's own folders."""
    parts = name.split("/")  # an absolute path begins with an empty one
    return parts[0] in FOLDERS and not {"", ".", ".."} & set(parts) and "\\" not in name


def list_files(root: Path) -> list[str]:
    """All that lies in the bundle's own folders, links too."""
    return [
        path.relative_to(root).as_posix()
        for folder in FOLDERS
        for path in (root / folder).rglob("*")
        if not path.is_dir() or path.is_symlink()
    ]


def check_file(path: Path, record: FileRecord) -> None:
    """Size, and a weight file's header or another file's hash. Raises BundleError."""
    size = path.stat().st_size
    if size != record.size:
        raise _altered(path, f"{size} bytes instead of {record.size}")
    if record.header_sha256 is None:
        if sha256_of(path) != record.sha256:
            raise _altered(path, "sha256 differs")
    elif hash_header(path) != record.header_sha256:
        raise _altered(path, "the header differs")


def describe_file(path: Path, progress: Progress = silent) -> FileRecord:
    """The record of a file as it is now; reads all of it."""
    header = hash_header(path) if path.suffix == ".safetensors" else None
    sha256 = remembered_sha256(path, progress)
    return FileRecord(size=path.stat().st_size, sha256=sha256, header_sha256=header)


def hash_header(path: Path) -> str:
    """The sha256 of a safetensors header, its length included."""
    with path.open("rb") as file:
        length = file.read(8)
        header_bytes = int.from_bytes(length, "little")
        if header_bytes > min(LARGEST_HEADER_BYTES, path.stat().st_size):
            raise _altered(path, f"its header claims {header_bytes} bytes")
        return hashlib.sha256(length + file.read(header_bytes)).hexdigest()


def _read_manifest_file(root: Path) -> bytes:
    path = root / MANIFEST
    if not path.is_file():
        if (root / BUILD_LOG).is_file():
            raise BundleError(
                f"{root} is an unfinished bundle: its build was interrupted.\n"
                "Run the same wantrt build again; it goes on where it stopped."
            )
        raise BundleError(
            f"{root} is not a bundle: there is no {path}.\n"
            "Make one with: wantrt build --variant VARIANT --out BUNDLE"
        )
    if path.is_symlink() or path.stat().st_size > LARGEST_MANIFEST_BYTES:
        raise BundleError(f"{path} is a link or absurdly large: not a manifest of wantrt.")
    return path.read_bytes()


def _altered(path: Path, what: str) -> BundleError:
    return BundleError(f"{path} is not as it was built: {what}. {_build_again(path)}")


def _build_again(path: Path) -> str:
    return "Run the same wantrt build with --check; it rebuilds only what is damaged."
