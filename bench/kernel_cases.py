"""What `wantrt.bench.kernels` measures: every op at the shapes of real models, with random data.

A case knows the least bytes its op has to move (each input read once, each output written once),
before any tensor exists. As in the models, the residual stream, modulation, norm weights and tables
are float32 and the rest has the model's dtype; modulation is a view of six rows. Letters as in
wantrt/models/ops.py.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from wantrt.config import DIT_1_3B, DIT_5B, DIT_14B, VAE_2_1, Size, VAEConfig
from wantrt.linked import refuse_other_names
from wantrt.models.ops import Ops, split_heads
from wantrt.models.vae import Decoder

refuse_other_names(__spec__)

EPS = 1e-6
HEAD_DIM = 128
FFN_DIM = {config.dim: config.ffn_dim for config in (DIT_1_3B, DIT_5B, DIT_14B)}
SIZES: tuple[Size, ...] = ((832, 480), (1280, 720))
FLOAT32_BYTES = 4

# op -> (module of the kernel, module of the reference); residual_modulate is an op without its gate
MODULES = {
    "modulate": "modulate",
    "gated_residual": "gated_residual",
    "gated_residual_modulate": "gated_residual",
    "gated_residual_norm": "gated_residual",
    "qk_norm_rope": "qk_norm_rope",
    "rope": "rope",
    "rms_norm": "rms_norm",
    "linear_gelu": "ops",
    "rms_silu": "rms_silu",
    "guide_and_step": "guide_and_step",
}


class Random:
    """Normal tensors on a device, the same for the same seed."""

    def __init__(self, device: torch.device | str, seed: int) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self.device, dtype=dtype)


@dataclass(frozen=True)
class Case:
    """An op, its arguments and what they cost."""

    op: str
    shape: str  # for people
    dtype: torch.dtype
    bytes_moved: int
    make: Callable[[Random], tuple[Any, ...]]  # the arguments of the op
    mutated: tuple[int, ...] = ()  # which arguments the op writes, if it returns nothing
    flops: int | None = None  # of an op that is bound by arithmetic
    kernel_only: tuple[Any, ...] = ()  # further arguments of the kernel
    returns: int | None = None  # how many results the kernel returns, if fewer than the reference

    @property
    def name(self) -> str:
        return f"{self.op}, {self.shape}, {str(self.dtype).removeprefix('torch.')}"

    def outputs(self, arguments: Sequence[Any], returned: Any) -> tuple[Tensor, ...]:
        """The results as a tuple, however the op hands them over."""
        if self.mutated:
            return tuple(arguments[index] for index in self.mutated)
        results = returned if isinstance(returned, tuple) else (returned,)
        return results if self.returns is None else results[: self.returns]


def kernel(case: Case) -> Callable[..., Any]:
    """Our launcher of a case's op, to be called as the reference. Needs Triton."""
    launch = getattr(import_module(f"wantrt.kernels.{MODULES[case.op]}"), case.op)
    return lambda *arguments: launch(*arguments, *case.kernel_only)


def reference(op: str) -> Callable[..., Any]:
    """The definition of an op, in plain torch."""
    module = "schedulers.solver" if op == "guide_and_step" else "models.ops"
    return getattr(import_module(f"wantrt.{module}"), op)


def float32_arguments(arguments: Sequence[Any]) -> tuple[Any, ...]:
    """The same values with which a reference rounds nothing to 16 bits; tensors are copies."""

    def convert(argument: Any) -> Any:
        if isinstance(argument, Tensor):
            return argument.float() if argument.is_floating_point() else argument
        return torch.float32 if isinstance(argument, torch.dtype) else argument

    return tuple(
        a.clone() if a is b and isinstance(a, Tensor) else a
        for a, b in zip(map(convert, arguments), arguments, strict=True)
    )


# -- The ops --------------------------------------------------------------------------------------


def modulate(tokens: int, channels: int, dtype: torch.dtype, rows: int = 1) -> Case:
    def make(random: Random) -> tuple[Any, ...]:
        x = random(1, tokens, channels)
        shift, scale, *_ = six(random, rows, channels)
        return x, shift, scale, token_row(tokens, rows, random.device), EPS, dtype

    stream = tokens * channels * (FLOAT32_BYTES + dtype.itemsize)
    moved = stream + rows_bytes(2, tokens, channels, rows)
    return Case("modulate", shape_of(tokens, channels, rows), dtype, moved, make)


def gated_residual(tokens: int, channels: int, dtype: torch.dtype, rows: int = 1) -> Case:
    def make(random: Random) -> tuple[Any, ...]:
        x, y = random(1, tokens, channels), random(1, tokens, channels, dtype=dtype)
        _, _, gate, *_ = six(random, rows, channels)
        return x, y, gate, token_row(tokens, rows, random.device)

    stream = tokens * channels * (2 * FLOAT32_BYTES + dtype.itemsize)
    moved = stream + rows_bytes(1, tokens, channels, rows)
    return Case("gated_residual", shape_of(tokens, channels, rows), dtype, moved, make)


def gated_residual_modulate(
    tokens: int, channels: int, dtype: torch.dtype, rows: int = 1, gated: bool = True
) -> Case:
    def make(random: Random) -> tuple[Any, ...]:
        x, y = random(1, tokens, channels), random(1, tokens, channels, dtype=dtype)
        shift, scale, gate, *_ = six(random, rows, channels)
        row = token_row(tokens, rows, random.device)
        return x, y, gate if gated else None, shift, scale, row, EPS, dtype

    stream = tokens * channels * (2 * FLOAT32_BYTES + 2 * dtype.itemsize)
    moved = stream + rows_bytes(3 if gated else 2, tokens, channels, rows)
    shape = shape_of(tokens, channels, rows) + ("" if gated else ", no gate")
    return Case("gated_residual_modulate", shape, dtype, moved, make)


def gated_residual_norm(tokens: int, channels: int, dtype: torch.dtype, rows: int = 1) -> Case:
    def make(random: Random) -> tuple[Any, ...]:
        x, y = random(1, tokens, channels), random(1, tokens, channels, dtype=dtype)
        _, _, gate, *_ = six(random, rows, channels)
        row = token_row(tokens, rows, random.device)
        return x, y, gate, random(channels), random(channels), row, EPS, dtype

    stream = tokens * channels * (2 * FLOAT32_BYTES + 2 * dtype.itemsize)
    affine = 2 * channels * FLOAT32_BYTES
    moved = stream + affine + rows_bytes(1, tokens, channels, rows)
    return Case("gated_residual_norm", shape_of(tokens, channels, rows), dtype, moved, make)


def qk_norm_rope(
    tokens: int,
    channels: int,
    dtype: torch.dtype,
    heads_first: bool = True,
    head_dim: int = HEAD_DIM,
) -> Case:
    """v is a view of qkv: neither read nor written. heads_first: how q and k lie in memory."""

    def make(random: Random) -> tuple[Any, ...]:
        qkv = random(1, tokens, 3 * channels, dtype=dtype)
        cos, sin = tables(random, tokens, head_dim)
        weights = random(channels), random(channels)
        return qkv, *weights, cos, sin, channels // head_dim, EPS

    stream = 4 * tokens * channels * dtype.itemsize
    small = (2 * channels + tokens * head_dim) * FLOAT32_BYTES
    shape = shape_of(tokens, channels) + (", heads first" if heads_first else ", tokens first")
    moved = stream + small
    extra = (heads_first,)
    return Case("qk_norm_rope", shape, dtype, moved, make, kernel_only=extra, returns=2)


def rope(tokens: int, channels: int, dtype: torch.dtype, head_dim: int = HEAD_DIM) -> Case:
    """x as attention has it: a view of [B, L, C]."""

    def make(random: Random) -> tuple[Any, ...]:
        x = split_heads(random(1, tokens, channels, dtype=dtype), channels // head_dim)
        return x, *tables(random, tokens, head_dim)

    moved = 2 * tokens * channels * dtype.itemsize + tokens * head_dim * FLOAT32_BYTES
    return Case("rope", shape_of(tokens, channels), dtype, moved, make)


def rms_norm(tokens: int, channels: int, dtype: torch.dtype) -> Case:
    def make(random: Random) -> tuple[Any, ...]:
        return random(1, tokens, channels, dtype=dtype), random(channels), EPS

    moved = 2 * tokens * channels * dtype.itemsize + channels * FLOAT32_BYTES
    return Case("rms_norm", shape_of(tokens, channels), dtype, moved, make)


def linear_gelu(
    tokens: int, channels: int, dtype: torch.dtype, out_channels: int | None = None
) -> Case:
    """Bound by arithmetic: its speed is a share of the matrix rate."""
    out = out_channels or FFN_DIM.get(channels, 4 * channels)

    def make(random: Random) -> tuple[Any, ...]:
        x = random(1, tokens, channels, dtype=dtype)
        weight = random(out, channels, dtype=dtype) * channels**-0.5
        return x, weight, random(out, dtype=dtype)

    moved = (tokens * channels + out * channels + out + tokens * out) * dtype.itemsize
    shape = shape_of(tokens, channels) + f" to {out:,}"
    flops = 2 * tokens * channels * out
    return Case("linear_gelu", shape, dtype, moved, make, flops=flops)


def rms_silu(shape: Sequence[int], dtype: torch.dtype, channels_last: bool = False) -> Case:
    """shape: [B, C, T, H, W]."""

    def make(random: Random) -> tuple[Any, ...]:
        x = random(*shape, dtype=dtype)
        layout = torch.channels_last_3d if channels_last else torch.contiguous_format
        return x.to(memory_format=layout), random(shape[1], dtype=dtype)

    moved = (2 * torch.Size(shape).numel() + shape[1]) * dtype.itemsize
    text = "x".join(map(str, shape)) + (", channels last" if channels_last else "")
    return Case("rms_silu", text, dtype, moved, make)


def guide_and_step(shape: Sequence[int], guided: bool, rows: int = 50) -> Case:
    """shape: the latent's, [B, C, F, H, W]. Of `rows` rows of coefficients it reads one."""

    def make(random: Random) -> tuple[Any, ...]:
        latents = [random(*shape) for _ in range(4)]
        unconditional = random(*shape) if guided else None
        scale = torch.full((1,), 5.0, device=random.device) if guided else None
        coefficients = random(rows, 4) * 0.01  # small: hundreds of steps must stay finite
        index = torch.full((1,), rows // 2, device=random.device)
        return *latents, unconditional, scale, coefficients, index

    passes = 8 if guided else 7  # sample, x0, delta read and written; one or two predictions read
    moved = passes * torch.Size(shape).numel() * FLOAT32_BYTES + 4 * FLOAT32_BYTES + 8
    moved += FLOAT32_BYTES if guided else 0
    text = "x".join(map(str, shape)) + (", guided" if guided else "")
    return Case("guide_and_step", text, torch.float32, moved, make, mutated=(0, 1, 2))


# -- Their pieces ---------------------------------------------------------------------------------


def six(random: Random, rows: int, channels: int) -> tuple[Tensor, ...]:
    """shift, scale and gate, twice: views [1, R, C] of one tensor, as a block has them."""
    return random(1, rows, 6, channels).unbind(2)


def token_row(tokens: int, rows: int, device: torch.device | str) -> Tensor | None:
    """None for one row; for two, the tokens of the first of 21 frames take the first."""
    if rows == 1:
        return None
    return (torch.arange(tokens, device=device) >= tokens // 21).long()


def tables(random: Random, tokens: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos and sin of random angles, [L, D/2]."""
    angles = random(tokens, head_dim // 2)
    return angles.cos(), angles.sin()


def rows_bytes(count: int, tokens: int, channels: int, rows: int) -> int:
    """Of `count` tensors of modulation rows, and of token_row where there is more than one row."""
    index = tokens * torch.int64.itemsize if rows > 1 else 0
    return count * rows * channels * FLOAT32_BYTES + index


def shape_of(tokens: int, channels: int, rows: int = 1) -> str:
    return f"{tokens:,} x {channels:,}" + (f", {rows} rows" if rows > 1 else "")


def decoder_shapes(config: VAEConfig, size: Size) -> list[tuple[int, ...]]:
    """The different x of `rms_silu` in a chunk of four frames, from the decoder itself."""
    found: dict[tuple[int, ...], None] = {}

    def record(x: Tensor, gamma: Tensor) -> Tensor:
        found[tuple(x.shape)] = None
        return torch.empty_like(x)

    with torch.device("meta"), torch.inference_mode():
        decoder = Decoder(config, torch.bfloat16, Ops(rms_silu=record))
        cells = (side // config.spatial_stride for side in reversed(size))
        latent = torch.empty(1, config.z_dim, 1, *cells)
        _, caches = decoder(latent)
        found.clear()  # the first chunk of a stream has other shapes
        decoder(latent, caches)
    return list(found)


# -- The list -------------------------------------------------------------------------------------


def all_cases(
    tokens: Sequence[int], channels: Sequence[int], dtypes: Sequence[torch.dtype]
) -> Iterator[Case]:
    """The most important first: bfloat16 before float32, 14B's width before the others.

    float32 is measured at the first of `tokens` and of `channels` alone.
    """
    for dtype in dtypes:
        for width in channels:
            for count in tokens:
                if dtype.itemsize < FLOAT32_BYTES or (count, width) == (tokens[0], channels[0]):
                    yield from token_cases(count, width, dtype)
            if width == channels[0]:
                yield from vae_cases(dtype)
                if dtype == dtypes[0]:
                    yield from solver_cases()
    for count in tokens[:1]:  # TI2V alone has two rows, and its width
        if DIT_5B.dim in channels:
            for op in (modulate, gated_residual, gated_residual_modulate, gated_residual_norm):
                yield op(count, DIT_5B.dim, dtypes[0], rows=2)


def token_cases(tokens: int, channels: int, dtype: torch.dtype) -> Iterator[Case]:
    yield modulate(tokens, channels, dtype)
    yield gated_residual_modulate(tokens, channels, dtype)
    yield gated_residual_modulate(tokens, channels, dtype, gated=False)
    yield gated_residual_norm(tokens, channels, dtype)
    yield qk_norm_rope(tokens, channels, dtype, heads_first=True)
    yield qk_norm_rope(tokens, channels, dtype, heads_first=False)
    yield gated_residual(tokens, channels, dtype)
    yield rms_norm(tokens, channels, dtype)
    yield rope(tokens, channels, dtype)
    if dtype.itemsize < FLOAT32_BYTES:
        yield linear_gelu(tokens, channels, dtype)


def vae_cases(dtype: torch.dtype) -> Iterator[Case]:
    for channels_last in (False, True):
        for shape in decoder_shapes(VAE_2_1, SIZES[0]):
            yield rms_silu(shape, dtype, channels_last)


def solver_cases() -> Iterator[Case]:
    for width, height in SIZES:
        for guided in (True, False):
            shape = (1, VAE_2_1.z_dim, 21, height // 8, width // 8)
            yield guide_and_step(shape, guided)
