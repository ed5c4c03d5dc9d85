"""Offsets beyond 32 bits, at sizes that no test could compute whole.

Tensors of more than 2**31 elements take up address space, and memory only where they are touched.
Of each grid the last two programs run: the ends of the tensors have to come out right.
"""

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime import interpreter

from tests.kernels.shared import Random, assert_equal
from wantrt.kernels.gated_residual import (
    gated_residual,
    gated_residual_modulate,
    gated_residual_modulate_reference,
    gated_residual_norm,
    gated_residual_norm_reference,
    gated_residual_reference,
)
from wantrt.kernels.guide_and_step import guide_and_step, guide_and_step_reference
from wantrt.kernels.modulate import modulate, modulate_reference
from wantrt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from wantrt.kernels.rms_norm import rms_norm, rms_norm_reference
from wantrt.kernels.rms_silu import rms_silu, rms_silu_reference
from wantrt.kernels.rope import rope, rope_reference
from wantrt.models.ops import split_heads

BATCH, CHANNELS = 2, 13824  # the widest tensor in a 14B block
TOKENS = 78_000  # 75,600 are 720p; so many more pass 2**31 elements
HEADS = 40
RANDOM = Random("cpu")
BF16 = torch.bfloat16


@pytest.fixture(autouse=True)
def last_programs(monkeypatch):
    """Of each grid, run the last two programs of the first axis, at the end of the others."""
    start, builder = interpreter.GridExecutor.__init__, interpreter.interpreter_builder

    def begin(self, fn, arg_names, grid, *rest):
        sizes = *grid, *(1 for _ in range(3 - len(grid)))
        run = min(sizes[0], 2)
        start(self, fn, arg_names, (run, 1, 1), *rest)
        ends = sizes[0] - run, sizes[1] - 1, sizes[2] - 1

        def go_to(*program):
            builder.grid_idx = tuple(p + end for p, end in zip(program, ends, strict=True))

        monkeypatch.setattr(builder, "set_grid_idx", go_to)

    monkeypatch.setattr(interpreter.GridExecutor, "__init__", begin)
    # results lie where they belong; the copy back would touch all of it
    monkeypatch.setattr(interpreter.GridExecutor, "_restore_args_dev", lambda *_: None)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)


def large(*shape, dtype=BF16):
    """A tensor whose last row of channels alone is written."""
    tensor = torch.empty(shape, dtype=dtype)
    assert tensor.numel() > 2**31
    tensor[-1, -1] = RANDOM.normal(shape[-1], dtype=dtype)
    return tensor


def end(tensor):
    """The last token [1, 1, C], or the modulation of its batch [1, R, C]."""
    return tensor[-1:, -1:]


@pytest.fixture(scope="module")
def tokens():
    """x, y, shift, scale, gate, then token_row."""
    modulation = RANDOM.modulation(BATCH, 2, CHANNELS)[:3]
    x = large(BATCH, TOKENS, CHANNELS, dtype=torch.float32)
    return x, large(BATCH, TOKENS, CHANNELS), *modulation, RANDOM.integers(2, TOKENS)


@pytest.fixture
def last_token(tokens):
    """The same for the last token alone."""
    x, y, shift, scale, gate, token_row = tokens
    return end(x), end(y), shift[-1:], scale[-1:], gate[-1:], token_row[-1:]


def test_modulate(tokens, last_token):
    def run(op, arguments):
        _, y, shift, scale, _, token_row = arguments
        return op(y, shift, scale, token_row, 1e-6, BF16)

    assert_equal(end(run(modulate, tokens)), run(modulate_reference, last_token))


def test_gated_residual(tokens, last_token):
    def run(op, arguments):
        x, y, _, _, gate, token_row = arguments
        return op(x, y, gate, token_row)

    assert_equal(end(run(gated_residual, tokens)), run(gated_residual_reference, last_token))


def test_gated_residual_modulate(tokens, last_token):
    def run(op, arguments):
        x, y, shift, scale, gate, token_row = arguments
        return op(x, y, gate, shift, scale, token_row, 1e-6, BF16)

    actual = run(gated_residual_modulate, tokens)
    expected = run(gated_residual_modulate_reference, last_token)
    assert_equal(tuple(end(tensor) for tensor in actual), expected)


def test_gated_residual_norm(tokens, last_token):
    weight, bias = RANDOM.normal(CHANNELS), RANDOM.normal(CHANNELS)

    def run(op, arguments):
        x, y, _, _, gate, token_row = arguments
        return op(x, y, gate, weight, bias, token_row, 1e-6, BF16)

    actual = run(gated_residual_norm, tokens)
    expected = run(gated_residual_norm_reference, last_token)
    assert_equal(tuple(end(tensor) for tensor in actual), expected)


def test_rms_norm(tokens):
    """The rows of a part of a wider tensor."""
    weight, part = RANDOM.normal(128), tokens[1][..., -128:]
    assert_equal(end(rms_norm(part, weight, 1e-6)), rms_norm_reference(end(part), weight, 1e-6))


def angles(tokens):
    """cos and sin [L, 64], of which the last row alone is written."""
    tables = torch.empty(2, tokens, 64)
    tables[:, -1] = RANDOM.normal(2, 64)
    return tables.unbind()


def check_qk_norm_rope(qkv, heads_first):
    weights, tables = RANDOM.normal(2, 5120).unbind(), angles(qkv.shape[1])
    actual = qk_norm_rope(qkv, *weights, *tables, HEADS, 1e-6, heads_first)
    ends = (table[-1:] for table in tables)
    q, k, _ = qk_norm_rope_reference(end(qkv), *weights, *ends, HEADS, 1e-6)
    assert_equal(tuple(tensor[-1:, :, -1:] for tensor in actual), (q, k))


HEADS_FIRST = pytest.mark.parametrize(
    "heads_first", [True, False], ids=["heads first", "tokens first"]
)
LONG = 440_000  # tokens whose q alone has more than 2**31 elements


@HEADS_FIRST
def test_reading_qkv(heads_first):
    check_qk_norm_rope(large(BATCH, 75_600, 3 * 5120), heads_first)


@HEADS_FIRST
def test_writing_q_and_k(heads_first):
    row = RANDOM.normal(1, 1, 3 * 5120, dtype=BF16)
    check_qk_norm_rope(row.expand(1, LONG, -1), heads_first)


@HEADS_FIRST
def test_rope(heads_first):
    if heads_first:
        x = torch.empty(1, HEADS, LONG, 128, dtype=BF16)
    else:
        x = split_heads(torch.empty(1, LONG, HEADS * 128, dtype=BF16), HEADS)
    x[:, :, -1:] = RANDOM.normal(1, HEADS, 1, 128)
    cos, sin = angles(LONG)
    expected = rope_reference(x[:, :, -1:], cos[-1:], sin[-1:])
    assert_equal(rope(x, cos, sin)[:, :, -1:], expected)


@pytest.mark.parametrize("layout", ["contiguous", "channels last", "frames first"])
def test_rms_silu(layout):
    """Twenty-five frames of 720p, as many as a decoder would give at once that does not stream."""
    x = torch.empty(1, 96, 25, 720, 1280, dtype=BF16)
    if layout == "channels last":
        x = torch.empty(1, 25, 720, 1280, 96, dtype=BF16).permute(0, 4, 1, 2, 3)
    elif layout == "frames first":
        x = torch.empty(1, 25, 96, 720, 1280, dtype=BF16).transpose(1, 2)
    assert x.numel() > 2**31
    gamma = RANDOM.normal(96)
    x[..., -1:, -1:, -4:] = RANDOM.normal(1, 96, 1, 1, 4, dtype=BF16)
    actual = rms_silu(x, gamma)[..., -1:, -1:, -4:]
    assert_equal(actual, rms_silu_reference(x[..., -1:, -1:, -4:], gamma))


def test_guide_and_step():
    state = [torch.empty(2**31 + 5) for _ in range(3)]
    velocity, other = torch.empty(2, 2**31 + 5, dtype=BF16)
    rows, index, scale = RANDOM.normal(3, 4), torch.tensor([2]), torch.tensor([5.0])
    for tensor in (*state, velocity, other):
        tensor[-9:] = RANDOM.normal(9)
    expected = [tensor[-9:].clone() for tensor in state]
    guide_and_step_reference(*expected, velocity[-9:], other[-9:], scale, rows, index)
    guide_and_step(*state, velocity, other, scale, rows, index)
    assert_equal(tuple(tensor[-9:] for tensor in state), tuple(expected))
