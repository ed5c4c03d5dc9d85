"""`rms_norm` against its reference."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.shared import DTYPES, Random, assert_equal
from wantrt.errors import ExecutionError
from wantrt.kernels.rms_norm import rms_norm, rms_norm_reference


def make(*shape, dtype, device, weight_dtype=torch.float32):
    random = Random(device)
    return random.normal(*shape, dtype=dtype), random.normal(shape[-1], dtype=weight_dtype), 1e-6


@pytest.mark.parametrize("weight_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (2, 7, 97),
        (2, 3, 1536),
        (1, 3, 3072),
        (1, 2, 4096),
        (1, 3, 5120),
        (1, 1),
        (96,),
        (2, 2, 3, 8),
    ],
    ids=str,
)
def test_equals_reference(shape, dtype, weight_dtype, kernel_device):
    arguments = make(*shape, dtype=dtype, device=kernel_device, weight_dtype=weight_dtype)
    assert_equal(rms_norm(*arguments), rms_norm_reference(*arguments))


@pytest.mark.parametrize("chunk", [0, 1])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_chunk(chunk, batch, kernel_device):
    """The keys of cross-attention are one half of a fused output."""
    random = Random(kernel_device)
    x = random.normal(batch, 5, 2 * 96, dtype=torch.bfloat16).chunk(2, dim=-1)[chunk]
    weight = random.normal(96)
    actual = rms_norm(x, weight, 1e-6)
    assert actual.is_contiguous()
    assert_equal(actual, rms_norm_reference(x, weight, 1e-6))


def test_is_a_sound_torch_op(kernel_device):
    x, weight, eps = make(2, 5, 96, dtype=torch.bfloat16, device=kernel_device)
    for case in (x, x[..., 32:]):
        arguments = (case, weight[: case.shape[-1]], eps)
        torch.library.opcheck(rms_norm, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("x", lambda t: t.mT.contiguous().mT, "last axis of x is not contiguous"),
        ("x", lambda t: t.transpose(0, 1), "not at equal distances"),
        ("x", lambda t: t.double(), "float64"),
        ("x", lambda t: t[0, 0, 0], "no axes"),
        ("x", lambda t: t[:0], "nothing in it"),
        ("weight", lambda t: t[1:], "weight has shape"),
        ("weight", lambda t: t.repeat(2)[::2], "weight is not contiguous"),
        ("weight", lambda t: t.long(), "int64"),
    ],
)
def test_refuses(name, spoil, message, kernel_device):
    x, weight, eps = make(2, 5, 96, dtype=torch.float32, device=kernel_device)
    arguments = {"x": x, "weight": weight}
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=message):
        rms_norm(**arguments, eps=eps)
