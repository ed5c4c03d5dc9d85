"""nano's dimensions with random weights: what a bare machine can run without files."""

import torch
from torch import Tensor

from wantrt.checkpoints.checkpoint import meta_module, part_configs
from wantrt.checkpoints.generate import GeneratedTensors
from wantrt.config import VARIANTS
from wantrt.device import Device
from wantrt.models.components import Component, part_components
from wantrt.runtime.torch_session import TorchSession, load_sessions

NANO = VARIANTS["nano"]
EXPERT = NANO.experts[0]


def components(part: str, dtype: torch.dtype, stack: int | None = None) -> list[Component]:
    return part_components(NANO, part, dtype, stack)


def weights(part: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """On the host."""
    module = meta_module(part_configs(NANO)[part], dtype)
    generated = GeneratedTensors(0, part, module)
    return {name: generated.read(name).to(p.dtype) for name, p in module.named_parameters()}


def load(part: str, dtype: torch.dtype, device: Device) -> dict[str, list[TorchSession]]:
    prepared = weights(part, dtype)
    return {c.name: load_sessions(c, None, prepared, device) for c in components(part, dtype)}
