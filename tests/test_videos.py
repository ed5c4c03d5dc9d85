"""Video files, folders of frames and arrays: written here for real, and read back."""

import os
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from wantrt import videos
from wantrt.errors import MediaError
from wantrt.media import Video
from wantrt.videos import list_frames, natural_order, open_mask, open_video


def frame_of(i, width=64, height=48):
    """A grey whose level says which frame it is, with a red corner at the top left."""
    frame = np.full((height, width, 3), 40 + 10 * i, np.uint8)
    frame[: height // 2, : width // 2] = (230, 30, 30)
    return frame


def film(num_frames=20, **size):
    return np.stack([frame_of(i, **size) for i in range(num_frames)])


def order_of(frames):
    """Which frames they are, by the level of the corner at the bottom right."""
    return [round((int(frame[-8:, -8:].mean()) - 40) / 10) for frame in frames]


def write(path, stamps, codec="libx264", rate=30, frames=None):
    """A video with frames shown at the given multiples of 1 / rate."""
    frames = film(len(stamps)) if frames is None else frames
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.bit_rate = 10_000_000
        for stamp, pixels in zip(stamps, frames, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = stamp, Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize(
    "name, codec",
    [
        ("x.mp4", "libx264"),
        ("x.mov", "libx264"),
        ("x.mkv", "libx264"),
        ("x.webm", "libvpx-vp9"),
        ("x.avi", "mpeg4"),
        ("X.MP4", "mpeg4"),
    ],
)
def test_video_files(tmp_path, name, codec):
    footage = open_video(write(tmp_path / name, range(20), codec))
    assert (len(footage), footage.size, footage.fps) == (20, (64, 48), pytest.approx(30, rel=1e-3))
    steps = np.diff([float(time) for time in footage.times])
    np.testing.assert_allclose(steps, 1 / 30, atol=1e-3)
    frames = footage.read()
    assert (frames.shape, frames.dtype) == ((20, 48, 64, 3), np.uint8)
    assert order_of(frames) == list(range(20))
    red = frames[:, 4:20, 4:28].astype(int).mean(axis=(1, 2))
    assert np.all(red[:, 0] > 190)
    assert np.all(red[:, 1:] < 80)


def test_only_what_is_asked_for_is_kept(tmp_path):
    footage = open_video(write(tmp_path / "x.mp4", range(20)))
    assert order_of(footage.read([0, 3, 3, 19])) == [0, 3, 3, 19]
    assert footage.read([]).shape == (0, 48, 64, 3)


def test_our_own_videos_and_gifs(tmp_path):
    for name in ("x.mp4", "x.gif"):
        path = Video(film(10), fps=16).save(tmp_path / name)
        footage = open_video(path)
        assert footage.fps == pytest.approx(16, rel=0.01)
        assert order_of(footage.read()) == list(range(10))


def test_frame_rates_change_by_time(tmp_path):
    fast = open_video(write(tmp_path / "fast.mp4", range(20), rate=32))
    assert fast.at_rate(16) == list(range(0, 20, 2))
    assert fast.at_rate(64) == [i // 2 for i in range(40)]
    assert len(fast.at_rate(24)) == 15
    uneven = open_video(write(tmp_path / "uneven.mkv", [0, 1, 2, 12, 13, 14], rate=32))
    assert uneven.at_rate(16) == [0, 2, 2, 2, 2, 2, 3, 5]
    assert open_video(film(5)).at_rate(16) == [0, 1, 2, 3, 4], "frames without a rate"


def test_a_phones_rotation(tmp_path):
    """The matrix in the header, written by hand: x' = -y, y' = x turns the picture clockwise."""
    path = write(tmp_path / "x.mp4", range(5))
    content = bytearray(path.read_bytes())
    at = content.index(b"tkhd") + 44
    one, minus_one = (1 << 16).to_bytes(4, "big"), (-(1 << 16)).to_bytes(4, "big", signed=True)
    zero = bytes(4)
    content[at : at + 20] = zero + one + zero + minus_one + zero
    path.write_bytes(content)
    footage = open_video(path)
    assert footage.size == (48, 64)
    red = footage.read()[0, ..., 0].astype(int) - footage.read()[0, ..., 2]
    assert red[4:28, 28:44].min() > 100, "the corner has gone to the top right"
    assert red[36:, :].max() < 60


def test_natural_order(tmp_path):
    names = ["frame_10.png", "frame_9.png", "Frame_1.PNG", "frame_010b.png", "a.png", "2.png"]
    assert sorted(names, key=natural_order) == [
        "2.png",
        "a.png",
        "Frame_1.PNG",
        "frame_9.png",
        "frame_10.png",
        "frame_010b.png",
    ]


def test_folder_of_frames(tmp_path):
    for i in range(12):
        suffix = ("png", "jpg", "bmp")[i % 3]
        Image.fromarray(frame_of(i)).save(tmp_path / f"f{i}.{suffix}", quality=95)
    (tmp_path / "notes.txt").write_text("not a frame")
    (tmp_path / ".f3.png").write_text("an editor's leftover")
    footage = open_video(str(tmp_path))
    assert (len(footage), footage.size, footage.fps) == (12, (64, 48), None)
    assert order_of(footage.read()) == list(range(12))
    assert order_of(footage.read([2, 2, 7])) == [2, 2, 7]


def test_links_do_not_lead_out_of_a_folder(tmp_path):
    inside, outside = tmp_path / "frames", tmp_path / "private"
    inside.mkdir()
    outside.mkdir()
    for folder in (inside, outside):
        Image.fromarray(frame_of(0)).save(folder / "0.png")
    (inside / "1.png").symlink_to("0.png")
    assert [path.name for path in list_frames(inside)] == ["0.png", "1.png"]
    (inside / "2.png").symlink_to("../private/0.png")
    with pytest.raises(MediaError, match=r"2\.png is a link that leads out of its folder; copy"):
        open_video(inside)
    (inside / "2.png").unlink()
    (inside / "3.png").symlink_to("3.png")
    with pytest.raises(MediaError, match=r"3\.png"):
        open_video(inside).read()


def test_images_and_arrays(tmp_path):
    Image.fromarray(frame_of(3)).save(tmp_path / "x.png")
    assert order_of(open_video(tmp_path / "x.png").read()) == [3]
    assert order_of(open_video(film(3)).read()) == [0, 1, 2]
    assert order_of(open_video(frame_of(4)).read()) == [4]
    pictures = [Image.fromarray(frame_of(2)), tmp_path / "x.png"]
    assert order_of(open_video(pictures).read()) == [2, 3]


def test_masks(tmp_path):
    mask = np.zeros((5, 48, 64), np.uint8)
    for i in range(5):
        mask[i, :, : 8 * i] = 255
        Image.fromarray(mask[i]).save(tmp_path / f"{i}.png")
    np.testing.assert_array_equal(open_mask(tmp_path).read_mask(), mask)
    np.testing.assert_array_equal(open_mask(tmp_path / "3.png").read_mask(), mask[3:4])
    np.testing.assert_array_equal(open_mask(mask).read_mask([1, 2]), mask[1:3])
    np.testing.assert_array_equal(open_mask(mask[2] > 0).read_mask(), mask[2:3])
    film_of_mask = np.repeat(mask[..., None], 3, axis=-1)
    path = write(tmp_path / "mask.mp4", range(5), frames=film_of_mask)
    assert np.mean((open_mask(path).read_mask() > 127) == (mask > 127)) > 0.99


def test_refused(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "nothing.mp4").touch()
    os.mkfifo(tmp_path / "pipe.mp4")
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), "s16", "mono")
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
    for name, reason in [
        ("empty", "the folder has no images"),
        ("missing.mp4", "there is no such file or folder"),
        ("pipe.mp4", "it is not a file"),
        ("text.mp4", "Invalid data"),
        ("nothing.mp4", "Invalid data"),
        ("sound.mkv", "it has no picture"),
    ]:
        with pytest.raises(MediaError, match=f"cannot read the video .*{name}: {reason}") as caught:
            open_video(tmp_path / name)
        assert "\n" not in str(caught.value)
    with pytest.raises(MediaError, match="the video has no frames"):
        open_video([])
    with pytest.raises(MediaError, match=r"uint8 \[H, W, 3\]"):
        open_video(film(2).astype(np.float32))


def test_a_playlist_opens_no_other_file(tmp_path):
    """FFmpeg would follow it to any file or address that it names."""
    secret = write(tmp_path / "secret.mp4", range(5))
    for name, text in [
        ("x.m3u8", f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n"),
        ("x.txt", f"ffconcat version 1.0\nfile {secret.name}\n"),
        ("x.mp4", f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{secret}\n#EXT-X-ENDLIST\n"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(MediaError, match="cannot read the video"):
            open_video(tmp_path / name)
    for address in ("http://127.0.0.1:9/x.mp4", f"file:{secret}", f"concat:{secret}"):
        with pytest.raises(MediaError, match="no such file"):
            open_video(address)


@pytest.mark.parametrize(
    "name, codec", [("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.avi", "mpeg4")]
)
def test_truncated_and_damaged(tmp_path, name, codec):
    """A MediaError of one line, or frames: a Matroska file may be whole up to there."""
    whole, spoiled = write(tmp_path / name, range(20), codec).read_bytes(), tmp_path / name
    generator = np.random.default_rng(0)
    variants = [whole[: int(len(whole) * share)] for share in (0.02, 0.3, 0.6, 0.9)]
    for i in range(16):
        content = np.frombuffer(whole, np.uint8).copy()
        places = generator.integers(0, len(whole) if i % 2 else 1500, 5)
        content[places] = generator.integers(0, 256, 5)
        variants.append(content.tobytes())
    messages = []
    for content in variants:
        spoiled.write_bytes(content)
        try:
            footage = open_video(spoiled)
            assert footage.read().shape[1:] == (*footage.size[::-1], 3)
            footage.at_rate(16)
        except MediaError as error:
            messages.append(str(error))
    assert len(messages) >= 2
    assert "\n" not in "".join(messages)


def test_foreign_metadata_is_no_obstacle(tmp_path):
    path = write(tmp_path / "x.avi", range(5), "mpeg4")
    content = path.read_bytes()
    assert b"Lavf" in content
    path.write_bytes(content.replace(b"Lavf", b"\xe4\xf6\xfc!"))  # Latin-1
    assert len(open_video(path)) == 5


def test_frames_of_different_sizes(tmp_path):
    Image.fromarray(frame_of(0)).save(tmp_path / "0.png")
    Image.fromarray(frame_of(1, width=32)).save(tmp_path / "1.png")
    with pytest.raises(MediaError, match=r"different sizes: 64x48 and 32x48; make them alike$"):
        open_video(tmp_path).read()
    with pytest.raises(MediaError, match="different sizes"):
        open_video([frame_of(0), frame_of(1, height=50)]).read()


def test_limits(tmp_path, monkeypatch):
    path = write(tmp_path / "x.mp4", range(20))
    monkeypatch.setattr(videos, "MAX_BYTES", 64 * 48 * 3 * 10)
    footage = open_video(path)
    assert len(footage.read(range(10))) == 10
    with pytest.raises(MediaError, match="lasts 1 seconds; cut it"):
        footage.at_rate(10**9)
    with pytest.raises(MediaError, match=r"11 frames of 64x48 in .* cut it or scale it down"):
        footage.read(range(11))
    monkeypatch.setattr(videos, "MAX_FRAMES", 19)
    with pytest.raises(MediaError, match="more than 19 frames"):
        open_video(path)
    for i in range(20):
        (tmp_path / f"{i}.png").touch()
    with pytest.raises(MediaError, match="more than 19 frames"):
        open_video(tmp_path)
    monkeypatch.setattr(videos, "MAX_PIXELS", 64 * 47)
    with pytest.raises(MediaError, match="a frame of 64x48 is too large; scale it down"):
        open_video(path)
