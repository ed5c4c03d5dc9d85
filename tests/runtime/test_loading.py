"""Which runtime serves a bundle here: the best of what both have, or the reason why not."""

from collections.abc import Collection
from dataclasses import replace

import pytest

from wantrt.errors import RuntimeUnavailableError, SettingsError
from wantrt.runtime.loading import RUNTIMES, choose_runtime


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Collection[str]:
    """A machine with a GPU and both flavours of TensorRT."""
    for name in ("tensorrt", "tensorrt-rtx"):
        monkeypatch.setitem(RUNTIMES, name, replace(RUNTIMES[name], missing=lambda: None))
    monkeypatch.setitem(RUNTIMES, "torch", replace(RUNTIMES["torch"], on_gpu=lambda: True))
    return RUNTIMES


@pytest.mark.parametrize(
    "precisions, plans, expected",
    [
        (["bf16"], {"tensorrt", "tensorrt-rtx"}, "tensorrt"),
        (["bf16"], {"tensorrt-rtx"}, "tensorrt-rtx"),
        (["fp16", "fp32"], {"tensorrt-rtx"}, "tensorrt-rtx"),  # its text encoder is float32
        (["bf16"], set(), "torch"),
        (["fp32"], set(), "torch"),
    ],
)
def test_the_best_that_bundle_and_machine_share(machine, precisions, plans, expected) -> None:
    assert choose_runtime(None, precisions, plans).name == expected
    assert choose_runtime("auto", precisions, plans).name == expected


def test_without_a_gpu_plans_do_not_run() -> None:
    if RUNTIMES["tensorrt-rtx"].missing() is None:
        pytest.skip("this machine has a GPU and TensorRT-RTX")
    assert choose_runtime(None, ["bf16"], {"tensorrt-rtx"}).name == "torch"
    for name in ("tensorrt", "tensorrt-rtx"):
        with pytest.raises(RuntimeUnavailableError, match=r"cannot run here: .*(GPU|pip install)"):
            choose_runtime(name, ["bf16"], {name})


def test_a_bundle_without_plans_says_how_to_make_them(machine) -> None:
    with pytest.raises(RuntimeUnavailableError, match="wantrt build --runtime tensorrt-rtx"):
        choose_runtime("tensorrt-rtx", ["bf16"], {"tensorrt"})
    assert choose_runtime("tensorrt-rtx", ["bf16"]).name == "tensorrt-rtx"  # no bundle yet


def test_other_refusals() -> None:
    with pytest.raises(SettingsError, match="did you mean tensorrt"):
        choose_runtime("tensort", ["bf16"])
    with pytest.raises(RuntimeUnavailableError, match="does not run bf16"):
        choose_runtime("onnxruntime", ["bf16"])
