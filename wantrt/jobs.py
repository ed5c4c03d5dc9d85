"""A file of prompts: one a line, or JSON lines; and the names of the videos made from them."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wantrt.errors import SettingsError
from wantrt.names import check_name

SLUG_LENGTH = 48

SETTINGS: dict[
    str, tuple[str, type]
] = {  # field of a JSON line -> setting of the pipeline and its type
    "negative_prompt": ("negative_prompt", str),
    "size": ("size", str),
    "frames": ("num_frames", int),
    "steps": ("num_inference_steps", int),
    "guidance_scale": ("guidance_scale", float),
    "guidance_scale_2": ("guidance_scale_2", float),
    "guidance_scales": ("guidance_scales", list),
    "flow_shift": ("flow_shift", float),
    "solver": ("solver", str),
    "convention": ("convention", str),
    "seed": ("seed", int),
    "noise": ("noise", str),
    "fit": ("fit", str),
    "context_scale": ("context_scale", float),
    "image": ("image", str),
    "last_image": ("last_image", str),
    "video": ("video", str),
    "mask": ("mask", str),
    "reference_images": ("reference_images", list),
}
FILES = ("latents", "init_latents")


@dataclass(frozen=True)
class Job:
    """One video to make. `settings` are the pipeline's; what is not given has its default."""

    prompt: str
    settings: dict[str, Any] = field(default_factory=dict)
    out: str | None = None  # a folder of pngs ends with "/"
    latents: Path | None = None
    init_latents: Path | None = None


def read_prompts(path: Path) -> list[Job | SettingsError]:
    """The jobs of a file, with an error in the place of a line that is none; empty lines are not.

    A line that begins with ``{`` is a JSON object with `prompt` and any of SETTINGS and FILES.
    Raises SettingsError for a file that cannot be read or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"cannot read prompts from {path}: {getattr(error, 'strerror', error)}"
        ) from error
    jobs: list[Job | SettingsError] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                jobs.append(_parse(line.strip()))
            except SettingsError as error:
                jobs.append(SettingsError(f"{path}, line {number}: {error}"))
    if not jobs:
        raise SettingsError(f"{path} holds no prompt; write one a line")
    return jobs


def _parse(line: str) -> Job:
    if not line.startswith("{"):
        return Job(line)
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise SettingsError(f"not JSON: {error}") from error
    for name in values:
        check_name("field", name, ("prompt", "out", *SETTINGS, *FILES))
    if not isinstance(values.get("prompt"), str):
        raise SettingsError("the field prompt, a string, is missing")
    for name in ("out", *FILES):
        if not isinstance(values.get(name, ""), str):
            raise SettingsError(f"{name} is {values[name]!r}; give the path of a file")
    files = {name: Path(values[name]) for name in FILES if name in values}
    return Job(values["prompt"], _settings(values), values.get("out"), **files)


def _settings(values: dict[str, Any]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, (setting, kind) in SETTINGS.items():
        if name in values:
            value = values[name]
            if type(value) is not kind and not (kind is float and type(value) is int):
                raise SettingsError(f"{name} is {value!r}; give a {kind.__name__}")
            settings[setting] = parse_size(str(value)) if name == "size" else value
    return settings


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "832x480". Raises SettingsError."""
    match = re.fullmatch(r"(\d{1,6})[xX*×](\d{1,6})", text.strip())
    if match is None:
        raise SettingsError(f"{text!r} is not a size; write WIDTHxHEIGHT, as in 832x480")
    return int(match[1]), int(match[2])


def default_name(prompt: str, seed: int, num_frames: int) -> str:
    """``a-cat-surfing-42.mp4``; a single frame is a png."""
    words = re.findall(r"\w+", prompt.lower())
    slug = ""
    for word in words:
        if slug and len(slug) + 1 + len(word) > SLUG_LENGTH:
            break
        slug = f"{slug}-{word}" if slug else word[:SLUG_LENGTH]
    return f"{slug or 'video'}-{seed}{'.png' if num_frames == 1 else '.mp4'}"
