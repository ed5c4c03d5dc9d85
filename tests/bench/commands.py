"""Runs the suite's commands in the process of a test."""

import sys
from pathlib import Path
from unittest.mock import patch

import pytest

from wantrt.cli import main


def ran(*arguments: object) -> int:
    """The exit code of ``wantrt bench`` with these arguments."""
    with patch.object(sys, "argv", ["wantrt", "bench", *map(str, arguments)]):
        with pytest.raises(SystemExit) as ended:
            main()
    return int(ended.value.code or 0)


def refusal(command: str, arguments: str, out: Path, capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of bad input, or of what is not there, and no file is written."""
    assert ran(command, *arguments.split(), "--out", out / "results") in (1, 2)
    assert not (out / "results").exists()
    lines = capsys.readouterr().err.strip().splitlines()
    return next(line for line in lines if "error" in line)
