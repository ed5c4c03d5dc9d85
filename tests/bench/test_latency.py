"""One video after another: stages that add up, memory and energy, what an interruption leaves."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.bench.commands import ran, refusal
from tests.small import SMALL_SETTINGS, small_bundle, small_checkpoint
from wantrt import Pipeline
from wantrt.bench import latency, memory
from wantrt.bench.bundles import DrawnBundle, choose_bundle
from wantrt.bench.floor import decode_cost
from wantrt.bench.memory import Peaks, status_bytes
from wantrt.bench.nvml import NVML
from wantrt.bench.rates import Rates
from wantrt.bench.request import check_request, denoise_costs, floor_row, make_request, serve
from wantrt.build import plan_build
from wantrt.bundle import Bundle
from wantrt.config import VARIANTS
from wantrt.errors import SettingsError

RATES = Rates(matrix=1e11, attention=5e10, copy=1e10)
ASKED = {
    "prompt": "a red circle moves right",
    "size": (32, 32),
    "num_frames": 9,
    "num_inference_steps": 3,
    "seed": 1,
}


@pytest.fixture(scope="module")
def pipe():
    with Pipeline.load(small_bundle(), "torch") as pipe:
        yield pipe


@pytest.fixture
def known_rates(monkeypatch):
    """Measuring them takes longer than everything else."""
    monkeypatch.setattr(latency, "measure_rates", lambda device, dtype: RATES)


def bench(tmp_path, *arguments, runtime="torch"):
    """Exit code and result of the command, with small settings."""
    out = tmp_path / "results"
    given = ("--bundle", small_bundle(), "--runtime", runtime, *SMALL_SETTINGS)
    code = ran("latency", *given, "--out", out, *arguments)
    return code, json.loads((out / "latency.json").read_text())


# -- One request ----------------------------------------------------------------------------------


def test_stages_and_steps_add_up(pipe):
    served = serve(pipe, make_request(pipe.bundle, "torch", ASKED))
    seconds = served.seconds
    stages = seconds["text_s"] + seconds["denoise_s"] + seconds["vae_decode_s"]
    assert 0.8 * seconds["e2e_s"] < stages <= seconds["e2e_s"]
    assert len(served.step_ms) == 3
    assert sum(served.step_ms) == pytest.approx(seconds["denoise_s"] * 1e3, rel=0.2)
    before = seconds["text_s"] + seconds["denoise_s"]
    assert before < seconds["first_frame_s"] < seconds["e2e_s"]


def test_a_timed_request_gives_the_same_video(pipe):
    settings = make_request(pipe.bundle, "torch", ASKED)
    looks = []
    served = serve(pipe, settings, lambda: looks.append(1))
    assert np.array_equal(np.concatenate(served.chunks), pipe(settings).frames)
    assert len(looks) >= 3 + 3  # steps and chunks


def test_a_prompt_is_paid_for_each_time(pipe, monkeypatch):
    calls = []
    run = pipe.text_encoder._run
    monkeypatch.setattr(
        pipe.text_encoder, "_run", lambda *given: calls.append(given[0]) or run(*given)
    )
    settings = make_request(pipe.bundle, "torch", ASKED)
    for _ in range(2):
        serve(pipe, settings)
    assert calls == [[settings.prompt, settings.negative_prompt]] * 2


def test_a_step_is_over_when_the_device_says_so(pipe, monkeypatch):
    waits = []
    monkeypatch.setattr(pipe.device, "synchronize", lambda: waits.append(1), raising=False)
    settings = make_request(pipe.bundle, "torch", ASKED)
    pipe(settings)
    without = len(waits)
    serve(pipe, settings)
    assert len(waits) - without == without + settings.num_inference_steps


def test_a_task_that_needs_a_source_gets_noise():
    i2v, t2v = VARIANTS["i2v-14b-480p"], VARIANTS["t2v-1.3b"]
    check_request(i2v, {"prompt": "x", "image": None, "reference_images": ()})
    with pytest.raises(SettingsError, match="takes no --image"):
        check_request(t2v, {"prompt": "x", "image": "cat.png"})
    with pytest.raises(SettingsError, match="not a multiple of 16"):
        check_request(i2v, {"prompt": "x", "size": (833, 480)})


@pytest.mark.parametrize("variant", ["nano-i2v", "vace-1.3b", "ti2v-5b"])
def test_every_source_is_measured(variant, tmp_path):
    """TI2V starts from its prompt alone, as it is measured elsewhere."""
    small = (
        "random:0:dim=48,ffn_dim=80,num_heads=2,num_layers=2,vae.encoder_dim=8,vae.decoder_dim=8,"
        "text_encoder.dim=32,text_encoder.attention_dim=64,text_encoder.ffn_dim=40,"
        "text_encoder.num_layers=1,text_encoder.vocab_size=100,text_encoder.num_heads=4"
    )
    bundle = plan_build(small, variant, out=tmp_path / "bundle", runtime="torch").run()
    with Pipeline.load(bundle, "torch") as pipe:
        asked = ASKED | {"size": (64, 64), "num_frames": 5, "num_inference_steps": 1}
        served = serve(pipe, make_request(bundle, "torch", asked))
    assert ("image_encode_s" in served.seconds) == (variant != "ti2v-5b")
    assert sum(len(chunk) for chunk in served.chunks) == 5


def test_floors_are_those_of_the_modules(pipe):
    bundle, settings = pipe.bundle, make_request(pipe.bundle, "torch", ASKED)
    steps = denoise_costs(bundle, settings)
    assert len(steps) == 3
    measured = {f"{name}_s": {"median": 2.0} for name in ("denoise", "vae_decode", "e2e")}
    row = floor_row(bundle, settings, RATES, measured)
    decode_s = decode_cost(bundle.variant, (32, 32), 9, torch.float32).seconds(RATES)
    assert row["denoise_floor_s"] == pytest.approx(3 * steps[0].seconds(RATES))
    assert row["vae_decode_floor_s"] == pytest.approx(decode_s)
    assert row["e2e_floor_s"] == pytest.approx(row["denoise_floor_s"] + decode_s)
    assert row["e2e_floor_fraction"] == pytest.approx(row["e2e_floor_s"] / 2)
    assert row["step_floor_ms"] == pytest.approx(steps[0].seconds(RATES) * 1e3)


# -- The bundle -----------------------------------------------------------------------------------


def test_drawn_weights_are_what_is_written_but_for_their_numbers(tmp_path):
    built = Bundle.load(small_bundle())
    plan = plan_build(str(small_checkpoint()), out=tmp_path / "b", with_weights=False)
    empty = plan.run()
    drawn = DrawnBundle(empty.path, empty.manifest, empty.fingerprint, torch.device("cpu"))
    for part in built.precision:
        expected = {name: (t.shape, t.dtype) for name, t in built.weights(part).items()}
        assert {name: (t.shape, t.dtype) for name, t in drawn.weights(part).items()} == expected
    with Pipeline.load(drawn, "torch") as pipe:
        first = pipe(make_request(drawn, "torch", ASKED)).frames
    with Pipeline.load(drawn, "torch") as pipe:
        assert np.array_equal(first, pipe(make_request(drawn, "torch", ASKED)).frames)


def test_a_variant_is_built_once_into_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    asked = (None, "nano", "random:0:num_layers=1,text_encoder.num_layers=1", None)
    choice = choose_bundle(*asked, runtimes=["torch"])
    assert not list(tmp_path.iterdir())
    first = choice.open(lambda *told: None)
    assert first.path.is_relative_to(tmp_path / "wantrt" / "bundles")
    made = {path: path.stat().st_mtime_ns for path in first.path.rglob("*.safetensors")}
    again = choose_bundle(*asked, runtimes=["torch"]).open(lambda *told: None)
    assert again.fingerprint == first.fingerprint
    assert made == {path: path.stat().st_mtime_ns for path in again.path.rglob("*.safetensors")}


# -- Memory and energy ----------------------------------------------------------------------------


def test_the_peak_is_seen_and_begins_anew():
    peaks = Peaks(torch.device("cpu"))
    before = status_bytes("VmRSS")
    held = np.ones(2**26 // 8)
    del held
    assert peaks.row()["peak_rss_bytes"] >= before + 2**26 - 2**22
    peaks.reset()
    assert peaks.row()["peak_rss_bytes"] < status_bytes("VmRSS") + 2**25


class FakeNVML:
    """pynvml with one GPU, whose memory grows and energy falls due a joule a call."""

    class NVMLError(Exception):
        pass

    def __init__(self, hidden: bool) -> None:
        self.hidden, self.used, self.joules = hidden, 2**30, 0.0

    def nvmlInit(self):
        pass

    def nvmlDeviceGetHandleByUUID(self, uuid):
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        import os

        own = [] if self.hidden else [SimpleNamespace(pid=os.getpid(), usedGpuMemory=self.used)]
        return [SimpleNamespace(pid=1, usedGpuMemory=7), *own]

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=self.used + 500)

    def nvmlDeviceGetTotalEnergyConsumption(self, handle):
        self.joules += 1
        return self.joules * 1e3


@pytest.mark.parametrize("hidden", [False, True])
def test_memory_and_energy_of_a_gpu(hidden, pipe, monkeypatch):
    fake = FakeNVML(hidden)
    monkeypatch.setitem(sys.modules, "pynvml", fake)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="1234")
    )
    assert NVML.find(torch.device("cpu")) is None
    counters = NVML.find(torch.device("cuda"))
    monkeypatch.setattr(memory.NVML, "find", lambda device: counters)
    peaks = Peaks(torch.device("cpu"))
    fake.used = 3 * 2**30
    peaks.look()
    fake.used = 2**30
    key = "peak_gpu_device_bytes" if hidden else "peak_gpu_bytes"
    other = {"peak_gpu_device_bytes", "peak_gpu_bytes"} - {key}
    assert peaks.row()[key] == 3 * 2**30 + 500 * hidden
    assert not other & peaks.row().keys()
    settings = make_request(pipe.bundle, "torch", ASKED | {"num_frames": 1})
    (row,) = latency.measure(pipe.bundle, {"torch": settings}, {"torch": RATES}, warmup=1, runs=2)
    assert row["energy_j"]["median"] == 1.0  # of each run: from one call to the next


def test_without_the_package_there_is_no_energy(pipe, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert NVML.find(torch.device("cuda")) is None
    settings = make_request(pipe.bundle, "torch", ASKED | {"num_frames": 1})
    (row,) = latency.measure(pipe.bundle, {"torch": settings}, {"torch": RATES}, warmup=1, runs=1)
    assert "energy_j" not in row
    assert not any("gpu" in key for key in row)


# -- The command ----------------------------------------------------------------------------------


def test_the_command(tmp_path, known_rates, capsys):
    code, result = bench(tmp_path, "--runs", 2, "--warmup", 1, runtime="torch,onnxruntime")
    assert code == 0
    assert result["partial"] is None
    told = capsys.readouterr().out
    assert json.loads(told.splitlines()[-1]) == result
    assert max(map(len, told.splitlines()[:-1])) > 80
    assert all(len(line) <= 100 for line in told.splitlines() if "│" in line)
    assert [row["runtime"] for row in result["rows"]] == ["torch", "onnxruntime"]
    assert result["machine"]["rates"]["matrix"] == RATES.matrix
    assert str(tmp_path) not in json.dumps(result["settings"])
    for row in result["rows"]:
        assert row["step_ms"]["runs"] == 2 * 2
        assert row["e2e_s"]["runs"] == row["video_encode_s"]["runs"] == 2
        assert row["e2e_s"]["min"] <= row["e2e_s"]["median"] <= row["e2e_s"]["p99"]
        assert row["cold_e2e_s"] > 0
        assert row["peak_rss_bytes"] > 2**26


def test_what_was_measured_before_an_interruption_is_kept(tmp_path, known_rates, monkeypatch):
    calls = []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return serve(*given)

    monkeypatch.setattr(latency, "serve", interrupted)
    code, result = bench(tmp_path, "--runs", 5, "--warmup", 1)
    assert code == 130
    assert result["partial"] == "KeyboardInterrupt: interrupted"
    assert result["rows"][0]["e2e_s"]["runs"] == 2


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--variant nanoo", "did you mean nano"),
        ("--bundle /nowhere", "is not a bundle"),
        ("--variant 1.3B --checkpoint random:0 --size 833x480", "nearest: 832x480"),
        ("--frames 6", "6 frames is not 4n + 1"),
        ("--runtime tensorflow", "unknown runtime 'tensorflow'"),
        ("--image cat.png", "takes no --image"),
        ("--variant nano --checkpoint random:x", "is no generated checkpoint"),
    ],
)
def test_bad_input_is_refused_before_anything_is_built(
    arguments, said, tmp_path, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert said in refusal("latency", arguments, tmp_path, capsys)
    assert not (tmp_path / "cache" / "wantrt" / "bundles").exists()


def test_a_bundle_is_not_built_again(tmp_path, capsys):
    arguments = f"--bundle {small_bundle()} --variant nano"
    assert "leave out --variant" in refusal("latency", arguments, tmp_path, capsys)
