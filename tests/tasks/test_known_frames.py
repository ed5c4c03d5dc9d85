"""I2V and FLF2V as the official code has them: what is encoded, and the mask written by hand."""

import pytest
import torch

from tests.tasks.pictures import picture
from wantrt.errors import SettingsError
from wantrt.tasks import flf2v, i2v
from wantrt.tasks.fitting import fit_image, resize_bicubic


class Recorder:
    """An encoder that keeps what it is given and answers with threes."""

    def __call__(self, pixels):
        self.pixels = pixels
        frames, height, width = pixels.shape[2:]
        return torch.full((1, 16, (frames + 3) // 4, height // 8, width // 8), 3.0)


def mask_of(conditioning):
    """[4, F], after a look at the rest: constant over height and width, latent behind it."""
    channels = conditioning.channels
    assert (channels.shape[1], channels.dtype) == (20, torch.float32)
    assert torch.all(channels[:, 4:] == 3)
    mask = channels[0, :4]
    assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))
    return mask[:, :, 0, 0].tolist()


def test_i2v():
    image, encode = picture(48, 32), Recorder()
    conditioning = i2v.condition(image, 9, (48, 32), encode)
    assert encode.pixels.shape == (1, 3, 9, 32, 48)
    expected = torch.from_numpy(image).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(encode.pixels[0, :, 0], expected, rtol=0, atol=1e-6)
    assert not encode.pixels[:, :, 1:].any(), "grey, not black"
    assert mask_of(conditioning) == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]]


def test_flf2v_marks_the_last_frame_at_any_length():
    first, last, encode = picture(48, 32), picture(48, 32, seed=5), Recorder()
    conditioning = flf2v.condition(first, last, 9, (48, 32), encode)
    expected = torch.from_numpy(last).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(encode.pixels[0, :, -1], expected, rtol=0, atol=1e-6)
    assert not encode.pixels[:, :, 1:-1].any()
    # frames: 0 0 0 0 | 1 2 3 4 | 5 6 7 8; channel 3 of the last latent frame is frame 8
    assert mask_of(conditioning) == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert mask_of(flf2v.condition(first, last, 5, (48, 32), encode))[3] == [1, 1]
    official = mask_of(flf2v.condition(first, last, 81, (48, 32), encode))
    assert official == [[1] + [0] * 20] * 3 + [[1] + [0] * 19 + [1]]


def test_a_last_image_of_another_size_covers_the_first():
    first, last, encode = picture(48, 32), picture(96, 128, seed=5), Recorder()
    flf2v.condition(first, last, 5, (48, 32), encode)
    cut = fit_image(last, (48, 64), "stretch", resize_bicubic)[:, 16:48]
    torch.testing.assert_close(encode.pixels[0, :, -1], cut, rtol=0, atol=1e-6)


@pytest.mark.parametrize("num_frames, nearest", [(0, "1"), (2, "1 or 5"), (80, "77 or 81")])
def test_i2v_lengths(num_frames, nearest):
    with pytest.raises(SettingsError, match=rf"^{num_frames} frames is .* nearest: {nearest}$"):
        i2v.condition(picture(48, 32), num_frames, (48, 32), Recorder())


@pytest.mark.parametrize("num_frames, nearest", [(1, "5"), (6, "5 or 9"), (3, "5")])
def test_flf2v_lengths(num_frames, nearest):
    image = picture(48, 32)
    with pytest.raises(SettingsError, match=rf"^{num_frames} frames is .* nearest: {nearest}$"):
        flf2v.condition(image, image, num_frames, (48, 32), Recorder())
