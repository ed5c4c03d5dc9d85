"""One bundle beside another: rounding is told from noise, and what is unequal is refused."""

import json
import math
from contextlib import nullcontext

import pytest
from torch.nn.attention import SDPBackend

from tests.bench.commands import ran, refusal
from tests.small import small_bundle
from wantrt.bench import quality
from wantrt.bench.quality import another_attention, measure, read_jobs, resolve_all, summary
from wantrt.bundle import Bundle
from wantrt.errors import BenchError
from wantrt.kernels.ops import ATTENTIONS
from wantrt.nano.scenes import load_held_out
from wantrt.runtime.pipeline import Pipeline
from wantrt.runtime.sizes import resolve_for

ASKED = {"size": (32, 32), "num_frames": 5, "num_inference_steps": 2}
JOBS = [{"prompt": "a red circle moves right", "seed": seed} for seed in (0, 1)]


@pytest.fixture(scope="module")
def fp32():
    return Bundle.load(small_bundle("fp32"))


@pytest.fixture(scope="module")
def bf16():
    return Bundle.load(small_bundle("bf16"))


def rows_by_name(*arguments):
    return {row["name"]: row for row in rows_of(*arguments)}


def rows_of(*bundles):
    return measure(*bundles, JOBS, resolve_all(*bundles, JOBS, ASKED))


def test_a_precision_is_told_from_noise(fp32, bf16):
    rows = rows_by_name(bf16, "torch", fp32, "torch")
    assert len(rows) == 2 * len(JOBS) + 2
    total, noise = rows["all"], rows["all, noise floor"]
    assert total["psnr_db"]["max"] < noise["psnr_db"]["min"] - 20
    assert total["ssim"]["max"] < noise["ssim"]["min"]
    assert total["latents_difference"]["min"] > 100 * noise["latents_difference"]["max"]
    assert 0 < noise["latents_difference"]["min"] < 1e-5  # another attention ran, an exact one
    assert total["psnr_db"]["median"] == pytest.approx(
        sum(rows[f"{JOBS[0]['prompt']}, seed {seed}"]["psnr_db"] for seed in (0, 1)) / 2, abs=1e-6
    )


def test_a_bundle_is_equal_to_itself(fp32):
    rows = rows_by_name(fp32, "torch", fp32, "torch")
    assert rows["all"]["equal"] == len(JOBS)
    assert rows["all"]["ssim"]["min"] == pytest.approx(1)
    assert "psnr_db" not in rows["all"]  # there is none


def test_a_runtime_lies_within_the_noise(fp32):
    total = rows_by_name(fp32, "onnxruntime", fp32, "torch")["all"]
    assert total.get("psnr_db", {"min": math.inf})["min"] > 60
    assert total["latents_difference"]["max"] < 1e-5


def test_equal_bits_are_no_noise(fp32, monkeypatch):
    """Where there is no other attention, as in float32 on some machines."""
    monkeypatch.setattr(quality, "another_attention", lambda precision: nullcontext())
    rows = rows_by_name(fp32, "torch", fp32, "torch")
    for name in (f"{JOBS[0]['prompt']}, seed 0, noise floor", "all, noise floor"):
        assert "psnr_db" not in rows[name]
        assert rows[name]["says"].startswith("the same bits")
    assert rows["all, noise floor"]["equal"] == len(JOBS)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_another_attention_is_not_the_first_that_serves(precision):
    """Of those that the kernels' attention may take, also of what is left for a bias."""
    before = ATTENTIONS[:]
    small = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]  # these serve 16 bits alone
    serving = [b for b in before if precision != "fp32" or b not in small]
    with another_attention(precision):
        assert serving[0] not in ATTENTIONS
        assert SDPBackend.FLASH_ATTENTION not in ATTENTIONS  # what torch itself prefers
        assert ATTENTIONS[1:]
    assert before == ATTENTIONS


def test_one_pipeline_at_a_time(fp32, monkeypatch):
    """And each with the residency that was asked for."""
    load, loaded, residencies = Pipeline.load, [], []

    def remember(bundle, runtime, *, residency):
        assert all(pipe._closed for pipe in loaded)
        loaded.append(load(bundle, runtime, residency=residency))
        residencies.append(residency)
        return loaded[-1]

    monkeypatch.setattr(Pipeline, "load", remember)
    bundles = (fp32, "torch", fp32, "torch")
    list(measure(*bundles, JOBS, resolve_all(*bundles, JOBS, ASKED), residency="phase"))
    assert residencies == ["phase"] * 3
    assert loaded[-1]._closed


def test_an_interruption_is_summed_up(fp32, monkeypatch):
    made = quality.make
    left = iter(range(3 + 2))  # all of the reference, with its warm-up, and a first one beside it

    def make(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return made(*arguments)

    monkeypatch.setattr(quality, "make", make)
    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in rows_of(fp32, "torch", fp32, "torch"):
            rows.append(row)
    assert [row["name"] for row in rows] == [f"{JOBS[0]['prompt']}, seed 0", "all"]
    assert rows[1]["ssim"]["runs"] == 1


def test_jobs(tmp_path):
    captions = read_jobs(None, 2, (5, 6), captions=True)
    assert [job["seed"] for job in captions] == [5, 6, 5, 6]
    assert captions[2]["prompt"] == load_held_out()[1]["prompt"]
    assert captions[2]["colour"] == load_held_out()[1]["colour"]
    file = tmp_path / "prompts.txt"
    file.write_text("one\ntwo\nthree\n")
    assert read_jobs(file, 2, (0,), captions=True) == [
        {"prompt": "one", "seed": 0},
        {"prompt": "two", "seed": 0},
    ]


def test_the_judge_counts():
    rows = [
        {"noise_floor": False, "psnr_db": 40.0, "ssim": 1.0, "latents_difference": 0.0}
        | {"e2e_s": 1.0, "speedup": 2.0, "right": right, "reference_right": True}
        for right in (True, False)
    ]
    (total,) = summary(rows)
    assert (total["right"], total["reference_right"]) == (0.5, 1.0)


def test_recorded_settings_must_agree(fp32):
    settings = [
        resolve_for(fp32, "torch", prompt="x", seed=0, flow_shift=shift, **ASKED)
        for shift in (3.0, 4.0)
    ]
    with pytest.raises(BenchError, match=r"flow_shift is 3\.0 in the bundle and 4\.0 in the ref"):
        quality.refuse_unequal(*settings)


@pytest.mark.slow
def test_command(tmp_path, capsys):
    """nano by ONNX Runtime, against itself by torch."""
    asked = "--runtime onnxruntime --count 1 --seeds 0 --steps 2 --frames 5"
    assert ran("quality", *asked.split(), "--out", tmp_path) == 0
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [row["noise_floor"] for row in result["rows"]] == [False, True] * 2
    assert {row["right"] for row in result["rows"][:2]} <= {True, False}


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--bundle {small}", None),
        ("--against {small}", "are of different checkpoints"),
        ("--bundle /nowhere", "/nowhere"),
        ("--size 8x8", "8x8"),
        ("--size 50x50", "not a multiple"),
        ("--runtime tensorrt-rtx", "runtime tensorrt-rtx"),
        ("--prompts /nowhere.txt", "cannot read prompts"),
        ("--seeds x", "seeds"),
        ("--seeds 0,-1", "seed is -1"),
    ],
)
def test_bad_input(arguments, said, tmp_path, monkeypatch, capsys):
    unwanted = BenchError("work began")
    monkeypatch.setattr(quality, "measure", lambda *_: (_ for _ in ()).throw(unwanted))
    told = refusal("quality", arguments.format(small=small_bundle()), tmp_path, capsys)
    assert (said or "work began") in told
