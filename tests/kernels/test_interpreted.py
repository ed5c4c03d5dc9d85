"""Runs the tests of the kernels in child processes where Triton interprets kernels on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from wantrt.errors import ExecutionError
from wantrt.kernels.gated_residual import (
    gated_residual,
    gated_residual_modulate,
    gated_residual_norm,
)
from wantrt.kernels.guide_and_step import guide_and_step
from wantrt.kernels.modulate import modulate
from wantrt.kernels.qk_norm_rope import qk_norm_rope
from wantrt.kernels.rms_norm import rms_norm
from wantrt.kernels.rms_silu import rms_silu
from wantrt.kernels.rope import rope

HERE = Path(__file__).parent
GROUPS = (
    ("modulate", "rms_norm", "rope"),
    ("gated_residual",),
    ("qk_norm_rope", "guide_and_step", "rms_silu"),
    ("addresses", "random_shapes"),
)
SLOW_GROUPS = (("ops",), ("launches",))


@pytest.mark.parametrize(
    "group",
    [*GROUPS, *(pytest.param(group, marks=pytest.mark.slow) for group in SLOW_GROUPS)],
    ids=" ".join,
)
def test_interpreted(group):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, *(str(HERE / f"test_{name}.py") for name in group)],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout


def calls():
    """Every op with arguments that fit together, on a CPU."""
    x, rows = torch.zeros(1, 2, 12), torch.zeros(1, 1, 12)
    table, weight, index = torch.ones(2, 2), torch.ones(12), torch.zeros(1, dtype=torch.int64)
    return {
        modulate: (x, rows, rows, None, 1e-6, x.dtype),
        gated_residual: (x, x, rows, None),
        gated_residual_modulate: (x, x, None, rows, rows, None, 1e-6, x.dtype),
        gated_residual_norm: (x, x, rows, weight, weight, None, 1e-6, x.dtype),
        qk_norm_rope: (x, weight[:4], weight[:4], table, table, 1, 1e-6, True),
        rope: (x.view(1, 3, 2, 4), table, table),
        rms_norm: (x, weight, 1e-6),
        rms_silu: (x.view(1, 12, 2, 1, 1), weight),
        guide_and_step: (x, x, x, x, None, None, torch.zeros(1, 4), index),
    }


def test_a_cpu_is_refused():
    """Asked here, where nothing interprets the kernels."""
    for op, arguments in calls().items():
        with pytest.raises(ExecutionError, match="on cpu, a kernel runs on CUDA"):
            op(*arguments)


@pytest.mark.parametrize("op, arguments", calls().items(), ids=lambda value: str(value)[:40])
def test_one_tensor_without_data_is_refused(op, arguments):
    """torch then calls the fake, whose empty tensors would be taken for results."""
    for index, argument in enumerate(arguments):
        if isinstance(argument, torch.Tensor):
            spoiled = list(arguments)
            spoiled[index] = argument.to("meta")
            with pytest.raises(ExecutionError, match="on cpu and meta: move them"):
                op(*spoiled)


def test_no_test_of_a_kernel_is_left_out():
    """Without a GPU, a test that takes the `kernel_device` runs here or nowhere."""
    takers = {
        path.stem.removeprefix("test_")
        for path in HERE.glob("test_*.py")
        if re.search(r"^def test.*\bkernel_device\b", path.read_text(), re.MULTILINE)
    }
    assert takers <= {name for group in GROUPS + SLOW_GROUPS for name in group}
