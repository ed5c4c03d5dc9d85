"""`rope` against its reference."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.shared import DTYPES, Random, assert_equal
from wantrt.errors import ExecutionError
from wantrt.kernels.rope import rope, rope_reference
from wantrt.models.ops import split_heads

HEADS_FIRST, TOKENS_FIRST, PART = "[B, H, L, D]", "[B, L, H, D]", "a part of [B, L, 3C]"


def make(batch, num_heads, seq_len, head_dim, dtype, device, layout=HEADS_FIRST):
    random = Random(device)
    channels = num_heads * head_dim
    if layout == HEADS_FIRST:
        x = random.normal(batch, num_heads, seq_len, head_dim, dtype=dtype)
    elif layout == TOKENS_FIRST:
        x = split_heads(random.normal(batch, seq_len, channels, dtype=dtype), num_heads)
    else:
        qkv = random.normal(batch, seq_len, 3 * channels, dtype=dtype)
        x = split_heads(qkv.chunk(3, dim=-1)[1], num_heads)
    angles = random.normal(seq_len, head_dim // 2)
    return x, angles.cos(), angles.sin()


@pytest.mark.parametrize("layout", [HEADS_FIRST, TOKENS_FIRST, PART])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(2, 3, 7, 6), (2, 12, 3, 128), (1, 24, 3, 128), (1, 40, 2, 128), (1, 1, 1, 2)],
    ids=["odd", "1.3B", "5B", "14B", "one"],
)
def test_equals_reference(size, dtype, layout, kernel_device):
    x, cos, sin = make(*size, dtype, kernel_device, layout)
    actual = rope(x, cos, sin)
    assert_equal(actual, rope_reference(x, cos, sin))
    if layout == HEADS_FIRST:
        assert actual.is_contiguous()
    else:
        assert actual.transpose(1, 2).is_contiguous()


def test_is_a_sound_torch_op(kernel_device):
    for layout in (HEADS_FIRST, TOKENS_FIRST, PART):
        arguments = make(2, 3, 5, 16, torch.bfloat16, kernel_device, layout)
        torch.library.opcheck(rope, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("x", lambda t: t.mT.contiguous().mT, "last axis of x is not contiguous"),
        ("x", lambda t: t.as_strided((2, 3, 5, 16), (0, 0, 1, 1)), "overlaps itself"),
        ("x", lambda t: t[..., :15], "15 channels"),
        ("x", lambda t: t[0], "expected .B, H, L, D."),
        ("x", lambda t: t[:, :, :0], "nothing in it"),
        ("x", lambda t: t.double(), "float64"),
        ("cos", lambda t: t[1:], "cos has shape"),
        ("cos", lambda t: t.bfloat16(), "cos is torch.bfloat16"),
        ("sin", lambda t: t.repeat(2, 1)[::2], "sin is not contiguous"),
    ],
)
def test_refuses(name, spoil, message, kernel_device):
    arguments = make(2, 3, 5, 16, torch.float32, kernel_device)
    arguments = dict(zip(("x", "cos", "sin"), arguments, strict=True))
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=message):
        rope(**arguments)
