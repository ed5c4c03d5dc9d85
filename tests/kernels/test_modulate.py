"""`modulate` against its reference."""

import pytest
import torch

pytest.importorskip("triton")

from wantrt.errors import ExecutionError
from wantrt.kernels.arguments import require
from wantrt.kernels.modulate import modulate, modulate_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# two float32 sums of another order; in 16 bits, one step of the result where they round apart
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def make(batch, seq_len, channels, dtype, device, rows=None):
    """x, then shift and scale as a block gives them (views of six), then token_row."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, seq_len, channels, generator=generator).to(device, dtype)
    six = torch.randn(batch, rows or 1, 6, channels, generator=generator).to(device)
    shift, scale, *_ = six.unbind(2)
    row = torch.randint(rows, (seq_len,), generator=generator).to(device) if rows else None
    return x, shift, scale, row


@pytest.mark.parametrize("rows", [None, 2], ids=["per batch", "per token"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "batch, seq_len, channels",
    [(2, 7, 97), (2, 3, 1536), (1, 3, 3072), (1, 3, 5120), (1, 1, 1)],
    ids=["odd", "1.3B", "5B", "14B", "one"],
)
def test_equals_reference(batch, seq_len, channels, dtype, out_dtype, rows, kernel_device):
    arguments = make(batch, seq_len, channels, dtype, kernel_device, rows)
    actual = modulate(*arguments, 1e-6, out_dtype)
    expected = modulate_reference(*arguments, 1e-6, out_dtype)
    tolerance = TOLERANCE[out_dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def test_statistics_survive_a_large_mean(kernel_device):
    """A variance taken as E[x²] − E[x]² would be lost in the rounding of 1000²."""
    x, *rest = make(1, 2, 1536, torch.float32, kernel_device)
    arguments = (x + 1000, *rest, 1e-6, torch.float32)
    torch.testing.assert_close(
        modulate(*arguments), modulate_reference(*arguments), rtol=1e-3, atol=1e-3
    )


def test_no_tokens(kernel_device):
    assert modulate(*make(1, 0, 96, torch.float32, kernel_device), 1e-6, torch.float32).numel() == 0


def test_is_a_sound_torch_op(kernel_device):
    arguments = (*make(2, 5, 96, torch.bfloat16, kernel_device, rows=2), 1e-6, torch.float32)
    torch.library.opcheck(modulate, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("x", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "not contiguous"),
        ("x", lambda t: t.double(), "float64"),
        ("x", lambda t: t[0], "expected .B, L, C."),
        ("shift", lambda t: t[..., :-1], "shape"),
        ("scale", lambda t: t.contiguous(), "strides"),
        ("token_row", lambda t: t.int(), "int32"),
        ("token_row", lambda t: t[1:], "shape"),
    ],
)
def test_refuses(name, spoil, message, kernel_device):
    names = ("x", "shift", "scale", "token_row")
    arguments = dict(zip(names, make(2, 5, 96, torch.float32, kernel_device, rows=2), strict=True))
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=message):
        modulate(**arguments, eps=1e-6, dtype=torch.float32)


def test_refuses_another_device(kernel_device):
    """Asked of the check itself: torch takes a call with a meta tensor for one without data."""
    elsewhere = torch.empty(2, 3, device="meta")
    with pytest.raises(ExecutionError, match="scale is on meta"):
        require("modulate", "scale", elsewhere, (2, 3), torch.device(kernel_device))
