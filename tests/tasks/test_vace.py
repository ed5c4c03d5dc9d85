"""VACE as the official code has it: sizes, frames, channel by channel; what it refuses."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tasks.pictures import film, moving_mask, picture
from wantrt.errors import SettingsError
from wantrt.tasks import vace
from wantrt.videos import open_mask, open_video

SIZE = (48, 32)


def encode(pixels):
    """[1, 3, T, height, width] -> [1, 16, F, H, W]: the mean of every cell, in all channels."""
    frames = pixels[:, :, ::4]
    cells = torch.nn.functional.avg_pool3d(frames, (1, 8, 8)).mean(dim=1, keepdim=True)
    return cells.expand(-1, 16, -1, -1, -1)


@pytest.mark.parametrize(
    "source_size, length, area, expected",
    [
        # round(sqrt(1560 * 1080 / 1920)) = 30 tokens high, int(1560 / 30) = 52 wide
        ((1920, 1080), 150, (832, 480), ((832, 480), 81)),
        ((1920, 1080), 50, (832, 480), ((832, 480), 49)),
        ((1080, 1920), 150, (832, 480), ((464, 848), 81)),
        ((1920, 1080), 81, (1280, 720), ((1280, 720), 81)),
        # 300 tokens: stays small, and may have 109 latent frames
        ((320, 240), 300, (832, 480), ((320, 240), 297)),
        ((1000, 1000), 5, (832, 480), ((640, 624), 5)),  # 39 high, 40 wide
    ],
    ids=str,
)
def test_official_size_and_frames(source_size, length, area, expected):
    actual = vace.video_size_and_frames(source_size, length, area, 81, "area", "official")
    assert actual == expected


def official_size(h, w, length, area, seq_len):
    """`_get_frameid_bbox_adjust_last` of the official VaceVideoProcessor, as far as sizes go."""
    area_z = min(seq_len, area / (16 * 16), (h // 16) * (w // 16))
    of = min((length - 1) // 4 + 1, int(seq_len / area_z))
    target_area_z = min(area_z, int(seq_len / of))
    oh = round(np.sqrt(target_area_z * (h / w)))
    ow = int(target_area_z / oh)
    return (ow * 16, oh * 16), (of - 1) * 4 + 1


@pytest.mark.parametrize("size, seq_len", [((832, 480), 32_760), ((1280, 720), 75_600)])
def test_official_sizes_of_many_sources(size, seq_len):
    generator = np.random.default_rng(0)
    for _ in range(300):
        width, height = (int(side) for side in generator.integers(64, 4000, 2))
        length = int(generator.integers(1, 700))
        expected = official_size(height, width, length, size[0] * size[1], seq_len)
        asked = (width, height), length, size, 81, "area", "official"
        assert vace.video_size_and_frames(*asked) == expected


def test_given_frames_and_sizes():
    def ask(fit, num_frames, frames_given, length=30, convention="official"):
        return vace.video_size_and_frames(
            (640, 360), length, (832, 480), num_frames, fit, convention, frames_given
        )

    assert ask("crop", 81, False) == ((832, 480), 29)
    assert ask("crop", 81, False, length=200) == ((832, 480), 81)
    assert ask("pad", 17, True) == ((832, 480), 17)
    assert ask("area", 17, True) == ((640, 352), 17)
    assert ask("stretch", 81, False, convention="diffusers") == ((640, 352), 29)


@pytest.mark.parametrize("convention", ["official", "diffusers"])
@pytest.mark.parametrize("source_size", [(3000, 8), (15, 900)], ids=str)
def test_too_narrow(source_size, convention):
    with pytest.raises(SettingsError, match=r"too narrow; give a --size and --fit$"):
        vace.video_size_and_frames(source_size, 9, (832, 480), 81, "area", convention)


@pytest.mark.parametrize("source, wanted", [(100, 81), (82, 81), (37, 5), (300, 49), (7, 1)])
def test_frames_are_chosen_as_the_official_code_does(source, wanted):
    """frame_ids of VaceVideoProcessor: the first frame whose time includes the moment."""
    fps = 30
    starts = np.arange(source) / fps
    ends = starts + 1 / fps
    moments = np.linspace(0.0, (starts[-1] + ends[-1]) / 2, wanted)
    includes = (moments[:, None] >= starts - 1e-9) & (moments[:, None] <= ends + 1e-9)
    times = [Fraction(i, fps) for i in range(source)]
    chosen = vace.choose_frames(times, wanted)
    assert chosen == includes.argmax(axis=1).tolist()
    assert wanted == 1 or chosen[-1] == source - 1


def test_short_sources_are_taken_whole():
    assert vace.choose_frames([Fraction(i) for i in range(5)], 9) == [0, 1, 2, 3, 4]


def test_frames_of_uneven_rate_are_chosen_by_time():
    times = [Fraction(t) for t in (0, 1, 2, 10, 11, 12)]  # a slow frame in the middle
    assert vace.choose_frames(times, 5) == [0, 2, 2, 2, 5]


@pytest.mark.parametrize("num_frames", [-3, 0, 80])
def test_asked_frames_are_checked_first(num_frames):
    with pytest.raises(SettingsError, match=rf"^{num_frames} frames is not 4n \+ 1"):
        vace.video_size_and_frames((64, 64), 9, (64, 64), num_frames, "area", "official", True)


def test_channels_are_kept_then_changed_then_mask():
    video, mask = film(5, *SIZE), np.zeros((5, 32, 48), np.uint8)
    mask[:, :, 24:] = 255
    context = vace.condition(video, mask, [], 5, SIZE, encode).vace_context
    assert (context.shape, context.dtype) == ((1, 96, 2, 4, 6), torch.float32)
    pixels = torch.from_numpy(video[0]).double().mean(dim=-1) / 127.5 - 1
    cells = pixels.unflatten(0, (4, 8)).unflatten(2, (6, 8)).mean(dim=(1, 3)).float()
    kept, changed = context[0, 7, 0], context[0, 16 + 7, 0]
    torch.testing.assert_close(kept[:, :3], cells[:, :3])
    torch.testing.assert_close(changed[:, 3:], cells[:, 3:])
    assert not kept[:, 3:].any()
    assert not changed[:, :3].any()
    assert not context[0, 32:, :, :, :3].any()
    assert torch.all(context[0, 32:, :, :, 3:] == 1)


def test_mask_channel_is_the_pixel_in_its_cell():
    mask = np.random.default_rng(0).integers(0, 256, (9, 32, 48), np.uint8)
    context = vace.condition(film(9, *SIZE), mask, [], 9, SIZE, encode).vace_context
    nearest = [1, 4, 7]  # of 9 frames at 3 places: floor((i + 0.5) * 9 / 3)
    for channel in (0, 1, 8, 29, 63):
        row, column = divmod(channel, 8)
        expected = torch.from_numpy(mask[nearest, row::8, column::8] / 255).float()
        torch.testing.assert_close(context[0, 32 + channel], expected)


def test_the_mask_is_halved_for_pixels_only():
    mask = np.full((1, 32, 48), 127, np.uint8)
    context = vace.condition(film(5, *SIZE), mask, [], 5, SIZE, encode).vace_context
    assert not context[:, 16:32].any(), "0.498 is not more than a half: all is kept"
    torch.testing.assert_close(context[:, 32:], torch.full((1, 64, 2, 4, 6), 127 / 255))


def test_without_a_video_all_is_made_anew():
    context = vace.condition(None, None, [], 9, SIZE, encode).vace_context
    assert not context[:, :32].any()
    assert torch.all(context[:, 32:] == 1)
    context = vace.condition(film(9, *SIZE), None, [], 9, SIZE, encode).vace_context
    assert not context[:, :16].any()
    assert context[:, 16:32].any()
    assert torch.all(context[:, 32:] == 1)


@pytest.mark.parametrize("convention, order", [("official", [0, 1, 2]), ("diffusers", [2, 1, 0])])
def test_references_stand_in_front(convention, order):
    levels = (0, 128, 220)
    references = [np.full((32, 48, 3), level, np.uint8) for level in levels]
    conditioning = vace.condition(None, None, references, 5, SIZE, encode, convention)
    context = conditioning.vace_context
    assert (conditioning.reference_frames, context.shape[2]) == (3, 3 + 2)
    for frame, index in enumerate(order):
        expected = torch.full((16, 4, 6), levels[index] / 127.5 - 1)
        torch.testing.assert_close(context[0, :16, frame], expected)
    assert not context[:, 16:, :3].any(), "nothing to change, and no mask"


def test_references_lie_whole_on_white():
    black = np.zeros((16, 16, 3), np.uint8)
    placed = vace.place_reference(black, SIZE)  # 32 x 32 in the middle of 48 x 32
    assert torch.all(placed[:, :, 8:40] == -1)
    assert torch.all(placed[:, :, :8] == 1)
    assert torch.all(placed[:, :, 40:] == 1)


def test_official_sources_are_scaled_with_antialiasing_and_cropped():
    """Pillow's bicubic filter is the one that torch uses with antialias, up to rounding."""
    frame = picture(200, 90)  # covers 48 x 32 as 71 x 32
    scaled = Image.fromarray(frame).resize((71, 32), Image.Resampling.BICUBIC)
    expected = torch.from_numpy(np.array(scaled.crop((11, 0, 59, 32)))).permute(2, 0, 1)
    seen = []
    vace.condition(frame[None], None, [], 1, SIZE, lambda p: seen.append(p) or encode(p))
    actual = ((seen[1][0, :, 0] + 1) * 127.5).round()
    assert (actual - expected).abs().max() <= 2


def test_what_a_video_lacks_is_made_anew(caplog):
    video, mask = film(3, *SIZE), np.zeros((3, 32, 48), np.uint8)
    context = vace.condition(video, mask, [], 9, SIZE, encode).vace_context
    assert "3 of 9 frames" in caplog.text
    assert [bool(m) for m in context[0, 32, :, 0, 0]] == [False, True, True]
    wide = vace.condition(
        film(1, 48, 16), np.zeros((1, 16, 48), np.uint8), [], 1, (48, 48), encode, fit="pad"
    )
    assert wide.vace_context[0, 32, 0, :, 0].tolist() == [1, 1, 0, 0, 1, 1]
    assert not wide.vace_context[0, :32, 0, :2].any(), "grey"


@pytest.mark.parametrize(
    "video, mask, num_frames, size, message",
    [
        (None, (5, 32, 48), 5, SIZE, "--video"),
        ((5, 32, 48, 3), (4, 32, 48), 5, SIZE, "the mask has 4 frames and the video 5"),
        ((5, 32, 48, 3), (5, 32, 40), 5, SIZE, "the mask is 40x32 and the video 48x32"),
        ((9, 32, 48, 3), None, 5, SIZE, "has 9 frames for a video of 5; give --frames 9"),
        ((5, 32, 48, 3), None, 4, SIZE, "nearest: 1 or 5"),
        ((5, 32, 48, 3), None, 5, (48, 24), "48x24 is not a multiple of 16"),
        ((0, 32, 48, 3), None, 5, SIZE, "no frames"),
    ],
)
def test_refused(video, mask, num_frames, size, message):
    video = None if video is None else np.zeros(video, np.uint8)
    mask = None if mask is None else np.zeros(mask, np.uint8)
    with pytest.raises(SettingsError, match=message) as caught:
        vace.condition(video, mask, [], num_frames, size, encode)
    assert "\n" not in str(caught.value)


def test_read_source(tmp_path):
    video, mask = film(9, *SIZE), moving_mask(9, *SIZE)
    frames, masks = vace.read_source(open_video(video), open_mask(mask), 5)
    chosen = [0, 2, 4, 6, 8]
    np.testing.assert_array_equal(frames, video[chosen])
    np.testing.assert_array_equal(masks, mask[chosen])
    frames, masks = vace.read_source(open_video(video), open_mask(mask[0]), 5)
    np.testing.assert_array_equal(masks, mask[:1])
    assert vace.read_source(open_video(video), None, 9)[1] is None
    with pytest.raises(SettingsError, match="8 frames and the video 9"):
        vace.read_source(open_video(video), open_mask(mask[:8]), 5)
