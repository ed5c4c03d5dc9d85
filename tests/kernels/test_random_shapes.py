"""Every op at shapes and dtypes drawn at random, the same in every run."""

import random

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.shared import DTYPES, Random, assert_equal
from wantrt.kernels import gated_residual as residuals
from wantrt.kernels.guide_and_step import guide_and_step, guide_and_step_reference
from wantrt.kernels.modulate import modulate, modulate_reference
from wantrt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from wantrt.kernels.rms_norm import rms_norm, rms_norm_reference
from wantrt.kernels.rms_silu import rms_silu, rms_silu_reference
from wantrt.kernels.rope import rope, rope_reference

SEEDS = pytest.mark.parametrize("seed", range(4))


class Draw(Random):
    """Sizes and dtypes too."""

    def __init__(self, device: str, seed: int) -> None:
        super().__init__(device, seed)
        self.choice, self.size = random.Random(seed).choice, random.Random(seed + 1).randint

    def dtype(self) -> torch.dtype:
        return self.choice(DTYPES)

    def tokens(self) -> tuple[int, int, int]:
        """B, L, C."""
        return self.size(1, 3), self.size(1, 9), self.size(1, 700)


@SEEDS
def test_norms_and_residuals(seed, kernel_device):
    draw = Draw(kernel_device, seed)
    batch, seq_len, channels = draw.tokens()
    rows = draw.choice([None, 1, 2, 5])
    shift, scale, gate, *_ = draw.modulation(batch, rows, channels)
    token_row, eps = draw.token_row(rows, seq_len), draw.choice([1e-6, 1e-5])
    x, y = draw.normal(batch, seq_len, channels), draw.normal(batch, seq_len, channels)
    x, y = 10 * x + draw.size(-5, 5), y.to(draw.dtype())
    gate = draw.choice([gate, None])
    weight, bias = draw.normal(channels, dtype=draw.dtype()), draw.normal(channels)

    arguments = y, shift, scale, token_row, eps, draw.dtype()
    assert_equal(modulate(*arguments), modulate_reference(*arguments))
    arguments = x, y, gate, shift, scale, token_row, eps, draw.dtype()
    expected = residuals.gated_residual_modulate_reference(*arguments)
    assert_equal(residuals.gated_residual_modulate(*arguments), expected)
    arguments = x, y, gate, weight, bias, token_row, eps, draw.dtype()
    expected = residuals.gated_residual_norm_reference(*arguments)
    assert_equal(residuals.gated_residual_norm(*arguments), expected)
    if gate is not None:
        arguments = x, y, gate, token_row
        expected = residuals.gated_residual_reference(*arguments)
        assert_equal(residuals.gated_residual(*arguments), expected)
    assert_equal(rms_norm(y, weight, eps), rms_norm_reference(y, weight, eps))


@SEEDS
def test_heads(seed, kernel_device):
    draw = Draw(kernel_device, seed)
    batch, seq_len, _ = draw.tokens()
    num_heads, head_dim = draw.size(1, 9), 2 * draw.size(1, 70)
    angles = draw.normal(seq_len, head_dim // 2)
    cos, sin = angles.cos(), angles.sin()
    qkv = draw.normal(batch, seq_len, 3 * num_heads * head_dim, dtype=draw.dtype())
    weights = draw.normal(2, num_heads * head_dim, dtype=draw.dtype()).unbind()
    arguments = qkv, *weights, cos, sin, num_heads, 1e-6
    q, k, v = qk_norm_rope_reference(*arguments)
    assert_equal(qk_norm_rope(*arguments, draw.choice([True, False])), (q, k))
    assert_equal(rope(v, cos, sin), rope_reference(v, cos, sin))


@SEEDS
def test_channels(seed, kernel_device):
    draw = Draw(kernel_device, seed)
    shape = draw.size(1, 2), draw.size(1, 300), draw.size(1, 3), draw.size(1, 6), draw.size(1, 9)
    x, gamma = draw.normal(*shape, dtype=draw.dtype()), draw.normal(shape[1], dtype=draw.dtype())
    x = draw.choice(
        [
            x,
            x.transpose(1, 2).contiguous().transpose(1, 2),
            x.to(memory_format=torch.channels_last_3d),
        ]
    )
    assert_equal(rms_silu(x, gamma), rms_silu_reference(x, gamma))


@SEEDS
def test_latents(seed, kernel_device):
    draw = Draw(kernel_device, seed)
    shape = draw.size(1, 2), draw.size(1, 48), draw.size(1, 5), draw.size(1, 9), draw.size(1, 9)
    state, guided = draw.normal(3, *shape).unbind(), draw.choice([True, False])
    velocities = draw.normal(2, *shape, dtype=draw.dtype()).unbind()
    guidance = (velocities[1], draw.normal(1)) if guided else (None, None)
    num_steps = draw.size(1, 50)
    index = draw.integers(num_steps, 1)
    arguments = velocities[0], *guidance, draw.normal(num_steps, 4), index
    expected = [tensor.clone() for tensor in state]
    guide_and_step_reference(*expected, *arguments)
    guide_and_step(*state, *arguments)
    for tensor, other in zip(state, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-4, atol=1e-4)
