"""Reading the videos that people give: a file, a folder of frames, an image, or arrays.

Opening reads the size and the time of every frame, and no pixels but one frame's; `read` decodes
the frames that are asked for. A file is not trusted: only decoders of video files are asked (a
playlist could name other files), links do not lead out of a folder, and what would not fit into
memory is refused before it is read.
"""

import os
import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from wantrt.config import Size
from wantrt.encoders import Frames
from wantrt.errors import MediaError
from wantrt.images import IMAGE_SUFFIXES, MAX_PIXELS, Pixels, check_pixels, image_size, load_image

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

VIDEO_FORMATS = "mov,mp4,matroska,webm,avi,gif,apng,mpegts,mpeg,flv,ogg,asf,mxf"  # FFmpeg's names
CLOCK = Fraction(1, 1000)  # seconds; Matroska rounds the time of a frame to it
MAX_FRAMES = 2**17  # in a file or folder: more than an hour at 30 frames a second
MAX_BYTES = 2**32  # of the frames that are read at once


@dataclass(frozen=True, eq=False)
class Footage:
    """Frames that can be read. `size`: (width, height) as shown; `times`: of frames, in seconds.

    `fps` is the average frame rate; it is None, and `times` counts frames, for a folder or array.
    """

    name: str
    size: tuple[int, int]
    times: tuple[Fraction, ...]
    fps: float | None
    decode: Callable[[Sequence[int]], Iterator[Pixels]]

    def __len__(self) -> int:
        return len(self.times)

    def at_rate(self, fps: float) -> list[int]:
        """The frames that are seen at 0, 1 / fps, 2 / fps …: all of them without a rate."""
        if self.fps is None or len(self.times) == 1:
            return list(range(len(self)))
        rate = Fraction(fps).limit_denominator(1001)
        starts = [time - self.times[0] for time in self.times]
        duration = starts[-1] + starts[-1] / (len(starts) - 1)
        count = int(duration * rate)
        if count > MAX_FRAMES:
            raise MediaError(f"{self.name} lasts {float(duration):.0f} seconds; cut it")
        moments = (i / rate + CLOCK for i in range(max(count, 1)))
        return [bisect_right(starts, moment) - 1 for moment in moments]

    def read(self, indices: Sequence[int] | None = None) -> Frames:
        """Frames uint8 [T, H, W, 3]; `indices` are ascending, all frames if left out.

        Raises MediaError for damaged files, frames of different sizes and what is too much.
        """
        wanted = list(range(len(self)) if indices is None else indices)
        width, height = self.size
        if len(wanted) * width * height * 3 > MAX_BYTES:
            raise MediaError(
                f"{len(wanted)} frames of {width}x{height} in {self.name} are more than "
                f"{MAX_BYTES >> 30} GiB; cut it or scale it down"
            )
        frames = np.empty((len(wanted), height, width, 3), np.uint8)
        for i, pixels in enumerate(self.decode(wanted)):
            _check_alike(self.name, self.size, (pixels.shape[1], pixels.shape[0]))
            frames[i] = pixels
        return frames

    def read_mask(self, indices: Sequence[int] | None = None) -> NDArray[np.uint8]:
        """The brightness of frames: uint8 [T, H, W]."""
        frames = self.read(indices)
        return np.stack([brightness(frame) for frame in frames])


def _check_alike(name: str, size: Size, other: Size) -> None:
    if other != size:
        raise MediaError(
            f"{name} holds frames of different sizes: {size[0]}x{size[1]} and "
            f"{other[0]}x{other[1]}; make them alike"
        )


def brightness(image: Pixels) -> NDArray[np.uint8]:
    """uint8 [H, W, 3] -> [H, W]: Pillow's weights of red, green and blue; grey stays as it is."""
    from PIL import Image

    return np.array(Image.fromarray(image).convert("L"))


def open_video(source: Any) -> Footage:
    """Open a video file, a folder of images (in natural order of names), or one image.

    Also takes frames uint8 [T, H, W, 3] and a sequence of images, as `load_image` takes them.
    Raises MediaError for what is missing, damaged, foreign or too large.
    """
    if isinstance(source, np.ndarray):
        return _from_images("the video", list(source) if source.ndim == 4 else [source])
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _from_images("the video", [load_image(image) for image in source])
    if not isinstance(source, str | os.PathLike):
        kind = type(source).__name__
        raise MediaError(f"expected the path of a video, frames or images, got {kind}")
    path = Path(source)
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        reason = "it is not a file" if path.exists() else "there is no such file or folder"
        raise MediaError(f"cannot read the video {path}: {reason}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return _from_images(str(path), [load_image(path)])
    return _from_file(path)


def open_mask(source: Any) -> Footage:
    """`open_video` that also takes arrays of brightness, uint8 or bool [T, H, W] or [H, W]."""
    if isinstance(source, np.ndarray) and (source.ndim == 2 or source.shape[-1] != 3):
        grey = source.astype(np.uint8) * 255 if source.dtype == np.bool_ else source
        source = np.repeat(grey.reshape(-1, *grey.shape[-2:])[..., None], 3, axis=-1)
    return open_video(source)


def _from_images(name: str, images: Sequence[Pixels]) -> Footage:
    if not images:
        raise MediaError(f"{name} has no frames")
    height, width = check_pixels(images[0]).shape[:2]
    times = tuple(Fraction(i) for i in range(len(images)))
    return Footage(name, (width, height), times, None, lambda wanted: (images[i] for i in wanted))


# -- A folder of frames ---------------------------------------------------------------------------


def _from_folder(folder: Path) -> Footage:
    paths = list_frames(folder)
    if not paths:
        kinds = ", ".join(IMAGE_SUFFIXES)
        raise MediaError(f"cannot read the video {folder}: the folder has no images ({kinds})")
    height, width = load_image(paths[0]).shape[:2]
    for path in paths[1:]:
        _check_alike(str(folder), (width, height), image_size(path))
    times = tuple(Fraction(i) for i in range(len(paths)))

    def decode(wanted: Sequence[int]) -> Iterator[Pixels]:
        last: tuple[int, Pixels] | None = None
        for i in wanted:
            if last is None or last[0] != i:
                last = (i, load_image(paths[i]))
            yield last[1]

    return Footage(str(folder), (width, height), times, None, decode)


def list_frames(folder: Path) -> list[Path]:
    """The images of a folder in natural order of their names: frame_9 before frame_10.

    Other and hidden files are left out. Raises MediaError for a link that leads out of the folder.
    """
    paths = []
    home = folder.resolve()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                path = Path(entry.path)
                if entry.name.startswith(".") or path.suffix.lower() not in IMAGE_SUFFIXES:
                    continue
                if entry.is_symlink() and not path.resolve().is_relative_to(home):
                    raise MediaError(
                        f"{path} is a link that leads out of its folder; copy the file"
                    )
                paths.append(path)
                if len(paths) > MAX_FRAMES:
                    raise MediaError(f"{folder} holds more than {MAX_FRAMES} frames; take fewer")
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise MediaError(f"cannot read the video {folder}: {error}") from error
    return sorted(paths, key=lambda path: (natural_order(path.name), path.name))


def natural_order(name: str) -> list[str | int]:
    """A sorting key in which numbers count as numbers; text and numbers alternate."""
    parts = re.split("([0-9]+)", name.casefold())
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


# -- A video file ---------------------------------------------------------------------------------


def _from_file(path: Path) -> Footage:
    """Times come from the packets, without decoding; size and rotation from the first frame."""
    with _opened(path) as (container, stream):
        _check_frame_size(path, stream.codec_context.width, stream.codec_context.height)
        times = _frame_times(path, container, stream)
    if not times:
        raise MediaError(f"cannot read the video {path}: it has no frames")
    first = next(_decode_file(path, [0]))
    span = times[-1] - times[0]
    fps = float((len(times) - 1) / span) if span else None
    size = (first.shape[1], first.shape[0])
    return Footage(str(path), size, tuple(times), fps, lambda wanted: _decode_file(path, wanted))


def _frame_times(path: Path, container: "InputContainer", stream: "VideoStream") -> list[Fraction]:
    stamps: list[int] = []
    for packet in container.demux(stream):
        stamp = packet.pts if packet.pts is not None else packet.dts
        if packet.size and stamp is not None and not packet.is_discard:
            stamps.append(stamp)
        if len(stamps) > MAX_FRAMES:
            raise MediaError(f"{path} has more than {MAX_FRAMES} frames; cut it")
    unit = stream.time_base or Fraction(1)
    return [stamp * unit for stamp in sorted(stamps)]


def _decode_file(path: Path, wanted: Sequence[int]) -> Iterator[Pixels]:
    """Decode from the start to the last frame wanted. Indices are ascending and may repeat."""
    remaining = list(reversed(wanted))
    if not remaining:
        return
    with _opened(path) as (container, stream):
        stream.thread_type = "AUTO"
        for i, frame in enumerate(container.decode(stream)):
            if i != remaining[-1]:
                continue
            _check_frame_size(path, frame.width, frame.height)
            # the file says how far to turn the picture counter-clockwise, in degrees
            pixels = np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
            pixels = np.rot90(pixels, round(frame.rotation / 90))
            while remaining and remaining[-1] == i:
                remaining.pop()
                yield pixels
            if not remaining:
                return
    raise MediaError(
        f"cannot read the video {path}: it ends before its frame {remaining[-1]}; it may be damaged"
    )


def _check_frame_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise MediaError(
            f"cannot read the video {path}: a frame of {width}x{height} is too large; scale it down"
        )


@contextmanager
def _opened(path: Path) -> "Iterator[tuple[InputContainer, VideoStream]]":
    """The container and its video stream; whatever FFmpeg objects to is a MediaError."""
    import av

    options = {"format_whitelist": VIDEO_FORMATS, "protocol_whitelist": "file"}
    try:
        with av.open(
            str(path.absolute()), container_options=options, metadata_errors="ignore"
        ) as container:
            if not container.streams.video:
                raise MediaError(f"cannot read the video {path}: it has no picture")
            stream = container.streams.video[0]
            if getattr(stream, "codec_context", None) is None:
                raise MediaError(
                    f"cannot read the video {path}: there is no decoder for it; convert it to H.264"
                )
            yield container, stream
    except MediaError:
        raise
    except Exception as error:  # of all sorts, on damaged data
        reason = getattr(error, "strerror", None) or next(iter(str(error).splitlines()), "")
        raise MediaError(
            f"cannot read the video {path}: {reason}; give an mp4, webm, mov, gif, … or a folder"
        ) from error
