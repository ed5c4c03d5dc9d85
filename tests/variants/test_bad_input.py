"""What does not fit a variant is one clear sentence, said before any weight is loaded."""

import numpy as np
import pytest
from PIL import Image

from tests.tasks.pictures import film, moving_mask, picture
from tests.variants.small import bundle_of
from wantrt import Pipeline
from wantrt.cli import main
from wantrt.errors import MediaError, SettingsError

IMAGE = picture(48, 32)
FILM, MASK = film(9, 48, 32), moving_mask(9, 48, 32)
I2V, FLF2V, A14B, TI2V, VACE = "i2v-14b-480p", "flf2v-14b", "i2v-a14b", "ti2v-5b", "vace-1.3b"
ENDS = {"image": IMAGE, "last_image": IMAGE}
HALF = "half.png"  # of an image

# variant, what is given, what is said
REFUSED = [
    ("t2v-a14b", {"image": IMAGE}, "takes no --image; it takes nothing but a prompt"),
    ("t2v-a14b", {"fit": "crop"}, "there is none"),
    (I2V, {}, "needs --image"),
    (A14B, {}, "needs --image"),
    (A14B, ENDS, "takes no --last-image; it takes --image"),
    (A14B, {"image": IMAGE, "video": FILM}, "takes no --video"),
    (A14B, {"image": IMAGE, "context_scale": 2.0}, "context_scale is for VACE"),
    (A14B, {"image": IMAGE, "size": (50, 48)}, "50x48 is not a multiple of 16 .* nearest: 48x48"),
    (A14B, {"image": IMAGE, "num_frames": 10}, "10 frames is not .* nearest: 9 or 13"),
    (A14B, {"image": IMAGE, "fit": "bend"}, "unknown fit 'bend'"),
    (A14B, {"image": picture(2000, 3), "fit": "area"}, "2000x3 is too narrow"),
    (I2V, {"image": IMAGE, "guidance_scale_2": 3.0}, "has one expert"),
    (FLF2V, {"image": IMAGE}, "needs --last-image"),
    (FLF2V, {"last_image": IMAGE}, "needs --image"),
    (FLF2V, {**ENDS, "num_frames": 1}, "at least 5; nearest: 5"),
    (TI2V, {"image": IMAGE, "size": (80, 48)}, "not a multiple of 32 .* nearest: 64x64"),
    (TI2V, {"last_image": IMAGE}, "takes no --last-image; it takes --image"),
    (VACE, {"image": IMAGE}, "it takes --video, --mask, --reference-image"),
    (VACE, {"mask": MASK}, "a mask needs the video"),
    (VACE, {"video": FILM, "mask": MASK[:5]}, "the mask has 5 frames and the video 9"),
    (VACE, {"video": FILM, "mask": moving_mask(9, 64, 32)}, "the mask is 64x32 and the video 48x"),
    (VACE, {"video": FILM, "num_frames": 8}, "8 frames is not .* nearest: 5 or 9"),
    (VACE, {"video": FILM, "context_scale": float("nan")}, "use a finite number"),
    (VACE, {"reference_images": [picture(4, 40)], "convention": "diffusers"}, "of 4x40 is too sm"),
    (VACE, {"reference_images": [IMAGE], "fit": "crop"}, "there is none"),
]
UNREADABLE = [
    (A14B, {"image": "none.png"}, "there is no such file"),
    (A14B, {"image": "text.png"}, "it is none of PNG, JPEG"),
    (A14B, {"image": HALF}, "truncated"),
    (A14B, {"image": "."}, "it is not a file"),
    (A14B, {"image": 5}, "or the path of one, got int"),
    (A14B, {"image": [IMAGE]}, "or the path of one, got list"),
    (A14B, {"image": np.zeros((4, 4))}, r"expected pixels uint8 \[H, W, 3\]"),
    (FLF2V, {"image": IMAGE, "last_image": HALF}, "truncated"),
    (VACE, {"reference_images": [IMAGE, "none.png"]}, "there is no such file"),
    (VACE, {"reference_images": "text.png"}, "it is none of PNG, JPEG"),
    (VACE, {"video": "none.mp4"}, "there is no such file or folder"),
    (VACE, {"video": "."}, "different sizes|none of PNG|truncated"),
    (VACE, {"video": "mixed"}, "mixed holds frames of different sizes: 48x32 and 64x32"),
    (VACE, {"video": FILM, "mask": "mixed"}, "mixed holds frames of different sizes"),
    (VACE, {"video": "with text"}, "1.png: it is none of PNG, JPEG"),
    (VACE, {"video": FILM[:0]}, "has no frames"),
    (VACE, {"video": 5}, "got int"),
    (VACE, {"video": FILM, "mask": "text.png"}, "it is none of PNG, JPEG"),
]


@pytest.fixture(scope="module")
def refuses():
    """Raises what a generation raises; no part of the bundle may have been loaded by then."""
    pipes = {}

    def run(variant, **given):
        if variant not in pipes:
            pipes[variant] = Pipeline.load(bundle_of(variant), "torch", residency="phase")
        pipe = pipes[variant]
        settings = {"size": (64, 32), "num_frames": 9, "num_inference_steps": 1, **given}
        try:
            pipe("a red circle", callback=lambda _: pytest.fail("work began"), **settings)
        finally:
            assert not any(part._sessions for part in pipe.parts.values())

    yield run
    for pipe in pipes.values():
        pipe.close()


@pytest.mark.parametrize("variant, given, said", REFUSED)
def test_what_does_not_fit(refuses, variant, given, said):
    with pytest.raises(SettingsError, match=said) as caught:
        refuses(variant, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("variant, given, said", UNREADABLE)
def test_what_cannot_be_read(refuses, variant, given, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(IMAGE).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / HALF).write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    for folder in ("mixed", "with text"):
        (tmp_path / folder).mkdir()
        Image.fromarray(IMAGE).save(tmp_path / folder / "0.png")
    Image.fromarray(picture(64, 32)).save(tmp_path / "mixed" / "1.png")
    (tmp_path / "with text" / "1.png").write_text("no image")
    with pytest.raises(MediaError, match=said) as caught:
        refuses(variant, **given)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("option", ["--image", "--last-image", "--video", "--mask"])
def test_an_input_that_is_given_twice(option, monkeypatch, capfd):
    """The command line would take the last one."""
    monkeypatch.setattr("sys.argv", ["wantrt", "generate", "x", option, "a.png", option, "b.png"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert f"{option}': it is given 2 times; give one" in " ".join(capfd.readouterr().err.split())
