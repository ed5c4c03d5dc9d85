"""The command line: what it prints where, exit codes, and one clear error for bad input."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from tests.small import SMALL_SETTINGS, copy_bundle, small_bundle, small_checkpoint
from tests.test_build import flip_byte
from wantrt import __version__
from wantrt.cli import main
from wantrt.cli.console import gib
from wantrt.config import SHIPPED, VARIANTS
from wantrt.media import VideoWriter, read_metadata
from wantrt.receipt import write_receipt


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out)


@pytest.fixture
def wantrt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Run a command in this process, in a folder of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*arguments: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["wantrt", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        return Ran(int(exit_.value.code or 0), *capfd.readouterr())

    return run


def refused(ran: Ran, message: str, code: int = 2) -> None:
    """One clear error on stderr, no traceback, nothing on stdout."""
    assert ran.code == code, ran.err
    assert message in " ".join(ran.err.split())
    assert ran.err.startswith("wantrt: error: ")
    assert "Traceback" not in ran.err
    assert ran.out == ""


def generate(wantrt, *arguments: object) -> Ran:
    return wantrt("generate", *arguments, "--bundle", small_bundle(), *SMALL_SETTINGS)


# -- The command itself ---------------------------------------------------------------------------


def test_help_is_quick_and_needs_nothing_heavy() -> None:
    script = (
        "import resource, sys; sys.argv = ['wantrt', '--help']\n"
        "from wantrt.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'numpy', 'onnx', 'onnxruntime', 'av', 'PIL', 'rich', 'safetensors'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "usage = resource.getrusage(resource.RUSAGE_SELF)\n"
        "assert usage.ru_utime + usage.ru_stime < 0.5  # CPU time: the machine may be busy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in ("info", "build", "generate", "verify", "bench"):
        assert name in done.stdout


def test_version(wantrt) -> None:
    assert wantrt("--version").out == f"wantrt {__version__}\n"


def test_unknown_commands_and_options_are_usage_errors(wantrt) -> None:
    refused(wantrt("generat"), "No such command")
    refused(wantrt("generate", "x", "--sede", "1"), "--seed")
    refused(wantrt("generate"), "give a prompt")
    refused(wantrt("generate", "x", "--size", "832-480"), "WIDTHxHEIGHT")
    refused(wantrt("build"), "--variant or --checkpoint")


def test_bench_is_not_there_yet(wantrt) -> None:
    refused(wantrt("bench", "speed"), "No such command 'speed'")


# -- info -----------------------------------------------------------------------------------------


def test_info_lists_machine_runtimes_and_variants(wantrt) -> None:
    text = wantrt("info").out
    for word in ("CPU", "onnxruntime", "tensorrt-rtx", "not yet", *VARIANTS):
        assert word in text
    assert max(map(len, text.splitlines())) <= 100
    about = wantrt("info", "--json").json
    today = {name for name, row in about["variants"].items() if row["today"] == "works"}
    assert set(VARIANTS) - today == {"s2v-14b", "animate-14b"}
    assert about["machine"]["threads"] >= 1


def test_info_of_a_variant_has_all_its_fields(wantrt) -> None:
    refused(wantrt("info", "t2v-a15b"), "did you mean t2v-a14b")
    text = wantrt("info", "t2v-a14b").out
    for word in ("high_noise", "low_noise", "0.875", "75,600", "Wan-AI/Wan2.2-T2V-A14B", "13824"):
        assert word in text
    assert wantrt("info", "14B", "--json").json["num_inference_steps"] == 50
    about = wantrt("info", "vace-14b", "--json").json
    assert about["starts_from"] == "PROMPT [--video] [--mask] [--reference-image]"
    for name in VARIANTS:
        assert wantrt("info", name).code == 0


def test_info_of_a_bundle(wantrt) -> None:
    text = wantrt("info", small_bundle()).out
    for word in ("text_encoder", "dit_stack", "fp32", "tokens"):
        assert word in text
    about = wantrt("info", small_bundle(), "--json").json
    files = [path for path in small_bundle().rglob("*") if path.is_file()]
    known = [path for path in files if path.name not in ("manifest.json", "build-log.json")]
    assert about["bytes"] == sum(path.stat().st_size for path in known)
    refused(wantrt("info", "./nothing-here"), "is not a bundle")


PLANS = ("--variant", "nano", "--runtime", "tensorrt-rtx")  # an option given twice: the last holds


# -- build ----------------------------------------------------------------------------------------


def test_build_prints_where_the_bundle_is(wantrt, tmp_path: Path) -> None:
    arguments = ("build", "--checkpoint", small_checkpoint(), "--precision", "fp32")
    planned = wantrt(*arguments, "--dry-run")
    assert "weights transformer" in planned.out
    assert not (tmp_path / "custom-fp32").exists()
    built = wantrt(*arguments)
    assert (built.code, built.out.splitlines()[-1]) == (0, "custom-fp32")
    assert "pieces built" in built.out
    again = wantrt(*arguments, "--json")
    assert again.json["built"] == []
    assert again.json["bundle"] == "custom-fp32"
    assert "nothing to do" in wantrt(*arguments, "--check").out
    flip_byte(tmp_path / "custom-fp32/graphs/dit_head.onnx", keep_mtime=True)
    refused(wantrt("info", "custom-fp32"), "with --check")
    assert wantrt(*arguments, "--check", "--json").json["built"] == ["graph dit_head"]
    assert wantrt("info", "custom-fp32").code == 0


def test_a_hybrid_is_built_and_shown(wantrt, tmp_path: Path) -> None:
    """Of folders and generated checkpoints; a second build finds out without torch."""
    small = small_checkpoint()
    experts = f"custom@{small}:1.0-0.9,custom@{small}:0.9-0"
    arguments = ("build", "--experts", experts, "--precision", "fp32")
    assert "weights custom-2" in wantrt(*arguments, "--dry-run").out
    assert wantrt(*arguments).out.splitlines()[-1] == "hybrid-fp32"
    assert write_receipt({"experts": experts}) is not None
    assert write_receipt({"experts": experts.replace(str(small), "org/none")}) is None
    assert wantrt(*arguments, "--json").json["built"] == []
    shown = " ".join(wantrt("info", "hybrid-fp32/").out.split())
    assert "hybrid (custom to sigma 0.9, then custom-2)" in shown
    assert "custom: sigma 1 to 0.9, guidance 3.5" in shown
    assert "custom-2: sigma 0.9 to 0" in shown
    assert wantrt("verify", "--bundle", "hybrid-fp32/", "--json").json["ok"]
    refused(wantrt(*arguments, "--variant", "14B"), "leave --checkpoint and --variant out")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--experts", "14B@random:0:1-0.9,1.3B@random:0:0.8-0"], "a gap between the experts"),
        (["--experts", "14B@random:0"], "Write NAME@CHECKPOINT:FROM-TO"),
        (["--variant", "t2v-15b"], "did you mean"),
        (["--variant", "s2v-14b"], "not there yet"),
        (["--variant", "animate-14b", "--checkpoint", "random:0"], "animate"),
        (["--variant", "nano", "--runtime", "tensorrt"], "tensorrt"),
        (["--variant", "nano", "--runtime", "torchh"], "did you mean torch"),
        (["--variant", "nano", "--precision", "fp8"], "not there yet"),
        (["--variant", "nano", "--runtime", "torch", "--size", "64x64"], "TensorRT plans alone"),
        (["--variant", "nano", "--runtime", "torch", "--tf32"], "TensorRT plans alone"),
        (["--variant", "nano", "--size", "64y64"], "not a size"),
        (["--variant", "nano", "--size", ","], "empty"),
        (["--variant", "nano", "--frames", "five"], "not a number of frames"),
        ([*PLANS, "--size", "60x64"], "nearest: 64x64"),
        ([*PLANS, "--frames", "25,26"], "nearest: 25 or 29"),
        ([*PLANS, "--target", "sm89,sm12"], "sm12"),
        ([*PLANS, "--weights", "bakd"], "did you mean baked"),
        (["--checkpoint", "/nowhere/at/all"], "no checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_built_is_one_error(
    wantrt, tmp_path: Path, arguments: list[str], message: str
) -> None:
    ran = wantrt("build", *arguments)
    if "usage" not in ran.err.lower() and "--help" in ran.err:  # the option itself is malformed
        assert ran.code == 2
        assert message in ran.err
    else:
        refused(ran, message, code=1 if message == "tensorrt" else 2)
    if "not there yet" in message:
        assert len(ran.err.splitlines()) == 1
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_a_folder_without_a_checkpoint_says_what_was_looked_for(wantrt, tmp_path: Path) -> None:
    refused(wantrt("build", "--checkpoint", tmp_path), "transformer/config.json")


# -- generate -------------------------------------------------------------------------------------


def test_a_folder_named_like_what_ships_is_no_default(wantrt, tmp_path) -> None:
    for name in SHIPPED:
        (tmp_path / name).mkdir()
    asked = ("generate", "a red circle", "--frames", "1", "--steps", "1", "--out", "x.png")
    assert wantrt(*asked).code == 0
    refused(wantrt(*asked, "--bundle", "nano"), "nano is not a bundle")


def test_generate_ends_with_the_path(wantrt, tmp_path: Path) -> None:
    ran = generate(wantrt, "A red circle moves right!")
    assert ran.code == 0, ran.err
    assert ran.out.splitlines()[-1] == "a-red-circle-moves-right-1.mp4"
    made = tmp_path / "a-red-circle-moves-right-1.mp4"
    metadata = read_metadata(made)
    assert (metadata["prompt"], metadata["seed"]) == ("A red circle moves right!", 1)
    refused(generate(wantrt, "A red circle moves right!"), "--overwrite")
    assert generate(wantrt, "A red circle moves right!", "--overwrite").code == 0


def test_json_is_one_object_and_quiet_is_quiet(wantrt) -> None:
    ran = generate(wantrt, "a cat", "--json", "--quiet", "--out", "x.gif")
    assert ran.err == ""
    (result,) = ran.json["results"]
    assert result["out"] == "x.gif"
    assert result["settings"]["seed"] == 1
    assert result["timings"].keys() == {"text_s", "denoise_s", "decode_s"}
    failed = generate(wantrt, "a cat", "--json", "--out", "x.gif")
    assert failed.code == 2
    assert failed.json["error"]["type"] == "MediaError"


def test_the_same_seed_gives_the_same_file_on_each_runtime(wantrt, tmp_path: Path) -> None:
    for runtime in ("onnxruntime", "torch"):
        for name in ("one", "two"):
            out = f"{runtime}-{name}/"
            assert generate(wantrt, "a cat", "--runtime", runtime, "--out", out).code == 0
        frames = sorted((tmp_path / f"{runtime}-one").iterdir())
        assert len(frames) == 5
        for frame in frames:
            twin = tmp_path / f"{runtime}-two" / frame.name
            assert frame.read_bytes() == twin.read_bytes()


def test_latents_are_saved_and_started_from(wantrt, tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    assert generate(wantrt, "a cat", "--latents", "final.safetensors").code == 0
    assert load_file(tmp_path / "final.safetensors")["latents"].shape == (1, 16, 2, 4, 4)
    refused(generate(wantrt, "a dog", "--latents", "final.safetensors"), "exists")
    start = ("--init-latents", "final.safetensors")
    assert generate(wantrt, "a dog", *start, "--out", "dog.mp4").code == 0
    refused(generate(wantrt, "a dog", "--init-latents", "none.safetensors"), "cannot read latents")
    (tmp_path / "bad.safetensors").write_bytes((2**60).to_bytes(8, "little") + b"{}")
    refused(generate(wantrt, "a dog", "--init-latents", "bad.safetensors"), "cannot read latents")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--size", "30x32"], "nearest: 32x32"),
        (["--size", "832x481"], "nearest: 832x480"),
        (["--frames", "6"], "nearest: 5 or 9"),
        (["--solver", "unipcc"], "did you mean unipc"),
        (["--runtime", "onnx"], "did you mean onnxruntime"),
        (["--residency", "streamed"], "did you mean stream"),
        (["--convention", "diffuser"], "did you mean diffusers"),
        (["--steps", "0"], "num_inference_steps"),
        (["--guidance-scale-2", "3"], "one expert"),
        (["--flow-shift", "-1"], "flow_shift"),
        (["--seed", "-1"], "seed"),
        (["--out", "-"], "standard output"),
        (["--out", "x.avi"], "no format"),
        (["--out", "x.png"], "several frames"),
        (["--out", "blocked/x.mp4"], "cannot write"),
        (["--bundle", "nothing-here"], "not a bundle"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_error_and_no_file(
    wantrt, tmp_path: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "blocked").write_text("a file where a folder should be")
    settings = ["--bundle", str(small_bundle()), *SMALL_SETTINGS]
    refused(wantrt("generate", "a cat", *settings, *arguments), message)
    assert {path.name for path in tmp_path.iterdir()} <= {"blocked", "cache"}


def test_residency_is_asked_for_by_name(wantrt, tmp_path: Path) -> None:
    videos = []
    for options in (
        [],
        ["--residency", "phase"],
        ["--residency", "stream", "--text-encoder", "cpu"],
    ):
        out = f"{len(videos)}.gif"
        ran = generate(wantrt, "a cat", "--runtime", "torch", "--out", out, *options)
        assert ran.code == 0, ran.err
        videos.append((tmp_path / out).read_bytes())
    assert videos[0] == videos[1] == videos[2]


def test_memory_is_shown_for_every_size_and_residency(wantrt) -> None:
    (size, *_) = wantrt("info", small_bundle(), "--json").json["sizes"]
    assert list(size["memory"]) == ["resident", "phase", "stream"]
    for memory in size["memory"].values():
        parts = ("weights", "scratch", "caches", "buffers")
        assert memory["total_bytes"] == sum(memory[f"{part}_bytes"] for part in parts)
    text = wantrt("info", small_bundle()).out
    for word in ("residency", "scratch", "caches", "buffers", "total", "stream"):
        assert word in text


def test_an_empty_prompt_is_warned_of(wantrt) -> None:
    ran = generate(wantrt, "")
    assert ran.code == 0
    assert "wantrt: warning: the prompt is empty" in ran.err
    assert ran.out.splitlines()[-1] == "video-1.mp4"


def test_a_long_prompt_is_truncated_and_said_once(wantrt) -> None:
    ran = generate(wantrt, "red " * 600, "--out", "x.mp4")
    assert ran.code == 0
    assert ran.err.count("its end is ignored") == 1


def test_a_damaged_bundle_is_one_error(wantrt, tmp_path: Path) -> None:
    folder = copy_bundle(tmp_path)
    (folder / "weights/vae.safetensors").unlink()
    refused(wantrt("generate", "a cat", "--bundle", folder), "lacks weights/vae.safetensors")
    refused(wantrt("verify", "--bundle", folder), "lacks weights/vae.safetensors")
    refused(wantrt("info", folder), "lacks weights/vae.safetensors")


def test_a_bf16_bundle_says_what_onnxruntime_needs(wantrt) -> None:
    ran = wantrt("generate", "x", "--bundle", small_bundle("bf16"), "--runtime", "onnxruntime")
    refused(ran, "wantrt build --runtime onnxruntime", code=1)


def test_ctrl_c_leaves_no_file(wantrt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = VideoWriter.write

    def write_and_interrupt(self: VideoWriter, frames: np.ndarray) -> None:
        write(self, frames)
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "write", write_and_interrupt)
    ran = generate(wantrt, "a cat")
    assert ran.code == 130
    assert "interrupted" in ran.err
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


def test_debug_shows_where(wantrt) -> None:
    ran = wantrt("generate", "a cat", "--bundle", small_bundle(), "--size", "30x32", "--debug")
    assert ran.code == 2
    assert "Traceback" in ran.err


# -- generate --prompts ---------------------------------------------------------------------------


def test_one_failure_does_not_stop_the_rest(wantrt, tmp_path: Path) -> None:
    lines = [
        "a cat",
        "",
        '{"prompt": "a dog", "seed": 7, "steps": 1, "out": "dog.gif"}',
        '{"prompt": "a dog", "size": "30x32"}',
        '{"prompt": "a dog", "sede": 1}',
        '{"prompt": "a dog", "seed": "one"}',
        '{"seed": 1}',
        "{not json",
        '{"prompt": "a bird", "out": "dog.gif"}',
    ]
    (tmp_path / "prompts.txt").write_text("\n".join(lines))
    ran = wantrt(
        *("generate", "--prompts", "prompts.txt", "--bundle", small_bundle(), *SMALL_SETTINGS),
        *("--out", "videos", "--json"),
    )
    assert ran.code == 1
    results = ran.json["results"]
    assert [result.get("out") for result in results] == [
        "videos/a-cat-1.mp4",
        "dog.gif",
        *6 * [None],
    ]
    assert results[1]["settings"]["seed"] == 7
    errors = " ".join(result["error"]["message"] for result in results[2:])
    for message in (
        "nearest: 32x32",
        "line 5: unknown field 'sede'; did you mean seed",
        "give a int",
        "prompt, a string, is missing",
        "line 8: not JSON",
        "would be written twice",
    ):
        assert message in errors
    assert (tmp_path / "videos/a-cat-1.mp4").is_file()
    assert (tmp_path / "dog.gif").is_file()


def test_a_file_of_prompts_must_hold_some(wantrt, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n\n")
    refused(wantrt("generate", "--prompts", "empty.txt", "--bundle", small_bundle()), "no prompt")
    refused(wantrt("generate", "--prompts", "none.txt", "--bundle", small_bundle()), "cannot read")
    refused(wantrt("generate", "x", "--prompts", "empty.txt"), "give a prompt")


# -- verify ---------------------------------------------------------------------------------------


def test_verify_prints_every_component(wantrt) -> None:
    ran = wantrt("verify", "--bundle", small_bundle())
    assert ran.code == 0, ran.err
    assert "dit_stack" in ran.out
    assert "is what its checkpoint says" in ran.out
    report = wantrt("verify", "--bundle", small_bundle(), "--runtime", "torch", "--json").json
    assert report["ok"]
    assert len(report["components"]) == 12


def test_sizes_are_for_people() -> None:
    sizes = [12, 3 * 2**19, 1012 * 2**20, 1100 * 2**30]
    assert [gib(size) for size in sizes] == ["12 B", "1.5 MiB", "1012 MiB", "1100 GiB"]
