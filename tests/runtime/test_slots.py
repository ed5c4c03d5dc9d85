"""Experts in turn: on a device that tells when a copy and a use of its memory are not in order."""

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.fake.device import FakeDevice, FakeEvent
from tests.runtime.devices import SETTINGS, frames_of, on_device
from tests.runtime.diffusers_checkpoint import make_pipeline, save
from wantrt.build import plan_build
from wantrt.bundle import Bundle
from wantrt.errors import CancelledError
from wantrt.runtime import denoiser, slots
from wantrt.runtime.memory import predict
from wantrt.runtime.residency import ExpertPart
from wantrt.runtime.slots import SlotSession, Weights, slot_sizes
from wantrt.schedulers.grids import split_steps

STEPS, HIGH = 6, 4  # as many of them are the first expert's
GUIDED = {**SETTINGS, "num_inference_steps": STEPS, "guidance_scale": 3.0, "flow_shift": 12.0}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experts of two stacks each."""
    folder = tmp_path_factory.mktemp("slots")
    save(make_pipeline(experts=2), folder / "checkpoint")
    plan_build(str(folder / "checkpoint"), out=folder / "bundle", precision="fp32", stack=1).run()
    return folder / "bundle"


@pytest.fixture(scope="module")
def expected(bundle: Path) -> Any:
    return frames_of(bundle, **GUIDED)


@pytest.fixture
def happened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was given to the device, in order: runs of sessions, copies into slots."""
    log: list[str] = []
    names: dict[int, str] = {}

    def watch(cls: type, method: str, name_of: Any) -> None:
        before = getattr(cls, method)

        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            log.append(f"{method} {name_of(self)}")
            return before(self, *args, **kwargs)

        monkeypatch.setattr(cls, method, call)

    def name_of_session(session: Any) -> str:
        return names[id(session.weights)]

    load = slots.Slots.load

    def named(self: Any, component: Any, *args: Any) -> Any:
        sessions = load(self, component, *args)
        for index, session in enumerate(sessions):
            names[id(session.weights)] = f"{component.name} {index}"
        return sessions

    monkeypatch.setattr(slots.Slots, "load", named)
    watch(SlotSession, "run", name_of_session)
    watch(Weights, "send", lambda weights: names[id(weights)])
    watch(Weights, "pack", lambda weights: names[id(weights)])
    return log


@pytest.mark.parametrize("batch_tokens", [1000, 1], ids=["in a batch", "one after the other"])
def test_a_slot_is_overwritten_as_soon_as_it_is_done_with(
    bundle: Path, happened: list[str], monkeypatch: pytest.MonkeyPatch, batch_tokens: int
) -> None:
    monkeypatch.setattr(denoiser, "GUIDANCE_BATCH_TOKENS", batch_tokens)
    device = FakeDevice()
    with on_device(device, bundle, residency="phase") as pipe:

        def mark(progress: Any) -> None:
            if progress.stage == "denoise":
                happened.append(f"step {progress.done}")

        frames = pipe("a red cat", callback=mark, **GUIDED).frames
        steps = split_steps(pipe._grid(pipe.resolve("x", **GUIDED)), pipe.variant.boundary_ratios)
        assert steps == [range(HIGH), range(HIGH, STEPS)]
    last = happened[happened.index(f"step {HIGH - 1}") + 1 : happened.index(f"step {HIGH}")]
    passes = 1 if batch_tokens > 1 else 2
    assert last == [
        *("run dit_patch 0", "send dit_patch 0"),
        *(["run dit_stack 0"] * passes + ["send dit_stack 0"]),
        *(["run dit_stack 1"] * passes + ["send dit_stack 1"]),
        *(["run dit_head 0"] * passes + ["send dit_head 0"]),
    ]
    before = happened[: happened.index(f"step {HIGH - 1}")]
    packed = [what for what in before if what.startswith("pack")]
    assert len(packed) == len(set(packed)) == 6  # each step some, and none in the last
    assert {"send dit_time 0", "send dit_condition 0"} == {w for w in before if "send" in w}
    assert np.array_equal(frames, frames_of(bundle, **GUIDED))


def test_memory_is_that_of_one_expert(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the change of experts too it takes no more than a generation by the first one alone."""
    names = ["high_noise", "low_noise"]
    sizes = slot_sizes(Bundle.load(bundle).components(name) for name in names)
    assert sizes == slot_sizes([Bundle.load(bundle).components(names[0])])
    send = Weights.send
    peaks, sent, predicted = {}, {}, []
    for name, settings in (("both", GUIDED), ("first alone", {**GUIDED, "flow_shift": 1000.0})):
        device, seen = FakeDevice(), []

        def look(progress: Any = None, device: FakeDevice = device, seen: list[int] = seen) -> None:
            if progress is None or progress.stage == "denoise":
                gc.collect()
                seen.append(device.total_bytes - device.free_bytes())

        monkeypatch.setattr(Weights, "send", lambda self, look=look: (look(), send(self), look()))
        with on_device(device, bundle, residency="phase") as pipe:
            pipe("a red cat", callback=look, **settings)
            predicted = [p for p in pipe._phases((32, 32), 13) if p.part in names]
        peaks[name], sent[name] = max(seen), (len(seen) - STEPS) // 2
    assert sent == {"both": len(sizes), "first alone": 0}
    assert peaks["both"] <= 1.01 * peaks["first alone"]
    assert predict(predicted, "phase").weights_bytes == sum(sizes.values())


def test_the_next_generation_begins_with_the_first_expert_again(
    bundle: Path, expected: Any
) -> None:
    device = FakeDevice()
    with on_device(device, bundle, residency="phase") as pipe:
        for _ in range(2):
            assert np.array_equal(pipe("a red cat", **GUIDED).frames, expected)
            assert not any(part._sessions for part in pipe.parts.values())
        for stop in (1, HIGH - 1, HIGH, STEPS):

            def goes_on(progress: Any, stop: int = stop) -> bool:
                return (progress.stage, progress.done) != ("denoise", stop)

            with pytest.raises(CancelledError):
                pipe("a red cat", callback=goes_on, **GUIDED)
            assert not any(part._sessions for part in pipe.parts.values())
        assert np.array_equal(pipe("a red cat", **GUIDED).frames, expected)


@pytest.mark.parametrize("steps, shift", [(1, 12.0), (2, 12.0), (3, 1.0), (6, 0.05)])
def test_stages_of_one_step_or_none(bundle: Path, steps: int, shift: float) -> None:
    settings = {**GUIDED, "num_inference_steps": steps, "flow_shift": shift}
    device = FakeDevice()
    with on_device(device, bundle, residency="phase") as pipe:
        assert np.array_equal(pipe("a red cat", **settings).frames, frames_of(bundle, **settings))


@pytest.mark.parametrize("missing", ["memory", "pinning"])
def test_without_pinned_memory_it_is_slower_and_said_once(
    bundle: Path,
    expected: Any,
    missing: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    device = FakeDevice()
    if missing == "memory":
        monkeypatch.setattr(slots, "available_memory", lambda: 1000)
    else:

        def refuse(*_: object) -> torch.Tensor:
            raise RuntimeError("CUDA error: out of memory\nand more")

        monkeypatch.setattr(device, "pinned", refuse)
    with caplog.at_level(logging.WARNING, logger="wantrt"):
        with on_device(device, bundle, residency="phase") as pipe:
            assert np.array_equal(pipe("a red cat", **GUIDED).frames, expected)
    said = [r.getMessage() for r in caplog.records if "no pinned memory" in r.getMessage()]
    assert len(said) == 1
    assert ("CUDA error: out of memory." if missing == "pinning" else "are available") in said[0]


@pytest.mark.parametrize("left_out", ["wait", "record"])
def test_copies_that_are_not_in_order_are_caught(
    bundle: Path, left_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same run, without what orders it."""
    monkeypatch.setattr(FakeEvent, left_out, lambda self: None)
    with pytest.raises(AssertionError, match="may still be at it"):
        with on_device(FakeDevice(), bundle, residency="phase") as pipe:
            pipe("a red cat", **GUIDED)


def test_a_slot_that_is_sent_too_early_is_caught(
    bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slots, "BEFORE_STEPS", ("dit_time", "dit_condition", "dit_stack"))
    with pytest.raises(AssertionError, match="may still be at it"):
        with on_device(FakeDevice(), bundle, residency="phase") as pipe:
            pipe("a red cat", **GUIDED)


def test_on_a_cpu_weights_stay_in_their_files(bundle: Path) -> None:
    from wantrt import Pipeline

    with Pipeline.load(bundle, "torch", residency="phase") as pipe:
        assert not any(isinstance(part, ExpertPart) for part in pipe.parts.values())
