"""What a launcher demands of its tensors, checked before a kernel can touch memory.

A kernel believes its arguments: a wrong size or device is a late CUDA fault, or wrong numbers.
"""

import torch
from torch import Tensor

from wantrt.errors import ExecutionError
from wantrt.linked import refuse_other_names

refuse_other_names(__spec__)

FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def require(
    op: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = FLOATS,
) -> None:
    """Raise ExecutionError unless `tensor` has this shape and device and one of these dtypes."""
    if tuple(tensor.shape) != shape:
        refuse(op, f"{name} has shape {list(tensor.shape)}, expected {list(shape)}")
    if tensor.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        refuse(op, f"{name} is {tensor.dtype}, expected {expected}: convert it with .to()")
    if tensor.device != device:
        refuse(op, f"{name} is on {tensor.device}, the other tensors on {device}: move it there")


def require_contiguous(op: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_contiguous():
        refuse(op, f"{name} is not contiguous (strides {tensor.stride()}): call .contiguous()")


def require_rank(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """`letters` names the axes, as in "B L C"."""
    if tensor.dim() != len(letters.split()):
        axes = letters.replace(" ", ", ")
        refuse(op, f"{name} has shape {list(tensor.shape)}, expected [{axes}]")


def require_device(op: str, tensor: Tensor, interpreted: bool) -> None:
    """Kernels run on CUDA tensors; on the CPU only where Triton interprets them."""
    if tensor.device.type != ("cpu" if interpreted else "cuda") and not (
        interpreted and tensor.is_cuda
    ):
        refuse(op, f"the tensors are on {tensor.device}, a kernel runs on CUDA: use the reference")


def refuse(op: str, what: str) -> None:
    raise ExecutionError(f"wantrt.kernels.{op}: {what}")
