"""The recipe of nano-i2v, which starts from an image: the transformer of nano, trained on.

VAE, text encoder and tokenizer are nano's and stay. The transformer's patch embedding becomes wider
by the mask and the condition latent (as of Wan 2.2 I2V A14B), with zeros, so that training starts
from a model that makes videos and ignores the image.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from wantrt.checkpoints.opening import open_checkpoint
from wantrt.config import VARIANTS, DiTConfig
from wantrt.models.dit import DiT
from wantrt.models.umt5 import TextEncoder
from wantrt.models.vae import VAE
from wantrt.nano.clips import free_paths
from wantrt.nano.export import export_checkpoint
from wantrt.nano.latents import draw_pixels, encode_clips, normalise, training_scenes
from wantrt.nano.processes import rank
from wantrt.nano.train_dit import TextToVideo, train_dit
from wantrt.nano.train_vae import channels_last
from wantrt.tasks.i2v import frame_mask

NUM_CLIPS = 3072
DIT_STEPS = 3000


def train_nano_i2v(
    folder: Path,
    *,
    num_clips: int = NUM_CLIPS,
    dit_steps: int = DIT_STEPS,
    seed: int = 0,
    compiled: bool = False,
) -> Path:
    """Run the stages that are not done yet; returns the checkpoint's folder."""
    folder.mkdir(parents=True, exist_ok=True)
    variant, nano = VARIANTS["nano-i2v"], open_checkpoint(variant="nano")
    vae, text_encoder, dit = (
        nano.load(part, torch.float32) for part in ("vae", "text_encoder", "transformer")
    )
    assert isinstance(vae, VAE)
    assert isinstance(text_encoder, TextEncoder)
    assert isinstance(dit, DiT)
    channels_last(vae)
    scenes = training_scenes(num_clips, seed + 1)
    pixels = draw_pixels(scenes, seed + 1, free_paths)
    latents = encode_clips(vae, pixels, num_clips, folder / "latents")
    conditions = encode_clips(
        vae, lambda chosen: only_first(pixels(chosen)), num_clips, folder / "conditions"
    )
    model = train_dit(
        TextToVideo(widened(dit, variant.experts[0].dit), text_encoder),
        normalise(latents, variant.vae),
        scenes,
        folder / "dit.pt",
        num_steps=dit_steps,
        seed=seed,
        compiled=compiled,
        channels=behind_noise(normalise(conditions, variant.vae), variant.num_frames),
    )
    checkpoint = folder / "checkpoint"
    parts = {"transformer": model.dit, "text_encoder": text_encoder, "vae": vae}
    if rank() == 0:
        export_checkpoint(variant, parts, checkpoint)
    return checkpoint


def widened(dit: DiT, config: DiTConfig) -> DiT:
    """The transformer with a patch embedding for `config.in_channels`; it ignores the new ones."""
    weights = dit.state_dict()
    wide = DiT(config)
    more = wide.patch.proj.in_features - dit.patch.proj.in_features
    weights["patch.proj.weight"] = F.pad(weights["patch.proj.weight"], (0, more))  # by channel
    wide.load_state_dict(weights)
    return wide


def only_first(pixels: Tensor) -> Tensor:
    """The first frame and then grey, as at inference (wantrt/tasks/i2v.py). [B, 3, T, H, W]."""
    known = torch.zeros_like(pixels)
    known[:, :, 0] = pixels[:, :, 0]
    return known


def behind_noise(conditions: Tensor, num_frames: int) -> Tensor:
    """Mask and condition latent: [N, 16, F, H, W] -> [N, 20, F, H, W]."""
    mask = frame_mask([0], num_frames, *conditions.shape[-2:]).to(conditions)
    return torch.cat((mask.expand(len(conditions), -1, -1, -1, -1), conditions), dim=1)
