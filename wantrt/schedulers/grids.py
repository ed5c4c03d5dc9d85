"""Sigma grids: which noise levels a run visits, and what the transformer is told at each.

``sample = (1 - sigma) * x0 + sigma * noise``. A grid is a base spacing of sigma, bent by the shift
``s * sigma / (1 + (s - 1) * sigma)`` so that large videos spend more steps at high noise. The two
conventions differ in the base spacing only, and that moves about half of the timesteps by one.

| solver | official                    | diffusers                                           |
|--------|-----------------------------|-----------------------------------------------------|
| unipc  | float32(0.999) -> 0         | 1 -> 0.001, first sigma held below 1                |
| dpm++  | 1 -> 0 (first sigma is 1)   | 0.999 -> 0                                          |
| euler  | as dpm++ (official has none)| 1 -> 0.001 shifted, then shifted again, N inclusive |

Without a model of its own to follow, official Euler takes the plain shifted grid: it is the one
that few-step distilled checkpoints are trained on (4 steps, shift 5: 1000, 937, 833, 625).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from wantrt.errors import SettingsError
from wantrt.names import check_name

Array = NDArray[np.float64]

TRAIN_TIMESTEPS = 1000  # a timestep is sigma in units of 1/1000


@dataclass(frozen=True, eq=False)
class Grid:
    """The noise levels of one run of N steps.

    sigmas: float64 [N + 1], strictly decreasing, the last one 0. The values are float32 numbers:
    both conventions store them so, and near sigma = 1 that rounding changes log(1 - sigma).
    timesteps: float64 [N], what the transformer is fed; whole numbers except for diffusers' Euler.
    """

    sigmas: Array
    timesteps: Array

    @property
    def num_inference_steps(self) -> int:
        return len(self.timesteps)


def make_grid(solver: str, convention: str, num_inference_steps: int, flow_shift: float) -> Grid:
    """The grid that `convention` uses for `solver`.

    Raises SettingsError for an unknown name, a step count outside 1..1000, a shift that is not
    positive, or one so large that neighbouring sigmas are the same float32 number.
    """
    check_name("solver", solver, SOLVERS)
    check_name("convention", convention, CONVENTIONS)
    if not 1 <= num_inference_steps <= TRAIN_TIMESTEPS:
        raise SettingsError(
            f"num_inference_steps is {num_inference_steps}; use 1 to {TRAIN_TIMESTEPS}"
        )
    if not (math.isfinite(flow_shift) and flow_shift > 0):
        raise SettingsError(f"flow_shift is {flow_shift}; use a positive number (Wan: 3 to 16)")
    sigmas = _SPACINGS[solver, convention](num_inference_steps, float(flow_shift))
    stored = np.append(sigmas.astype(np.float32), np.float32(0))
    if not (np.diff(stored) < 0).all():
        raise SettingsError(
            f"flow_shift {flow_shift:g} leaves no distance between the sigmas of"
            f" {num_inference_steps} steps; use a smaller shift (Wan: 3 to 16)"
        )
    if (solver, convention) == ("euler", "diffusers"):
        timesteps = stored[:-1] * np.float32(TRAIN_TIMESTEPS)
    else:
        timesteps = np.trunc(sigmas * TRAIN_TIMESTEPS)
    return Grid(stored.astype(np.float64), timesteps.astype(np.float64))


def count_high_noise_steps(grid: Grid, boundary_ratio: float) -> int:
    """How many of the first steps belong to the experts above it: those with t >= 1000 * boundary.

    Timesteps only fall, so the rest belongs to the experts below.
    """
    return int(np.count_nonzero(grid.timesteps >= boundary_ratio * TRAIN_TIMESTEPS))


def split_steps(grid: Grid, boundary_ratios: Sequence[float]) -> list[range]:
    """The steps of each expert; the next one takes over below a boundary. Some may have none."""
    ends = [count_high_noise_steps(grid, ratio) for ratio in boundary_ratios]
    ends.append(grid.num_inference_steps)
    return [range(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def _shift(sigmas: Array, flow_shift: float) -> Array:
    return flow_shift * sigmas / (1 + (flow_shift - 1) * sigmas)


def _official_unipc(steps: int, flow_shift: float) -> Array:
    sigma_max = float(np.float32(0.999))  # the last entry of the scheduler's float32 table
    return _shift(np.linspace(sigma_max, 0, steps + 1)[:-1], flow_shift)


def _official_plain(steps: int, flow_shift: float) -> Array:
    return _shift(np.linspace(1, 0, steps + 1)[:-1], flow_shift)


def _diffusers_unipc(steps: int, flow_shift: float) -> Array:
    sigmas = _shift(np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1)[:-1], flow_shift)
    if abs(sigmas[0] - 1) < 1e-6:
        sigmas[0] -= 1e-6  # log(1 - sigma) must stay finite there
    return sigmas


def _diffusers_dpm(steps: int, flow_shift: float) -> Array:
    base = 1 - np.linspace(1, 1 / TRAIN_TIMESTEPS, steps + 1)
    return np.flip(_shift(base, flow_shift))[:-1]


def _diffusers_euler(steps: int, flow_shift: float) -> Array:
    # sigma_max and sigma_min come from a float32 table that is shifted already
    ends = np.array([1, 1 / TRAIN_TIMESTEPS], np.float32)
    sigma_max, sigma_min = (flow_shift * ends / (1 + (flow_shift - 1) * ends)).tolist()
    timesteps = np.linspace(sigma_max * TRAIN_TIMESTEPS, sigma_min * TRAIN_TIMESTEPS, steps)
    return _shift(timesteps / TRAIN_TIMESTEPS, flow_shift)


_SPACINGS: dict[tuple[str, str], Callable[[int, float], Array]] = {
    ("unipc", "official"): _official_unipc,
    ("unipc", "diffusers"): _diffusers_unipc,
    ("dpm++", "official"): _official_plain,
    ("dpm++", "diffusers"): _diffusers_dpm,
    ("euler", "official"): _official_plain,
    ("euler", "diffusers"): _diffusers_euler,
}

SOLVERS = tuple(dict.fromkeys(solver for solver, _ in _SPACINGS))
CONVENTIONS = tuple(dict.fromkeys(convention for _, convention in _SPACINGS))
