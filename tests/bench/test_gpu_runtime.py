"""The rows of steps and chunks without a GPU; the times and results are made up."""

import json
import sys

import pytest
import torch

from wantrt.bench import gpu_runtime
from wantrt.bench.result import load


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    def time_steps(*given, streamed):
        device = given[-1]
        wrong = streamed and isinstance(device, gpu_runtime.CUDADevice)
        return [4.0, 2.0, 3.0], torch.ones(2) * (2 if wrong else 1)

    monkeypatch.setattr(gpu_runtime, "CUDADevice", type("CUDADevice", (), {}))
    monkeypatch.setattr(gpu_runtime, "Eager", type("Eager", (), {}))
    monkeypatch.setattr(gpu_runtime, "time_steps", time_steps)
    monkeypatch.setattr(gpu_runtime, "time_chunks", lambda *_: ([1.0, 1.0], torch.ones(3)))
    monkeypatch.setattr(gpu_runtime, "require_gpu", lambda _: None)
    for name in ("reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**31)
    return tmp_path


def run(monkeypatch, folder, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu_runtime", "--out", str(folder), *arguments])
    gpu_runtime.main()


def test_rows(on_cpu, monkeypatch, capsys):
    run(monkeypatch, on_cpu, "--only", "nano")
    result = load(on_cpu / "gpu_runtime.json")
    told = capsys.readouterr()
    assert json.loads(told.out) == json.loads((on_cpu / "gpu_runtime.json").read_text())
    rows = {row["name"]: row for row in result.rows}
    assert list(rows) == [
        *("nano: step eager", "nano: chunk eager", "nano: step captured", "nano: chunk captured"),
        "nano: step streamed",
    ]
    assert rows["nano: step eager"]["step_ms"]["median"] == 3
    assert rows["nano: step eager"]["tokens"] == 112
    assert rows["nano: step captured"]["same_bits_as_eager"] is True
    assert rows["nano: step streamed"]["same_bits_as_eager"] is False
    assert "OTHER" in told.err


def test_an_interruption_keeps_rows(on_cpu, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(gpu_runtime, "time_chunks", stop)
    with pytest.raises(KeyboardInterrupt):
        run(monkeypatch, on_cpu)
    result = load(on_cpu / "gpu_runtime.json")
    assert [row["name"] for row in result.rows] == ["nano: step eager"]
    assert result.partial == "KeyboardInterrupt: interrupted"
