"""A solver at work: the sample and its history, updated in place by the rows of a table.

Guidance and a step are some ten small elementwise operations in float32, the same for every step
and every solver, and none of them needs a host value: capture once, replay.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wantrt.schedulers.grids import Array
from wantrt.schedulers.guidance import guide


def guided_step(
    sample: Tensor,
    x0: Tensor,
    delta: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    guidance_scale: Tensor | None,
    rows: Tensor,
    index: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Guidance, then step `index` of the table `rows`; the formulas are in tables.py.

    sample, x0, delta: float32, of one shape; conditional, unconditional: the model's outputs for
    the sample, the same shape, any dtype; unconditional None: no guidance. guidance_scale: [1].
    rows: float32 [N, 4]; index: int64 [1]. Returns the new sample, x0 and delta.
    """
    velocity = conditional.float()
    if unconditional is not None and guidance_scale is not None:
        velocity = guide(conditional, unconditional, guidance_scale)
    sigma, stride, newer, older = rows[index][0].unbind()
    new_x0 = sample - velocity * sigma
    new_delta = new_x0 - x0
    # the change is summed before it meets the sample: one rounding at the sample's scale
    change = velocity * stride + new_delta * newer + delta * older
    return sample + change, new_x0, new_delta


def guide_and_step(
    sample: Tensor,
    x0: Tensor,
    delta: Tensor,
    conditional: Tensor,
    unconditional: Tensor | None,
    guidance_scale: Tensor | None,
    rows: Tensor,
    index: Tensor,
) -> None:
    """`guided_step`, written into sample, x0 and delta."""
    news = guided_step(sample, x0, delta, conditional, unconditional, guidance_scale, rows, index)
    for own, new in zip((sample, x0, delta), news, strict=True):
        own.copy_(new)


Step = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor, Tensor], None
]


class Solver:
    """Runs the table of `make_table` on one latent; the formulas are in tables.py.

    sample: float32, the latent being denoised, overwritten by each step; between steps the caller
    may overwrite a part of it, the same part every time (TI2V's first frame). All tensors are
    allocated here, once, and keep their addresses.
    """

    def __init__(
        self,
        table: Array,
        shape: Sequence[int],
        device: torch.device | str = "cpu",
        take: Step = guide_and_step,
    ) -> None:
        """table: float64 [N, 4]. shape: the latent's, [B, C, F, H, W]. Call `reset` before use.

        take: what computes a step, in place.
        """
        self._take = take
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

    def step(
        self,
        conditional: Tensor,
        index: int | Tensor,
        unconditional: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> None:
        """Take step `index`, 0 to N - 1 in order, with the model's output for `sample`.

        conditional, and unconditional if there is guidance: the sample's shape, any dtype.
        index: int, or int64 [1] on the sample's device (then nothing here depends on the host, and
        the step can be captured). guidance_scale: float32 [1].
        """
        if isinstance(index, int):
            index = torch.tensor([index], device=self.sample.device)
        self._take(
            self.sample,
            self._x0,
            self._delta,
            conditional,
            unconditional,
            guidance_scale,
            self.rows,
            index,
        )
