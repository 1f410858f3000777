"The metrics against definitions written out in numpy, closed forms, SciPy and torch-fidelity."

import math
import time
import warnings

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from guidance_nb import metrics as m
from guidance_nb.mixtures import Mixture, checkerboard, digits, fractal, gaussian_pair, sample_mixture

PAIR = Mixture(torch.tensor([[-0.5], [0.5]]), torch.tensor([0.05, 0.05], dtype=torch.float64), torch.arange(2))


def cloud(n, d, seed, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, (n, d)))


def test_nll_is_the_mean_of_scipys_density():
    x, c = sample_mixture(PAIR, 500, torch.Generator().manual_seed(0))
    expected = -scipy.stats.norm.logpdf(x[:, 0].double(), np.where(c == 1, 0.5, -0.5), math.sqrt(0.05)).mean()
    assert m.nll(x, c, PAIR) == pytest.approx(expected, abs=1e-12)


def test_nll_conditions_on_the_class_and_ignores_its_weight():
    x = torch.tensor([[0.3], [-0.1]])
    uneven = Mixture(PAIR.means, PAIR.eigenvalues, PAIR.labels, torch.tensor([9.0, 1.0]))
    c = torch.tensor([1, 0])
    assert m.nll(x, c, uneven) == pytest.approx(m.nll(x, c, PAIR))


@pytest.mark.parametrize("quantile", [0.002, 0.05])
def test_outlier_threshold_is_the_chi_square_quantile(quantile):
    "In d dimensions -2 log p is a constant plus a chi-square variable."
    mixture = Mixture(torch.tensor([[0.0, 0.0], [3.0, 1.0]]), torch.tensor([1.0, 0.04]), torch.arange(2))
    tau = m.outlier_threshold(mixture, n=50_000, quantile=quantile, seed=3)
    radius2 = scipy.stats.chi2.ppf(1 - quantile, 2)
    exact = -0.5 * radius2 - np.log(2 * np.pi * np.array([1.0, 0.04]))
    # standard error of an empirical quantile, in units of log p: the density there is q for d = 2
    error = math.sqrt(quantile * (1 - quantile) / 50_000) / quantile
    np.testing.assert_allclose(tau, exact, atol=4 * error)
    x, c = sample_mixture(mixture, 50_000, torch.Generator().manual_seed(4))
    assert m.outlier_rate(x, c, mixture, tau) == pytest.approx(quantile, abs=8 * math.sqrt(quantile / 50_000))


def test_outlier_rate_counts():
    tau = torch.tensor([-2.0, -2.0])
    x = torch.tensor([[-0.5], [0.5], [-0.5 + 10], [0.5]])
    assert m.outlier_rate(x, torch.tensor([0, 1, 0, 0]), PAIR, tau) == 0.5
    each = torch.tensor([-2.0, 2.0])  # no point of class 1 is as likely as that
    assert m.outlier_rate(x, torch.tensor([0, 1, 0, 0]), PAIR, each) == 0.75


@pytest.mark.parametrize("d", [1, 2, 64, 300])
def test_nearest_neighbours_by_numpy(d):
    x, y = cloud(70, d, 0), cloud(1100, d, 1)
    x_c, y_c = torch.arange(70) % 3, torch.arange(1100) % 4
    table = np.linalg.norm(x.numpy()[:, None] - y.numpy(), axis=2)
    np.testing.assert_allclose(m.nearest_neighbours(x, y)[0][:, 0], table.min(1), atol=1e-12)
    table[x_c.numpy()[:, None] != y_c.numpy()] = np.inf
    np.testing.assert_allclose(m.nearest_neighbours(x, y, 1, x_c, y_c)[0][:, 0], table.min(1), atol=1e-12)
    assert m.coverage(x, y, x_c, y_c, np.median(table.min(1))) == pytest.approx(0.5)


def test_a_class_nobody_generated_is_not_covered():
    x, c = torch.zeros(4, 2), torch.tensor([0, 0, 0, 1])
    assert m.coverage(x, x[:3], c, c[:3], 1.0) == 0.75
    assert m.coverage(x, x[:3] + torch.tensor([3.0, 4.0]), c, c[:3], 5.0) == 0.75  # the ball is closed
    distance, index = m.nearest_neighbours(x, x[:3], 1, c, c[:3])
    assert distance[3] == math.inf and index[3] == -1


def test_copies_are_at_distance_zero():
    "Also far from the origin and in float32, where a matrix product would round."
    x = (cloud(300, 64, 0) + 1000).float()
    assert m.nearest_neighbours(x, x.clone())[0].max() == 0
    images, _ = digits("test")
    assert m.nearest_neighbours(images.reshape(-1, 1, 8, 8), images)[0].max() == 0


def by_differences(x, y):
    "Squared distances and indices in order, the definition."
    table = torch.stack([(row - y.double()).square().sum(1) for row in x.double()])
    return table.sort(dim=1, stable=True)


def near(kind, n, d):
    "Points whose distances a matrix product in single precision cannot tell."
    g = torch.Generator().manual_seed(d)
    x = torch.randn(n, d, generator=g)
    if kind == "offset":
        return x + 1e4
    if kind == "lattice":
        return torch.randint(3, (n, d), generator=g).float()
    if kind == "copies":
        return x[:1].repeat(n, 1)
    if kind == "clusters":
        return 1e-3 * x + 1e3 * (torch.arange(n) % 2)[:, None]
    scene = torch.randint(0, 256, (1, d), generator=g)  # frames of a film: a few grey levels in a few pixels
    return (scene + torch.randint(0, 3, (n, d), generator=g) * (torch.rand(n, d, generator=g) < 3 / d)).float()


KINDS = ("plain", "offset", "frames", "lattice", "copies", "clusters")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("d", [1, 5, 300, 3072])
def test_neighbours_are_exact_whatever_the_points(kind, d):
    both = near(kind, 240, d)
    x, y = both[:30], both[30:]
    squares, order = by_differences(x, y)
    for k in (1, 4, 60, 210):
        distance, index = m.nearest_neighbours(x, y, k)
        assert torch.equal(index, order[:, :k])  # of equal distances the lower index comes first
        torch.testing.assert_close(distance, squares[:, :k].sqrt(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["offset", "clusters"])
def test_many_queries_are_as_exact_as_few(kind):
    "faiss 1.15 finds none of these neighbours, and half of them, once it multiplies matrices."
    both = near(kind, 1500, 256)
    assert torch.equal(
        m.nearest_neighbours(both[:500], both[500:], 5)[1], by_differences(both[:500], both[500:])[1][:, :5]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_precision_and_recall_are_exact_whatever_the_points(kind):
    both = near(kind, 120, 300)
    x, y = both[:50], both[40:]  # some in both

    def share(points, centres):
        reach = by_differences(centres, centres)[0][:, 3]
        table = torch.stack([(row - centres.double()).square().sum(1) for row in points.double()])
        return (table <= reach).any(1).double().mean().item()

    assert m.precision_recall(y, x) == (share(x, y), share(y, x))


def test_default_radius_follows_its_rule():
    tree = fractal()
    sets = [sample_mixture(tree, 2000, torch.Generator().manual_seed(7000 + i)) for i in range(12)]
    covered = [m.coverage(x, y, c, d) for (x, c), (y, d) in zip(sets[::2], sets[1::2])]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.01)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 3))
def test_precision_recall_by_numpy(seed, k, d):
    y, x = cloud(25, d, seed), cloud(18, d, seed + 1, 0.6, 0.4)

    def share(points, balls):
        radii = np.sort(np.linalg.norm(balls[:, None] - balls, axis=2), 1)[:, k]
        return (np.linalg.norm(points[:, None] - balls, axis=2) <= radii).any(1).mean()

    expected = share(x.numpy(), y.numpy()), share(y.numpy(), x.numpy())
    assert m.precision_recall(y, x, k) == pytest.approx(expected)


def test_precision_recall_is_torch_fidelitys_up_to_order():
    "The order of its arguments changed between releases, so only the pair is compared."
    metric_prc = pytest.importorskip("torch_fidelity.metric_prc")
    y, x = cloud(300, 5, 0), cloud(200, 5, 1, 0.7)
    theirs = metric_prc.calculate_precision_recall_full(x, y, 3)
    assert sorted(m.precision_recall(y, x)) == pytest.approx(sorted(theirs), abs=1e-6)


def test_precision_recall_of_a_narrow_generator():
    precision, recall = m.precision_recall(cloud(400, 2, 0), cloud(400, 2, 1, 0.2))
    assert precision > 0.95 and recall < 0.3


@pytest.mark.parametrize("d", [1, 3, 20])
def test_frechet_by_sqrtm(d):
    x, y = cloud(200, d, 0), cloud(150, d, 1, 2.0, 0.5)
    s, t = (np.atleast_2d(np.cov(z.numpy(), rowvar=False)) for z in (x, y))
    root = scipy.linalg.sqrtm(s @ t).real
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(s + t - 2 * np.atleast_2d(root))
    assert m.frechet(x, y) == pytest.approx(expected, rel=1e-9)
    assert m.frechet(x, y) == pytest.approx(m.frechet(y, x), rel=1e-9)


def test_frechet_with_singular_covariances():
    "Diagonal covariances with zeros, as of images whose corners are always black; and fewer samples than features."
    a = torch.tensor([[1.0, 0.0, 2.0], [-1.0, 0.0, -2.0], [1.0, 0.0, -2.0], [-1.0, 0.0, 2.0]])
    expected = (1 - 3) ** 2 * a[:, 0].var().item() + 5**2
    assert m.frechet(a, a * torch.tensor([3.0, 1.0, 1.0]) + torch.tensor([0.0, 5.0, 0.0])) == pytest.approx(expected)
    few = cloud(10, 64, 0)
    assert m.frechet(few, few) == pytest.approx(0, abs=1e-6)
    x, y = digits("train")[0], digits("test")[0]
    fid = pytest.importorskip("torch_fidelity.metric_fid")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stats = [fid.fid_features_to_statistics(z.double()) for z in (x, y)]
        theirs = fid.fid_statistics_to_metric(*stats, verbose=False)["frechet_inception_distance"]
    assert m.frechet(x, y) == pytest.approx(theirs, abs=1e-4)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10**6))
def test_wasserstein_of_unequal_sets_by_optimal_transport(n, k, seed):
    "In 1-D, repeating points until the sizes agree reduces it to sorting."
    x, y = cloud(n, 1, seed), cloud(k, 1, seed + 1)
    a, b = np.sort(np.repeat(x.numpy()[:, 0], k)), np.sort(np.repeat(y.numpy()[:, 0], n))
    assert m.sliced_wasserstein(x, y, projections=3) == pytest.approx(math.sqrt(((a - b) ** 2).mean()), abs=1e-9)


def test_sliced_wasserstein_of_gaussians():
    "Per direction (delta mu)^2 + (delta sigma)^2; isotropic Gaussians give |shift|^2 / d + (delta sigma)^2."
    x, y = cloud(5000, 3, 0), cloud(5000, 3, 1, 2.0, 0.5)
    assert m.sliced_wasserstein(x, y) == pytest.approx(math.sqrt(0.25 + 1), rel=0.03)
    assert m.sliced_wasserstein(x, y, seed=5) == pytest.approx(m.sliced_wasserstein(y, x, seed=5))
    assert m.sliced_wasserstein(x, x.flip(0)) == pytest.approx(0, abs=1e-12)


def test_sliced_wasserstein_by_class_sees_swapped_labels():
    x, c = sample_mixture(PAIR, 1000, torch.Generator().manual_seed(0))
    assert m.sliced_wasserstein(x, x, c, c) == 0
    assert m.sliced_wasserstein(x, x, 1 - c, c) == pytest.approx(1.0, abs=0.03)  # each class moves by 2 * 0.5
    one_moves = x + 0.3 * c[:, None]
    assert m.sliced_wasserstein(one_moves, x, c, c) == pytest.approx(0.15, abs=1e-6)


def test_evaluation_classifiers():
    board = checkerboard()
    x, c = sample_mixture(board, 300, torch.Generator().manual_seed(0))
    assert m.class_accuracy(x, c, board) > 0.99
    assert m.class_accuracy(x, 1 - c, board) < 0.01
    test_x, test_c = digits("test")
    classifier = m.digits_classifier()
    assert classifier(test_x).shape == (360, 10)
    assert m.class_accuracy(test_x, test_c, classifier) > 0.97
    assert m.class_accuracy(test_x.reshape(-1, 1, 8, 8), test_c, classifier) == m.class_accuracy(
        test_x, test_c, classifier
    )


def test_real_baseline_by_hand():
    values = [1.0, 5.0, 9.0]  # draw(2 i) + draw(2 i + 1) = 4 i + 1
    assert m.real_baseline(lambda a, b: a + b, lambda seed: seed) == (np.mean(values), np.std(values, ddof=1))


@pytest.mark.parametrize("d", [2, 64])
def test_two_thousand_points_take_well_under_a_second(d):
    x, y = cloud(2000, d, 0), cloud(2000, d, 1)
    c = torch.arange(2000) % 2
    for metric in (m.frechet, m.nearest_neighbours, m.precision_recall, lambda a, b: m.coverage(a, b, c, c, 0.1)):
        start = time.process_time()
        metric(x, y)
        assert time.process_time() - start < 2  # generous: the machine may be busy


X, C = torch.zeros(6, 2), torch.zeros(6, dtype=torch.long)
BAD = torch.full((6, 2), math.nan)
FLAT = gaussian_pair(dim=2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: m.nll(X[:0], C[:0], FLAT), "x has shape (0, 2)"),
        (lambda: m.nll(BAD, C, FLAT), "x has 6 samples that are not finite"),
        (lambda: m.nll(X[:, :1], C, FLAT), "x has 1 values per sample; allowed: 2"),
        (lambda: m.nll(X, C[:5], FLAT), "c is torch.int64 (5,)"),
        (lambda: m.nll(X, C + 2, FLAT), "c contains 2; allowed: 0 to 1"),
        (lambda: m.nll(X[:, 0], C, FLAT), "x has shape (6,)"),
        (lambda: m.outlier_rate(BAD, C, FLAT, torch.zeros(2)), "not finite"),
        (lambda: m.outlier_threshold(FLAT, quantile=0.0), "quantile = 0.0"),
        (lambda: m.coverage(X, BAD, C, C), "y has 6 samples that are not finite"),
        (lambda: m.coverage(X, X, C, C[:3]), "y_c is torch.int64 (3,)"),
        (lambda: m.nearest_neighbours(X, torch.zeros(3, 5)), "y has 5 values per sample; allowed: 2"),
        (lambda: m.nearest_neighbours(X, X, 0), "k = 0; allowed: a whole number, 1 or more"),
        (lambda: m.nearest_neighbours(X, X, 1, C), "x_c, y_c = 'labels of one set'; allowed: of both or of none"),
        (lambda: m.frechet(X, torch.zeros(6, 3)), "b has 3 values per sample; allowed: 2"),
        (lambda: m.precision_recall(X, X, 6), "real has shape (6, 2); allowed: a tensor [n, ...] with n >= 7"),
        (lambda: m.precision_recall(X, X, 0), "k = 0"),
        (lambda: m.frechet(X, BAD), "b has 6 samples that are not finite"),
        (lambda: m.frechet(X[:1], X), "n >= 2"),
        (lambda: m.sliced_wasserstein(X, torch.zeros(3, 1)), "b has 1 values per sample"),
        (lambda: m.sliced_wasserstein(X, X, C, C + 1), "classes of a = [0]; allowed: [1], those of b"),
        (lambda: m.class_accuracy(X, C, lambda x: x[:, 0]), "logits = (6,); allowed: (6, num_classes)"),
        (lambda: m.class_accuracy(X, C, lambda x: BAD), "without NaN"),
        (lambda: m.digits_classifier()(X), "x has 2 values per sample; allowed: 64"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)
