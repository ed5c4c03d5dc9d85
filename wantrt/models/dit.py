"""The Wan diffusion transformer, in the parts that run at different times.

``condition`` runs once a prompt, ``time`` once a schedule, ``patch`` → ``blocks`` → ``head`` once a
denoising step. Numerics are the official ones: matrix products and attention in the model's dtype;
the residual stream, norms, modulation, gates, time embedding and head in float32; the tables (RoPE,
time sinusoid) from float64, made on the host.

A model that starts from an image also attends to rows of image features (I2V, FLF2V); one that is
controlled by a video (VACE) has a second chain of blocks, whose hints enter between its blocks.

Where tokens of a video differ in noise level (the clean first frame of TI2V), they differ by data:
modulation comes as R rows and `token_row` says which row a token takes. R = 1 and no `token_row` is
plain T2V. Letters: B batch, L tokens, S text rows, C channels, H heads, D head_dim, R rows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

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
    """Attention of the video tokens to the text rows: no mask (padding rows count), no RoPE.

    Where there is an image, a second attention to its rows with the same queries is added.
    """

    def __init__(self, config: DiTConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        self.q = nn.Linear(config.dim, config.dim, dtype=dtype)
        self.kv = nn.Linear(config.dim, 2 * config.dim, dtype=dtype)
        self.norm_q = Scale(config.dim)
        self.norm_k = Scale(config.dim)
        if config.image_dim is not None:
            self.image_kv = nn.Linear(config.dim, 2 * config.dim, dtype=dtype)
            self.norm_k_image = Scale(config.dim)
        self.out = nn.Linear(config.dim, config.dim, dtype=dtype)

    def forward(self, x: Tensor, context: Tensor, image_context: Tensor | None = None) -> Tensor:
        """x: [B, L, C]; context: [B, S, C]; image_context: [B, N, C] -> [B, L, C]."""
        q = self.ops.rms_norm(self.q(x), self.norm_q.weight, self.config.eps)
        q = split_heads(q, self.config.num_heads)
        y = self._attend(q, self.kv(context), self.norm_k)
        if image_context is not None:
            y = y + self._attend(q, self.image_kv(image_context), self.norm_k_image)
        return self.out(merge_heads(y))

    def _attend(self, q: Tensor, kv: Tensor, norm_k: "Scale") -> Tensor:
        k, v = kv.chunk(2, dim=-1)
        k = self.ops.rms_norm(k, norm_k.weight, self.config.eps)
        k, v = (split_heads(t, self.config.num_heads) for t in (k, v))
        return self.ops.attention(q, k, v, None, self.config.head_dim**-0.5)


class BlockInputs(NamedTuple):
    """What every block of a step is given besides the tokens."""

    e6: Tensor  # [B, R, 6, C] float32
    token_row: Tensor | None  # [L]
    context: Tensor  # [B, S, C]
    cos: Tensor  # [L, D/2]
    sin: Tensor
    image_context: Tensor | None = None  # [B, N, C]


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
        image_context: Tensor | None = None,
    ) -> Tensor:
        """x: [B, L, C] float32; the rest: see `BlockInputs`. Returns x."""
        return run_blocks([self], x, BlockInputs(e6, token_row, context, cos, sin, image_context))

    def rows(self, e6: Tensor) -> Sequence[Tensor]:
        """shift, scale and gate of the self-attention, then of the feed-forward: six [B, R, C]."""
        return (self.modulation + e6).unbind(2)

    def run(
        self, x: Tensor, y: Tensor, rows: Sequence[Tensor], given: BlockInputs
    ) -> tuple[Tensor, Tensor]:
        """x, and y = x modulated -> x, and the feed-forward's y, which is still to be added."""
        norm = self.cross_norm
        _, _, gate1, shift2, scale2, _ = rows
        y = self.self_attn(y, given.cos, given.sin)
        x, y = self.ops.gated_residual_norm(
            x, y, gate1, norm.weight, norm.bias, given.token_row, norm.eps, self.dtype
        )
        y = self.cross_attn(y, given.context, given.image_context)
        x, y = self.ops.gated_residual_modulate(
            x, y, None, shift2, scale2, given.token_row, self.eps, self.dtype
        )
        return x, self.ffn(y)


def run_blocks(
    blocks: Iterable[nn.Module],
    x: Tensor,
    given: BlockInputs,
    hint: Tensor | None = None,
    hint_scale: Tensor | None = None,
) -> Tensor:
    """Blocks, at least one, one after another. x: [B, L, C] float32.

    hint: [B, L, C] and hint_scale: [1], multiplied and added behind the first block; for models
    with one row of modulation.
    """
    first, *others = cast("Iterable[Block]", blocks)
    ops, eps, dtype, token_row = first.ops, first.eps, first.dtype, given.token_row
    shift, scale, *_, gate = rows = first.rows(given.e6)
    y = ops.modulate(x, shift, scale, token_row, eps, dtype)
    x, y = first.run(x, y, rows, given)
    if hint is not None and hint_scale is not None:
        x, y = ops.gated_residual(x, y, gate, token_row), hint
        gate = hint_scale.expand(x.shape[0], 1, x.shape[2])
    for block in others:
        rows = block.rows(given.e6)
        shift, scale = rows[:2]
        x, y = ops.gated_residual_modulate(x, y, gate, shift, scale, token_row, eps, dtype)
        x, y = block.run(x, y, rows, given)
        gate = rows[5]
    return ops.gated_residual(x, y, gate, token_row)


class ImageProjection(nn.Module):
    """CLIP features -> rows that every block attends to (official ``img_emb``).

    `positions` tell a first image's rows from a last one's (FLF2V).
    """

    EPS = 1e-5

    def __init__(self, config: DiTConfig, image_dim: int, dtype: torch.dtype) -> None:
        super().__init__()
        if config.image_positions is not None:
            self.positions = nn.Parameter(torch.zeros(config.image_positions, image_dim))
        self.norm_in = nn.LayerNorm(image_dim, eps=self.EPS)
        self.up = nn.Linear(image_dim, image_dim, dtype=dtype)
        self.down = nn.Linear(image_dim, config.dim, dtype=dtype)
        self.norm_out = nn.LayerNorm(config.dim, eps=self.EPS)
        self.has_positions = config.image_positions is not None

    def forward(self, features: Tensor) -> Tensor:
        """features: [B, N, image_dim] float32 -> [B, N, C] in the model's dtype."""
        dtype = self.up.weight.dtype
        x = features + self.positions if self.has_positions else features
        x = self.down(F.gelu(self.up(self.norm_in(x).to(dtype))))
        return self.norm_out(x.float()).to(dtype)


class DiTCondition(nn.Module):
    """Text features -> context, image features -> image_context: what every block attends to."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.text = FeedForward(config.text_dim, config.dim, dtype, config.dim, ops)
        if config.image_dim is not None:
            self.image = ImageProjection(config, config.image_dim, dtype)

    def forward(
        self, text_embeds: Tensor, image_features: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """text_embeds: [B, text_len, text_dim], rows past the prompt zero -> [B, text_len, C].

        image_features: [B, N, image_dim] -> [B, N, C], None for models without an image.
        """
        context = self.text(text_embeds.to(self.text.up.weight.dtype))
        return context, None if image_features is None else self.image(image_features)


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


class VaceStart(nn.Module):
    """The context of a controlled video (VACE) and the tokens -> the second chain's tokens."""

    def __init__(self, config: DiTConfig, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.patch = DiTPatch(replace(config, in_channels=channels), dtype)
        self.proj = nn.Linear(config.dim, config.dim, dtype=dtype)

    def forward(self, vace_context: Tensor, hidden: Tensor) -> Tensor:
        """vace_context: [B, channels, F, H, W]; hidden: [B, L, C] -> [B, L, C] float32."""
        tokens = self.patch(vace_context).to(self.proj.weight.dtype)
        return self.proj(tokens).float() + hidden


class VaceBlock(nn.Module):
    """Block m of the second chain, and the hint that it gives to the main block vace_layers[m]."""

    def __init__(self, config: DiTConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.block = Block(replace(config, image_dim=None), dtype, ops)
        self.proj = nn.Linear(config.dim, config.dim, dtype=dtype)

    def forward(self, x: Tensor, given: BlockInputs) -> tuple[Tensor, Tensor]:
        """x: [B, L, C] float32 -> x, and the hint [B, L, C] in the model's dtype."""
        x = run_blocks([self.block], x, given)
        return x, self.proj(x.to(self.proj.weight.dtype))


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
        if config.vace_channels is not None:
            self.vace_start = VaceStart(config, config.vace_channels, dtype)
            self.vace_blocks = nn.ModuleList(
                VaceBlock(config, dtype, ops) for _ in config.vace_layers
            )
        self.head = DiTHead(config, ops)

    def forward(
        self,
        latent: Tensor,
        timestep: Tensor,
        text_embeds: Tensor,
        token_row: Tensor | None = None,
        image_features: Tensor | None = None,
        vace_context: Tensor | None = None,
        vace_scale: float = 1.0,
    ) -> Tensor:
        """Velocity of the latent.

        latent: [B, in_channels, F, H, W]; timestep: [B, R] in [0, 1000];
        text_embeds: [B, text_len, text_dim]; token_row: [L] int64 when R > 1;
        image_features: [B, N, image_dim]; vace_context: [B, vace_channels, F, H, W].
        Returns [B, out_channels, F, H, W] float32.
        """
        frames, height, width = latent.shape[2:]
        cos, sin = rope_tables(self.config, frames, height, width, latent.device)
        e, e6 = self.time(timestep_sinusoid(timestep.flatten(), self.config.freq_dim))
        e, e6 = e.unflatten(0, timestep.shape), e6.unflatten(0, timestep.shape)  # [B, R, ...]
        context, image_context = self.condition(text_embeds, image_features)
        given = BlockInputs(e6, token_row, context, cos, sin, image_context)
        hidden = self.patch(latent)
        if vace_context is None:
            hidden = run_blocks(self.blocks, hidden, given)
        else:
            hidden = self._run_with_hints(hidden, given, vace_context, vace_scale)
        return self.head(hidden, e, token_row, latent)

    def _run_with_hints(
        self, hidden: Tensor, given: BlockInputs, vace_context: Tensor, vace_scale: float
    ) -> Tensor:
        scale = torch.full((1,), vace_scale, device=hidden.device)
        chain = self.vace_start(vace_context, hidden)
        vace_blocks = iter(self.vace_blocks)
        for index, block in enumerate(self.blocks):
            hint = None
            if index in self.config.vace_layers:
                chain, hint = next(vace_blocks)(chain, given)
            hidden = run_blocks([block], hidden, given, hint, scale)
        return hidden


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
