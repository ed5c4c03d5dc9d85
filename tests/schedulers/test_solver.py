"""Trajectories against diffusers, and against the papers' formulas written out in lambda."""

import numpy as np
import pytest
import torch
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from wantrt.errors import SettingsError
from wantrt.schedulers.grids import CONVENTIONS, SOLVERS, Grid, make_grid
from wantrt.schedulers.solver import Solver
from wantrt.schedulers.tables import make_table

SHAPE = (1, 4, 3, 5, 7)
STEPS = [1, 4, 20, 50]
SHIFTS = [3.0, 5.0, 12.0, 16.0]


def toy_velocity(sample, timestep):
    """A model nonlinear in the sample that changes with time and, like a real one, contracts."""
    tanh = torch.tanh if isinstance(sample, torch.Tensor) else np.tanh
    return sample - tanh(sample + timestep / 1000)


def noise(seed=0):
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


def make_solver(name: str, grid: Grid) -> Solver:
    return Solver(make_table(name, grid.sigmas), SHAPE)


def run(solver: Solver, grid: Grid, start: torch.Tensor) -> list[torch.Tensor]:
    solver.reset(start)
    path = []
    for i, timestep in enumerate(grid.timesteps):
        solver.step(toy_velocity(solver.sample, timestep), i)
        path.append(solver.sample.clone())
    return path


def run_float64(table: np.ndarray, grid: Grid, x: np.ndarray) -> list[np.ndarray]:
    """The three lines of tables.py in float64: what the table says, without float32's rounding."""
    x0_before, delta_before, path = 0.0, 0.0, []
    for (sigma, stride, newer, older), timestep in zip(table, grid.timesteps, strict=True):
        velocity = toy_velocity(x, timestep)
        x0 = x - sigma * velocity
        delta = x0 - x0_before
        x = x + stride * velocity + newer * delta + older * delta_before
        x0_before, delta_before = x0, delta
        path.append(x)
    return path


def assert_same_path(actual, expected, tolerance):
    """Every sample on the way, within `tolerance` of the largest value on the path."""
    actual = np.stack([np.asarray(sample, np.float64) for sample in actual])
    expected = np.stack([np.asarray(sample, np.float64) for sample in expected])
    assert np.abs(actual - expected).max() <= tolerance * np.abs(expected).max()


def diffusers_scheduler(name: str, shift: float):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if name == "unipc":
        return UniPCMultistepScheduler(**flow)
    if name == "dpm++":
        return DPMSolverMultistepScheduler(**flow)
    return FlowMatchEulerDiscreteScheduler(shift=shift)


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", SOLVERS)
def test_path_equals_diffusers(name, steps, shift):
    scheduler = diffusers_scheduler(name, shift)
    scheduler.set_timesteps(steps)
    sample, expected = noise(), []
    for timestep in scheduler.timesteps:
        sample = scheduler.step(toy_velocity(sample, timestep), timestep, sample).prev_sample
        expected.append(sample)
    grid = make_grid(name, "diffusers", steps, shift)
    assert_same_path(run(make_solver(name, grid), grid, noise()), expected, tolerance=1e-6)


def log_snr(sigma: float) -> float:
    with np.errstate(divide="ignore"):
        return float(np.log(1 - sigma) - np.log(sigma))


def unipc_by_formula(grid: Grid, x: np.ndarray) -> list[np.ndarray]:
    """FlowUniPC step by step as published (spec §3), float64, deciding orders as it goes."""
    sigmas, total = [float(s) for s in grid.sigmas], grid.num_inference_steps
    lambdas = [log_snr(s) for s in sigmas]
    models, last, order, lower_order_nums, path = [], None, 0, 0, []
    for i, timestep in enumerate(grid.timesteps):
        m = x - sigmas[i] * toy_velocity(x, timestep)
        if i > 0:
            h = lambdas[i] - lambdas[i - 1]
            hh, alpha, m1 = -h, 1 - sigmas[i], models[-1]
            phi = np.expm1(hh)
            base = sigmas[i] / sigmas[i - 1] * last - alpha * phi * m1
            if order == 1:
                residual = 0.5 * (m - m1)
            else:
                r = (lambdas[i - 2] - lambdas[i - 1]) / h
                k1 = phi / hh - 1
                k2 = k1 / hh - 1 / 2
                rho = np.linalg.solve([[1, 1], [r, 1]], [k1 / phi, 2 * k2 / phi])
                residual = rho[0] * (models[-2] - m1) / r + rho[1] * (m - m1)
            x = base - alpha * phi * residual
        models.append(m)
        order = min(2, total - i, lower_order_nums + 1)
        last, h, alpha = x, lambdas[i + 1] - lambdas[i], 1 - sigmas[i + 1]
        phi = np.expm1(-h)
        y = sigmas[i + 1] / sigmas[i] * x - alpha * phi * m
        if order == 2:
            r = (lambdas[i - 1] - lambdas[i]) / h
            y = y - alpha * phi * 0.5 * (models[-2] - m) / r
        lower_order_nums = min(lower_order_nums + 1, 2)
        x = y
        path.append(x)
    return path


def dpm_by_formula(grid: Grid, x: np.ndarray) -> list[np.ndarray]:
    """FlowDPM++ of order 2, midpoint (spec §4), float64; infinities by IEEE arithmetic."""
    sigmas, total = [float(s) for s in grid.sigmas], grid.num_inference_steps
    lambdas = [log_snr(s) for s in sigmas]
    previous, path = None, []
    for i, timestep in enumerate(grid.timesteps):
        m = x - sigmas[i] * toy_velocity(x, timestep)
        h, alpha = lambdas[i + 1] - lambdas[i], 1 - sigmas[i + 1]
        e = np.exp(-h) - 1
        x = sigmas[i + 1] / sigmas[i] * x - alpha * e * m
        if 0 < i < total - 1:
            r0 = (lambdas[i] - lambdas[i - 1]) / h
            x = x - 0.5 * alpha * e * (m - previous) / r0
        previous = m
        path.append(x)
    return path


def euler_by_formula(grid: Grid, x: np.ndarray) -> list[np.ndarray]:
    path = []
    for i, timestep in enumerate(grid.timesteps):
        x = x + (grid.sigmas[i + 1] - grid.sigmas[i]) * toy_velocity(x, timestep)
        path.append(x)
    return path


FORMULAS = {"unipc": unipc_by_formula, "dpm++": dpm_by_formula, "euler": euler_by_formula}


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", [*STEPS, 2, 3])
@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_path_equals_formulas(name, convention, steps, shift):
    grid, start = make_grid(name, convention, steps, shift), noise(1)
    table = make_table(name, grid.sigmas)
    expected = FORMULAS[name](grid, start.double().numpy())
    assert_same_path(run_float64(table, grid, start.double().numpy()), expected, tolerance=1e-11)
    assert_same_path(run(Solver(table, SHAPE), grid, start), expected, tolerance=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_single_step_returns_x0(name, convention):
    grid, start = make_grid(name, convention, 1, 5.0), noise()
    (sample,) = run(make_solver(name, grid), grid, start)
    x0 = start - np.float32(grid.sigmas[0]) * toy_velocity(start, grid.timesteps[0])
    torch.testing.assert_close(sample, x0, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("name", SOLVERS)
def test_tables_are_finite_and_lower_their_order_at_both_ends(name, convention):
    for shift in (0.5, 1.0, 16.0, 3000.0):
        table = make_table(name, make_grid(name, convention, 30, shift).sigmas)
        assert table.shape == (30, 4)
        assert table.dtype == np.float64
        assert np.isfinite(table).all()
        assert np.abs(table).max() <= 1
        assert not table[[0, -1], 2:].any()
        assert table[-1, 1] == -table[-1, 0]  # the sample becomes x0


def test_infinite_first_step_drops_the_older_estimate():
    grid = make_grid("dpm++", "official", 6, 5.0)
    table = make_table("dpm++", grid.sigmas)
    assert grid.sigmas[0] == 1
    assert table[1, 2] == 0
    assert table[2, 2] > 0


def test_runs_are_bit_identical_after_reset_and_in_place():
    grid = make_grid("unipc", "official", 8, 5.0)
    solver = make_solver("unipc", grid)
    tensors = [value for value in vars(solver).values() if isinstance(value, torch.Tensor)]
    addresses = [tensor.data_ptr() for tensor in tensors]
    first = run(solver, grid, noise())
    run(solver, grid, torch.full(SHAPE, torch.nan))  # what a failed run leaves behind
    again = run(solver, grid, noise())
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert addresses == [tensor.data_ptr() for tensor in tensors]


def test_step_index_may_live_on_the_device():
    grid = make_grid("unipc", "official", 5, 5.0)
    by_int, by_tensor = make_solver("unipc", grid), make_solver("unipc", grid)
    by_int.reset(noise())
    by_tensor.reset(noise())
    index = torch.zeros(1, dtype=torch.int64)
    for i, timestep in enumerate(grid.timesteps):
        velocity = toy_velocity(by_int.sample, timestep)
        by_int.step(velocity, i)
        by_tensor.step(velocity, index)
        index += 1
    assert torch.equal(by_int.sample, by_tensor.sample)


def test_sample_stays_float32_for_a_bf16_model():
    grid = make_grid("unipc", "official", 3, 5.0)
    solver = make_solver("unipc", grid)
    solver.reset(noise().bfloat16())
    for i in range(3):
        solver.step(torch.ones(SHAPE, dtype=torch.bfloat16), i)
    assert solver.sample.dtype == torch.float32


def test_unknown_solver_is_refused():
    with pytest.raises(SettingsError, match="did you mean euler"):
        make_table("eular", np.array([1.0, 0.0]))
