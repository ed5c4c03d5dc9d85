"""Reading the images that people give: any common file becomes upright 8-bit RGB.

A file is not trusted: only decoders that run no other program are asked, what would not fit into
memory is refused from its header, and whatever goes wrong is one MediaError.
"""

import logging
import os
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from wantrt.errors import MediaError

if TYPE_CHECKING:
    from PIL import Image

log = logging.getLogger("wantrt")

Pixels = NDArray[np.uint8]  # [H, W, 3], RGB
Read = TypeVar("Read")

IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")  # not EPS: it would run Ghostscript
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")  # of frames in folders
GIVEN = "that was given"  # in place of a path
ORIENTATION, FIRST_ON_ITS_SIDE = 0x0112, 5  # of EXIF: from 5 on, width and height change places
MAX_PIXELS = 89_000_000  # of one image; just below where Pillow itself would warn


def load_image(source: "str | os.PathLike[str] | Image.Image | Pixels") -> Pixels:
    """Read a file, a PIL image or an array uint8 [H, W, 3] as uint8 RGB [H, W, 3].

    A file is turned upright as its EXIF says; what is transparent becomes white; 16 bits become 8;
    of an animation the first frame is taken, with a warning. Raises MediaError for what is missing,
    damaged, no image or absurdly large.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        return check_pixels(source)
    if isinstance(source, Image.Image):
        return _guarded(GIVEN, lambda: _read(source, GIVEN))
    if not isinstance(source, str | os.PathLike):
        raise MediaError(f"expected an image or the path of one, got {type(source).__name__}")
    path = Path(source)
    if not path.is_file():
        reason = "it is not a file" if path.exists() else "there is no such file"
        raise MediaError(f"cannot read the image {path}: {reason}")
    return _guarded(str(path), lambda: _read_file(path))


def image_size(path: Path) -> tuple[int, int]:
    """(width, height) of an image file as `load_image` gives it, from its header alone.

    Raises MediaError for a file that is none.
    """

    def read() -> tuple[int, int]:
        from PIL import Image

        with Image.open(path, formats=IMAGE_FORMATS) as image:
            width, height = image.size
            with suppress(Exception):  # broken EXIF: see _upright
                if image.getexif().get(ORIENTATION, 1) >= FIRST_ON_ITS_SIDE:
                    return height, width
            return width, height

    return _guarded(str(path), read)


def check_pixels(array: NDArray[np.uint8]) -> Pixels:
    """The array itself if it is uint8 [H, W, 3] and not empty. Raises MediaError."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or array.size == 0:
        raise MediaError(f"expected pixels uint8 [H, W, 3], got {array.dtype} {list(array.shape)}")
    return array


def _read_file(path: Path) -> Pixels:
    from PIL import Image

    with Image.open(path, formats=IMAGE_FORMATS) as image:
        return _read(image, str(path))


def _guarded(name: str, read: Callable[[], Read]) -> Read:
    """Whatever Pillow objects to is a MediaError of one line."""
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what Pillow thinks of damaged metadata
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return read()
    except MediaError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise MediaError(_too_large(name)) from None
    except UnidentifiedImageError:
        kinds = ", ".join(IMAGE_FORMATS)
        raise MediaError(f"cannot read the image {name}: it is none of {kinds}") from None
    except Exception as error:  # decoders raise all sorts of things on damaged data
        raise MediaError(f"cannot read the image {name}: {_first_line(error)}") from error


def _read(image: "Image.Image", name: str) -> Pixels:
    if image.width * image.height > MAX_PIXELS:
        raise MediaError(_too_large(name))
    kind = image.format
    if getattr(image, "is_animated", False) and kind != "MPO":  # MPO: a JPEG and its preview
        log.warning("the image %s holds several frames; the first is taken", name)
    image.load()
    image = _upright(image)
    # before Pillow 11 a PNG of 16 bits is of mode I, which otherwise means 32
    if image.mode.startswith("I;16") or (image.mode == "I" and kind == "PNG"):
        values = np.asarray(image).astype(np.uint32)
        grey = ((values * 255 + 32767) // 65535).astype(np.uint8)  # convert("RGB") would clip
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.mode in ("I", "F"):
        raise MediaError(
            f"cannot read the image {name}: its pixels have 32 bits; save it with 8 or 16"
        )
    if image.has_transparency_data:
        return _on_white(image)
    return np.array(image.convert("RGB"))


def _upright(image: "Image.Image") -> "Image.Image":
    from PIL import ImageOps

    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # broken EXIF: the pixels are there, and which way is up is unknown
        return image


def _on_white(image: "Image.Image") -> Pixels:
    from PIL import Image

    colours = image.convert("RGBA")
    white = Image.new("RGBA", colours.size, "white")
    return np.array(Image.alpha_composite(white, colours).convert("RGB"))


def _too_large(name: str) -> str:
    return (
        f"cannot read the image {name}: it has more than {MAX_PIXELS // 10**6} million pixels; "
        "scale it down"
    )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
