"""Solvers as tables: row i holds the four coefficients of step i, computed in float64.

Every solver here is linear in what it has seen, so one form serves every step of each:

    x0      = sample - sigma * velocity         what the model takes the clean latent to be
    delta   = x0 - x0'                          primes: one step back; zero before the first
    sample += stride * velocity + newer * delta + older * delta'

A lower order is a zero coefficient, never another formula: one captured graph runs every step.
Euler is the first term alone, ``stride = sigma_next - sigma``.

How this comes out of the papers. With alpha = 1 - sigma and lambda = log(alpha / sigma), the factor
``-alpha_t * expm1(lambda_s - lambda_t)`` of a step from s to t is exactly ``gain = 1 - ratio`` with
``ratio = sigma_t / sigma_s``. Everybody's first-order step, ``ratio * sample + gain * x0``, is
therefore Euler's. DPM++ of order 2 adds the trend of x0 along lambda, a multiple of delta. UniPC
predicts with that same step, but first redoes the step that led here, now that x0 is known at both
its ends; as the sample still holds what was predicted then, only the difference is added, and it
reaches the next sample through ratio. lambda is left in ratios of step lengths alone, where
sigma = 1 (lambda = -inf, the first sigma of official DPM++) gives the older estimate no weight.
"""

import math

import numpy as np

from wantrt.names import check_name
from wantrt.schedulers.grids import SOLVERS, Array

COLUMNS = ("sigma", "stride", "newer", "older")


def make_table(solver: str, sigmas: Array) -> Array:
    """Coefficients float64 [N, 4], one column for each of COLUMNS.

    sigmas: float64 [N + 1], strictly decreasing to 0, as in Grid. The first and the last step are
    of first order; the last one returns x0. Raises SettingsError for an unknown solver.
    """
    check_name("solver", solver, SOLVERS)
    steps = len(sigmas) - 1
    table = np.zeros((steps, len(COLUMNS)))
    for i in range(steps):
        ratio = sigmas[i + 1] / sigmas[i]
        newer = older = 0.0
        if solver != "euler" and 0 < i < steps - 1:
            newer = (1 - ratio) * _stretch(sigmas, i) / 2
        if solver == "unipc" and i > 0:
            correct_newer, correct_older = _corrector(sigmas, i)
            newer += ratio * correct_newer
            older += ratio * correct_older
        table[i] = sigmas[i], sigmas[i + 1] - sigmas[i], newer, older
    return table


def _corrector(sigmas: Array, i: int) -> tuple[float, float]:
    """UniC (bh2) at sigma_i, i > 0: weights of delta and delta' to add to what was predicted."""
    gain = 1 - sigmas[i] / sigmas[i - 1]
    if i == 1:  # the step to be corrected was of first order
        return gain / 2, 0.0
    # UniPC's system [[1, 1], [-1 / stretch, 1]] @ (rho_1, rho_2) = (b_1, b_2), solved by hand
    stretch = _stretch(sigmas, i - 1)
    h = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
    phi = math.expm1(-h)
    k = -phi / h - 1
    b_1 = k / phi
    b_2 = 2 * (-k / h - 0.5) / phi
    rho_1 = (b_1 - b_2) * stretch / (1 + stretch)
    rho_2 = b_1 - rho_1
    return gain * rho_2, gain * stretch * (rho_1 - 0.5)  # 0.5: what the prediction has already


def _stretch(sigmas: Array, i: int) -> float:
    """Step i's length in lambda over the length of the step before it; 0 after an infinite one."""
    before = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
    return (_log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])) / before


def _log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), for 0 < sigma <= 1."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
