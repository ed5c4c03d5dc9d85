"""Does nano show what the prompts say?  ``python -m wantrt.nano.evaluate --out report.json``

With ``--bundle nano-i2v`` videos start from images, drawn with the shape at rest in the middle, so
that the prompt alone says how it moves; the report tells how well the first frame is that image.

Generates a video for every held-out prompt (combinations of colour, shape and motion that training
never saw), through the same pipeline as ``wantrt generate``, and lets the judge look at it. Beside
it: how well the VAE reproduces real held-out clips, and how steady those are in the judge's eyes,
which is the best that a generated clip can be. About three minutes on two CPU cores.
"""

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from wantrt.checkpoints.opening import open_checkpoint
from wantrt.models.vae import VAE
from wantrt.nano.clips import draw_clips, middle_paths
from wantrt.nano.judge import Verdict, find_object, judge
from wantrt.nano.scenes import HELD_OUT_I2V_FILE, Scene, load_held_out
from wantrt.nano.train_vae import held_out_pixels
from wantrt.runtime.pipeline import Pipeline

Frames = NDArray[np.uint8]
ASPECTS = ("colour", "shape", "motion")


def evaluate_prompts(pipeline: Pipeline, prompts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Scores of the generated videos, in shares of one, and what went wrong."""
    verdicts = []
    for entry in prompts:
        video = pipeline(entry["prompt"], seed=entry["seed"])
        verdicts.append(judge(video.frames))
    return score(prompts, verdicts)


def evaluate_cases(pipeline: Pipeline, cases: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The same for videos that start from images, and the PSNR of their first frames in dB."""
    verdicts, fidelity = [], []
    for case in cases:
        image = draw_image(case)
        frames = pipeline(case["prompt"], image=image, seed=case["seed"]).frames
        verdicts.append(judge(frames))
        fidelity.append(psnr((((frames[0].astype(float) - image) / 127.5) ** 2).mean()))
    first_frame = {
        "mean": float(np.mean(fidelity)),
        "worst": float(np.min(fidelity)),
        "below_25": sum(value < 25 for value in fidelity),
    }
    return {**score(cases, verdicts), "first_frame_psnr": first_frame}


def draw_image(case: dict[str, Any]) -> Frames:
    """What a case starts from: its shape near the middle, uint8 [height, width, 3]."""
    scene = Scene(case["colour"], case["shape"], case["motion"], case["background"])
    clips = draw_clips([scene], case["seed"], num_frames=1, make_paths=middle_paths)
    return clips[0, 0].numpy()


def score(prompts: Sequence[dict[str, Any]], verdicts: Sequence[Verdict]) -> dict[str, Any]:
    """How many verdicts agree with their prompts, by aspect, and how steady the clips are."""
    right = {
        aspect: [getattr(v, aspect) == p[aspect] for p, v in zip(prompts, verdicts, strict=True)]
        for aspect in ASPECTS
    }
    mistakes = {
        aspect: Counter(
            f"{p[aspect]} -> {getattr(v, aspect)}"
            for p, v, ok in zip(prompts, verdicts, right[aspect], strict=True)
            if not ok
        )
        for aspect in ASPECTS
    }
    shares = {aspect: float(np.mean(flags)) for aspect, flags in right.items()}
    return {
        "prompts": len(prompts),
        **shares,
        "all": float(np.mean(np.all(list(right.values()), axis=0))),
        "collapsed": sum(v.collapsed for v in verdicts),
        **steadiness(verdicts),
        "mistakes": {aspect: dict(found.most_common()) for aspect, found in mistakes.items()},
    }


def steadiness(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Means over the clips that did not collapse."""
    whole = [v for v in verdicts if not v.collapsed]
    names = ("steady", "colour_drift", "outline_drift")
    return {name: float(np.mean([getattr(v, name) for v in whole])) for name in names}


@torch.no_grad()
def evaluate_vae(vae: VAE, count: int) -> dict[str, Any]:
    """PSNR in dB on `count` clips of held-out combinations, whole and over the object alone."""
    pixels = held_out_pixels(count)
    decoded = torch.cat([vae.decode(vae.encode(clip)[0])[0] for clip in pixels.split(1)])
    frames, frames_decoded = to_frames(pixels), to_frames(decoded)
    squared = ((decoded - pixels) ** 2).mean(dim=1).numpy()  # [B, F, H, W]
    region = [find_object(clip.astype(np.float64))[0] > 0.05 for clip in frames]
    whole = [psnr(error.mean()) for error in squared]
    inside = [psnr(error[mask].mean()) for error, mask in zip(squared, region, strict=True)]
    return {
        "clips": count,
        "psnr_mean": float(np.mean(whole)),
        "psnr_worst": float(np.min(whole)),
        "object_psnr_mean": float(np.mean(inside)),
        "object_psnr_worst": float(np.min(inside)),
        **steadiness([judge(clip) for clip in frames_decoded]),
    }


def psnr(error: float) -> float:
    """Of a mean squared error of signals in [-1, 1], in dB."""
    return float(10 * np.log10(4 / error))


def to_frames(pixels: torch.Tensor) -> Frames:
    """[B, 3, F, H, W] in [-1, 1] -> uint8 [B, F, H, W, 3]."""
    scaled = ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1).numpy()


def contact_sheet(clips: Sequence[Frames], every: int = 3) -> Frames:
    """One row a clip, every third frame: uint8 [height, width, 3]."""
    rows = [np.concatenate(list(clip[::every]), axis=1) for clip in clips]
    return np.concatenate(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, help="write the report here as JSON too")
    parser.add_argument("--bundle", help="a folder, nano (the default) or nano-i2v")
    parser.add_argument("--checkpoint", help="of the VAE; the default is nano's")
    parser.add_argument("--runtime", help="torch or onnxruntime")
    parser.add_argument("--prompts", type=int, default=0, help="only the first N")
    parser.add_argument("--clips", type=int, default=32, help="real clips for the VAE")
    arguments = parser.parse_args()
    count = arguments.prompts or None
    with Pipeline.load(arguments.bundle, arguments.runtime) as pipeline:
        if pipeline.variant.task == "i2v":
            cases = load_held_out(HELD_OUT_I2V_FILE)[:count]
            report = {"generated": evaluate_cases(pipeline, cases)}
        else:
            report = {"generated": evaluate_prompts(pipeline, load_held_out()[:count])}
    vae = open_checkpoint(arguments.checkpoint, "nano").load("vae", torch.float32)
    assert isinstance(vae, VAE)
    report["vae"] = evaluate_vae(vae, arguments.clips)
    text = json.dumps(report, indent=2)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n")


if __name__ == "__main__":
    main()
