"""What writes frames into a file: H.264 in mp4, gif, one png, a folder of pngs.

An encoder is made when the first frames are there (it needs their size), takes frames in order and
ends with `finish` or `abandon`. `text` is how the video was made; each format has a place for it.
"""

from collections.abc import Callable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]  # [F, H, W, 3], RGB

METADATA_KEY = "comment"
X264_OPTIONS = {"crf": "15", "preset": "medium"}  # 15: no visible loss; a file is a few MB at 480p
BT709 = 1  # in H.264's tables of matrices, primaries and transfer curves alike
PALETTE_FRAMES = 16  # a gif's one palette is drawn from this many frames, evenly spread


class Encoder(Protocol):
    def write(self, frames: Frames) -> None: ...
    def finish(self) -> None: ...
    def abandon(self) -> None: ...


class Mp4Encoder:
    """H.264, yuv420p, BT.709, index first: what every browser plays while it still loads."""

    def __init__(self, path: Path, fps: float, text: str, first: Frames) -> None:
        import av
        from av.video.reformatter import ColorRange, Colorspace

        self._av = av
        self._matrix, self._range = Colorspace.ITU709, ColorRange.MPEG
        self._container = av.open(str(path), "w", options={"movflags": "faststart"})
        self._container.metadata[METADATA_KEY] = text
        rate = Fraction(fps).limit_denominator(1001)
        self._stream = self._container.add_stream("libx264", rate=rate, options=X264_OPTIONS)
        self._stream.height, self._stream.width = (even(size) for size in first.shape[1:3])
        self._stream.pix_fmt = "yuv420p"
        context = self._stream.codec_context
        context.color_range = self._range
        context.colorspace = context.color_primaries = context.color_trc = BT709

    def write(self, frames: Frames) -> None:
        height, width = frames.shape[1:3]
        if height % 2 or width % 2:  # chroma is halved: repeat the last row or column
            padding = ((0, 0), (0, height % 2), (0, width % 2), (0, 0))
            frames = np.pad(frames, padding, mode="edge")
        for image in frames:
            rgb = self._av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            yuv = rgb.reformat(
                format="yuv420p",
                dst_colorspace=self._matrix,
                dst_color_range=self._range,
                interpolation="BICUBIC",
            )
            self._container.mux(self._stream.encode(yuv))

    def finish(self) -> None:
        self._container.mux(self._stream.encode(None))
        self._container.close()

    def abandon(self) -> None:
        self._container.close()


def even(size: int) -> int:
    return size + size % 2


class GifEncoder:
    """One palette for all frames, so that still parts do not flicker. Frames wait until the end."""

    def __init__(self, path: Path, fps: float, text: str, first: Frames) -> None:
        self._path = path
        self._fps = fps
        self._text = text
        self._frames: list[Frames] = []

    def write(self, frames: Frames) -> None:
        self._frames.extend(frames)

    def finish(self) -> None:
        from PIL import Image

        chosen = np.linspace(0, len(self._frames) - 1, PALETTE_FRAMES).astype(int)
        sample = np.concatenate([self._frames[i] for i in np.unique(chosen)])  # [n·H, W, 3]
        palette = Image.fromarray(sample).quantize(256, Image.Quantize.MEDIANCUT, kmeans=1)
        # Undithered: nearer to the frames (by 1 dB), still where they are still, and smaller.
        images = [
            Image.fromarray(frame).quantize(palette=palette, dither=Image.Dither.NONE)
            for frame in self._frames
        ]
        images[0].save(
            self._path,
            format="GIF",
            save_all=True,
            append_images=images[1:],
            duration=gif_durations_ms(len(images), self._fps),
            loop=0,
            comment=self._text.encode(),
        )

    def abandon(self) -> None:
        self._frames.clear()


def gif_durations_ms(num_frames: int, fps: float) -> list[int]:
    """A gif counts in 10 ms: 16 fps (62.5 ms) becomes 60, 60, 70, 60 ..., right on average.

    Browsers slow down what is shorter than 20 ms, so that is the least.
    """
    ticks = [round(i * 100 / fps) for i in range(num_frames + 1)]
    return [max(2, after - before) * 10 for before, after in pairwise(ticks)]


class PngEncoder:
    """A single image."""

    def __init__(self, path: Path, fps: float, text: str, first: Frames) -> None:
        self._path = path
        self._text = text

    def write(self, frames: Frames) -> None:
        save_png(self._path, frames[0], self._text)

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


class FolderEncoder:
    """`frame_00000.png`, `frame_00001.png`, ..."""

    def __init__(self, path: Path, fps: float, text: str, first: Frames) -> None:
        self._path = path
        self._text = text
        self._count = 0
        path.mkdir()

    def write(self, frames: Frames) -> None:
        for image in frames:
            save_png(self._path / f"frame_{self._count:05d}.png", image, self._text)
            self._count += 1

    def finish(self) -> None:
        pass

    def abandon(self) -> None:
        pass


def save_png(path: Path, image: NDArray[np.uint8], text: str) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text(METADATA_KEY, text)
    Image.fromarray(image).save(path, format="PNG", pnginfo=info)


ENCODERS: dict[str, Callable[[Path, float, str, Frames], Encoder]] = {
    ".mp4": Mp4Encoder,
    ".gif": GifEncoder,
    ".png": PngEncoder,
    "": FolderEncoder,
}
