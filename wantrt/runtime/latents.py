"""Latents in and out of files: safetensors, one tensor ``latents`` [B, C, F, H, W].

Normalised, as the DiT sees them, so the final latents of one generation can start another.
"""

from pathlib import Path

import torch
from torch import Tensor

from wantrt.errors import MediaError


def save_latents(path: Path, latents: Tensor) -> None:
    """Write latents [B, C, F, H, W] as float32, whole or not at all."""
    from safetensors.torch import save_file

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
