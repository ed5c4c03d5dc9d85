"""Hybrid schedules: experts of several checkpoints along one schedule, against diffusers.

diffusers' WanPipeline takes two transformers of different dimensions, and a loop by hand over its
models and its scheduler takes any number: the latents after every step are compared with both.
"""

import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.engines.fake.device import FakeDevice
from tests.runtime.devices import on_device
from tests.runtime.diffusers_checkpoint import make_pipeline, make_transformer, save
from tests.tasks.pictures import film
from tests.variants.small import DIMENSIONS as SMALL_DIMENSIONS
from wantrt import Pipeline
from wantrt.build import plan_build
from wantrt.bundle import Bundle
from wantrt.checkpoints import open_checkpoint
from wantrt.errors import BundleError, CheckpointError, SettingsError
from wantrt.experts import ExpertRange, parse_experts, write_experts
from wantrt.info import describe_bundle
from wantrt.media import read_metadata
from wantrt.pieces import read_log
from wantrt.runtime import denoiser, sizes
from wantrt.verify import verify

# Of the first checkpoint; heads and layers of the others
DIMENSIONS = {"wide": (4, 2), "narrow": (2, 3), "flat": (3, 1)}
SETTINGS = {
    "size": (80, 48),
    "num_frames": 9,
    "num_inference_steps": 6,
    "seed": 3,
    "convention": "diffusers",
}
TOLERANCE = 1e-4  # of scale; 1e-3 is wanted


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="wantrt-hybrids-")


@cache
def transformer(name):
    torch.manual_seed(len(name))
    return make_transformer(*DIMENSIONS[name])


@cache
def checkpoint(name):
    """The same encoders and VAE with one of the transformers."""
    pipe = make_pipeline()
    pipe.register_modules(transformer=transformer(name))
    return save(pipe, Path(_folder().name) / name)


def experts(*ranges):
    return ",".join(f"custom@{checkpoint(name)}:{start}-{end}" for name, start, end in ranges)


TWO = (("wide", 1.0, 0.8), ("narrow", 0.8, 0))
THREE = (("narrow", 1, 0.9), ("wide", 0.9, 0.7), ("flat", 0.7, 0))


@cache
def bundle_of(ranges):
    out = Path(_folder().name) / f"bundle-{len(ranges)}"
    return plan_build(experts=experts(*ranges), out=out, precision="fp32").run().path


def noise():
    return torch.randn(1, 16, 3, 6, 10, generator=torch.Generator().manual_seed(1))


def ours(bundle, runtime="torch", **settings):
    latents = []
    with Pipeline.load(bundle, runtime) as pipe:
        video = pipe(
            "a red cat",
            negative_prompt="blurry",
            init_latents=noise(),
            callback=lambda p: latents.append(p.latents.clone()) if p.stage == "denoise" else None,
            **{**SETTINGS, **settings},
        )
    return latents, video


def assert_same_path(actual, expected):
    assert len(actual) == len(expected) == SETTINGS["num_inference_steps"]
    for ours_now, theirs_now in zip(actual, expected, strict=True):
        assert (ours_now - theirs_now).abs().max() <= TOLERANCE * theirs_now.abs().max()


@cache
def by_hand(ranges, scales):
    """diffusers' transformers in turn, with its scheduler and its text embeddings."""
    pipe = make_pipeline()
    embeds, negative = pipe.encode_prompt(
        "a red cat", negative_prompt="blurry", max_sequence_length=512
    )
    pipe.scheduler.set_timesteps(SETTINGS["num_inference_steps"])
    latent, path, served = noise(), [], []
    for timestep in pipe.scheduler.timesteps:
        index = next(i for i, (_, _, end) in enumerate(ranges) if timestep >= 1000 * end)
        model, scale = transformer(ranges[index][0]), scales[index]
        served.append(index)
        with torch.no_grad():
            given = {"hidden_states": latent, "timestep": timestep[None], "return_dict": False}
            velocity = model(encoder_hidden_states=embeds, **given)[0]
            if scale != 1:
                away = model(encoder_hidden_states=negative, **given)[0]
                velocity = away + scale * (velocity - away)
        latent = pipe.scheduler.step(velocity, timestep, latent, return_dict=False)[0]
        path.append(latent)
    assert set(served) == set(range(len(ranges)))  # or nothing would be shown
    return path


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_two_experts_as_in_diffusers(runtime):
    """The whole of it: text, steps, frames."""
    theirs = make_pipeline()
    theirs.register_modules(transformer=transformer("wide"), transformer_2=transformer("narrow"))
    theirs.register_to_config(boundary_ratio=0.8)
    theirs.set_progress_bar_config(disable=True)
    expected = []

    def keep(_pipe, _step, _timestep, state):
        expected.append(state["latents"].clone())
        return state

    frames = theirs(
        "a red cat",
        negative_prompt="blurry",
        height=48,
        width=80,
        num_frames=9,
        num_inference_steps=6,
        guidance_scale=4.0,
        guidance_scale_2=2.0,
        latents=noise(),
        callback_on_step_end=keep,
    ).frames[0]
    latents, video = ours(bundle_of(TWO), runtime, guidance_scale=4.0, guidance_scale_2=2.0)
    assert_same_path(latents, expected)
    assert np.abs(video.frames / 255 - frames).max() <= 1 / 255 + TOLERANCE


@pytest.mark.parametrize(
    "ranges, given, scales",
    [
        (TWO, {"guidance_scale": 4.0, "guidance_scale_2": 2.0}, (4.0, 2.0)),
        (TWO, {"guidance_scale": 4.0, "guidance_scale_2": 1.0}, (4.0, 1.0)),
        (TWO, {}, (5.0, 5.0)),
        (THREE, {"guidance_scale": 4.0, "guidance_scale_2": 2.0}, (4.0, 2.0, 2.0)),
        (THREE, {"guidance_scales": [4.0, 1, 2.0]}, (4.0, 1.0, 2.0)),
    ],
    ids=["two", "one without guidance", "defaults", "three", "three scales"],
)
def test_steps_as_by_hand(ranges, given, scales):
    latents, video = ours(bundle_of(ranges), **given)
    assert_same_path(latents, by_hand(ranges, scales))
    assert video.metadata["guidance_scales"] == scales


def test_the_other_way_round_is_another_path():
    """Or the comparisons above would say nothing."""
    latents, _ = ours(bundle_of(TWO), guidance_scale=4.0, guidance_scale_2=2.0)
    turned = by_hand((("narrow", 1, 0.8), ("wide", 0.8, 0)), (4.0, 2.0))
    assert (latents[0] - turned[0]).abs().max() > 10 * TOLERANCE * turned[0].abs().max()


@pytest.mark.parametrize("ranges", [TWO, THREE], ids=["two", "three"])
@pytest.mark.parametrize("policy", ["resident", "phase", "stream"])
def test_residency_does_not_show(ranges, policy):
    """Experts of other dimensions take each other's place; a device tells if that is in order."""
    _, expected = ours(bundle_of(ranges))
    device = FakeDevice()
    with on_device(device, bundle_of(ranges), residency=policy) as pipe:
        for _ in range(2):
            video = pipe("a red cat", negative_prompt="blurry", init_latents=noise(), **SETTINGS)
            assert np.array_equal(video.frames, expected.frames)
    assert policy == "stream" or device.replays > 0


@pytest.mark.parametrize("policy", ["resident", "phase"])
@pytest.mark.parametrize("guided_at_once", [True, False])
def test_hints_of_vace_change_with_the_expert(policy, guided_at_once, monkeypatch):
    """Blocks of hints enter at other layers, and are used after the stack before them is done."""
    if not guided_at_once:
        for module in (denoiser, sizes):
            monkeypatch.setattr(module, "GUIDANCE_BATCH_TOKENS", 1)
    expected = frames_with_vace("torch")
    with on_device(FakeDevice(), vace_bundle(), residency=policy) as pipe:
        assert np.array_equal(pipe(**VACE).frames, expected)


VACE = {
    "prompt": "a red cat",
    "video": film(5, 48, 32),
    "size": (48, 32),
    "num_frames": 5,
    "num_inference_steps": 5,
    "seed": 1,
}


@cache
def vace_bundle():
    """Two hints among four layers of the first expert, and among six of the second."""
    wider = SMALL_DIMENSIONS.replace("dim=48", "dim=96", 1)
    ranges = [
        ExpertRange("vace-1.3b", SMALL_DIMENSIONS.format(layers=4), 1, 0.9),
        ExpertRange("vace-14b", wider.format(layers=6), 0.9, 0),
    ]
    out = Path(_folder().name) / "vace"
    return plan_build(experts=ranges, out=out, precision="fp32").run().path


def frames_with_vace(runtime):
    with Pipeline.load(vace_bundle(), runtime) as pipe:
        return pipe(**VACE).frames


def test_one_expert_is_its_checkpoint(tmp_path):
    hybrid = plan_build(experts=experts(("wide", 1, 0)), out=tmp_path / "a", precision="fp32").run()
    alone = plan_build(str(checkpoint("wide")), out=tmp_path / "b", precision="fp32").run()
    for mine, its in zip(ours(hybrid.path)[0], ours(alone.path)[0], strict=True):
        assert torch.equal(mine, its)


# -- The bundle -----------------------------------------------------------------------------------


def test_what_a_bundle_says_of_its_experts(tmp_path):
    bundle = Bundle.load(bundle_of(THREE))
    names = ["custom", "custom-2", "custom-3"]
    assert (bundle.variant.name, bundle.variant.task) == ("hybrid", "t2v")
    assert [expert.name for expert in bundle.variant.experts] == names
    assert bundle.variant.title == "custom to sigma 0.9, then custom-2 to sigma 0.7, then custom-3"
    assert {*bundle.precision} == {"text_encoder", *names, "vae"}
    described = describe_bundle(bundle)["experts"]
    assert [item["sigmas"] for item in described.values()] == [(1, 0.9), (0.9, 0.7), (0.7, 0)]
    _, video = ours(bundle.path)
    video.save(tmp_path / "video.mp4")
    assert read_metadata(tmp_path / "video.mp4")["experts"] == {
        "custom": [1.0, 0.9],
        "custom-2": [0.9, 0.7],
        "custom-3": [0.7, 0.0],
    }


def test_a_hybrid_is_verified_against_all_its_checkpoints(tmp_path):
    bundle = Bundle.load(bundle_of(TWO))
    report = verify(bundle, steps=3)
    assert report.ok
    assert {c.part for c in report.components} == {"text_encoder", "custom", "custom-2", "vae"}
    assert len(report.trajectory) == 3
    turned = (("narrow", 1, 0.8), ("wide", 0.8, 0))
    with pytest.raises(BundleError, match="another checkpoint"):
        verify(bundle, experts(*turned))


def test_a_second_build_makes_nothing_and_moved_boundaries_keep_the_weights(tmp_path):
    out = tmp_path / "bundle"
    plan_build(experts=experts(*TWO), out=out, precision="fp32").run()
    made = read_log(out).pieces
    assert plan_build(experts=experts(*TWO), out=out, precision="fp32").missing() == []
    moved = (("wide", 1, 0.5), ("narrow", 0.5, 0))
    again = plan_build(experts=experts(*moved), out=out, precision="fp32").run()
    assert read_log(out).pieces == made
    assert again.variant.boundary_ratios == (0.5,)


def test_an_interrupted_build_goes_on(tmp_path):
    def stop(what, done, total):
        if "custom-2" in what:
            raise KeyboardInterrupt

    plan = plan_build(experts=experts(*TWO), out=tmp_path / "bundle", precision="fp32")
    with pytest.raises(KeyboardInterrupt):
        plan.run(progress=stop)
    assert 0 < len(plan.missing()) < len(plan.pieces)
    bundle = plan_build(experts=experts(*TWO), out=tmp_path / "bundle", precision="fp32").run()
    assert bundle.fingerprint == Bundle.load(bundle_of(TWO)).fingerprint


def test_experts_of_one_checkpoint_share_their_graphs(tmp_path):
    """Those of an A14B model can be named one by one, with a boundary of one's own."""
    folder = save(make_pipeline(experts=2), tmp_path / "a14b")
    ranges = [
        ExpertRange("custom.high_noise", str(folder), 1, 0.6),
        ExpertRange("custom.low_noise", str(folder), 0.6, 0),
    ]
    bundle = plan_build(experts=ranges, out=tmp_path / "bundle", precision="fp32").run()
    assert bundle.variant.boundary_ratios == (0.6,)
    graphs = {bundle.graph("dit_stack", expert.name) for expert in bundle.variant.experts}
    assert len(graphs) == 1
    whole = plan_build(str(folder), out=tmp_path / "whole", precision="fp32").run()
    assert bundle.manifest.files.keys() - whole.manifest.files.keys() == {
        f"weights/custom.{name}.safetensors" for name in ("high_noise", "low_noise")
    }


# -- What is asked --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "14B@/models/wan:1-0.9,1.3B@random:0:dim=256,num_heads=2:0.9-0",
        "t2v-a14b.high_noise@/a,b:c/d:1-0.875,custom@./x@y=1:0.875-0",
        "nano@org/name-1.0-0.9:1-1e-05,nano@a:1e-05-0",
    ],
)
def test_lists_are_read_as_they_are_written(text):
    assert write_experts(parse_experts(text)) == text


def test_names_say_variant_and_expert():
    names = ["14B", "t2v-1.3b", "T2V-A14B.low_noise", "custom", "custom.high_noise"]
    assert [ExpertRange(name, "x", 1, 0).split_name() for name in names] == [
        ("t2v-14b", None),
        ("t2v-1.3b", None),
        ("t2v-a14b", "low_noise"),
        (None, None),
        (None, "high_noise"),
    ]


def test_a_folder_that_reads_like_a_range_is_refused():
    odd = [ExpertRange("14B", "/a:1-0.9,b", 1, 0.9), ExpertRange("14B", "/c", 0.9, 0)]
    with pytest.raises(SettingsError, match="rename the folder"):
        plan_build(experts=odd)


SMALL = (
    "dim=48,ffn_dim=80,num_heads=2,num_layers=2,vae.encoder_dim=8,vae.decoder_dim=8,"
    "text_encoder.dim=32,text_encoder.attention_dim=32,text_encoder.num_heads=2"
)
IMAGES = f"{SMALL},image_encoder.dim=160,image_encoder.num_heads=2"


def pair(first, second, boundary=0.9):
    return f"{first}:1-{boundary},{second}:{boundary}-0"


REFUSED = {
    "latent spaces": (
        pair("14B@random:0", "ti2v-5b@random:0"),
        CheckpointError,
        "t2v-14b and ti2v-5b are experts of different latent spaces: ti2v-5b has z_dim 48, not 16",
    ),
    "statistics": (
        pair(f"14B@random:0:{SMALL}", f"14B@random:0:{SMALL},vae.z_dim=8"),
        CheckpointError,
        "different latent spaces: t2v-14b-2 has z_dim 8, not 16; other latents_mean; other",
    ),
    "tasks": (
        pair("14B@random:0", "i2v-a14b.low_noise@random:0"),
        CheckpointError,
        "experts of different tasks: i2v-a14b.low_noise has i2v, not t2v",
    ),
    "conditions": (
        pair("i2v-14b-480p@random:0", "i2v-a14b.low_noise@random:0"),
        CheckpointError,
        "under different conditions: i2v-a14b.low_noise has image_dim None, not 1280",
    ),
    "text encoders": (
        pair(f"14B@random:0:{SMALL}", f"14B@random:0:{SMALL},text_encoder.num_layers=3"),
        CheckpointError,
        "behind different text encoders: t2v-14b-2 has num_layers 3, not 24",
    ),
    "image encoders": (
        pair(
            f"i2v-14b-480p@random:0:{IMAGES}",
            f"i2v-14b-480p@random:0:{IMAGES},image_encoder.num_layers=2",
        ),
        CheckpointError,
        "behind different image encoders: i2v-14b-480p-2 has num_layers 2, not 31",
    ),
    "no such checkpoint": (
        pair("14B@random:0", "1.3B@/nowhere/at/all"),
        CheckpointError,
        "no checkpoint '/nowhere/at/all'",
    ),
    "another variant": (
        pair("14B@random:0", f"1.3B@{NotImplemented}"),
        CheckpointError,
        "is not t2v-1.3b",
    ),
    "unknown variant": (
        pair("15B@random:0", "1.3B@random:0"),
        SettingsError,
        "unknown variant '15b'; did you mean",
    ),
    "task that is missing": (
        pair("14B@random:0", "s2v-14b@random:0"),
        Exception,
        "task s2v is not there yet",
    ),
    "which expert": (
        pair("14B@random:0", "t2v-a14b@random:0"),
        SettingsError,
        "random:0 has 2 experts; say t2v-a14b.high_noise or t2v-a14b.low_noise",
    ),
    "no such expert": (
        pair("14B@random:0", "t2v-a14b.low@random:0"),
        SettingsError,
        "random:0 has no expert low; say t2v-a14b.high_noise or t2v-a14b.low_noise",
    ),
    "gap": ("14B@random:0:1-0.9,1.3B@random:0:0.8-0", SettingsError, "a gap between"),
    "overlap": ("14B@random:0:1-0.9,1.3B@random:0:0.95-0", SettingsError, "an overlap between"),
    "out of range": ("14B@random:0:1.5-0.9,1.3B@random:0:0.9-0", SettingsError, "range 1.5-0.9"),
    "rising": ("14B@random:0:0-1", SettingsError, "sigmas fall"),
    "beginning": ("14B@random:0:0.9-0", SettingsError, "the first begins at 1"),
    "end": ("14B@random:0:1-0.5,1.3B@random:0:0.5-0.1", SettingsError, "the last ends at 0"),
    "no range": ("14B@random:0,1.3B@random:0", SettingsError, "cannot read"),
    "empty": ("", SettingsError, "is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_experts_that_cannot_take_turns_are_one_error(case, tmp_path, monkeypatch):
    text, kind, message = REFUSED[case]
    text = text.replace(str(NotImplemented), str(checkpoint("narrow")))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(kind) as refused:
        plan_build(experts=text, precision="fp32")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)
    assert not list(tmp_path.iterdir())


def test_experts_stand_alone():
    for others in ({"checkpoint": "random:0"}, {"variant": "14B"}):
        with pytest.raises(SettingsError, match="leave --checkpoint and --variant out"):
            plan_build(experts="14B@random:0:1-0", **others)
    with pytest.raises(SettingsError, match="leave --variant t2v-14b out"):
        open_checkpoint("14B@random:0:1-0", "14B")


def test_another_vae_of_the_same_dimensions_is_said(caplog):
    with caplog.at_level("INFO", logger="wantrt"):
        opened = open_checkpoint(pair(f"14B@random:0:{SMALL}", f"14B@random:1:{SMALL}"))
    assert [expert.guidance_scale for expert in opened.variant.experts] == [5.0, 5.0]
    assert f"VAE of the hybrid are those of random:0:{SMALL}" in caplog.text
    assert f"the VAE of random:1:{SMALL} has other weights" in caplog.text


@pytest.mark.parametrize("given", [{"guidance_scales": [1.0]}, {"guidance_scales": ["3", 2, 1]}])
def test_scales_are_one_an_expert(given):
    with Pipeline.load(bundle_of(THREE), "torch") as pipe:
        with pytest.raises(SettingsError, match="hybrid takes 3 number"):
            pipe.resolve("a red cat", **given)
        with pytest.raises(SettingsError, match="give no other"):
            pipe.resolve("a red cat", guidance_scale=2.0, guidance_scales=[1.0, 2.0, 3.0])
