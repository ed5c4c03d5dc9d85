"""The UMT5 encoder: T5 v1.1 whose every layer has its own table of position biases.

Padding never reaches a valid token, so the encoder may run at a prompt's true length (plus whatever
padding a static shape wants): the rows of valid tokens are the same. Attention has no 1/√d.
The residual stream and the norms are float32 whatever the dtype; float16 overflows in the
feed-forward and is refused elsewhere. Letters: B batch, S tokens, C channels, H heads.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrt.config import TextEncoderConfig
from wantrt.models.ops import TORCH_OPS, Ops, merge_heads, split_heads


class TextLayer(nn.Module):
    def __init__(self, config: TextEncoderConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.config, self.dtype, self.ops = config, dtype, ops
        self.attn_norm = nn.Parameter(torch.ones(config.dim))
        self.qkv = nn.Linear(config.dim, 3 * config.attention_dim, bias=False, dtype=dtype)
        self.position_bias = nn.Parameter(torch.zeros(config.num_buckets, config.num_heads))
        self.out = nn.Linear(config.attention_dim, config.dim, bias=False, dtype=dtype)
        self.ffn_norm = nn.Parameter(torch.ones(config.dim))
        self.gate = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=dtype)
        self.up = nn.Linear(config.dim, config.ffn_dim, bias=False, dtype=dtype)
        self.down = nn.Linear(config.ffn_dim, config.dim, bias=False, dtype=dtype)

    def forward(self, x: Tensor, position_buckets: Tensor, mask: Tensor) -> Tensor:
        """x: [B, S, C] float32; position_buckets: [S, S]; mask: [B, S], 1 valid, 0 padding."""
        y = self.ops.rms_norm(x, self.attn_norm, self.config.eps).to(self.dtype)
        q, k, v = (split_heads(t, self.config.num_heads) for t in self.qkv(y).chunk(3, dim=-1))
        bias = self.position_bias[position_buckets].permute(2, 0, 1)  # [H, S, S]
        padding = (1 - mask.float()) * torch.finfo(torch.bfloat16).min  # finite in every dtype
        bias = (bias + padding[:, None, None, :]).to(self.dtype)  # [B, H, S, S]
        x = x + self.out(merge_heads(self.ops.attention(q, k, v, bias, 1.0))).float()
        y = self.ops.rms_norm(x, self.ffn_norm, self.config.eps).to(self.dtype)
        y = self.up(y) * F.gelu(self.gate(y), approximate="tanh")
        return x + self.down(y).float()


class TextEmbed(nn.Module):
    def __init__(self, config: TextEncoderConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(config.vocab_size, config.dim, dtype=dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [B, S] int64 -> hidden [B, S, C] float32."""
        return F.embedding(tokens, self.weight).float()


class TextHead(nn.Module):
    """The final norm; padding rows become zero, as the DiT expects them."""

    def __init__(self, config: TextEncoderConfig, ops: Ops) -> None:
        super().__init__()
        self.eps, self.ops = config.eps, ops
        self.norm = nn.Parameter(torch.ones(config.dim))

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """hidden: [B, S, C]; mask: [B, S] -> text_embeds [B, S, C] float32."""
        return self.ops.rms_norm(hidden, self.norm, self.eps) * mask.float().unsqueeze(-1)


class TextEncoder(nn.Module):
    """The whole encoder. Its parts are what is exported and run; `forward` chains them."""

    def __init__(
        self, config: TextEncoderConfig, dtype: torch.dtype = torch.float32, ops: Ops = TORCH_OPS
    ) -> None:
        super().__init__()
        self.config = config
        self.embed = TextEmbed(config, dtype)
        self.layers = nn.ModuleList(TextLayer(config, dtype, ops) for _ in range(config.num_layers))
        self.head = TextHead(config, ops)

    def forward(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """tokens: [B, S] int64; mask: [B, S], 1 valid, 0 padding -> text_embeds [B, S, C]."""
        buckets = position_buckets(self.config, tokens.shape[1], tokens.device)
        hidden = self.embed(tokens)
        for layer in self.layers:
            hidden = layer(hidden, buckets, mask)
        return self.head(hidden, mask)


def position_buckets(
    config: TextEncoderConfig, num_tokens: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Bucket of every (query, key) pair, [S, S] int64: T5's bidirectional, logarithmic buckets.

    Half the buckets for keys after the query, half for the others; in each half the first half is
    exact distances, the rest grows logarithmically up to `max_distance`.
    """
    half = config.num_buckets // 2
    exact = half // 2
    position = torch.arange(num_tokens, device=device)
    offset = position[None, :] - position[:, None]  # key − query
    distance = offset.abs()
    ratio = (distance.clamp(min=1).float() / exact).log() / math.log(config.max_distance / exact)
    large = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
    return torch.where(distance < exact, distance, large) + (offset > 0).long() * half
