"Independent restatements of classifier guidance: hand-written gradients, Bayes' rule in SciPy, the DDPM step."

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import norm
from torch import nn

from guidance_nb._checks import check_choice, check_scale
from guidance_nb.classifier_guidance import ClassifierGuidance, class_gradient
from guidance_nb.denoisers import Denoiser, Prediction
from guidance_nb.guidance import shift_prediction
from guidance_nb.mixtures import ExactClassifier, ExactDenoiser, Mixture, gaussian_pair
from guidance_nb.networks import LinearClassifier, NoisyClassifier
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.samplers import sample, sample_trajectory

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()]
MEANS, VARIANCES = np.array([-1.0, 0.3, 0.8, 2.0]), np.array([0.1, 0.3, 0.05, 0.4])
WEIGHTS, LABELS = np.array([0.4, 0.1, 0.3, 0.2]), np.array([0, 1, 1, 0])


@pytest.fixture
def mixture():
    return Mixture(*(torch.tensor(a) for a in (MEANS[:, None], VARIANCES, LABELS, WEIGHTS)))


def density(x, alpha, sigma, members):
    "p_t of the chosen components in one dimension, with SciPy."
    std = np.sqrt(alpha**2 * VARIANCES[members] + sigma**2)
    return (WEIGHTS[members] * norm.pdf(x[:, None], alpha * MEANS[members], std)).sum(1)


def posterior_score(x, alpha, sigma, c, scale, step=1e-5):
    "d/dx of log p(x) + scale * log p(c | x) by central differences of SciPy densities."

    def value(x):
        everything = density(x, alpha, sigma, np.arange(4))
        chosen = density(x, alpha, sigma, np.nonzero(LABELS == c)[0])
        return np.log(everything) + scale * (np.log(chosen) - np.log(everything))

    return (value(x + step) - value(x - step)) / (2 * step)


class Softmax(nn.Module):
    "A linear classifier whose gradient is known: W_c - sum_k p_k W_k."

    def __init__(self, weight):
        super().__init__()
        self.weight, self.num_classes = weight, len(weight)

    def forward(self, x, t):
        return x.flatten(1) @ self.weight.T


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.0, -0.5])
@pytest.mark.parametrize("base", ["unconditional", "conditional"])
def test_guided_score_is_the_tilted_one(mixture, path, scale, base):
    x = np.linspace(-2, 2, 15)
    model = ClassifierGuidance(ExactDenoiser(mixture, path), ExactClassifier(mixture, path), scale, base=base)
    for time in (0.2, 0.5, 0.8):
        t = torch.tensor(time, dtype=torch.float64)
        for c in (0, 1):
            score = model.score(torch.tensor(x)[:, None], t, torch.full((15,), c))[:, 0]
            expected = posterior_score(x, path.alpha(t).item(), path.sigma(t).item(), c, scale)
            np.testing.assert_allclose(score, expected, rtol=1e-5, atol=1e-6)


def test_gradient_by_hand():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5, 12, generator=generator, dtype=torch.float64)
    x = torch.randn(7, 3, 2, 2, generator=generator, dtype=torch.float64)
    c = torch.arange(7) % 5
    p = softmax(x.flatten(1).numpy() @ weight.numpy().T, axis=1)
    expected = (weight.numpy()[c] - p @ weight.numpy()).reshape(7, 3, 2, 2)
    with torch.no_grad():
        gradient = class_gradient(Softmax(weight), x, 0.5, c)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10, atol=1e-12)
    assert not gradient.requires_grad and gradient.dtype == torch.float64 and not x.requires_grad


def test_gradient_belongs_to_the_sample_and_leaves_weights_alone():
    classifier = NoisyClassifier(2, 3, VPPath(), width=16, depth=1)
    nn.init.normal_(classifier.net.read.weight)
    x, t, c = torch.randn(6, 2), torch.rand(6), torch.arange(6) % 3
    whole = class_gradient(classifier, x, t, c)
    alone = torch.cat([class_gradient(classifier, x[i : i + 1], t[i : i + 1], c[i : i + 1]) for i in range(6)])
    torch.testing.assert_close(whole, alone)
    assert all(p.grad is None for p in classifier.parameters())


def test_log_probabilities_and_logits_are_the_same_classifier():
    weight, x, c = torch.randn(3, 2), torch.randn(4, 2), torch.tensor([0, 1, 2, 0])

    class Normalised(Softmax):
        def forward(self, x, t):
            return super().forward(x, t).log_softmax(1)

    a, b = (class_gradient(kind(weight), x, 0.5, c) for kind in (Softmax, Normalised))
    torch.testing.assert_close(a, b)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_shift_is_the_published_one(path):
    "eps - sigma g, then x0 recomputed from the new eps, as `condition_score` does."
    generator = torch.Generator().manual_seed(1)
    x, eps, g = torch.randn(3, 8, 4, generator=generator, dtype=torch.float64)
    t = torch.linspace(0.02, 0.98, 8, dtype=torch.float64)
    alpha, sigma = (f(t).numpy()[:, None] for f in (path.alpha, path.sigma))
    x0 = torch.tensor((x.numpy() - sigma * eps.numpy()) / alpha)
    pair = shift_prediction(Prediction(x0, eps), g, path, t, "score")
    new_eps = eps.numpy() - sigma * g.numpy()
    np.testing.assert_allclose(pair.eps, new_eps, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(pair.x0, (x.numpy() - sigma * new_eps) / alpha, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("path", [FlowPath(), VPPath("cosine")], ids=str)
def test_a_gradient_at_pure_noise_is_that_of_a_little_before(path):
    "Where no signal is left, clean data moves by sigma^2 / alpha at a noise-to-signal ratio of a thousand."
    x0, eps, g = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    before = path.time_at(torch.tensor(1e3, dtype=torch.float64))
    pair = shift_prediction(Prediction(x0, eps), g, path, torch.ones((), dtype=torch.float64), "score")
    expected = x0 + path.sigma(before) ** 2 / path.alpha(before) * g
    np.testing.assert_allclose(pair.x0, expected, rtol=1e-10)
    np.testing.assert_allclose(pair.eps, eps - path.sigma(before) * path.alpha(torch.ones(())) / path.alpha(before) * g)


@pytest.mark.parametrize("path", PATHS, ids=str)
@pytest.mark.parametrize("time", [0.0, 1.0])
def test_ends_of_the_path_are_finite(path, time):
    pair = gaussian_pair(0.5)
    model = ClassifierGuidance(ExactDenoiser(pair, path), ExactClassifier(pair, path), 4.0)
    c = torch.ones(9, dtype=torch.long)
    got = model.predict(torch.randn(9, 1, dtype=torch.float64), torch.tensor(time, dtype=torch.float64), c)
    assert torch.isfinite(got.x0).all() and torch.isfinite(got.eps).all()
    learned = ClassifierGuidance(ExactDenoiser(pair, path), LinearClassifier(1, 2), 4.0)
    assert torch.isfinite(learned.predict(torch.randn(9, 1), torch.tensor(time), c).x0).all()


class Still(Denoiser):
    "Predicts x0 = 0, so that one DDPM step is easy to write down."

    def forward(self, x, t, c=None):
        sigma = self.path.sigma(torch.as_tensor(t, dtype=x.dtype))
        return Prediction(torch.zeros_like(x), x / sigma)


def test_mean_shift_is_posterior_variance_times_gradient():
    "One DDPM step: mu + scale * beta_tilde * grad, beta_tilde = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)."
    path, push = VPPath(), torch.tensor([[0.7], [-0.7]], dtype=torch.float64)  # logit difference 1.4 x
    times = torch.tensor([0.5, 0.4, 0.0], dtype=torch.float64)
    x, c = torch.tensor([[0.3], [-1.1], [0.0]], dtype=torch.float64), torch.tensor([0, 1, 1])
    results = {}
    for scale in (0.0, 2.0):
        model = ClassifierGuidance(Still(path, 2), Softmax(push), scale, form="mean_shift")
        options = {"times": times, "init": x, "progress": False, "dtype": torch.float64}
        run = sample_trajectory(model, c, (1,), "ddpm", **options)
        results[scale] = run.points[1]
    abar_t, abar_s = math.exp(-(0.1 * 0.5 + 9.95 * 0.25)), math.exp(-(0.1 * 0.4 + 9.95 * 0.16))
    beta_tilde = (1 - abar_s) / (1 - abar_t) * (1 - abar_t / abar_s)
    p = softmax(x.numpy() @ push.numpy().T, axis=1)
    gradient = push.numpy()[c] - p @ push.numpy()
    np.testing.assert_allclose(results[2.0] - results[0.0], 2 * beta_tilde * gradient, rtol=1e-10)


def test_mean_shift_acts_in_ddpm_alone():
    pair, c = gaussian_pair(0.5), torch.ones(20, dtype=torch.long)
    base = ExactDenoiser(pair, FlowPath())
    shift = ClassifierGuidance(base, ExactClassifier(pair, FlowPath()), 5.0, form="mean_shift")
    for name in ("heun", "euler", "ddim", "dpmpp_2m", "euler_maruyama", "ddpm"):
        same = torch.equal(
            sample(shift, c, (1,), name, 6, progress=False), sample(base, 20, (1,), name, 6, progress=False)
        )
        assert same == (name != "ddpm")


@pytest.mark.parametrize("form", ["score", "mean_shift"])
def test_no_condition_no_guidance(form):
    pair, x, t = gaussian_pair(0.5), torch.randn(5, 1), torch.rand(5)
    base = ExactDenoiser(pair, VPPath())
    model = ClassifierGuidance(base, ExactClassifier(pair, VPPath()), 3.0, form)
    assert torch.equal(model.predict(x, t).x0, base.predict(x, t).x0)
    assert model.mean_shift(x, t) is None


def test_mean_shifts_add_up():
    pair, x, t, c = gaussian_pair(0.5), torch.randn(5, 1).double(), torch.rand(5).double(), torch.ones(5).long()
    base, judge = ExactDenoiser(pair, VPPath()), ExactClassifier(pair, VPPath())
    first = ClassifierGuidance(base, judge, 1.0, "mean_shift")
    twice = ClassifierGuidance(first, judge, 3.0, "mean_shift", "conditional")
    once = ClassifierGuidance(base, judge, 3.0, "mean_shift")
    torch.testing.assert_close(twice.mean_shift(x, t, c), once.mean_shift(x, t, c))


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2", None, True, torch.tensor([1.0, float("nan")])])
def test_bad_scales(scale):
    with pytest.raises(ValueError, match=r"scale = .*; allowed: a finite number"):
        check_scale("scale", scale)
    with pytest.raises(ValueError, match="allowed: a finite number"):
        ClassifierGuidance(ExactDenoiser(gaussian_pair(), FlowPath()), LinearClassifier(1, 2), scale)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"form": "mean"}, "form = 'mean'; allowed: 'score', 'mean_shift'"),
        ({"base": "null"}, "base = 'null'; allowed: 'unconditional', 'conditional'"),
        ({"classifier": LinearClassifier(1, 3)}, "classifier.num_classes = 3; allowed: 2, as the model has"),
    ],
)
def test_bad_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        ClassifierGuidance(
            **{"model": ExactDenoiser(gaussian_pair(), FlowPath()), "classifier": LinearClassifier(1, 2)} | arguments
        )
    assert check_choice("form", "score", ("score",)) == "score"


def test_bad_labels_and_times():
    model = ClassifierGuidance(ExactDenoiser(gaussian_pair(), FlowPath()), LinearClassifier(1, 2))
    x = torch.zeros(3, 1)
    for call, message in (
        (lambda: model.predict(x, 1.5, torch.zeros(3).long()), r"t = 1\.5"),
        (lambda: model.predict(x, 0.5, torch.full((3,), 2)), "c contains 2; allowed: 0 to 1"),
        (lambda: class_gradient(model.classifier, x, 0.5, torch.full((3,), -1)), "c contains -1; allowed: 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_model_without_classes_takes_those_of_the_classifier():
    base = Still(VPPath())
    assert ClassifierGuidance(base, LinearClassifier(1, 3)).num_classes == 3
    with pytest.raises(ValueError, match=r"classifier\.num_classes = 3; allowed: 0"):
        ClassifierGuidance(base, LinearClassifier(1, 3), base="conditional")


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_a_classifier_is_asked_where_signal_is_left(mixture, path):
    "At pure noise it could tell nothing, and its gradient would be divided by nothing."
    asked, exact = [], ExactClassifier(mixture, path)

    class Spy(nn.Module):
        num_classes = 2

        def forward(self, x, t):
            asked.append(torch.as_tensor(t))
            return exact(x, t)

    t = torch.tensor(1.0, dtype=torch.float64)
    ClassifierGuidance(ExactDenoiser(mixture, path), Spy(), 2.0)(torch.ones(1, 1).double(), t, torch.tensor([1]))
    assert len(asked) == 1 and 1e-4 < path.alpha(asked[0]) and asked[0] > 0.9
