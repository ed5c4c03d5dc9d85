"""A small bundle on devices that keep account of what is captured and held."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.engines.fake.device import FakeDevice
from wantrt import Pipeline
from wantrt.runtime.loading import RUNTIMES

SETTINGS: dict[str, Any] = {
    "size": (32, 32),
    "num_frames": 13,
    "num_inference_steps": 4,
    "guidance_scale": 3.0,
    "seed": 0,
}


@contextmanager
def on_device(device: FakeDevice, bundle: Path, **options: Any) -> Iterator[Pipeline]:
    """A pipeline of torch sessions on a fake device; no rule may be broken, nothing left behind."""
    with device, pytest.MonkeyPatch.context() as patch:
        patch.setitem(RUNTIMES, "torch", replace(RUNTIMES["torch"], make_device=lambda: device))
        with Pipeline.load(bundle, "torch", **options) as pipe:
            yield pipe
        gc.collect()
        assert not device.broken
        assert device.free_bytes() == device.total_bytes


def frames_of(bundle: Path, **settings: Any) -> "np.ndarray[Any, Any]":
    """On the CPU, from a new pipeline."""
    with Pipeline.load(bundle, "torch") as pipe:
        return pipe("a red cat", **{**SETTINGS, **settings}).frames
