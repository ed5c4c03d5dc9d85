"""Latents in and out of files: safetensors, one tensor ``latents`` [B, C, F, H, W].

Normalised, as the DiT sees them, so the final latents of one generation can start another.
"""

import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

from wantrt.errors import MediaError


def check_latents_file(path: Path, overwrite: bool, needed_bytes: int) -> None:
    """Find out before any long work whether `save_latents` can write `path`. Raises MediaError."""
    if path.is_dir() or (path.exists() and not overwrite):
        raise MediaError(f"{path} exists: name another, or say --overwrite")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise MediaError(f"cannot write {path}: {folder} is not a writable folder")
    if shutil.disk_usage(folder).free < needed_bytes:
        raise MediaError(
            f"cannot write {path}: it needs {needed_bytes} bytes, and {folder} is full"
        )


def save_latents(path: Path, latents: Tensor) -> None:
    """Write latents [B, C, F, H, W] as float32, whole or not at all."""
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        save_file({"latents": latents.detach().float().cpu().contiguous()}, part)
        part.replace(path)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise MediaError(f"cannot write {path}: {error}") from error


def load_latents(path: Path) -> Tensor:
    """Read latents [B, C, F, H, W] as float32. Raises MediaError for anything else."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise MediaError(f"cannot read latents from {path}: {error}") from error
    if list(tensors) != ["latents"] or tensors["latents"].ndim != 5:
        found = ", ".join(f"{name} {list(t.shape)}" for name, t in tensors.items())
        raise MediaError(f"{path}: expected one tensor latents [B, C, F, H, W], found {found}")
    latents = tensors["latents"].float()
    if not torch.isfinite(latents).all():
        raise MediaError(f"{path}: the latents hold NaN or infinite values")
    return latents
