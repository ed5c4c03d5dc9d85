"""Compiling every plan of a full-size model, without a GPU: how long, how much memory, how large.

    python -m wantrt.bench.build_plans FOLDER
    python -m wantrt.bench.build_plans FOLDER --variants

Runs `wantrt build` in processes of its own, each with an empty plan cache, on generated weights,
and samples their anonymous memory every 20 ms (mapped files do not count). Targets: 14B and 1.3B at
two sizes for two GPUs in at most 120 s and 8 GiB, DiT and text plans of at most 50 MB together; a
second build in at most 2 s. Beside them, 1.3B with all its weights baked; there the text encoder is
cut to one layer and a small vocabulary, so that what is measured is the 30 blocks. With --variants:
every released variant at all of its official sizes, component by component, into
build_variants.json; no targets.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wantrt.bench.report import anonymous_bytes, write_result
from wantrt.config import TASKS, VARIANTS
from wantrt.linked import refuse_other_names
from wantrt.pieces import read_log

refuse_other_names(__spec__)

TWO_SIZES = "--size 832x480,1280x720 --no-weights"
TARGETS = "--runtime tensorrt-rtx --target sm89,sm120"
ONE_TEXT_LAYER = "random:0:text_encoder.num_layers=1,text_encoder.vocab_size=1000"
BUILDS = {
    "14B": f"--variant 14B --checkpoint random:0 {TARGETS} {TWO_SIZES}",
    "14B again": f"--variant 14B --checkpoint random:0 {TARGETS} {TWO_SIZES}",
    "1.3B": f"--variant 1.3B --checkpoint random:0 {TARGETS} {TWO_SIZES}",
    "1.3B baked": (
        f"--variant 1.3B --checkpoint {ONE_TEXT_LAYER} {TARGETS} --size 832x480 --no-weights "
        "--weights baked"
    ),
}
RELEASED = {
    row.name: f"--variant {row.name} --checkpoint random:0 {TARGETS} --no-weights --size "
    + ",".join(f"{width}x{height}" for width, height in row.sizes)
    for row in VARIANTS.values()
    if row.task in TASKS and row.repo_id
}
LIMIT_S, LIMIT_GIB, LIMIT_MB, LIMIT_AGAIN_S = 120, 8, 50, 2


def measure(arguments: list[str], cache: Path) -> dict[str, Any]:
    """Run `wantrt build`; its own JSON, wall time with the interpreter's start, peak memory."""
    command = [sys.executable, "-m", "wantrt.cli", "build", *arguments, "--json", "--quiet"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    peak_bytes = 0
    peaks: dict[int, int] = {}  # of each process that compiles one plan, in their order
    while process.poll() is None:
        try:
            compilers = children(process.pid)
            plans = [pid for compiler in compilers for pid in children(compiler)]
            peaks |= {pid: peak_rss_bytes(pid) for pid in plans}
            peak_bytes = max(
                peak_bytes, sum(map(anonymous_bytes, (process.pid, *compilers, *plans)))
            )
        except (OSError, RuntimeError):
            continue  # it has just ended
        time.sleep(0.02)
    seconds = time.perf_counter() - start
    output, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{output}")
    built = json.loads(output)
    return {
        "seconds": round(seconds, 2),
        "anonymous_peak_gib": round(peak_bytes / 2**30, 2),
        "pieces_built": len(built["built"]),
        "plans": built["plans"]["count"],
        "dit_and_text_plans_mb": round(built["plans"]["dit_and_text_bytes"] / 1e6, 1),
        "vae_plans_mb": round(built["plans"]["vae_bytes"] / 1e6, 1),
        "load_average": round(os.getloadavg()[1], 2),  # of the last 5 minutes, this build included
        "components": by_component(Path(built["bundle"]), list(peaks.values())),
    }


def by_component(bundle: Path, peaks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """What the plans of each component took, from the build's log.

    peaks: the largest resident set of the process that compiled a plan, in bytes, in the order of
    the plans; pages of mapped weights count. None: nothing was compiled.
    """
    log = read_log(bundle)
    assert log is not None
    plans = {name: built for name, built in log.pieces.items() if name.startswith("plan ")}
    found: dict[str, dict[str, Any]] = {}
    for (name, built), peak in zip(plans.items(), peaks, strict=True) if peaks else ():
        row = found.setdefault(
            name.split()[1],
            {"plans": 0, "seconds": 0.0, "longest_s": 0.0, "plan_mb": 0.0, "peak_rss_mib": 0},
        )
        row["plans"] += 1
        row["seconds"] = round(row["seconds"] + built.seconds, 2)
        row["longest_s"] = max(row["longest_s"], round(built.seconds, 2))
        size = sum(record.size for record in built.files.values())
        row["plan_mb"] = round(row["plan_mb"] + size / 1e6, 3)
        row["peak_rss_mib"] = max(row["peak_rss_mib"], round(peak / 2**20))
    return found


def children(pid: int) -> list[int]:
    """Those of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def peak_rss_bytes(pid: int) -> int:
    """The largest resident set of a process up to now. RuntimeError: it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"process {pid} has ended")


def misses(name: str, run: dict[str, Any]) -> list[str]:
    """Where a run misses its targets."""
    if name == "14B again":
        return [] if run["seconds"] <= LIMIT_AGAIN_S and not run["pieces_built"] else [name]
    if name == "1.3B baked":
        return []  # it is what bound plans are compared with
    limits = {
        "seconds": LIMIT_S,
        "anonymous_peak_gib": LIMIT_GIB,
        "dit_and_text_plans_mb": LIMIT_MB,
    }
    return [f"{name}: {key} is {run[key]}" for key, most in limits.items() if run[key] > most]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path, help="scratch folder for 15 GB, made and deleted")
    parser.add_argument("--variants", action="store_true", help="every variant instead")
    parser.add_argument("--note", help="what else the machine was doing")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    folder.mkdir(parents=True)
    runs: dict[str, Any] = {}
    try:
        for name, options in (RELEASED if arguments.variants else BUILDS).items():
            out = folder / name.removesuffix(" again")
            run = measure([*shlex.split(options), "--out", str(out)], Path(f"{out}-cache"))
            runs[name] = {"command": f"wantrt build {options}", **run}
            print(name, run, flush=True)
            if arguments.variants:
                shutil.rmtree(out)
                shutil.rmtree(f"{out}-cache")
    finally:
        shutil.rmtree(folder)
    result = "build_variants" if arguments.variants else "build_plans"
    print(write_result(result, {"note": arguments.note, "runs": runs}))
    if arguments.variants:
        return
    if missed := [miss for name, run in runs.items() for miss in misses(name, run)]:
        raise SystemExit(f"over the limit: {'; '.join(missed)}")


if __name__ == "__main__":
    main()
