"""The plans that this user's machine has compiled, by content: compiled once, shared by bundles.

    plans/<key>.json       which plan a request gave; the key holds all that decides its bytes
    plans/<sha256>.plan    the plan

A file is named by its own hash and checked when it is used, so a damaged one is compiled again, and
processes that compile the same plan at once do not disturb each other. A plan is machine code: what
is here was compiled here, and `is_trusted` says so.
"""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor

from wantrt.engines.apart import build_apart
from wantrt.engines.flavours import Flavour
from wantrt.engines.plugins import hash_plugins
from wantrt.engines.requests import PlanRequest
from wantrt.errors import BuildError
from wantrt.folder import PART_SUFFIX, Progress, cache_folder, sha256_of, silent
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

CODE = ("network.py", "builder.py", "compiler.py")  # what of ours decides the bytes of a plan
ABANDONED_S = 24 * 3600  # an unfinished file of this age belongs to a process that was killed


@dataclass(frozen=True)
class Entry:
    """A plan in the cache."""

    path: Path
    sha256: str
    key: str


def obtain(flavour: Flavour, request: PlanRequest, progress: Progress = silent) -> Entry:
    """The plan of a request, from the cache or compiled into it.

    Raises what `build_plan` raises, and BuildError if the cache cannot be written.
    """
    key = plan_key(flavour, request)
    if entry := look_up(key):
        return entry
    try:
        _remove_abandoned()
        with _unfinished(key) as part:
            build_apart(flavour, request, part, progress)
            digest = sha256_of(part)
            entry = Entry(_folder() / f"{digest}.plan", digest, key)
            _finish(part, entry.path)
        with _unfinished(key) as part:
            part.write_text(json.dumps({"sha256": digest}))
            _finish(part, _record(key))
    except OSError as error:
        raise BuildError(
            f"cannot keep a plan in {_folder()}: {error}. "
            "Make room there, or set XDG_CACHE_HOME to another folder."
        ) from error
    return entry


def look_up(key: str) -> Entry | None:
    """The plan of a key, if it is there and whole."""
    try:
        digest = json.loads(_record(key).read_bytes())["sha256"]
        path = _folder() / f"{digest}.plan"
        return Entry(path, digest, key) if sha256_of(path) == digest else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def discard(entry: Entry) -> None:
    """Forget a plan that nobody will ask for again."""
    _record(entry.key).unlink(missing_ok=True)
    entry.path.unlink(missing_ok=True)


def is_trusted(digest: str) -> bool:
    """Whether this machine compiled the plan with this sha256 (for this user)."""
    return (_folder() / f"{digest}.plan").is_file()


def plan_key(flavour: Flavour, request: PlanRequest) -> str:
    """Anything that changes the plan gives another key; names and places of files do not."""
    ingredients = {
        "graph": sha256_of(request.graph),
        "symbols": {name: list(sizes) for name, sizes in request.symbols.items()},
        "targets": list(request.targets),
        "tf32": request.tf32,
        "baked": {name: _hash_tensor(tensor) for name, tensor in request.baked.items()},
        "flavour": [flavour.name, flavour.version],
        "cuda": None if flavour.builds_without_gpu else torch.version.cuda,
        "code": hash_code(),
        "plugins": hash_plugins() if request.plugins else None,
    }
    return sha256(json.dumps(ingredients, sort_keys=True).encode()).hexdigest()


@cache
def hash_code() -> str:
    """Of our modules that decide the bytes of a plan."""
    here = Path(__file__).parent
    return sha256(b"".join((here / name).read_bytes() for name in CODE)).hexdigest()


def _hash_tensor(tensor: Tensor) -> str:
    digest = sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _folder() -> Path:
    return cache_folder() / "plans"


def _record(key: str) -> Path:
    return _folder() / f"{key}.json"


@contextmanager
def _unfinished(key: str) -> Iterator[Path]:
    """A file of this thread alone, gone at the end of the block unless it was finished."""
    _folder().mkdir(parents=True, exist_ok=True)
    part = _folder() / f"{key}.{os.getpid()}.{threading.get_ident()}{PART_SUFFIX}"
    try:
        yield part
    finally:
        part.unlink(missing_ok=True)


def _finish(part: Path, path: Path) -> None:
    with part.open("rb") as file:
        os.fsync(file.fileno())
    part.replace(path)


def _remove_abandoned() -> None:
    for part in _folder().glob(f"*{PART_SUFFIX}"):
        with suppress(OSError):
            if time.time() - part.stat().st_mtime > ABANDONED_S:
                part.unlink()
