"""Kernels that cannot be plugins."""

import triton
import triton.language as tl


@triton.jit
def scratch_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """A descriptor made on the device lies in scratch memory, which only Triton's launcher has."""
    tile = tl.make_tensor_descriptor(x_ptr, [SIZE, SIZE], [SIZE, 1], [64, 64]).load([0, 0])
    at = tl.arange(0, 64)
    tl.store(out_ptr + at[:, None] * SIZE + at[None, :], tile)


@triton.jit
def shared_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    """Transposed through shared memory, which takes more than a launch has by default."""
    at = tl.arange(0, SIZE)
    x = tl.load(x_ptr + at[:, None] * SIZE + at[None, :])
    tl.store(out_ptr + at[None, :] * SIZE + at[:, None], x)


@triton.jit
def wrong_kernel(x_ptr, out_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr) + tl.arange(0, SIZE + 1))


@triton.jit
def disordered_kernel(out_ptr, x_ptr, SIZE: tl.constexpr):
    tl.store(out_ptr, tl.load(x_ptr) + SIZE)
