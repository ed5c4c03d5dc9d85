"""`--weights auto`: where plans run, a stack is timed both ways, once, and the faster is taken."""

import logging
from dataclasses import replace

import pytest

from tests.engines.fake.device import FakeDevice
from tests.engines.fake.install import install_tensorrt_rtx
from tests.small import small_checkpoint
from wantrt.build import plan_build
from wantrt.engines import measure
from wantrt.engines.flavours import find_flavour
from wantrt.engines.measure import Measured
from wantrt.errors import BuildError
from wantrt.pieces import read_log
from wantrt.runtime import loading

RUNTIME = "tensorrt-rtx"


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A fake GPU, and a fake TensorRT-RTX that compiles for it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    install_tensorrt_rtx(monkeypatch)
    with FakeDevice() as device:
        fake = replace(loading.RUNTIMES[RUNTIME], missing=lambda: None, make_device=lambda: device)
        monkeypatch.setitem(loading.RUNTIMES, RUNTIME, fake)
        yield device
    assert device.broken == []
    find_flavour.cache_clear()


def plan(out, device, **options):
    target = options.pop("target", device.architecture)
    return plan_build(
        str(small_checkpoint()), out=out, runtime=RUNTIME, targets=(target,), sizes=((32, 32),),
        frames=(5,), **options,
    )  # fmt: skip


def baked_stacks(bundle):
    (stack,) = (c for c in bundle.manifest.components if c.name == "dit_stack")
    return {plan.part for plan in stack.plans}


@pytest.mark.parametrize("faster, expected", [("bound", {None}), ("baked", {"transformer"})])
def test_the_faster_is_taken_and_remembered(gpu, tmp_path, monkeypatch, caplog, faster, expected):
    measured = []
    really = measure.compare_weights

    def compare(*arguments):
        found = really(*arguments)  # runs both; only who won is made up
        seconds = (1.0, 2.0) if faster == "bound" else (2.0, 1.0)
        measured.append(replace(found, bound_s=seconds[0], baked_s=seconds[1]))
        return measured[-1]

    monkeypatch.setattr("wantrt.trial.compare_weights", compare)
    with caplog.at_level(logging.INFO, "wantrt"):
        bundle = plan(tmp_path / "a", gpu).run()
    assert f"taking {faster}" in caplog.text
    assert measured[0].relative_error < measure.LARGEST_ERROR
    assert baked_stacks(bundle) == expected
    assert read_log(tmp_path / "a").measured == {
        "bound": measured[0].bound_s,
        "baked": measured[0].baked_s,
    }
    assert baked_stacks(plan(tmp_path / "b", gpu).run()) == expected
    assert len(measured) == 1


def test_planning_alone_measures_nothing(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("wantrt.trial.compare_weights", lambda *arguments: pytest.fail("ran"))
    assert plan(tmp_path / "a", gpu).missing()


def test_plans_for_another_gpu_stay_bound(gpu, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "wantrt"):
        undecided = plan(tmp_path / "a", gpu, target="sm120")
    assert undecided.decide is None
    assert f"this GPU is {gpu.architecture}" in caplog.text


def test_plans_that_disagree_are_refused(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LARGEST_ERROR", -1.0)
    with pytest.raises(BuildError, match=r"differ by .* --weights"):
        plan(tmp_path / "a", gpu).run()


def test_equal_times_mean_bound():
    assert Measured(1.0, 1.0, 0.0).faster == "bound"
