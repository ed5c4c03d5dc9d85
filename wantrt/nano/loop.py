"""The training loop of all stages: steps, a log, an average, and a file to go on from."""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from wantrt.nano.optim import Average, Optimiser
from wantrt.nano.processes import rank, sum_in_place, world_size

SAVE_EVERY = 250
LOG_EVERY = 50


def train(
    model: nn.Module,
    loss: Callable[[], Tensor],
    file: Path,
    *,
    num_steps: int,
    lr: float,
    average: float,
    seed: int,
) -> dict[str, Tensor]:
    """Minimise `loss` for `num_steps` steps and return the averaged weights.

    State goes to `file` (.pt), and step, loss and seconds to the .csv beside it. A run that was cut
    off goes on from the file; it draws other random numbers then than it would have.
    """
    optimiser, mean = Optimiser(model, lr, num_steps), Average(model, average)
    first = 0
    if file.exists():
        state = torch.load(file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        mean.weights, first = state["average"], state["step"]
    torch.manual_seed(seed + first + 1_000_000 * rank())
    total, start = 0.0, time.monotonic()
    with file.with_suffix(".csv").open("a", buffering=1) as log:
        for step in range(first, num_steps):
            value = loss()
            (value / world_size()).backward()
            sum_in_place([p.grad for p in model.parameters() if p.grad is not None])
            optimiser.step(step)
            mean.update(model, step)
            total += value.item()
            if rank() > 0:
                continue
            if (step + 1) % LOG_EVERY == 0:
                log.write(f"{step + 1},{total / LOG_EVERY:.4f},{time.monotonic() - start:.0f}\n")
                total = 0.0
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == num_steps:
                state = {"model": model.state_dict(), "average": mean.weights}
                state |= {"optimiser": optimiser.state_dict(), "step": step + 1}
                torch.save(state, file.with_suffix(".part"))
                file.with_suffix(".part").replace(file)
    return mean.weights
