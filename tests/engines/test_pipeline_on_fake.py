"""From a prompt to frames through the TensorRT runtime, on a GPU and a TensorRT that are fakes.

The build, the sessions, the loop, capture and residency are the product's own. The fakes compute,
and keep the rules (test_contract.py): a video that comes out is right, and came about rightly.
"""

import logging
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from tests.engines.fake.device import FakeDevice, FakeEvent
from tests.engines.fake.install import install_tensorrt_rtx
from tests.engines.fake.tensorrt import Runtime
from tests.runtime.diffusers_checkpoint import make_pipeline, make_transformer, save
from wantrt import Pipeline, config
from wantrt.build import plan_build
from wantrt.device import Arena
from wantrt.engines import requests
from wantrt.engines.flavours import find_flavour
from wantrt.engines.loaded_plan import Context
from wantrt.errors import SettingsError
from wantrt.experts import ExpertRange
from wantrt.nano.judge import judge
from wantrt.runtime import denoiser, loading, sizes
from wantrt.runtime.capture import Repeated
from wantrt.runtime.residency import ExpertPart

RUNTIME = "tensorrt-rtx"
PROMPTS = {
    "a red circle moves right": ("red", "circle", "right"),
    "a blue square moves down": ("blue", "square", "down"),
    "a yellow star grows": ("yellow", "star", "grow"),
}
STEPS = 3
SHORT = {"num_inference_steps": STEPS, "num_frames": 13, "seed": 5}  # 3 chunks after the first


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patches:
        patches.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        install_tensorrt_rtx(patches)
        yield patches
    find_flavour.cache_clear()


@pytest.fixture(scope="module")
def bundles(patches, tmp_path_factory):
    """nano by where its weights are: apart from the plans, except the VAE's, or all inside."""
    folder = tmp_path_factory.mktemp("nano")
    built = {}

    def build(weights: str = "bound"):
        if weights not in built:
            out = folder / weights
            plan = plan_build(
                variant="nano",
                out=out,
                runtime=RUNTIME,
                targets=["sm89"],
                weights=weights,
                frames=[25, 13],
            )
            built[weights] = plan.run().path
        return built[weights]

    return build


@contextmanager
def fake_gpu():
    """What the runtime makes its device of, meanwhile; no rule may be broken."""
    device = FakeDevice()
    fake = replace(loading.RUNTIMES[RUNTIME], missing=lambda: None, make_device=lambda: device)
    with pytest.MonkeyPatch.context() as patches, device:
        patches.setitem(loading.RUNTIMES, RUNTIME, fake)
        yield device
    assert device.broken == []


@pytest.fixture
def device():
    with fake_gpu() as device:
        yield device


@pytest.fixture(scope="module")
def expected(bundles):
    """The frames of a short generation, by the reference modules."""
    with Pipeline.load(bundles(), runtime="torch") as pipe:
        return pipe("a green triangle rotates", **SHORT).frames.astype(int)


@pytest.fixture(scope="module")
def captured(bundles):
    """The same with everything resident and captured."""
    with fake_gpu() as device:
        frames = generate(bundles())
    assert device.replays == STEPS - 1 + 1  # steps, and a chunk of one of both parities
    return frames


def generate(bundle, residency="resident"):
    with Pipeline.load(bundle, runtime=RUNTIME, residency=residency) as pipe:
        return pipe("a green triangle rotates", **SHORT).frames


@pytest.mark.slow
def test_videos_show_what_the_prompts_say(bundles, device):
    with Pipeline.load(bundles(), runtime=RUNTIME) as pipe:
        for prompt, words in PROMPTS.items():
            seen = judge(pipe(prompt, seed=0).frames)
            assert (seen.colour, seen.shape, seen.motion) == words, prompt
    assert device.replays > 0


@pytest.mark.slow
def test_frames_are_those_of_the_reference(captured, expected):
    assert np.abs(captured - expected).mean() < 1  # of 255: sums in another order, in bf16


@pytest.mark.parametrize("residency", ["phase", "stream"])
def test_every_residency_gives_the_same_bits(bundles, device, captured, residency):
    """Streamed weights are read and overwritten in time, or a rule would break."""
    assert np.array_equal(generate(bundles(), residency), captured)
    # streamed denoising is not captured; the decoder is
    assert device.replays == (1 if residency == "stream" else STEPS)


def test_a_refused_capture_is_said_once_and_gives_the_same(
    bundles, device, captured, monkeypatch, caplog
):
    monkeypatch.setattr(Runtime, "refuses", {"is_stream_capturable"})
    with caplog.at_level(logging.WARNING, "wantrt"):
        assert np.array_equal(generate(bundles()), captured)
    assert device.replays == 0
    refused = [r.getMessage() for r in caplog.records if "could not be captured" in r.getMessage()]
    assert sum("denoising step" in message for message in refused) == 1
    assert len(refused) == 2  # the step, and a chunk
    assert all("cannot be captured" in message for message in refused)  # the cause is in it


def test_baked_weights_give_the_same(bundles, device, captured):
    """Nearly: ONNX Runtime sums in another order where weights are constants."""
    assert np.abs(generate(bundles("baked")).astype(int) - captured).mean() < 0.1


def test_the_text_encoder_on_the_cpu(bundles, device, expected):
    with Pipeline.load(
        bundles(), runtime=RUNTIME, residency="phase", text_encoder_on="cpu"
    ) as pipe:
        frames = pipe("a green triangle rotates", **SHORT).frames
    assert np.abs(frames - expected).mean() < 1


def test_captured_work_serves_the_next_generation(bundles, device):
    """Another prompt, seed, solver and guidance: contents of the same buffers."""
    other = {**SHORT, "seed": 8, "guidance_scale": 2.0, "solver": "euler"}
    with Pipeline.load(bundles(), runtime=RUNTIME) as pipe:
        pipe("a red circle moves right", **SHORT)
        before = device.replays
        frames = pipe("a blue square moves down", **other).frames
        assert device.replays - before == STEPS + 3  # not one ordinary run but the first chunk's
    with Pipeline.load(bundles(), runtime=RUNTIME) as fresh:
        assert np.array_equal(fresh("a blue square moves down", **other).frames, frames)


def test_a_dynamic_plan_serves_captured_sizes_in_turn(patches, tmp_path, device):
    """What was captured at one size is replayed after the plan has run at another."""
    plan = plan_build(
        variant="nano",
        out=tmp_path / "dynamic",
        runtime=RUNTIME,
        targets=["sm89"],
        sizes=[(64, 64), (32, 32)],
        frames=[13, 9],
        dynamic=True,
    )
    with Pipeline.load(plan.run().path, runtime=RUNTIME) as pipe:
        videos = [
            pipe("a green triangle rotates", size=size, **SHORT).frames
            for size in ((64, 64), (32, 32), (64, 64), (32, 32))
        ]
    assert all(map(np.array_equal, videos[:2], videos[2:]))
    assert device.replays > 4 * (STEPS - 1)


def test_without_guidance(bundles, device):
    with Pipeline.load(bundles(), runtime=RUNTIME) as pipe:
        first, second = (
            pipe("a red circle moves right", guidance_scale=1.0, **SHORT).frames for _ in range(2)
        )
    assert np.array_equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("batch_tokens", [1000, 4], ids=["in a batch", "one after the other"])
def test_two_experts_with_two_passes(patches, monkeypatch, tmp_path, batch_tokens):
    """Experts of the same dimensions share their plans, and passes the contexts."""
    for module in (config, denoiser, requests, sizes):
        monkeypatch.setattr(module, "GUIDANCE_BATCH_TOKENS", batch_tokens)
    checkpoint = save(make_pipeline(experts=2), tmp_path / "checkpoint")
    settings = {**SHORT, "size": (80, 48), "num_frames": 9, "guidance_scale": 4.0}
    bundle = plan_build(
        str(checkpoint), out=tmp_path / "bundle", runtime=RUNTIME, sizes=[(80, 48)], frames=[9]
    ).run()
    with Pipeline.load(bundle.path, runtime="torch") as pipe:
        expected = pipe("a red cat", **settings).frames.astype(int)
    made = [
        frames_on_gpu(bundle.path, residency, settings)
        for residency in ("resident", "phase", "stream")
    ]
    assert np.array_equal(made[0], made[1])
    assert np.array_equal(made[0], made[2])
    assert np.abs(made[0] - expected).mean() < 1


def frames_on_gpu(bundle, residency, settings):
    with fake_gpu(), Pipeline.load(bundle, RUNTIME, residency=residency) as pipe:
        return pipe("a red cat", **settings).frames


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["bound", "baked"])
def test_a_hybrid_of_two_widths(patches, tmp_path, weights):
    """Each expert has plans of its own; bound weights take turns in one memory."""
    ranges = []
    for name, heads, start, end in (("wide", 4, 1, 0.9), ("narrow", 2, 0.9, 0)):
        checkpoint = make_pipeline()
        checkpoint.register_modules(transformer=make_transformer(heads))
        ranges.append(ExpertRange("custom", str(save(checkpoint, tmp_path / name)), start, end))
    settings = {**SHORT, "num_inference_steps": 5, "size": (80, 48), "num_frames": 9}
    bundle = plan_build(
        experts=ranges,
        out=tmp_path / "bundle",
        runtime=RUNTIME,
        sizes=[(80, 48)],
        frames=[9],
        weights=weights,
    ).run()
    with Pipeline.load(bundle.path, runtime="torch") as pipe:
        expected = pipe("a red cat", **settings).frames.astype(int)
    with fake_gpu(), Pipeline.load(bundle.path, RUNTIME, residency="phase") as pipe:
        taking_turns = [isinstance(part, ExpertPart) for part in pipe.parts.values()]
        assert sum(taking_turns) == (2 if weights == "bound" else 0)
        with pytest.raises(SettingsError, match=r"wantrt build --checkpoint custom@.*:1-0\.9,cust"):
            pipe.resolve("a red cat", size=(64, 64))
    resident = frames_on_gpu(bundle.path, "resident", settings)
    assert np.array_equal(frames_on_gpu(bundle.path, "phase", settings), resident)
    assert np.abs(resident - expected).mean() < 1


def test_a_size_that_no_plan_serves(bundles, device):
    with Pipeline.load(bundles(), runtime=RUNTIME) as pipe:
        with pytest.raises(SettingsError, match=r"(?s)do not serve 64x96.*--size 64x96"):
            pipe("a red circle moves right", size=(64, 96))


@pytest.mark.parametrize(
    "residency, sabotaged, rule",
    [
        ("stream", (FakeEvent, "wait"), "the side stream may still be at it"),
        ("phase", (Arena, "reserve"), "scratch memory is too small"),
        ("phase", (Context, "set_shape"), "the shape of .* was not set"),
        ("phase", (Context, "set_address"), "the address of .* was not set"),
        ("phase", (Context, "set_scratch"), "scratch memory was not set"),
    ],
)
def test_a_product_that_breaks_a_rule_is_caught(bundles, monkeypatch, residency, sabotaged, rule):
    """The same run, with one thing that it does left out."""
    monkeypatch.setattr(*sabotaged, lambda *_: None)
    with pytest.raises(AssertionError, match=rule), fake_gpu():
        generate(bundles(), residency)


def test_a_capture_without_an_ordinary_run_is_refused(bundles, device, monkeypatch, caplog):
    """Before TensorRT sees it: the account of the device stays clean."""

    def capture_at_once(self):
        self._ran = True
        return call(self)

    call = Repeated.__call__
    monkeypatch.setattr(Repeated, "__call__", capture_at_once)
    generate(bundles())
    assert "has not run at these shapes yet" in caplog.text
