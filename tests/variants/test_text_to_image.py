"""One frame, saved as an image, of every variant that needs no more than a prompt."""

import json

import numpy as np
import pytest
from PIL import Image

from tests.runtime.test_sizes import RUNTIME, bundle_for
from tests.variants.small import bundle_of
from wantrt import Pipeline
from wantrt.cli import main
from wantrt.errors import SettingsError
from wantrt.media import read_metadata
from wantrt.runtime.sizes import resolve_for

VARIANTS = {"t2v-14b": (80, 48), "t2v-a14b": (80, 48), "ti2v-5b": (96, 64), "vace-1.3b": (80, 48)}


@pytest.fixture
def wantrt(tmp_path, monkeypatch, capfd):
    """Run a command in this process, in a folder of its own: exit code, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["wantrt", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, *capfd.readouterr()

    return run


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_by_the_command_line(wantrt, variant, runtime, tmp_path):
    width, height = VARIANTS[variant]
    code, out, _ = wantrt(
        *("generate", "a red circle", "--bundle", bundle_of(variant), "--runtime", runtime),
        *("--frames", 1, "--size", f"{width}x{height}", "--steps", 2, "--seed", 7),
        *("--out", "x.png", "--json"),
    )
    assert code == 0
    assert json.loads(out)["results"][0]["settings"]["num_frames"] == 1
    with Image.open("x.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
        written = np.asarray(image)
    assert read_metadata("x.png")["seed"] == 7
    with Pipeline.load(bundle_of(variant), runtime) as pipe:
        settings = {"size": (width, height), "num_inference_steps": 2, "seed": 7}
        video = pipe("a red circle", num_frames=1, **settings)
    assert video.frames.shape == (1, height, width, 3)
    assert np.array_equal(video.frames[0], written)


def test_an_image_is_what_one_frame_is_by_default(wantrt, tmp_path):
    code, out, _ = wantrt(
        *(
            "generate",
            "a red circle",
            "--frames",
            1,
            "--steps",
            1,
            "--seed",
            0,
            "--runtime",
            "torch",
        )
    )
    assert code == 0
    assert (tmp_path / "a-red-circle-0.png").is_file()
    assert "64x64, 1 frame, 1 steps, seed 0" in out


@pytest.mark.parametrize("out", ["x.gif", "x.mp4", "frames/"])
def test_one_frame_goes_into_every_format(out, tmp_path):
    with Pipeline.load(bundle_of("t2v-14b"), "torch") as pipe:
        video = pipe("a red circle", num_frames=1, size=(80, 48), num_inference_steps=1, seed=0)
    assert video.save(f"{tmp_path}/{out}").exists()


def test_plans_for_a_fixed_number_of_frames_make_no_image():
    bundle = bundle_for([(64, 48)], [5])
    with pytest.raises(SettingsError, match="do not serve 64x48 with 1 frames") as refused:
        resolve_for(bundle, RUNTIME, prompt="a cat", size=(64, 48), num_frames=1)
    assert "They serve 64x48 with 5 frames." in str(refused.value)
    assert "--size 64x48 --frames 1" in str(refused.value)  # the command that adds it
    both = bundle_for([(64, 48)], [5, 1])
    assert resolve_for(both, RUNTIME, prompt="a cat", num_frames=1).size == (64, 48)


def test_several_frames_are_no_image(wantrt, monkeypatch):
    """Said before anything is loaded."""
    monkeypatch.setattr("wantrt.runtime.pipeline.load_part", lambda *_, **__: pytest.fail("loads"))
    code, _, err = wantrt(
        *("generate", "x", "--bundle", bundle_of("t2v-14b"), "--runtime", "torch"),
        *("--size", "80x48", "--frames", 5, "--out", "x.png"),
    )
    assert code == 2
    assert "x.png holds one image, and this video has several frames" in err
