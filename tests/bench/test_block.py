"""The block benchmark without a GPU: equal contenders, a whole report, times made up."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from tests.bench.small_block import CONFIG, LATENT
from wantrt.bench import block
from wantrt.bench.block_contenders import (
    diffusers_block,
    diffusers_weights,
    in_bfloat16,
    make_inputs,
    make_weights,
    our_block,
)
from wantrt.bench.block_cost import block_cost
from wantrt.bench.gpu import compare
from wantrt.bench.kernel_cases import Random
from wantrt.bench.kernel_times import KernelTime
from wantrt.bench.result import load
from wantrt.bench.tables import lines
from wantrt.models.ops import TORCH_OPS

SMALL = {"small": block.Model(CONFIG, 0.05, 0.78)}


@pytest.fixture(scope="module")
def weights():
    return make_weights(CONFIG, Random("cpu", 0))


@pytest.fixture(scope="module")
def given():
    return make_inputs(CONFIG, LATENT, torch.float32, Random("cpu", 1))


def test_diffusers_and_the_reference_are_one_block(weights, given):
    pytest.importorskip("diffusers")
    with torch.inference_mode():
        ours = our_block(CONFIG, torch.float32, TORCH_OPS, weights, given)()
        theirs = diffusers_block(CONFIG, torch.float32, weights, given)()
    assert compare([theirs], [ours])["max"] < 1e-5
    assert compare([ours], [given.x])["rms"] > 0.1  # a block that does something


def test_diffusers_in_bfloat16_is_as_its_model_loads_it(weights, given):
    diffusers = pytest.importorskip("diffusers")
    keep = diffusers.WanTransformer3DModel._keep_in_fp32_modules
    run = diffusers_block(CONFIG, torch.bfloat16, weights, given)
    (module,) = (
        cell.cell_contents
        for cell in run.__closure__
        if isinstance(cell.cell_contents, torch.nn.Module)
    )
    for name, parameter in module.named_parameters():
        kept = any(part in keep for part in name.split("."))
        assert parameter.dtype == (torch.float32 if kept else torch.bfloat16), name
    assert not module.training
    with torch.inference_mode():
        exact = our_block(CONFIG, torch.float32, TORCH_OPS, weights, given)()
        assert 0 < compare([run()], [exact])["rms"] < 2e-2


def test_all_weights_reach_diffusers(weights):
    found = diffusers_weights(CONFIG, weights)
    assert sum(w.numel() for w in found.values()) == sum(w.numel() for w in weights.values())
    assert found["scale_shift_table"].shape == (1, 6, CONFIG.dim)


def test_given_values_survive_bfloat16(weights, given):
    for value in (*weights.values(), given.x, given.e6, given.context):
        assert torch.equal(in_bfloat16(value), value)


@pytest.mark.parametrize("maker", ["reference", "diffusers"])
def test_contenders_compile_as_one_graph(maker, weights, given):
    if maker == "diffusers":
        pytest.importorskip("diffusers")
    run = block.contenders(CONFIG, weights, given, torch.bfloat16)[maker]()
    torch._dynamo.reset()
    with torch.inference_mode():
        traced = torch.compile(run, backend="eager", fullgraph=True, dynamic=False)()
        assert torch.equal(traced, run())


@pytest.fixture
def on_cpu(monkeypatch, tmp_path):
    def time_in_turn(works, samples):
        for work in works.values():
            work()
        return {name: [2.0] * samples for name in works}

    kernels = {
        "nvjet_tst_a": KernelTime(1500, 8),
        "cudnn_generated_fort_native_sdpa_sm90": KernelTime(400, 2),
        "modulate_kernel": KernelTime(60, 2),
    }
    for name, replacement in {
        "DEVICE": torch.device("cpu"),
        "LATENT": LATENT,
        "MODELS": SMALL,
        "require_gpu": lambda _: None,
        "capture": lambda work: (work(), work)[1],
        "time_in_turn": time_in_turn,
        "kernel_times": lambda run: kernels,
        "copy_bandwidth": lambda: 4e12,
        "matrix_rate": lambda: 8e14,
        "state": dict,
        "usable": lambda: True,
        "state_under": lambda _: {},
        "our_ops": lambda: TORCH_OPS,
        "preferred": lambda order: nullcontext(),
    }.items():
        monkeypatch.setattr(block, name, replacement)
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a CPU")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["block"])
    return tmp_path / "bench-results"


def run(capsys):
    block.main()
    told = capsys.readouterr()
    return json.loads(told.out), told.err


def rows(measured):
    """By what follows the model's name."""
    return {row["name"].partition(": ")[2]: row for row in measured["rows"]}


def test_whole_run(on_cpu, capsys):
    pytest.importorskip("diffusers")
    measured, told = run(capsys)
    assert measured == json.loads((on_cpu / "block.json").read_text())
    assert lines(load(on_cpu / "block.json"), block.TABLE)
    found = rows(measured)
    cost = block_cost(CONFIG, 12, CONFIG.text_len, torch.bfloat16)
    floor = cost.floor_ms(8e14, 4e12)
    assert found["floor"]["ms"] == floor["all"]
    assert found["floor"]["rest_ms"] == floor["rest"]
    assert found["floor"]["tokens"] == 12
    contenders = {row["contender"]: row for row in found.values() if "contender" in row}
    assert set(contenders) == {
        *("kernels", "kernels captured", "reference", "reference compiled"),
        *("diffusers", "diffusers compiled"),
    }
    for name, row in contenders.items():
        assert name in told
        assert row["ms"]["median"] == 2.0
        assert (row["gemm_ms"], row["attention_ms"], row["rest_ms"]) == (1.5, 0.4, 0.06)
        assert row["rest_share"] == pytest.approx(0.06 / 1.96, abs=1e-4)
        assert row["not_in_kernels_ms"] == pytest.approx(0.04)
        assert row["launches"] == 12
        assert row["of_matrix_rate"] == pytest.approx(cost.flops / 2e-3 / 8e14, abs=1e-4)
        assert row["floor_fraction"] == pytest.approx(floor["all"] / 2, abs=1e-4)
        assert row["rest_kernels"] == "modulate_kernel 60 us x2"
        assert row["error_rms"] < 2e-2
        assert not any(isinstance(value, list) for value in row.values())
    errors = {name: row["error_rms"] for name, row in contenders.items()}
    assert errors["kernels"] == errors["kernels captured"] == errors["reference"]
    assert contenders["kernels"]["passed"] is True
    assert measured["partial"] is None
    assert measured["machine"]["rates"] == {"matrix": 8e14, "copy": 4e12}
    assert "'rest_share_reached': True" in told
    assert "'of_matrix_rate_reached': False" in told


def test_without_diffusers_its_rows_say_so(on_cpu, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    monkeypatch.setitem(sys.modules, "diffusers.models.transformers.transformer_wan", None)
    measured, told = run(capsys)
    found = rows(measured)
    assert "problem" in found["diffusers"]
    assert "problem" in found["diffusers compiled"]
    assert "ms" in found["reference compiled"]
    assert found["kernels"]["passed"]
    assert "diffusers" in told


def test_wrong_kernels_fail(on_cpu, capsys, monkeypatch):
    wrong = replace(TORCH_OPS, rms_norm=lambda x, weight, eps: TORCH_OPS.rms_norm(x, weight, 1.0))
    monkeypatch.setattr(block, "our_ops", lambda: wrong)
    with pytest.raises(SystemExit) as leaving:
        block.main()
    assert leaving.value.code == 1
    assert rows(json.loads(capsys.readouterr().out))["kernels"]["passed"] is False


def test_kernels_that_do_not_load_fail(on_cpu, capsys, monkeypatch):
    def missing():
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(block, "our_ops", missing)
    with pytest.raises(SystemExit):
        block.main()
    told = capsys.readouterr()
    assert "triton" in rows(json.loads(told.out))["kernels"]["problem"]
    assert "'rest_share_reached': None" in told.err


def test_a_model_that_fails_does_not_lose_the_report(on_cpu, capsys, monkeypatch):
    def fail(*_):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(block, "time_attention", fail)
    with pytest.raises(SystemExit):
        block.main()
    told = capsys.readouterr()
    problem = "RuntimeError: CUDA error: an illegal memory access"
    assert json.loads(told.out)["rows"] == [{"name": "small", "passed": False, "problem": problem}]
    assert problem in told.err


def test_out_of_time(on_cpu, capsys, monkeypatch):
    block.main(["--minutes", "0"])
    assert capsys.readouterr().out == ""  # nothing was measured, nothing is written
    assert not on_cpu.exists()


def test_attention_backends_that_refuse_are_said(on_cpu):
    found = block.time_attention(CONFIG, 12, samples=2)  # a CPU has flash attention alone
    assert set(found) == set(block.BACKENDS)
    assert found["flash"]["ms"]["median"] == 2.0
    assert found["flash"]["error"]["rms"] < 1e-2
    assert found["flash"]["tflops"] == round(4 * 12 * 12 * CONFIG.dim / 2 / 1e9, 1)
    assert "problem" in found["cudnn"]


def test_preferred_backend_comes_first():
    q = torch.randn(1, 2, 8, 16)
    with block.preferred(["flash"]):
        ours = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    expected = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    torch.testing.assert_close(ours, expected)


def test_worse_than_diffusers_does_not_pass():
    def row(rms):
        return {"error": {"rms": rms}, "ms": {"median": 1.0}}

    found = {"kernels": row(1e-3), "kernels captured": row(1e-3), "reference": row(1e-3)}
    assert block.passes(found | {"diffusers": {"problem": "not installed"}})
    assert block.passes(found | {"diffusers": row(2e-3)})
    assert not block.passes(found | {"diffusers": row(5e-4)})
    assert not block.passes(found | {"kernels": row(math.nan)})
    assert not block.passes({"reference": row(1e-3)})


@pytest.mark.parametrize("option", [["--models", "5b"], ["--samples", "-1"]], ids=" ".join)
def test_refuses_options(option, capsys):
    with pytest.raises(SystemExit) as leaving:
        block.parse(option)
    assert leaving.value.code == 2
    assert option[1] in capsys.readouterr().err
