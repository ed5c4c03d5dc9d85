"""Test pictures: smooth, with an edge, different in every channel, direction and frame."""

import numpy as np
from PIL import Image


def picture(width, height, seed=0):
    """uint8 [H, W, 3]"""
    y, x = np.mgrid[:height, :width]
    generator = np.random.default_rng(seed)
    a, b, c = generator.uniform(0.05, 0.3, 3)
    channels = [np.sin(a * x + seed), np.cos(b * y), np.sin(c * (x + 2 * y))]
    image = (127.5 + 120 * np.stack(channels, axis=-1)).astype(np.uint8)
    image[height // 3 : height // 2, width // 4 : width // 2] = (250, 20, 60)
    return image


def film(num_frames, width, height):
    """uint8 [T, H, W, 3]"""
    return np.stack([picture(width, height, seed) for seed in range(num_frames)])


def moving_mask(num_frames, width, height):
    """uint8 [T, H, W]: a bright box that moves, with a grey edge on either side of one half."""
    mask = np.zeros((num_frames, height, width), np.uint8)
    for i in range(num_frames):
        mask[i, 5 : height // 2 + i, 3 + i : width // 2] = 255
        mask[i, height // 2 + i, 3 : width // 2] = 90
        mask[i, height // 2 + i + 1, 3 : width // 2] = 170
    return mask


def as_pil(images):
    return [Image.fromarray(image) for image in images]
