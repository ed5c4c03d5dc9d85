"""`guide_and_step` against its reference."""

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.shared import Random, assert_equal
from wantrt.errors import ExecutionError
from wantrt.kernels.guide_and_step import guide_and_step, guide_and_step_reference
from wantrt.schedulers.solver import Solver

STATE = ("sample", "x0", "delta")


def make(device, shape=(1, 16, 3, 5, 7), guided=True, step=1, dtype=torch.float32):
    random = Random(device)
    tensors = {name: random.normal(*shape) for name in STATE}
    tensors["conditional"] = random.normal(*shape, dtype=dtype)
    tensors["unconditional"] = random.normal(*shape, dtype=dtype) if guided else None
    tensors["guidance_scale"] = torch.full((1,), 5.0, device=device) if guided else None
    tensors["rows"] = random.normal(4, 4)
    tensors["index"] = torch.tensor([step], device=device)
    return tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)  # of the velocities
@pytest.mark.parametrize("guided", [True, False], ids=["guided", "alone"])
@pytest.mark.parametrize(
    "shape", [(1, 16, 3, 5, 7), (2, 16, 2, 8, 8), (1, 1, 1, 1, 1), (2048,)], ids=str
)
def test_equals_reference(shape, guided, dtype, kernel_device):
    for step in (0, 3):
        actual = make(kernel_device, shape, guided, step, dtype)
        expected = make(kernel_device, shape, guided, step, dtype)
        guide_and_step(**actual)
        guide_and_step_reference(**expected)
        for name, tensor in expected.items():
            if tensor is not None:
                torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-5)


def test_a_whole_run_of_a_solver(kernel_device):
    """One tensor for the index and one for the guidance scale serve all steps."""
    random = Random(kernel_device)
    noise, velocity = random.normal(1, 4, 2, 6, 5), random.normal(1, 4, 2, 6, 5)
    table = Random("cpu", seed=1).normal(5, 4).double().numpy() / 4
    index = torch.zeros(1, dtype=torch.int64, device=kernel_device)
    scale = torch.full((1,), 3.0, device=kernel_device)
    solvers = [
        Solver(table, noise.shape, kernel_device, take)
        for take in (guide_and_step, guide_and_step_reference)
    ]
    for solver in solvers:
        solver.reset(noise)
    for step in range(5):
        index.fill_(step)
        for solver in solvers:
            solver.step(velocity + solver.sample, index, velocity, scale)
    assert_equal(solvers[0].sample, solvers[1].sample)


@pytest.mark.parametrize("guided", [True, False])
def test_is_a_sound_torch_op(guided, kernel_device):
    arguments = tuple(make(kernel_device, guided=guided).values())
    torch.library.opcheck(guide_and_step, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    "name, spoil, message",
    [
        ("sample", lambda t: t.bfloat16(), "sample is torch.bfloat16"),
        ("sample", lambda t: t[:0], "nothing in it"),
        ("sample", lambda t: t.mT.contiguous().mT, "sample is not contiguous"),
        ("x0", lambda t: t[:, 1:], "x0 has shape"),
        ("delta", lambda t: t.double(), "delta is torch.float64"),
        ("conditional", lambda t: t.mT.contiguous().mT, "conditional is not contiguous"),
        ("unconditional", lambda t: t[..., 1:], "unconditional has shape"),
        ("unconditional", lambda t: None, "belong together"),
        ("guidance_scale", lambda t: None, "belong together"),
        ("guidance_scale", lambda t: t[0], "guidance_scale has shape"),
        ("rows", lambda t: t[:, :3], "rows has shape"),
        ("rows", lambda t: t[:0], "nothing in it"),
        ("rows", lambda t: t[0, 0], "expected .N, 4."),
        ("rows", lambda t: t.double(), "rows is torch.float64"),
        ("index", lambda t: t.int(), "index is torch.int32"),
        ("index", lambda t: t[0], "index has shape"),
    ],
)
def test_refuses(name, spoil, message, kernel_device):
    arguments = make(kernel_device)
    arguments[name] = spoil(arguments[name])
    with pytest.raises(ExecutionError, match=message):
        guide_and_step(**arguments)
