"""The PTX of every plugin, launched as TensorRT launches it: by the driver, with no Triton around.

Inputs, scalars and outputs, and nothing else: what TensorRT would pass. Needs Triton, to compile.
"""

import ctypes

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels.plugin_cases import make_node, make_values, reference
from wantrt.kernels.nodes import PLUGINS
from wantrt.kernels.ptx import Kernel, compile_kernel

pytestmark = pytest.mark.gpu

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9}


def launch(
    kernel: Kernel,
    grid: tuple[int, ...],
    inputs: list[Tensor],
    scalars: list[int],
    out: list[Tensor],
) -> None:
    """Through CUDA's driver, on torch's stream."""
    driver = ctypes.CDLL("libcuda.so.1")

    def call(name: str, *arguments: object) -> None:
        status = getattr(driver, name)(*arguments)
        assert status == 0, f"{name}: CUDA error {status}"

    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    call("cuModuleLoadData", ctypes.byref(module), kernel.ptx.encode() + b"\0")
    call("cuModuleGetFunction", ctypes.byref(function), module, kernel.name.encode())
    values = [
        *(ctypes.c_uint64(tensor.data_ptr()) for tensor in inputs),
        *(ctypes.c_int32(scalar) for scalar in scalars),
        *(ctypes.c_uint64(tensor.data_ptr()) for tensor in out),
    ]
    addresses = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    call(
        "cuLaunchKernel",
        function,
        *(ctypes.c_uint(size) for size in (*grid, 1, 1)[:3]),
        *(ctypes.c_uint(size) for size in (kernel.num_threads, 1, 1, kernel.shared_bytes)),
        ctypes.c_void_p(torch.cuda.current_stream().cuda_stream),
        addresses,
        None,
    )
    torch.cuda.synchronize()
    call("cuModuleUnload", module)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", ["1.3B", "14B"])
@pytest.mark.parametrize("name", PLUGINS)
def test_equals_reference(name: str, width: str, dtype: torch.dtype) -> None:
    major, minor = torch.cuda.get_device_capability()
    tensors = make_values(name, width, dtype, "cuda")
    operands, node = make_node(name, width, dtype)
    binding = PLUGINS[name].bind(operands, node)
    kernel = compile_kernel(binding.source, 10 * major + minor)
    out = [
        torch.full(each.shape, torch.nan, dtype=each.dtype, device="cuda")
        for each in PLUGINS[name].infer_outputs(operands, node)
    ]
    launch(kernel, binding.grid, list(tensors.values()), list(binding.scalars), out)
    for actual, expected in zip(out, reference(name, tensors, node), strict=True):
        tolerance = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)
