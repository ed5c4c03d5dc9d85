"""First and last frame to video: as image to video, with the last frame known too.

Source: the official `wan/first_last_frame2video.py`, with two corrections. Its mask is of 81 frames
whatever the length; here it has the video's. Of a last image of another size it computes how to
scale it over the first, but then only cuts or pads it to that size; here it is scaled and cut.
"""

from wantrt.config import Size
from wantrt.images import Pixels
from wantrt.tasks import i2v
from wantrt.tasks.conditioning import Conditioning, Encode
from wantrt.tasks.fitting import check_frames, fit_image, size_of

FEWEST_FRAMES = 5  # the first and the last lie in latent frames of their own
video_size = i2v.video_size  # it follows the first image


def condition(
    image: Pixels,
    last_image: Pixels,
    num_frames: int,
    size: Size,
    encode: Encode,
    convention: str = "official",
    fit: str = "area",
) -> Conditioning:
    """Encode [first, grey, …, last] and mark the frames at both ends as known.

    image, last_image: uint8 [H, W, 3]. Gives `channels` [1, 20, F, H, W]. Raises SettingsError for
    a number of frames that is not 4n + 1 from 5.
    """
    check_frames(num_frames, fewest=FEWEST_FRAMES)
    resize = i2v.resize_of(convention)
    first = fit_image(image, size, fit, resize)
    alike = size_of(image) == size_of(last_image)
    last = fit_image(last_image, size, "crop" if fit == "area" and not alike else fit, resize)
    return i2v.encode_known({0: first, num_frames - 1: last}, num_frames, encode)
