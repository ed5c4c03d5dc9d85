"""One bundle beside another: rounding is told from noise, and what is unequal is refused."""

import json
import math

import pytest

from tests.bench.commands import ran, refusal
from tests.small import small_bundle
from wantrt.bench import quality
from wantrt.bench.quality import measure, read_jobs, summary
from wantrt.bundle import Bundle
from wantrt.errors import BenchError
from wantrt.nano.scenes import load_held_out

ASKED = {"size": (32, 32), "num_frames": 5, "num_inference_steps": 2}
JOBS = [{"prompt": "a red circle moves right", "seed": seed} for seed in (0, 1)]


@pytest.fixture(scope="module")
def fp32():
    return Bundle.load(small_bundle("fp32"))


@pytest.fixture(scope="module")
def bf16():
    return Bundle.load(small_bundle("bf16"))


def rows_by_name(*arguments):
    return {row["name"]: row for row in measure(*arguments, JOBS, ASKED)}


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


def test_an_interruption_is_summed_up(fp32, monkeypatch):
    made = quality.Maker.make
    left = iter(range(3 + 3 + 1))  # the warm-up, the first job, a part of the second

    def make(*arguments):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return made(*arguments)

    monkeypatch.setattr(quality.Maker, "make", make)
    rows = []
    with pytest.raises(KeyboardInterrupt):
        for row in measure(fp32, "torch", fp32, "torch", JOBS, ASKED):
            rows.append(row)
    assert [row["name"] for row in rows[2:]] == ["all", "all, noise floor"]
    assert rows[2]["ssim"]["runs"] == 1


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
    one = fp32.variant
    pipe = quality.Maker(fp32, "torch").pipe
    settings = [pipe.resolve("x", seed=0, flow_shift=shift, **ASKED) for shift in (3.0, 4.0)]
    assert one.task == "t2v"
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
    ],
)
def test_bad_input(arguments, said, tmp_path, monkeypatch, capsys):
    unwanted = BenchError("work began")
    monkeypatch.setattr(quality, "measure", lambda *_: (_ for _ in ()).throw(unwanted))
    told = refusal("quality", arguments.format(small=small_bundle()), tmp_path, capsys)
    assert (said or "work began") in told
