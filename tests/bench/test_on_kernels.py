"""What the benchmarks run, with the real kernels: compiled on a GPU, interpreted elsewhere."""

import pytest
import torch

pytest.importorskip("triton")

from tests.bench.small_block import CONFIG, LATENT
from tests.bench.small_cases import small_cases
from tests.kernels.conftest import INTERPRETED
from wantrt.bench import kernels
from wantrt.bench.block import our_ops
from wantrt.bench.block_contenders import make_inputs, make_weights, our_block
from wantrt.bench.gpu import compare
from wantrt.bench.kernel_cases import Random, kernel, reference
from wantrt.models.ops import TORCH_OPS

TRUNCATED = 2.2  # Triton's interpreter cuts off the bits of a bfloat16 that a GPU rounds


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_kernels_take_the_cases(case, kernel_device):
    arguments = case.make(Random(kernel_device, 0))
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in arguments]
    runs = {"kernel": kernel(case), "eager": reference(case.op)}
    with torch.inference_mode():
        errors, problems = kernels.check(case, runs, arguments)
    assert problems == {}
    row = {f"{name}_error_rms": found["rms"] for name, found in errors.items()}
    if INTERPRETED:
        row["kernel_error_rms"] /= TRUNCATED
    assert kernels.passes(row), row
    for argument, value in zip(arguments, before, strict=True):
        if isinstance(value, torch.Tensor):
            assert torch.equal(argument, value)  # also of an op in place: it got copies


@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_block_with_kernels_is_the_reference(dtype, tolerance, kernel_device):
    random = Random(kernel_device, 0)
    weights = make_weights(CONFIG, random)
    given = make_inputs(CONFIG, LATENT, dtype, random)
    with torch.inference_mode():
        expected = our_block(CONFIG, torch.float32, TORCH_OPS, weights, given)()
        actual = our_block(CONFIG, dtype, our_ops(), weights, given)()
        plain = our_block(CONFIG, dtype, TORCH_OPS, weights, given)()
    error = compare([actual], [expected])
    assert error["max"] < tolerance
    margin = TRUNCATED if INTERPRETED else 1.1  # rounded in another order
    assert error["rms"] <= margin * compare([plain], [expected])["rms"] + 1e-6
