"""The Wan diffusion transformer, in the parts that run at different times.

``condition`` runs once a prompt, ``time`` once a schedule, ``patch`` → ``blocks`` → ``head`` once a
denoising step. Numerics are the official ones: matrix products and attention in the model's dtype;
the residual stream, norms, modulation, gates, time embedding and head in float32; the tables (RoPE,
time sinusoid) from float64, made on the host.

Where tokens of a video differ in noise level (the clean first frame of TI2V), they differ by data:
modulation comes as R rows and `token_row` says which row a token takes. R = 1 and no `token_row` is
plain T2V. Letters: B batch, L tokens, S text rows, C channels, H heads, D head_dim, R rows.
"""

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrt.config import DiTConfig
from wantrt.models.ops import TORCH_OPS, Ops, merge_heads, split_heads


class SelfAttention(nn.Module):
    """Full attention over all tokens of all frames, q and k RMS-normed over all heads together."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.qkv = nn.Linear(config.dim, 3 * config.dim, dtype=dtype)
        self.norm_q = Scale(config.dim)
        self.norm_k = Scale(config.dim)
        self.out = nn.Linear(config.dim, config.dim, dtype=dtype)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [B, L, C]; cos, sin: [L, D/2] -> [B, L, C]."""
        q, k, v = self.ops.qk_norm_rope(
            self.qkv(x),
            self.norm_q.weight,
            self.norm_k.weight,
            cos,
            sin,
            self.config.num_heads,
            self.config.eps,
        )
        return self.out(merge_heads(self.ops.attention(q, k, v, None, self.config.head_dim**-0.5)))


class CrossAttention(nn.Module):
    """Attention of the video tokens to the text rows: no mask (padding rows count), no RoPE."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.q = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.kv = nn.Linear(config.dim, 2 * config.dim, dtype=dtype)
        self.norm_q = Scale(config.dim)
        self.norm_k = Scale(config.dim)
        self.out = nn.Linear(config.dim, config.dim, dtype=dtype)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x: [B, L, C]; context: [B, S, C] -> [B, L, C]."""
        heads, eps = self.config.num_heads, self.config.eps
        q = self.ops.rms_norm(self.q(x), self.norm_q.weight, eps)
        k, v = self.kv(context).chunk(2, dim=-1)
        k = self.ops.rms_norm(k, self.norm_k.weight, eps)
        q, k, v = (split_heads(t, heads) for t in (q, k, v))
        return self.out(merge_heads(self.ops.attention(q, k, v, None, self.config.head_dim**-0.5)))


class Block(nn.Module):
    """Self-attention, cross-attention, feed-forward, each between a norm and a residual.

    The residual that ends one part and the norm that begins the next both pass over all tokens, so
    they are one operation, also from block to block: see `run_blocks`.
    """

    def __init__(self, config: DiTConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.eps, self.dtype, self.ops = config.eps, dtype, ops
        self.modulation = nn.Parameter(torch.zeros(6, config.dim))
        self.self_attn = SelfAttention(config, dtype, ops)
        self.cross_norm = nn.LayerNorm(config.dim, eps=config.eps)
        self.cross_attn = CrossAttention(config, dtype, ops)
        self.ffn = FeedForward(config.dim, config.ffn_dim, dtype, ops=ops)

    def forward(
        self,
        x: Tensor,
        e6: Tensor,
        token_row: Tensor | None,
        context: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        """x: [B, L, C]; e6: [B, R, 6, C], both float32; context: [B, S, C]; cos, sin: [L, D/2]."""
        return run_blocks([self], x, e6, token_row, context, cos, sin)

    def rows(self, e6: Tensor) -> Sequence[Tensor]:
        """shift, scale and gate of the self-attention, then of the feed-forward: six [B, R, C]."""
        return (self.modulation + e6).unbind(2)

    def run(
        self,
        x: Tensor,
        y: Tensor,
        rows: Sequence[Tensor],
        token_row: Tensor | None,
        context: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """x, and y = x modulated -> x, and the feed-forward's y, which is still to be added."""
        norm = self.cross_norm
        _, _, gate1, shift2, scale2, _ = rows
        y = self.self_attn(y, cos, sin)
        x, y = self.ops.gated_residual_norm(
            x, y, gate1, norm.weight, norm.bias, token_row, norm.eps, self.dtype
        )
        y = self.cross_attn(y, context)
        x, y = self.ops.gated_residual_modulate(
            x, y, None, shift2, scale2, token_row, self.eps, self.dtype
        )
        return x, self.ffn(y)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    e6: Tensor,
    token_row: Tensor | None,
    context: Tensor,
    cos: Tensor,
    sin: Tensor,
) -> Tensor:
    """Blocks, at least one, one after another; tensors as in `Block.forward`."""
    first, *others = cast("Iterable[Block]", blocks)
    ops, eps, dtype = first.ops, first.eps, first.dtype
    shift, scale, *_, gate = rows = first.rows(e6)
    y = ops.modulate(x, shift, scale, token_row, eps, dtype)
    x, y = first.run(x, y, rows, token_row, context, cos, sin)
    for block in others:
        rows = block.rows(e6)
        shift, scale = rows[:2]
        x, y = ops.gated_residual_modulate(x, y, gate, shift, scale, token_row, eps, dtype)
        x, y = block.run(x, y, rows, token_row, context, cos, sin)
        gate = rows[5]
    return ops.gated_residual(x, y, gate, token_row)


class DiTCondition(nn.Module):
    """Text features -> context, the rows that every block attends to."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.text = FeedForward(config.text_dim, config.dim, dtype, config.dim, ops)

    def forward(self, text_embeds: Tensor) -> Tensor:
        """text_embeds: [B, text_len, text_dim], rows past the prompt zero -> [B, text_len, C]."""
        return self.text(text_embeds.to(self.text.up.weight.dtype))


class DiTTime(nn.Module):
    """Timesteps -> modulation, in float32 whatever the model's dtype."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.freq_dim, config.dim)
        self.down = nn.Linear(config.dim, config.dim)
        self.modulation = nn.Linear(config.dim, 6 * config.dim)

    def forward(self, sinusoid: Tensor) -> tuple[Tensor, Tensor]:
        """sinusoid: [T, freq_dim], from `timestep_sinusoid` -> e [T, C], e6 [T, 6, C]."""
        e = self.down(F.silu(self.up(sinusoid)))
        return e, self.modulation(F.silu(e)).unflatten(-1, (6, -1))


class DiTPatch(nn.Module):
    """Latent -> hidden: one linear layer over each 1x2x2 patch of cells."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        cells = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.proj = nn.Linear(config.in_channels * cells, config.dim, dtype=dtype)

    def forward(self, latent: Tensor) -> Tensor:
        """latent: [B, in_channels, F, H, W] -> hidden [B, L, C] float32, by frame, row, column."""
        pt, ph, pw = self.patch_size
        x = latent.unflatten(4, (-1, pw)).unflatten(3, (-1, ph)).unflatten(2, (-1, pt))
        patches = x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3)  # [B, L, C·pt·ph·pw]
        hidden: Tensor = self.proj(patches.to(self.proj.weight.dtype))
        return hidden.float()


class DiTHead(nn.Module):
    """Hidden -> velocity, in float32."""

    def __init__(self, config: DiTConfig, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        cells = config.patch_size[0] * config.patch_size[1] * config.patch_size[2]
        self.modulation = nn.Parameter(torch.zeros(2, config.dim))
        self.proj = nn.Linear(config.dim, config.out_channels * cells)

    def forward(
        self, hidden: Tensor, e: Tensor, token_row: Tensor | None, latent: Tensor
    ) -> Tensor:
        """hidden: [B, L, C]; e: [B, R, C]; latent: [B, *, F, H, W], read for its shape alone.

        Returns the velocity (noise − x0) [B, out_channels, F, H, W].
        """
        shift, scale = (self.modulation + e.unsqueeze(2)).unbind(2)  # [B, R, C]
        y = self.ops.modulate(hidden, shift, scale, token_row, self.config.eps, torch.float32)
        pt, ph, pw = self.config.patch_size
        frames, height, width = latent.shape[2:]
        grid = (frames // pt, height // ph, width // pw)
        y = self.proj(y).unflatten(-1, (pt, ph, pw, -1)).unflatten(1, grid)
        return y.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class DiT(nn.Module):
    """The whole transformer. Its parts are what is exported and run; `forward` chains them."""

    def __init__(
        self, config: DiTConfig, dtype: torch.dtype = torch.float32, ops: Ops = TORCH_OPS
    ) -> None:
        super().__init__()
        self.config = config
        self.condition = DiTCondition(config, dtype, ops)
        self.time = DiTTime(config)
        self.patch = DiTPatch(config, dtype)
        self.blocks = nn.ModuleList(Block(config, dtype, ops) for _ in range(config.num_layers))
        self.head = DiTHead(config, ops)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        text_embeds: Tensor,
        token_row: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the latent.

        latent: [B, in_channels, F, H, W]; timestep: [B, R] in [0, 1000];
        text_embeds: [B, text_len, text_dim]; token_row: [L] int64 when R > 1.
        Returns [B, out_channels, F, H, W] float32.
        """
        frames, height, width = latent.shape[2:]
        cos, sin = rope_tables(self.config, frames, height, width, latent.device)
        e, e6 = self.time(timestep_sinusoid(timestep.flatten(), self.config.freq_dim))
        e, e6 = e.unflatten(0, timestep.shape), e6.unflatten(0, timestep.shape)  # [B, R, ...]
        context = self.condition(text_embeds)
        hidden = self.patch(latent)
        hidden = run_blocks(self.blocks, hidden, e6, token_row, context, cos, sin)
        return self.head(hidden, e, token_row, latent)


class FeedForward(nn.Module):
    """Linear, GELU (tanh), linear."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        dtype: torch.dtype,
        out_dim: int | None = None,
        ops: Ops = TORCH_OPS,
    ) -> None:
        super().__init__()
        self.ops = ops
        self.up = nn.Linear(dim, hidden_dim, dtype=dtype)
        self.down = nn.Linear(hidden_dim, out_dim or dim, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.ops.linear_gelu(x, self.up.weight, self.up.bias))


class Scale(nn.Module):
    """Holds the weight [C] of an RMS norm that one of the ops computes."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))


def timestep_sinusoid(timestep: Tensor, freq_dim: int) -> Tensor:
    """cos then sin of t · 10000^(−i / (freq_dim/2)). timestep: [T] -> [T, freq_dim] float32.

    Computed in float64: in bfloat16, t = 999 is 1000 and the table is wrong by up to 0.9.
    """
    half = freq_dim // 2
    index = torch.arange(half, dtype=torch.float64, device=timestep.device)
    angle = timestep.double()[:, None] * torch.pow(10000.0, -index / half)
    return torch.cat((angle.cos(), angle.sin()), dim=1).float()


def rope_tables(
    config: DiTConfig,
    latent_frames: int,
    latent_height: int,
    latent_width: int,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, Tensor]:
    """cos and sin of the 3-axis rotary angles, one row a token: [L, D/2] float32 from float64.

    The D/2 pairs of a head are split over (frame, row, column); each axis normalises its exponents
    by its own width (44, 42, 42 of D = 128).
    """
    pt, ph, pw = config.patch_size
    lengths = (latent_frames // pt, latent_height // ph, latent_width // pw)
    space = 2 * (config.head_dim // 6)
    tables = []
    for axis, (length, width) in enumerate(
        zip(lengths, (config.head_dim - 2 * space, space, space), strict=True)
    ):
        frequency = torch.pow(10000.0, -torch.arange(0, width, 2, dtype=torch.float64) / width)
        angle = torch.arange(length, dtype=torch.float64)[:, None] * frequency
        shape = [1, 1, 1, width // 2]
        shape[axis] = length
        tables.append(angle.view(shape).expand(*lengths, -1))
    angles = torch.cat(tables, dim=-1).flatten(0, 2)  # [L, D/2]
    return angles.cos().float().to(device), angles.sin().float().to(device)
