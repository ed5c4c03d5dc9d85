"""What a launcher demands of its tensors, checked before a kernel can touch memory.

A kernel believes its arguments: a wrong size or device is a late CUDA fault, or wrong numbers.
"""

import torch
import triton
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


def require_contiguous_channels(op: str, name: str, tensor: Tensor) -> None:
    """The last axis alone has to be contiguous."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        refuse(op, f"the last axis of {name} is not contiguous: call .contiguous()")


def require_rank(op: str, name: str, tensor: Tensor, letters: str) -> None:
    """`letters` names the axes, as in "B L C"; none of them may be empty."""
    if tensor.dim() != len(letters.split()):
        axes = letters.replace(" ", ", ")
        refuse(op, f"{name} has shape {list(tensor.shape)}, expected [{axes}]")
    require_elements(op, name, tensor)


def require_elements(op: str, name: str, tensor: Tensor) -> None:
    if tensor.numel() == 0:
        refuse(op, f"{name} has shape {list(tensor.shape)}: there is nothing in it")


def require_modulation(
    op: str, tensors: dict[str, Tensor], x: Tensor, token_row: Tensor | None
) -> tuple[int, int]:
    """Check modulation [B, R, C] for the tokens of x [B, L, C]; returns its strides of B and R.

    The tensors may be views, such as `unbind` gives, of equal strides and contiguous channels.
    """
    batch, seq_len, channels = x.shape
    if token_row is not None:
        require(op, "token_row", token_row, (seq_len,), x.device, (torch.int64,))
        require_contiguous(op, "token_row", token_row)
    strides: dict[str, tuple[int, int]] = {}
    for name, tensor in tensors.items():
        require_rank(op, name, tensor, "B R C")
        rows = 1 if token_row is None else next(iter(tensors.values())).shape[1]
        require(op, name, tensor, (batch, rows, channels), x.device)
        require_contiguous_channels(op, name, tensor)
        strides[name] = tensor.stride(0) if batch > 1 else 0, tensor.stride(1) if rows > 1 else 0
    if len(set(strides.values())) > 1:
        refuse(op, f"strides of (B, R) differ, {strides}: make them equal, as by .contiguous()")
    return next(iter(strides.values()), (0, 0))


def require_dtype(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOATS:
        refuse(op, f"dtype is {dtype}, expected one of {FLOATS}")


def require_device(op: str, tensor: Tensor) -> None:
    """Kernels run on CUDA tensors; on the CPU only where Triton interprets them."""
    interpreted = triton.knobs.runtime.interpret
    if not (tensor.is_cuda or (interpreted and tensor.device.type == "cpu")):
        refuse(op, f"the tensors are on {tensor.device}, a kernel runs on CUDA: use the reference")


def require_one_device(op: str, *tensors: Tensor | None) -> None:
    """For the fake of an op: torch calls it instead of the launcher if any one tensor is on meta.

    The others may have data, and what the fake returns would be taken for a result.
    """
    devices = {str(tensor.device) for tensor in tensors if tensor is not None}
    if len(devices) > 1:
        refuse(op, f"the tensors are on {' and '.join(sorted(devices))}: move them to one device")


def refuse(op: str, what: str) -> None:
    raise ExecutionError(f"wantrt.kernels.{op}: {what}")
