"""What every measurement says beside its numbers: the machine, the versions, the command, the date.

A result is one JSON file in bench/results/, so that a number in the docs can be traced to its run.
"""

import json
import math
import shlex
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from wantrt.bench.machine import commit
from wantrt.bench.machine import machine as machine
from wantrt.bench.memory import PeakMemory as PeakMemory
from wantrt.bench.memory import anonymous_bytes as anonymous_bytes
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

RESULTS = Path(__file__).resolve().parent / "results"


def write_result(name: str, measured: dict[str, Any]) -> Path:
    """Write bench/results/`name`.json: what was measured, where, when and by which command."""
    return _write(_describe(name, measured))


def publish(name: str, measured: dict[str, Any]) -> None:
    """`write_result`, whose path goes to stderr, and the same object last on stdout, in one line.

    Not a number is null in it: JSON has no NaN.
    """
    result = _describe(name, _finite(measured))
    print(_write(result), file=sys.stderr)
    print(json.dumps(result), flush=True)


def _describe(name: str, measured: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%MZ"),
        "command": shlex.join(["python", "-m", _module(), *sys.argv[1:]]),
        "commit": commit(),
        "machine": machine(),
        **measured,
    }


def _write(result: dict[str, Any]) -> Path:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{result['name']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _module() -> str:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec is not None else sys.argv[0]
