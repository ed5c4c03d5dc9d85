"""Grids against the official numbers of spec §2 and against diffusers itself."""

import numpy as np
import pytest
from diffusers import (
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from wantrt.errors import SettingsError
from wantrt.schedulers.grids import (
    CONVENTIONS,
    SOLVERS,
    count_high_noise_steps,
    make_grid,
    split_steps,
)

STEPS = [1, 2, 4, 20, 50]
SHIFTS = [1.0, 3.0, 5.0, 12.0, 16.0]

T2V_A14B = (
    "999 997 995 993 990 988 985 982 979 976 972 969 965 961 956 952 947 941 936 929 922 915 907"
    " 898 888 877 865 852 837 819 799 776 749 717 678 631 571 492 386 235"
)
I2V_A14B = "999 994 989 983 978 972 965 959 952 944 937 929 920 911 902 892 882"
STEPS_20 = "999 989 978 965 952 937 920 902 882 859 833 803 768 728 681 624 555 468 356 208"


@pytest.mark.parametrize(
    "solver, convention, steps, shift, first, last",
    [
        ("unipc", "official", 40, 12.0, T2V_A14B, ""),
        ("unipc", "official", 40, 5.0, I2V_A14B, "208 113"),
        ("unipc", "official", 40, 3.0, "999 991 982 973 963 954 944 933 922 911 899", "136 71"),
        ("unipc", "official", 50, 16.0, "999 998 997 995 994", "504 399 245"),
        ("unipc", "official", 50, 5.0, "999 995 991 987 982", "302 241 172 92"),
        ("unipc", "official", 20, 5.0, STEPS_20, ""),
        ("dpm++", "official", 50, 5.0, "1000 995 991 987", "241 172 92"),
        ("euler", "official", 4, 5.0, "1000 937 833 625", ""),
        ("unipc", "diffusers", 50, 5.0, "999 995 991 987", "244 175 96"),
    ],
)
def test_timesteps_are_the_published_ones(solver, convention, steps, shift, first, last):
    timesteps = make_grid(solver, convention, steps, shift).timesteps.tolist()
    head, tail = [int(t) for t in first.split()], [int(t) for t in last.split()]
    assert timesteps[: len(head)] == head
    assert timesteps[len(timesteps) - len(tail) :] == tail
    assert len(timesteps) == len(set(timesteps)) == steps


def test_conventions_differ_where_the_spec_says():
    official = make_grid("unipc", "official", 50, 5.0).timesteps
    diffusers = make_grid("unipc", "diffusers", 50, 5.0).timesteps
    assert np.count_nonzero(official != diffusers) == 27


@pytest.mark.parametrize("shift", SHIFTS)
@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_diffusers_grid_equals_diffusers(solver, steps, shift):
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    scheduler = {
        "unipc": lambda: UniPCMultistepScheduler(**flow),
        "dpm++": lambda: DPMSolverMultistepScheduler(**flow),
        "euler": lambda: FlowMatchEulerDiscreteScheduler(shift=shift),
    }[solver]()
    scheduler.set_timesteps(steps)
    grid = make_grid(solver, "diffusers", steps, shift)
    np.testing.assert_array_equal(grid.sigmas, scheduler.sigmas.double().numpy())
    np.testing.assert_array_equal(grid.timesteps, scheduler.timesteps.double().numpy())


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_grid_is_sound(solver, convention):
    for steps in (1, 7, 1000):
        grid = make_grid(solver, convention, steps, 5.0)
        assert grid.num_inference_steps == steps
        assert len(grid.sigmas) == steps + 1
        assert grid.sigmas.dtype == grid.timesteps.dtype == np.float64
        assert grid.sigmas[-1] == 0
        assert (np.diff(grid.sigmas) < 0).all()
        np.testing.assert_array_equal(grid.sigmas, grid.sigmas.astype(np.float32))


def test_every_step_has_one_expert():
    grid = make_grid("unipc", "official", 40, 12.0)
    assert split_steps(grid, ()) == [range(40)]
    assert split_steps(grid, (0.875,)) == [range(26), range(26, 40)]
    assert split_steps(grid, (0.9999, 0.875, 0.0001)) == [
        range(0),
        range(26),
        range(26, 40),
        range(40, 40),
    ]


def test_experts_split_as_released():
    assert count_high_noise_steps(make_grid("unipc", "official", 40, 12.0), 0.875) == 26
    assert count_high_noise_steps(make_grid("unipc", "official", 40, 5.0), 0.900) == 15
    assert count_high_noise_steps(make_grid("dpm++", "official", 1, 5.0), 1.0) == 1  # t == boundary


@pytest.mark.parametrize(
    "settings, message",
    [
        (("unipcc", "official", 50, 5.0), "did you mean unipc?"),
        (("DPM++", "official", 50, 5.0), "did you mean dpm++?"),
        (("heun", "official", 50, 5.0), "unipc, dpm++, euler"),
        (("unipc", "diffuser", 50, 5.0), "did you mean diffusers?"),
        (("unipc", "official", 0, 5.0), "num_inference_steps is 0"),
        (("unipc", "official", -3, 5.0), "num_inference_steps is -3"),
        (("unipc", "official", 10**9, 5.0), "1 to 1000"),
        (("unipc", "official", 50, 0.0), "flow_shift is 0"),
        (("unipc", "official", 50, -1.0), "flow_shift is -1"),
        (("unipc", "official", 50, float("nan")), "flow_shift is nan"),
        (("unipc", "official", 50, 1e12), "smaller shift"),
    ],
)
def test_bad_settings_get_one_clear_line(settings, message):
    with pytest.raises(SettingsError) as error:
        make_grid(*settings)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
