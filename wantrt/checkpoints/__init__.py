"""Checkpoints: official and Diffusers layouts, name maps, weight preparation, generated weights."""

from wantrt.checkpoints.checkpoint import Checkpoint, find_nonfinite
from wantrt.checkpoints.opening import open_checkpoint

__all__ = ["Checkpoint", "find_nonfinite", "open_checkpoint"]
