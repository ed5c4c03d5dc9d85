"""Those who do the same work: an engine behind three methods, and the table of wantrt's peers.

An adapter is a file of this folder with a class `Peer`. It imports its library when it loads a
model, so that a peer that is not installed can be named.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from wantrt.config import Size, Variant
from wantrt.linked import refuse_other_names
from wantrt.names import check_name

refuse_other_names(__spec__)

PEERS = {"diffusers-eager": "diffusers_eager", "diffusers-compiled": "diffusers_compiled"}
CONSTRAINTS = Path(__file__).resolve().parents[2] / "constraints.txt"  # not in a wheel


@dataclass(frozen=True, kw_only=True)
class Work:
    """What is done, alike by all.

    latents: [1, C, F, H, W] float32, normalised as the transformer sees it: noise to begin with, or
    what is decoded. text_embeds: [1, text_len, text_dim] float32, of a transformer alone. prompts:
    of the first run, the second …; more runs begin again.
    """

    checkpoint: Path  # a folder in Diffusers layout
    variant: Variant
    precision: str
    device: torch.device
    size: Size
    num_frames: int
    latents: Tensor
    text_embeds: Tensor | None = None
    prompts: Sequence[str] = ()
    num_inference_steps: int = 0
    guidance_scale: float = 1.0

    def prompt(self, index: int) -> str:
        return self.prompts[index % len(self.prompts)]


@dataclass(frozen=True)
class Done:
    """One run: seconds until the result was in host memory, the result, and times within.

    result: velocity [1, C, F, H, W], pixels [1, 3, T, H, W], or the frames of a video in uint8.
    """

    seconds: float
    result: Tensor
    stages: Mapping[str, Sequence[float]] = field(default_factory=dict)


@dataclass(frozen=True)
class Loaded:
    """Work that an engine is ready for. settings: what it found in its own objects, to compare."""

    settings: Mapping[str, Any]
    run: Callable[[int], Done]  # for the n-th time


class Engine(Protocol):
    """Each method loads what the work needs; nothing is shared between two."""

    name: str

    def transformer(self, work: Work) -> Loaded:
        """One pass without guidance at timestep 700: latents and text features -> velocity."""
        ...

    def decoder(self, work: Work) -> Loaded:
        """Latents -> pixels."""
        ...

    def pipeline(self, work: Work) -> Loaded:
        """Prompt and noise -> frames."""
        ...


TIMESTEP = 700.0


class Peer(Engine, Protocol):
    packages: Sequence[str]


def find_peer(name: str) -> tuple[Peer, str | None]:
    """An adapter, and what is to be said: that it is missing, or not the version that is pinned.

    Raises ModuleNotFoundError with the remedy for one that is missing.
    """
    check_name("peer", name, PEERS)
    peer: Peer = import_module(f"wantrt.bench.peers.{PEERS[name]}").Peer()
    pins = pinned()
    others = []
    for package in peer.packages:
        try:
            found = version(package)
        except PackageNotFoundError:
            raise ModuleNotFoundError(
                f"{package} is not installed: pip install 'wantrt[bench]'"
            ) from None
        if package in pins and found != pins[package]:
            others.append(f"{package} is {found}, pinned is {pins[package]}")
    return peer, "; ".join(others) or None


def pinned() -> dict[str, str]:
    """The versions in constraints.txt; none where wantrt was installed without it."""
    if not CONSTRAINTS.is_file():
        return {}
    lines = (line.strip() for line in CONSTRAINTS.read_text().splitlines())
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def count_parameters(tensors: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in tensors.values())
