"""What is captured gives the same bits, serves later generations, and may be refused."""

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.fake.device import FakeDevice
from tests.runtime.devices import SETTINGS, frames_of, on_device
from tests.small import small_bundle
from wantrt.device import CPUDevice
from wantrt.errors import CancelledError
from wantrt.runtime.capture import Repeated
from wantrt.runtime.denoiser import KEPT_LOOPS


class Counting(FakeDevice):
    """Counts what is captured."""

    captured = 0

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        self.captured += 1
        return super().capture(work)


class Refusing(Counting):
    """Finds out at the end of a capture that it was none, as CUDA does."""

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        super().capture(work)
        raise RuntimeError("operation not permitted when stream is capturing")


def count_with(device: FakeDevice) -> tuple[Repeated, torch.Tensor, list[int]]:
    """Work that counts on the device, the count, and an entry for each time its Python ran."""
    count, ran = torch.zeros(1, device=device.torch_device), []

    def work() -> None:
        ran.append(1)
        count.add_(1)

    return Repeated("counting", work, device), count, ran


def test_work_runs_once_before_it_is_captured() -> None:
    device = Counting()
    with device:
        repeated, count, ran = count_with(device)
        for _ in range(5):
            repeated()
        assert count.cpu().tolist() == [5]
    assert len(ran) == 2  # the first run, and the capture, which computes nothing
    assert (device.captured, device.replays) == (1, 4)


def test_a_refusal_is_said_once_and_the_work_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    device = Refusing()
    with device, caplog.at_level(logging.WARNING, logger="wantrt"):
        repeated, count, _ = count_with(device)
        for _ in range(5):
            repeated()
        assert count.cpu().tolist() == [5]
    assert device.captured == 1
    (record,) = caplog.records
    assert "counting could not be captured" in record.message
    assert "stream is capturing" in record.message


def test_a_cpu_replays_the_work_itself() -> None:
    ran: list[int] = []
    repeated = Repeated("counting", lambda: ran.append(1), CPUDevice())
    for _ in range(3):
        repeated()
    assert len(ran) == 3


# -- In the pipeline ------------------------------------------------------------------------------


def test_captured_equals_eager() -> None:
    """With guidance and without: a step of each, and a chunk for each bank."""
    device = Counting()
    plain = frames_of(small_bundle()), frames_of(small_bundle(), guidance_scale=1.0)
    with on_device(device, small_bundle()) as pipe:
        for expected, scale in zip(plain, (3.0, 1.0), strict=True):
            video = pipe("a red cat", **{**SETTINGS, "guidance_scale": scale})
            assert np.array_equal(video.frames, expected)
        assert device.captured == 4
        assert device.replays == 2 * 3 + 1 + 3  # of 4 steps, and of 3 chunks with 2 banks


def test_what_was_captured_serves_other_prompts_seeds_scales_and_solvers() -> None:
    others: list[dict[str, Any]] = [
        {},
        {"seed": 1, "guidance_scale": 6.5, "solver": "dpm++"},
        {"flow_shift": 2.0, "solver": "euler"},
    ]
    expected = [frames_of(small_bundle(), **other) for other in others]
    device = Counting()
    with on_device(device, small_bundle()) as pipe:
        for other, frames in zip(others, expected, strict=True):
            assert np.array_equal(pipe("a red cat", **{**SETTINGS, **other}).frames, frames)
        assert device.captured == 3


def test_kept_sizes_are_bounded() -> None:
    device = Counting()
    with on_device(device, small_bundle()) as pipe:

        def generate(num_steps: int) -> int:
            """How many captures it took."""
            before = device.captured
            pipe("a red cat", **{**SETTINGS, "num_inference_steps": num_steps, "num_frames": 1})
            return device.captured - before

        assert KEPT_LOOPS == 2
        assert [generate(steps) for steps in (2, 3, 2, 3, 4, 3, 2)] == [1, 1, 0, 0, 1, 0, 1]


def test_a_refused_capture_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    expected = frames_of(small_bundle())
    device = Refusing()
    with (
        on_device(device, small_bundle()) as pipe,
        caplog.at_level(logging.WARNING, logger="wantrt"),
    ):
        for _ in range(2):
            assert np.array_equal(pipe("a red cat", **SETTINGS).frames, expected)
    warnings = [record.message for record in caplog.records]
    assert len(warnings) == device.captured == 3
    assert sum("denoising step of transformer" in message for message in warnings) == 1
    assert sum("decoder's chunk of 4x4 cells" in message for message in warnings) == 2


def test_a_cancelled_generation_leaves_no_trace_in_the_next() -> None:
    expected = frames_of(small_bundle())
    with on_device(FakeDevice(), small_bundle()) as pipe:
        for stop_at in (("denoise", 3), ("decode", 2)):
            with pytest.raises(CancelledError):
                pipe(
                    "a red cat",
                    callback=lambda p, stop_at=stop_at: (p.stage, p.done) != stop_at,
                    **{**SETTINGS, "seed": 5},
                )
            assert np.array_equal(pipe("a red cat", **SETTINGS).frames, expected)
