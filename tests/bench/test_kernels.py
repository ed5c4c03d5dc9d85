"""The kernel benchmark without a GPU: all but the times, which are made up here."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.bench.small_cases import small_cases
from wantrt.bench import gpu, kernels
from wantrt.bench.kernel_cases import MODULES, reference
from wantrt.bench.machine import commit
from wantrt.bench.result import load
from wantrt.bench.tables import lines

ROOT = Path(__file__).parents[2]


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    """Works run where they are; a sample takes 2 ms, of a copy 1 ms."""

    def time_in_turn(works, samples):
        for work in works.values():
            work()
        return {name: [1.0 if name == "copy" else 2.0] * samples for name in works}

    for name, replacement in {
        "DEVICE": torch.device("cpu"),
        "require_gpu": lambda _: None,
        "capture": lambda work, pool=None: work,
        "time_in_turn": time_in_turn,
        "copy_bandwidth": lambda: 4e12,
        "matrix_rate": lambda: 8e14,
        "l2_bytes": lambda: 40_000,
        "state": dict,
        "usable": lambda: True,
        "kernel": lambda case: reference(case.op),
        "all_cases": lambda *_: small_cases((torch.bfloat16,)),
    }.items():
        monkeypatch.setattr(kernels, name, replacement)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    for name, value in {
        "empty_cache": None,
        "synchronize": None,
        "graph_pool_handle": None,
        "get_device_name": "a CPU",
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "bench-results"


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["kernels", *arguments])
    kernels.main()
    told = capsys.readouterr()
    return json.loads(told.out.splitlines()[-1]), told


def test_whole_run(on_cpu, monkeypatch, capsys):
    measured, told = run(monkeypatch, capsys, "--samples", "3")
    assert measured == json.loads((on_cpu / "kernels.json").read_text())
    assert len(told.out.splitlines()) == 1  # the table is for people: stderr
    assert lines(load(on_cpu / "kernels.json"), kernels.TABLE)[0][-1] != "FAILED"
    assert [row["name"] for row in measured["rows"]] == [
        case.name for case in small_cases((torch.bfloat16,))
    ]
    assert {row["op"] for row in measured["rows"]} == set(MODULES)
    for row in measured["rows"]:
        assert row["name"] in told.err
        assert row["passed"], row
        assert row["kernel_error_rms"] == row["eager_error_rms"]
        assert row["speedup_over_compiled"] == 1
        assert row["speedup_over_copy"] == 0.5
        us = row["kernel_us"]["median"]
        assert us == pytest.approx(2000 / row["calls_per_sample"], abs=0.01)
        assert row["copy_fraction"] == pytest.approx(
            row["bytes_moved"] / (us * 1e-6) / 4e12, abs=1e-4
        )
    (linear,) = (row for row in measured["rows"] if row["op"] == "linear_gelu")
    assert "matrix_fraction" in linear
    found = kernels.verdict(measured["rows"])
    assert linear["name"] not in found["below_aim"]
    assert len(found["below_aim"]) == len(measured["rows"]) - 1
    assert f"below aim: {found['below_aim'][0]}" in told.err
    assert found["failed"] == found["slower_than_compiled"] == []
    assert measured["partial"] is None
    assert measured["machine"]["rates"] == {"matrix": 8e14, "copy": 4e12}
    assert {"torch"} <= set(measured["machine"]["versions"])
    assert measured["settings"]["samples"] == 3
    assert measured["command"].endswith("--samples 3")


def test_chosen_ops(on_cpu, monkeypatch, capsys):
    measured, _ = run(monkeypatch, capsys, "--ops", "rope,rms_norm")
    assert {row["op"] for row in measured["rows"]} == {"rope", "rms_norm"}


def test_out_of_time(on_cpu, monkeypatch, capsys):
    kernels.main(["--minutes", "0"])
    assert capsys.readouterr().out == ""  # nothing was measured, nothing is written
    assert not on_cpu.exists()


def test_an_interruption_keeps_rows(on_cpu, monkeypatch, capsys):
    answers = iter([True, True])
    monkeypatch.setattr(kernels, "usable", lambda: next(answers))
    with pytest.raises(StopIteration):
        kernels.main([])
    assert len(load(on_cpu / "kernels.json").rows) == 2
    assert json.loads(capsys.readouterr().out)["partial"] == "StopIteration: interrupted"


def test_a_wrong_kernel_fails(on_cpu, monkeypatch, capsys):
    def spoiled(case):
        run = reference(case.op)
        return (lambda *a: run(*a) * 1.01) if case.op == "rope" else run

    monkeypatch.setattr(kernels, "kernel", spoiled)
    monkeypatch.setattr(sys, "argv", ["kernels", "--ops", "rope,rms_norm"])
    with pytest.raises(SystemExit) as leaving:
        kernels.main()
    assert leaving.value.code == 1
    failed = kernels.verdict(json.loads(capsys.readouterr().out)["rows"])["failed"]
    assert [name.split(",")[0] for name in failed] == ["rope"]


def test_a_compiler_that_fails_is_said_and_the_rest_measured(on_cpu, monkeypatch, capsys):
    def refuse(run, **_):
        def compiled(*_):
            raise RuntimeError("no compiler here\nlong trace")

        return compiled

    monkeypatch.setattr(torch, "compile", refuse)
    measured, told = run(monkeypatch, capsys, "--ops", "rope")
    (row,) = measured["rows"]
    assert row["compiled_problem"] == "RuntimeError: no compiler here"
    assert row["passed"]
    assert "speedup_over_compiled" not in row
    assert "speedup_over_eager" in row
    assert "no compiler here" in told.err


def test_a_kernel_that_fails_is_a_failed_row(on_cpu, monkeypatch, capsys):
    def missing(case):
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(kernels, "kernel", missing)
    monkeypatch.setattr(sys, "argv", ["kernels", "--ops", "rope"])
    with pytest.raises(SystemExit):
        kernels.main()
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert "triton" in row["problem"]


def test_a_fault_of_the_device_ends_the_run_but_is_written(on_cpu, monkeypatch, capsys):
    answers = iter([True, False, False])
    monkeypatch.setattr(kernels, "usable", lambda: next(answers))
    measured, _ = run(monkeypatch, capsys)
    assert len(measured["rows"]) == 1
    assert measured["partial"].count(";") == len(small_cases((torch.bfloat16,))) - 2
    assert "rates_at_the_end" not in measured["machine"]


def test_a_contender_that_cannot_be_captured(on_cpu, monkeypatch, capsys):
    seen = []

    def capture(work, pool=None):
        seen.append(work)
        if len(seen) == 2:  # kernel, eager
            raise RuntimeError("operation not permitted when stream is capturing")
        return work

    monkeypatch.setattr(kernels, "capture", capture)
    measured, _ = run(monkeypatch, capsys, "--ops", "rms_norm")
    (row,) = measured["rows"]
    assert "capturing" in row["eager_problem"]
    assert row["passed"]


def test_nan_fails_and_is_null_in_json(on_cpu, monkeypatch, capsys):
    monkeypatch.setattr(
        kernels, "kernel", lambda case: lambda *a: reference(case.op)(*a) * math.nan
    )
    monkeypatch.setattr(sys, "argv", ["kernels", "--ops", "rope"])
    with pytest.raises(SystemExit):
        kernels.main()
    line = capsys.readouterr().out
    assert "NaN" not in line
    assert json.loads(line)["rows"][0]["kernel_error_rms"] is None


def test_rotation_takes_sets_in_turn_and_holds_one_result_a_set():
    called, alive, most = [], set(), 0

    class Result:
        def __init__(self):
            nonlocal most
            alive.add(id(self))
            most = max(most, len(alive))

        def __del__(self):
            alive.discard(id(self))

    def work(number):
        called.append(number)
        return Result()

    kernels.rotation(work, [(0,), (1,), (2,)], 7)()
    assert called == [0, 1, 2, 0, 1, 2, 0]
    assert most == 3
    assert not alive


@pytest.mark.parametrize(
    "bytes_moved, expected", [(1, 200), (100, 2), (99, 3), (10_000, 2)], ids=str
)
def test_sets_exceed_the_cache(bytes_moved, expected):
    assert kernels.num_sets(bytes_moved, 50) == expected


def test_calls_fill_a_sample():
    assert kernels.num_calls(3, 0.1) == 30
    assert kernels.num_calls(2, 5.0) == 2
    assert kernels.num_calls(2, 0.0) == kernels.MOST_CALLS


def test_errors_are_of_the_worst_output():
    expected = (torch.tensor([1.0, -4.0]), torch.tensor([2.0, 0.0]))
    actual = (torch.tensor([1.0, -4.0]), torch.tensor([2.0, 0.5]))
    assert gpu.compare(actual, expected) == {"max": 0.25, "rms": 0.25}
    broken = (torch.tensor([1.0, math.nan]), expected[1])
    assert math.isnan(gpu.compare(broken, expected)["rms"])
    assert math.isnan(gpu.compare((expected[0], torch.full((2,), math.nan)), expected)["max"])


def test_commit_is_that_of_the_checkout(monkeypatch):
    found = commit()
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    if head.returncode == 0:
        assert found.rstrip("+") == head.stdout[:12]
    monkeypatch.setenv("PATH", "")
    assert commit() is None


def test_state_of_the_gpu():
    found = gpu.parse_state("570.86.15, 1980, 1980, 3201, 41, 117.45, 700.00\n")
    assert found["driver_version"] == "570.86.15"
    assert found["clocks_sm_mhz"] == 1980
    assert found["power_draw_w"] == 117.45
    assert (
        gpu.parse_state("570.86.15, 1980, 1980, [N/A], 41, 117.45, 700.00")["clocks_mem_mhz"]
        is None
    )
    assert gpu.parse_state("No devices were found") == {}


@pytest.mark.parametrize(
    "option",
    [
        ["--ops", "ropes"],
        ["--dtypes", "int8"],
        ["--tokens", "x"],
        ["--tokens", "0"],
        ["--channels", "1000"],
        ["--samples", "0"],
    ],
    ids=" ".join,
)
def test_refuses_options(option, capsys):
    with pytest.raises(SystemExit) as leaving:
        kernels.parse(option)
    assert leaving.value.code == 2
    assert option[1] in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("benchmark", ["kernels", "block"])
def test_says_that_it_needs_a_gpu(benchmark):
    result = subprocess.run(
        [sys.executable, "-m", f"wantrt.bench.{benchmark}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 1
    assert result.stdout == ""
    assert f"wantrt.bench.{benchmark} measures a CUDA GPU" in result.stderr
    assert "Traceback" not in result.stderr
