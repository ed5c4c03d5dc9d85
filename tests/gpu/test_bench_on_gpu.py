"""Commands of the benchmark suite on a GPU, with little work: rows with GPU memory, and no faults.

Weights of nano's dimensions are drawn on the device, in bfloat16.
"""

import json

import pytest

pytest.importorskip("click", reason="needs the packages of wantrt's command line")
pytest.importorskip("rich", reason="needs the packages of wantrt's command line")

from tests.bench.commands import ran
from wantrt.bench.bundles import DrawnBundle, choose_bundle
from wantrt.folder import silent

pytestmark = pytest.mark.gpu

DRAWN = ("--variant", "nano", "--checkpoint", "random:0", "--precision", "bf16")
FEW = ("--warmup", 2, "--runs", 2)
CASES = {
    "latency": (*DRAWN, "--runtime", "torch", "--frames", 9, "--steps", 4, *FEW),
    "scaling": (*DRAWN, "--runtime", "torch", "--size", "64x64,128x128", "--frames", 9, *FEW),
    "throughput": (*DRAWN, "--runtime", "torch", "--requests", 3, "--frames", 9),
    "vae": ("--size", "64x64", "--runtime", "torch", *FEW),
    "text": ("--runtime", "torch", *FEW),
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.mark.parametrize("name, asked", CASES.items(), ids=CASES)
def test_a_command_measures_the_gpu(name, asked, tmp_path):
    assert ran(name, *asked, "--out", tmp_path) == 0
    result = json.loads((tmp_path / f"{name}.json").read_text())
    assert result["partial"] is None
    assert result["machine"]["gpu_state"]
    assert result["rows"]
    if name != "throughput":
        assert any(row.get("peak_allocated_bytes", 0) > 0 for row in result["rows"])


def test_generated_weights_are_drawn_on_the_device():
    choice = choose_bundle(None, "nano", "random:0", "bf16", runtimes=["torch"], draw=True)
    bundle = choice.open(silent)
    assert isinstance(bundle, DrawnBundle)
    assert all(tensor.is_cuda for tensor in bundle.weights("transformer").values())


@pytest.mark.parametrize("scope", ["dit", "vae"])
def test_blocks_are_compared_with_diffusers(scope, tmp_path):
    pytest.importorskip("diffusers", reason="compares with diffusers")
    asked = ["--scope", scope, "--runtime", "torch", "--precision", "bf16", "--size", "128x128"]
    asked += ["--frames", 5, "--blocks", 1] if scope == "dit" else ["--frames", 5]
    assert ran("compare", *asked, *FEW, "--peers", "diffusers-eager", "--out", tmp_path) == 0
    rows = json.loads((tmp_path / "compare.json").read_text())["rows"]
    assert {row["engine"] for row in rows} == {"wantrt torch", "diffusers eager"}
    assert all(row["seconds"]["median"] > 0 for row in rows)
