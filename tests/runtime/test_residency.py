"""Residency: the same frames from less memory, and nothing left behind."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.engines.fake.device import FakeDevice
from tests.runtime.devices import SETTINGS, frames_of, on_device
from tests.runtime.diffusers_checkpoint import make_pipeline, save
from tests.small import copy_bundle, small_bundle
from wantrt import Pipeline
from wantrt.build import plan_build
from wantrt.bundle import Bundle
from wantrt.errors import CancelledError, ExecutionError, SettingsError
from wantrt.manifest import PlanRecord
from wantrt.runtime import parts
from wantrt.runtime.loading import RUNTIMES
from wantrt.runtime.streaming import Ring


@pytest.fixture(scope="module", params=[1, 2], ids=["dense", "two experts"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("residency")
    save(make_pipeline(experts=request.param), folder / "checkpoint")
    plan_build(str(folder / "checkpoint"), out=folder / "bundle", precision="fp32", stack=1).run()
    return folder / "bundle"


@pytest.mark.parametrize("policy", ["resident", "phase", "stream"])
@pytest.mark.parametrize("text_encoder_on", [None, "cpu"])
def test_policies_give_the_same_frames(
    bundle: Path, policy: str, text_encoder_on: str | None
) -> None:
    """Twice each, on a device that tells when a copy and its use are not in order."""
    expected = frames_of(bundle)
    device = FakeDevice()
    with on_device(device, bundle, residency=policy, text_encoder_on=text_encoder_on) as pipe:
        for _ in range(2):
            assert np.array_equal(pipe("a red cat", **SETTINGS).frames, expected)
        assert (device.replays > 2) == (policy != "stream")  # the decoder is captured anyway


@pytest.mark.parametrize("policy", ["phase", "stream"])
def test_a_phase_leaves_nothing_on_the_device(bundle: Path, policy: str) -> None:
    device = FakeDevice()
    with on_device(device, bundle, residency=policy) as pipe:
        assert device.free_bytes() == device.total_bytes  # nothing is loaded before it is needed
        held: dict[str, int] = {}

        def watch(progress: Any) -> None:
            loaded = {name for name, part in pipe.parts.items() if part._sessions is not None}
            held.setdefault(progress.stage, len(loaded))
            if policy == "phase":  # experts share their memory
                loaded -= {expert.name for expert in pipe.variant.experts[1:]}
            assert len(loaded) == 1, progress

        pipe("a red cat", callback=watch, **SETTINGS)
        assert held.keys() == {"text", "denoise", "decode"}
        with pytest.raises(CancelledError):
            pipe("a red cat", callback=lambda p: p.done < 2, **SETTINGS)
        assert not any(part._sessions for part in pipe.parts.values())


def test_a_phase_takes_less_than_all(bundle: Path) -> None:
    most = {}
    for policy in ("resident", "phase"):
        device, seen = FakeDevice(), []

        def watch(_: object, device: FakeDevice = device, seen: list[int] = seen) -> None:
            seen.append(device.total_bytes - device.free_bytes())

        with on_device(device, bundle, residency=policy) as pipe:
            pipe("a red cat", callback=watch, **{**SETTINGS, "num_frames": 1})
        most[policy] = max(seen)
    assert most["phase"] < most["resident"]


def test_on_a_cpu_nothing_is_copied() -> None:
    with Pipeline.load(small_bundle(), "torch") as pipe:
        (session,) = pipe.parts["vae"]["vae_decoder_next"]
        mapped = {t.data_ptr() for t in session._weights.values()}  # type: ignore[attr-defined]
        first = pipe.parts["vae"]["vae_decoder_first"][0]
        assert mapped == {t.data_ptr() for t in first._weights.values()}  # type: ignore[attr-defined]
        assert "vae_encoder_next" not in pipe.parts["vae"]


def test_unknown_policies_are_named() -> None:
    with pytest.raises(SettingsError, match="did you mean stream"):
        Pipeline.load(small_bundle(), "torch", residency="streamed")
    with pytest.raises(SettingsError, match="cpu"):
        Pipeline.load(small_bundle(), "torch", text_encoder_on="gpu")


# -- Streaming ------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_a_ring_holds_what_is_asked_for(count: int) -> None:
    """Any number of stacks, each asked for as often as there are passes, over and over."""
    stacks = [
        {"a": torch.full((3,), float(i)), "b": torch.full((5, 2), i, dtype=torch.bfloat16)}
        for i in range(count)
    ]
    with FakeDevice() as device:
        with device.stream():
            ring = Ring(stacks, device)
            seen = []
            for index in [*range(count), *range(count), 0, *range(count)]:  # one run was cut off
                for _ in range(2):
                    slot = ring.slots[ring.acquire(index)]
                    seen.append((index, slot["a"] * 2, slot["b"] + 0))
            assert len(ring.slots) == min(count, 2)
            for index, a, b in seen:
                assert a.cpu().tolist() == [2.0 * index] * 3
                assert b.float().cpu().tolist() == [[index, index]] * 5
        assert not device.broken


def test_weights_inside_a_plan_cannot_be_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = with_plans(Bundle.load(small_bundle()), part="transformer")
    runtime = replace(RUNTIMES["tensorrt-rtx"], load=lambda *_: [])
    with pytest.raises(SettingsError, match="wantrt build --weights bound"):
        parts.load_part(bundle, "transformer", runtime, FakeDevice(), streamed=True)


# -- Which file a component runs from -------------------------------------------------------------


def with_plans(bundle: Bundle, part: str | None, component: str = "dit_stack") -> Bundle:
    """The bundle with a plan of TensorRT-RTX for one of its components; there is no file."""
    record = PlanRecord(
        file="plans/x.plan",
        runtime="tensorrt-rtx",
        version="1.7",
        targets=("sm89",),
        symbols={"B": (1, 1, 1), "L": (4, 4, 4)},
        part=part,
        instance=None if part is None else 0,
    )
    file = replace(next(iter(bundle.manifest.files.values())), sha256="0" * 64)
    manifest = replace(
        bundle.manifest,
        components=tuple(
            replace(c, plans=(record,)) if c.name == component else c
            for c in bundle.manifest.components
        ),
        files={**bundle.manifest.files, record.file: file},
    )
    return replace(bundle, manifest=manifest)


def test_components_without_a_plan_run_on_torch(caplog: pytest.LogCaptureFixture) -> None:
    bundle = with_plans(Bundle.load(small_bundle()), part=None)
    given = []

    def load(component: Any, files: Any, weights: Any, device: Any) -> list[str]:
        given.append((component.name, [path.name for _, path in files.plans], len(weights)))
        return ["a session of a plan"]

    runtime = replace(RUNTIMES["tensorrt-rtx"], load=load)
    with FakeDevice() as device, caplog.at_level(logging.INFO, logger="wantrt"):
        sessions = parts.load_part(bundle, "transformer", runtime, device, trust_plans=True)
    ((name, plans, count),) = given
    assert (name, plans) == ("dit_stack", ["x.plan"])
    assert count > 0
    assert sessions["dit_stack"] == ["a session of a plan"]
    assert type(sessions["dit_head"][0]).__name__ == "TorchSession"
    assert "dit_head of transformer run on torch" in caplog.text


def test_a_closed_pipeline_holds_nothing(tmp_path: Path) -> None:
    with Pipeline.load(copy_bundle(tmp_path), "torch", residency="phase") as pipe:
        pass
    with pytest.raises(ExecutionError, match="closed"):
        pipe("a red cat")
    assert not pipe.parts
