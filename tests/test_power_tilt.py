"The power tilt and the ways to it, restated without the notebook's code."

import math

import numpy as np
import pytest
import torch
from page_code import page_code
from scipy.optimize import brentq
from torch.testing import assert_close

from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import NetworkDenoiser, Prediction, count_nfe
from guidance_nb.mixtures import ExactDenoiser, Mixture, fractal, log_prob
from guidance_nb.networks import MLP, mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.power_tilt import (
    CharacteristicGuidance,
    PredictorCorrector,
    _effective_share,
    _langevin_steps,
    _restrict,
    _solve_rows,
    _systematic_resample,
    anderson_step,
    sample_feynman_kac,
)
from guidance_nb.samplers import sample, time_grid

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()]
each_path = pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "cosine", "edm"])
page = page_code("18_power_tilt", "number", "tilt_mixture", "tilt_on_grid", "class_mixture", "MixturePair")
tilt_mixture, tilt_on_grid, class_mixture, MixturePair = (
    page.tilt_mixture,
    page.tilt_on_grid,
    page.class_mixture,
    page.MixturePair,
)
EXACT = {"progress": False, "dtype": torch.float64}


def gaussian(mean, variance) -> Mixture:
    mean = torch.atleast_1d(torch.as_tensor(mean, dtype=torch.float64))
    return Mixture(mean[None], torch.tensor([variance], dtype=torch.float64), torch.tensor([0]))


def mixture_1d(means, variances, labels=None, weights=None) -> Mixture:
    labels = [0] * len(means) if labels is None else labels
    column = torch.tensor(means, dtype=torch.float64)[:, None]
    weights = None if weights is None else torch.tensor(weights)
    return Mixture(column, torch.tensor(variances, dtype=torch.float64), torch.tensor(labels), weights)


def normal(x, mean, variance):
    return np.exp(-0.5 * (x - mean) ** 2 / variance) / np.sqrt(2 * np.pi * variance)


# ---- the exact tilt


@pytest.mark.parametrize("scale", [-0.2, 0.0, 0.7, 1.0, 2.0, 4.5])
def test_the_tilt_of_two_gaussians(scale):
    tilt = tilt_mixture(gaussian(0.7, 0.5), gaussian(-1.0, 2.0), scale)
    precision = scale / 0.5 + (1 - scale) / 2.0
    assert_close(tilt.eigenvalues.item(), 1 / precision)
    assert_close(tilt.means.item(), (scale * 0.7 / 0.5 + (1 - scale) * -1.0 / 2.0) / precision)


@pytest.mark.parametrize("scale", [1, 2, 3, 4])
def test_the_tilt_of_a_mixture_against_a_gaussian_is_the_density_it_says(scale):
    "By numpy densities and a sum over a fine line."
    means, variances, weights = [-1.0, 0.3, 1.1], [0.2, 0.1, 0.4], [0.2, 0.5, 0.3]
    x = np.linspace(-8, 8, 8001)
    p_c = sum(w * normal(x, m, v) for m, v, w in zip(means, variances, weights))
    q = p_c**scale * normal(x, 0.2, 3.0) ** (1 - scale)
    q /= q.sum() * (x[1] - x[0])
    tilt = tilt_mixture(mixture_1d(means, variances, weights=weights), gaussian(0.2, 3.0), scale)
    assert len(tilt.means) == math.comb(scale + 2, scale)
    assert_close(log_prob(tilt, torch.from_numpy(x)[:, None]).exp().numpy(), q, rtol=1e-6, atol=1e-9)


def test_the_tilt_of_full_covariances():
    generator = torch.Generator().manual_seed(0)
    roots = torch.randn(2, 3, 3, generator=generator, dtype=torch.float64)
    covariances = roots @ roots.mT + torch.tensor([0.1, 2.0], dtype=torch.float64)[:, None, None] * torch.eye(3)
    means = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    toward, away = (Mixture(m[None], c[None], torch.tensor([0])) for m, c in zip(means, covariances))
    tilt, x = tilt_mixture(toward, away, 1.2), torch.randn(9, 3, generator=generator, dtype=torch.float64)
    dense = [torch.distributions.MultivariateNormal(m, c).log_prob(x) for m, c in zip(means, covariances)]
    gap = log_prob(tilt, x) - (1.2 * dense[0] - 0.2 * dense[1])
    assert_close(gap, gap[0].expand(9))


@each_path
def test_the_noised_tilt_on_a_grid_by_convolution(path):
    "Density and noise prediction against an explicit convolution in numpy."
    mixture = mixture_1d([-1.0, -0.2, 0.2, 1.0], [0.1] * 4, [0, 0, 1, 1])
    grid = np.linspace(-4, 5, 2001)
    p_c = (normal(grid, 0.2, 0.1) + normal(grid, 1.0, 0.1)) / 2
    p_u = (p_c + (normal(grid, -0.2, 0.1) + normal(grid, -1.0, 0.1)) / 2) / 2
    q = p_c**2.5 / p_u**1.5
    tilt = tilt_on_grid(class_mixture(mixture, 1), mixture, 2.5, torch.from_numpy(grid)[:, None])
    assert_close(tilt.weights.numpy(), q / q.sum(), rtol=1e-9, atol=1e-12)
    t = path.time_at(torch.tensor(0.4, dtype=torch.float64))
    alpha, sigma = path.alpha(t).item(), path.sigma(t).item()
    x = np.linspace(-2, 2, 11) * alpha
    joint = q * normal(x[:, None], alpha * grid, sigma**2)
    eps = (joint * (x[:, None] - alpha * grid) / sigma).sum(1) / joint.sum(1)
    got = ExactDenoiser(tilt, path).predict(torch.from_numpy(x)[:, None], t)
    assert_close(got.eps[:, 0].numpy(), eps, rtol=1e-8, atol=1e-8)


def test_one_class_of_a_mixture():
    tree = fractal(depth=2)
    x = torch.randn(20, 2, dtype=torch.float64)
    for k in (0, 1):
        assert_close(log_prob(class_mixture(tree, k), x), log_prob(tree, x, torch.full((20,), k)))


def test_tilts_that_do_not_exist_are_refused():
    line = torch.linspace(-9, 9, 901, dtype=torch.float64)[:, None]
    with pytest.raises(ValueError, match="reaches the edge of the grid"):
        tilt_on_grid(gaussian(0.0, 2.0), gaussian(0.0, 1.0), 2.5, line)
    with pytest.raises(ValueError, match=r"allowed: \[batch, 2\]"):
        MixturePair(gaussian(0.0, 1.0), gaussian([0.0, 0.0], 1.0), FlowPath()).predict(torch.zeros(3, 1), 0.5)


# ---- characteristic guidance


def scaled_noise(path, t, n, seed=2, dim=1):
    x = torch.randn(n, dim, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x * 1.5 * (path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt()[:, None]


@each_path
@pytest.mark.parametrize("m_c, v_c, m_u, v_u, scale", [(0.5, 1, 0, 2, 3), (1, 0.05, -1, 1, 7), (0.3, 2, 0, 1, 1.4)])
def test_gaussian_oracle_of_characteristic_guidance(path, m_c, v_c, m_u, v_u, scale):
    "The whole pair of the noised tilt, in closed form, at every noise level."
    t = torch.linspace(0.03, 0.97, 30, dtype=torch.float64)
    x, c = scaled_noise(path, t, 30), torch.zeros(30).long()
    guided = CharacteristicGuidance(MixturePair(gaussian(m_c, v_c), gaussian(m_u, v_u), path), scale, tolerance=1e-10)
    precision = scale / v_c + (1 - scale) / v_u
    mean, alpha, sigma = (scale * m_c / v_c + (1 - scale) * m_u / v_u) / precision, path.alpha(t), path.sigma(t)
    total = (alpha**2 / precision + sigma**2)[:, None]
    eps = sigma[:, None] * (x - alpha[:, None] * mean) / total
    pair = guided.predict(x, t, c)
    assert_close(pair.eps, eps, rtol=1e-7, atol=1e-7)
    assert_close(alpha[:, None] * pair.x0 + sigma[:, None] * pair.eps, x)
    assert (guided.solved, guided.fell_back) == (30, 0)
    # classifier-free guidance is something else at these noise levels
    assert (ClassifierFreeGuidance(guided.model, scale).predict(x, t, c).eps - eps).abs().max() > 0.01


def test_the_fixed_point_is_where_two_denoised_points_agree():
    "On a mixture, by a bracketing root search over one-dimensional shifts."
    mixture = mixture_1d([-1.0, -0.2, 0.2, 1.0], [0.1] * 4, [0, 0, 1, 1])
    path, scale, t = FlowPath(), 3.0, torch.tensor(0.6, dtype=torch.float64)
    model = MixturePair(class_mixture(mixture, 1), mixture, path)
    x, c = torch.linspace(-1, 1, 7, dtype=torch.float64)[:, None], torch.zeros(1).long()
    got = CharacteristicGuidance(model, scale, tolerance=1e-11).predict(x, t, c.expand(7))
    for point, x0 in zip(x.split(1), got.x0):
        ends = lambda shift, x=point: (x + (scale - 1) * shift, x + scale * shift)  # noqa: E731
        difference = lambda shift, ends=ends: (model.x0(ends(shift)[0], t, c) - model.x0(ends(shift)[1], t)).item()  # noqa: E731
        root = brentq(difference, -5, 5, xtol=1e-13)
        assert_close(x0, model.x0(ends(root)[1], t)[0], rtol=1e-8, atol=1e-8)


def test_scale_one_equal_branches_and_outside_the_interval():
    same = gaussian(0.3, 0.7)
    t, c = torch.linspace(0.1, 0.9, 12, dtype=torch.float64), torch.zeros(12).long()
    x, path = scaled_noise(FlowPath(), t, 12), FlowPath()
    model = MixturePair(same, gaussian(0.0, 2.0), path)
    assert_close(
        Prediction(*CharacteristicGuidance(model, 1.0).predict(x, t, c)), model.predict(x, t, c), rtol=0, atol=0
    )
    equal = MixturePair(same, same, path)
    with count_nfe() as nfe:
        assert_close(CharacteristicGuidance(equal, 4.0).predict(x, t, c), equal.predict(x, t))
    assert nfe.total == 12 * 2 + 12  # the first pair already agrees
    with count_nfe() as nfe:
        guided = CharacteristicGuidance(model, 4.0, interval=(0.0, 0.05)).predict(x, t, c)
    assert nfe.total == 12
    assert_close(guided, model.predict(x, t, c))


def test_rows_are_paid_by_the_sample():
    "Each row costs alone what it costs in a batch, and gets the same answer."
    mixture = mixture_1d([-1.0, 0.3, 0.0, 1.0], [0.05] * 4, [0, 0, 1, 1])
    model = MixturePair(class_mixture(mixture, 1), mixture, FlowPath())
    t, c = torch.linspace(0.05, 0.95, 14, dtype=torch.float64), torch.zeros(14).long()
    x, guided = scaled_noise(FlowPath(), t, 14), CharacteristicGuidance(model, 5.0)
    with count_nfe() as together:
        pair = guided.predict(x, t, c)
    bills = []
    for i in range(14):
        with count_nfe() as nfe:
            alone = guided.predict(x[i : i + 1], t[i : i + 1], c[:1])
        bills.append(nfe.total)
        assert_close((pair.x0[i], pair.eps[i]), (alone.x0[0], alone.eps[0]), rtol=1e-9, atol=1e-9)
    assert sum(bills) == together.total and min(bills) >= 4 and len(set(bills)) > 1
    assert all(bill % 2 == 0 and bill <= 100 for bill in bills)


def test_samples_without_a_fixed_point_get_plain_guidance():
    mixture = mixture_1d([-1.0, 1.0], [0.05, 0.05], [0, 1])
    model = MixturePair(class_mixture(mixture, 1), mixture, FlowPath())
    x, c = torch.linspace(-3, 3, 61, dtype=torch.float64)[:, None], torch.zeros(61).long()
    guided, t = CharacteristicGuidance(model, 7.0), torch.tensor(0.4, dtype=torch.float64)
    pair, plain = guided.predict(x, t, c), ClassifierFreeGuidance(model, 7.0).predict(x, t, c)
    same = (pair.eps == plain.eps)[:, 0]
    assert 0 < guided.fell_back < 61 and guided.solved + guided.fell_back == 61
    assert same.sum() >= guided.fell_back and pair.eps.isfinite().all()


def test_gradients_are_those_of_the_fixed_point():
    "Of the closed form, through all iterations."
    path, t = FlowPath(), torch.linspace(0.2, 0.8, 6, dtype=torch.float64)
    x, c = scaled_noise(path, t, 6).requires_grad_(), torch.zeros(6).long()
    model = MixturePair(gaussian(0.5, 1.0), gaussian(0.0, 2.0), path)
    eps = CharacteristicGuidance(model, 3.0, tolerance=1e-10).predict(x, t, c).eps
    (slope,) = torch.autograd.grad(eps.sum(), x)
    expected = path.sigma(t) / (path.alpha(t) ** 2 * 0.5 + path.sigma(t) ** 2)  # the tilt has variance 1 / 2
    assert_close(slope[:, 0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("batching", ["batched", "sequential"])
def test_networks_single_precision_and_spans(batching):
    torch.manual_seed(3)
    net = MLP(3, num_classes=2, width=16, depth=1)
    torch.nn.init.normal_(net.read.weight, std=0.1)
    model = NetworkDenoiser(net, FlowPath(), 2, "x0")
    x, c, t = torch.randn(20, 3), torch.arange(20) % 2, torch.full((), 0.5)
    pair = CharacteristicGuidance(model, 3.0, batching=batching).predict(x, t, c)
    assert pair.eps.dtype == torch.float32
    by_time = CharacteristicGuidance(model, lambda t: 1 + 4 * t, batching=batching).predict(x, t.expand(20), c)
    assert_close(by_time, pair, rtol=1e-4, atol=1e-4)
    line = CharacteristicGuidance(model, 3.0, span="sample", batching=batching).predict(x, t, c)
    assert (line.eps - pair.eps).abs().max() > 1e-6  # another shift, when confined
    v, basis = torch.randn(2, 4, 5, 6, dtype=torch.float64)[:, :, None]
    for span, dims in (("sample", (1, 2, 3)), ("channel", (2, 3))):
        v4, b4 = v.reshape(4, 1, 5, 6), basis.reshape(4, 1, 5, 6)
        part = _restrict(v4, b4, span)
        assert_close(((v4 - part) * b4).sum(dims), torch.zeros_like((v4 * b4).sum(dims)), atol=1e-12, rtol=0)
        assert_close(_restrict(part, b4, span), part)
    assert _restrict(v, basis, "all") is v


def test_anderson_solves_affine_maps_in_few_steps():
    generator = torch.Generator().manual_seed(1)
    matrix = 1.5 * torch.randn(4, 4, generator=generator, dtype=torch.float64)
    target = torch.linalg.solve(torch.eye(4, dtype=torch.float64) - matrix, torch.ones(4, dtype=torch.float64))
    calls = []

    def fn(value, rows):
        calls.append(len(rows))
        return value @ matrix.T + 1 - value, [value]

    start = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    (solution,), found = _solve_rows(fn, start, tolerance=1e-9, memory=4)
    assert found.all() and len(calls) < 12
    assert_close(solution, target.expand(3, 4))
    plain, found = _solve_rows(fn, start, tolerance=1e-9, memory=0)  # diverges: the first answer comes back
    assert not found.any() and torch.equal(plain[0], start)
    a, b = torch.tensor([[1.0]]), torch.tensor([[2.0]])  # the secant method: residuals 4 and 1 vanish at 2 1/3
    assert_close(anderson_step([a, b], [torch.tensor([[4.0]]), torch.tensor([[1.0]])]), torch.tensor([[7 / 3]]))


@pytest.mark.parametrize(
    "options",
    [{"iterations": 0}, {"iterations": 2.5}, {"memory": -1}, {"tolerance": 0}, {"tolerance": math.inf}, {"span": "x"}],
)
def test_bad_options_of_characteristic_guidance(options):
    with pytest.raises(ValueError, match=rf"^{next(iter(options))} = .*; allowed"):
        CharacteristicGuidance(MixturePair(gaussian(0.0, 1.0), gaussian(0.0, 2.0), FlowPath()), 2.0, **options)


# ---- Langevin correctors


def test_langevin_keeps_a_gaussian_up_to_its_step_bias():
    "For N(0, V) the chain is an AR(1) process; h in units of sigma^2 gives the variance V / (1 - h sigma^2 / (4 V))."
    path, t = EDMPath(), EDMPath().time_at(torch.tensor(1.0, dtype=torch.float64))
    model = ExactDenoiser(gaussian(0.0, 1.0), path)
    x = math.sqrt(2.0) * torch.randn(8000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    noise = lambda: torch.randn(8000, 1, generator=generator, dtype=torch.float64)  # noqa: E731
    end = _langevin_steps(model, x, t, None, noise, torch.tensor(1.6, dtype=torch.float64), 30)
    assert abs(end.var().item() / (2.0 / (1 - 1.6 / 8)) - 1) < 0.06
    assert torch.equal(_langevin_steps(model, x, t, None, noise, torch.tensor(1.0), 0), x)


@pytest.mark.parametrize("scale", [1.5, 3.0])
def test_guided_ancestral_steps_are_a_predictor_and_a_corrector(scale):
    "With the same noise the two samplers approach each other as steps get small, at gamma' = 2 gamma - 1 alone."
    model, labels = MixturePair(gaussian(0.5, 1.0), gaussian(0.0, 2.0), FlowPath()), torch.zeros(100).long()

    def apart(steps, other):
        step = PredictorCorrector(ClassifierFreeGuidance(model, other))
        two = [
            sample(ClassifierFreeGuidance(model, scale), labels, (1,), "ddpm", steps, **EXACT),
            sample(model, labels, (1,), step, steps, **EXACT),
        ]
        return (two[0] - two[1]).square().mean().sqrt().item()

    coarse, fine = apart(30, 2 * scale - 1), apart(120, 2 * scale - 1)
    assert 3 < coarse / fine < 5.5
    assert apart(120, scale) > 4 * fine


def test_the_step_composes_with_sample():
    model, labels = MixturePair(gaussian(0.5, 1.0), gaussian(0.0, 2.0), FlowPath()), torch.zeros(7).long()
    step = PredictorCorrector(ClassifierFreeGuidance(model, 2.0), count=2)
    with count_nfe() as nfe:
        whole = sample(model, labels, (1,), step, 5, **EXACT)
    assert nfe.total == 7 * (5 + 4 * 2 * 2)
    assert_close(sample(model, labels, (1,), step, 5, batch_size=3, **EXACT), whole, rtol=0, atol=1e-12)
    none = sample(model, labels, (1,), PredictorCorrector(model, count=0), 5, **EXACT)
    assert torch.equal(none, sample(model, labels, (1,), "ddim", 5, **EXACT))
    for options in ({"count": -1}, {"count": 1.5}, {"size": 0.0}, {"size": math.nan}):
        with pytest.raises(ValueError, match=rf"^{next(iter(options))} = .*; allowed"):
            PredictorCorrector(model, **options)


# ---- Feynman-Kac correctors


def population_variance(tau, v_c, v_u, scale) -> float:
    "What weighted steps make of a Gaussian population: weights exp(k x^2) lower its precision by 2 k, then it moves."
    variance = tau[0]
    for now, then in zip(tau[:-1], tau[1:]):
        gap = 1 / (v_c + now) - 1 / (v_u + now)  # score difference per unit of x
        variance = 1 / (1 / variance - scale * (scale - 1) * gap**2 * (now - then))
        slope = scale / (v_c + now) + (1 - scale) / (v_u + now)
        variance = variance * (1 - (now - then) * slope) ** 2 + then * (now - then) / now
    return variance


@pytest.mark.parametrize("scale", [0.5, 2.0, 3.0, 6.0])
def test_the_weights_lead_to_the_tilt(scale):
    "In the limit of small steps; with no weights the same walk leads to the variance of the guided SDE."
    tau = np.concatenate([np.geomspace(1e6, 1e-6, 40_000), [0.0]])
    tilt = 1 / (scale / 1.0 + (1 - scale) / 2.0)
    assert_close(population_variance(tau, 1.0, 2.0, scale), tilt, rtol=5e-3, atol=0)


@pytest.mark.parametrize("path, start", [(FlowPath(), 1e9), (EDMPath(), 80.0)], ids=["flow", "edm"])
def test_weighted_particles_follow_the_recursion(path, start):
    model = MixturePair(gaussian(0.0, 1.0), gaussian(0.0, 2.0), path)
    run = sample_feynman_kac(model, 0, 4000, (1,), 2.0, 120, seed=1, **EXACT)
    ratio = path.noise_to_signal(time_grid(path, 120)).clamp(max=start)
    expected = population_variance((ratio**2).tolist(), 1.0, 2.0, 2.0)
    weighted = (run.weights @ (run.x[:, 0] - run.weights @ run.x[:, 0]) ** 2).item()
    assert abs(weighted / expected - 1) < 0.07  # three standard errors
    assert abs(run.x.var().item() / expected - 1) > 0.07  # the weights matter
    assert run.nfe == 120 * 2 and len(run.shares) == 120
    assert_close(run.weights.sum().item(), 1.0)
    assert abs(_effective_share(run.weights) - run.shares[-1]) < 1e-9


def test_resampled_particles_carry_the_law_themselves():
    "Resampled at every step, all weights are equal, and the particles have the variance that weights would give."
    model = MixturePair(gaussian(0.0, 1.0), gaussian(0.0, 2.0), FlowPath())
    run = sample_feynman_kac(model, 0, 3000, (1,), 3.0, 60, seed=1, threshold=1.0, **EXACT)
    ratio = FlowPath().noise_to_signal(time_grid(FlowPath(), 60)).clamp(max=1e9)
    expected = population_variance((ratio**2).tolist(), 1.0, 2.0, 3.0)
    assert_close(run.weights, torch.full((3000,), 1 / 3000, dtype=torch.float64))
    assert abs(run.x.var().item() / expected - 1) < 0.08  # three standard errors


def test_particles_of_equal_width_are_shifted_to_the_tilt():
    "Different means, equal variances: the tilt has mean gamma m_c + (1 - gamma) m_u, and weights have work to do."
    model = MixturePair(gaussian(0.4, 1.0), gaussian(0.0, 1.0), FlowPath())
    run = sample_feynman_kac(model, 0, 2000, (1,), 2.5, 100, count=1, **EXACT)
    assert abs((run.weights @ run.x[:, 0]).item() - 1.0) < 0.08
    assert run.nfe == (100 * 2 + 99 * 2)


def test_no_weights_at_scales_zero_and_one():
    model = MixturePair(gaussian(0.4, 1.0), gaussian(0.0, 2.0), FlowPath())
    labels = torch.zeros(50).long()
    one = sample_feynman_kac(model, 0, 50, (1,), 1.0, 20, seed=3, **EXACT)
    assert_close(one.x, sample(model, labels, (1,), "ddpm", 20, seed=3, **EXACT))
    zero = sample_feynman_kac(model, 0, 50, (1,), 0.0, 20, seed=3, **EXACT)
    assert_close(zero.x, sample(model, 50, (1,), "ddpm", 20, seed=3, **EXACT))
    for run in (one, zero):
        assert run.resamplings == 0 and min(run.shares) > 1 - 1e-9


def test_runs_repeat_and_precision_is_kept():
    model = mlp_denoiser(2, FlowPath(), num_classes=3, width=16, depth=1)
    runs = [sample_feynman_kac(model, 2, 40, (2,), 4.0, 6, seed=5, threshold=1.0, progress=False) for _ in range(2)]
    assert torch.equal(runs[0].x, runs[1].x) and runs[0].x.dtype == torch.float32
    assert runs[0].weights.dtype == torch.float64 and runs[0].resamplings == 6
    other = sample_feynman_kac(model, 2, 40, (2,), 4.0, 6, seed=6, threshold=1.0, progress=False)
    assert not torch.equal(other.x, runs[0].x)


def test_systematic_resampling_by_counting():
    weights, n = torch.tensor([0.05, 0.5, 0.0, 0.2, 0.25], dtype=torch.float64), 5
    for offset in np.linspace(0, 0.999, 40):
        pointers, cumulated = (np.arange(n) + offset) / n, np.cumsum(weights.numpy())
        expected = [int(np.sum(cumulated <= p)) for p in pointers]
        assert _systematic_resample(weights, float(offset)).tolist() == expected
    never = torch.tensor([0.0, 0.5, 0.5, 0.0], dtype=torch.float64)
    assert _systematic_resample(never, 0.0).tolist() == [1, 1, 2, 2]  # no pointer on a particle without weight
    assert_close(_effective_share(weights), 1 / (5 * (0.05**2 + 0.25 + 0.04 + 0.0625)))


def test_bad_populations():
    model = MixturePair(gaussian(0.0, 1.0), gaussian(0.0, 2.0), FlowPath())
    for options, match in (
        ({"c": 1}, "c contains 1; allowed: 0 to 0"),
        ({"scale": math.inf}, "scale = inf; allowed: a finite number"),
        ({"steps": 0}, "steps = 0; allowed: a whole number"),
        ({"shape": ()}, "shape = .*allowed"),
        ({"times": torch.tensor([0.0, 1.0])}, "strictly falling"),
    ):
        with pytest.raises(ValueError, match=match):
            sample_feynman_kac(
                **{"model": model, "c": 0, "n": 4, "shape": (1,), "scale": 2.0, "progress": False, **options}
            )
    with pytest.raises(ValueError, match=r"model\.num_classes = 0; allowed"):
        sample_feynman_kac(mlp_denoiser(1, FlowPath()), 0, 4, (1,), 2.0)
