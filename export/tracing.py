"""Run a torch function on tensors that write down, as ONNX nodes, what is done to them.

Why not `torch.onnx.export`: it takes minutes for one model's components (this takes milliseconds),
merges weights of equal value, and leaves source paths and sequence operators in the graph. Our
models use some forty torch functions; `operators.py` says for each what it is in ONNX.

Sizes that vary need no symbolic algebra. Every traced tensor carries *two* example shapes, run
through torch's own meta functions side by side: a size equal in both is a constant, one that
differs is dynamic. Two examples with no symbol in common cannot hide a baked-in size.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import onnx
import torch
from onnx import TensorProto, helper
from torch import Tensor

from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

ONNX_DTYPE = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int64: TensorProto.INT64,
}

OPSET = 23
DOMAIN = "wantrt"  # of nodes that bring their definition along

Emitter = Callable[..., "str | list[str]"]


class Spec(NamedTuple):
    """What is known of a result before it runs: dtype and shape, None where the size is dynamic."""

    dtype: torch.dtype
    shape: tuple[int | None, ...]


class Traced(torch.Tensor):
    """A value of the graph under construction, standing in for a tensor."""

    tracer: "Tracer"
    value: str  # its name in the graph
    examples: tuple[Tensor, Tensor]  # on the meta device

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return _tracer_of(args).call(func, args, kwargs or {})

    @property
    def spec(self) -> Spec:
        with torch._C.DisableTorchFunctionSubclass():
            return _spec(self.examples)


class Dim(int):
    """A dynamic size: what it is in the two examples, and the value that holds it at run time.

    It is an int, the first example's, because torch's own argument parsers want one. Arithmetic
    that is not spelled out here gives a plain int, which then does not fit the second example.
    """

    tracer: "Tracer"
    sizes: tuple[int, int]
    value: str  # an int64 tensor of one element

    def __new__(cls, tracer: "Tracer", sizes: tuple[int, int], value: str) -> "Dim":
        dim = super().__new__(cls, sizes[0])
        dim.tracer, dim.sizes, dim.value = tracer, sizes, value
        return dim

    def __floordiv__(self, divisor: int) -> "Dim":
        if divisor == 1:
            return self
        value = self.tracer.node("Div", self.value, self.tracer.integers([divisor]))
        return Dim(self.tracer, (self.sizes[0] // divisor, self.sizes[1] // divisor), value)


class Tracer:
    """Collects the nodes and constants of one graph; names are counted, so equal runs are equal."""

    def __init__(self, emitters: Mapping[str, Emitter]) -> None:
        self.emitters = emitters
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[tuple[object, ...], onnx.TensorProto] = {}
        self.functions: dict[str, onnx.FunctionProto] = {}
        self._shapes: dict[tuple[str, int, int], str] = {}

    def input(self, name: str, dtype: torch.dtype, shapes: Sequence[Sequence[int]]) -> Traced:
        first, second = (torch.empty(list(shape), dtype=dtype, device="meta") for shape in shapes)
        return self._wrap(name, (first, second))

    def call(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Any:
        """What `__torch_function__` must return for `func(*args, **kwargs)`."""
        name = _function_name(func)
        if name in ("shape", "dtype", "device", "ndim", "requires_grad"):
            return self._attribute(name, args[0])
        if name not in self.emitters:
            raise NotImplementedError(
                f"torch's {name!r} has no ONNX spelling here; add it to wantrt/export/operators.py"
            )
        first, second = (func(*_example(args, i), **_example(dict(kwargs), i)) for i in range(2))
        if isinstance(first, Tensor):
            values = self.emitters[name](self, [_spec((first, second))], *args, **kwargs)
            return self._wrap(str(values), (first, second))
        pairs = list(zip(first, second, strict=True))
        values = self.emitters[name](self, [_spec(pair) for pair in pairs], *args, **kwargs)
        return tuple(self._wrap(v, pair) for v, pair in zip(values, pairs, strict=True))

    def function(
        self, name: str, body: Callable[..., Any], arguments: Mapping[str, Any]
    ) -> tuple[Traced, ...]:
        """Call `body(**arguments)` as one node of `DOMAIN`; its definition is `body`, traced.

        Tensors are the node's inputs, in order; what else is not None becomes an attribute of the
        node, for a plugin to read: in the definition it is a constant. A type of node has one
        definition in a graph: TensorRT's parser knows no overloads, it silently takes the first.
        """
        inner = Tracer(self.emitters)
        given = {key: value for key, value in arguments.items() if value is not None}
        tensors = {key: value for key, value in given.items() if isinstance(value, Traced)}
        stand_ins = {
            key: inner.input(key, value.spec.dtype, [example.shape for example in value.examples])
            for key, value in tensors.items()
        }
        results = body(**{**arguments, **stand_ins})
        results = results if isinstance(results, tuple) else (results,)
        definition = helper.make_function(
            DOMAIN,
            name,
            list(tensors),
            [result.value for result in results],
            [*map(_constant_node, inner.constants.values()), *inner.nodes],
            [helper.make_opsetid("", OPSET)],
        )
        known = self.functions.setdefault(name, definition)
        assert known == definition, f"two definitions of {name} in one graph"
        attributes = {key: value for key, value in given.items() if key not in tensors}
        values = self.multi_node(
            name,
            *(tensor.value for tensor in tensors.values()),
            outputs=len(results),
            domain=DOMAIN,
            **{
                key: ONNX_DTYPE[value] if isinstance(value, torch.dtype) else value
                for key, value in attributes.items()
            },
        )
        return tuple(
            self._wrap(value, result.examples)
            for value, result in zip(values, results, strict=True)
        )

    # -- What emitters use ------------------------------------------------------------------------

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return the output's name."""
        return self.multi_node(op_type, *inputs, outputs=1, **attributes)[0]

    def multi_node(self, op_type: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        name = f"{op_type}_{len(self.nodes)}"
        names = [name] if outputs == 1 else [f"{name}_{i}" for i in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, names, name=name, **attributes))
        return names

    def read(self, x: Tensor | float, dtype: torch.dtype) -> str:
        """The name of `x` in the graph, cast to `dtype`; a number becomes a constant."""
        if not isinstance(x, Tensor):
            return self.constant(torch.tensor(x, dtype=dtype))
        if not isinstance(x, Traced):
            return self.constant(x.to(dtype))
        if x.spec.dtype == dtype:
            return x.value
        return self.node("Cast", x.value, to=ONNX_DTYPE[dtype])

    def constant(self, tensor: Tensor) -> str:
        data = tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()
        key = (tensor.dtype, tuple(tensor.shape), data)
        if key not in self.constants:
            self.constants[key] = TensorProto(
                name=f"constant_{len(self.constants)}",
                data_type=ONNX_DTYPE[tensor.dtype],
                dims=tensor.shape,
                raw_data=data,
            )
        return self.constants[key].name

    def integers(self, values: Sequence[int]) -> str:
        return self.constant(torch.tensor(values, dtype=torch.int64))

    def shape_of(self, x: Traced, start: int, end: int) -> str:
        """The sizes of axes start … end−1 of `x`, an int64 vector."""
        key = (x.value, start, end)
        if key not in self._shapes:
            self._shapes[key] = self.node("Shape", x.value, start=start, end=end)
        return self._shapes[key]

    def reshape(self, value: str, sizes: Sequence[int]) -> str:
        """Reshape to `sizes`, of which one may be −1."""
        return self.node("Reshape", value, self.vector(sizes))

    def vector(self, sizes: Sequence[int]) -> str:
        """The int64 vector of `sizes`, a constant if they all are."""
        runs: list[str | list[int]] = []  # values of dynamic sizes, and runs of constant ones
        for size in sizes:
            if isinstance(size, Dim):
                runs.append(size.value)
            elif runs and isinstance(runs[-1], list):
                runs[-1].append(size)
            else:
                runs.append([size])
        values = [run if isinstance(run, str) else self.integers(run) for run in runs]
        return values[0] if len(values) == 1 else self.node("Concat", *values, axis=0)

    def sizes(self, x: Traced, start: int = 0) -> list[int]:
        """The shape of `x` from axis `start` on: numbers, and a `Dim` where it is dynamic."""
        first, second = (example.shape for example in x.examples)
        return [
            a if a == b else Dim(self, (a, b), self.shape_of(x, axis, axis + 1))
            for axis, (a, b) in enumerate(zip(first, second, strict=True))
            if axis >= start
        ]

    # -- Inside -----------------------------------------------------------------------------------

    def _wrap(self, value: str, examples: tuple[Tensor, Tensor]) -> Traced:
        traced = torch.Tensor._make_subclass(Traced, examples[0])
        traced.tracer, traced.value, traced.examples = self, value, examples
        return traced

    def _attribute(self, name: str, x: Traced) -> Any:
        if name == "shape":
            return tuple(self.sizes(x))
        if name == "device":
            return torch.device("cpu")  # so that constants made "where x is" have their values
        return getattr(x.examples[0], name)


def _function_name(func: Callable[..., Any]) -> str:
    """``add`` for torch.add, Tensor.add and ``+`` alike; the attribute's name for a getter."""
    if func.__name__ == "__get__":
        return str(func.__self__.__name__)  # type: ignore[attr-defined]
    return func.__name__


def _constant_node(tensor: onnx.TensorProto) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [tensor.name], name=tensor.name, value=tensor)


def _tracer_of(args: Any) -> Tracer:
    for arg in args:
        if isinstance(arg, Traced):
            return arg.tracer
        if isinstance(arg, list | tuple) and any(isinstance(x, Traced) for x in arg):
            return _tracer_of(arg)
    raise AssertionError("called for a Traced argument")


def _example(argument: Any, i: int) -> Any:
    """The i-th example of an argument of a torch function."""
    match argument:
        case Traced():
            return argument.examples[i]
        case Tensor():
            return argument.to("meta")
        case Dim():
            return argument.sizes[i]
        case list() | tuple():
            return type(argument)(_example(x, i) for x in argument)
        case dict():
            return {key: _example(x, i) for key, x in argument.items()}
    return argument


def _spec(pair: tuple[Tensor, Tensor]) -> Spec:
    first, second = pair
    shape = (a if a == b else None for a, b in zip(first.shape, second.shape, strict=True))
    return Spec(first.dtype, tuple(shape))
