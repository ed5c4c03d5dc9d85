"""Every plugin launched as its description says (grid, scalars, constants) against its reference.

Through Triton, so interpreted on a CPU: what TensorRT will launch is the same kernel, as PTX.
"""

import inspect

import pytest
import torch

pytest.importorskip("triton")

from tests.kernels.plugin_cases import make_node, make_values, reference
from wantrt.kernels.nodes import PLUGINS

# bf16: the interpreter cuts off where a GPU rounds
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-6}


@pytest.mark.parametrize("name", PLUGINS)
def test_equals_reference(name: str, kernel_device: str) -> None:
    plugin = PLUGINS[name]
    node = make_node(name, "1.3B", torch.bfloat16)
    tensors = make_values(name, "1.3B", torch.bfloat16, kernel_device)
    binding = plugin.bind(*node)
    outputs = {
        key: torch.full(each.shape, torch.nan, dtype=each.dtype, device=kernel_device)
        for key, each in zip(plugin.outputs, plugin.infer_outputs(*node), strict=True)
    }
    pointers = {f"{key}_ptr": tensor for key, tensor in {**tensors, **outputs}.items()}
    names = [key for key, kind in binding.source.types if kind == "i32"]
    scalars = dict(zip(names, binding.scalars, strict=True))
    given = {**pointers, **scalars, **dict(binding.source.constants)}
    arguments = [given.get(key) for key in inspect.signature(plugin.kernel.fn).parameters]
    plugin.kernel[binding.grid](*arguments, num_warps=binding.source.num_warps)
    for actual, expected in zip(outputs.values(), reference(name, tensors, node[1]), strict=True):
        tolerance = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
