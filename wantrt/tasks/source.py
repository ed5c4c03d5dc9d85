"""What a generation starts from besides its prompt: opened, checked, and made into conditioning.

One table says what each task takes. Everything that can be wrong is found when the source is opened
or its size is chosen, before any weight is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from wantrt.config import Size, Variant
from wantrt.errors import SettingsError
from wantrt.images import Pixels, load_image
from wantrt.tasks import fitting, flf2v, i2v, ti2v, vace
from wantrt.tasks.conditioning import NO_CONDITIONING, Conditioning, Encode
from wantrt.tasks.fitting import size_of
from wantrt.videos import Footage, open_mask, open_video

EncodeImages = Callable[[Sequence[Pixels]], Tensor]
"""CLIP: images uint8 [H, W, 3] -> features fp32 [1, rows of all images, C]."""

# task -> what it needs, and what else it takes.
TAKES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "t2v": ((), ()),
    "i2v": (("image",), ()),
    "flf2v": (("image", "last_image"), ()),
    "ti2v": ((), ("image",)),
    "vace": ((), ("video", "mask", "reference_images")),
}
INPUTS = ("image", "last_image", "video", "mask", "reference_images")


def usage(task: str) -> str:
    """What a generation takes, as on the command line: "PROMPT --image [--last-image]"."""
    needed, optional = TAKES.get(task, ((), ()))
    return " ".join(["PROMPT", *map(_option, needed), *(f"[{_option(name)}]" for name in optional)])


@dataclass(frozen=True, eq=False)
class Source:
    """Images as pixels, videos opened but not yet decoded. names: of the files, for metadata."""

    image: Pixels | None = None
    last_image: Pixels | None = None
    video: Footage | None = None
    mask: Footage | None = None
    references: tuple[Pixels, ...] = ()
    names: Mapping[str, Any] = field(default_factory=dict)


NO_SOURCE = Source()


def open_source(
    variant: Variant,
    *,
    image: Any = None,
    last_image: Any = None,
    video: Any = None,
    mask: Any = None,
    reference_images: Any = (),
) -> Source:
    """Open what the user gives: paths, PIL images or arrays (see images.py and videos.py).

    One reference image need not be in a list. Raises SettingsError for what the task does not take
    or lacks, MediaError for what is unreadable and SettingsError for a mask that does not go with
    its video.
    """
    if reference_images is None:
        reference_images = ()
    if not isinstance(reference_images, list | tuple):
        reference_images = (reference_images,)
    given = {
        "image": image,
        "last_image": last_image,
        "video": video,
        "mask": mask,
        "reference_images": list(reference_images) or None,
    }
    given = {name: value for name, value in given.items() if value is not None}
    needed, optional = TAKES.get(variant.task, ((), ()))
    for name in given:
        if name not in needed + optional:
            takes = ", ".join(map(_option, needed + optional)) or "nothing but a prompt"
            raise SettingsError(
                f"{variant.name} takes no {_option(name)}; it takes {takes}. Leave it out."
            )
    if missing := [_option(name) for name in needed if name not in given]:
        raise SettingsError(f"{variant.name} needs {' and '.join(missing)}")
    if "mask" in given and "video" not in given:
        raise SettingsError("a mask needs the video that it is for; give one with --video")
    source = Source(
        image=load_image(image) if "image" in given else None,
        last_image=load_image(last_image) if "last_image" in given else None,
        video=open_video(video) if "video" in given else None,
        mask=open_mask(mask) if "mask" in given else None,
        references=tuple(map(load_image, reference_images)),
        names={name: _name(value) for name, value in given.items()},
    )
    if source.video is not None and source.mask is not None:
        vace.check_mask(source.video.size, len(source.video), source.mask.size, len(source.mask))
    return source


def choose_size(
    variant: Variant,
    source: Source,
    size: Size | None,
    num_frames: int | None,
    fit: str | None,
    convention: str,
) -> tuple[Size, int, str | None]:
    """Size, number of frames and fit of the video, from what is asked and what it starts from.

    The fit is None where nothing is to be fitted.
    """
    given, frames = size or variant.size, variant.num_frames if num_frames is None else num_frames
    for reference in source.references:
        vace.check_reference(size_of(reference), convention)
    if source.last_image is not None:
        fitting.check_frames(frames, fewest=flf2v.FEWEST_FRAMES)
    if fit is not None and source.image is None and source.video is None:
        raise SettingsError("fit says how an image or a video is brought to size; there is none")
    if source.image is not None:
        chosen = fitting.choose_fit(fit, size is not None, convention)
        task = ti2v if variant.task == "ti2v" else i2v
        return task.video_size(size_of(source.image), given, chosen, convention), frames, chosen
    if source.video is not None:
        if fit is None and size is None:
            fit = "area"
        chosen = fitting.choose_fit(fit, size is not None, convention)
        size, frames = vace.video_size_and_frames(
            source.video.size,
            len(source.video),
            given,
            frames,
            chosen,
            convention,
            frames_given=num_frames is not None,
        )
        return size, frames, chosen
    return given, frames, None


def make_conditioning(
    variant: Variant,
    source: Source,
    size: Size,
    num_frames: int,
    fit: str | None,
    convention: str,
    encode: Encode,
    encode_images: EncodeImages,
) -> Conditioning:
    """What the denoising loop is given. encode: the VAE's encoder; encode_images: CLIP, if any.

    Raises MediaError for frames of a video that cannot be decoded.
    """
    fit = fit or "area"
    if variant.task == "vace":
        video, mask = None, None
        if source.video is not None:
            video, mask = vace.read_source(source.video, source.mask, num_frames)
        return vace.condition(
            video, mask, source.references, num_frames, size, encode, convention, fit
        )
    if source.image is None:
        return NO_CONDITIONING
    if variant.task == "ti2v":
        return ti2v.condition(source.image, size, encode, convention, fit)
    first, last = source.image, source.last_image
    if last is None:
        images = [first]
        made = i2v.condition(first, num_frames, size, encode, convention, fit)
    else:
        images = [first, last]
        made = flf2v.condition(first, last, num_frames, size, encode, convention, fit)
    if variant.image_encoder is None:
        return made
    return replace(made, image_features=encode_images(images))


def _option(name: str) -> str:
    return "--" + name.replace("_", "-").removesuffix("s")


def _name(value: Any) -> Any:
    if isinstance(value, list):
        return [_name(item) for item in value]
    return str(value) if isinstance(value, str) or hasattr(value, "__fspath__") else "given"
