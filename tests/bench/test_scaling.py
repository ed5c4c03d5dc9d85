"""Growth over tokens, batch and steps: the cases, and fits that find what they were made of."""

import json

import pytest

from tests.bench.commands import ran, refusal
from tests.small import small_bundle
from wantrt.bench import scaling
from wantrt.bench.rates import Rates
from wantrt.bench.request import serve
from wantrt.bench.scaling import fits, make_cases, symbols_of
from wantrt.bundle import Bundle
from wantrt.device import CPUDevice
from wantrt.runtime import sizes

RATES = Rates(matrix=1e11, attention=5e10, copy=1e10)
GIVEN = ("--steps", "1,2", "--warmup", 1, "--runs", 2, "--seed", 1)


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """Run the command with small settings; rates are not measured."""
    monkeypatch.setattr(scaling, "measure_rates", lambda device, dtype: RATES)

    def run(*arguments):
        given = ("--bundle", small_bundle(), "--runtime", "torch", "--out", tmp_path / "results")
        code = ran("scaling", *given, *GIVEN, *arguments)
        return code, json.loads((tmp_path / "results" / "scaling.json").read_text())

    return run


def point(tokens, step_ms, **other):
    row = {"axis": "tokens", "size": f"{tokens}", "frames": 1, "steps": 4, "tokens": tokens}
    row |= {"step_ms": {"median": step_ms}, "denoise_s": {"median": 4e-3 * step_ms}}
    return row | {"floor_ms": tokens**1.5, "peak_rss_bytes": 2**30 + 2**20 * tokens} | other


def test_fits_find_what_made_the_numbers():
    rows = [point(n, 3 + 0.5 * n + 0.01 * n**2) for n in (10, 20, 40, 80, 160)]
    (fit,) = fits(rows)
    assert fit["floor_exponent"] == pytest.approx(1.5)
    assert fit["mib_per_token"] == pytest.approx(1)
    assert fit["constant_ms"] == pytest.approx(3)
    assert fit["linear_ms_per_token"] == pytest.approx(0.5)
    assert fit["quadratic_ms_per_token2"] == pytest.approx(0.01)
    assert fit["largest_error_fraction"] == pytest.approx(0, abs=1e-9)
    power = fits([point(n, 7 * n**1.25) for n in (10, 100, 1000)])[0]
    assert power["exponent"] == pytest.approx(1.25)
    assert "constant_ms" not in power  # three points lie on any parabola
    assert fits(rows[:2]) == []


def test_guidance_and_steps():
    base = point(10, 20.0)
    alone = base | {"axis": "batch", "step_ms": {"median": 12.5}, "floor_ms": base["floor_ms"] / 2}
    more = base | {"axis": "steps", "steps": 8, "denoise_s": {"median": 0.16}}
    ratio, steps = fits([alone, more, base | {"denoise_s": {"median": 0.09}}, point(20, 30.0)])
    assert (ratio["ratio"], ratio["floor_ratio"]) == (1.6, 2.0)
    assert steps["per_step_ms"] == pytest.approx(17.5)
    assert steps["once_ms"] == pytest.approx(20)


def test_cases_vary_one_thing_at_a_time():
    bundle, asked = Bundle.load(small_bundle()), {"prompt": "x", "seed": 0}
    cases = make_cases(bundle, "torch", asked, [(48, 32), (32, 32)], [5, 9], [2, 3])
    told = [
        (c.axis, c.settings.size, c.settings.num_frames, c.settings.num_inference_steps)
        for c in cases
    ]
    assert told == [
        ("tokens", (32, 32), 5, 2),
        ("batch", (48, 32), 5, 2),
        ("steps", (48, 32), 5, 3),
        ("tokens", (48, 32), 5, 2),
        ("tokens", (32, 32), 9, 2),
        ("tokens", (48, 32), 9, 2),
    ]
    symbols = [symbols_of(bundle, case.settings) for case in cases]
    assert [s["B"] for s in symbols] == [2, 1, 2, 2, 2, 2]
    assert [s["L"] for s in symbols] == [8, 12, 12, 12, 12, 18]


def test_fits_of_what_an_interruption_left():
    """The unguided case, and that of more steps, without the one that they are beside."""
    base = point(10, 20.0)
    alone, more = base | {"axis": "batch"}, base | {"axis": "steps", "steps": 8}
    assert fits([alone]) == fits([alone, more]) == []


def test_the_command(bench, capsys):
    code, result = bench("--size", "32x32,64x32", "--frames", "5,9")
    assert code == 0
    told = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in told if "│" in line)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == [
        *("32x32x5, unguided", "32x32x5, 2 steps", "32x32x5", "32x32x9", "64x32x5", "64x32x9"),
        *("fit over tokens", "guided / unguided", "fit over steps"),
    ]
    assert rows["32x32x5, 2 steps"]["step_ms"]["runs"] == 2 * 2
    assert rows["32x32x5"]["step_ms"]["runs"] == 2
    told = ("32x32x5", "32x32x5, unguided")
    assert [(rows[name]["batch"], rows[name]["passes"]) for name in told] == [(2, 1), (1, 1)]
    assert rows["64x32x9"]["floor_ms"] > rows["64x32x5"]["floor_ms"] > rows["32x32x5"]["floor_ms"]
    large = rows["64x32x9"]
    assert large["floor_fraction"] == pytest.approx(large["floor_ms"] / large["step_ms"]["median"])
    assert rows["guided / unguided"]["floor_ratio"] == pytest.approx(2)
    assert rows["fit over tokens"]["points"] == 4
    assert 0 < rows["fit over tokens"]["floor_exponent"] < 2


def test_guidance_of_many_tokens_is_two_passes(bench, monkeypatch):
    monkeypatch.setattr(sizes, "GUIDANCE_BATCH_TOKENS", 7)
    _, result = bench("--size", "32x32", "--frames", "5")
    told = {row["name"]: (row["batch"], row["passes"]) for row in result["rows"][:3]}
    assert told == {
        "32x32x5, unguided": (1, 1),
        "32x32x5, 2 steps": (1, 2),
        "32x32x5": (1, 2),
    }


def test_memory_of_the_case_before_is_given_back(bench, monkeypatch):
    seen = []

    def served(*given):
        seen.append("served")
        return serve(*given)

    monkeypatch.setattr(scaling, "serve", served)
    monkeypatch.setattr(CPUDevice, "release", lambda self: seen.append("released"))
    bench("--size", "32x32", "--frames", "5")
    assert seen[:12] == ["released", *["served"] * 3] * 3


def test_what_was_measured_before_an_interruption_is_kept(bench, monkeypatch):
    """Of the third case one request, which no fit takes."""
    calls = []

    def interrupted(*given):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return serve(*given)

    monkeypatch.setattr(scaling, "serve", interrupted)
    code, result = bench("--size", "32x32,64x32", "--frames", "5")
    assert code == 130
    assert result["partial"] == "KeyboardInterrupt: interrupted"
    assert [row["axis"] for row in result["rows"]] == ["batch", "steps", "tokens"]
    assert result["rows"][1]["e2e_s"]["runs"] == 2
    assert result["rows"][2]["e2e_s"]["runs"] == 1


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--size 32x32,33x33", "33x33 is not a multiple of 16"),
        ("--frames 5,6", "6 frames is not 4n + 1"),
        ("--steps 4,0", "num_inference_steps is 0"),
        ("--steps four", "not a number"),
        ("--variant 14C", "unknown variant"),
    ],
)
def test_bad_input_is_refused(arguments, said, tmp_path, capsys):
    assert said in refusal("scaling", arguments, tmp_path, capsys)
