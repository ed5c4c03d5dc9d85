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
from wantrt.errors import BuildError, SettingsError
from wantrt.pieces import read_log
from wantrt.runtime import loading
from wantrt.trial import Trial

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
    really = measure.compare_plans

    def compare(*arguments):
        found = really(*arguments)  # runs both; only who won is made up
        seconds = {way: 1.0 if way == faster else 2.0 for way in found.seconds}
        measured.append(replace(found, seconds=seconds))
        return measured[-1]

    monkeypatch.setattr("wantrt.trial.compare_plans", compare)
    with caplog.at_level(logging.INFO, "wantrt"):
        bundle = plan(tmp_path / "a", gpu).run()
    assert f"taking {faster}" in caplog.text
    assert measured[0].relative_error < measure.LARGEST_ERROR
    assert baked_stacks(bundle) == expected
    assert read_log(tmp_path / "a").measured == {
        "dit_stack bound": measured[0].seconds["bound"],
        "dit_stack baked": measured[0].seconds["baked"],
    }
    assert baked_stacks(plan(tmp_path / "b", gpu).run()) == expected
    assert len(measured) == 1


def test_planning_alone_measures_nothing(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr("wantrt.trial.compare_plans", lambda *arguments: pytest.fail("ran"))
    assert plan(tmp_path / "a", gpu).missing()


def test_plans_for_another_gpu_stay_bound(gpu, tmp_path, caplog):
    with caplog.at_level(logging.INFO, "wantrt"):
        undecided = plan(tmp_path / "a", gpu, target="sm120")
    assert undecided.decide is None
    assert f"this GPU is {gpu.architecture}" in caplog.text


def test_plans_that_disagree_are_refused(gpu, tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "LARGEST_ERROR", -1.0)
    with pytest.raises(
        BuildError, match=r"its plan baked differs by .* from the one bound .* --weights"
    ):
        plan(tmp_path / "a", gpu).run()


def test_equal_times_mean_the_simplest():
    assert Measured({"bound": 1.0, "baked": 1.0}, 0.0).fastest == "bound"


def test_plugins_are_a_way_where_the_flavour_takes_them(gpu, tmp_path, monkeypatch):
    pytest.importorskip("triton")
    monkeypatch.setattr(find_flavour(RUNTIME), "takes_plugins", True)
    tried = {}

    def recall(trial):
        ways = tried[trial.component.name] = [str(way) for way in trial.ways]
        return Measured({way: 1.0 if way == "bound with plugins" else 2.0 for way in ways}, 0.0)

    monkeypatch.setattr(Trial, "recall", recall)
    build = plan(tmp_path / "a", gpu)
    assert tried == {
        "dit_stack": ["bound", "bound with plugins", "baked", "baked with plugins"],
        "vae_decoder_next": ["baked", "baked with plugins"],
    }
    plans = [(component.name, plan) for component in build.components for plan in component.plans]
    assert {name for name, plan in plans if plan.plugins} == {"dit_stack", "dit_head"}
    off = plan(tmp_path / "b", gpu, plugins="off", weights="bound")
    assert off.measured == {}
    assert not any(plan.plugins for component in off.components for plan in component.plans)


def test_plugins_are_refused_where_there_are_none(gpu, tmp_path):
    with pytest.raises(SettingsError, match="tensorrt-rtx takes no plugins"):
        plan(tmp_path / "a", gpu, plugins="on")
