"""A solver at work: the sample and its history, updated in place by the rows of a table.

A step is eight small elementwise operations in float32, the same for every step and every solver,
and none of them needs a host value when the step index is a tensor: capture once, replay.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wantrt.schedulers.grids import Array


class Solver:
    """Runs the table of `make_table` on one latent; the formulas are in tables.py.

    sample: float32, the latent being denoised, overwritten by each step; between steps the caller
    may overwrite a part of it, the same part every time (TI2V's first frame). All tensors are
    allocated here, once, and keep their addresses.
    """

    def __init__(
        self, table: Array, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        """table: float64 [N, 4]. shape: the latent's, [B, C, F, H, W]. Call `reset` before use."""
        self.rows = torch.tensor(table, dtype=torch.float32, device=device)
        self.sample = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
        self._x0 = torch.zeros_like(self.sample)
        self._delta = torch.zeros_like(self.sample)

    @property
    def num_inference_steps(self) -> int:
        return len(self.rows)

    def load(self, table: Array) -> None:
        """Take the coefficients of another table of N rows, in place."""
        self.rows.copy_(torch.tensor(table, dtype=torch.float32))

    def reset(self, sample: Tensor) -> None:
        """Start a run: copy in `sample` (the noise, same shape, any dtype), forget the history."""
        self.sample.copy_(sample)
        self._x0.zero_()  # a NaN left by a failed run would survive its zero coefficient
        self._delta.zero_()

    def step(self, velocity: Tensor, index: int | Tensor) -> None:
        """Take step `index`, 0 to N - 1 in order, with the model's output for `sample`.

        velocity: the sample's shape, any dtype. index: int, or int64 [1] on the sample's device
        (then nothing here depends on the host, and the step can be captured).
        """
        row = self.rows.index_select(0, index)[0] if isinstance(index, Tensor) else self.rows[index]
        sigma, stride, newer, older = row.unbind()
        velocity = velocity.float()
        x0 = torch.addcmul(self.sample, velocity, sigma, value=-1)
        delta = x0 - self._x0
        # the change is summed before it meets the sample: one rounding at the sample's scale
        change = (velocity * stride).addcmul_(delta, newer).addcmul_(self._delta, older)
        self.sample.add_(change)
        self._x0.copy_(x0)
        self._delta.copy_(delta)
