"""`make gpu` measures on a machine that has torch, Triton and numpy, and little else."""

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest

from tests.test_layout import ABSENT_ON_THE_GPU_MACHINE
from wantrt.cli.bench import bench

ROOT = Path(__file__).parents[2]
MAKEFILE = (ROOT / "Makefile").read_text()
SUITE = re.findall(r"^SUITE_(\d+) := ", MAKEFILE, re.MULTILINE)  # of commands of `wantrt bench`
PIECES = dict(re.findall(r"^BENCH_(\d+) := (\S+)$", MAKEFILE, re.MULTILINE))


def told(number: str) -> str:
    """The command of a piece."""
    asked = ["make", "--no-print-directory", "-n", f"gpu-{number}"]
    return subprocess.run(asked, cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_tests_come_before_measurements():
    numbers = re.search(r"^GPU_PIECES := (.*)$", MAKEFILE, re.MULTILINE)[1].split()
    tests = re.findall(r"^GPU_(\d+) := ", MAKEFILE, re.MULTILINE)
    assert numbers == [*tests, *PIECES, *SUITE]
    assert set(PIECES.values()) >= {"kernels", "block"}


def test_measurements_load_there():
    code = f"""
import importlib, sys
for absent in {ABSENT_ON_THE_GPU_MACHINE}:
    sys.modules[absent] = None  # importing it fails, as if it were not there
for name in {list(PIECES.values())}:
    importlib.import_module(f"wantrt.bench.{{name}}")
"""
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("number, name", PIECES.items())
def test_make_runs_it(number, name):
    assert told(number).split()[-3:] == ["python3", "-m", f"wantrt.bench.{name}"]


@pytest.mark.parametrize("number", SUITE)
def test_make_says_what_wantrt_bench_takes(number):
    _, _, arguments = told(number).partition("-m wantrt.cli bench ")
    name, *options = arguments.split()
    command = bench.get_command(click.Context(bench), name)
    assert command.make_context(name, options).params["out"].parts[0] == "bench-results"
