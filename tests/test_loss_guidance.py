"Guidance by a loss, restated in plain torch."

import pytest
import torch
from page_code import page_code
from torch import nn
from torch.testing import assert_close
from weights import stir

from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import EMBEDDINGS, Denoiser, NetworkDenoiser, Prediction, count_nfe
from guidance_nb.images._networks import image_denoiser
from guidance_nb.loss_guidance import LossGuidance, _recomputed, pigdm_scale
from guidance_nb.mixtures import ExactDenoiser, Mixture, log_prob
from guidance_nb.paths import EDMPath, FlowPath, VPPath, expand_time

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()]
each_path = pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "cosine", "edm"])
STD, MATRIX = 0.4, torch.tensor([[1.0, 0.0, 0.5], [0.0, -1.0, 0.2]], dtype=torch.float64)
Y = torch.tensor([0.7, -0.4], dtype=torch.float64)


def gauss(seed: int = 0, components: int = 1) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(components, 3, 3, generator=generator, dtype=torch.float64)
    means = torch.randn(components, 3, generator=generator, dtype=torch.float64)
    return Mixture(means, root @ root.mT + 0.1 * torch.eye(3), torch.zeros(components).long())


def loss(x0, c=None):
    return ((Y - x0 @ MATRIX.T) / STD).square().sum(1) / 2


def points(path, n: int = 6):
    generator = torch.Generator().manual_seed(1)
    t = path.time_at(torch.tensor([0.05, 0.2, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64))[:n]
    return torch.randn(n, 3, generator=generator, dtype=torch.float64), t


def covariance(path, t, spread):
    "Cov[x0 | x_t] of a Gaussian, from its precision."
    a, s = path.alpha(t), path.sigma(t)
    return torch.linalg.inv(torch.linalg.inv(spread) + (a / s)[:, None, None] ** 2 * torch.eye(3))


@each_path
def test_one_step_is_the_gradient_of_the_loss_of_the_denoised_point(path):
    (x, t), model = points(path), ExactDenoiser(gauss(), path)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(model.x0(x, t)).sum(), x)
    guided = LossGuidance(model, loss, 1.7)
    assert_close(guided.score(x, t), model.score(x, t) - 1.7 * gradient, rtol=1e-9, atol=1e-9)


@each_path
def test_several_steps_give_the_posterior_mean_of_a_gaussian(path):
    "With a scale g the measurement has the variance s^2 / g."
    (x, t), law = points(path), gauss()
    model, scale = ExactDenoiser(law, path), 2.5
    spread = law.covariances
    c, x0 = covariance(path, t, spread[0]), model.x0(x, t)
    seen = MATRIX @ c @ MATRIX.T + STD**2 / scale * torch.eye(2)
    expected = x0 + torch.einsum("bij,bj->bi", c @ MATRIX.T @ torch.linalg.inv(seen), Y - x0 @ MATRIX.T)
    for steps, close in ((1, False), (3, True), (5, True)):
        error = (LossGuidance(model, loss, scale, steps=steps).x0(x, t) - expected).abs().max()
        assert (error < 1e-7) == close


@each_path
def test_at_the_output_the_covariance_is_that_of_normal_data(path):
    (x, t), model = points(path), ExactDenoiser(gauss(), path)
    x0, ratio = model.x0(x, t), expand_time(path.noise_to_signal(t), x) ** 2
    size = ratio / (1 + ratio)
    once = x0 + size * (Y - x0 @ MATRIX.T) @ MATRIX / STD**2
    assert_close(LossGuidance(model, loss, through=False).x0(x, t), once)
    seen = size[:, :, None] * MATRIX @ MATRIX.T + STD**2 * torch.eye(2)
    solved = torch.linalg.solve(seen, (Y - x0 @ MATRIX.T)[:, :, None])[:, :, 0]
    converged = LossGuidance(model, loss, through=False, steps=3)
    assert_close(converged.x0(x, t), x0 + size * solved @ MATRIX, rtol=1e-6, atol=1e-6)


def test_the_measured_mixture_is_bayes_rule():
    law, generator = gauss(3, 4), torch.Generator().manual_seed(2)
    x = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    ratio = (
        log_prob(page_code("25_loss_guidance", "measured").measured(law, MATRIX, Y, STD), x)
        - log_prob(law, x)
        + loss(x)
    )
    assert_close(ratio, ratio[0].expand(40))


@each_path
def test_the_scale_of_pigdm(path):
    _, t = points(path)
    ratio = path.noise_to_signal(t) ** 2
    assert_close(pigdm_scale(path, 0.3)(t), 0.09 / (0.09 + ratio / (1 + ratio)))


def test_the_loss_alone_sees_its_condition():
    "Each sample has its own measurement, inside and outside the interval, and the model is asked without it."
    model, path = ExactDenoiser(gauss(), FlowPath()), FlowPath()
    (x, t), y = points(path), torch.arange(12, dtype=torch.float64).view(6, 2)
    own = lambda x0, y: (y - x0 @ MATRIX.T).square().sum(1) / 2  # noqa: E731
    guided = LossGuidance(model, own, interval=(0.3, 0.8), num_classes=EMBEDDINGS)
    together, plain = guided.x0(x, t, y), model.x0(x, t)
    for i in range(6):
        assert_close(guided.x0(x[i : i + 1], t[i : i + 1], y[i : i + 1])[0], together[i])
    assert torch.equal((together != plain).any(1), (t >= 0.3) & (t <= 0.8))


@pytest.fixture(scope="module")
def network():
    options = {"patch": 1, "widths": (8, 16), "attention": (), "head": 4}
    return stir(image_denoiser("unet-tiny", (1, 8, 8), FlowPath(), 3, **options).eval(), 0.2, 0)


def test_recomputing_keeps_less_and_changes_nothing(network):
    "Also with several steps; each costs one network evaluation."
    x, t, c = torch.randn(3, 1, 8, 8), torch.tensor(0.5), torch.arange(3)
    distance = lambda x0, c: (x0 - 1).square().flatten(1).sum(1)  # noqa: E731
    found, sizes = [], []
    for recompute in (False, True):
        kept: list[int] = []
        guided = LossGuidance(network, distance, 0.1, steps=3, recompute=recompute)
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part.numel()) or part, lambda p: p)  # noqa: B023
        with hooks, count_nfe() as nfe:
            found.append(guided.x0(x, t, c))
        assert nfe.total == 3
        sizes.append(sum(kept))
    assert_close(found[1], found[0])
    assert sizes[1] < 0.6 * sizes[0]


@pytest.mark.parametrize("kind", [nn.ModuleList, nn.ModuleDict])
def test_blocks_in_nested_lists_are_recomputed(kind):
    blocks = [nn.Sequential(nn.Linear(2, 2), nn.ReLU()) for _ in range(2)]
    model = nn.Module()
    model.levels = nn.ModuleList([kind(blocks if kind is nn.ModuleList else zip("ab", blocks))])
    with _recomputed(model):
        assert [part for part in model.modules() if "forward" in vars(part)] == blocks
    assert not any("forward" in vars(part) for part in model.modules())


def test_at_the_output_nothing_is_kept(network):
    kept: list[int] = []
    guided = LossGuidance(network, lambda x0, c: x0.flatten(1).sum(1), through=False)
    with torch.autograd.graph.saved_tensors_hooks(lambda part: kept.append(part.numel()) or part, lambda part: part):
        guided.x0(torch.randn(3, 1, 8, 8), torch.tensor(0.5), torch.arange(3))
    assert sum(kept) <= 3 * 64


def test_bad_input_is_one_line(network):
    x, t, c = torch.randn(3, 1, 8, 8), torch.tensor(0.5), torch.arange(3)
    for wrong in (lambda x0, c: x0.sum(), lambda x0, c: x0.square()):
        with pytest.raises(ValueError, match=r"^loss is torch.float32 .*; allowed: a tensor \(3,\)$"):
            LossGuidance(network, wrong)(x, t, c)
    with pytest.raises(ValueError, match=r"^loss is float; allowed: a tensor \(3,\)$"):
        LossGuidance(network, lambda x0, c: 0.0)(x, t, c)
    with pytest.raises(ValueError, match=r"^steps = 0; allowed"):
        LossGuidance(network, loss, steps=0)
    with pytest.raises(ValueError, match=r"^loss = 3; allowed"):
        LossGuidance(network, 3)
    for wrong in (-2, 1.5, True, "10"):
        with pytest.raises(ValueError, match=r"^num_classes = .*; allowed: a whole number, -1 or more$"):
            LossGuidance(network, loss, num_classes=wrong)
    assert LossGuidance(network, loss, num_classes=EMBEDDINGS).num_classes == EMBEDDINGS
    with pytest.raises(ValueError, match=r"^std = -1; allowed"):
        pigdm_scale(FlowPath(), -1)


@pytest.mark.parametrize("prediction", ["velocity", "eps", "x0"])
def test_a_network_that_disables_gradients_says_so(prediction):
    "Its x0 has the gradient of what is added to its output, which is not the denoiser's."
    net = NetworkDenoiser(Deaf(), FlowPath(), 0, prediction)
    x, t, total = torch.randn(3, 2), torch.tensor(0.5), lambda x0, c: x0.sum(1)
    for wrong in (net, ClassifierFreeGuidance(NetworkDenoiser(Deaf(), FlowPath(), 2, prediction), 2.0)):
        with pytest.raises(ValueError, match=r"^net gives no gradient at x; allowed: a network without torch.no_grad"):
            LossGuidance(wrong, total)(x, t, torch.arange(3) % 2 if wrong is not net else None)
    assert LossGuidance(net, total, through=False).x0(x, t).isfinite().all()
    with pytest.raises(ValueError, match=r"^model gives x0 without a gradient; allowed: one that has it, or through"):
        LossGuidance(Still(FlowPath()), total)(x, t)


class Deaf(nn.Module):
    "A network that is evaluated without gradients."

    @torch.no_grad()
    def forward(self, x, *_):
        return 0.5 * x


class Still(Denoiser):
    "A denoiser that is evaluated without gradients."

    @torch.no_grad()
    def forward(self, x, t, c=None):
        return Prediction(0.5 * x, 0.5 * x)


@each_path
@pytest.mark.parametrize("through", [True, False])
def test_pure_noise_is_guided_as_the_noise_beside_it(path, through):
    "Where no signal is left the Jacobian is 0, and 0 / 0 has a limit."
    model, t = ExactDenoiser(gauss(), path), torch.tensor([1.0, 0.9995, 0.999, 0.998], dtype=torch.float64)
    x = torch.full((4, 3), 0.3, dtype=torch.float64) * path.sigma(t)[:, None]
    guided = LossGuidance(model, loss, through=through, steps=3)
    x0 = guided.x0(x, t)
    assert_close(x0, x0[-1:].expand(4, 3), rtol=0.01, atol=0.01)
    assert (x0 - model.x0(x, t)).abs().min() > 0.02
