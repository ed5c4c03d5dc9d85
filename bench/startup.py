"""Fresh processes: the interpreter, importing, loading, the first request and the second.

    wantrt bench startup                                           # nano, which ships
    wantrt bench startup --runtime onnxruntime,torch --cache warm,cold --runs 5
    wantrt bench startup --variant 1.3B --checkpoint random:0 --requests 0

Each number is of another process, which tells the moments at which it was where. `import_s` is of
`wantrt` and its pipeline, torch among it; `first_s` and `second_s` are requests, the second with
its prompt embedded anew; `to_first_video_s` is all from the process's start to its first video.

Warm: one process has run before and is not counted. Cold: before each process the pages of all
files of the bundle, and of all files that the warm process had loaded (modules and libraries), are
taken out of the file cache as far as the system does it (POSIX_FADV_DONTNEED): pages that another
process has mapped stay, those of torch in this one's parent among them. `bundle_kept_fraction` and
`library_kept_fraction` say how much stayed.
"""

import ctypes
import json
import mmap
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import click
import numpy as np

from wantrt.bench.bundles import choose_bundle, describe_bundle
from wantrt.bench.options import (
    BUNDLE,
    FRAMES,
    PROMPT,
    RESIDENCY,
    RESULT,
    RUNTIMES,
    SEED,
    SIZE,
    SOURCE,
    STEPS,
    options,
)
from wantrt.bench.request import (
    check_request,
    describe_request,
    given_of,
    make_request,
    missing_source,
)
from wantrt.bench.result import Row, Table, number, run, spread, start, text
from wantrt.bundle import MANIFEST, Bundle
from wantrt.cli.build import list_of
from wantrt.cli.command import command as bench_command
from wantrt.cli.console import Console
from wantrt.errors import ExecutionError
from wantrt.linked import refuse_other_names
from wantrt.names import check_name
from wantrt.runtime.loading import choose_for

refuse_other_names(__spec__)

CACHES = ("warm", "cold")
TABLE = Table(
    (
        ("start", text("name")),
        ("python s", number("python_s", 3)),
        ("import s", number("import_s")),
        ("load s", number("load_s")),
        ("p90", number("load_s", part="p90")),
        ("first s", number("first_s")),
        ("second s", number("second_s")),
        ("all s", number("to_first_video_s")),
        ("MiB", number("peak_rss_bytes", 0, scale=2**-20)),
    )
)

# Marks are moments of one clock, which all processes of a machine share (CLOCK_MONOTONIC).
PROCESS = """
import time
marks = {"python": time.perf_counter()}
import wantrt
marks["wantrt"] = time.perf_counter()
from wantrt import Pipeline
marks["import"] = time.perf_counter()
import json, sys
import numpy as np
asked = json.loads(sys.argv[1])
settings = asked["settings"]
if "size" in settings:
    settings["size"] = tuple(settings["size"])
if asked["arrays"]:
    settings |= dict(np.load(asked["arrays"]))
begun = time.perf_counter()
pipe = Pipeline.load(asked["bundle"], asked["runtime"], **asked["load"])
loaded = time.perf_counter()
seconds = []
for _ in range(asked["requests"]):
    pipe.text_encoder.forget()
    at = time.perf_counter()
    for frames in pipe.stream(**settings):
        pass
    seconds.append(time.perf_counter() - at)
names = [vars(module) for module in list(sys.modules.values())]
files = {found.get(key) for found in names for key in ("__file__", "__cached__")}
with open("/proc/self/maps") as lines:
    files |= {line.split(maxsplit=5)[-1].strip() for line in lines}
with open("/proc/self/status") as lines:
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
print(json.dumps({
    "marks": marks,
    "load_s": loaded - begun,
    "requests_s": seconds,
    "peak_rss_bytes": peak,
    "files": sorted(f for f in files if isinstance(f, str) and f.startswith("/")),
}))
"""


def measure(
    bundle: Bundle,
    runtimes: Sequence[str],
    settings: dict[str, Any],
    *,
    arrays: Path | None = None,
    load: dict[str, Any] | None = None,
    caches: Sequence[str] = ("warm",),
    requests: int = 2,
    runs: int = 5,
) -> Iterator[Row]:
    """A row for each runtime and state of the file cache; after an interruption, of the processes
    that ended.

    settings: of the requests, as JSON says them; arrays: an npz file with their images. load:
    arguments of `Pipeline.load`.
    """
    asked = {
        "bundle": str(bundle.path.resolve()),
        "settings": settings,
        "arrays": str(arrays) if arrays else None,
        "load": load or {},
        "requests": requests,
    }
    own = [bundle.path.resolve() / name for name in (MANIFEST, *bundle.manifest.files)]
    for runtime in runtimes:
        loaded = set(map(Path, start_process(asked | {"runtime": runtime})["files"]))
        libraries = [path for path in sorted(loaded - set(own)) if path.is_file()]
        for cache in caches:
            told: list[dict[str, Any]] = []
            kept: list[tuple[float, float]] = []
            try:
                for _ in range(runs):
                    if cache == "cold":
                        kept.append((drop_cached(own), drop_cached(libraries)))
                    told.append(start_process(asked | {"runtime": runtime}))
            except (Exception, KeyboardInterrupt):
                if told:
                    yield row_of(bundle, runtime, cache, own, libraries, told, kept)
                raise
            yield row_of(bundle, runtime, cache, own, libraries, told, kept)


def row_of(
    bundle: Bundle,
    runtime: str,
    cache: str,
    own: Sequence[Path],
    libraries: Sequence[Path],
    told: Sequence[dict[str, Any]],
    kept: Sequence[tuple[float, float]],
) -> Row:
    """told: of each process; kept: how much of own and libraries stayed in a cold cache."""
    row: Row = {
        "name": f"{bundle.variant.name} {runtime}, {cache}",
        "variant": bundle.variant.name,
        "runtime": runtime,
        "cache": cache,
        "bundle_bytes": sum(path.stat().st_size for path in own),
        "library_bytes": sum(path.stat().st_size for path in libraries),
    }
    if kept:
        of_bundle, of_libraries = np.median(kept, axis=0)
        row["bundle_kept_fraction"] = float(of_bundle)
        row["library_kept_fraction"] = float(of_libraries)
    return row | {name: spread([one[name] for one in told]) for name in told[0]["numbers"]}


def start_process(asked: dict[str, Any]) -> dict[str, Any]:
    """Run a process to its end. `numbers`: the names of what it measured, which lies beside.

    Raises ExecutionError with the error that it ended by.
    """
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PROCESS, json.dumps(asked)], capture_output=True, text=True
    )
    if done.returncode:
        # after the last line of the traceback, all of which are indented
        said = done.stderr.rstrip().rpartition("\n  ")[2].partition("\n")[2]
        said = said or f"exit code {done.returncode}"
        raise ExecutionError(f"the process that was to be measured failed: {said}")
    told = json.loads(done.stdout.strip().rpartition("\n")[2])
    marks, requests = told["marks"], told["requests_s"]
    numbers = {
        "python_s": marks["python"] - begun,
        "import_wantrt_s": marks["wantrt"] - marks["python"],
        "import_s": marks["import"] - marks["python"],
        "load_s": told["load_s"],
        "peak_rss_bytes": told["peak_rss_bytes"],
    }
    numbers |= dict(zip(("first_s", "second_s"), requests, strict=False))
    if requests:
        parts = ("python_s", "import_s", "load_s", "first_s")
        numbers["to_first_video_s"] = sum(numbers[name] for name in parts)
    return {"files": told["files"], "numbers": list(numbers), **numbers}


# -- The file cache -------------------------------------------------------------------------------


def drop_cached(paths: Sequence[Path]) -> float:
    """Take files out of the file cache. Returns how much of their bytes stayed."""
    kept = total = 0
    for path in paths:
        with suppress(OSError):  # gone, or not ours to open
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)  # pages that are not written yet stay
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
                kept += cached_bytes(descriptor)
                total += os.fstat(descriptor).st_size
            finally:
                os.close(descriptor)
    return kept / max(total, 1)


def cached_bytes(descriptor: int) -> int:
    """How much of an open file is in the file cache (mincore)."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return 0
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    integers = [ctypes.c_int] * 3
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *integers, ctypes.c_long]
    address = libc.mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, descriptor, 0)
    if address == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), "mmap")
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    try:
        if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), pages):
            raise OSError(ctypes.get_errno(), "mincore")
    finally:
        libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(size))
    cached = int(np.count_nonzero(np.frombuffer(bytes(pages), np.uint8) & 1))
    return min(cached * mmap.PAGESIZE, size)


# -- The command ----------------------------------------------------------------------------------


@bench_command()
@options(
    *(BUNDLE, RUNTIMES, RESIDENCY, PROMPT, SIZE, FRAMES, STEPS, SOURCE, SEED),
    click.option(
        "--cache",
        "caches",
        default="warm",
        show_default=True,
        metavar="STATE,…",
        callback=list_of(str),
        help="Of the system's file cache before a process starts: warm, cold.",
    ),
    click.option(
        "--requests",
        type=click.IntRange(0, 2),
        default=2,
        show_default=True,
        help="Videos of each process; 0: loading alone.",
    ),
    click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True),
    RESULT,
)
def command(
    console: Console,
    bundle: Path | None,
    variant: str | None,
    checkpoint: str | None,
    precision: str | None,
    trust_plans: bool,
    runtimes: tuple[str, ...],
    residency: str,
    caches: tuple[str, ...],
    requests: int,
    runs: int,
    out: Path,
    note: str | None,
    **asked: Any,
) -> int:
    """Fresh processes: importing, loading, the first request and the second."""
    for cache in caches:
        check_name("state of the file cache", cache, CACHES)
    choice = choose_bundle(
        *(bundle, variant, checkpoint, precision),
        runtimes=runtimes,
        sizes=[asked["size"]] if asked["size"] else None,
        frames=[asked["num_frames"]] if asked["num_frames"] else None,
    )
    check_request(choice.variant, asked)
    with console.progress() as progress:
        loaded = choice.open(progress)
    chosen = [choose_for(loaded, runtime).name for runtime in runtimes]
    requested = [make_request(loaded, runtime, asked) for runtime in chosen]
    settings = {
        **describe_bundle(loaded),
        **describe_request(requested[0]),
        "runtimes": chosen,
        "residency": residency,
        "caches": caches,
        "requests": requests,
        "runs": runs,
    }
    result = start("startup", settings, note)
    size, frames = requested[0].size, requested[0].num_frames
    given = given_of(asked) | {"size": size, "num_frames": frames}
    with tempfile.TemporaryDirectory() as folder:
        arrays = None
        if images := missing_source(loaded.variant, size, frames, given):
            arrays = Path(folder) / "source.npz"
            np.savez(arrays, **images)
        rows = measure(
            loaded,
            chosen,
            given,
            arrays=arrays,
            load={"residency": residency, "trust_plans": trust_plans},
            caches=caches,
            requests=requests,
            runs=runs,
        )
        return run(console, result, rows, TABLE, out)
