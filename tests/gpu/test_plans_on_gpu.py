"""nano through TensorRT on the GPU itself: compiled, captured, in every residency, and verified.

Needs one of the two libraries and what building needs besides (onnx, onnxscript, tokenizers, …);
skipped where they are missing, or where the library does not serve this GPU.
"""

import logging
from pathlib import Path

import pytest

from wantrt.device import CUDADevice

pytestmark = pytest.mark.gpu

PROMPT = "a green triangle rotates"
SHORT = {"num_inference_steps": 6, "num_frames": 25, "seed": 5}
NEEDED = ("onnx", "onnxscript", "tokenizers", "ftfy", "av")


@pytest.mark.parametrize("weights", ["bound", "baked"])
@pytest.mark.parametrize("runtime", ["tensorrt", "tensorrt-rtx"])
def test_nano_through_plans(
    runtime: str,
    weights: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for module in (runtime.replace("-", "_"), *NEEDED):
        pytest.importorskip(module)
    from wantrt import Pipeline
    from wantrt.build import plan_build
    from wantrt.bundle import Bundle
    from wantrt.engines.flavours import find_flavour
    from wantrt.verify import verify

    served, here = find_flavour(runtime).served_targets, CUDADevice().architecture
    if served and here not in served:
        pytest.skip(f"{runtime} does not compile for {here}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    options = {"runtime": runtime, "weights": weights, "frames": [SHORT["num_frames"]]}
    bundle = plan_build(variant="nano", out=tmp_path / "nano", **options).run().path
    with Pipeline.load(bundle, runtime="torch") as pipe:
        expected = pipe(PROMPT, **SHORT).frames.astype(int)
    policies = ("resident", "phase", "stream") if weights == "bound" else ("resident", "phase")
    with caplog.at_level(logging.WARNING, "wantrt"):
        for residency in policies:
            with Pipeline.load(bundle, runtime=runtime, residency=residency) as pipe:
                first, again = (pipe(PROMPT, **SHORT).frames for _ in range(2))
            assert (first == again).all()  # the second one replays from its first step on
            assert abs(first - expected).mean() < 3
    assert "could not be captured" not in caplog.text
    report = verify(Bundle.load(bundle), runtime=runtime, steps=2)
    assert report.ok, report
