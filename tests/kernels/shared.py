"""What the tests of kernels share."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# two float32 sums of another order; in 16 bits, one step of the result where they round apart
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Random:
    """Tensors on a device from one seed, the same on every device."""

    def __init__(self, device: str, seed: int = 0) -> None:
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, dtype)

    def integers(self, below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=self.generator).to(self.device)

    def modulation(self, batch: int, rows: int | None, channels: int) -> tuple[Tensor, ...]:
        """The six rows of a block, [B, R, C], as it takes them apart: views of one tensor."""
        return self.normal(batch, rows or 1, 6, channels).unbind(2)

    def token_row(self, rows: int | None, seq_len: int) -> Tensor | None:
        return None if rows is None else self.integers(rows, seq_len)


def assert_equal(
    actual: Tensor | tuple[Tensor, ...], expected: Tensor | tuple[Tensor, ...]
) -> None:
    """Shapes, dtypes and values, by the tolerance of each dtype."""
    if isinstance(actual, Tensor):
        actual, expected = (actual,), (expected,)
    for one, other in zip(actual, expected, strict=True):
        tolerance = TOLERANCE[other.dtype]
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
