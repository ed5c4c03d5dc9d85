"""`modulate` against its reference."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.shared import DTYPES, Random, assert_equal
from wantrt.errors import ExecutionError
from wantrt.kernels.arguments import require
from wantrt.kernels.modulate import modulate, modulate_reference


def make(batch, seq_len, channels, dtype, device, rows=None):
    """x, shift, scale and token_row."""
    random = Random(device)
    x = random.normal(batch, seq_len, channels, dtype=dtype)
    shift, scale, *_ = random.modulation(batch, rows, channels)
    return x, shift, scale, random.token_row(rows, seq_len)


@pytest.mark.parametrize("rows", [None, 2], ids=["per batch", "per token"])
@pytest.mark.parametrize(
    "dtype, out_dtype",
    [*((dtype, dtype) for dtype in DTYPES), *((torch.float32, dtype) for dtype in DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize(
    "batch, seq_len, channels",
    [(2, 7, 97), (2, 3, 1536), (1, 3, 3072), (1, 3, 5120), (1, 1, 1)],
    ids=["odd", "1.3B", "5B", "14B", "one"],
)
def test_equals_reference(batch, seq_len, channels, dtype, out_dtype, rows, kernel_device):
    arguments = *make(batch, seq_len, channels, dtype, kernel_device, rows), 1e-6, out_dtype
    assert_equal(modulate(*arguments), modulate_reference(*arguments))


def test_contiguous_modulation(kernel_device):
    """As a plugin gets it."""
    x, shift, scale, token_row = make(2, 5, 96, torch.float32, kernel_device, rows=3)
    arguments = x, shift.contiguous(), scale.contiguous(), token_row, 1e-6, torch.bfloat16
    assert_equal(modulate(*arguments), modulate_reference(*arguments))


def test_statistics_survive_a_large_mean(kernel_device):
    """A variance taken as E[x²] − E[x]² would be lost in the rounding of 1000²."""
    x, *rest = make(1, 2, 1536, torch.float32, kernel_device)
    arguments = (x + 1000, *rest, 1e-6, torch.float32)
    torch.testing.assert_close(
        modulate(*arguments), modulate_reference(*arguments), rtol=1e-3, atol=1e-3
    )


def test_is_a_sound_torch_op(kernel_device):
    for rows in (None, 2):
        x, *rest = make(2, 5, 96, torch.bfloat16, kernel_device, rows)
        arguments = (x, *rest, 1e-6, torch.float32)
        torch.library.opcheck(modulate, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("x", lambda t: t.transpose(0, 1).contiguous().transpose(0, 1), "not contiguous"),
        ("x", lambda t: t.double(), "float64"),
        ("x", lambda t: t[0], "expected .B, L, C."),
        ("x", lambda t: t[:, :0], "nothing in it"),
        ("x", lambda t: t[..., :0], "nothing in it"),
        ("shift", lambda t: t[..., :-1], "shape"),
        ("shift", lambda t: t.mT.contiguous().mT, "last axis of shift"),
        ("shift", lambda t: t.int(), "shift is torch.int32"),
        ("scale", lambda t: t.contiguous(), "strides"),
        ("scale", lambda t: t[:, :1], "scale has shape"),
        ("token_row", lambda t: None, "shift has shape .2, 2, 96., expected .2, 1, 96."),
        ("token_row", lambda t: t.int(), "int32"),
        ("token_row", lambda t: t[1:], "shape"),
        ("dtype", lambda _: torch.float64, "dtype is torch.float64"),
    ],
)
def test_refuses(name, spoil, message, kernel_device):
    names = ("x", "shift", "scale", "token_row")
    arguments = dict(zip(names, make(2, 5, 96, torch.float32, kernel_device, rows=2), strict=True))
    arguments["dtype"] = torch.float32
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=message):
        modulate(**arguments, eps=1e-6)


def test_refuses_another_device(kernel_device):
    """Asked of the check itself: torch takes a call with a meta tensor for one without data."""
    elsewhere = torch.empty(2, 3, device="meta")
    with pytest.raises(ExecutionError, match="scale is on meta"):
        require("modulate", "scale", elsewhere, (2, 3), torch.device(kernel_device))
