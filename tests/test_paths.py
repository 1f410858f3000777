"Paths, restated from their definitions and checked property by property."

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from guidance_nb.paths import EDMPath, FlowPath, VPPath, change_path, check_time, clamp_time

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), VPPath("linear", 0.5, 12.0), EDMPath(), EDMPath(3.0)]
times = st.floats(0.0, 1.0)
inner = st.floats(1e-4, 1 - 1e-4)


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@given(t=inner)
def test_time_of_the_ratio_is_the_time(path, t):
    assert_close(path.time_at(path.noise_to_signal(f64(t))), f64(t), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@given(t=inner)
def test_derivatives_by_central_differences(path, t):
    t = max(t, 1.01 * path.time_at(f64(0.01)).item()) if path in PATHS[1:4] else t  # linear VP's slope is held below
    h = 1e-6 * min(t, 1 - t) + 1e-9
    for value, derivative in ((path.alpha, path.d_alpha), (path.sigma, path.d_sigma)):
        difference = (value(f64(t + h)) - value(f64(t - h))) / (2 * h)
        assert_close(derivative(f64(t)), difference, rtol=2e-4, atol=1e-4)


@given(t=times)
def test_vp_paths_stay_on_the_circle_and_the_flow_path_on_the_line(t):
    for path in PATHS[1:4]:
        assert_close(path.alpha(f64(t)) ** 2 + path.sigma(f64(t)) ** 2, f64(1.0))
    assert_close(PATHS[0].alpha(f64(t)) + PATHS[0].sigma(f64(t)), f64(1.0))


@given(t=st.floats(0.0, 1.0))
def test_linear_schedule_is_the_integral_of_beta(t):
    grid = torch.linspace(0, t, 2001, dtype=torch.float64)
    integral = torch.trapezoid(0.1 + grid * 19.9, grid)
    assert_close(VPPath().alpha(f64(t)), (-0.5 * integral).exp())


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_data_at_zero_and_more_noise_later(path):
    assert_close(path.noise_to_signal(f64(0.0)), f64(0.0))
    ratios = path.noise_to_signal(torch.linspace(0, 1, 200, dtype=torch.float64))
    assert (ratios.diff() > 0).all()


@given(t=st.floats(1e-3, 0.95), x=st.floats(-3, 3))
def test_changing_path_there_and_back(t, x):
    start = torch.full((1, 1), x, dtype=torch.float64)
    for target in PATHS[1:3]:
        moved, s = change_path(start, f64(t), PATHS[0], target)
        assert_close(moved / target.alpha(s), start / (1 - t))
        back, again = change_path(moved, s, target, PATHS[0])
        assert_close((back, again), (start, f64(t)), rtol=1e-8, atol=1e-10)


def test_clamped_times_keep_the_ratio_below_a_thousand():
    for path in PATHS:
        capped = clamp_time(path, torch.linspace(0, 1, 11, dtype=torch.float64))
        assert (path.noise_to_signal(capped) <= 1000 * (1 + 1e-9)).all()
    assert math.isclose(clamp_time(PATHS[0], f64(1.0)).item(), 1000 / 1001)


@pytest.mark.parametrize("path", [*PATHS, VPPath("linear", 0.0, 20.0), EDMPath(1348.0)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_path_is_finite_at_every_time(path, dtype):
    "Velocities, and times of any noise-to-signal ratio, also of none and of infinite noise."
    t = torch.tensor([0.0, 1e-7, 0.5, 1 - 1e-7, 1.0], dtype=dtype)
    for value in (path.alpha, path.sigma, path.d_alpha, path.d_sigma):
        assert value(t).isfinite().all()
    assert path.time_at(torch.tensor([0.0, math.inf], dtype=dtype)).isfinite().all()
    assert path.time_at(torch.zeros((), dtype=dtype)) == 0


@pytest.mark.parametrize("source", PATHS, ids=repr)
@pytest.mark.parametrize("target", PATHS, ids=repr)
def test_a_point_of_pure_noise_changes_path_or_is_refused(source, target):
    x = torch.ones(2, 1, dtype=torch.float64) * source.sigma(f64(1.0))
    if source.noise_to_signal(f64(1.0)) > target.noise_to_signal(f64(1.0)) * (1 + 1e-9):
        with pytest.raises(ValueError, match=r"noise-to-signal ratio of .*; allowed: up to"):
            change_path(x, f64(1.0), source, target)
    else:
        moved, s = change_path(x, f64(1.0), source, target)
        assert_close(moved, torch.ones_like(x) * target.sigma(s))


def test_a_path_whose_signal_never_ends_needs_no_cap():
    "With the largest noise of a Stable Diffusion schedule a cap would ask at another noise level."
    assert clamp_time(EDMPath(1348.0), f64(1.0)) == 1


@pytest.mark.parametrize("t", [-0.1, 1.0001, float("nan"), float("inf")])
def test_times_outside_the_unit_interval_are_refused(t):
    with pytest.raises(ValueError, match=r"^t = .*; allowed: 0 \(data\) to 1 \(noise\)$"):
        check_time(torch.tensor([0.5, t]))


def test_bad_construction_and_shapes_are_refused_in_one_line():
    for make, words in (
        (lambda: VPPath("sigmoid"), "schedule = 'sigmoid'; allowed: 'linear', 'cosine'"),
        (lambda: VPPath(beta_min=float("nan")), "beta_min = nan; allowed: a number, 0 or more"),
        (lambda: VPPath(beta_max=0.0), "beta_max = 0.0; allowed: a positive, finite number"),
        (lambda: EDMPath(0.0), "sigma_max = 0.0; allowed: a positive, finite number"),
        (lambda: FlowPath().interpolate(torch.zeros(3, 2), torch.zeros(3, 1), 0.5), "eps has shape (3, 1)"),
    ):
        with pytest.raises(ValueError) as caught:
            make()
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_paths_are_values():
    assert FlowPath() == FlowPath() and hash(VPPath()) == hash(VPPath()) and VPPath() != VPPath("cosine")
