"""The PTX of every plugin, launched as TensorRT launches it: by the driver, with no Triton around.

Inputs, scalars and outputs, and nothing else: what TensorRT would pass. Needs Triton, to compile.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from tests.kernels.plugin_cases import make_node
from wantrt.kernels.aot import ONNX_DTYPES
from wantrt.kernels.nodes import PLUGINS
from wantrt.kernels.ptx import Kernel, compile_kernel
from wantrt.models import ops
from wantrt.schedulers.solver import guided_step

pytestmark = pytest.mark.gpu

BY_ROWS = tuple(name for name in PLUGINS if f"{name}Rows" in PLUGINS)
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2**-7, torch.float16: 2**-9}
Values = dict[str, Any]
References = dict[str, Callable[[Values], tuple[Tensor, ...] | Tensor]]
REFERENCES: References = {
    "Modulate": lambda v: ops.modulate(**v),
    "GatedResidual": lambda v: ops.gated_residual(**v),
    "GatedResidualModulate": lambda v: ops.gated_residual_modulate(**v),
    "ResidualModulate": lambda v: ops.gated_residual_modulate(gate=None, **v),
    "GatedResidualNorm": lambda v: ops.gated_residual_norm(**v),
    "QkNormRope": lambda v: ops.qk_norm_rope(**v)[:2],
    "Rope": lambda v: ops.rope(**v),
    "RmsNorm": lambda v: ops.rms_norm(**v),
    "RmsSilu": lambda v: ops.rms_silu(**v),
    "GuideAndStep": lambda v: guided_step(**v),
}


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


def make_values(name: str, width: str, dtype: torch.dtype) -> tuple[dict[str, Tensor], Values]:
    """Tensors for the inputs of a node, and its attributes as the references take them."""
    inputs, attributes = make_node(name, width, dtype)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: (
            torch.randint(3, each.shape, generator=generator)
            if each.dtype == torch.int64
            else torch.randn(each.shape, generator=generator).to(each.dtype)
        ).cuda()
        for key, each in inputs.items()
    }
    if "dtype" in attributes:
        return tensors, {**attributes, "dtype": ONNX_DTYPES[attributes["dtype"]]}
    return tensors, dict(attributes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("width", ["1.3B", "14B"])
@pytest.mark.parametrize("name", PLUGINS)
def test_equals_reference(name: str, width: str, dtype: torch.dtype) -> None:
    major, minor = torch.cuda.get_device_capability()
    tensors, attributes = make_values(name, width, dtype)
    operands, node = make_node(name, width, dtype)
    binding = PLUGINS[name].bind(operands, node)
    kernel = compile_kernel(binding.source, 10 * major + minor)
    out = [
        torch.full(each.shape, torch.nan, dtype=each.dtype, device="cuda")
        for each in PLUGINS[name].infer_outputs(operands, node)
    ]
    launch(kernel, binding.grid, list(tensors.values()), list(binding.scalars), out)
    values = {**tensors, **attributes}
    if name in BY_ROWS:
        values.setdefault("token_row", None)
    expected = REFERENCES[name.removesuffix("Rows")](values)
    expected = expected if isinstance(expected, tuple) else (expected,)
    for actual, reference in zip(out, expected, strict=True):
        tolerance = TOLERANCE[actual.dtype]
        torch.testing.assert_close(actual, reference, rtol=tolerance, atol=tolerance)
