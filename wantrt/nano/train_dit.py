"""Last stage: the transformer and its text encoder together, on latents encoded beforehand.

Flow matching as Wan does it: between clean latent and noise on a straight line, predict
noise - clean. Text is padded to the transformer's `text_len` rows exactly as at inference. Captions
are worded anew each time a clip comes up, one in ten is empty (for guidance).
"""

import random
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wantrt.config import Variant
from wantrt.models.dit import Block, DiT
from wantrt.models.umt5 import TextEncoder, TextLayer
from wantrt.nano.loop import train
from wantrt.nano.processes import rank
from wantrt.nano.scenes import Scene, caption
from wantrt.nano.tokenizer import build_tokenizer

BATCH = 12  # a process; two processes make 24
LEARNING_RATE = 1.5e-3
TRAIN_SHIFT = 3.0  # noise levels lean towards the noisy end, where a clip's content is decided
EMPTY = 0.1
STRANGE_WORDS = 0.05  # how often a caption holds a word the tokenizer does not know


class TextToVideo(nn.Module):
    """The two modules that are trained together."""

    def __init__(self, dit: DiT, text_encoder: TextEncoder) -> None:
        super().__init__()
        self.dit, self.text_encoder = dit, text_encoder

    def encode(self, tokenizer: Tokenizer, prompts: list[str]) -> Tensor:
        """Prompts -> text_embeds [B, text_len, text_dim], rows past each prompt zero."""
        text_len = self.dit.config.text_len
        ids = [encoding.ids[:text_len] for encoding in tokenizer.encode_batch(prompts)]
        longest = max(map(len, ids))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in ids])
        embeds = self.text_encoder(tokens, (tokens != 0).long())
        return F.pad(embeds, (0, 0, 0, text_len - longest))

    def loss(self, latent: Tensor, channels: Tensor | None, text_embeds: Tensor) -> Tensor:
        """Flow-matching loss of clean latents [B, C, F, H, W] at random noise levels.

        channels: [B, C', F, H, W], what the transformer is given behind the noisy latent.
        """
        level = (torch.rand(()) + torch.arange(len(latent)) / len(latent)) % 1  # evenly spread
        sigma = TRAIN_SHIFT * level / (1 + (TRAIN_SHIFT - 1) * level)
        noise = torch.randn_like(latent)
        noisy = torch.lerp(latent, noise, sigma.view(-1, 1, 1, 1, 1))
        if channels is not None:
            noisy = torch.cat((noisy, channels), dim=1)
        velocity = self.dit(noisy, 1000 * sigma[:, None], text_embeds)
        return F.mse_loss(velocity, noise - latent)


def new_model(variant: Variant, seed: int) -> TextToVideo:
    """The modules of a variant, as training starts with them."""
    torch.manual_seed(seed)
    model = TextToVideo(DiT(variant.experts[0].dit), TextEncoder(variant.text_encoder))
    initialise(model)
    return model


def train_dit(
    model: TextToVideo,
    latents: Tensor,
    scenes: list[Scene],
    file: Path,
    *,
    num_steps: int,
    seed: int = 0,
    compiled: bool = False,
    channels: Tensor | None = None,
) -> TextToVideo:
    """Train on normalised latents [N, C, F, H, W] of the scenes; see `loop.train` for `file`.

    channels: [N, C', F, H, W], what the transformer is given behind each clip's noisy latent.
    `compiled` makes a step a third cheaper; it needs a C++ compiler and, once, two minutes.
    """
    tokenizer = build_tokenizer()
    rng = random.Random(seed + rank())
    if compiled:
        for block in model.dit.blocks:
            block.compile(dynamic=False)

    def loss() -> Tensor:
        chosen = torch.randint(len(latents), (BATCH,))
        prompts = [say(scenes[i], rng) for i in chosen.tolist()]
        given = None if channels is None else channels[chosen].float()
        return model.loss(latents[chosen].float(), given, model.encode(tokenizer, prompts))

    with sdpa_kernel(SDPBackend.MATH):  # faster than the fused one at this size on a CPU
        weights = train(
            model, loss, file, num_steps=num_steps, lr=LEARNING_RATE, average=0.998, seed=seed
        )
    model.load_state_dict(weights)
    return model.eval().requires_grad_(False)


def say(scene: Scene, rng: random.Random) -> str:
    """A caption for training: sometimes none, sometimes with a word from outside."""
    if rng.random() < EMPTY:
        return ""
    words = caption(scene, rng).split()
    if rng.random() < STRANGE_WORDS:
        words.insert(rng.randrange(len(words) + 1), "something")
    return " ".join(words)


@torch.no_grad()
def initialise(model: TextToVideo) -> None:
    """Every block starts as the identity: residual branches end in zeros, gates are open."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, Block):
            for last in (module.self_attn.out, module.cross_attn.out, module.ffn.down):
                nn.init.zeros_(last.weight)
            module.modulation[[2, 5]] = 1.0
        elif isinstance(module, TextLayer):
            nn.init.zeros_(module.out.weight)
            nn.init.zeros_(module.down.weight)
            module.qkv.weight[: module.config.attention_dim] *= module.config.head_dim**-0.5
    nn.init.zeros_(model.dit.time.modulation.weight)
    nn.init.zeros_(model.dit.head.proj.weight)
    nn.init.normal_(model.text_encoder.embed.weight)
