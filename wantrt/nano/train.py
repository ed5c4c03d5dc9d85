"""The recipe of the nano checkpoint: ``python -m wantrt.nano.train --out FOLDER``.

Draws the clips, trains the VAE, encodes the clips, trains the transformer with its text encoder,
and writes ``FOLDER/checkpoint`` in the Diffusers layout. Two hours on two CPU cores. Every stage
leaves its state in FOLDER and a second run goes on from there; delete a file to redo its stage.
"""

import argparse
from dataclasses import replace
from pathlib import Path

import torch

from wantrt.config import VARIANTS
from wantrt.nano.export import export_checkpoint
from wantrt.nano.latents import encode_clips, latent_statistics, training_scenes
from wantrt.nano.train_dit import train_dit
from wantrt.nano.train_vae import held_out_pixels, train_vae

NUM_CLIPS = 5000
VAE_STEPS = 1200
DIT_STEPS = 10_000


def train_nano(folder: Path, *, vae_steps: int, num_clips: int, dit_steps: int, seed: int) -> Path:
    """Run the stages that are not done yet; returns the checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    variant = VARIANTS["nano"]
    vae = train_vae(variant.vae, folder / "vae.pt", vae_steps, seed)
    scenes = training_scenes(num_clips, seed)
    means = encode_clips(vae, scenes, seed, folder / "latents.pt")
    mean, deviation = latent_statistics(vae, means, held_out_pixels(8))
    variant = replace(variant, vae=replace(variant.vae, latents_mean=mean, latents_std=deviation))
    scale = [torch.tensor(v).view(1, -1, 1, 1, 1) for v in (mean, deviation)]
    latents = ((means.float() - scale[0]) / scale[1]).half()
    dit = variant.experts[0].dit
    model = train_dit(
        dit, variant.text_encoder, latents, scenes, folder / "dit.pt", dit_steps, seed
    )
    checkpoint = folder / "checkpoint"
    parts = {"transformer": model.dit, "text_encoder": model.text_encoder, "vae": vae}
    export_checkpoint(variant, parts, checkpoint)
    return checkpoint


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--out", type=Path, required=True, help="folder for everything")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS)
    parser.add_argument("--clips", type=int, default=NUM_CLIPS)
    parser.add_argument("--dit-steps", type=int, default=DIT_STEPS)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    checkpoint = train_nano(
        arguments.out,
        vae_steps=arguments.vae_steps,
        num_clips=arguments.clips,
        dit_steps=arguments.dit_steps,
        seed=arguments.seed,
    )
    print(checkpoint)


if __name__ == "__main__":
    main()
