"""The gated residual, alone and with each norm behind it, against the references."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.shared import DTYPES, Random, assert_equal
from wantrt.errors import ExecutionError
from wantrt.kernels.gated_residual import (
    gated_residual,
    gated_residual_modulate,
    gated_residual_modulate_reference,
    gated_residual_norm,
    gated_residual_norm_reference,
    gated_residual_reference,
)

SIZES = pytest.mark.parametrize(
    "batch, seq_len, channels",
    [(2, 7, 97), (2, 2, 1536), (1, 2, 3072), (1, 2, 5120), (1, 1, 1)],
    ids=["odd", "1.3B", "5B", "14B", "one"],
)
ROWS = pytest.mark.parametrize("rows", [None, 2], ids=["per batch", "per token"])
ROWS_GATED = pytest.mark.parametrize(
    "rows, gated",
    [(None, True), (2, True), (None, False), (2, False)],
    ids=["per batch", "per token", "no gate", "per token, no gate"],
)
DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)  # of y and of the norm
PLAIN_NAMES = ("x", "y", "gate", "token_row")
MODULATE_NAMES = ("x", "y", "gate", "shift", "scale", "token_row", "eps", "dtype")
NORM_NAMES = ("x", "y", "gate", "weight", "bias", "token_row", "eps", "dtype")


def make(batch, seq_len, channels, dtype, device, rows=None, gated=True):
    """The arguments of all three ops, by name."""
    random = Random(device)
    shift, scale, gate, *_ = random.modulation(batch, rows, channels)
    return {
        "x": 4 * random.normal(batch, seq_len, channels),
        "y": random.normal(batch, seq_len, channels, dtype=dtype),
        "gate": gate if gated else None,
        "shift": shift,
        "scale": scale,
        "token_row": random.token_row(rows, seq_len),
        "weight": random.normal(channels),
        "bias": random.normal(channels),
        "eps": 1e-6,
        "dtype": dtype,
    }


def chosen(arguments, names):
    return [arguments[name] for name in names]


@ROWS
@DTYPE
@SIZES
def test_alone(batch, seq_len, channels, dtype, rows, kernel_device):
    arguments = make(batch, seq_len, channels, dtype, kernel_device, rows)
    arguments = chosen(arguments, PLAIN_NAMES)
    assert_equal(gated_residual(*arguments), gated_residual_reference(*arguments))


@ROWS_GATED
@DTYPE
@SIZES
def test_with_modulate(batch, seq_len, channels, dtype, rows, gated, kernel_device):
    arguments = make(batch, seq_len, channels, dtype, kernel_device, rows, gated)
    arguments = chosen(arguments, MODULATE_NAMES)
    assert_equal(gated_residual_modulate(*arguments), gated_residual_modulate_reference(*arguments))


@ROWS_GATED
@DTYPE
@SIZES
def test_with_norm(batch, seq_len, channels, dtype, rows, gated, kernel_device):
    arguments = make(batch, seq_len, channels, dtype, kernel_device, rows, gated)
    arguments = chosen(arguments, NORM_NAMES)
    assert_equal(gated_residual_norm(*arguments), gated_residual_norm_reference(*arguments))


def test_contiguous_modulation_and_16_bit_weights(kernel_device):
    """As a plugin gets them."""
    arguments = make(2, 5, 96, torch.bfloat16, kernel_device, rows=3)
    for name in ("gate", "shift", "scale"):
        arguments[name] = arguments[name].contiguous()
    for name in ("weight", "bias"):
        arguments[name] = arguments[name].bfloat16()
    plain = chosen(arguments, PLAIN_NAMES)
    assert_equal(gated_residual(*plain), gated_residual_reference(*plain))
    modulate = chosen(arguments, MODULATE_NAMES)
    assert_equal(gated_residual_modulate(*modulate), gated_residual_modulate_reference(*modulate))
    norm = chosen(arguments, NORM_NAMES)
    assert_equal(gated_residual_norm(*norm), gated_residual_norm_reference(*norm))


def test_the_inputs_stay(kernel_device):
    arguments = make(1, 3, 96, torch.bfloat16, kernel_device)
    before = arguments["x"].clone(), arguments["y"].clone()
    x, _ = gated_residual_modulate(*chosen(arguments, MODULATE_NAMES))
    assert x.data_ptr() != arguments["x"].data_ptr()
    assert_equal((arguments["x"], arguments["y"]), before)


@ROWS_GATED
def test_are_sound_torch_ops(rows, gated, kernel_device):
    arguments = make(2, 5, 96, torch.bfloat16, kernel_device, rows, gated)
    ops = [(gated_residual_modulate, MODULATE_NAMES), (gated_residual_norm, NORM_NAMES)]
    if gated:
        ops.append((gated_residual, PLAIN_NAMES))
    for op, names in ops:
        torch.library.opcheck(
            op, tuple(chosen(arguments, names)), test_utils=("test_schema", "test_faketensor")
        )


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("x", lambda t: t.mT.contiguous().mT, "x is not contiguous"),
        ("x", lambda t: t.bfloat16(), "x is torch.bfloat16, expected torch.float32"),
        ("x", lambda t: t[0], "expected .B, L, C."),
        ("x", lambda t: t[:, :0], "nothing in it"),
        ("y", lambda t: t.mT.contiguous().mT, "y is not contiguous"),
        ("y", lambda t: t.double(), "float64"),
        ("y", lambda t: t[:1], "y has shape"),
        ("gate", lambda t: t[..., 1:], "gate has shape"),
        ("gate", lambda t: t[:, :1], "(gate|shift) has shape"),
        ("gate", lambda t: t.int(), "gate is torch.int32"),
        ("token_row", lambda t: t.int(), "int32"),
        ("token_row", lambda t: t[1:], "token_row has shape"),
    ],
)
def test_refuse(name, spoil, message, kernel_device):
    arguments = make(2, 5, 96, torch.float32, kernel_device, rows=2)
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=f"gated_residual_modulate: .*{message}"):
        gated_residual_modulate(*chosen(arguments, MODULATE_NAMES))
    if name == "gate" and arguments["gate"].shape[1] == 1:
        return  # one row is a size of its own where nothing else has rows
    with pytest.raises(ExecutionError, match=f"gated_residual: .*{message}"):
        gated_residual(*chosen(arguments, PLAIN_NAMES))
    with pytest.raises(ExecutionError, match=f"gated_residual_norm: .*{message}"):
        gated_residual_norm(*chosen(arguments, NORM_NAMES))


@pytest.mark.parametrize("name", ["weight", "bias"])
@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda t: t[:-1], "has shape .95., expected .96."),
        (lambda t: t.repeat(2)[::2], "not contiguous"),
        (lambda t: t.double(), "float64"),
    ],
)
def test_refuses_weights(name, spoil, message, kernel_device):
    arguments = make(2, 5, 96, torch.float32, kernel_device)
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=message):
        gated_residual_norm(*chosen(arguments, NORM_NAMES))


def test_refuses_another_dtype(kernel_device):
    arguments = make(2, 5, 96, torch.float32, kernel_device) | {"dtype": torch.float64}
    for op, names in ((gated_residual_modulate, MODULATE_NAMES), (gated_residual_norm, NORM_NAMES)):
        with pytest.raises(ExecutionError, match="float64"):
            op(*chosen(arguments, names))
