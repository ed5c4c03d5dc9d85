"""Files that are whole or absent, folders that one process builds at a time, and cached hashes."""

import fcntl
import hashlib
import json
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from wantrt.errors import BuildError

Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much

PART_SUFFIX = ".part"  # of a file that is still being written
CHUNK_BYTES = 2**24
RACY_NS = 2 * 10**9  # a file as young as this may change again without changing its mtime
HASHES_KEPT = 4096


def silent(what: str, done: int, total: int) -> None:
    """The progress of nobody listening."""


def write_atomic(path: Path, content: bytes) -> None:
    """Write a small file: after a crash it is there whole, or as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART_SUFFIX)
    with part.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: object) -> None:
    """UTF-8, indented, one trailing newline: the same value gives the same bytes."""
    write_atomic(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def cache_folder() -> Path:
    """Where wantrt keeps what it can make again: $XDG_CACHE_HOME/wantrt, else ~/.cache/wantrt."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "wantrt"


def sha256_of(path: Path, progress: Progress = silent) -> str:
    """Read all of a file and hash it; `progress` hears of the bytes read."""
    digest = hashlib.sha256()
    size, done = path.stat().st_size, 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            done += len(chunk)
            progress(f"hash {path.name}", done, size)
    return digest.hexdigest()


def remembered_sha256(path: Path, progress: Progress = silent) -> str:
    """`sha256_of`, remembered by (inode, size, mtime) in the user's cache folder."""
    status = path.stat()
    key = f"{status.st_dev}:{status.st_ino}:{status.st_size}:{status.st_mtime_ns}"
    memory = cache_folder() / "hashes.json"
    known = _load_hashes(memory)
    if key not in known:
        known[key] = sha256_of(path, progress)
        if time.time_ns() - status.st_mtime_ns > RACY_NS:
            with suppress(OSError):  # a cache that cannot be written costs time, nothing else
                write_json(memory, dict(list(known.items())[-HASHES_KEPT:]))
    return known[key]


def _load_hashes(memory: Path) -> dict[str, str]:
    try:
        known = json.loads(memory.read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


@contextmanager
def locked(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a folder, which is made if needed; it falls with the process.

    Raises BuildError that names the holder, unless `wait`.
    """
    path = folder / ".lock"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquire(path, wait)
    except BlockingIOError:
        raise BuildError(
            f"{folder} is being built by another process: {_holder(path)}.\n"
            "Wait until it has finished, or name another --out."
        ) from None
    except OSError as error:
        raise BuildError(f"cannot write into {folder}: {error.strerror}") from error
    try:
        holder = f"pid {os.getpid()} on {socket.gethostname()}, since {time.strftime('%H:%M:%S')}"
        os.truncate(descriptor, 0)
        os.write(descriptor, holder.encode())
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)


def _acquire(path: Path, wait: bool) -> int:
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # the one who held it may have deleted the file that we opened: then it locks nothing
            if path.exists() and path.stat().st_ino == os.fstat(descriptor).st_ino:
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _holder(path: Path) -> str:
    try:
        return path.read_text() or "unknown"
    except OSError:
        return "it has just finished"
