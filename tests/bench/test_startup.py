"""Fresh processes: moments that add up, a file cache that is really emptied, errors told."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest

from tests.bench.commands import ran, refusal
from tests.small import SMALL_SETTINGS, small_bundle
from wantrt.bench import startup
from wantrt.bench.startup import cached_bytes, drop_cached, start_process
from wantrt.errors import ExecutionError

SETTINGS = {"prompt": "x", "size": (32, 32), "num_frames": 1, "num_inference_steps": 1, "seed": 0}


def asked(**changes):
    given = {"bundle": str(small_bundle()), "runtime": "torch", "settings": SETTINGS}
    return given | {"arrays": None, "load": {}, "requests": 2} | changes


def test_a_process_tells_where_its_time_went():
    told = start_process(asked())
    for name in ("python_s", "import_wantrt_s", "import_s", "load_s", "first_s", "second_s"):
        assert told[name] > 0
    assert told["import_s"] > told["import_wantrt_s"]  # torch is imported with the pipeline
    parts = told["python_s"] + told["import_s"] + told["load_s"] + told["first_s"]
    assert told["to_first_video_s"] == pytest.approx(parts)
    assert told["peak_rss_bytes"] > 2**26
    files = set(told["files"])
    assert any("libtorch" in name for name in files)
    assert any(name.endswith("wantrt/runtime/pipeline.py") for name in files)
    assert any(name.endswith(".pyc") for name in files)


def test_loading_alone():
    told = start_process(asked(requests=0))
    assert told["load_s"] > 0
    assert not {"first_s", "second_s", "to_first_video_s"} & set(told["numbers"])


def test_the_error_of_a_failed_process_is_told():
    with pytest.raises(ExecutionError, match=r"failed: wantrt.*BundleError: /nowhere is not a b"):
        start_process(asked(bundle="/nowhere"))


def test_images_reach_the_pipeline(tmp_path):
    """This one takes none, and says so."""
    np.savez(tmp_path / "source.npz", image=np.zeros((32, 32, 3), np.uint8))
    with pytest.raises(ExecutionError, match="takes no --image"):
        start_process(asked(arrays=str(tmp_path / "source.npz")))


def test_a_dropped_file_is_read_from_the_disk_again(tmp_path):
    told = subprocess.run(
        ["stat", "-f", "-c", "%T", str(tmp_path)], capture_output=True, text=True, check=True
    )
    if told.stdout.strip() in ("tmpfs", "ramfs", "overlayfs"):
        pytest.skip("files of this folder lie in memory, or are mapped by another system")
    path = tmp_path / "file"
    path.write_bytes(os.urandom(2**22))
    path.read_bytes()
    descriptor = os.open(path, os.O_RDONLY)
    try:
        assert cached_bytes(descriptor) == 2**22
        assert drop_cached([path, tmp_path / "nothing"]) == 0.0
        assert cached_bytes(descriptor) == 0
        os.pread(descriptor, 1, 0)
        assert 0 < cached_bytes(descriptor) <= 2**22
    finally:
        os.close(descriptor)


def test_an_empty_file_has_nothing_to_drop(tmp_path):
    (tmp_path / "empty").touch()
    assert drop_cached([tmp_path / "empty"]) == 0.0


def test_the_command(tmp_path, monkeypatch, capsys):
    """Two states of the cache; the processes are made up, but for one."""
    told = start_process(asked(requests=1))
    dropped = []
    monkeypatch.setattr(startup, "start_process", lambda given: told)
    monkeypatch.setattr(startup, "drop_cached", lambda paths: dropped.append(paths) or 0.25)
    code = ran(
        *("startup", "--bundle", small_bundle(), "--runtime", "torch", *SMALL_SETTINGS),
        *("--cache", "warm,cold", "--runs", 2, "--out", tmp_path / "results"),
    )
    assert code == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(len(line) <= 100 for line in lines if "│" in line)
    result = json.loads((tmp_path / "results" / "startup.json").read_text())
    warm, cold = result["rows"]
    assert (warm["cache"], cold["cache"]) == ("warm", "cold")
    assert "bundle_kept_fraction" not in warm
    assert cold["bundle_kept_fraction"] == cold["library_kept_fraction"] == 0.25
    assert warm["load_s"]["median"] == round(told["load_s"], 4)
    own, libraries = dropped[0], dropped[1]
    assert sum(path.stat().st_size for path in own) == warm["bundle_bytes"]
    assert Path(small_bundle(), "manifest.json").resolve() in own
    assert not set(own) & set(libraries)
    assert any("libtorch" in path.name for path in libraries)
    assert len(dropped) == 2 * 2  # before each of the cold processes


def test_processes_that_ended_are_kept(tmp_path, monkeypatch):
    """After an interruption in the second that counts; the one that warms does not."""
    numbers = {"python_s": 1.0, "load_s": 2.0}
    left = iter([{"files": [], "numbers": list(numbers), **numbers}] * 2)

    def start(given):
        if (told := next(left, None)) is None:
            raise KeyboardInterrupt
        return told

    monkeypatch.setattr(startup, "start_process", start)
    given = ("--bundle", small_bundle(), "--runtime", "torch", *SMALL_SETTINGS, "--runs", 3)
    assert ran("startup", *given, "--out", tmp_path) == 130
    (row,) = json.loads((tmp_path / "startup.json").read_text())["rows"]
    assert (row["load_s"]["median"], row["load_s"]["runs"]) == (2.0, 1)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ("--cache warm,hot", "unknown state of the file cache 'hot'"),
        ("--requests 3", "3 is not in the range"),
        ("--bundle /nowhere", "is not a bundle"),
        ("--frames 3", "not 4n + 1"),
    ],
)
def test_bad_input_is_refused(arguments, said, tmp_path, capsys):
    assert said in refusal("startup", arguments, tmp_path, capsys)
