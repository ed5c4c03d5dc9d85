"""A solver at work: the sample and its history, updated in place by rows of a table.

Eleven small elementwise operations a step over float32 tensors of the latent's size, the same ones
for every step, and no host value among them when the step index is a tensor: capture once, replay.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from wantrt.schedulers.tables import Array


class Solver:
    """Runs the table of `make_table` on one latent.

    sample: float32, the latent being denoised; read it before a step, it is overwritten by it.
    All tensors are allocated here once and keep their addresses until the solver is dropped.
    """

    def __init__(
        self, table: Array, shape: Sequence[int], device: torch.device | str = "cpu"
    ) -> None:
        """table: float64 [N, 9]. shape: the latent's, [B, C, F, H, W]. Call `reset` before use."""
        self.rows = torch.tensor(table, dtype=torch.float32, device=device)
        self.sample = torch.zeros(tuple(shape), dtype=torch.float32, device=device)
        self._corrected = torch.zeros_like(self.sample)
        self._x0_1 = torch.zeros_like(self.sample)  # the newest estimate of x0 ...
        self._x0_2 = torch.zeros_like(self.sample)  # ... and the one before

    @property
    def num_inference_steps(self) -> int:
        return len(self.rows)

    def reset(self, sample: Tensor) -> None:
        """Start a run: copy in `sample` (the noise, same shape, any dtype), forget the history."""
        self.sample.copy_(sample)
        for history in (self._corrected, self._x0_1, self._x0_2):
            history.zero_()  # a stale NaN would survive its zero coefficient

    def step(self, velocity: Tensor, index: int | Tensor) -> None:
        """Take step `index`, 0 to N - 1 in order, with the model's output for `sample`.

        velocity: the sample's shape, any dtype. index: int, or int64 [1] on the sample's device
        (then nothing here depends on the host, and the step can be captured).
        """
        if isinstance(index, Tensor):
            row = self.rows.index_select(0, index)[0]
        else:
            row = self.rows[index]
        a, b0, b1, b2, b3, b4, c0, c1, c2 = row.unbind()
        x0 = torch.addcmul(self.sample, velocity.float(), a)
        corrected = self._corrected.mul_(b1)
        corrected.addcmul_(self.sample, b0)
        corrected.addcmul_(self._x0_1, b2).addcmul_(self._x0_2, b3).addcmul_(x0, b4)
        torch.mul(corrected, c0, out=self.sample)
        self.sample.addcmul_(x0, c1).addcmul_(self._x0_1, c2)
        self._x0_2.copy_(self._x0_1)
        self._x0_1.copy_(x0)
