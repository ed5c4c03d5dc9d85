"""Chunks of the VAE: as many as were asked for, of the work that they are said to do."""

import json
import re
import signal
from dataclasses import replace

import pytest
import torch

from tests.bench.commands import ran, refusal
from tests.engines.fake.device import FakeDevice
from tests.small import small_bundle
from wantrt.bench import vae
from wantrt.bench.floor import decode_cost, encode_cost
from wantrt.bench.rates import Rates
from wantrt.bench.vae import Case, chunk_costs, measure, measure_half
from wantrt.bundle import Bundle
from wantrt.errors import BenchError
from wantrt.runtime import loading

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
    for which in ("decoder", "encoder"):
        case = Case("small", "torch", (32, 32), warmup=2, runs=3)
        found, _ = measure_half(case, bundle, which)
        assert {order: len(times) for order, times in found.items()} == {"first": 4, "next": 3}
        assert {time for times in found.values() for time in times} == {1000.0}


class Counting(FakeDevice):
    """Counts what was replayed when it captured last."""

    def capture(self, work):
        self.at_capture = self.replays
        return super().capture(work)


def test_timed_chunks_of_the_decoder_are_replays(bundle, monkeypatch):
    """Also with the least warm-up: both graphs are captured in it, and used once."""
    device = Counting()
    torch_runtime = replace(loading.RUNTIMES["torch"], make_device=lambda: device)
    monkeypatch.setitem(loading.RUNTIMES, "torch", torch_runtime)
    with device:
        measure_half(Case("small", "torch", (32, 32), warmup=1, runs=3), bundle, "decoder")
    assert device.at_capture == 1  # that of the other bank
    assert device.replays == 2 + 3
    assert not device.broken


def test_a_decoder_has_only_its_own_memory(bundle, monkeypatch):
    """Each half is measured in a process of its own."""
    asked = []

    def apart(what, work, *given):
        asked.append(what)
        return work(*given)

    monkeypatch.setattr(vae, "run_apart", apart)
    case = Case("small", "torch", (32, 32), warmup=1, runs=1)
    rows = list(measure([(case, bundle)], {"torch": RATES}))
    assert asked == [f"the {which} of small 32x32 on torch" for which in ("decoder", "encoder")]
    assert rows[0]["peak_bytes"] == rows[1]["peak_bytes"]


def test_a_killed_process_is_told():
    """Not waited for: what kills it is mostly a lack of memory."""
    with pytest.raises(BenchError, match="measured a chunk was killed, probably for its memory"):
        vae.run_apart("a chunk", signal.raise_signal, signal.SIGKILL)


def test_halves_that_are_done_are_kept(bundle, monkeypatch):
    def interrupted(*given):
        raise KeyboardInterrupt

    monkeypatch.setitem(vae.HALVES, "encoder", interrupted)
    rows = []
    with pytest.raises(KeyboardInterrupt):
        case = Case("small", "torch", (32, 32), warmup=1, runs=1)
        for row in measure([(case, bundle)], {"torch": RATES}, apart=False):
            rows.append(row)
    assert [row["chunk"] for row in rows] == list(KINDS[:2])


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
