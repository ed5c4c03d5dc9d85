"""What every runtime agrees on: named tensors in, named tensors out.

A `Session` is a loaded component. The loop above takes sessions and never asks which kind it has.
Tensors are torch tensors everywhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Protocol

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Range = tuple[int, int, int]  # of a size: smallest, typical, largest

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

    @property
    def symbol_names(self) -> set[str]:
        """Those that the shape depends on."""
        factors = [f for size in self.shape if isinstance(size, str) for f in size.split("*")]
        return {factor for factor in factors if not factor.isdigit()}

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

    @property
    def serves(self) -> Sequence[Mapping[str, Range]]:
        """The sizes it runs at, by symbol, one entry a plan; empty: any size."""
        ...

    def prepare(self, symbols: Mapping[str, int]) -> None:
        """Get ready for these sizes now, not in the first run: read files, reserve scratch."""
        ...

    def bind(self, name: str, tensor: Tensor) -> None: ...

    def run(self, inputs: Tensors, outputs: Tensors | None = None) -> dict[str, Tensor]: ...
