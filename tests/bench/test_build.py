"""Measured builds: what each round makes, what is refused first, what an interruption leaves."""

import json
import shutil
import sys
import time
from pathlib import Path

import pytest

from tests.test_build import TINY
from wantrt.bench import build as bench_build
from wantrt.bench.build import (
    ALL,
    BuildRun,
    Case,
    change_a_weight,
    children,
    copy_checkpoint,
    make_cases,
    measure,
    rows_of,
)
from wantrt.bench.result import load
from wantrt.cli import main
from wantrt.config import SHIPPED, VARIANTS
from wantrt.errors import BenchError
from wantrt.manifest import FileRecord
from wantrt.pieces import Built

SMALL = Case(variant="t2v-1.3b", checkpoint=f"random:0{TINY}", runtime="onnxruntime", jobs=1)


@pytest.fixture
def bench(monkeypatch, capsys, tmp_path):
    def run(*arguments):
        out = ["--out", str(tmp_path / "results")]
        monkeypatch.setattr(sys, "argv", ["wantrt", "bench", "build", *arguments, *out])
        with pytest.raises(SystemExit) as exited:
            main()
        return exited.value.code, *capsys.readouterr()

    return run


def by_round(rows):
    return {row["what"]: row for row in rows if "what" in row}


@pytest.mark.slow
def test_rounds_of_a_build(tmp_path):
    rows = list(measure({"small": SMALL}, tmp_path, changed=True))
    rounds = by_round(rows)
    assert list(rounds) == ["first", "again", "changed"]
    first, again, changed = rounds.values()
    assert first["pieces"] > again["pieces"] == 0
    assert changed["pieces"] == first["pieces"]  # in a folder of its own
    assert first["bytes"] == again["bytes"] == changed["bytes"]
    assert again["build_s"] < first["build_s"]
    assert first["weights_s"] + first["graphs_s"] + first["plans_s"] < first["build_s"]
    assert first["weights_bytes"] + first["graphs_bytes"] <= first["bytes"]
    assert first["peak_rss_bytes"] > first["peak_anonymous_bytes"] > 2**24
    parts = [row for row in rows if row["name"].startswith("small: first: ")]
    assert {row["part"] for row in parts} == {"text_encoder", "transformer", "vae", "all"}
    assert sum(row["pieces"] for row in parts) == first["pieces"] - 1  # the tokenizer
    assert sum(row["bytes"] for row in parts if row["kind"] == "weights") == first["weights_bytes"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_plans_are_compiled_and_accounted_for(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    given = {**vars(SMALL), "runtime": "tensorrt-rtx", "targets": ("sm89",), "with_weights": False}
    given |= {"sizes": ((32, 32),), "frames": (5,), "weights": "bound"}
    first, *rows = measure({"bound": Case(**given)}, tmp_path, changed=False)
    plans = {row["part"]: row for row in rows if row.get("kind") == "plan"}
    assert {"dit_stack", "vae_decoder_next", "text_stack"} <= plans.keys()
    assert sum(row["bytes"] for row in plans.values()) == first["plans_bytes"] > 0
    for row in plans.values():
        assert 0 < row["longest_s"] <= row["build_s"] < first["build_s"]
        assert 10 * 2**20 < row["peak_rss_bytes"] < first["peak_rss_bytes"]
    assert by_round(rows)["again"]["pieces"] == 0


def made(seconds: float, size: int) -> Built:
    files = {f"f{seconds}": FileRecord(size=size, sha256="0" * 64)}
    return Built(key="", seconds=seconds, files=files, mtimes=dict.fromkeys(files, 0))


def test_pieces_are_added_up():
    pieces = {
        "weights vae": made(2.0, 50),
        "graph dit_stack": made(9.0, 1),
        "graph dit_head": made(1.0, 1),
        "plan dit_stack 832x480x81": made(1.25, 4_000),
        "plan vae_decoder_next 832x480": made(3.0, 10_000),
        "plan dit_stack 480x832x81": made(0.5, 2_000),
    }
    everything = {**pieces, "weights transformer": made(5.0, 700)}  # made by an earlier build
    peaks = {"peak_rss_bytes": 3, "peak_anonymous_bytes": 2}
    ran = BuildRun(20.0, peaks, [300, 900, 400], 99_999, everything, pieces)
    row, *parts = rows_of("x", SMALL, "first", ran)
    assert (row["weights_s"], row["graphs_s"], row["plans_s"]) == (2, 10, 4.75)
    assert (row["weights_bytes"], row["plans_bytes"]) == (750, 16_000)
    assert (row["peak_rss_bytes"], row["pieces"]) == (3, 6)
    found = {(part["kind"], part["part"]): part for part in parts}
    assert found["plan", "dit_stack"] == {
        "name": "x: first: plan dit_stack",
        "kind": "plan",
        "part": "dit_stack",
        "pieces": 2,
        "build_s": 1.75,
        "longest_s": 1.25,
        "bytes": 6_000,
        "peak_rss_bytes": 400,
    }
    assert found["graph", "all"]["build_s"] == 10
    assert "peak_rss_bytes" not in found["weights", "vae"]
    unseen = BuildRun(20.0, peaks, [300], 99_999, everything, pieces)  # a process was too quick
    assert all("peak_rss_bytes" not in part for part in list(rows_of("x", SMALL, "", unseen))[1:])


def test_one_number_changes_in_a_copy(tmp_path):
    copy_checkpoint(Case(variant="nano"), tmp_path / "copy")
    stored = {p.relative_to(SHIPPED["nano"]): p for p in SHIPPED["nano"].rglob("*") if p.is_file()}
    before = {name: path.read_bytes() for name, path in stored.items()}
    change_a_weight(tmp_path / "copy")
    after = {name: (tmp_path / "copy" / name).read_bytes() for name in stored}
    assert {name: path.read_bytes() for name, path in stored.items()} == before
    (changed,) = [name for name in stored if after[name] != before[name]]
    assert changed.suffix == ".safetensors"
    different = [a ^ b for a, b in zip(after[changed], before[changed], strict=True) if a != b]
    assert different == [0x80]


def test_cases_of_all_released_variants():
    cases = make_cases(ALL, ("bound", "baked"), [None], True, {"checkpoint": "random:0"})
    assert set(ALL) == set(VARIANTS) - {*SHIPPED, "s2v-14b", "animate-14b"}
    assert len(cases) == 2 * len(ALL)
    assert cases["ti2v-5b baked"].sizes == ((1280, 704), (704, 1280))
    arguments = cases["vace-1.3b bound"].arguments(Path("x"))
    assert arguments[arguments.index("--size") + 1] == "832x480,480x832"
    assert arguments[arguments.index("--weights") + 1] == "bound"
    assert "--jobs" not in arguments


def test_each_number_of_jobs_is_a_case():
    cases = make_cases(["nano"], (), [1, 2], False, {})
    assert {name: case.jobs for name, case in cases.items()} == {"nano jobs 1": 1, "nano jobs 2": 2}
    arguments = cases["nano jobs 2"].arguments(Path("x"))
    assert arguments[arguments.index("--jobs") + 1] == "2"


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--variant", "3B"], "unknown variant"),
        (["--jobs", "0"], "0 is not in the range x>=1"),
        (["--variant", "nano,1.3B", "--checkpoint", "random:0", "--runtime", "tpu"], "tpu"),
        (["--size", "64x64", "--runtime", "onnxruntime"], "for TensorRT plans alone"),
        (["--size", "64x64", "--all-sizes"], "take one of them"),
        (["--scratch", "/nowhere"], "/nowhere is no folder"),
        (["--checkpoint", "/nowhere"], "/nowhere"),
    ],
)
def test_bad_input_is_refused_before_any_build(bench, monkeypatch, tmp_path, arguments, said):
    monkeypatch.setattr(bench_build, "build", lambda *_: pytest.fail("a build was begun"))
    code, stdout, stderr = bench(*arguments)
    assert (code, stdout) == (2, "")
    assert said in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "results").exists()


def test_a_full_disk_is_refused_before_any_build(bench, monkeypatch):
    monkeypatch.setattr(bench_build, "build", lambda *_: pytest.fail("a build was begun"))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 10**7))
    code, _, stderr = bench()
    assert code == 2
    assert "take --no-weights, --no-changed or another --scratch" in stderr


def test_an_interruption_keeps_what_was_measured(bench, monkeypatch, tmp_path):
    peaks = {"peak_rss_bytes": 3, "peak_anonymous_bytes": 2}
    runs = iter([BuildRun(1.0, peaks, [], 9, {}, {})])

    def interrupted(*_):
        for run in runs:
            return run
        raise KeyboardInterrupt

    monkeypatch.setattr(bench_build, "build", interrupted)
    code, stdout, stderr = bench("--note", "a test")
    assert code == 130
    assert "interrupted" in stderr
    result = load(tmp_path / "results" / "build.json")
    assert [row["what"] for row in result.rows] == ["first"]
    assert result.partial == "KeyboardInterrupt: interrupted"
    assert json.loads(stdout.splitlines()[-1])["note"] == "a test"


def test_a_failing_build_says_why(tmp_path):
    occupied = tmp_path / "out"
    occupied.mkdir()
    (occupied / "letter.txt").write_text("")
    with pytest.raises(BenchError, match=r"wantrt build failed: .*out"):
        bench_build.build(SMALL, occupied, tmp_path / "cache")


def test_memory_is_that_of_all_descendants():
    import subprocess

    code = "x = bytearray(200 * 2**20); import time; time.sleep({seconds})"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {code!r}])"
    child = child.replace("{seconds}", "1.5")
    begun = time.perf_counter()
    with subprocess.Popen([sys.executable, "-c", child]) as process:
        peaks, _ = bench_build.watch(process)
    assert time.perf_counter() - begun > 1.5
    assert peaks["peak_anonymous_bytes"] > 200 * 2**20
    assert children(2**22 + 1) == []
