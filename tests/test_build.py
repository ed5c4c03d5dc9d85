"""A build: the same bytes whatever happened on the way, nothing twice, nobody else's files lost."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.small import copy_bundle, small_bundle, small_checkpoint
from wantrt.build import open_bundle, plan_build
from wantrt.bundle import BUILD_LOG, MANIFEST, Bundle
from wantrt.config import SHIPPED
from wantrt.errors import (
    BuildError,
    BundleError,
    CheckpointError,
    RuntimeUnavailableError,
    SettingsError,
    UnsupportedTaskError,
)
from wantrt.folder import locked
from wantrt.pieces import read_log

TINY = (
    ":dim=48,ffn_dim=80,num_heads=2,num_layers=2,vae.encoder_dim=8,vae.decoder_dim=8,"
    + ",".join(
        f"text_encoder.{name}"
        for name in (
            "vocab_size=80",
            "dim=32",
            "attention_dim=32",
            "ffn_dim=32",
            "num_heads=2",
            "num_layers=1",
        )
    )
)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a bundle but the log, which says what this machine did."""
    files = (path for path in folder.rglob("*") if path.is_file() and path.name != BUILD_LOG)
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def inodes(folder: Path) -> dict[str, tuple[int, int]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    status = {path.relative_to(folder).as_posix(): path.stat() for path in files}
    return {name: (s.st_ino, s.st_mtime_ns) for name, s in status.items()}


def rebuild(folder: Path, **options: bool) -> Bundle:
    return plan_build(str(small_checkpoint()), out=folder, precision="fp32").run(**options)


def flip_byte(path: Path, keep_mtime: bool = False) -> None:
    status, content = path.stat(), bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    if keep_mtime:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_a_bundle_holds_everything_and_its_hashes_agree() -> None:
    bundle = Bundle.load(small_bundle())
    bundle.check_hashes()
    assert bundle.variant.name == "custom"
    assert bundle.precision == {"text_encoder": "fp32", "transformer": "fp32", "vae": "fp32"}
    assert bundle.stack == {"text_stack": 2, "dit_stack": 2}
    assert bundle.tokenizer.is_file()
    for part in bundle.precision:
        for component in bundle.components(part):
            assert bundle.graph(component.name, part).is_file()
            names = {name for instance in component.instances for name in instance.values()}
            assert names <= bundle.weights(part).keys()


def test_the_same_build_gives_the_same_bytes(tmp_path: Path) -> None:
    plan_build(str(small_checkpoint()), out=tmp_path / "b", precision="fp32").run()
    assert contents(tmp_path / "b") == contents(small_bundle())


def test_a_second_build_touches_nothing(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    before = inodes(folder)
    rebuild(folder)
    rebuild(folder, check=True)
    assert inodes(folder) == before


def test_an_interrupted_build_goes_on(tmp_path: Path) -> None:
    """Stop at one progress report after the other; what was finished is not made again."""
    folder = tmp_path / "b"

    def stop_after(reports: int) -> Callable[[str, int, int], None]:
        count = 0

        def progress(what: str, done: int, total: int) -> None:
            nonlocal count
            count += 1
            if count > reports:
                raise KeyboardInterrupt

        return progress

    for reports in range(1, 40, 4):
        plan = plan_build(str(small_checkpoint()), out=folder, precision="fp32")
        before = len(plan.missing())
        try:
            plan.run(progress=stop_after(reports))
        except KeyboardInterrupt:
            assert not (folder / MANIFEST).exists()
            assert not (folder / ".lock").exists()
            assert len(plan.missing()) <= before
            with pytest.raises(BundleError):
                Bundle.load(folder)
    rebuild(folder)
    assert contents(folder) == contents(small_bundle())


@pytest.mark.slow
def test_a_killed_build_goes_on(tmp_path: Path) -> None:
    """kill -9 as soon as the first weights are there; a leftover of writing is removed."""
    folder = tmp_path / "b"
    script = (
        "import sys; from wantrt.build import plan_build; "
        "plan_build(sys.argv[1], out=sys.argv[2], precision='fp32').run()"
    )
    build = subprocess.Popen([sys.executable, "-c", script, str(small_checkpoint()), str(folder)])
    while not list(folder.glob("weights/*.safetensors")) and build.poll() is None:
        time.sleep(0.005)
    build.send_signal(signal.SIGKILL)
    build.wait()
    (folder / "weights" / ".vae.safetensors.partial").write_bytes(b"half")
    rebuild(folder)
    assert contents(folder) == contents(small_bundle())


@pytest.mark.parametrize("keep_mtime", [False, True], ids=["touched", "mtime kept"])
def test_only_damaged_weights_are_built_again(tmp_path: Path, keep_mtime: bool) -> None:
    folder = copy_bundle(tmp_path)
    before = inodes(folder)
    flip_byte(folder / "weights/vae.safetensors", keep_mtime)
    rebuild(folder, check=True)
    assert contents(folder) == contents(small_bundle())
    changed = {name for name, inode in inodes(folder).items() if inode != before[name]}
    assert changed == {"weights/vae.safetensors", MANIFEST, BUILD_LOG}


def test_only_a_damaged_graph_is_built_again(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    before = inodes(folder)
    flip_byte(folder / "graphs/dit_stack.onnx")
    with pytest.raises(BundleError, match="dit_stack"):
        Bundle.load(folder)
    rebuild(folder)
    assert contents(folder) == contents(small_bundle())
    changed = {name for name, inode in inodes(folder).items() if inode != before[name]}
    assert changed == {"graphs/dit_stack.onnx", MANIFEST, BUILD_LOG}


def test_missing_and_foreign_files_are_mended(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    (folder / "weights/transformer.safetensors").unlink()
    (folder / "graphs/old.onnx").write_bytes(b"")
    rebuild(folder)
    assert contents(folder) == contents(small_bundle())


def test_a_bundle_without_its_log_is_built_again_to_the_same_bytes(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    (folder / BUILD_LOG).unlink()
    rebuild(folder)
    assert contents(folder) == contents(small_bundle())


def test_a_log_cannot_make_a_build_delete_what_is_not_its_own(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    (tmp_path / "victim").write_bytes(b"mine")
    log = (folder / BUILD_LOG).read_text()
    (folder / BUILD_LOG).write_text(log.replace("graphs/dit_stack.onnx", "../victim"))
    rebuild(folder)
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert contents(folder) == contents(small_bundle())


@pytest.mark.parametrize("log", ["", "[]", "[" * 10**5], ids=["empty", "other", "deep"])
def test_a_log_that_cannot_be_read_is_none(tmp_path: Path, log: str) -> None:
    folder = copy_bundle(tmp_path)
    (folder / BUILD_LOG).write_text(log)
    assert read_log(folder) is None
    rebuild(folder)
    assert contents(folder) == contents(small_bundle())


def test_another_precision_in_the_same_folder_replaces_what_differs(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    bundle = plan_build(str(small_checkpoint()), out=folder, precision="bf16").run()
    assert set(bundle.precision.values()) == {"bf16"}
    assert contents(folder) == contents(small_bundle("bf16"))


def test_two_builds_on_one_folder_exclude_each_other(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    with locked(folder), pytest.raises(BuildError, match=f"pid {os.getpid()}"):
        rebuild(folder)


def test_planning_writes_nothing(tmp_path: Path) -> None:
    plan = plan_build(str(small_checkpoint()), out=tmp_path / "b")
    assert len(plan.missing()) == len(plan.pieces)
    assert not (tmp_path / "b").exists()


def test_other_peoples_folders_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("five years")
    with pytest.raises(BuildError, match="holds other things"):
        rebuild(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "five years"
    with pytest.raises(BuildError, match="is a file"):
        rebuild(tmp_path / "thesis.txt")
    with pytest.raises(BuildError, match="cannot write into"):
        rebuild(tmp_path / "thesis.txt" / "below")


def test_a_bundle_of_another_checkpoint_stays_as_it_is(tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    with pytest.raises(BuildError, match="another checkpoint"):
        plan_build(f"random:1{TINY}", "t2v-1.3b", folder).run()
    assert contents(folder) == contents(small_bundle())


def test_a_full_disk_is_found_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(1, 1, 0))
    with pytest.raises(BuildError, match="0 MiB are free"):
        rebuild(tmp_path / "b")
    assert not list((tmp_path / "b").iterdir())


def test_experts_of_equal_dimensions_share_their_graphs(tmp_path: Path) -> None:
    bundle = plan_build(f"random:0{TINY}", "t2v-a14b", tmp_path / "b", precision="fp32").run()
    assert set(bundle.precision) == {"text_encoder", "high_noise", "low_noise", "vae"}
    assert bundle.graph("dit_stack", "high_noise") == bundle.graph("dit_stack", "low_noise")
    high, low = bundle.weights("high_noise"), bundle.weights("low_noise")
    assert high.keys() == low.keys()
    assert not high["patch.proj.weight"].equal(low["patch.proj.weight"])


def test_stack_and_weights_as_asked(tmp_path: Path) -> None:
    plan = plan_build(f"random:0{TINY}", "t2v-1.3b", tmp_path / "b", stack=1, with_weights=False)
    bundle = plan.run()
    assert bundle.stack["dit_stack"] == 1
    assert not (tmp_path / "b/weights").exists()
    with pytest.raises(BundleError, match="--no-weights"):
        bundle.weights("transformer")
    with pytest.raises(SettingsError, match="does not divide 2 layers"):
        plan_build(f"random:0{TINY}", "t2v-1.3b", stack=3)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"runtime": "onnxruntime", "precision": "bf16"}, SettingsError, "Take fp32"),
        ({"runtime": "onnxruntime", "precision": "fp16"}, SettingsError, "Take fp32"),
        ({"precision": "fp8"}, UnsupportedTaskError, "not there yet"),
        ({"precision": "bf61"}, SettingsError, "did you mean bf16"),
        ({"runtime": "onnxruntme"}, SettingsError, "did you mean onnxruntime"),
        ({"variant": "s2v-14b", "checkpoint": "random:0"}, UnsupportedTaskError, "s2v"),
        ({"variant": "14C", "checkpoint": "random:0"}, SettingsError, "[Dd]id you mean 14b"),
        ({"checkpoint": "/nowhere/at/all"}, CheckpointError, "no checkpoint"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_refused_before_any_work(
    options: dict[str, str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as raised:
        plan_build(**{"checkpoint": str(small_checkpoint()), **options})
    assert not isinstance(raised.value, RuntimeUnavailableError)


def test_a_folder_named_like_what_ships_is_taken_when_asked_for(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nano").mkdir()
    assert open_bundle().variant.name == "nano"
    with pytest.raises(BundleError, match="nano is not a bundle"):
        open_bundle("nano")


@pytest.mark.parametrize("name", SHIPPED)
def test_what_ships_is_built_once(name: str) -> None:
    first = open_bundle(name)
    before = inodes(first.path)
    assert open_bundle(name).path == first.path
    assert inodes(first.path) == before
    assert first.variant.name == name
    flip_byte(first.path / "graphs/dit_stack.onnx")
    assert open_bundle(name).fingerprint == first.fingerprint
