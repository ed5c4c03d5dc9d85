"""What each flavour says it can do, and what it says where it cannot."""

import logging
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

import wantrt.engines.flavours as flavours
from wantrt.engines.flavours import Flavour, check_precision, find_flavour, why_missing
from wantrt.errors import (
    BuildError,
    RuntimeUnavailableError,
    SettingsError,
    UnsupportedTaskError,
)

pytest.importorskip("tensorrt_rtx")

NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="says what is said without a GPU")


@pytest.fixture
def rtx() -> Flavour:
    return find_flavour("tensorrt-rtx")


def test_rtx_compiles_for_others_and_caches_where_it_runs(rtx):
    assert rtx.builds_without_gpu
    assert not rtx.has_timing_cache
    assert {"sm75", "sm86", "sm89", "sm120"} <= set(rtx.served_targets)
    assert find_flavour("tensorrt-rtx") is rtx  # one logger a process


def test_targets_are_taken_as_people_write_them(rtx):
    assert rtx.choose_targets(["SM89", "sm120", "sm89"]) == ("sm89", "sm120")


def test_a_target_that_the_library_refuses_is_no_plan_for_another(rtx):
    class Config:
        def set_compute_capability(self, capability, index):
            return capability.name != "SM120"

    with pytest.raises(BuildError, match="refuses to compile for sm120"):
        rtx.set_targets(Config(), ("sm89", "sm120"))


@NO_GPU
def test_targets_without_a_gpu_and_without_a_wish(rtx):
    check_precision("bf16", rtx.choose_targets())
    assert set(rtx.choose_targets()) <= set(rtx.served_targets)


@pytest.mark.parametrize("target", ["sm90", "SM100", "sm61", "ada"])
def test_a_target_that_is_not_served(rtx, target):
    with pytest.raises(SettingsError, match=r"does not compile for .*it serves sm75.*sm120") as e:
        rtx.choose_targets(["sm89", target])
    assert ("--runtime tensorrt serves it" in str(e.value)) == (target in ("sm90", "SM100"))


def test_precisions_that_targets_lack():
    check_precision("bf16", ("sm89", "sm120"))
    check_precision("fp16", ("sm75", "sm89"))
    with pytest.raises(SettingsError, match=r"sm75 has no bf16.*--precision fp16 --target sm75"):
        check_precision("bf16", ("sm75", "sm89"))
    with pytest.raises(UnsupportedTaskError, match="fp8 is not there yet"):
        check_precision("fp8", ("sm120",))
    with pytest.raises(SettingsError, match="no fused attention in fp32"):
        check_precision("fp32", ("sm89",))


def test_errors_can_be_quoted_once(rtx, caplog):
    rtx.last_errors()
    with caplog.at_level(logging.DEBUG, "wantrt.tensorrt"):
        assert rtx.runtime().deserialize_cuda_engine(b"no plan" * 20) is None
    said = rtx.last_errors()
    assert "Serialization" in said
    assert said.splitlines()[0] in caplog.text
    assert rtx.last_errors() == ""


def test_harmless_warnings_are_quiet(rtx, caplog):
    severity = SimpleNamespace(name="WARNING")
    with caplog.at_level(logging.DEBUG, "wantrt.tensorrt"):
        rtx._logger.log(severity, "Unused Input: mask")
        rtx._logger.log(severity, "something new")
    assert [record.levelname for record in caplog.records] == ["DEBUG", "WARNING"]


def test_an_unknown_flavour():
    with pytest.raises(SettingsError, match="did you mean tensorrt-rtx"):
        find_flavour("tensorrt-rtz")


# -- Where it cannot be used ----------------------------------------------------------------------


@pytest.fixture
def installed(monkeypatch):
    """Put a module in the place of the full TensorRT's; None: there is none."""

    def install(module: ModuleType | None) -> None:
        monkeypatch.setattr(flavours, "find_spec", lambda name: module)
        if module:
            monkeypatch.setitem(sys.modules, "tensorrt", module)

    find_flavour.cache_clear()
    yield install
    find_flavour.cache_clear()


def make_module(**members: object) -> ModuleType:
    module = ModuleType("tensorrt")
    vars(module).update(members)
    return module


def test_tensorrt_is_not_installed(installed):
    installed(None)
    assert why_missing("tensorrt") == (
        "tensorrt is not installed; for data-centre GPUs: pip install 'wantrt[tensorrt]'"
    )
    with pytest.raises(RuntimeUnavailableError, match=r"(?s)pip install .*--runtime tensorrt-rtx"):
        find_flavour("tensorrt")


def test_another_major_version(installed):
    installed(make_module(__version__="10.13.2"))
    with pytest.raises(RuntimeUnavailableError, match=r"10\.13\.2 is too old.*11 or later"):
        find_flavour("tensorrt")


@NO_GPU
def test_tensorrt_without_a_gpu(installed):
    real = sys.modules["tensorrt_rtx"]
    full = {name: getattr(real, name) for name in ("ILogger", "IProgressMonitor", "DataType")}
    installed(make_module(__version__="11.4.0", **full))  # none of what only RTX has
    with pytest.raises(
        RuntimeUnavailableError, match=r"(?s)finds none here.*--runtime tensorrt-rtx.*onnxruntime"
    ):
        find_flavour("tensorrt")
