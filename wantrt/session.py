"""What every runtime agrees on: named tensors in, named tensors out, on a device.

A `Session` is a loaded component. The loop above takes sessions and never asks which kind it has.
A `Device` is all that knows CUDA: the same code runs on a CPU and on a GPU. Tensors are torch
tensors everywhere.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

from wantrt.errors import RuntimeUnavailableError

Tensors = Mapping[str, Tensor]

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class TensorSpec:
    """Dtype and shape of a named tensor.

    A dimension is a number, a symbol ("L"), a multiple of one ("8*h"), or a product ("F*h*w").
    """

    dtype: torch.dtype
    shape: tuple[int | str, ...]

    def concrete(self, symbols: Mapping[str, int]) -> tuple[int, ...]:
        """The shape for given symbols: (1, 96, "8*h", "8*w") at h=2, w=3 is (1, 96, 16, 24)."""
        return tuple(
            size
            if isinstance(size, int)
            else prod(int(f) if f.isdigit() else symbols[f] for f in size.split("*"))
            for size in self.shape
        )

    def symbols(self, shape: Sequence[int]) -> dict[str, int]:
        """What the symbols are where the shape is `shape`; a product of symbols tells none."""
        known = {}
        for declared, size in zip(self.shape, shape, strict=True):
            if isinstance(declared, str):
                factor, _, symbol = declared.rpartition("*")
                if factor == "" or factor.isdigit():
                    known[symbol] = size // int(factor or 1)
        return known


class Session(Protocol):
    """A loaded component, ready to run on a device.

    `bind` sets what stays between runs (weights, tables, caches) without copying it. `run` takes
    the other inputs; outputs go into the tensors the caller gives, else into new ones that the
    session owns until its next run.
    """

    @property
    def inputs(self) -> Mapping[str, TensorSpec]: ...

    @property
    def outputs(self) -> Mapping[str, TensorSpec]: ...

    def bind(self, name: str, tensor: Tensor) -> None: ...

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]: ...


class Device(Protocol):
    """Where sessions run: allocation, ordering, and captured work."""

    @property
    def torch_device(self) -> torch.device: ...

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor: ...

    def stream(self) -> AbstractContextManager[object]:
        """The stream on which all sessions of a pipeline run, as a context."""
        ...

    def synchronize(self) -> None: ...

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Record `work`, which has run once already, and return what replays it."""
        ...


class CPUDevice:
    """Runs in order by itself: nothing to wait for, nothing to capture."""

    torch_device = torch.device("cpu")

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype)

    def stream(self) -> AbstractContextManager[object]:
        return nullcontext()

    def synchronize(self) -> None:
        pass

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        return work


class CUDADevice:
    """One GPU and one stream on it; captured work is a CUDA graph."""

    def __init__(self, index: int = 0) -> None:
        if not torch.cuda.is_available():
            raise RuntimeUnavailableError(
                "no CUDA device: torch finds no GPU (or is a CPU build). "
                "Use a CPU runtime: --runtime onnxruntime"
            )
        self.torch_device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.torch_device)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.torch_device)

    def stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self._stream)

    def synchronize(self) -> None:
        self._stream.synchronize()

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        self._stream.synchronize()
        with torch.cuda.graph(graph, stream=self._stream):
            work()
        return graph.replay
