"""Compiling bundles: how long, how much memory, how large; again; after one weight has changed.

    wantrt bench build                                                     # nano
    wantrt bench build --variant 14B --checkpoint random:0 --no-weights --runtime tensorrt-rtx
        --target sm89,sm120 --size 832x480,1280x720
    wantrt bench build --variant all --all-sizes --checkpoint random:0 --no-weights
        --runtime tensorrt-rtx --target sm89,sm120
    wantrt bench build --variant 1.3B --checkpoint random:0 --weights bound,baked --no-weights ...
    wantrt bench build --variant 14B --checkpoint random:0 --jobs 1,2 --no-weights ...

`wantrt build` runs in a process of its own, with an empty folder and an empty plan cache: `first`.
Then the same once more, which has nothing to do: `again`. Then, with --changed, one number of the
largest weight file is another one, and the checkpoint is built into a folder of its own (a bundle
stays with its checkpoint) with the same cache: `changed`. For that, generated weights are written
into files.
Seconds are of the whole process, the interpreter's start included. Memory is that of the process
and all its children together, sampled every 20 ms: resident pages, of which those of mapped files
can be dropped, and anonymous ones, which cannot. Below each build stand its components. Of several
--jobs, each number of plans compiled at once has a build of its own.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import torch

from wantrt.bench.memory import status_bytes
from wantrt.bench.options import RESULT, options
from wantrt.bench.result import Row, Table, number, run, start
from wantrt.build import Build, plan_build
from wantrt.checkpoints import open_checkpoint
from wantrt.checkpoints.layouts import write_official
from wantrt.cli.build import list_of, parse_count
from wantrt.cli.command import command as wantrt_command
from wantrt.cli.console import Console
from wantrt.config import SHIPPED, TASKS, VARIANTS, Size, find_variant
from wantrt.errors import BenchError
from wantrt.jobs import parse_size
from wantrt.linked import refuse_other_names
from wantrt.pieces import Built, read_log, variant_to_ask

refuse_other_names(__spec__)

SAMPLE_S = 0.02
KINDS = {"weights": "weights", "graph": "graphs", "plan": "plans"}  # of pieces -> in keys
ALL = [v.name for v in VARIANTS.values() if v.task in TASKS and v.repo_id]

TABLE = Table(
    (
        ("build", lambda row: row["name"] if "what" in row else f"· {row['kind']} {row['part']}"),
        ("s", number("build_s", 2)),
        ("longest", number("longest_s", 2)),
        ("pieces", number("pieces", 0)),
        ("RSS MiB", number("peak_rss_bytes", 0, scale=2**-20)),
        ("anonymous", number("peak_anonymous_bytes", 0, scale=2**-20)),
        ("MB", number("bytes", 1, scale=1e-6)),
        ("weights MB", number("weights_bytes", 1, scale=1e-6)),
        ("plans MB", number("plans_bytes", 1, scale=1e-6)),
    )
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A bundle to build, as `plan_build` takes it. weights: None where the runtime has no plans."""

    variant: str | None
    checkpoint: str | None = None
    runtime: str = "auto"
    precision: str | None = None
    with_weights: bool = True
    sizes: tuple[Size, ...] | None = None
    frames: tuple[int, ...] | None = None
    targets: tuple[str, ...] | None = None
    weights: str | None = None
    jobs: int | None = None

    def plan(self, out: Path) -> Build:
        """What would be built; nothing is written. Raises what `plan_build` raises."""
        asked = vars(self) | {"weights": self.weights or "auto", "out": out}
        del asked["jobs"]
        return plan_build(**asked)

    def arguments(self, out: Path) -> list[str]:
        """Of `wantrt build`."""
        sizes = [f"{width}x{height}" for width, height in self.sizes or ()]
        given = {
            "--variant": self.variant,
            "--checkpoint": self.checkpoint,
            "--runtime": self.runtime,
            "--precision": self.precision,
            "--size": ",".join(sizes),
            "--frames": ",".join(map(str, self.frames or ())),
            "--target": ",".join(self.targets or ()),
            "--weights": self.weights,
            "--jobs": str(self.jobs or ""),
            "--out": str(out),
        }
        told = [part for option, value in given.items() if value for part in (option, value)]
        return [*told, *([] if self.with_weights else ["--no-weights"])]


def measure(cases: Mapping[str, Case], scratch: Path | None, changed: bool) -> Iterator[Row]:
    """Rows of each case, by its name. scratch: where bundles are built, and deleted."""
    for name, case in cases.items():
        with tempfile.TemporaryDirectory(prefix="wantrt-build-", dir=scratch) as made:
            folder, rounds = Path(made), ["first", "again"]
            files = folder / "checkpoint"
            if changed:
                case, rounds = copy_checkpoint(case, files), [*rounds, "changed"]
            for what in rounds:
                bundle = folder / "bundle"
                if what == "changed":
                    change_a_weight(files)
                    bundle = folder / "changed"
                built = build(case, bundle, folder / "cache")
                yield from rows_of(name, case, what, built)


@dataclass
class BuildRun:
    """A finished process of `wantrt build`. peaks: in bytes. pieces: those that it made."""

    seconds: float
    peaks: Mapping[str, int]
    plan_peaks: Sequence[int]  # resident, of the processes that compiled one plan each, in order
    total_bytes: int
    everything: Mapping[str, Built] = field(default_factory=dict)
    pieces: Mapping[str, Built] = field(default_factory=dict)


def build(case: Case, out: Path, cache: Path) -> BuildRun:
    """Run `wantrt build` and watch it. Raises BenchError where it fails."""
    command = [sys.executable, "-m", "wantrt.cli", "build", *case.arguments(out)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    with tempfile.TemporaryFile("w+") as told:
        begun = time.perf_counter()
        process = subprocess.Popen(
            [*command, "--json", "--quiet"], stdout=told, stderr=subprocess.DEVNULL, env=environment
        )
        try:
            peaks, plan_peaks = watch(process)
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        seconds = time.perf_counter() - begun
        told.seek(0)
        answer = told.read()
    result = json.loads(answer) if answer.strip() else {}
    if process.returncode:
        why = result.get("error", {}).get("message", f"exit status {process.returncode}")
        raise BenchError(f"wantrt build failed: {why}")
    log = read_log(out)
    assert log is not None
    made = {name: piece for name, piece in log.pieces.items() if name in result["built"]}
    return BuildRun(seconds, peaks, plan_peaks, result["bytes"], log.pieces, made)


def watch(process: "subprocess.Popen[bytes]") -> tuple[dict[str, int], list[int]]:
    """Peak memory of a process with all its descendants, and of each of its grandchildren.

    TensorRT compiles each plan in a process of its own, which a child of the build starts.
    """
    peaks, plans = {"peak_rss_bytes": 0, "peak_anonymous_bytes": 0}, dict[int, int]()
    while process.poll() is None:
        try:
            compilers = children(process.pid)
            compiling = [pid for compiler in compilers for pid in children(compiler)]
            plans |= {pid: status_bytes("VmHWM", pid) for pid in compiling}
            tree = (process.pid, *compilers, *compiling)
            for key, counter in (("peak_rss_bytes", "VmRSS"), ("peak_anonymous_bytes", "RssAnon")):
                peaks[key] = max(peaks[key], sum(status_bytes(counter, pid) for pid in tree))
        except (OSError, RuntimeError):
            continue  # one of them has just ended
        time.sleep(SAMPLE_S)
    return peaks, list(plans.values())


def children(pid: int) -> list[int]:
    """Those of all threads of a process."""
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


# -- Rows -----------------------------------------------------------------------------------------


def rows_of(name: str, case: Case, what: str, built: BuildRun) -> Iterator[Row]:
    """A row of the build; one of each part's weights, of the graphs, of each component's plans."""
    row: Row = {
        "name": f"{name}: {what}",
        "what": what,
        "variant": case.variant,
        "weights": case.weights,
        "jobs": case.jobs,
        "build_s": round(built.seconds, 3),
        **built.peaks,
        "pieces": len(built.pieces),
        "bytes": built.total_bytes,
    }
    for kind, key in KINDS.items():
        row[f"{key}_s"] = round(sum(p.seconds for p in of_kind(built.pieces, kind).values()), 3)
        row[f"{key}_bytes"] = sum(map(size_of, of_kind(built.everything, kind).values()))
    yield row
    peaks = plan_peaks(built) if case.jobs == 1 else {}  # else they begin in no known order
    for kind in KINDS:
        parts: dict[str, dict[str, Built]] = {}
        for piece, made in of_kind(built.pieces, kind).items():
            part = "all" if kind == "graph" else piece.split()[1]  # graphs are kilobytes
            parts.setdefault(part, {})[piece] = made
        for part, pieces in parts.items():
            resident = [peaks[piece] for piece in pieces if piece in peaks]
            yield {
                "name": f"{name}: {what}: {kind} {part}",
                "kind": kind,
                "part": part,
                "pieces": len(pieces),
                "build_s": round(sum(made.seconds for made in pieces.values()), 3),
                "longest_s": max(made.seconds for made in pieces.values()),
                "bytes": sum(map(size_of, pieces.values())),
                **({"peak_rss_bytes": max(resident)} if resident else {}),
            }


def of_kind(pieces: Mapping[str, Built], kind: str) -> dict[str, Built]:
    return {name: made for name, made in pieces.items() if name.partition(" ")[0] == kind}


def size_of(made: Built) -> int:
    return sum(record.size for record in made.files.values())


def plan_peaks(built: BuildRun) -> dict[str, int]:
    """Of each plan the peak of its process; none where a process was too quick to be seen."""
    plans, peaks = list(of_kind(built.pieces, "plan")), built.plan_peaks
    return dict(zip(plans, peaks, strict=True)) if len(plans) == len(peaks) else {}


# -- One changed weight ---------------------------------------------------------------------------


def copy_checkpoint(case: Case, folder: Path) -> Case:
    """The case with files that may be replaced: links, or generated weights written."""
    opened = open_checkpoint(case.checkpoint, case.variant)
    if opened.layout is None:
        write_official(opened, folder, pickled=False)
    else:
        shutil.copytree(opened.source, folder, copy_function=link)
    return replace(case, checkpoint=str(folder), variant=variant_to_ask(opened.variant, None))


def link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another disk
        shutil.copyfile(source, target)


def change_a_weight(folder: Path) -> None:
    """Turn the sign of the last number of the largest safetensors file (little-endian)."""
    largest = max(folder.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
    copy = largest.with_name("changed")  # the link's other end stays as it is
    shutil.copyfile(largest, copy)
    with copy.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        (last,) = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 0x80]))
    copy.replace(largest)


# -- The command ----------------------------------------------------------------------------------


def make_cases(
    variants: Sequence[str],
    ways: Sequence[str],
    jobs: Sequence[int | None],
    all_sizes: bool,
    given: Mapping[str, Any],
) -> dict[str, Case]:
    """Cases by their names. ways: of --weights, or none."""
    found = {}
    for asked, way, count in product(variants, ways or (None,), jobs):
        variant = find_variant(asked)
        case = Case(variant=variant.name, weights=way, jobs=count, **given)
        if all_sizes:
            case = replace(case, sizes=tuple(variant.sizes))
        how = f"jobs {count}" if len(jobs) > 1 else None
        found[" ".join(filter(None, (variant.name, way, how)))] = case
    return found


def check(cases: Mapping[str, Case], scratch: Path | None, changed: bool) -> None:
    """Plan every build, and compare what it takes with the free space. Raises BenchError, ..."""
    where = Path(scratch or tempfile.gettempdir())
    if not where.is_dir():
        raise BenchError(f"--scratch {where} is no folder; name one with room for a bundle")
    free = shutil.disk_usage(where).free
    for name, case in cases.items():
        plan = case.plan(where / "wantrt-bench-build")
        needed = sum(piece.size for piece in plan.pieces)
        if changed:
            needed += stored_bytes(plan)
        if needed > free:
            raise BenchError(
                f"{name} takes {needed / 1e9:,.0f} GB in {where}, which has {free / 1e9:,.0f}; "
                "take --no-weights, --no-changed or another --scratch"
            )


def stored_bytes(plan: Build) -> int:
    """Of the checkpoint's files, or of those that a generated one is written into."""
    if plan.checkpoint.layout is not None:
        files = Path(plan.checkpoint.source).rglob("*.safetensors")
        return sum(file.stat().st_size for file in files)
    modules = (part.module(torch.float32) for part in plan.checkpoint.parts.values())
    return sum(p.nbytes for module in modules for p in module.parameters())


@wantrt_command()
@click.option(
    "--variant",
    "variants",
    default="nano",
    show_default=True,
    metavar="NAME,…",
    callback=list_of(str),
    help="all: every released one.",
)
@click.option("--checkpoint", metavar="SOURCE", help="As for wantrt build: random:0, a folder.")
@click.option("--runtime", default="auto", show_default=True, help="To build for.")
@click.option("--precision", metavar="NAME", help="fp32, bf16 or fp16. [default: the runtime's]")
@click.option("--no-weights", is_flag=True, help="Graphs and plans only.")
@click.option("--size", "sizes", metavar="WxH,…", callback=list_of(parse_size), help="Of plans.")
@click.option("--all-sizes", is_flag=True, help="Plans of all official sizes of each variant.")
@click.option("--frames", metavar="N,…", callback=list_of(parse_count), help="Of plans.")
@click.option("--target", "targets", metavar="sm89,…", callback=list_of(str), help="Of plans.")
@click.option(
    "--weights",
    "ways",
    metavar="bound,baked",
    callback=list_of(str),
    help="Of plans: each of them is built. [default: bound]",
)
@click.option(
    "--jobs",
    metavar="N,…",
    callback=list_of(click.IntRange(1)),
    help="Plans compiled at once: with each of these. [default: one a core]",
)
@click.option(
    "--changed/--no-changed",
    default=None,
    help="Also after a change of one weight. [default: where the checkpoint has files]",
)
@click.option(
    "--scratch",
    type=click.Path(path_type=Path),
    help="Where bundles are built, and deleted. [default: the system's folder for temporary files]",
)
@options(RESULT)
def command(
    console: Console,
    variants: Sequence[str],
    no_weights: bool,
    all_sizes: bool,
    ways: Sequence[str] | None,
    jobs: Sequence[int] | None,
    changed: bool | None,
    scratch: Path | None,
    out: Path,
    note: str | None,
    **given: Any,
) -> int:
    """Compiling bundles: time, memory, bytes; again; after one weight has changed."""
    if all_sizes and given["sizes"]:
        raise BenchError("--all-sizes and --size are one too many; take one of them")
    cases = make_cases(
        ALL if list(variants) == ["all"] else variants,
        ways or (),
        jobs or [None],
        all_sizes,
        {"with_weights": not no_weights, **given},
    )
    if changed is None:
        source = given["checkpoint"]
        changed = (
            Path(source).is_dir() if source else all(c.variant in SHIPPED for c in cases.values())
        )
    check(cases, scratch, changed)
    settings = {
        "builds": [
            {key: value for key, value in vars(case).items() if value is not None}
            for case in cases.values()
        ],
        "changed": changed,
    }
    return run(
        console, start("build", settings, note), measure(cases, scratch, changed), TABLE, out
    )
