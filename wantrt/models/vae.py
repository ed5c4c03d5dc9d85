"""The causal 3-D VAEs of Wan 2.1 and 2.2, encoder and decoder, in streaming form.

Every temporal convolution looks two frames back. Those frames are explicit tensors, the *feature
caches*: a chunk takes the caches its predecessor left and returns its own. A stream starts with
``caches=None``, which stands for zeros; nothing is hidden in module state. A chunk may hold any
number of frames, so a whole clip is one chunk that starts a stream, and gives what its pieces give.

Frames of a stream: the first pixel frame stands alone, then come groups of four. One latent frame
decodes to 1 frame at the start and to 4 afterwards; encoding is the mirror of it.

The 2.2 VAE works on patches of pixels, and each of its stages has a shortcut without parameters
(`wantrt.models.folding`); the layers, their order and so their caches are those of 2.1.

Memory, not arithmetic, is what streaming buys: decoding 832x480 whole needs tens of GiB, by chunks
the two banks of caches (3.5 GiB each in float32) and the activations of four frames.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wantrt.config import VAEConfig
from wantrt.models.folding import average_down, duplicate_up, patchify, unpatchify
from wantrt.models.ops import TORCH_OPS, Ops, channel_norm


class Caches:
    """The feature caches of one chunk: read in slot order, replaced in slot order.

    `old` are the tensors the previous chunk left, None at the start of a stream; `new` fills up
    as the chunk runs, one tensor a slot, and is what the next chunk takes.
    """

    def __init__(self, old: Sequence[Tensor] | None) -> None:
        self.old = old
        self.new: list[Tensor] = []

    @property
    def starts_stream(self) -> bool:
        return self.old is None

    def extend(self, x: Tensor, frames: int = 2) -> Tensor:
        """Put the slot's cached frames before x [B, C, T, H, W] and cache the last `frames`."""
        if self.old is None:
            window = F.pad(x, (0, 0, 0, 0, frames, 0))
        else:
            window = torch.cat((self.old[len(self.new)], x), dim=2)
        # contiguous is a copy: a view would keep all windows in memory until the chunk is done
        self.new.append(window[:, :, -frames:].contiguous())
        return window

    def skip(self, x: Tensor) -> None:
        """Leave two zero frames in the slot: its convolution does not run in this chunk."""
        self.new.append(torch.zeros_like(x[:, :, :1]).expand(-1, -1, 2, -1, -1))


class ChannelNorm(nn.Module):
    """See `channel_norm`; with SiLU behind it, it is the operation `rms_silu`."""

    def __init__(self, channels: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return channel_norm(x, self.gamma)


class CausalConv3d(nn.Conv3d):
    """A 3x3x3 (or 3x1x1) convolution whose two past frames come from the caches."""

    def __init__(
        self, channels: int, out_channels: int, kernel: tuple[int, int, int], dtype: torch.dtype
    ) -> None:
        padding = (0, kernel[1] // 2, kernel[2] // 2)
        super().__init__(channels, out_channels, kernel, padding=padding, dtype=dtype)

    def stream(self, x: Tensor, caches: Caches) -> Tensor:
        """x: [B, C, T, H, W] -> [B, C', T, H, W]."""
        window = caches.extend(x)
        if caches.starts_stream and x.shape[2] == 1:  # before the only frame there is nothing
            frame = F.conv2d(x[:, :, 0], self.weight[:, :, 2], self.bias, padding=self.padding[1:])
            return frame.unsqueeze(2)
        return self(window)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out_channels: int, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.norm1 = ChannelNorm(channels, dtype)
        self.conv1 = CausalConv3d(channels, out_channels, (3, 3, 3), dtype)
        self.norm2 = ChannelNorm(out_channels, dtype)
        self.conv2 = CausalConv3d(out_channels, out_channels, (3, 3, 3), dtype)
        self.shortcut = (
            nn.Conv3d(channels, out_channels, 1, dtype=dtype)
            if channels != out_channels
            else nn.Identity()
        )

    def stream(self, x: Tensor, caches: Caches) -> Tensor:
        y = self.conv1.stream(self.ops.rms_silu(x, self.norm1.gamma), caches)
        y = self.conv2.stream(self.ops.rms_silu(y, self.norm2.gamma), caches)
        return y + self.shortcut(x)


class FrameAttention(nn.Module):
    """Single-head attention over the positions of each frame; frames do not mix."""

    def __init__(self, channels: int, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.norm = ChannelNorm(channels, dtype)
        self.qkv = nn.Linear(channels, 3 * channels, dtype=dtype)
        self.proj = nn.Linear(channels, channels, dtype=dtype)
        self.ops = ops

    def stream(self, x: Tensor, caches: Caches) -> Tensor:
        channels, height, width = x.shape[1], x.shape[3], x.shape[4]
        y = self.norm(x).permute(0, 2, 3, 4, 1).flatten(2, 3)  # [B, T, HW, C]
        q, k, v = self.qkv(y).chunk(3, dim=-1)  # frames stand where attention has its heads
        y = self.proj(self.ops.attention(q, k, v, None, channels**-0.5))
        return x + y.unflatten(2, (height, width)).permute(0, 4, 1, 2, 3)


class Downsample(nn.Module):
    """Halve height and width, and time too where `temporal`."""

    def __init__(self, channels: int, temporal: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, dtype=dtype)
        self.time_conv = (
            nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1), dtype=dtype)
            if temporal
            else None
        )

    def stream(self, x: Tensor, caches: Caches) -> Tensor:
        x = frames_as_batch(lambda frames: self.conv(F.pad(frames, (0, 1, 0, 1))), x)
        if self.time_conv is None:
            return x
        if not caches.starts_stream:
            return self.time_conv(caches.extend(x, frames=1))
        caches.extend(x, frames=1)  # the first frame of a stream is not merged with another
        if x.shape[2] == 1:
            return x
        return torch.cat((x[:, :, :1], self.time_conv(x)), dim=2)


class Upsample(nn.Module):
    """Double height and width; double time first where `temporal`."""

    def __init__(
        self, channels: int, out_channels: int, temporal: bool, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.time_conv = (
            CausalConv3d(channels, 2 * channels, (3, 1, 1), dtype) if temporal else None
        )
        self.conv = nn.Conv2d(channels, out_channels, 3, padding=1, dtype=dtype)

    def stream(self, x: Tensor, caches: Caches) -> Tensor:
        if self.time_conv is not None:
            x = self._double_frames(x, caches, self.time_conv)
        return frames_as_batch(lambda frames: self.conv(double_pixels(frames)), x)

    def _double_frames(self, x: Tensor, caches: Caches, time_conv: CausalConv3d) -> Tensor:
        """[B, C, T, H, W] -> [B, C, 2T, H, W]; a stream's first frame stays one, and unseen."""
        first = x[:, :, :1]
        if caches.starts_stream:
            if x.shape[2] == 1:
                caches.skip(x)
                return x
            x = x[:, :, 1:]
        pairs = time_conv.stream(x, caches).unflatten(1, (2, -1))  # [B, 2, C, T, H, W]
        doubled = pairs.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
        return torch.cat((first, doubled), dim=2) if caches.starts_stream else doubled


class Stage(nn.Module):
    """Layers of the 2.2 VAE up to a change of resolution, and a shortcut from first to last.

    shortcut(x, starts_stream): see `average_down` and `duplicate_up`.
    """

    def __init__(
        self, layers: Sequence[nn.Module], shortcut: Callable[[Tensor, bool], Tensor] | None
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.shortcut = shortcut

    def stream(self, x: Tensor, caches: Caches) -> Tensor:
        y = run_layers(self.layers, x, caches)
        return y if self.shortcut is None else y + self.shortcut(x, caches.starts_stream)


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.config, self.statistics, self.ops = config, Statistics(config), ops
        dims = [config.encoder_dim * m for m in (1, *config.dim_multipliers)]
        self.conv_in = CausalConv3d(3 * config.patch_size**2, dims[0], (3, 3, 3), dtype)
        self.down = nn.ModuleList()
        for stage, (dim, out_dim) in enumerate(pairwise(dims)):
            layers = _blocks(config.num_res_blocks, dim, out_dim, dtype, ops)
            factors = (1, 1)
            if stage < len(config.temporal_downsample):
                temporal = config.temporal_downsample[stage]
                layers.append(Downsample(out_dim, temporal, dtype))
                factors = (2 if temporal else 1, 2)
            shortcut = partial(average_down, out_channels=out_dim, factors=factors)
            self.down.extend([Stage(layers, shortcut)] if config.residual else layers)
        self.middle = _middle(dims[-1], dtype, ops)
        self.norm_out = ChannelNorm(dims[-1], dtype)
        self.conv_out = CausalConv3d(dims[-1], 2 * config.z_dim, (3, 3, 3), dtype)
        self.quant_conv = nn.Conv3d(2 * config.z_dim, 2 * config.z_dim, 1, dtype=dtype)

    def forward(
        self, pixels: Tensor, caches: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Encode one chunk: the next 4n frames of a stream, or its first 1 + 4n if caches is None.

        pixels: [B, 3, T, H, W] in [−1, 1]. Returns the normalised latent [B, z, F, h, w], float32,
        with as many cells as the spatial stride leaves, and the caches for the next chunk.
        """
        chunk = Caches(caches)
        moments = self.stream(pixels.to(self.conv_in.weight.dtype), chunk)
        mu, sigma = self.statistics.on(pixels.device)
        return (moments.chunk(2, dim=1)[0].float() - mu) / sigma, chunk.new

    def stream(self, x: Tensor, caches: Caches) -> Tensor:
        """Pixels [B, 3, T, H, W] -> mean and log-variance [B, 2z, F, h, w]."""
        x = self.conv_in.stream(patchify(x, self.config.patch_size), caches)
        x = run_layers((*self.down, *self.middle), x, caches)
        x = self.conv_out.stream(self.ops.rms_silu(x, self.norm_out.gamma), caches)
        return self.quant_conv(x)


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig, dtype: torch.dtype, ops: Ops) -> None:
        super().__init__()
        self.config, self.statistics, self.ops = config, Statistics(config), ops
        multipliers = config.dim_multipliers[::-1]
        temporal_upsample = config.temporal_downsample[::-1]
        dims = [config.decoder_dim * m for m in (multipliers[0], *multipliers)]
        self.post_quant_conv = nn.Conv3d(config.z_dim, config.z_dim, 1, dtype=dtype)
        self.conv_in = CausalConv3d(config.z_dim, dims[0], (3, 3, 3), dtype)
        self.middle = _middle(dims[0], dtype, ops)
        self.up = nn.ModuleList()
        for stage, (dim, out_dim) in enumerate(pairwise(dims)):
            if stage > 0 and not config.residual:
                dim //= 2  # by the upsample before it
            layers = _blocks(config.num_res_blocks + 1, dim, out_dim, dtype, ops)
            shortcut = None
            if stage < len(temporal_upsample):
                temporal = temporal_upsample[stage]
                upsampled = out_dim if config.residual else out_dim // 2
                layers.append(Upsample(out_dim, upsampled, temporal, dtype))
                factors = (2 if temporal else 1, 2)
                shortcut = partial(duplicate_up, out_channels=out_dim, factors=factors)
            self.up.extend([Stage(layers, shortcut)] if config.residual else layers)
        self.norm_out = ChannelNorm(dims[-1], dtype)
        self.conv_out = CausalConv3d(dims[-1], 3 * config.patch_size**2, (3, 3, 3), dtype)

    def forward(
        self, latent: Tensor, caches: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """Decode one chunk of latent frames, the first of a stream if caches is None.

        latent: [B, z, F, h, w], normalised. Returns pixels [B, 3, T, H, W] in [−1, 1], float32,
        T = 4F (4F − 3 at the start), and the caches for the next chunk.
        """
        chunk = Caches(caches)
        mu, sigma = self.statistics.on(latent.device)
        z = (latent.float() * sigma + mu).to(self.conv_in.weight.dtype)
        return self.stream(z, chunk).float().clamp(-1, 1), chunk.new

    def stream(self, z: Tensor, caches: Caches) -> Tensor:
        """Latent (not normalised) [B, z, F, h, w] -> pixels, unclamped [B, 3, T, H, W]."""
        x = self.conv_in.stream(self.post_quant_conv(z), caches)
        x = run_layers((*self.middle, *self.up), x, caches)
        x = self.conv_out.stream(self.ops.rms_silu(x, self.norm_out.gamma), caches)
        return unpatchify(x, self.config.patch_size)


class VAE(nn.Module):
    """Encoder and decoder. The latent is normalised as the DiT sees it: (mean − μ) / σ.

    The encoder is float32 whatever `dtype` the decoder has: its rounding errors would be part of
    the condition of every denoising step.
    """

    def __init__(
        self, config: VAEConfig, dtype: torch.dtype = torch.float32, ops: Ops = TORCH_OPS
    ) -> None:
        super().__init__()
        self.encoder = Encoder(config, torch.float32, ops)
        self.decoder = Decoder(config, dtype, ops)

    def encode(
        self, pixels: Tensor, caches: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Encoder.forward`."""
        latent, new = self.encoder(pixels, caches)
        return latent, new

    def decode(
        self, latent: Tensor, caches: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """See `Decoder.forward`."""
        pixels, new = self.decoder(latent, caches)
        return pixels, new


def _middle(channels: int, dtype: torch.dtype, ops: Ops) -> nn.ModuleList:
    return nn.ModuleList(
        (
            ResidualBlock(channels, channels, dtype, ops),
            FrameAttention(channels, dtype, ops),
            ResidualBlock(channels, channels, dtype, ops),
        )
    )


def _blocks(
    count: int, channels: int, out_channels: int, dtype: torch.dtype, ops: Ops
) -> list[nn.Module]:
    dims = (channels, *[out_channels] * count)
    return [ResidualBlock(dim, out_channels, dtype, ops) for dim in dims[:count]]


class Statistics:
    """Mean and standard deviation of the latent, each [1, z, 1, 1, 1].

    They go to a device once: a captured graph cannot hold a copy from the host.
    """

    def __init__(self, config: VAEConfig) -> None:
        self.config = config
        self._made: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def __reduce__(self) -> tuple[type["Statistics"], tuple[VAEConfig]]:
        return Statistics, (self.config,)  # a pickle is the same whatever has run

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        if device not in self._made:
            with torch.inference_mode(False):  # or training could not use them afterwards
                mu = torch.tensor(self.config.latents_mean, device=device)
                sigma = torch.tensor(self.config.latents_std, device=device)
            self._made[device] = mu.view(1, -1, 1, 1, 1), sigma.view(1, -1, 1, 1, 1)
        return self._made[device]


def run_layers(layers: Iterable[Any], x: Tensor, caches: Caches) -> Tensor:
    """One layer after another, in the order of their slots."""
    for layer in layers:
        x = layer.stream(x, caches)
    return x


def frames_as_batch(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Run a 2-D layer on every frame of x [B, C, T, H, W]."""
    batch = x.shape[0]
    y = layer(x.transpose(1, 2).flatten(0, 1))
    return y.unflatten(0, (batch, -1)).transpose(1, 2)


def double_pixels(frames: Tensor) -> Tensor:
    """[N, C, H, W] -> [N, C, 2H, 2W], each pixel repeated (nearest-exact at a factor of two)."""
    return F.interpolate(frames, scale_factor=2.0, mode="nearest-exact")
