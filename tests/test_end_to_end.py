"""From a prompt to a file whose frames show what the prompt said: nano, on every runtime."""

import json
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from wantrt import Pipeline
from wantrt.build import plan_build
from wantrt.media import read_metadata
from wantrt.nano.evaluate import draw_image
from wantrt.nano.judge import judge
from wantrt.nano.scenes import load_held_out
from wantrt.runtime.loading import RUNTIMES

# One plain prompt a motion and more than one colour and shape, with seeds that both runtimes share.
PROMPTS = {
    "a red circle moves right": ("red", "circle", "right"),
    "a blue square moves down": ("blue", "square", "down"),
    "a yellow star grows": ("yellow", "star", "grow"),
}
HELD_OUT_EVERY = 25  # of the held-out prompts, those that are tried here too


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return plan_build(variant="nano", out=tmp_path_factory.mktemp("nano") / "bundle").run().path


# Those of plans need a GPU and a bundle with plans: tests/engines/test_pipeline_on_fake.py.
RUNTIMES_OF_ALL_BUNDLES = {name: r for name, r in RUNTIMES.items() if not r.compiled}


@pytest.fixture(scope="module", params=RUNTIMES_OF_ALL_BUNDLES)
def pipe(request, bundle):
    runtime = RUNTIMES[request.param]
    if missing := runtime.missing():
        pytest.skip(f"{request.param}: {missing}")
    with Pipeline.load(bundle, runtime=request.param) as pipe:
        yield pipe


def test_videos_show_what_the_prompts_say(pipe):
    for prompt, expected in PROMPTS.items():
        seen = judge(pipe(prompt, seed=0).frames)
        assert (seen.colour, seen.shape, seen.motion) == expected, prompt


def test_combinations_that_training_never_saw(pipe):
    """A sample; the whole list and its scores: python -m wantrt.nano.evaluate."""
    entries = load_held_out()[::HELD_OUT_EVERY]
    verdicts = [judge(pipe(entry["prompt"], seed=entry["seed"]).frames) for entry in entries]
    for aspect, at_least in (("colour", 0.8), ("motion", 0.7), ("shape", 0.5)):
        right = [getattr(v, aspect) == e[aspect] for v, e in zip(verdicts, entries, strict=True)]
        assert np.mean(right) >= at_least, aspect


def test_runtimes_show_the_same(bundle):
    """Different sums, the same video: frames differ by no more than what 20 steps amplify."""
    videos = []
    for name, runtime in RUNTIMES_OF_ALL_BUNDLES.items():
        if runtime.missing() is None:
            with Pipeline.load(bundle, runtime=name) as pipe:
                videos.append(pipe("a green triangle rotates", seed=1).frames.astype(int))
    for other in videos[1:]:
        assert np.abs(other - videos[0]).mean() < 0.5


def test_the_command_writes_a_video_of_the_prompt(tmp_path):
    """As a stranger would: no bundle, no options but the file's name."""
    out = tmp_path / "video.mp4"
    command = [sys.executable, "-m", "wantrt.cli", "generate", "a red circle moves right"]
    done = subprocess.run(
        [*command, "--out", str(out), "--seed", "0", "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["results"][0]["out"] == str(out)
    with av.open(str(out)) as container:
        frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
    seen = judge(frames)
    assert (seen.colour, seen.shape, seen.motion) == ("red", "circle", "right")
    assert read_metadata(out)["prompt"] == "a red circle moves right"


def test_the_command_starts_from_an_image(tmp_path):
    """The checkpoint that takes one is chosen by itself."""
    scene = {"colour": "blue", "shape": "square", "motion": "up", "background": "white"}
    image, out = tmp_path / "square.png", tmp_path / "frames"
    Image.fromarray(draw_image({**scene, "seed": 1})).save(image)
    command = [sys.executable, "-m", "wantrt.cli", "generate", "a blue square moves up"]
    command += ["--image", str(image), "--out", f"{out}/", "--seed", "0"]
    subprocess.run(command, capture_output=True, text=True, check=True)
    frames = np.stack([np.array(Image.open(file)) for file in sorted(out.iterdir())])
    seen = judge(frames)
    assert (seen.colour, seen.shape, seen.motion) == ("blue", "square", "up")
    assert np.abs(frames[0].astype(int) - np.array(Image.open(image))).mean() < 6
    metadata = read_metadata(out)
    assert metadata["variant"] == "nano-i2v"
    assert metadata["source"] == {"image": str(image)}
