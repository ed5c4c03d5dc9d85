"""The image encoder: the ViT-H/14 of open-CLIP, up to the last but one of its blocks.

What comes out of that block is the result: class token kept, no norm behind it, no projection.
Source: the official ``wan/modules/clip.py`` (``use_31_block``); it is `hidden_states[-2]` of
transformers' ``CLIPVisionModel``. The residual stream and the norms are float32 whatever the dtype
of the matrix products. Letters: B images, N tokens (patches and the class token), C channels, H
heads.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrt.config import ImageEncoderConfig
from wantrt.models.ops import TORCH_OPS, Ops, merge_heads, split_heads

IMAGE_MEAN = (0.48145466, 0.4578275, 0.40821073)  # of red, green and blue in [0, 1]; the encoder
IMAGE_STD = (0.26862954, 0.26130258, 0.27577711)  # takes pixels that are normalised with these


class ImageEmbed(nn.Module):
    """Pixels -> hidden: one linear layer over each patch, the class token in front, positions."""

    def __init__(self, config: ImageEncoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.proj = nn.Linear(3 * config.patch_size**2, config.dim, bias=False, dtype=dtype)
        self.class_token = nn.Parameter(torch.zeros(config.dim))
        self.positions = nn.Parameter(torch.zeros(config.num_tokens, config.dim))
        self.norm = nn.LayerNorm(config.dim, eps=config.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, size, size], normalised -> hidden [B, N, C] float32, by row, column."""
        size = self.patch_size
        x = pixels.unflatten(3, (-1, size)).unflatten(2, (-1, size))
        patches = x.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # [B, N − 1, 3·size²]
        x = self.proj(patches.to(self.proj.weight.dtype)).float()
        class_token = self.class_token.expand(x.shape[0], 1, -1)
        return self.norm(torch.cat((class_token, x), dim=1) + self.positions)


class ImageBlock(nn.Module):
    """Self-attention and feed-forward, each behind a norm and added to the residual."""

    def __init__(self, config: ImageEncoderConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.config, self.dtype, self.ops = config, dtype, ops
        self.attn_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, dtype=dtype)
        self.out = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.ffn_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.up = nn.Linear(config.dim, config.ffn_dim, dtype=dtype)
        self.down = nn.Linear(config.ffn_dim, config.dim, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, N, C] float32."""
        heads, scale = self.config.num_heads, self.config.head_dim**-0.5
        y = self.attn_norm(x).to(self.dtype)
        q, k, v = (split_heads(t, heads) for t in self.qkv(y).chunk(3, dim=-1))
        x = x + self.out(merge_heads(self.ops.attention(q, k, v, None, scale))).float()
        y = F.gelu(self.up(self.ffn_norm(x).to(self.dtype)))  # exact, by the error function
        return x + self.down(y).float()


class ImageEncoder(nn.Module):
    """The whole encoder, of the `num_layers` blocks that run."""

    def __init__(
        self, config: ImageEncoderConfig, dtype: torch.dtype = torch.float32, ops: Ops = TORCH_OPS
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = ImageEmbed(config, dtype)
        self.blocks = nn.ModuleList(
            ImageBlock(config, dtype, ops) for _ in range(config.num_layers)
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels: [B, 3, size, size], normalised -> features [B, N, C] float32."""
        x = self.embed(pixels)
        for block in self.blocks:
            x = block(x)
        return x
