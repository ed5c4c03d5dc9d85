"""The whole pipeline against diffusers' WanPipeline, and what a pipeline promises its users."""

import threading

import numpy as np
import pytest
import torch

from tests.runtime.diffusers_checkpoint import make_pipeline, save
from wantrt import Pipeline
from wantrt.build import plan_build
from wantrt.bundle import Bundle
from wantrt.errors import CancelledError, ExecutionError, SettingsError

PROMPT, NEGATIVE = "a red cat surfing", "blurry static"
WIDTH, HEIGHT, FRAMES, STEPS = 80, 48, 9, 5


@pytest.fixture(scope="module", params=[1, 2], ids=["dense", "two experts"])
def theirs_and_bundle(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipeline")
    theirs = make_pipeline(experts=request.param)
    checkpoint = save(theirs, folder / "checkpoint")
    plan_build(str(checkpoint), out=folder / "bundle", runtime="onnxruntime").run()
    theirs.set_progress_bar_config(disable=True)
    return theirs, folder / "bundle"


@pytest.fixture(scope="module")
def pipe(theirs_and_bundle):
    with Pipeline.load(theirs_and_bundle[1]) as pipe:
        yield pipe


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_latents_and_frames_are_those_of_diffusers(theirs_and_bundle, runtime):
    """fp32, from the same latents: both within 1e-3 of scale."""
    theirs, bundle = theirs_and_bundle
    latents = torch.randn(1, 16, 3, HEIGHT // 8, WIDTH // 8)
    arguments = {
        "prompt": PROMPT,
        "negative_prompt": NEGATIVE,
        "height": HEIGHT,
        "width": WIDTH,
        "num_frames": FRAMES,
        "num_inference_steps": STEPS,
        "guidance_scale": 4.0,
    }
    expected_latents = theirs(**arguments, latents=latents, output_type="latent").frames
    expected_frames = theirs(**arguments, latents=latents, output_type="np").frames[0]
    seen = []
    with Pipeline.load(bundle, runtime=runtime) as pipe:
        video = pipe(
            PROMPT,
            negative_prompt=NEGATIVE,
            size=(WIDTH, HEIGHT),
            num_frames=FRAMES,
            num_inference_steps=STEPS,
            guidance_scale=4.0,
            convention="diffusers",
            init_latents=latents,
            callback=lambda p: seen.append(None if p.latents is None else p.latents.clone()),
        )
    final = [latents for latents in seen if latents is not None][-1]
    scale = expected_latents.abs().max()
    assert (final - expected_latents).abs().max() <= 1e-3 * scale
    assert video.frames.shape == (FRAMES, HEIGHT, WIDTH, 3)
    difference = np.abs(video.frames / 255.0 - expected_frames)
    assert difference.max() <= 1 / 255 + 1e-3  # ours are truncated to 8 bits


def test_streaming_gives_the_frames_of_the_whole(pipe):
    settings = {"size": (64, 64), "num_frames": 13, "num_inference_steps": 2, "seed": 1}
    chunks = list(pipe.stream(PROMPT, **settings))
    assert [len(chunk) for chunk in chunks] == [1, 4, 4, 4]
    assert np.array_equal(np.concatenate(chunks), pipe(PROMPT, **settings).frames)


def test_a_seed_means_the_same_bits(theirs_and_bundle, pipe):
    settings = {"size": (64, 64), "num_frames": 5, "num_inference_steps": 3}
    first = pipe(PROMPT, seed=7, **settings)
    pipe("a blue dog runs", seed=8, **settings)  # what else was cached must not matter
    assert np.array_equal(first.frames, pipe(PROMPT, seed=7, **settings).frames)
    assert not np.array_equal(first.frames, pipe(PROMPT, seed=8, **settings).frames)
    with Pipeline.load(theirs_and_bundle[1]) as fresh:
        assert np.array_equal(first.frames, fresh(PROMPT, seed=7, **settings).frames)


def test_a_video_says_how_it_was_made(pipe):
    video = pipe(PROMPT, size=(64, 64), num_frames=1, num_inference_steps=1, seed=3)
    made = video.metadata
    assert (made["prompt"], made["seed"], made["size"]) == (PROMPT, 3, (64, 64))
    assert made["bundle"] == pipe.bundle.fingerprint
    assert set(video.timings) == {"text_s", "denoise_s", "decode_s"}


def test_progress_counts_every_piece(pipe):
    seen = []
    settings = {"size": (64, 64), "num_frames": 9, "num_inference_steps": 3, "seed": 0}
    pipe("a prompt not seen before", callback=lambda p: seen.append((p.stage, p.done)), **settings)
    assert seen[-6:] == [
        *(("denoise", done) for done in (1, 2, 3)),
        *(("decode", done) for done in (1, 2, 3)),
    ]
    assert seen[0][0] == "text"


def test_a_prompt_is_embedded_once_until_it_is_forgotten(pipe):
    def stages():
        seen = []
        settings = {"size": (64, 64), "num_frames": 1, "num_inference_steps": 1, "seed": 0}
        pipe("said twice", callback=lambda p: seen.append(p.stage), **settings)
        return seen

    assert "text" in stages()
    assert "text" not in stages()
    pipe.text_encoder.forget()
    assert "text" in stages()


def test_a_phase_is_over_when_the_device_has_done_its_work(pipe, monkeypatch):
    """On a GPU work goes on behind Python's back; seconds of a phase must not."""
    waits = []
    monkeypatch.setattr(pipe.device, "synchronize", lambda: waits.append(1), raising=False)
    pipe(PROMPT, size=(64, 64), num_frames=5, num_inference_steps=1, seed=0)
    assert len(waits) >= 4  # text, denoising, two chunks


def test_an_open_bundle_is_loaded_as_its_folder_is(theirs_and_bundle, pipe):
    settings = {"size": (64, 64), "num_frames": 1, "num_inference_steps": 1, "seed": 0}
    with Pipeline.load(Bundle.load(theirs_and_bundle[1])) as opened:
        assert np.array_equal(opened(PROMPT, **settings).frames, pipe(PROMPT, **settings).frames)


def test_a_callback_cancels_and_the_pipeline_lives_on(pipe):
    settings = {"size": (64, 64), "num_frames": 5, "num_inference_steps": 4, "seed": 0}
    with pytest.raises(CancelledError, match="after 2 of 4"):
        pipe(PROMPT, callback=lambda p: not (p.stage == "denoise" and p.done == 2), **settings)
    with pytest.raises(CancelledError):
        pipe(PROMPT, callback=lambda p: pipe.cancel(), **settings)
    assert pipe(PROMPT, **settings).frames.shape == (5, 64, 64, 3)


def test_full_memory_is_an_error_that_says_what_to_do(pipe):
    def fill(progress):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.\nSee the manual")

    settings = {"size": (64, 64), "num_frames": 5, "num_inference_steps": 1, "seed": 0}
    with pytest.raises(ExecutionError, match=r"allocate 9 GiB\. Take --residency phase"):
        pipe(PROMPT, callback=fill, **settings)
    assert pipe(PROMPT, **settings).frames.shape == (5, 64, 64, 3)


def test_one_generation_at_a_time(pipe):
    settings = {"size": (64, 64), "num_frames": 5, "num_inference_steps": 1, "seed": 0}
    stream = pipe.stream(PROMPT, **settings)
    next(stream)
    errors = []

    def second():
        try:
            pipe(PROMPT, **settings)
        except ExecutionError as error:
            errors.append(error)

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    assert "already generating" in str(errors[0])
    stream.close()
    assert pipe(PROMPT, **settings).frames.shape == (5, 64, 64, 3)


def test_init_latents_of_another_size_are_refused(pipe):
    with pytest.raises(SettingsError, match=r"need \[1, 16, 2, 8, 8\]"):
        pipe(PROMPT, size=(64, 64), num_frames=5, init_latents=torch.zeros(1, 16, 2, 8, 9), seed=0)


def test_a_closed_pipeline_says_so(theirs_and_bundle):
    pipe = Pipeline.load(theirs_and_bundle[1], runtime="torch")
    pipe.close()
    pipe.close()
    with pytest.raises(ExecutionError, match="closed"):
        pipe(PROMPT)
