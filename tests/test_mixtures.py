"Mixtures against SciPy densities and elementary probability."

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal, norm
from torch.testing import assert_close

from guidance_nb.mixtures import (
    ExactClassifier,
    ExactDenoiser,
    Mixture,
    checkerboard,
    digits,
    fractal,
    gaussian_pair,
    log_posterior,
    log_prob,
    mixture_of_points,
    sample_mixture,
)
from guidance_nb.paths import EDMPath, FlowPath, VPPath

PATHS = [FlowPath(), VPPath(), EDMPath(5.0)]


@pytest.fixture
def mixture():
    generator = torch.Generator().manual_seed(3)
    root = torch.randn(6, 2, 2, generator=generator)
    covariances = 0.3 * root @ root.mT + 0.1 * torch.eye(2)
    weights = torch.tensor([1.0, 2, 3, 1, 2, 1])
    return Mixture(
        torch.randn(6, 2, generator=generator), covariances, torch.tensor([0, 0, 1, 1, 2, 2]), weights
    ), covariances


def components(mixture, covariances, path, t):
    "Component densities at t, by SciPy."
    a, s = path.alpha(t).item(), path.sigma(t).item()
    for k in range(len(mixture.means)):
        mean = a * mixture.means[k].numpy()
        yield multivariate_normal(mean, a * a * covariances[k].double().numpy() + s * s * np.eye(2))


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("t", [0.0, 0.3, 0.9])
def test_densities_and_posterior_agree_with_scipy(mixture, path, t):
    mixture, covariances = mixture
    t = torch.tensor(t, dtype=torch.float64)
    x = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    parts = np.stack([p.pdf(x.numpy()) for p in components(mixture, covariances, path, t)], 1) * mixture.weights.numpy()
    assert_close(log_prob(mixture, x, None, path, t), torch.tensor(np.log(parts.sum(1))))
    by_class = np.stack([parts[:, mixture.labels == k].sum(1) for k in range(3)], 1)
    assert_close(log_posterior(mixture, x, path, t).exp(), torch.tensor(by_class / by_class.sum(1, keepdims=True)))
    share = np.array([mixture.weights[mixture.labels == k].sum() for k in range(3)])
    for k in range(3):
        expected = torch.tensor(np.log(by_class[:, k] / share[k]))
        assert_close(log_prob(mixture, x, torch.full((20,), k), path, t), expected)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_posterior_mean_by_numerical_integration(path):
    "E[x0 | x_t] of a 1-D mixture, by quadrature over x0."
    pair, t = gaussian_pair(0.5), torch.tensor(0.4, dtype=torch.float64)
    a, s = path.alpha(t).item(), path.sigma(t).item()
    grid = np.linspace(-4, 4, 20001)
    for c, prior in (
        (None, 0.5 * norm.pdf(grid, 0.5, 0.05**0.5) + 0.5 * norm.pdf(grid, -0.5, 0.05**0.5)),
        (torch.tensor([1]), norm.pdf(grid, 0.5, 0.05**0.5)),
    ):
        for x in (-1.0, 0.1, 0.7):
            weight = prior * norm.pdf(x, a * grid, s)
            expected = (weight * grid).sum() / weight.sum()
            found = ExactDenoiser(pair, path).x0(torch.tensor([[x]], dtype=torch.float64), t, c)
            assert_close(found.item(), expected, rtol=1e-6, atol=1e-8)


def test_posterior_covariance_from_the_second_derivative():
    "Cov(x0 | x_t) = (sigma / alpha)^2 (1 + sigma^2 (log p_t)''), against the law of total variance."
    pair, path, t = gaussian_pair(0.5), FlowPath(), torch.tensor(0.5, dtype=torch.float64)
    x = torch.tensor([[0.2]], dtype=torch.float64, requires_grad=True)
    score = ExactDenoiser(pair, path).score(x, t)
    (curvature,) = torch.autograd.grad(score.sum(), x)
    p = log_posterior(pair, x.detach(), path, t)[0, 1].exp().item()
    v = 1 / (1 / 0.05 + 0.25 / 0.25)  # posterior variance within a class: alpha = sigma = 1/2
    means = [v * (m / 0.05 + 0.5 * 0.2 / 0.25) for m in (-0.5, 0.5)]
    total = v + p * (1 - p) * (means[1] - means[0]) ** 2
    assert_close((0.5 / 0.5) ** 2 * (1 + 0.25 * curvature.item()), total)


def test_isotropic_shorthand_equals_full_matrices():
    generator = torch.Generator().manual_seed(0)
    means, variances, labels = (
        torch.randn(5, 3, generator=generator),
        torch.rand(5, generator=generator) + 0.1,
        torch.arange(5) % 2,
    )
    short, full = Mixture(means, variances, labels), Mixture(means, variances[:, None, None] * torch.eye(3), labels)
    x, t, c = (
        torch.randn(8, 3, dtype=torch.float64, generator=generator),
        torch.linspace(0.1, 1, 8),
        torch.arange(8) % 2,
    )
    for path in PATHS:
        assert_close(ExactDenoiser(short, path).predict(x, t, c), ExactDenoiser(full, path).predict(x, t, c))
        assert_close(ExactClassifier(short, path)(x, t), ExactClassifier(full, path)(x, t))


def test_samples_have_the_moments_of_the_mixture(mixture):
    mixture, covariances = mixture
    x, c = sample_mixture(mixture, torch.full((100_000,), 1), torch.Generator().manual_seed(0))
    w, m = np.array([0.75, 0.25]), mixture.means[2:4].numpy()
    mean = w @ m
    second = sum(w[i] * (covariances[2 + i].double().numpy() + np.outer(m[i], m[i])) for i in range(2))
    assert_close(x.double().mean(0), torch.tensor(mean), atol=0.02, rtol=0)
    assert_close(torch.cov(x.double().T), torch.tensor(second - np.outer(mean, mean)), atol=0.03, rtol=0)
    assert (c == 1).all()


def test_the_score_is_the_posterior_weighted_mean_and_not_the_uniform_one():
    pair, path = gaussian_pair(0.5), FlowPath()
    x, t = torch.linspace(-1, 1, 9, dtype=torch.float64)[:, None], torch.tensor(0.3, dtype=torch.float64)
    exact, p = ExactDenoiser(pair, path), log_posterior(gaussian_pair(0.5), x, path, t).exp()
    scores = torch.stack([exact.score(x, t, torch.full((9,), k)) for k in range(2)], 1)
    assert_close((p[:, :, None] * scores).sum(1), exact.score(x, t))
    assert (scores.mean(1) - exact.score(x, t)).abs().max() > 1


def test_discrete_data_is_a_softmax_over_points():
    x, labels = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([0, 0, 1])
    exact, t = ExactDenoiser(mixture_of_points(x, labels), FlowPath()), torch.tensor(0.5, dtype=torch.float64)
    probe = torch.tensor([[0.4]], dtype=torch.float64)
    weights = torch.softmax(-0.5 * ((probe - 0.5 * x.T.double()) / 0.5) ** 2, 1)
    assert_close(exact.x0(probe, t), weights @ x.double())
    with pytest.raises(ValueError, match="data points have no density"):
        exact.predict(probe, 0.0)


def test_stated_data_sets():
    tree, board = fractal(), checkerboard()
    assert tree.means.shape == (2032, 2) and tree.labels.bincount().tolist() == [1016, 1016]
    assert_close(tree.means[:8].norm(dim=1), 0.45 * torch.linspace(0.07, 0.93, 8, dtype=torch.float64))
    assert board.labels.bincount().tolist() == [8, 8]
    (x, c), (y, _) = digits("train"), digits("test")
    assert len(x) + len(y) == 1797 and c.max() == 9 and x.abs().max() <= 1


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: Mixture(torch.zeros(0, 2), torch.zeros(0), torch.zeros(0, dtype=torch.long)),
            "shapes of means and covariances = ((0, 2), ",
        ),
        (lambda: Mixture(torch.full((1, 2), float("nan")), torch.ones(1), torch.tensor([0])), "finite values"),
        (lambda: Mixture(torch.zeros(1, 2), -torch.ones(1), torch.tensor([0])), "eigenvalue of covariances = -1.0"),
        (lambda: log_prob(gaussian_pair(), torch.zeros(2, 3)), "x has shape (2, 3); allowed: [batch, 1]"),
        (lambda: log_prob(gaussian_pair(), torch.zeros(2, 1), torch.tensor([0, 2])), "c contains 2"),
        (lambda: sample_mixture(gaussian_pair(), torch.tensor([0.0])), "c is torch.float32"),
        (lambda: digits("dev"), "split = 'dev'"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"covariances": torch.tensor([[[1.0, 0.5], [0.0, 1.0]]])},
            "asymmetry of covariances = 0.5; allowed: symmetric",
        ),
        (
            {"covariances": torch.tensor([[[1.0, 2.0], [2.0, 1.0]]])},
            "eigenvalue of covariances = -1.0; allowed: 0 and above",
        ),
        ({"covariances": torch.tensor([float("nan")])}, "covariances = [nan]; allowed: finite"),
        ({"covariances": torch.ones(2)}, "(2,)); allowed: [K, d] with K >= 1, and [K, d, d]"),
        ({"weights": torch.tensor([-1.0])}, "weights = [-1.0]; allowed: positive"),
        ({"weights": torch.tensor([0.0])}, "weights = [0.0]; allowed: positive"),
        ({"weights": torch.tensor([float("nan")])}, "allowed: positive, finite numbers"),
        ({"weights": torch.ones(3)}, "weights = [1.0, 1.0, 1.0]; allowed: positive, finite numbers [K] = [1]"),
        ({"labels": torch.tensor([2])}, "classes without a component = [0, 1]; allowed: none"),
        ({"means": torch.full((1, 2), float("inf"))}, "means = [[inf, inf]]; allowed: finite values"),
    ],
)
def test_what_is_no_mixture_is_refused_in_one_line(change, words):
    fine = {"means": torch.zeros(1, 2), "covariances": torch.ones(1), "labels": torch.tensor([0])}
    Mixture(**fine)
    with pytest.raises(ValueError) as caught:
        Mixture(**(fine | change))
    assert words in str(caught.value) and "\n" not in str(caught.value)
