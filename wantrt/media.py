"""Writing video: mp4, gif, png or a folder of frames. Reading is in images.py and videos.py.

A file appears whole or not at all: it is written beside its place under another name and renamed at
the end; an error or Ctrl-C leaves nothing behind. How it was made travels inside it.
"""

import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from wantrt.encoders import ENCODERS, METADATA_KEY, Encoder, Frames
from wantrt.errors import MediaError
from wantrt.images import IMAGE_FORMATS

FORMATS = ".mp4, .gif, .png (one frame), or a folder of pngs (frames/)"
LARGEST_SHARE = {".mp4": 0.25, ".gif": 0.5, ".png": 1.1, "": 1.1}  # of the frames' bytes: noise
MARGIN_BYTES = 2**16


@dataclass(eq=False)
class Video:
    """Frames uint8 [F, H, W, 3], RGB. `timings`: seconds by phase; `metadata`: how it was made."""

    frames: Frames
    fps: float
    timings: dict[str, float] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str], overwrite: bool = False) -> Path:
        """Write .mp4, .gif, .png (one frame) or a folder of pngs; the suffix decides.

        Raises MediaError for a file that exists (unless `overwrite`) or cannot be written.
        """
        check_output(path, overwrite, self.frames.shape)
        with VideoWriter(path, self.fps, self.metadata, overwrite) as writer:
            writer.write(self.frames)
        return writer.path


class VideoWriter:
    """Write frames as they come: a chunk is encoded while the next one is being made.

        with VideoWriter("cat.mp4", fps=16) as writer:
            for frames in pipe.stream("a cat surfing"):
                writer.write(frames)

    Leaving the block by an exception deletes what was written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        fps: float,
        metadata: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.path = check_output(path, overwrite)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._format = format_of(path)
        self._fps = fps
        self._text = json.dumps(metadata or {})
        self._overwrite = overwrite
        part_name = f".{self.path.stem}.{uuid.uuid4().hex[:8]}.part{self._format}"
        self._part = self.path.with_name(part_name)
        self._worker = ThreadPoolExecutor(1, "wantrt-encode")
        self._pending: Future[None] | None = None
        self._encoder: Encoder | None = None
        self._frame_shape: tuple[int, ...] | None = None

    def write(self, frames: Frames) -> None:
        """Append uint8 [F, H, W, 3]. The array is read until the next `write`: do not change it."""
        if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise MediaError(
                f"expected frames uint8 [F, H, W, 3], got {frames.dtype} {list(frames.shape)}"
            )
        if self._frame_shape not in (None, frames.shape[1:]):
            raise MediaError(f"a frame of {frames.shape[1:]} after one of {self._frame_shape}")
        if self._format == ".png" and (self._frame_shape is not None or len(frames) > 1):
            raise MediaError(several_frames(self.path))
        self._frame_shape = frames.shape[1:]
        self._wait()
        self._pending = self._worker.submit(self._encode, frames)

    def _encode(self, frames: Frames) -> None:
        if self._encoder is None:
            make_encoder = ENCODERS[self._format]
            self._encoder = make_encoder(self._part, self._fps, self._text, frames)
        self._encoder.write(frames)

    def _wait(self) -> None:
        """Wait for the chunk being encoded; raise its error here."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except Exception as error:
            raise MediaError(f"cannot write {self.path}: {error}") from error

    def close(self) -> None:
        """Finish the file and put it in its place."""
        try:
            self._wait()
            if self._encoder is None:
                raise MediaError(f"no frames for {self.path}")
            self._pending = self._worker.submit(self._encoder.finish)
            self._wait()
            self._worker.shutdown()
            self._put_in_place()
        except BaseException:
            self.abandon()
            raise

    def _put_in_place(self) -> None:
        if self.path.exists() and not self._overwrite:
            kept, self._part = self._part, self._part.with_name(self._part.name + ".none")
            raise MediaError(f"{self.path} appeared in the meantime and stays; the video is {kept}")
        replaced = self._part.with_suffix(".replaced")
        try:
            if self.path.is_dir():  # a folder cannot be replaced by one rename
                self.path.replace(replaced)
            self._part.replace(self.path)
        except OSError as error:
            raise MediaError(f"cannot write {self.path}: {error}") from error
        if replaced.exists():
            shutil.rmtree(replaced)

    def abandon(self) -> None:
        """Stop and delete what was written. Safe to repeat."""
        self._worker.shutdown(wait=True, cancel_futures=True)
        encoder, self._encoder = self._encoder, None
        if encoder is not None:
            with suppress(Exception):  # it may be the full disk that brought us here
                encoder.abandon()
        if self._part.is_dir():
            shutil.rmtree(self._part)
        self._part.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            self.abandon()


def format_of(path: str | os.PathLike[str]) -> str:
    """The suffix that decides how to write: .mp4, .gif, .png; "" for a folder of pngs."""
    suffix = Path(path).suffix.lower()
    if str(path).endswith("/") or (Path(path).is_dir() and suffix not in ENCODERS):
        return ""
    if suffix not in ENCODERS:
        raise MediaError(f"cannot write {path}: no format for {suffix!r}; take {FORMATS}")
    return suffix


def check_output(
    path: str | os.PathLike[str], overwrite: bool = False, shape: tuple[int, ...] = (1, 0, 0, 3)
) -> Path:
    """Find out before any long work whether a video of `shape` [F, H, W, 3] can be saved at `path`.

    Raises MediaError for an unknown format, a file that exists (unless `overwrite`), several frames
    for one png, a folder that cannot be written, a disk without space. Leaves nothing behind.
    """
    target = Path(path)
    if str(path) == "-":
        raise MediaError(f"a video cannot go to standard output; name a file: {FORMATS}")
    kind = format_of(path)
    if kind == ".png" and shape[0] > 1:
        raise MediaError(several_frames(target))
    check_replaceable(target, kind, overwrite)
    folder = next(parent for parent in target.absolute().parents if parent.exists())
    needed_bytes = int(np.prod(shape) * LARGEST_SHARE[kind]) + MARGIN_BYTES
    try:
        free_bytes = shutil.disk_usage(folder).free
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(MARGIN_BYTES))
    except OSError as error:
        raise MediaError(f"cannot write {target}: {error.strerror} ({folder})") from error
    if free_bytes < needed_bytes:
        raise MediaError(
            f"cannot write {target}: it may take {needed_bytes / 2**20:.0f} MiB, "
            f"and {folder} has {free_bytes / 2**20:.0f} MiB left"
        )
    return target


def check_replaceable(target: Path, kind: str, overwrite: bool) -> None:
    if not target.exists():
        return
    if kind and target.is_dir():
        raise MediaError(f"cannot write {target}: it is a folder")
    if not kind and not target.is_dir():
        raise MediaError(f"cannot write {target}/: it is a file")
    contents = [entry.name for entry in target.iterdir()] if not kind else [target.name]
    if not kind and not all(name.startswith("frame_") for name in contents):
        raise MediaError(f"{target} holds other things than frames: name a new or empty folder")
    if contents and not overwrite:
        raise MediaError(f"{target} exists: name another, or say --overwrite (overwrite=True)")


def several_frames(target: Path) -> str:
    return (
        f"{target} holds one image, and this video has several frames.\n"
        f"Write a folder of pngs ({target.with_suffix('')}/), a .gif or an .mp4."
    )


def read_metadata(path: str | os.PathLike[str]) -> dict[str, Any]:
    """How a file or folder written here was made. Raises MediaError if it does not say."""
    file = Path(path)
    if file.is_dir():
        file = file / "frame_00000.png"
    try:
        metadata = json.loads(read_text(file))
    except (OSError, KeyError, ValueError) as error:
        raise MediaError(f"{path} does not say how it was made: {error}") from error
    if not isinstance(metadata, dict):
        raise MediaError(f"{path} does not say how it was made: its comment is not ours")
    return metadata


def read_text(file: Path) -> str | bytes:
    if file.suffix.lower() == ".mp4":
        import av

        with av.open(str(file)) as container:
            return container.metadata[METADATA_KEY]

    from PIL import Image

    with Image.open(file, formats=IMAGE_FORMATS) as image:
        text: str | bytes = image.info[METADATA_KEY]
        return text
