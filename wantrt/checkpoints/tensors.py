"""Stored tensors: what is in a file, from its header alone, and each tensor when it is asked for.

Files are mapped, never read whole: a tensor is a view of the page cache until something is computed
from it, so opening and reading cost no anonymous memory. Nothing in a file is trusted: sizes are
checked against the file before anything is allocated, and a pickle may hold nothing but tensors.
"""

import json
import mmap
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from wantrt.errors import CheckpointError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the format's own limit


class Stored(NamedTuple):
    """What a header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]


class StoredTensors(Protocol):
    """Named tensors of one part of a checkpoint. `read` may return a view of a mapped file."""

    @property
    def specs(self) -> Mapping[str, Stored]: ...

    def read(self, name: str) -> Tensor: ...


class SafetensorsFiles:
    """One safetensors file, or the shards of one model. A pickle of it holds their names alone."""

    def __init__(self, paths: list[Path]) -> None:
        self._paths = [path.absolute() for path in paths]
        self._places: dict[str, tuple[Path, int]] = {}
        self._maps: dict[Path, mmap.mmap] = {}
        self.specs: dict[str, Stored] = {}
        for path in paths:
            for name, (stored, offset) in read_header(path).items():
                if name in self.specs:
                    raise CheckpointError(
                        f"{name} is both in {self._places[name][0].name} and in {path.name} "
                        f"({path.parent}). Expected each tensor once; remove the file too many."
                    )
                self.specs[name] = stored
                self._places[name] = (path, offset)

    def read(self, name: str) -> Tensor:
        path, offset = self._places[name]
        stored = self.specs[name]
        if path not in self._maps:
            with path.open("rb") as file:  # copy-on-write: whoever changes a tensor changes no file
                self._maps[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        count = prod(stored.shape)
        if count == 0:
            return torch.empty(stored.shape, dtype=stored.dtype)
        flat = torch.frombuffer(
            self._maps[path], dtype=torch.uint8, offset=offset, count=count * stored.dtype.itemsize
        )
        if offset % stored.dtype.itemsize:
            flat = flat.clone()  # a view needs an aligned start
        return flat.view(stored.dtype).view(stored.shape)

    def __reduce__(self) -> tuple[type, tuple[list[Path]]]:
        return SafetensorsFiles, (self._paths,)


@dataclass(frozen=True)
class Renamed(Mapping[str, Tensor]):
    """Stored tensors under other names: `names` says what each is called in `files`."""

    files: StoredTensors
    names: Mapping[str, str]

    def __getitem__(self, name: str) -> Tensor:
        return self.files.read(self.names[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


class Unprefixed:
    """Stored tensors whose names may begin with `prefix`, under the rest of their names."""

    def __init__(self, files: StoredTensors, prefix: str) -> None:
        self._files = files
        self._names = {name.removeprefix(prefix): name for name in files.specs}
        self.specs = {short: files.specs[name] for short, name in self._names.items()}

    def read(self, name: str) -> Tensor:
        return self._files.read(self._names[name])


def read_header(path: Path) -> dict[str, tuple[Stored, int]]:
    """Dtype, shape and position in the file of every tensor, all checked against the file's size.

    Raises CheckpointError for a file that is no safetensors file, is truncated, or whose header
    claims more than there is.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, MAX_HEADER_BYTES):
            raise _damaged(path, f"its header claims {length:,} bytes, the file has {size:,}")
        text = file.read(length)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        entries = {name: _entry(entry) for name, entry in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _damaged(path, f"its header is not what safetensors writes ({error!r})") from error
    start, end = 8 + length, 8 + length
    tensors = {}
    for name, (stored, begin, stop) in sorted(entries.items(), key=lambda item: item[1][1:]):
        if start + begin != end or stop - begin != prod(stored.shape) * stored.dtype.itemsize:
            raise _damaged(path, f"the place of {name} does not fit its shape or its neighbours")
        end = start + stop
        tensors[name] = (stored, start + begin)
    if end != size:
        raise _damaged(path, f"its tensors take {end:,} bytes, the file has {size:,}")
    return tensors


def _entry(entry: dict[str, Any]) -> tuple[Stored, int, int]:
    shape, (begin, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(isinstance(n, int) and n >= 0 for n in (*shape, begin, stop)):
        raise ValueError(f"a size or offset is no natural number: {entry}")
    return Stored(DTYPES[entry["dtype"]], shape), begin, stop


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path} is damaged or incomplete: {what}. Download or copy it again.")


class PickledTensors:
    """A ``.pth`` file: a pickled dictionary of tensors, unpickled without running anything."""

    def __init__(self, path: Path) -> None:
        try:
            loaded = torch.load(
                path,
                map_location="cpu",
                weights_only=True,
                mmap=zipfile.is_zipfile(path),  # files of torch < 1.6 cannot be mapped
            )
        except pickle.UnpicklingError as error:
            raise CheckpointError(
                f"{path} holds objects that are not tensors. Expected a plain dictionary of "
                "tensors; unpickling anything else can run code and is refused. "
                f"({error!r:.200})"
            ) from error
        except Exception as error:  # torch raises whatever its parser stumbles over
            raise _damaged(path, f"torch cannot read it ({error!r:.200})") from error
        self._tensors = _only_tensors(path, loaded)
        self.specs = {name: Stored(t.dtype, tuple(t.shape)) for name, t in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


def _only_tensors(path: Path, loaded: object) -> dict[str, Tensor]:
    if not isinstance(loaded, dict):
        raise CheckpointError(
            f"{path} holds a {type(loaded).__name__}. Expected a dictionary of tensors by name."
        )
    for name, value in loaded.items():
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path} holds objects that are not tensors: {name!r} is a {type(value).__name__}. "
                "Expected a plain dictionary of tensors by name."
            )
        real = value.layout == torch.strided and value.device.type == "cpu"
        if not real or value.untyped_storage().nbytes() < value.numel() * value.itemsize:
            raise _damaged(path, f"{name} claims {tuple(value.shape)}, more than is stored")
    return {str(name): value for name, value in loaded.items()}
