"""A small checkpoint with a tokenizer, and bundles built from it: made once a test process."""

import shutil
import tempfile
from functools import cache
from pathlib import Path

from tests.checkpoints.small import write_small
from wantrt.build import plan_build
from wantrt.nano.tokenizer import save_tokenizer

SMALL_SIZE = (32, 32)  # the smallest that leaves 2x2 patches
SMALL_SETTINGS = ("--size", "32x32", "--frames", "5", "--steps", "2", "--seed", "1")


@cache
def small_checkpoint() -> Path:
    """Diffusers layout; two transformer blocks, two text layers. Do not change it."""
    folder = Path(_temporary().name) / "checkpoint"
    write_small(folder, "diffusers")
    save_tokenizer(folder / "tokenizer")
    return folder


@cache
def small_bundle(precision: str = "fp32") -> Path:
    """The bundle of `small_checkpoint`. Do not change it; `copy_bundle` gives one to change."""
    out = Path(_temporary().name) / precision
    plan_build(str(small_checkpoint()), out=out, precision=precision).run()
    return out


def copy_bundle(folder: Path, precision: str = "fp32") -> Path:
    return shutil.copytree(small_bundle(precision), folder / "bundle")


@cache
def _temporary() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="wantrt-tests-")
