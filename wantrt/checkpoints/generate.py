"""Generated weights: any variant, any dimensions, no download.

Each tensor depends on the seed, its part and its name alone, so it is the same in whatever order
and layout it is asked for. Scales are such that activations keep an ordinary size through all
layers, in float16 too.
"""

import hashlib
import re
from collections.abc import Mapping
from math import prod

import torch
from torch import Tensor, nn

from wantrt.checkpoints.tensors import Stored

CHUNK = 1 << 24  # values drawn at a time

# (pattern of the name, mean, standard deviation). Matrices not listed here have the variance that
# keeps the variance of what they multiply: 1 / inputs.
SCALES = tuple(
    (re.compile(pattern), mean, std)
    for pattern, mean, std in (
        (r".*(norm\w*|norm\w*\.weight|\.gamma)", 1.0, 0.1),
        (r".*\.bias", 0.0, 0.1),
        (r".*position_bias", 0.0, 0.5),
        (r"embed\.weight", 0.0, 1.0),
        (r".*\.modulation", 0.0, 0.1),
    )
)
TEXT_QKV = re.compile(r"layers\.\d+\.qkv\.weight")
TEXT_QKV_GAIN = 0.4  # T5 does not divide scores by √d, so its q and k are small


class GeneratedTensors:
    """The parameters of a (meta) module, drawn when read, in float32."""

    def __init__(self, seed: int, part: str, module: nn.Module) -> None:
        self._seed, self._part = seed, part
        self.specs: Mapping[str, Stored] = {
            name: Stored(torch.float32, tuple(parameter.shape))
            for name, parameter in module.named_parameters()
        }

    def read(self, name: str) -> Tensor:
        shape = self.specs[name].shape
        mean, std = scale_of(name, shape)
        digest = hashlib.sha256(f"{self._seed}/{self._part}/{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        tensor = torch.empty(shape)
        for chunk in tensor.view(-1).split(CHUNK):
            chunk.normal_(mean, std, generator=generator)
        return tensor


def scale_of(name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Mean and standard deviation with which a prepared tensor is drawn."""
    for pattern, mean, std in SCALES:
        if pattern.fullmatch(name):
            return mean, std
    gain = TEXT_QKV_GAIN if TEXT_QKV.fullmatch(name) else 1.0
    return 0.0, gain * float(prod(shape[1:]) ** -0.5)
