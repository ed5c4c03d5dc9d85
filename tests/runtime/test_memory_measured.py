"""The prediction beside what a generation allocates, phase by phase, at reduced size.

The device of these tests is a CPU that tells device memory from the host's and counts it; what a
phase took is the most that lived while it ran, weights included. The operations between the matrix
products compute as plain torch does and allocate as our kernels do; what either form allocates
within a component is tested to the byte in test_scratch.py.
"""

import pytest

from tests.runtime.devices import on_device
from tests.runtime.measured import CountingDevice, as_kernels
from tests.tasks.pictures import film, moving_mask, picture
from tests.variants.small import bundle_of
from wantrt.runtime import parts
from wantrt.runtime.memory import phases, predict

TOLERANCE = 0.1  # of what was taken, with the weights and without
LARGE, LONG = ((192, 128), 5), ((128, 96), 49)
PROMPT = " ".join(["a red circle moves right"] * 103)  # the longest that the model takes

# variant -> what it starts from, for a size
SOURCES = {
    "t2v-14b": lambda size, frames: {},
    "t2v-a14b": lambda size, frames: {},
    "i2v-14b-480p": lambda size, frames: {"image": picture(*size)},
    "i2v-a14b": lambda size, frames: {"image": picture(*size)},
    "flf2v-14b": lambda size, frames: {"image": picture(*size), "last_image": picture(*size)},
    "ti2v-5b": lambda size, frames: {"image": picture(*size)},
    "vace-1.3b": lambda size, frames: {
        "video": film(frames, *size),
        "mask": moving_mask(1, *size).repeat(frames, axis=0),
    },
}


def generate(variant, size, num_frames, residency, monkeypatch, times=1):
    """Peaks by phase, and what was predicted of each."""
    device = CountingDevice()
    monkeypatch.setattr(parts, "ops_for", lambda _: as_kernels(device))
    with on_device(device, bundle_of(variant), residency=residency) as pipe:
        device.listen({id(part): name for name, part in pipe.parts.items()})
        for _ in range(times):
            pipe(
                PROMPT,
                negative_prompt=f"no {PROMPT}",
                size=size,
                num_frames=num_frames,
                num_inference_steps=4,
                guidance_scale=3.0,
                seed=0,
                **SOURCES[variant](size, num_frames),
            )
        stacks = {part: pipe.bundle.stack_of(part) for part in pipe.bundle.precision}
        found = phases(pipe.variant, pipe.bundle.precision, size, num_frames, stacks)
    return device.peaks, found


def check(taken, memory):
    assert memory.total_bytes == pytest.approx(taken, rel=TOLERANCE)
    beside = memory.total_bytes - memory.weights_bytes
    assert beside == pytest.approx(taken - memory.weights_bytes, rel=TOLERANCE)


def check_phases(variant, size, num_frames, monkeypatch):
    peaks, predicted = generate(variant, size, num_frames, "phase", monkeypatch)
    assert {phase.part for phase in predicted} == peaks.keys() - {"before"}
    for phase in predicted:
        check(peaks[phase.part], phase.memory())


@pytest.mark.parametrize("variant", SOURCES)
def test_phases_with_kernels(variant, monkeypatch):
    check_phases(variant, *LARGE, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", SOURCES)
def test_phases_of_a_long_video(variant, monkeypatch):
    check_phases(variant, *LONG, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["t2v-14b", "vace-1.3b"])
def test_phases_of_an_image(variant, monkeypatch):
    check_phases(variant, LARGE[0], 1, monkeypatch)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["t2v-a14b", "vace-1.3b"])
def test_all_that_stays(variant, monkeypatch):
    """Of two generations by a resident pipeline; the second finds what the first has left."""
    peaks, predicted = generate(variant, *LARGE, "resident", monkeypatch, times=2)
    check(max(peaks.values()), predict(predicted, "resident"))
