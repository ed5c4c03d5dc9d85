"""Solvers as tables: row i holds the nine coefficients of step i, computed in float64.

Every solver here is linear in what it has seen, so one form serves them all, and every step of each:

    x0        = sample + A * velocity                                            A = -sigma_i
    corrected = B0 * sample + B1 * corrected' + B2 * x0' + B3 * x0'' + B4 * x0
    sample    = C0 * corrected + C1 * x0 + C2 * x0'

Primes count steps back. A lower order is a zero coefficient, never another formula, which is what
lets one captured graph run every step.

How the tables get so short. With alpha = 1 - sigma and lambda = log(alpha / sigma), the solvers'
``alpha_t * expm1(lambda_s - lambda_t)`` is exactly ``sigma_t / sigma_s - 1``. A first-order step is
therefore ``ratio * sample + (1 - ratio) * x0``, which is Euler's; DPM++ of order 2 extrapolates x0
along lambda; UniPC's predictor is that same DPM++ step, preceded by a correction of the sample that
the last step predicted. lambda is left only in the extrapolation, where sigma = 1 (lambda = -inf,
the first sigma of official DPM++) makes the weight of the older x0 zero.
"""

import math

import numpy as np

from wantrt.schedulers.grids import SOLVERS, Array, check_name

NUM_COEFFICIENTS = 9


def make_table(solver: str, sigmas: Array) -> Array:
    """Coefficients float64 [N, 9], columns A B0 B1 B2 B3 B4 C0 C1 C2.

    sigmas: float64 [N + 1], strictly decreasing to 0, as in Grid. The first and the last step are
    of first order; the last one returns x0. Raises SettingsError for an unknown solver.
    """
    check_name("solver", solver, SOLVERS)
    no_correction = (1.0, 0.0, 0.0, 0.0, 0.0)
    steps = len(sigmas) - 1
    table = np.empty((steps, NUM_COEFFICIENTS))
    for i in range(steps):
        corrects = solver == "unipc" and i > 0
        second_order = solver != "euler" and 0 < i < steps - 1
        table[i, 0] = -sigmas[i]
        table[i, 1:6] = _corrector(sigmas, i) if corrects else no_correction
        table[i, 6:] = _predictor(sigmas, i, second_order)
    return table


def _predictor(sigmas: Array, i: int, second_order: bool) -> tuple[float, float, float]:
    """From sigma_i to sigma_{i+1}: weights of corrected, x0, x0'."""
    ratio = float(sigmas[i + 1] / sigmas[i])
    slope = _gap_ratio(sigmas, i) / 2 if second_order else 0.0
    return ratio, (1 - ratio) * (1 + slope), -(1 - ratio) * slope


def _corrector(sigmas: Array, i: int) -> tuple[float, float, float, float, float]:
    """Redo the step from sigma_{i-1} to sigma_i knowing x0 at its end (UniC, B(h) of type bh2).

    Weights of sample (0: the prediction is replaced), corrected', x0', x0'', x0.
    """
    ratio = float(sigmas[i] / sigmas[i - 1])
    if i == 1:
        older, newest = 0.0, 0.5
    else:
        # UniPC's system [[1, 1], [-1 / gap, 1]] @ (rho_1, newest) = (b_1, b_2), solved by hand
        gap = _gap_ratio(sigmas, i - 1)
        h = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
        phi = math.expm1(-h)
        k = -phi / h - 1
        b_1 = k / phi
        b_2 = 2 * (-k / h - 0.5) / phi
        rho_1 = (b_1 - b_2) * gap / (1 + gap)
        older, newest = rho_1 * gap, b_1 - rho_1
    gain = 1 - ratio
    return 0.0, ratio, gain * (1 + older - newest), -gain * older, gain * newest


def _gap_ratio(sigmas: Array, i: int) -> float:
    """Step i's length in lambda over the length of the step before it; 0 after an infinite one."""
    before = _log_snr(sigmas[i]) - _log_snr(sigmas[i - 1])
    return (_log_snr(sigmas[i + 1]) - _log_snr(sigmas[i])) / before


def _log_snr(sigma: float) -> float:
    """lambda = log((1 - sigma) / sigma), for 0 < sigma <= 1."""
    return math.log((1 - sigma) / sigma) if sigma < 1 else -math.inf
