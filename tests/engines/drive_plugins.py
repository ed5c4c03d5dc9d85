"""Drives our plugins through TensorRT's own Python, as a build would: `python -m` this, on stubs.

Reads cases from stdin, prints what came of each, both as JSON. TensorRT's own C++ is what is
missing: its registry, and its expressions of sizes, which are stood in for here. Dimensions that
are strings are symbols: dynamic sizes.
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorrt_bindings as trt

sys.modules["tensorrt"] = trt


class Registry:
    """TensorRT's, as far as it is asked."""

    def __init__(self) -> None:
        self.creators: dict[str, Any] = {}

    def register_creator(self, creator: Any, namespace: str) -> bool:
        key = f"{namespace}::{creator.name}"
        assert key not in self.creators
        self.creators[key] = creator
        return True

    def get_creator(self, name: str, version: str, namespace: str) -> Any:
        return self.creators.get(f"{namespace}::{name}")


REGISTRY = Registry()
trt.get_plugin_registry = lambda: REGISTRY


class Expression(trt.IDimensionExpr):
    """A size as a function of the symbols. TensorRT makes these; they cannot be constructed."""

    def __new__(cls, value: Callable[[Mapping[str, int]], int], constant: bool) -> "Expression":
        made = trt.IDimensionExpr.__new__(cls)
        made.value, made.constant = value, constant
        return made

    @classmethod
    def make(cls, value: Callable[[Mapping[str, int]], int], constant: bool) -> "Expression":
        return cls.__new__(cls, value, constant)  # past pybind's check that __init__ was called

    def is_constant(self) -> bool:
        return self.constant

    def get_constant_value(self) -> int:
        assert self.constant
        return self.value({})


class Expressions:
    """An IExprBuilder."""

    OPERATIONS: Mapping[Any, Callable[[int, int], int]] = {
        trt.DimensionOperation.SUM: lambda a, b: a + b,
        trt.DimensionOperation.SUB: lambda a, b: a - b,
        trt.DimensionOperation.PROD: lambda a, b: a * b,
        trt.DimensionOperation.FLOOR_DIV: lambda a, b: a // b,
        trt.DimensionOperation.CEIL_DIV: lambda a, b: -(-a // b),
    }

    def constant(self, number: int) -> Expression:
        return Expression.make(lambda _: number, True)

    def size(self, size: int | str) -> Expression:
        if isinstance(size, int):
            return self.constant(size)
        return Expression.make(lambda symbols: symbols[size], False)

    def operation(self, operation: Any, a: Expression, b: Expression) -> Expression:
        apply = self.OPERATIONS[operation]
        return Expression.make(
            lambda symbols: apply(a.value(symbols), b.value(symbols)), a.constant and b.constant
        )


class Setter:
    """Takes what a plugin sets: attributes, and items."""

    def __init__(self) -> None:
        self.items: dict[int, Any] = {}

    def __setitem__(self, index: int, item: Any) -> None:
        self.items[index] = item


def tensor(dtype: str, shape: Sequence[int | str]) -> trt.DynamicPluginTensorDesc:
    described = trt.DynamicPluginTensorDesc()
    described.desc.type = getattr(trt.DataType, dtype)
    described.desc.format = trt.TensorFormat.LINEAR
    described.desc.dims = [size if isinstance(size, int) else -1 for size in shape]
    return described


def drive(case: Mapping[str, Any]) -> dict[str, Any]:
    """What a build asks of one node, in its order.

    case: plugin; inputs, each [dtype, shape]; attributes; symbols.
    """
    namespace, name = case["plugin"].split("::")
    creator = REGISTRY.creators[case["plugin"]]
    fields = [  # as the parser makes them of a node's attributes, in the creator's order
        trt.PluginField(field.name, np.array([case["attributes"][field.name]], dtype), kind)
        for field in creator.field_names
        for dtype, kind in [FIELD_TYPES[type(case["attributes"][field.name])]]
    ]
    plugin = creator.create_plugin(
        name,
        namespace,
        trt.PluginFieldCollection(fields),
        trt.TensorRTPhase.BUILD,
        trt.QuickPluginCreationRequest.PREFER_AOT,
    )
    types, shapes = zip(*case["inputs"], strict=True)
    expressions = Expressions()
    output_types = plugin.get_output_data_types(
        [getattr(trt.DataType, dtype) for dtype in types], [len(shape) for shape in shapes]
    )
    sizes = [[expressions.size(size) for size in shape] for shape in shapes]
    output_sizes = plugin.get_output_shapes(sizes, [], expressions)

    symbols = case.get("symbols", {})
    output_shapes = [[size.value(symbols) for size in shape] for shape in output_sizes]
    output_names = [dtype.name for dtype in output_types]
    inputs = [tensor(*spec) for spec in case["inputs"]]
    tensors = inputs + list(map(tensor, output_names, output_shapes))
    formats = plugin.get_supported_format_combinations(tensors, len(inputs))
    plugin.configure_plugin(tensors[: len(inputs)], tensors[len(inputs) :])
    tactics = plugin.get_valid_tactics()
    plugin.set_tactic(0)
    launch, scalars = Setter(), Setter()
    plugin.get_launch_params(sizes, tensors, len(inputs), launch, scalars, expressions)
    kernel, ptx = plugin.get_kernel(
        [each.desc for each in tensors[: len(inputs)]],
        [each.desc for each in tensors[len(inputs) :]],
    )
    return {
        "outputs": [list(pair) for pair in zip(output_names, output_shapes, strict=True)],
        "formats": [[each.type.name, each.format.name] for each in formats],
        "tactics": tactics,
        "aliased": [plugin.get_aliased_input(index) for index in range(len(output_names))],
        "launch": {
            name: getattr(launch, name).value(symbols)
            for name in (
                *("grid_x", "grid_y", "grid_z", "block_x", "block_y", "block_z"),
                "shared_mem",
            )
        },
        "scalars": [scalars.items[index].value(symbols) for index in range(scalars.nbSymExprs)],
        "kernel": kernel,
        "ptx": ptx.decode(),
    }


def attempt(case: Mapping[str, Any]) -> dict[str, Any]:
    """Also what a failure leaves for the error of the build."""
    flavour.last_errors()
    try:
        return drive(case)
    except Exception as error:
        return {"error": str(error), "reported": flavour.last_errors()}


if __name__ == "__main__":
    import numpy as np
    from tensorrt_bindings.plugin import _lib, _tensor

    from wantrt.engines import plugins
    from wantrt.engines.flavours import Flavour

    FIELD_TYPES = {
        float: (np.float32, trt.PluginFieldType.FLOAT32),
        int: (np.int32, trt.PluginFieldType.INT32),
    }
    trt.DimsExprs = lambda length: [None] * length
    _tensor.SymExprImpl = lambda scalar: scalar._expr  # what a C++ object would hold
    cases = json.load(sys.stdin)
    target = sys.argv[1]
    plugins.gpu_target = lambda: target
    flavour = Flavour("tensorrt", trt)
    for _ in range(2):
        plugins.register_plugins(flavour)
    result = {
        "registered": sorted(REGISTRY.creators),
        "python": [name for name, plugin in _lib.QDP_REGISTRY.items() if plugin.impl_func],
        "flags": [flavour.network_flags(plugins=each) for each in (False, True)],
        "cases": [attempt(case) for case in cases],
    }
    print(json.dumps(result))
