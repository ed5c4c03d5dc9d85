"""Muon for matrices and convolutions, Adam for everything else, and a moving average of weights."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from wantrt.nano.processes import rank, sum_in_place, world_size

MOMENTUM = 0.95


class Muon(torch.optim.Optimizer):
    """Momentum whose direction is made orthogonal (Jordan 2024, https://kellerjordan.github.io).

    A weight of more than two axes counts as the matrix [out, everything else]. The step's RMS is
    0.2 * lr per element, Adam's usual size (Liu 2025, "Muon is scalable").
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(list(params), {"lr": lr})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            steps = []
            for index, weight in enumerate(group["params"]):
                momentum = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                momentum.lerp_(weight.grad, 1 - MOMENTUM)
                direction = weight.grad.lerp(momentum, MOMENTUM).flatten(1)
                if index % world_size() == rank():  # the processes share this work
                    steps.append(orthogonalise(direction))
                else:
                    steps.append(torch.zeros_like(direction))
            sum_in_place(steps)
            for weight, step in zip(group["params"], steps, strict=True):
                scale = 0.2 * math.sqrt(max(step.shape))
                weight.add_(step.view_as(weight), alpha=-group["lr"] * scale)


def orthogonalise(matrix: Tensor, iterations: int = 5) -> Tensor:
    """Push all singular values of a matrix towards one: Newton-Schulz, quintic."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x: Tensor = wide / (wide.norm() + 1e-7)
    for _ in range(iterations):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x if wide is matrix else x.T


class Optimiser:
    """Muon and Adam together, with a warm-up, and a linear decay to zero over the second half."""

    def __init__(self, model: nn.Module, lr: float, num_steps: int) -> None:
        named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
        matrices = [p for n, p in named if _is_matrix(n, p)]
        others = [p for n, p in named if not _is_matrix(n, p)]
        self.lr, self.num_steps = lr, num_steps
        self.parts = (Muon(matrices, lr), torch.optim.Adam(others, lr, betas=(0.9, 0.98)))
        self.params = [*matrices, *others]

    def step(self, index: int) -> None:
        """Apply the gradients of step `index`, then clear them."""
        rest = 2 * (1 - index / self.num_steps)
        rate = self.lr * min(1.0, (index + 1) / 30, rest)
        torch.nn.utils.clip_grad_norm_(self.params, 1.0)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()
            part.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, object]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, dict[str, object]]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


class Average:
    """Exponential moving average of a model's weights: what is evaluated and shipped."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {name: p.detach().clone() for name, p in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, index: int) -> None:
        decay = min(self.decay, (1 + index) / (10 + index))  # forget the start quickly
        for name, weight in model.state_dict().items():
            self.weights[name].lerp_(weight, 1 - decay)


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    tables = ("embed.", "position_bias", "modulation")
    table = any(part in name for part in tables) and not name.endswith("modulation.weight")
    return parameter.ndim >= 2 and not table
