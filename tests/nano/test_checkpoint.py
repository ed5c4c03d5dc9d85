"""The checkpoint that ships: its size, who can open it, and what its videos show."""

from pathlib import Path

import pytest
import torch

import wantrt.nano
from wantrt.checkpoints.opening import open_checkpoint
from wantrt.nano.evaluate import evaluate_vae
from wantrt.nano.judge import judge
from wantrt.nano.tokenizer import build_tokenizer
from wantrt.runtime.pipeline import Pipeline

CHECKPOINT = Path(wantrt.nano.__file__).parent / "checkpoint"


def test_small_and_in_half_precision():
    files = [path for path in CHECKPOINT.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12_000_000
    checkpoint = open_checkpoint(CHECKPOINT)
    assert checkpoint.variant.name == "nano"
    checkpoint.check()
    for part in checkpoint.parts.values():
        assert {spec.dtype for spec in part.tensors.specs.values()} == {torch.float16}


def test_its_tokenizer_is_the_one_of_the_recipe():
    text = (CHECKPOINT / "tokenizer" / "tokenizer.json").read_text()
    assert text == build_tokenizer().to_str(pretty=True)


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


@pytest.mark.parametrize("runtime", ["torch", "onnxruntime"])
def test_videos_show_what_the_prompts_say(runtime):
    with Pipeline.load(runtime=runtime) as pipeline:
        for prompt, (colour, shape, motion) in PROMPTS:
            verdict = judge(pipeline(prompt, seed=0).frames)
            assert (verdict.colour, verdict.shape, verdict.motion) == (colour, shape, motion)
