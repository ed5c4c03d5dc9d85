"""The pieces of a build: what can be built, kept or found damaged by itself.

A piece has a key that holds all that decides its content. `build-log.json` remembers the files made
under a key; it is the memory of the build and no part of the bundle: without it, pieces are made
again, with the same bytes.
"""

import hashlib
import json
import os
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path

from wantrt import __version__
from wantrt.bundle import BUILD_LOG, FOLDERS, MANIFEST, describe_file, is_inside, list_files
from wantrt.config import VARIANTS, Variant
from wantrt.errors import BuildError
from wantrt.folder import Progress, cache_folder, remembered_sha256, sha256_of, write_json
from wantrt.manifest import FileRecord
from wantrt.records import from_plain, to_plain

TOOLS = ("torch", "onnx")
SPARE_BYTES = 2**26  # left free on the disk beside what the build needs
Shape = tuple[int, int, int]  # of a video: width, height, frames


@dataclass(frozen=True)
class Piece:
    """Something that is built by itself. `make` writes it below a folder and returns its files.

    The first word of its name is its kind.
    """

    name: str
    key: str
    size: int  # in bytes, about
    make: Callable[[Path, Progress], list[Path]]
    memory: int = 0  # what `make` allocates, in bytes, about; where it is worth a check
    gpu_memory: int = 0  # the same on the GPU of this machine, at least
    bakes: str | None = None  # the part whose weights go into it

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]


@dataclass(frozen=True, kw_only=True)
class Built:
    """A piece as it was made; `mtimes` in ns tell whether a file has been touched since."""

    key: str
    seconds: float
    files: dict[str, FileRecord]
    mtimes: dict[str, int]


Made = tuple[str, Built]  # the name of a piece, and how it was made


@dataclass(frozen=True, kw_only=True)
class BuildLog:
    """What this machine did. `checkpoint` and `variant` are as asked for, None if they were not.

    shapes: the videos that the plans serve; a later build adds to them. measured: by what a choice
    left to us (`--weights auto`, `--plugins auto`) was decided, seconds a run. manifest: the sha256
    of the finished bundle's. receipt: see wantrt/receipt.py.
    """

    checkpoint: str | None
    fingerprint: str
    pieces: dict[str, Built]
    variant: str | None = None
    shapes: tuple[Shape, ...] = ()
    measured: dict[str, float] = field(default_factory=dict)
    manifest: str | None = None
    receipt: str | None = None


def make_key(*ingredients: object) -> str:
    """Anything in it that changes gives another key; so do our version and that of the tools."""
    return hashlib.sha256(repr((tool_versions(), ingredients)).encode()).hexdigest()


def tool_versions() -> dict[str, str]:
    return {"wantrt": __version__, **{tool: _version(tool) for tool in TOOLS}}


_version = cache(version)  # it reads files


def read_log(root: Path) -> BuildLog | None:
    """None if there is none that can be read, or it speaks of files that are not a bundle's."""
    try:
        log = from_plain(BuildLog, json.loads((root / BUILD_LOG).read_bytes()))
    except (OSError, ValueError, RecursionError):
        return None
    sound = all(
        built.files.keys() == built.mtimes.keys() and all(map(is_inside, built.files))
        for built in log.pieces.values()
    )
    return log if sound else None


def variant_to_ask(variant: Variant, log: BuildLog | None) -> str | None:
    """The --variant that opens a bundle's checkpoint again; None: without one.

    A checkpoint of dimensions of its own is `custom`, and one of several is `hybrid`, which are no
    names to ask for.
    """
    if variant.name in VARIANTS:
        return variant.name
    return log.variant if log else None


def write_log(root: Path, log: BuildLog) -> None:
    write_json(root / BUILD_LOG, to_plain(log))


def is_there(root: Path, piece: Piece, log: BuildLog | None) -> bool:
    """Whether the piece was made, and its files have since neither changed nor gone."""
    built = log.pieces.get(piece.name) if log else None
    return (
        built is not None
        and built.key == piece.key
        and all(_is_intact(root / name, name, built) for name in built.files)
    )


def is_untouched(root: Path, log: BuildLog) -> bool:
    """Whether the bundle is finished, and holds the files of its pieces and no others; quick."""
    try:
        manifest = hashlib.sha256((root / MANIFEST).read_bytes()).hexdigest()
    except OSError:
        return False
    expected = {name: built for built in log.pieces.values() for name in built.files}
    return (
        manifest == log.manifest
        and expected.keys() == set(list_files(root))
        and all(_is_unchanged(root / name, name, built) for name, built in expected.items())
    )


def is_sound(root: Path, built: Built, progress: Progress) -> bool:
    """The same by its bytes; those of weights, which are many, from memory where they are known."""
    return all(
        (remembered_sha256 if record.header_sha256 else sha256_of)(root / name, progress)
        == record.sha256
        for name, record in built.files.items()
    )


def _is_intact(path: Path, name: str, built: Built) -> bool:
    """As it was by size and mtime, else (the bundle was copied) by its bytes."""
    if _is_unchanged(path, name, built):
        return True
    record = built.files[name]
    if path.is_symlink() or not path.is_file() or path.stat().st_size != record.size:
        return False
    return remembered_sha256(path) == record.sha256


def _is_unchanged(path: Path, name: str, built: Built) -> bool:
    if path.is_symlink() or not path.is_file():
        return False
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (built.files[name].size, built.mtimes[name])


def make(root: Path, pieces: Sequence[Piece], progress: Progress, jobs: int = 1) -> Iterator[Made]:
    """Make pieces in their order, plans last, of which `jobs` at once: each when it is finished.

    What a piece reports appears under its number and name. If one fails, or whoever asked for them
    does not go on, the others stop.
    """
    last = [(label, piece) for label, piece in _numbered(pieces) if piece.kind == "plan"]
    if jobs == 1 or len(last) < 2:
        for label, piece in _numbered(pieces):
            yield _record(root, piece, _write(root, piece, progress, label), progress)
        return
    yield from make(root, [piece for piece in pieces if piece.kind != "plan"], progress)
    stopped = False

    def report(what: str, done: int, total: int) -> None:
        with lock:
            if stopped:
                raise KeyboardInterrupt
            progress(what, done, total)

    lock = threading.Lock()
    with ThreadPoolExecutor(jobs) as threads:
        written = {threads.submit(_write, root, piece, report, name): piece for name, piece in last}
        try:
            for future in as_completed(written):
                yield _record(root, written[future], future.result(), report)
        except BaseException:
            from wantrt.engines.apart import stop_compilers

            stopped = True
            threads.shutdown(wait=False, cancel_futures=True)
            stop_compilers()
            raise


def _numbered(pieces: Sequence[Piece]) -> Iterator[tuple[str, Piece]]:
    """Each piece with what to call it: "plan 7 of 23 · dit_stack 832x480x81"."""
    totals = Counter(piece.kind for piece in pieces)
    seen: Counter[str] = Counter()
    for piece in pieces:
        seen[piece.kind] += 1
        what = piece.name.removeprefix(piece.kind).strip()
        count = f"{piece.kind} {seen[piece.kind]} of {totals[piece.kind]}"
        yield f"{count} · {what}" if what else piece.kind, piece


def _write(root: Path, piece: Piece, progress: Progress, label: str) -> tuple[list[Path], float]:
    """The files of a piece, and the seconds they took."""
    start = time.perf_counter()
    progress(label, 0, 1)
    paths = piece.make(root, lambda what, done, total: progress(label, done, total))
    return paths, time.perf_counter() - start


def _record(
    root: Path, piece: Piece, written: tuple[list[Path], float], progress: Progress
) -> Made:
    paths, seconds = written
    names = [path.relative_to(root).as_posix() for path in paths]
    return piece.name, Built(
        key=piece.key,
        seconds=round(seconds, 3),
        files={name: describe_file(root / name, progress) for name in names},
        mtimes={name: (root / name).stat().st_mtime_ns for name in names},
    )


def forget(root: Path, built: Built | None) -> None:
    """Delete what is left of a piece, so that nothing of it is taken for good."""
    for name in built.files if built else ():
        (root / name).unlink(missing_ok=True)


def remove_strangers(root: Path, pieces: Mapping[str, Built]) -> None:
    """Delete what an interrupted or an earlier build left in the bundle's own folders."""
    ours = {name for built in pieces.values() for name in built.files}
    for folder in FOLDERS:
        for path in sorted((root / folder).rglob("*"), reverse=True):  # contents before folders
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(root).as_posix() not in ours:
                path.unlink()


def check_room(
    root: Path, missing: Sequence[Piece], temporary_bytes: int = 0, jobs: int = 1
) -> None:
    """Raises BuildError, with the numbers, if disk or memory is too small for what is missing."""
    if not missing:
        return
    _check_disk(root, sum(piece.size for piece in missing) + temporary_bytes, "--out")
    plans = sum(piece.size for piece in missing if piece.kind == "plan")
    cache = cache_folder()
    if plans:
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BuildError(
                f"cannot keep plans in {cache}: {error}. Set XDG_CACHE_HOME to another folder."
            ) from error
        if cache.stat().st_dev != root.stat().st_dev:  # else both have one file
            _check_disk(cache, plans, "XDG_CACHE_HOME")
    largest = _largest(missing, jobs)
    needed, available = sum(piece.memory for piece in largest), available_memory()
    if needed > available:
        names, fewer = " and ".join(piece.name for piece in largest), ""
        if len(largest) > 1:
            names, fewer = f"{names} at once", "fewer --jobs, "
        raise BuildError(
            f"to build {names} takes about {needed / 2**30:.1f} GiB of memory, and "
            f"{available / 2**30:.1f} GiB are available. Close other programs, or take {fewer}a "
            "smaller --stack, or --weights bound."
        )
    _check_gpu(max(missing, key=lambda piece: piece.gpu_memory))


def fitting_jobs(missing: Sequence[Piece]) -> int:
    """One a core, as far as the memory allows that the largest pieces take together."""
    available = available_memory()
    for jobs in range(len(os.sched_getaffinity(0)), 1, -1):
        if sum(piece.memory for piece in _largest(missing, jobs)) <= available:
            return jobs
    return 1


def _largest(pieces: Sequence[Piece], count: int) -> list[Piece]:
    """Those that take the most memory."""
    return sorted(pieces, key=lambda piece: piece.memory, reverse=True)[:count]


def _check_disk(folder: Path, nbytes: int, setting: str) -> None:
    needed, free = nbytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if needed > free:
        raise BuildError(
            f"the build needs {needed / 2**20:,.0f} MiB in {folder}, and {free / 2**20:,.0f} MiB "
            f"are free there. Make room, or name another folder with {setting}."
        )


def _check_gpu(largest: Piece) -> None:
    if not largest.gpu_memory:
        return
    import torch

    free, _ = torch.cuda.mem_get_info()
    if largest.gpu_memory > free:
        raise BuildError(
            f"{largest.name} takes at least {largest.gpu_memory / 2**30:.1f} GiB of the GPU's "
            f"memory to build, and {free / 2**30:.1f} GiB are free. Free some, or take a smaller "
            "--stack or --size."
        )


def available_memory() -> int:
    """In bytes; where the system does not say (it is no Linux), all of it."""
    try:
        with open("/proc/meminfo") as lines:
            line = next(line for line in lines if line.startswith("MemAvailable"))
        return int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
