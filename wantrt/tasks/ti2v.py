"""Image to video with TI2V: the image's latent takes the place of latent frame 0, free of noise.

Source: the official `wan/textimage2video.py`.
"""

from wantrt.config import Size
from wantrt.images import Pixels
from wantrt.tasks.conditioning import Conditioning, Encode
from wantrt.tasks.fitting import best_output_size, fit_image, resize_lanczos, size_by_area


def video_size(image_size: Size, size: Size, fit: str, convention: str) -> Size:
    """The video's size: `size`, or with fit "area" one of its area in the image's aspect ratio."""
    if fit != "area":
        return size
    if convention == "diffusers":
        return size_by_area(image_size, size[0] * size[1], convention, step=32)
    return best_output_size(image_size, size[0] * size[1])


def condition(
    image: Pixels, size: Size, encode: Encode, convention: str = "official", fit: str = "area"
) -> Conditioning:
    """Encode the image as a video of one frame. image: uint8 [H, W, 3]. Gives `first_frame`.

    Official, the size follows the image only to multiples of 32, and what is left is cut off.
    """
    if fit == "area" and convention != "diffusers":
        fit = "crop"
    pixels = fit_image(image, size, fit, resize_lanczos)
    return Conditioning(first_frame=encode(pixels[None, :, None]))
