"""The checkpoints that ship: their size, who can open them, and what their videos show."""

import filecmp

import pytest
import torch

from wantrt.checkpoints.opening import open_checkpoint
from wantrt.config import SHIPPED
from wantrt.nano.evaluate import draw_image, evaluate_cases, evaluate_vae
from wantrt.nano.judge import judge
from wantrt.nano.scenes import HELD_OUT_I2V_FILE, load_held_out
from wantrt.nano.tokenizer import build_tokenizer
from wantrt.runtime.pipeline import Pipeline

CHECKPOINT = SHIPPED["nano"]


@pytest.mark.parametrize("name, most_bytes", [("nano", 12_000_000), ("nano-i2v", 8_000_000)])
def test_small_and_in_half_precision(name, most_bytes):
    files = [path for path in SHIPPED[name].rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= most_bytes
    checkpoint = open_checkpoint(SHIPPED[name])
    assert checkpoint.variant.name == name
    checkpoint.check()
    for part in checkpoint.parts.values():
        assert {spec.dtype for spec in part.tensors.specs.values()} == {torch.float16}


@pytest.mark.parametrize("name", SHIPPED)
def test_its_tokenizer_is_the_one_of_the_recipe(name):
    text = (SHIPPED[name] / "tokenizer" / "tokenizer.json").read_text()
    assert text == build_tokenizer().to_str(pretty=True)


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_the_transformer_alone_is_another(part):
    file = f"{part}.safetensors"
    assert filecmp.cmp(SHIPPED["nano"] / file, SHIPPED["nano-i2v"] / file, shallow=False)


def test_diffusers_opens_it_too():
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.WanPipeline.from_pretrained(CHECKPOINT)
    ids = pipe.tokenizer("a red circle moves right").input_ids
    assert ids == build_tokenizer().encode("a red circle moves right").ids
    assert pipe.transformer.config.num_layers == 6


def test_the_vae_reproduces_clips_of_held_out_combinations():
    vae = open_checkpoint(CHECKPOINT).load("vae", torch.float32)
    report = evaluate_vae(vae, 4)
    assert report["psnr_mean"] > 30
    assert report["psnr_worst"] > 27
    assert report["steady"] > 0.85


PROMPTS = (
    ("a red circle moves right", ("red", "circle", "right")),
    ("a blue square moves up", ("blue", "square", "up")),
)


def test_diffusers_opens_the_one_for_images_too():
    diffusers = pytest.importorskip("diffusers")
    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(
        SHIPPED["nano-i2v"], image_encoder=None, image_processor=None
    )
    assert pipe.transformer.config.in_channels == 36
    assert pipe.image_encoder is None


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_videos_show_what_the_prompts_say(runtime):
    with Pipeline.load(runtime=runtime) as pipeline:
        for prompt, (colour, shape, motion) in PROMPTS:
            verdict = judge(pipeline(prompt, seed=0).frames)
            assert (verdict.colour, verdict.shape, verdict.motion) == (colour, shape, motion)


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_videos_start_with_the_image_and_move_as_the_prompt_says(runtime):
    """A sample; all: python -m wantrt.nano.evaluate --bundle nano-i2v."""
    cases = load_held_out(HELD_OUT_I2V_FILE)
    image = draw_image(cases[0])
    with Pipeline.load("nano-i2v", runtime) as pipeline:
        report = evaluate_cases(pipeline, cases[::12])
        other = pipeline("a purple square moves down", image=image, seed=0).frames
    assert report["motion"] >= 0.8
    assert report["colour"] == 1
    assert report["first_frame_psnr"]["mean"] >= 25
    assert cases[0]["motion"] == "up"
    assert judge(other).motion == "down"  # the prompt decides, not the image
