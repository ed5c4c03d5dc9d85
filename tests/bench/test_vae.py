"""Chunks of the VAE: as many as were asked for, of the work that they are said to do."""

import json
import re

import pytest
import torch

from tests.bench.commands import ran, refusal
from tests.small import small_bundle
from wantrt.bench import vae
from wantrt.bench.floor import decode_cost, encode_cost
from wantrt.bench.rates import Rates
from wantrt.bench.vae import Case, chunk_costs, measure, measure_case
from wantrt.bundle import Bundle

RATES = Rates(matrix=1e10, attention=1e10, copy=1e10)
KINDS = ("decoder first", "decoder next", "encoder first", "encoder next")


@pytest.fixture(scope="module")
def bundle():
    return Bundle.load(small_bundle())


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_rows(bundle, runtime):
    case = Case("small", runtime, (48, 32), warmup=1, runs=3)
    rows = list(measure([(case, bundle)], {runtime: RATES}, apart=False))
    assert [row["chunk"] for row in rows] == list(KINDS)
    for row in rows:
        frames = 4 if row["chunk"].endswith("next") else 1
        assert row["chunk_ms"]["runs"] >= case.runs
        assert row["frame_ms"] * frames == pytest.approx(row["chunk_ms"]["median"])
        assert row["floor_fraction"] == pytest.approx(row["floor_ms"] / row["chunk_ms"]["median"])
        assert row["peak_bytes"] >= 0
    assert [row["precision"] for row in rows] == ["fp32"] * 4


def test_costs_are_those_of_a_video(bundle):
    costs = chunk_costs(bundle, (48, 32))
    for which, of_video in (("decoder", decode_cost), ("encoder", encode_cost)):
        video = of_video(bundle.variant, (48, 32), 9, torch.float32)
        chunks = costs[f"{which} first"] + costs[f"{which} next"] * 2
        assert chunks == video


def test_a_chunk_is_timed_once(bundle, monkeypatch):
    """Its warm-ups are not among the times, and each time is of one chunk."""
    clock = iter(range(10**6))
    monkeypatch.setattr(vae.time, "perf_counter", lambda: float(next(clock)))
    found = measure_case(Case("small", "torch", (32, 32), warmup=2, runs=3), bundle)
    counts = {kind: len(times) for kind, (times, _) in found.items()}
    assert counts == dict.fromkeys(KINDS[::2], 4) | dict.fromkeys(KINDS[1::2], 3)
    assert {time for times, _ in found.values() for time in times} == {1000.0}


@pytest.mark.slow
def test_command(tmp_path, capsys):
    """nano, in a process of its own."""
    assert ran("vae", "--vae", "nano", "--runtime", "onnxruntime", "--out", tmp_path) == 0
    shown = capsys.readouterr().out.splitlines()
    result = json.loads(shown[-1])
    assert [row["chunk"] for row in result["rows"]] == list(KINDS)
    assert result["rows"][1]["peak_bytes"] > 2**20
    assert max(len(line) for line in shown if re.search("[┃│]", line)) <= 100


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--vae wan3", "unknown vae 'wan3'"),
        ("--vae wan2.2 --size 416x240", "416x240 is not a multiple of 32"),
        ("--size 40by40", "not a size"),
        ("--runtime onnxruntime --precision bf16", "does not run"),
        ("--runs 0", "0 is not in the range"),
    ],
)
def test_bad_input(arguments, said, tmp_path, capsys):
    assert said in refusal("vae", arguments, tmp_path, capsys)
