"""Runs the tests of each kernel in a child process where Triton interprets kernels on the CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

HERE = Path(__file__).parent
KERNELS = (
    "modulate",
    "gated_residual",
    "qk_norm_rope",
    "rope",
    "rms_norm",
    "guide_and_step",
    "rms_silu",
)


@pytest.mark.parametrize("kernel", KERNELS)
def test_interpreted(kernel):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    result = subprocess.run(
        [*command, str(HERE / f"test_{kernel}.py")],
        cwd=HERE.parents[1],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "passed" in result.stdout
    assert "skipped" not in result.stdout
