"""`rms_silu` against its reference."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.shared import DTYPES, Random, assert_equal
from wantrt.errors import ExecutionError
from wantrt.kernels.rms_silu import rms_silu, rms_silu_reference

LAYOUTS = {
    "contiguous": lambda x: x,
    "channels last": lambda x: x.to(memory_format=torch.channels_last_3d),
    "frames first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
}
LAYOUT = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())


def make(*shape, dtype, device, layout=LAYOUTS["contiguous"], gamma_dtype=None):
    random = Random(device)
    return layout(random.normal(*shape, dtype=dtype)), random.normal(
        shape[1], dtype=gamma_dtype or dtype
    )


@LAYOUT
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 11, 3, 5, 7),
        (1, 96, 2, 4, 8),
        (2, 160, 1, 4, 4),
        (1, 192, 1, 3, 11),
        (1, 384, 4, 2, 4),
        (1, 640, 1, 1, 5),
        (1, 1024, 1, 3, 8),
        (1, 1, 1, 1, 1),
    ],
    ids=str,
)
def test_equals_reference(shape, dtype, layout, kernel_device):
    x, gamma = make(*shape, dtype=dtype, device=kernel_device, layout=layout)
    actual = rms_silu(x, gamma)
    assert actual.stride() == x.stride()
    assert_equal(actual, rms_silu_reference(x, gamma))


def test_gamma_of_another_dtype(kernel_device):
    x, gamma = make(1, 96, 1, 3, 3, dtype=torch.bfloat16, device=kernel_device)
    assert_equal(rms_silu(x, gamma.float()), rms_silu_reference(x, gamma.float()))


@LAYOUT
def test_zeros_and_large_values(layout, kernel_device):
    """Where all channels are 0 the norm is 0/1e-12, and no exponential overflows to NaN."""
    x, gamma = make(1, 16, 2, 3, 4, dtype=torch.float32, device=kernel_device, layout=layout)
    x[:, :, 0], x[:, 0, 1] = 0, 1e15
    gamma *= 1000
    actual = rms_silu(x, gamma)
    assert actual.isfinite().all()
    assert not actual[:, :, 0].any()
    assert_equal(actual, rms_silu_reference(x, gamma))


@LAYOUT
def test_is_a_sound_torch_op(layout, kernel_device):
    arguments = make(2, 16, 3, 2, 4, dtype=torch.bfloat16, device=kernel_device, layout=layout)
    torch.library.opcheck(rms_silu, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("x", lambda t: t.mT.contiguous().mT, "neither channels first nor last"),
        ("x", lambda t: t[:, :, 1:], "neither channels first nor last"),
        ("x", lambda t: t[:, :, 0], "expected .B, C, T, H, W."),
        ("x", lambda t: t[:, :, :0], "nothing in it"),
        ("x", lambda t: t.double(), "float64"),
        ("gamma", lambda t: t[1:], "gamma has shape"),
        ("gamma", lambda t: t.repeat(2)[::2], "gamma is not contiguous"),
        ("gamma", lambda t: t.int(), "int32"),
    ],
)
def test_refuses(name, spoil, message, kernel_device):
    x, gamma = make(2, 16, 3, 2, 4, dtype=torch.float32, device=kernel_device)
    arguments = {"x": x, "gamma": gamma}
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=message):
        rms_silu(**arguments)
