"""Checkpoints: official and Diffusers layouts, name maps, weight preparation, generated weights."""

from wantrt.checkpoints.checkpoint import Checkpoint, find_nonfinite
from wantrt.checkpoints.opening import open_checkpoint
from wantrt.checkpoints.variants import find_variant

__all__ = ["Checkpoint", "find_nonfinite", "find_variant", "open_checkpoint"]
