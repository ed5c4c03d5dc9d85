"""Writes safetensors files as a stream: never more than one chunk of a tensor in memory.

The same tensors always give the same bytes. A file appears by rename, whole; what interrupts the
writing (Ctrl-C, a full disk) leaves nothing behind.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from wantrt.checkpoints.tensors import DTYPES
from wantrt.errors import BuildError

Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]  # name -> dtype and shape in the file
Progress = Callable[[int, int], None]  # bytes done, bytes in all
Pieces = Callable[[str], Sequence[Tensor]]  # name -> flat tensors that make it up, any dtype

DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
CHUNK = 1 << 24  # values converted at a time
ALIGNMENT = 64  # of the first tensor, so that those of even sizes start on a cache line


@dataclass(frozen=True)
class Shard:
    """The content of one file: a header, then the tensors in the header's order."""

    plan: Plan

    @property
    def nbytes(self) -> int:
        return sum(nbytes(spec) for spec in self.plan.values())

    @property
    def header(self) -> bytes:
        """Length and JSON, padded with spaces as the format allows."""
        sizes = [nbytes(spec) for spec in self.plan.values()]
        offsets = [sum(sizes[:n]) for n in range(len(sizes) + 1)]
        entries = {
            name: {"dtype": DTYPE_NAMES[dtype], "shape": shape, "data_offsets": place}
            for (name, (dtype, shape)), place in zip(
                self.plan.items(), pairwise(offsets), strict=True
            )
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
        padded = text.encode() + b" " * (-(len(text.encode()) + 8) % ALIGNMENT)
        return len(padded).to_bytes(8, "little") + padded


def nbytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return spec[0].itemsize * prod(spec[1])


def split_into_shards(plan: Plan, shard_bytes: int) -> list[Shard]:
    """Shards of at most `shard_bytes` (or one tensor), in order; wider dtypes first in each.

    With the wide ones first, every tensor starts at a multiple of its item size.
    """
    groups: list[dict[str, tuple[torch.dtype, tuple[int, ...]]]] = [{}]
    size = 0
    for name, spec in plan.items():
        if groups[-1] and size + nbytes(spec) > shard_bytes:
            groups.append({})
            size = 0
        groups[-1][name] = spec
        size += nbytes(spec)
    return [
        Shard(dict(sorted(group.items(), key=lambda item: -item[1][0].itemsize)))
        for group in groups
    ]


def write_shards(
    path: Path,
    plan: Plan,
    pieces: Pieces,
    shard_bytes: int,
    progress: Progress | None = None,
) -> dict[Path, Shard]:
    """Write tensors as one file, or as shards named ``<stem>-00001-of-00004.safetensors``."""
    shards = split_into_shards(plan, shard_bytes)
    total = sum(shard.nbytes for shard in shards)
    files: dict[Path, Shard] = {}
    for number, shard in enumerate(shards, start=1):
        suffix = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        before = sum(earlier.nbytes for earlier in files.values())

        def report(written: int, before: int = before) -> None:
            if progress is not None:
                progress(before + written, total)

        file = path.with_name(f"{path.stem}{suffix}.safetensors")
        write_safetensors(file, shard, pieces, report)
        files[file] = shard
    return files


def write_safetensors(
    path: Path, shard: Shard, pieces: Pieces, report: Callable[[int], None] = lambda written: None
) -> None:
    """Write one file. `report` is told the bytes of tensors written so far."""
    if _is_written(path, shard, pieces):
        report(shard.nbytes)
        return
    partial = path.with_name(f".{path.name}.partial")
    written = 0
    try:
        with partial.open("wb") as file:
            file.write(shard.header)
            for name, (dtype, _) in shard.plan.items():
                for chunk in _chunks(pieces(name), dtype):
                    file.write(_bytes(chunk))
                    written += chunk.nbytes
                    report(written)
        os.replace(partial, path)
    except OSError as error:
        raise BuildError(
            f"cannot write {path}: {error.strerror}. {shard.nbytes / 1e9:.1f} GB are needed there."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def _chunks(pieces: Sequence[Tensor], dtype: torch.dtype) -> Iterator[Tensor]:
    for piece in pieces:
        for chunk in piece.split(CHUNK):
            yield chunk.to(dtype)


def _bytes(values: Tensor) -> memoryview:
    return values.contiguous().view(torch.uint8).numpy().data


def _is_written(path: Path, shard: Shard, pieces: Pieces) -> bool:
    """Whether the file is there already: header, size, and the first values of every tensor."""
    header = shard.header
    if not path.is_file() or path.stat().st_size != len(header) + shard.nbytes:
        return False
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return False
        offset = len(header)
        for name, (dtype, shape) in shard.plan.items():
            expected = bytes(_bytes(pieces(name)[0][:ALIGNMENT].to(dtype)))
            file.seek(offset)
            if file.read(len(expected)) != expected:
                return False
            offset += nbytes((dtype, shape))
    return True
