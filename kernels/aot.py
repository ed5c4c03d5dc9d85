"""Kernels ahead of time: an op as a node of a graph that TensorRT can run without Python.

A `Plugin` describes it as data, and `Plugin.bind` turns sizes, dtypes and attributes into a
`Binding`: what to compile, and how to launch it. Nothing here knows TensorRT: a size is an int, or
whatever adds, multiplies and divides like one, so that a plan of dynamic sizes works out grid and
scalars when it runs. Channels are architecture: they must be ints.

TensorRT gives a kernel pointers to the inputs, 32-bit integers and pointers to the outputs, in this
order, and nothing else: everything besides is a constant of the kernel.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import mul
from typing import Any

import torch

from wantrt.errors import BuildError
from wantrt.kernels.ptx import Source
from wantrt.kernels.rows import warps
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

Size = Any  # an int, or an expression that knows + − * // with an int on its right
Attributes = Mapping[str, Any]  # float or int, by name
Dtypes = Mapping[str, tuple[torch.dtype, ...]]  # that inputs may have, by name

TRITON_TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int64: "i64",
}
ONNX_DTYPES = {1: torch.float32, 10: torch.float16, 16: torch.bfloat16}  # of TensorProto
FLOAT32 = (torch.float32,)
INT64 = (torch.int64,)
ROWS: tuple[tuple[str, Dtypes], ...] = (
    ("", {}),
    ("Rows", {"token_row": INT64}),
)  # of a node's name


@dataclass(frozen=True)
class Operand:
    """An input or an output of a node. It is contiguous."""

    shape: tuple[Size, ...]
    dtype: torch.dtype


Operands = Mapping[str, Operand]


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How a kernel is launched on operands of certain sizes.

    scalars: its int32 arguments; constants: its constexprs, both by parameter. multiples_of_16:
    scalars that are so whatever the sizes; without it, what they lead to is read value by value.
    """

    grid: tuple[Size, ...]
    constants: Mapping[str, int | float | bool]
    scalars: Mapping[str, Size]
    multiples_of_16: tuple[str, ...] = ()
    num_warps: int = 4


@dataclass(frozen=True)
class Binding:
    """A plugin at certain sizes and dtypes."""

    source: Source
    grid: tuple[Size, ...]
    scalars: tuple[Size, ...]


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An op as a node of a graph: `name` in the domain "wantrt".

    kernel: a @triton.jit function whose parameters are `<input>_ptr` in the order of `inputs`,
    int32 scalars, `<output>_ptr` in the order of `outputs`, and constexprs. Pointers that this node
    has no input for are None. inputs: the dtypes that each may have. attributes: float or int.
    infer: the operands of the outputs.
    """

    name: str
    kernel: Any
    inputs: Dtypes
    outputs: tuple[str, ...]
    attributes: Mapping[str, type]
    infer: Callable[[Operands, Attributes], tuple[Operand, ...]]
    launch: Callable[[Operands, Attributes], Launch]

    def check(self, inputs: Operands, attributes: Attributes) -> None:
        """Raises BuildError for dtypes and attributes that the kernel has not been written for."""
        for name, dtypes in self.inputs.items():
            if inputs[name].dtype not in dtypes:
                expected = " or ".join(map(str, dtypes))
                raise BuildError(
                    f"the plugin {self.name}: {name} is {inputs[name].dtype}, expected {expected}"
                )
        for name, kind in self.attributes.items():
            if type(attributes.get(name)) is not kind:
                raise BuildError(
                    f"the plugin {self.name}: {name} is {attributes.get(name)!r}, expected a "
                    f"{kind.__name__}"
                )

    def infer_outputs(self, inputs: Operands, attributes: Attributes) -> tuple[Operand, ...]:
        """Raises BuildError for inputs that it does not take."""
        self.check(inputs, attributes)
        return self.infer(inputs, attributes)

    def bind(self, inputs: Operands, attributes: Attributes) -> Binding:
        """Raises BuildError for inputs that it does not take."""
        outputs = self.infer_outputs(inputs, attributes)
        launch = self.launch(inputs, attributes)
        operands = {**inputs, **dict(zip(self.outputs, outputs, strict=True))}
        types: dict[str, str] = {}
        aligned, scalars = [], []
        for name in inspect.signature(self.kernel.fn).parameters:
            tensor = name.removesuffix("_ptr")
            if name in launch.constants:
                continue
            if name in launch.scalars:
                types[name] = "i32"
                scalars.append(launch.scalars[name])
            elif tensor in operands:
                types[name] = "*" + TRITON_TYPES[operands[tensor].dtype]
            if tensor in operands or name in launch.multiples_of_16:
                aligned.append(name)
        expected = [*_pointers(self.inputs), *launch.scalars, *_pointers(self.outputs)]
        assert list(types) == expected, f"{self.name}: {list(types)} are not {expected}"
        source = Source(
            module=self.kernel.fn.__module__,
            kernel=self.kernel.fn.__name__,
            types=tuple(types.items()),
            constants=tuple(sorted(launch.constants.items())),
            aligned=tuple(aligned),
            num_warps=launch.num_warps,
        )
        return Binding(source, launch.grid, tuple(scalars))


def static(size: Size, what: str) -> int:
    """A size that must be known when a plan is built. Raises BuildError."""
    if not isinstance(size, int):
        raise BuildError(f"{what} must be known when a plan is built; it is dynamic")
    return size


def output_dtype(attributes: Attributes) -> torch.dtype:
    """What a node's attribute `dtype` says. Raises BuildError."""
    if attributes["dtype"] not in ONNX_DTYPES:
        raise BuildError(f"no kernel writes the ONNX data type {attributes['dtype']}")
    return ONNX_DTYPES[attributes["dtype"]]


def token_launch(x: Operand, modulation: Operand, **constants: int | float | bool) -> Launch:
    """One program a token of x [B, L, C], which reads its row of modulation [B, R, C]."""
    batch, seq_len, channels = x.shape
    channels = static(channels, "the number of channels")
    block = next_power_of_2(channels)
    return Launch(
        grid=(product(batch, seq_len),),
        constants={**constants, "CHANNELS": channels, "BLOCK": block},
        scalars={
            "seq_len": seq_len,
            "batch_stride": product(modulation.shape[1], channels),
            "row_stride": channels,
        },
        multiples_of_16=("batch_stride", "row_stride") if channels % 16 == 0 else (),
        num_warps=warps(block),
    )


def next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


def product(*sizes: Size) -> Size:
    """Expressions first: an int does not know how to multiply one."""
    return reduce(mul, sorted(sizes, key=lambda size: isinstance(size, int)))


def ceil_div(size: Size, divisor: int) -> Size:
    return (size + (divisor - 1)) // divisor


def is_multiple_of_16(size: Size) -> bool:
    """Whether it is known to be one: an expression is not."""
    return isinstance(size, int) and size % 16 == 0


def _pointers(names: Sequence[str] | Mapping[str, object]) -> Iterator[str]:
    return (f"{name}_ptr" for name in names)
