"""The account of a build: every released variant is in it, and every plan finds its process."""

import pytest

from tests.test_build import TINY
from wantrt.bench.build_plans import RELEASED, by_component, children, measure, peak_rss_bytes
from wantrt.config import VARIANTS
from wantrt.manifest import FileRecord
from wantrt.pieces import BuildLog, Built, write_log

COMMAND = (
    f"--variant t2v-1.3b --checkpoint random:0{TINY} --runtime tensorrt-rtx --target sm89 "
    "--no-weights --size 32x32,48x32 --frames 5"
)


def test_every_supported_variant_at_its_official_sizes():
    assert set(RELEASED) == set(VARIANTS) - {"nano", "s2v-14b", "animate-14b"}
    assert RELEASED["ti2v-5b"].endswith("--size 1280x704,704x1280")
    assert RELEASED["vace-1.3b"].endswith("--size 832x480,480x832")


def test_plans_are_added_up_by_component(tmp_path):
    def built(seconds, size):
        files = {f"plans/{seconds}": FileRecord(size=size, sha256="0" * 64)}
        return Built(key="", seconds=seconds, files=files, mtimes=dict.fromkeys(files, 0))

    pieces = {
        "graph dit_stack": built(9.0, 10**9),
        "plan dit_stack 832x480x81": built(1.25, 4_000_000),
        "plan vae_decoder_next 832x480": built(3.0, 10_000_000),
        "plan dit_stack 480x832x81": built(0.5, 2_000_000),
    }
    write_log(tmp_path, BuildLog(checkpoint=None, fingerprint="", pieces=pieces))
    found = by_component(tmp_path, [300 * 2**20, 900 * 2**20, 400 * 2**20])
    assert found == {
        "dit_stack": {
            "plans": 2,
            "seconds": 1.75,
            "longest_s": 1.25,
            "plan_mb": 6.0,
            "peak_rss_mib": 400,
        },
        "vae_decoder_next": {
            "plans": 1,
            "seconds": 3.0,
            "longest_s": 3.0,
            "plan_mb": 10.0,
            "peak_rss_mib": 900,
        },
    }
    assert by_component(tmp_path, []) == {}
    with pytest.raises(ValueError, match="shorter"):
        by_component(tmp_path, [1])


@pytest.mark.slow
def test_a_build_is_measured(tmp_path):
    pytest.importorskip("tensorrt_rtx")
    run = measure([*COMMAND.split(), "--out", str(tmp_path / "bundle")], tmp_path / "cache")
    assert run["plans"] == sum(row["plans"] for row in run["components"].values()) > 0
    assert {"dit_stack", "vae_decoder_next", "text_stack"} <= run["components"].keys()
    for row in run["components"].values():
        assert 0 < row["longest_s"] <= row["seconds"] < run["seconds"]
        assert row["plan_mb"] > 0
        assert row["peak_rss_mib"] > 10
    again = measure([*COMMAND.split(), "--out", str(tmp_path / "bundle")], tmp_path / "cache")
    assert again["pieces_built"] == 0
    assert again["components"] == {}


def test_a_process_that_has_ended_is_none():
    with pytest.raises((OSError, RuntimeError)):
        peak_rss_bytes(2**22 + 1)
    assert children(2**22 + 1) == []
