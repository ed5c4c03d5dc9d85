"""Verification passes what is right, on every runtime, and names what is not."""

import json
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.checkpoints.small import SMALL
from tests.small import copy_bundle, small_bundle, small_checkpoint
from wantrt.build import plan_build
from wantrt.bundle import MANIFEST, Bundle, describe_file
from wantrt.errors import BundleError
from wantrt.records import to_plain
from wantrt.verify import Report, distance, open_source, verify

NAME = "blocks.1.ffn.up.weight"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def sign(folder: Path, name: str) -> None:
    """Enter a changed file into the manifest, as whoever forges a bundle would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"][name] = to_plain(describe_file(folder / name))
    (folder / MANIFEST).write_text(json.dumps(manifest))


def change_weight(folder: Path, value: float) -> None:
    path = folder / "weights/transformer.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()}
    weights[NAME][3, 4] = value
    save_file(weights, path)
    sign(folder, "weights/transformer.safetensors")


def failing(report: Report) -> set[str]:
    return {found.name for found in report.components if not found.ok}


@pytest.mark.parametrize("runtime", ["onnxruntime", "torch"])
def test_a_sound_bundle_is_what_its_checkpoint_says(runtime: str) -> None:
    reports: list[tuple[str, int, int]] = []
    report = verify(
        Bundle.load(small_bundle()),
        runtime=runtime,
        steps=2,
        progress=lambda *progress: reports.append(progress),
    )
    assert report.ok
    assert report.runtime == runtime
    assert {found.name for found in report.components} == {
        *("text_embed", "text_stack", "text_head"),
        *("dit_condition", "dit_time", "dit_patch", "dit_stack", "dit_head"),
        *("vae_decoder_first", "vae_decoder_next", "vae_encoder_first", "vae_encoder_next"),
    }
    assert max(found.relative_error for found in report.components) < 1e-5
    assert [found.name for found in report.trajectory] == ["step 1", "step 2"]
    assert ("verify vae", *(2 * (len(Bundle.load(small_bundle()).weights("vae")),))) in reports


def test_bf16_is_within_its_own_tolerance_and_not_within_that_of_fp32() -> None:
    report = verify(Bundle.load(small_bundle("bf16")), runtime="torch", steps=1)
    assert report.ok
    assert report.trajectory[0].precision == "bf16"
    assert max(found.relative_error for found in report.components) > 1e-4


def test_nan_weights_are_named(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    change_weight(folder, float("nan"))
    report = verify(Bundle.load(folder), runtime="torch")
    assert not report.ok
    assert report.nonfinite == (f"transformer/{NAME}",)
    assert failing(report) == {"dit_stack"}


def test_weights_of_another_origin_are_named(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    change_weight(folder, 0.001)
    report = verify(Bundle.load(folder), runtime="torch")
    assert not report.ok
    assert report.different == (f"transformer/{NAME}",)
    assert report.nonfinite == ()


def test_a_graph_that_computes_something_else_is_found_where_graphs_run(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    path = folder / "graphs/dit_head.onnx"
    model = onnx.load(path)
    last = model.graph.node[-1]
    last.op_type = "Neg"  # instead of Identity
    onnx.save(model, path)
    sign(folder, "graphs/dit_head.onnx")
    assert failing(verify(Bundle.load(folder), runtime="onnxruntime")) == {"dit_head"}
    assert verify(Bundle.load(folder), runtime="torch").ok


def test_altered_files_are_named(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    path = folder / "weights/vae.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BundleError, match=r"sha256 differs: weights/vae\.safetensors"):
        verify(Bundle.load(folder))


def test_the_checkpoint_must_be_the_bundle_s_own(tmp_path: Path) -> None:
    bundle = Bundle.load(small_bundle())
    assert verify(bundle, str(small_checkpoint()), runtime="torch").ok
    with pytest.raises(BundleError, match="built from another checkpoint"):
        verify(bundle, "random:0:dim=48,num_heads=2,num_layers=1,ffn_dim=48")


def test_a_generated_checkpoint_of_other_dimensions_is_found_again(tmp_path: Path) -> None:
    """Its bundle's variant is `custom`, which does not say from which row it was resized."""
    plan_build(SMALL, "t2v-1.3b", tmp_path / "b", precision="fp32").run()
    assert open_source(Bundle.load(tmp_path / "b"), None).source == SMALL


def test_distance_of_what_is_not_finite_is_infinite() -> None:
    one = torch.ones(3)
    assert distance(one, one) == (0.0, pytest.approx(1.0))
    assert distance(one * torch.nan, one) == (float("inf"), 0.0)
    assert distance(2 * one, one) == (pytest.approx(1.0), pytest.approx(1.0))
    assert distance(-one, one)[1] == pytest.approx(-1.0)
