"""The recipe of the nano checkpoint: ``python -m wantrt.nano.train --out FOLDER``.

Draws the clips, trains the VAE, encodes the clips, trains the transformer with its text encoder,
and writes ``FOLDER/checkpoint`` in the Diffusers layout. Two hours on two CPU cores, with

    torchrun --nproc-per-node 2 -m wantrt.nano.train --out FOLDER

Every stage leaves its state in FOLDER and a second run goes on from there; delete a file to redo
its stage.
"""

import argparse
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from wantrt.config import VARIANTS
from wantrt.nano.export import export_checkpoint
from wantrt.nano.latents import (
    draw_pixels,
    encode_clips,
    latent_statistics,
    normalise,
    training_scenes,
)
from wantrt.nano.processes import rank
from wantrt.nano.train_dit import new_model, train_dit
from wantrt.nano.train_i2v import train_nano_i2v
from wantrt.nano.train_vae import held_out_pixels, refine_decoder, train_vae

NUM_CLIPS = 3072
VAE_STEPS = 1200
DECODER_STEPS = 900
DIT_STEPS = 5400


def train_nano(
    folder: Path,
    *,
    vae_steps: int = VAE_STEPS,
    decoder_steps: int = DECODER_STEPS,
    num_clips: int = NUM_CLIPS,
    dit_steps: int = DIT_STEPS,
    seed: int = 0,
    compiled: bool = False,
) -> Path:
    """Run the stages that are not done yet; returns the checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    variant = VARIANTS["nano"]
    vae = train_vae(variant.vae, folder / "vae.pt", vae_steps, seed)
    refine_decoder(vae, folder / "decoder.pt", decoder_steps, seed)
    scenes = training_scenes(num_clips, seed)
    means = encode_clips(vae, draw_pixels(scenes, seed), num_clips, folder / "latents")
    mean, deviation = latent_statistics(vae, means, held_out_pixels(8))
    variant = replace(variant, vae=replace(variant.vae, latents_mean=mean, latents_std=deviation))
    model = train_dit(
        new_model(variant, seed),
        normalise(means, variant.vae),
        scenes,
        folder / "dit.pt",
        num_steps=dit_steps,
        seed=seed,
        compiled=compiled,
    )
    checkpoint = folder / "checkpoint"
    parts = {"transformer": model.dit, "text_encoder": model.text_encoder, "vae": vae}
    if rank() == 0:
        export_checkpoint(variant, parts, checkpoint)
    return checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--variant", choices=("nano", "nano-i2v"), default="nano")
    parser.add_argument("--vae-steps", type=int, help=f"nano alone, default {VAE_STEPS}")
    parser.add_argument("--decoder-steps", type=int, help=f"nano alone, default {DECODER_STEPS}")
    parser.add_argument("--num-clips", type=int)
    parser.add_argument("--dit-steps", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument(
        "--compile", action="store_true", dest="compiled", help="torch.compile the transformer"
    )
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    folder, variant = given.pop("out"), given.pop("variant")
    if "WORLD_SIZE" in os.environ:  # started by torchrun
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
    recipe: Callable[..., Path] = train_nano if variant == "nano" else train_nano_i2v
    checkpoint = recipe(folder, **given)
    if rank() == 0:
        print(checkpoint)


if __name__ == "__main__":
    main()
