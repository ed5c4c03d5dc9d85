"""Runs the tests of the kernels in child processes where Triton interprets kernels on the CPU."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
GROUPS = (
    ("modulate", "rms_norm", "rope"),
    ("gated_residual",),
    ("qk_norm_rope", "guide_and_step", "rms_silu"),
    ("addresses",),
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


def test_no_test_of_a_kernel_is_left_out():
    """Without a GPU, a test that takes the `kernel_device` runs here or nowhere."""
    takers = {
        path.stem.removeprefix("test_")
        for path in HERE.glob("test_*.py")
        if re.search(r"^def test.*\bkernel_device\b", path.read_text(), re.MULTILINE)
    }
    assert takers <= {name for group in GROUPS + SLOW_GROUPS for name in group}
