"""`qk_norm_rope` against its reference."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.shared import DTYPES, Random, assert_equal
from wantrt.errors import ExecutionError
from wantrt.kernels.qk_norm_rope import qk_norm_rope, qk_norm_rope_reference
from wantrt.models.ops import merge_heads

NAMES = ("qkv", "q_weight", "k_weight", "cos", "sin", "num_heads", "eps")
HEADS_FIRST = pytest.mark.parametrize(
    "heads_first", [True, False], ids=["heads first", "tokens first"]
)


def make(batch, seq_len, num_heads, head_dim, dtype, device, weight_dtype=torch.float32):
    random = Random(device)
    channels = num_heads * head_dim
    angles = random.normal(seq_len, head_dim // 2)
    return (
        random.normal(batch, seq_len, 3 * channels, dtype=dtype),
        random.normal(channels, dtype=weight_dtype),
        random.normal(channels, dtype=weight_dtype),
        angles.cos(),
        angles.sin(),
        num_heads,
        1e-6,
    )


@HEADS_FIRST
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "size",
    [(2, 7, 3, 6), (2, 3, 12, 128), (1, 3, 24, 128), (1, 2, 40, 128), (1, 1, 1, 2)],
    ids=["odd", "1.3B", "5B", "14B", "one"],
)
def test_equals_reference(size, dtype, weight_dtype, heads_first, kernel_device):
    arguments = make(*size, dtype, kernel_device, weight_dtype)
    actual = qk_norm_rope(*arguments, heads_first)
    q, k, _ = qk_norm_rope_reference(*arguments)
    assert_equal(actual, (q, k))
    for tensor in actual:
        assert (tensor if heads_first else tensor.transpose(1, 2)).is_contiguous()


@HEADS_FIRST
def test_a_part_of_a_wider_output(heads_first, kernel_device):
    qkv, *rest = make(2, 5, 3, 16, torch.bfloat16, kernel_device)
    wide = torch.cat((qkv, qkv), dim=-1)[:, :, : qkv.shape[-1]]
    assert not wide.is_contiguous()
    q, k, _ = qk_norm_rope_reference(qkv, *rest)
    assert_equal(qk_norm_rope(wide, *rest, heads_first), (q, k))


def test_tokens_first_merges_without_a_copy(kernel_device):
    q, _ = qk_norm_rope(*make(2, 5, 3, 16, torch.bfloat16, kernel_device), False)
    assert merge_heads(q).data_ptr() == q.data_ptr()


@HEADS_FIRST
def test_is_a_sound_torch_op(heads_first, kernel_device):
    arguments = (*make(2, 5, 3, 16, torch.bfloat16, kernel_device), heads_first)
    torch.library.opcheck(qk_norm_rope, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("qkv", lambda t: t.mT.contiguous().mT, "last axis of qkv is not contiguous"),
        ("qkv", lambda t: t[..., 1:], "not q, k and v of 3 heads"),
        ("qkv", lambda t: t[0], "expected .B, L, 3C."),
        ("qkv", lambda t: t[:, :0], "nothing in it"),
        ("qkv", lambda t: t.double(), "float64"),
        ("q_weight", lambda t: t[1:], "q_weight has shape"),
        ("q_weight", lambda t: t.bfloat16(), "make them equal"),
        ("k_weight", lambda t: t.repeat(2)[::2], "k_weight is not contiguous"),
        ("cos", lambda t: t[1:], "cos has shape"),
        ("sin", lambda t: t.half(), "sin is torch.float16"),
        ("num_heads", lambda _: 0, "not q, k and v of 0 heads"),
        ("num_heads", lambda _: 16, "3 channels: they turn in pairs"),
    ],
)
def test_refuses(name, spoil, message, kernel_device):
    arguments = make(2, 5, 3, 16, torch.float32, kernel_device)
    arguments = dict(zip(NAMES, arguments, strict=True))
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=message):
        qk_norm_rope(**arguments, heads_first=False)
