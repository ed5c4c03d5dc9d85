"""Plans of another machine are compiled again before they run, unless their user trusts them."""

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.engines.fake.device import FakeDevice
from tests.engines.fake.install import install_tensorrt_rtx
from tests.small import small_checkpoint
from wantrt.build import plan_build
from wantrt.bundle import Bundle
from wantrt.engines.flavours import find_flavour
from wantrt.runtime import parts
from wantrt.runtime.loading import RUNTIMES, Files
from wantrt.verify import smallest_sizes, verify

RUNTIME = "tensorrt-rtx"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bundle]:
    """Compiled for a GPU, by a user with a cache of their own; the VAE's weights are inside."""
    folder = tmp_path_factory.mktemp("trust")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder / "cache of the builder"))
        install_tensorrt_rtx(patch)
        plan_build(
            str(small_checkpoint()),
            out=folder / "bundle",
            runtime=RUNTIME,
            precision="bf16",
            targets=["sm89"],
            sizes=[(48, 32)],
            frames=[5],
        ).run()
        yield Bundle.load(folder / "bundle")
    find_flavour.cache_clear()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a user who has compiled nothing; where the plans are."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(parts, "_warned", set())
    return tmp_path / "wantrt" / "plans"


def paths_run(bundle: Bundle, part: str, trust_plans: bool) -> list[Path]:
    """The plans that the sessions of a part are loaded from."""
    found: list[Path] = []

    def load(component: object, files: Files, *_: object) -> list[object]:
        found.extend(path for _, path in files.plans)
        return []

    runtime = replace(RUNTIMES[RUNTIME], load=load)
    with FakeDevice() as device:
        parts.load_part(bundle, part, runtime, device, trust_plans=trust_plans)
    return found


@pytest.mark.parametrize("part", ["transformer", "vae"], ids=["bound", "baked"])
def test_a_stranger_s_plans_are_compiled_again(
    bundle: Bundle, cache: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    own = {bundle.path / plan.file for c in bundle.manifest.components for plan in c.plans}
    with caplog.at_level(logging.WARNING, logger="wantrt"):
        compiled = paths_run(bundle, part, trust_plans=False)
        assert paths_run(bundle, part, trust_plans=False)
    assert compiled
    assert all(path.parent == cache for path in compiled)
    (record,) = caplog.records  # said once
    assert "not compiled on this machine" in record.getMessage()
    assert "--trust-plans" in record.getMessage()
    # the same graphs, weights and compiler: the same plans, and now they are this machine's
    assert {p.read_bytes() for p in compiled} <= {path.read_bytes() for path in own}
    assert set(paths_run(bundle, part, trust_plans=False)) <= own


def test_trusted_plans_are_run_as_they_are(bundle: Bundle, cache: Path) -> None:
    found = paths_run(bundle, "transformer", trust_plans=True)
    assert found
    assert all(path.is_relative_to(bundle.path) for path in found)
    assert not cache.exists()


# -- Verification of what plans compute -----------------------------------------------------------


@pytest.mark.slow
def test_plans_are_what_the_checkpoint_says(
    bundle: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = FakeDevice()
    fake = replace(RUNTIMES[RUNTIME], missing=lambda: None, make_device=lambda: device)
    monkeypatch.setitem(RUNTIMES, RUNTIME, fake)
    with device:
        report = verify(bundle, runtime=RUNTIME, steps=2, trust_plans=True)
    assert report.ok
    assert report.runtime == RUNTIME
    assert len(report.components) == 12
    assert [found.name for found in report.trajectory] == ["step 1", "step 2"]
    assert not device.broken


def test_sizes_of_verification_are_small_and_served() -> None:
    def fixed(**sizes: int) -> dict[str, tuple[int, int, int]]:
        return {name: (size, size, size) for name, size in sizes.items()}

    assert smallest_sizes([])["L"] == 30
    chosen = smallest_sizes([fixed(B=1, F=7, h=30, w=52), fixed(B=1, F=2, h=4, w=6)])
    assert (chosen["F"], chosen["h"], chosen["w"], chosen["B"]) == (2, 4, 6, 1)
    assert smallest_sizes([{"S": (1, 64, 512), "B": (1, 1, 1)}])["S"] == 11
    assert smallest_sizes([{"T": (5, 50, 1000)}])["T"] == 5
