"""Plans in a bundle: which there are, that none is compiled twice, that damage is mended."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import get_context
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import pytest
import torch

from tests.test_build import TINY, contents, flip_byte, inodes
from wantrt import pieces
from wantrt.build import Build, plan_build
from wantrt.bundle import BUILD_LOG, MANIFEST, Bundle
from wantrt.engines import cache
from wantrt.errors import BuildError, BundleError, SettingsError, UnsupportedTaskError
from wantrt.folder import cache_folder
from wantrt.manifest import PlanRecord
from wantrt.receipt import find_done, write_receipt

pytest.importorskip("tensorrt_rtx")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="builds for other GPUs")

CHECKPOINT = f"random:0{TINY}"
OPTIONS = {
    "checkpoint": CHECKPOINT,
    "variant": "t2v-1.3b",
    "runtime": "tensorrt-rtx",
    "targets": ["sm89"],
    "sizes": [(32, 32)],
    "frames": [5],
}
COMMAND = (
    *(sys.executable, "-m", "wantrt.cli", "build", "--checkpoint", CHECKPOINT),
    *("--variant", "t2v-1.3b", "--runtime", "tensorrt-rtx", "--target", "sm89"),
    *("--size", "32x32", "--frames", "5", "--no-weights"),
)
RTX = "tensorrt-rtx"
KILLS = 20


@pytest.fixture(scope="module", autouse=True)
def _one_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What one test has compiled, the next need not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The components that TensorRT compiles from here on."""
    names: list[str] = []
    build = cache.build_apart

    def counted(flavour, request, *rest) -> None:
        names.append(request.component.name)
        build(flavour, request, *rest)

    monkeypatch.setattr(cache, "build_apart", counted)
    return names


def planned(out: Path, **changes: object) -> Build:
    return plan_build(**{**OPTIONS, "out": out, **changes})


def plans_of(bundle: Bundle, component: str) -> tuple[PlanRecord, ...]:
    (record,) = (c for c in bundle.manifest.components if c.name == component)
    return record.plans


@pytest.fixture(scope="module")
def built(_one_cache: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with plans; do not change it."""
    folder = tmp_path_factory.mktemp("built") / "bundle"
    planned(folder).run()
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """One to change, with the same links into the cache."""
    return Path(shutil.copytree(built, tmp_path / "bundle", copy_function=link_or_copy))


def link_or_copy(source: str, target: str) -> None:
    if source.endswith(".plan"):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


# -- What there is --------------------------------------------------------------------------------


def test_every_component_has_its_plans(built: Path) -> None:
    bundle = Bundle.load(built)
    bundle.check_hashes()
    batches = [plan.symbols["B"] for plan in plans_of(bundle, "dit_stack")]
    assert batches == [(1, 1, 1), (2, 2, 2)]
    for component in bundle.manifest.components:
        assert component.plans, component.name
        for plan in component.plans:
            assert plan.file.startswith(f"plans/{RTX}-{plan.version}/")
            assert plan.targets == ("sm89",)
            baked = component.name.startswith("vae_")
            assert (plan.part, plan.instance) == (("vae", 0) if baked else (None, None))


@pytest.mark.parametrize(
    "change",
    [
        {"runtime": "torch"},
        {"file": "graphs/dit_patch.onnx"},
        {"targets": []},
        {"symbols": {}},
        {"symbols": {"B": [1, 1, 1], "F": [1, 1, 1], "h": [2, 2, 2], "w": [3, 2, 1]}},
        {"symbols": {"B": [0, 0, 0], "F": [1, 1, 1], "h": [2, 2, 2], "w": [2, 2, 2]}},
        {"part": "nobody", "instance": 0},
        {"part": "transformer", "instance": None},
    ],
)
def test_a_plan_that_its_component_cannot_have_is_refused(
    folder: Path, change: dict[str, object]
) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (record,) = (c for c in manifest["components"] if c["name"] == "dit_patch")
    record["plans"][0] |= change
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match="dit_patch cannot have the plan"):
        Bundle.load(folder)


def test_a_second_build_compiles_nothing_and_touches_nothing(
    folder: Path, compiled: list[str]
) -> None:
    before = inodes(folder)
    planned(folder).run()
    planned(folder).run(check=True)
    assert inodes(folder) == before
    assert compiled == []


def test_without_weights_the_plans_are_the_same(
    built: Path, tmp_path: Path, compiled: list[str]
) -> None:
    bundle = planned(tmp_path / "b", with_weights=False).run()
    assert compiled == []  # the key holds the bytes of what is baked, wherever they lie
    assert {path.name for path in bundle.path.iterdir()} == {
        *("tokenizer", "graphs", "plans", MANIFEST, BUILD_LOG)
    }
    plans = {name: content for name, content in contents(bundle.path).items() if "plan" in name}
    assert plans.items() <= contents(built).items()


def test_each_expert_has_its_own_baked_plans(tmp_path: Path) -> None:
    build = planned(tmp_path / "b", variant="t2v-a14b", weights="baked")
    names = [piece.name for piece in build.pieces]
    assert len(set(names)) == len(names)
    experts = {expert.name for expert in build.checkpoint.variant.experts}
    assert experts <= {piece.bakes for piece in build.pieces}


@pytest.mark.slow
def test_sizes_accumulate(folder: Path, compiled: list[str]) -> None:
    bundle = planned(folder, sizes=[(64, 32)]).run()
    assert set(compiled) == {
        *("dit_patch", "dit_stack", "dit_head", "vae_decoder_first", "vae_decoder_next"),
        *("vae_encoder_first", "vae_encoder_next"),
    }
    tokens = {plan.symbols["L"][0] for plan in plans_of(bundle, "dit_stack")}
    assert tokens == {8, 16}
    del compiled[:]
    assert planned(folder, sizes=None, frames=None).run() == bundle  # it keeps what it has
    assert planned(folder).run() == bundle
    assert compiled == []


@pytest.mark.slow
def test_variants_of_the_same_dimensions_share_their_plans(
    built: Path, tmp_path: Path, compiled: list[str]
) -> None:
    """Other weights and another name: only what is baked is compiled."""
    other = planned(tmp_path / "b", checkpoint=f"random:1{TINY}", variant="t2v-14b").run()
    assert sorted(set(compiled)) == [
        *("vae_decoder_first", "vae_decoder_next", "vae_encoder_first", "vae_encoder_next")
    ]
    for name in ("text_stack", "dit_stack", "dit_head"):
        theirs, ours = plans_of(other, name), plans_of(Bundle.load(built), name)
        assert [(other.path / plan.file).stat().st_ino for plan in theirs] == [
            (built / plan.file).stat().st_ino for plan in ours
        ]


@pytest.mark.slow
def test_baked_stacks_are_one_plan_an_instance(built: Path, tmp_path: Path) -> None:
    bundle = planned(tmp_path / "b", stack=1, weights="baked", with_weights=False).run()
    plans = plans_of(bundle, "dit_stack")
    first = [plan for plan in plans if plan.symbols["B"][0] == 1]
    assert [(plan.part, plan.instance) for plan in first] == [
        ("transformer", 0),
        ("transformer", 1),
    ]
    bytes_of = [(bundle.path / plan.file).read_bytes() for plan in first]
    assert bytes_of[0] != bytes_of[1]


@pytest.mark.slow
def test_one_dynamic_plan_for_all_sizes(built: Path, tmp_path: Path) -> None:
    bundle = planned(tmp_path / "b", sizes=[(32, 32), (64, 32)], dynamic=True).run()
    assert [plan.symbols["L"] for plan in plans_of(bundle, "dit_stack")] == [(8, 8, 16)] * 2


def test_turing_gets_fp16_and_leaves_the_rest_to_torch(tmp_path: Path) -> None:
    plan = planned(tmp_path / "b", targets=["sm75"], with_weights=False)
    assert plan.precision == {"text_encoder": "fp32", "transformer": "fp16", "vae": "fp16"}
    without_plans = {component.name for component in plan.components if not component.plans}
    assert without_plans == {
        *("text_stack", "dit_time", "dit_head", "vae_encoder_first", "vae_encoder_next")
    }


# -- Damage ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("component", ["dit_stack", "vae_decoder_first"])
def test_only_a_damaged_plan_is_built_again(
    folder: Path, built: Path, compiled: list[str], component: str
) -> None:
    """A byte flipped through the hard link damages the cache's file: neither is taken for good."""
    plan = plans_of(Bundle.load(folder), component)[0].file
    whole, before = contents(folder), inodes(folder)
    flip_byte(folder / plan)
    try:
        with pytest.raises(BundleError, match=Path(plan).name):
            Bundle.load(folder)
        planned(folder).run()
        assert contents(folder) == whole
        changed = {name for name, inode in inodes(folder).items() if inode != before[name]}
        assert changed == {plan, MANIFEST, BUILD_LOG}
        assert compiled == [component]
    finally:
        planned(built).run(check=True)


def test_a_flipped_byte_under_an_old_mtime_is_found_by_check(folder: Path, built: Path) -> None:
    plan = plans_of(Bundle.load(folder), "dit_stack")[0].file
    whole = contents(folder)
    flip_byte(folder / plan, keep_mtime=True)
    try:
        with pytest.raises(BundleError, match=Path(plan).name):
            Bundle.load(folder)
        planned(folder).run(check=True)
        assert contents(folder) == whole
    finally:
        planned(built).run(check=True)


@pytest.mark.slow
def test_a_killed_build_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """kill -9 at 20 random moments; each build that gets to its end has nothing from the reference.

    Every graph, weight, plan and the manifest are those of a build that nobody disturbed, which had
    a plan cache of its own. A build goes on where the last one was killed, so moments within a
    quarter of the whole time fall all over it.
    """
    reference, out, private = tmp_path / "reference", tmp_path / "b", tmp_path / "cache"
    undisturbed = start_build(reference, tmp_path / "reference-cache")
    start = time.monotonic()
    undisturbed.join()
    duration = time.monotonic() - start
    expected = contents(reference)
    assert {name.split("/")[0] for name in expected} == {
        *("graphs", "plans", "tokenizer", "weights", MANIFEST)
    }
    moments = random.Random(0)
    kills = 0
    while kills < KILLS:
        build = start_build(out, private)
        build.join(moments.uniform(0, duration / 4))
        build.kill()
        build.join()
        kills += build.exitcode == -signal.SIGKILL
        if kills == KILLS:
            build = start_build(out, private)
            build.join()
        if build.exitcode == 0:
            found = contents(out)
            assert found.keys() == expected.keys()
            assert [name for name in found if found[name] != expected[name]] == []
            shutil.rmtree(out)
            shutil.rmtree(private)


def start_build(out: Path, cache: Path) -> ForkServerProcess:
    """In a process that has imported everything, and has begun."""
    context = get_context("forkserver")
    context.set_forkserver_preload([__name__])
    build = context.Process(target=build_there, args=(out, cache))
    build.start()
    while not (out / ".lock").exists() and build.is_alive():
        time.sleep(0.005)
    return build


def build_there(out: Path, cache: Path) -> None:
    os.environ["XDG_CACHE_HOME"] = str(cache)
    planned(out).run()


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_ctrl_c_stops_and_the_same_command_goes_on(built: Path, tmp_path: Path, jobs: str) -> None:
    out, private = tmp_path / "b", tmp_path / "cache"
    build = run(out, private, "--jobs", jobs, stderr=subprocess.PIPE)
    while not list((private / "wantrt/plans").glob("*.part")) and build.poll() is None:
        time.sleep(0.002)  # until TensorRT is compiling
    build.send_signal(signal.SIGINT)
    _, said = build.communicate(timeout=20)
    assert build.returncode == 130
    assert said.splitlines()[-1] == "wantrt: stopped; the same command goes on where it stopped"
    finished = {"plans"} if jobs == "2" else set()  # a plan beside the one that was seen
    assert {path.name for path in out.iterdir()} - finished == {"tokenizer", "graphs", BUILD_LOG}
    left = len(planned(out, with_weights=False).missing())
    assert 0 < left < len(planned(out, with_weights=False).pieces)
    shutil.copytree(cache_folder(), private / "wantrt", dirs_exist_ok=True)
    assert run(out, private).wait() == 0
    Bundle.load(out)


def run(out: Path, private_cache: Path, *more: str, **streams: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "--out", str(out), *more],
        env={**os.environ, "XDG_CACHE_HOME": str(private_cache)},
        stdout=subprocess.DEVNULL,
        text=True,
        **streams,
    )


def test_plans_compiled_at_once_are_the_same(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    bundle = planned(tmp_path / "b").run(jobs=2)
    assert contents(bundle.path) == contents(built)


def test_a_plan_that_fails_stops_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    build = cache.build_apart
    begun: list[str] = []

    def fails(flavour, request, *rest) -> None:
        begun.append(request.component.name)
        if len(begun) == 2:
            raise BuildError("no kernel")
        build(flavour, request, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(cache, "build_apart", fails)
        with pytest.raises(BuildError, match="no kernel"):
            planned(tmp_path / "b", with_weights=False).run(jobs=2)
    assert len(begun) <= 3  # what was asked for meanwhile
    assert not list((tmp_path / "cache/wantrt/plans").glob("*.part"))
    with pytest.raises(BundleError, match="unfinished"):
        Bundle.load(tmp_path / "b")


# -- Before the work ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"sizes": [(30, 32)]}, SettingsError, "multiple of 16"),
        ({"frames": [6]}, SettingsError, "nearest: 5 or 9"),
        ({"targets": ["sm90"]}, SettingsError, "sm90"),
        ({"targets": ["sm75", "sm89"], "precision": "bf16"}, SettingsError, "sm75 has no bf16"),
        ({"precision": "fp32"}, SettingsError, "fused attention"),
        ({"precision": "fp8"}, UnsupportedTaskError, "not there yet"),
        ({"precision": "fp16", "sizes": [(1280, 720)], "frames": [81]}, SettingsError, "overflows"),
        ({"weights": "boiled"}, SettingsError, "bound"),
        ({"runtime": "onnxruntime"}, SettingsError, "--size, --frames, --target"),
    ],
    ids=str,
)
def test_bad_input_is_refused_before_any_work(
    tmp_path: Path, changes: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        planned(tmp_path / "b", **changes)
    assert not (tmp_path / "b").exists()


def test_a_build_without_plans_does_not_delete_those_of_a_bundle(folder: Path) -> None:
    before = contents(folder)
    options = {"runtime": "onnxruntime", "targets": (), "sizes": (), "frames": ()}
    with pytest.raises(BuildError, match=r"plans, which this build would delete.*--runtime"):
        planned(folder, **options).run()
    assert contents(folder) == before


def test_too_little_memory_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "available_memory", lambda: 2**29)
    with pytest.raises(BuildError, match=r"1\.0 GiB of memory, and 0\.5 GiB are available"):
        planned(tmp_path / "b").run()
    with pytest.raises(BuildError, match=r"at once takes about 2\.0 GiB .* fewer --jobs"):
        planned(tmp_path / "b").run(jobs=2)
    with pytest.raises(SettingsError, match="jobs is 0"):
        planned(tmp_path / "b").run(jobs=0)
    plans = planned(tmp_path / "b").pieces
    for available, jobs in ((2**40, 4), (int(3.5 * 2**30), 3), (2**29, 1)):
        monkeypatch.setattr(pieces, "available_memory", lambda size=available: size)
        monkeypatch.setattr(pieces.os, "sched_getaffinity", lambda _: range(4))
        assert pieces.fitting_jobs(plans) == jobs
    assert not list((tmp_path / "b").iterdir())


# -- The receipt ----------------------------------------------------------------------------------


def test_a_receipt_holds_until_something_changes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receipt = write_receipt(OPTIONS)
    assert find_done(folder, receipt) is None
    planned(folder).run(receipt=receipt)
    assert find_done(folder, receipt) == folder
    assert write_receipt(OPTIONS) == receipt
    assert write_receipt({**OPTIONS, "stack": 1}) != receipt
    assert write_receipt({**OPTIONS, "checkpoint": None}) is None  # it may come from the network
    monkeypatch.chdir(folder.parent)
    assert find_done(None, receipt) == Path(folder.name)
    os.utime(folder / "graphs/dit_stack.onnx")
    assert find_done(folder, receipt) is None
    planned(folder).run(receipt=receipt)
    (folder / "graphs/stranger").touch()
    assert find_done(folder, receipt) is None


def test_a_receipt_knows_the_files_of_the_checkpoint(tmp_path: Path) -> None:
    weights = tmp_path / "checkpoint/vae/model.safetensors"
    weights.parent.mkdir(parents=True)
    weights.write_bytes(b"1")
    asked = {"checkpoint": tmp_path / "checkpoint"}
    receipt = write_receipt(asked)
    os.utime(weights, ns=(1, 1))
    assert receipt != write_receipt(asked)
