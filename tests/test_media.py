"""Video files: decoded again and compared; refused, interrupted and starved of space for real."""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from wantrt.encoders import gif_durations_ms
from wantrt.errors import MediaError
from wantrt.images import load_image
from wantrt.media import Video, VideoWriter, check_output, read_metadata

METADATA = {"prompt": "a red circle, 红色的圆", "seed": 42, "settings": {"steps": 20}}


def make_frames(num_frames: int = 9, height: int = 64, width: int = 96) -> np.ndarray:
    """A red square that moves over a smooth background. [F, H, W, 3]"""
    y, x = np.mgrid[:height, :width]
    background = np.stack([90 + x, 60 + y, np.full_like(x, 120)], axis=-1).clip(0, 255)
    frames = np.repeat(background[None], num_frames, axis=0).astype(np.uint8)
    for i, frame in enumerate(frames):
        frame[20:40, 8 + 4 * i : 28 + 4 * i] = (220, 30, 40)
    return frames


def psnr(actual: np.ndarray, expected: np.ndarray) -> float:
    mean_square = np.mean((actual.astype(np.float64) - expected) ** 2)
    return float(10 * np.log10(255**2 / mean_square))


def decode_mp4(path: Path) -> np.ndarray:
    av = pytest.importorskip("av")
    with av.open(str(path)) as container:
        return np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])


def names(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def run_python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_mp4_is_what_browsers_play(tmp_path):
    av = pytest.importorskip("av")
    frames = make_frames()
    path = Video(frames, fps=16, metadata=METADATA).save(tmp_path / "new" / "cat.mp4")
    assert psnr(decode_mp4(path), frames) > 35
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        context = stream.codec_context
        assert (stream.codec_context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (stream.frames, stream.average_rate) == (len(frames), 16)
        bt709, limited = 1, 1
        assert context.colorspace == context.color_primaries == context.color_trc == bt709
        assert context.color_range == limited
    contents = path.read_bytes()
    assert contents.index(b"moov") < contents.index(b"mdat"), "the index comes first"
    assert read_metadata(path) == METADATA
    assert names(path.parent) == ["cat.mp4"]


@pytest.mark.parametrize("fps", [15.0, 23.976, 24.0, 30.0])
def test_mp4_frame_rate(tmp_path, fps):
    av = pytest.importorskip("av")
    path = Video(make_frames(), fps=fps).save(tmp_path / "x.mp4")
    with av.open(str(path)) as container:
        assert float(container.streams.video[0].average_rate) == pytest.approx(fps, rel=1e-4)


def test_mp4_pads_odd_sizes(tmp_path):
    frames = make_frames(height=63, width=95)
    decoded = decode_mp4(Video(frames, fps=16).save(tmp_path / "odd.mp4"))
    assert decoded.shape == (9, 64, 96, 3)
    assert psnr(decoded[:, :63, :95], frames) > 35


def test_gif(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    frames = make_frames()
    path = Video(frames, fps=16, metadata=METADATA).save(tmp_path / "cat.gif")
    with image_module.open(path) as gif:
        assert (gif.n_frames, gif.info["loop"]) == (len(frames), 0)
        decoded, durations_ms = [], []
        for i in range(gif.n_frames):
            gif.seek(i)
            decoded.append(np.array(gif.convert("RGB")))
            durations_ms.append(gif.info["duration"])
    assert psnr(np.stack(decoded), frames) > 32
    assert sum(durations_ms) == pytest.approx(1000 * len(frames) / 16, abs=5)
    assert read_metadata(path) == METADATA


def test_gif_durations():
    assert gif_durations_ms(4, 16) == [60, 60, 70, 60]
    assert sum(gif_durations_ms(81, 16)) == 5060
    assert gif_durations_ms(2, 60) == [20, 20]


def test_png_and_folder(tmp_path):
    frames = make_frames(num_frames=3)
    image = Video(frames[:1], fps=16, metadata=METADATA).save(tmp_path / "one.png")
    np.testing.assert_array_equal(load_image(image), frames[0])
    assert read_metadata(image) == METADATA

    folder = Video(frames, fps=16, metadata=METADATA).save(f"{tmp_path}/frames/")
    assert names(folder) == [f"frame_{i:05d}.png" for i in range(3)]
    for i, frame in enumerate(frames):
        np.testing.assert_array_equal(load_image(folder / f"frame_{i:05d}.png"), frame)
    assert read_metadata(folder) == METADATA

    with pytest.raises(MediaError, match="exists"):
        Video(frames, fps=16).save(folder)
    Video(frames[:2], fps=16).save(folder, overwrite=True)
    assert names(folder) == ["frame_00000.png", "frame_00001.png"]
    (folder / "thesis.tex").touch()
    with pytest.raises(MediaError, match="other things than frames"):
        Video(frames, fps=16).save(folder, overwrite=True)
    assert names(tmp_path) == ["frames", "one.png"]


def test_chunks_are_encoded_beside_their_maker(tmp_path):
    frames = make_frames()
    with VideoWriter(tmp_path / "stream.mp4", fps=16) as writer:
        for first in range(0, 9, 4):
            writer.write(frames[first : first + 4])
        assert any(thread.name.startswith("wantrt-encode") for thread in threading.enumerate())
        assert not writer.path.exists(), "it appears when it is whole"
    assert psnr(decode_mp4(writer.path), frames) > 35
    assert not any(thread.name.startswith("wantrt-encode") for thread in threading.enumerate())


def test_existing_file_stays(tmp_path):
    path = tmp_path / "cat.mp4"
    path.write_text("mine")
    video = Video(make_frames(), fps=16)
    with pytest.raises(MediaError, match="--overwrite"):
        video.save(path)
    with pytest.raises(RuntimeError), VideoWriter(path, fps=16, overwrite=True) as writer:
        writer.write(video.frames)
        raise RuntimeError("the denoiser failed")
    assert path.read_text() == "mine"
    assert names(tmp_path) == ["cat.mp4"]
    video.save(path, overwrite=True)
    assert len(decode_mp4(path)) == 9


def test_file_that_appears_meanwhile_stays_and_nothing_is_lost(tmp_path):
    path = tmp_path / "cat.mp4"
    with pytest.raises(MediaError, match="appeared in the meantime") as caught:
        with VideoWriter(path, fps=16) as writer:
            writer.write(make_frames())
            path.write_text("theirs")
    assert path.read_text() == "theirs"
    kept = Path(str(caught.value).rpartition(" ")[2])
    assert len(decode_mp4(kept)) == 9


@pytest.mark.parametrize(
    "name, message",
    [
        ("-", "standard output"),
        ("cat.avi", "no format for '.avi'"),
        ("cat.png", "several frames"),
        ("folder.mp4", "is a folder"),
        ("file.txt/", "is a file"),
        ("file.txt/cat.mp4", "Not a directory"),
        ("/proc/cat.mp4", "cannot write /proc"),
    ],
)
def test_bad_output_is_refused_before_any_work(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file.txt").touch()
    with pytest.raises(MediaError, match=message):
        check_output(name, shape=(9, 64, 96, 3))
    assert names(tmp_path) == ["file.txt", "folder.mp4"]


def test_too_large_for_the_disk(tmp_path):
    with pytest.raises(MediaError, match="MiB left"):
        check_output(tmp_path / "cat.mp4", shape=(10**9, 2160, 3840, 3))
    assert check_output(tmp_path / "cat.mp4", shape=(81, 480, 832, 3)) == tmp_path / "cat.mp4"


def test_full_disk_is_noticed_before_any_work(tmp_path):
    code = "import resource, sys; from wantrt.media import check_output;"
    code += "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)); check_output(sys.argv[1])"
    result = run_python(code, tmp_path / "cat.mp4")
    assert "MediaError: cannot write" in result.stderr
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    "frames",
    [
        np.zeros((1, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((1, 3, 8, 8), np.uint8),
    ],
    ids=["float", "one image", "channels first"],
)
def test_wrong_frames(tmp_path, frames):
    with pytest.raises(MediaError, match=r"uint8 \[F, H, W, 3\]"):
        with VideoWriter(tmp_path / "x.mp4", fps=16) as writer:
            writer.write(frames)
    assert names(tmp_path) == []


def test_no_frames_and_changing_sizes(tmp_path):
    with pytest.raises(MediaError, match="no frames"), VideoWriter(tmp_path / "x.mp4", fps=16):
        pass
    with pytest.raises(MediaError, match="after one of"):
        with VideoWriter(tmp_path / "x.mp4", fps=16) as writer:
            writer.write(make_frames())
            writer.write(make_frames(height=32))
    with pytest.raises(MediaError, match="several frames"):
        with VideoWriter(tmp_path / "x.png", fps=16) as writer:
            writer.write(make_frames(1))
            writer.write(make_frames(1))
    assert names(tmp_path) == []


WRITE_NOISE = """
import os, resource, signal, sys
import numpy as np
from wantrt.media import VideoWriter

path, what_happens = sys.argv[1:]
if what_happens == "disk full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
frames = np.random.default_rng(0).integers(0, 256, (4, 64, 64, 3), np.uint8)
with VideoWriter(path, fps=16) as writer:
    for i in range(50):
        writer.write(frames)
        if what_happens == "ctrl-c" and i == 20:
            assert len(os.listdir(os.path.dirname(path.rstrip("/")))) == 1, "being written"
            os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize(
    "what_happens, name",
    [("ctrl-c", "x.mp4"), ("ctrl-c", "x/"), ("disk full", "x.mp4"), ("disk full", "x.gif")],
)
def test_interrupted_or_starved_leaves_nothing(tmp_path, what_happens, name):
    result = run_python(WRITE_NOISE, f"{tmp_path}/{name}", what_happens)
    if what_happens == "ctrl-c":
        assert result.returncode == -signal.SIGINT, result.stderr
    else:
        assert "MediaError: cannot write" in result.stderr
    assert names(tmp_path) == []


def test_metadata_of_foreign_files(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    image_module.new("RGB", (8, 8)).save(tmp_path / "foreign.png")
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    for name in ("foreign.png", "broken.mp4", "missing.gif"):
        with pytest.raises(MediaError, match="does not say how it was made"):
            read_metadata(tmp_path / name)


def test_load_image(tmp_path):
    image_module = pytest.importorskip("PIL.Image")
    expected = make_frames(1)[0]
    image = image_module.fromarray(expected)
    image.convert("RGBA").save(tmp_path / "alpha.png")
    np.testing.assert_array_equal(load_image(tmp_path / "alpha.png"), expected)

    exif = image_module.Exif()
    exif[0x0112] = 6  # orientation: the camera was turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    assert load_image(tmp_path / "turned.png").shape == (96, 64, 3)

    whole = (tmp_path / "alpha.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "script.png").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("cut.png", "text.png", "script.png", "missing.png"):
        with pytest.raises(MediaError, match="cannot read the image"):
            load_image(tmp_path / name)
