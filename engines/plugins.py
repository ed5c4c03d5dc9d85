"""Kernels in a plan: what kernels/nodes.py describes, as plugins of TensorRT's.

They are registered only in a process that compiles a plan, and only there is anything of them
Python: TensorRT asks for the PTX of a kernel and for how to launch it, and both go into the plan.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from hashlib import sha256
from importlib.util import find_spec
from inspect import Parameter, Signature
from pathlib import Path
from types import GenericAlias
from typing import TYPE_CHECKING

import torch

from wantrt.engines import api
from wantrt.engines.flavours import Flavour, gpu_target
from wantrt.engines.network import PLUGIN_NAMESPACE
from wantrt.errors import BuildError, RuntimeUnavailableError
from wantrt.linked import refuse_other_names

if TYPE_CHECKING:  # kernels need Triton, and only who builds with plugins needs kernels
    from wantrt.kernels.aot import Operand, Plugin

refuse_other_names(__spec__)

FORMAT = "LINEAR"  # contiguous
TYPE_NAMES = {  # as TensorRT spells them in an AutoTuneCombination
    torch.float32: "FP32",
    torch.float16: "FP16",
    torch.bfloat16: "BF16",
    torch.int64: "INT64",
}

_registered: set[tuple[str, str]] = set()  # flavour and plugin, in this process


def register_plugins(flavour: Flavour) -> None:
    """Make the kernels known to TensorRT; safe to repeat.

    Raises SettingsError where the flavour takes none, RuntimeUnavailableError without Triton.
    """
    library = flavour.plugin_module()
    for plugin in _plugins().values():
        if (flavour.name, plugin.name) not in _registered:
            _Functions(flavour, library, plugin).register()
            _registered.add((flavour.name, plugin.name))


def plugin_names() -> frozenset[str]:
    """The types of nodes that have a kernel. Raises RuntimeUnavailableError without Triton."""
    return frozenset(_plugins())


@cache
def hash_plugins() -> str:
    """Of what decides the bytes of kernels in a plan, for a GPU: their code, and Triton's version.

    Raises RuntimeUnavailableError without Triton.
    """
    _plugins()
    from triton import __version__ as triton_version

    digest = sha256(triton_version.encode())
    kernels = Path(__file__).parents[1] / "kernels"
    for path in (Path(__file__), *sorted(kernels.glob("*.py"))):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _plugins() -> "Mapping[str, Plugin]":
    if find_spec("triton") is None:
        raise RuntimeUnavailableError(
            "plugins are compiled by Triton, which is not installed: pip install triton"
        )
    from wantrt.kernels.nodes import PLUGINS

    return PLUGINS


class _Functions:
    """What TensorRT calls of one plugin: with its inputs, its attributes, and more that is unused.

    What is raised here TensorRT swallows, so it is kept for the error of the build.
    """

    def __init__(self, flavour: Flavour, library: api.FullPluginModule, plugin: "Plugin") -> None:
        self._flavour, self._library, self._plugin = flavour, library, plugin

    def register(self) -> None:
        library = self._library
        plugin_id = f"{PLUGIN_NAMESPACE}::{self._plugin.name}"
        outputs = GenericAlias(tuple, (library.TensorDesc,) * len(self._plugin.outputs))
        library.register(plugin_id)(self._declare(self.describe, outputs))
        types = GenericAlias(list, (library.AutoTuneCombination,))
        library.autotune(plugin_id)(self._declare(self.list_types, types, "outputs"))
        kernel = GenericAlias(tuple, (str, str, library.KernelLaunchParams, library.SymIntExprs))
        library.aot_impl(plugin_id)(self._declare(self.compile, kernel, "outputs", "tactic"))

    def describe(
        self, *inputs: api.FullTensorDesc, **attributes: float
    ) -> tuple[api.FullTensorDesc, ...]:
        """The outputs of a node."""
        outputs = self._plugin.infer_outputs(self._operands(inputs), attributes)
        return tuple(
            self._library.from_shape_expr(output.shape, self._flavour.own_dtype(output.dtype))
            for output in outputs
        )

    def list_types(
        self, *arguments: api.FullTensorDesc | Sequence[api.FullTensorDesc]
    ) -> list[object]:
        """The types and formats that it takes: those of the graph, which have been checked.

        Nothing may be worked out here: expressions of sizes do not know how to at this time.
        """
        inputs = [each for each in arguments if not isinstance(each, Sequence)]
        (outputs,) = (each for each in arguments if isinstance(each, Sequence))
        tensors = (*inputs[: len(self._plugin.inputs)], *outputs)
        names = [TYPE_NAMES[self._flavour.torch_dtype(tensor.dtype)] for tensor in tensors]
        return [self._library.AutoTuneCombination(", ".join(names), FORMAT)]

    def compile(self, *arguments: api.FullTensorDesc) -> tuple[str, str, object, object]:
        """The name of a kernel, its PTX, how to launch it, and its scalars."""
        from wantrt.kernels.ptx import compile_kernel

        binding = self._plugin.bind(self._operands(arguments), self._attributes(arguments))
        kernel = compile_kernel(binding.source, _capability())
        library = self._library
        launch = library.KernelLaunchParams(
            **dict(zip(("grid_x", "grid_y", "grid_z"), binding.grid, strict=False)),
            block_x=kernel.num_threads,
            shared_mem=kernel.shared_bytes,
        )
        scalars = library.SymIntExprs(len(binding.scalars))
        for index, scalar in enumerate(binding.scalars):
            scalars[index] = library.SymInt32(scalar)
        return kernel.name, kernel.ptx, launch, scalars

    def _operands(self, arguments: Sequence[api.FullTensorDesc]) -> "dict[str, Operand]":
        """The first arguments. Sizes that are known are numbers."""
        from wantrt.kernels.aot import Operand

        tensors = zip(self._plugin.inputs, arguments, strict=False)
        return {
            name: Operand(
                tuple(
                    size if size.is_fake or not size.is_constant else size.constant_value()
                    for size in tensor.shape_expr
                ),
                self._flavour.torch_dtype(tensor.dtype),
            )
            for name, tensor in tensors
        }

    def _attributes(self, arguments: Sequence[object]) -> dict[str, object]:
        """Those behind the inputs, in the order in which they are declared."""
        values = arguments[len(self._plugin.inputs) :]
        return dict(zip(self._plugin.attributes, values, strict=False))

    def _declare(self, function: Callable[..., object], result: object, *more: str) -> "_Declared":
        annotations = {
            **dict.fromkeys(self._plugin.inputs, self._library.TensorDesc),
            **self._plugin.attributes,
            **dict.fromkeys(more, Parameter.empty),
        }
        kind = Parameter.POSITIONAL_OR_KEYWORD
        parameters = [Parameter(name, kind, annotation=a) for name, a in annotations.items()]
        return _Declared(function, Signature(parameters, return_annotation=result), self._flavour)


class _Declared:
    """A function with a signature that TensorRT reads, to know what to pass."""

    def __init__(
        self, function: Callable[..., object], signature: Signature, flavour: Flavour
    ) -> None:
        self._function, self.__signature__, self._flavour = function, signature, flavour

    def __call__(self, *args: object, **kwargs: object) -> object:
        try:
            return self._function(*args, **kwargs)
        except Exception as error:
            self._flavour.report(error)
            raise


def _capability() -> int:
    """Of the GPU that compiles the plan and runs it: 90 for 9.0."""
    target = gpu_target()
    if target is None:
        raise BuildError("plugins are compiled for the GPU of this machine, which has none")
    return int(target.removeprefix("sm"))
