"Model-guidance restated without the notebook's code: tabular oracles, row counts, scales, refusals."

import copy
import math

import numpy as np
import pytest
import torch
from page_code import page_code
from torch import nn
from torch.testing import assert_close

from guidance_nb._random import keyed_generator
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import NetworkDenoiser, count_nfe, guide
from guidance_nb.mixtures import ExactClassifier, ExactDenoiser, gaussian_pair
from guidance_nb.model_guidance import (
    AutoWeight,
    FixedScale,
    ModelGuidanceLoss,
    _guidance_direction,
    _guided_mask,
    scale_from_mg_weight,
)
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.training import DenoisingLoss, LossContext, train

scale_during_training = page_code("13_model_guidance", "scale_during_training").scale_during_training


class Rows(nn.Module):
    "One free vector per label, for any (x, t)."

    def __init__(self, y):
        super().__init__()
        self.y = nn.Parameter(torch.as_tensor(y).clone())

    def forward(self, x, time, labels):
        return self.y[labels]


class Watch(nn.Module):
    "Labels, modes and gradient modes of every call; the answer depends on all inputs."

    def __init__(self, classes):
        super().__init__()
        self.read, self.embed, self.calls = nn.Linear(2, 2), nn.Embedding(classes + 1, 2), []

    def forward(self, x, time, labels, scale=None):
        self.calls.append((len(x), labels.tolist(), self.training, torch.is_grad_enabled(), scale))
        h = (self.read(x) + self.embed(labels)).tanh() * (1 + time[:, None])
        return h if scale is None else h * (1 + scale[:, None])


class Fixed(LossContext):
    "Chosen times and drop mask; noise in opposite pairs, so that every mean is exact."

    t, mask = 0.5, None

    def times(self, x):
        return torch.as_tensor(self.t, dtype=x.dtype).expand(len(x))

    def noise(self, x):
        half = torch.randn(len(x) // 2, *x.shape[1:], generator=self.generator).to(x)
        return torch.stack([half, -half], 1).flatten(0, 1)

    def drop(self, x, probability):
        return torch.zeros(len(x), dtype=torch.bool) if self.mask is None else self.mask


def context(ema, step=0, kind=LossContext):
    return kind(keyed_generator(11, step), step, 100, ema)


def batch(n=400, classes=3):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, generator=g), torch.randint(0, classes, (n,), generator=g)


def regress(weight, n, decay, classes, unconditional="null", target="ema"):
    "Exact regression with the real loss on a table, from a plain start; the scale about the null row after each step."
    rng = np.random.default_rng(classes)
    means = torch.tensor(rng.normal(size=(classes, 4)))
    exact = -torch.cat([means, means.mean(0, keepdim=True)])
    model = NetworkDenoiser(Rows(exact), FlowPath(), classes)
    teacher = copy.deepcopy(model)
    loss = ModelGuidanceLoss(
        weight,
        interval=(0.0, 1.0),
        unconditional=unconditional,
        target=target,
        frozen=teacher if target == "frozen" else None,
    )
    c = torch.arange(classes).repeat_interleave(2)
    scales = []
    for step in range(n):
        model.zero_grad()
        # sum over two rows of mean over four entries: the Hessian is 2 * 2 / 4 = 1, one step of length 1 solves it
        loss(model, means[c], c, context(teacher, step, Fixed)).sum().backward()
        with torch.no_grad():
            model.net.y -= model.net.y.grad
            teacher.net.y.copy_(decay * teacher.net.y + (1 - decay) * model.net.y)
        away, star = model.net.y[:-1] - exact[-1], exact[:-1] - exact[-1]
        assert_close(away, (away * star).sum() / star.square().sum() * star, rtol=1e-6, atol=1e-8)
        scales.append(((away * star).sum() / star.square().sum()).item())
    return scales


@pytest.mark.parametrize("weight", [0.25, 0.45, 0.5, 0.75, -1.0])
def test_fixed_point_is_one_over_one_minus_w(weight):
    scales = regress(weight, 100, 0.0 if weight > 0 else 0.5, 3)
    assert scales[0] == pytest.approx(1 + weight)
    assert scales[-1] == pytest.approx(1 / (1 - weight), rel=1e-9)


def test_lag_of_the_average():
    measured = regress(0.6, 120, 0.95, 2)
    gamma, by_hand = 1.0, []
    for _ in range(120):
        by_hand.append(1 + 0.6 * gamma)
        gamma = 0.95 * gamma + 0.05 * by_hand[-1]
    np.testing.assert_allclose(measured, by_hand, rtol=1e-9)
    np.testing.assert_allclose([scale_during_training(0.6, n, 0.95) for n in range(120)], by_hand, rtol=1e-12)
    late = [2.5 - s for s in measured]
    assert -1 / np.log(late[60] / late[59]) == pytest.approx(20 / 0.4, rel=0.02)  # horizon / (1 - w), in steps


@pytest.mark.parametrize("weight, start", [(1.0, 1.0), (1.3, 1.0), (0.0, 1.0), (0.7, 0.0)])
def test_closed_form_against_iteration(weight, start):
    gamma = start
    for n in range(50):
        assert scale_during_training(weight, n, 0.8, start) == pytest.approx(1 + weight * gamma, rel=1e-9)
        gamma = 0.8 * gamma + 0.2 * (1 + weight * gamma)


def test_divergence_beyond_one():
    assert np.diff(regress(1.0, 10, 0.0, 2, target="frozen")) == pytest.approx(np.ones(9))
    above = np.diff(regress(1.2, 10, 0.0, 2, target="frozen"))
    assert above[1:] / above[:-1] == pytest.approx(1.2 * np.ones(8))


@pytest.mark.parametrize("name, classes, expected", [("uniform", 3, 4 / 3), ("contrastive", 2, 1 / (1 - 0.25 * 2))])
def test_fixed_points_without_an_empty_class(name, classes, expected):
    assert regress(0.25, 60, 0.0, classes, name)[-1] == pytest.approx(expected, rel=1e-9)


def test_contrastive_mean_over_draws():
    "With N classes the mean direction is N / (N - 1) times the distance to the class mean."
    y = torch.randn(5, 2, dtype=torch.float64)
    teacher = NetworkDenoiser(Rows(y), FlowPath(), 4)
    x, c = torch.zeros(40_000, 2, dtype=torch.float64), torch.full((40_000,), 2)
    t = torch.full((40_000,), 0.5, dtype=torch.float64)
    ahead = torch.randint(1, 4, (40_000,), generator=torch.Generator().manual_seed(0))
    d = _guidance_direction(teacher, x, t, c, "contrastive", ahead=ahead)
    assert_close(d.mean(0), 4 / 3 * (y[2] - y[:4].mean(0)), rtol=0, atol=0.03)
    assert (d.abs().sum(1) > 0).all()  # never its own class


def test_posterior_weights():
    y, p = torch.randn(4, 2), torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8]])
    teacher = NetworkDenoiser(Rows(y), FlowPath(), 3)
    classifier = lambda x, t: p.log() + 5.0  # noqa: E731
    x, t, c = torch.zeros(2, 2), torch.full((2,), 0.5), torch.tensor([1, 0])
    d = _guidance_direction(teacher, x, t, c, "posterior", classifier)
    assert_close(d[0], y[1] - (0.7 * y[0] + 0.2 * y[1] + 0.1 * y[2]))
    assert_close(d[1], y[0] - (0.1 * y[0] + 0.1 * y[1] + 0.8 * y[2]))


@pytest.mark.parametrize(
    "path, prediction, plain",
    [
        (VPPath(), "eps", lambda x0, e, t: e),
        (FlowPath(), "velocity", lambda x0, e, t: e - x0),
        (EDMPath(), "x0", lambda x0, e, t: x0),
        (VPPath("cosine"), "v", lambda x0, e, t: (np.pi * t / 2).cos() * e - (np.pi * t / 2).sin() * x0),
    ],
)
@pytest.mark.parametrize("target", ["ema", "online", "frozen"])
def test_equation_18_by_hand(path, prediction, plain, target):
    nets = [NetworkDenoiser(Watch(3), path, 3, prediction) for _ in range(3)]
    model, ema, frozen = nets
    x0, c = batch()
    replay = context(ema, 7)
    t, e, dropped = replay.times(x0), replay.noise(x0), replay.drop(x0, 0.2)
    x = path.alpha(t)[:, None] * x0 + path.sigma(t)[:, None] * e
    teacher = {"ema": ema, "online": model, "frozen": frozen}[target].net
    w = torch.where(~dropped & (t < 0.6) & (t > 0.1), 0.4, 0.0)[:, None]
    null = torch.full_like(c, 3)
    target_value = plain(x0, e, t[:, None]) + w * (teacher(x, t, c) - teacher(x, t, null)).detach()
    expected = ((model.net(x, t, torch.where(dropped, null, c)) - target_value) ** 2).mean(1)
    loss = ModelGuidanceLoss(0.4, 0.2, target, interval=(0.1, 0.6), frozen=frozen if target == "frozen" else None)
    actual = loss(model, x0, c, context(ema, 7))
    assert_close(actual, expected, rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(v.mean(), list(model.parameters())) for v in (actual, expected)]
    assert_close(*grads, rtol=1e-3, atol=1e-5)  # no gradient through the teacher, even when it is the model itself


class Oracle(nn.Module):
    "The raw output of a perfectly trained network, unconditional output included."

    def __init__(self, mixture, path, prediction):
        super().__init__()
        self.exact = ExactDenoiser(mixture, path)
        self.as_network = NetworkDenoiser(nn.Identity(), path, mixture.num_classes, prediction)

    def forward(self, x, times, labels):
        null = labels == self.exact.num_classes
        parts = zip(self.exact(x, times), self.exact(x, times, labels.masked_fill(null, 0)))
        return self.as_network.target(*(torch.where(null[:, None], a, b) for a, b in parts), times)


@pytest.mark.parametrize("prediction", ["velocity", "eps", "x0", "v"])
@pytest.mark.parametrize("path", [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()])
def test_the_direction_is_guidance_in_every_parametrisation(path, prediction):
    "Adding w times the direction to the raw output and decoding is guidance at 1 + w; the exact posterior agrees."
    mixture = gaussian_pair(0.5, dim=2)
    teacher, exact = (
        NetworkDenoiser(Oracle(mixture, path, prediction), path, 2, prediction),
        ExactDenoiser(mixture, path),
    )
    x, c = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), torch.arange(60) % 2
    t = torch.linspace(0.05, 0.95, 60, dtype=torch.float64)
    d = _guidance_direction(teacher, x, t, c)
    expected = guide(exact(x, t, c), exact(x, t), 1.5)
    assert_close(teacher.decode(teacher.output(x, t, c) + 0.5 * d, x, t), expected, rtol=1e-8, atol=1e-8)
    posterior = _guidance_direction(teacher, x, t, c, "posterior", ExactClassifier(mixture, path))
    assert_close(posterior, d, rtol=1e-8, atol=1e-8)


def test_which_samples_the_teacher_evaluates():
    w = torch.tensor([0.0, 0.5, 0.0])
    assert _guided_mask(w).tolist() == [False, True, False] and _guided_mask(w.to("meta")) == slice(None)


class ScaledRows(Rows):
    "A vector for each label, and a slope in the scale."

    def forward(self, x, time, labels, scale):
        return self.y[labels, 0] + (scale - 1)[:, None] * self.y[labels, 1]


class Silent(LossContext):
    def noise(self, x):
        return torch.zeros_like(x)


@pytest.mark.parametrize("slope, least, most", [(1.0, 0.0, 1e-20), (2.0, 0.1, math.inf)])
def test_a_scale_aware_network_does_not_compound(slope, least, most):
    "Without noise every residual vanishes where the slope is the exact direction, and not at a compounded one."
    means, c = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), torch.arange(200) % 2
    exact = -torch.cat([means, means.mean(0, keepdim=True)])
    rows = torch.stack([exact, slope * (exact - exact[2])], 1)
    model = NetworkDenoiser(ScaledRows(rows), FlowPath(), 2, scale_aware=True)
    loss = ModelGuidanceLoss(scale_range=(1.0, 3.0), dropout=0.0, interval=(0.0, 1.0))
    assert least <= loss(model, means[c], c, Silent(keyed_generator(0), 0, 1, model)).max() <= most
    with count_nfe() as count:
        fixed = FixedScale(model, 2.5).velocity(torch.zeros(2, 3).double(), torch.tensor(0.5), torch.arange(2))
    assert count.total == 2
    assert_close(fixed, exact[2] + (1 + 1.5 * slope) * (exact[:2] - exact[2]))


@pytest.mark.parametrize("target", ["ema", "online"])
def test_teacher_pass(target):
    "One pass without gradient in evaluation mode, conditional and null rows of the kept rows only; modes restored."
    model, ema = (NetworkDenoiser(Watch(3), FlowPath(), 3).train() for _ in range(2))
    x0, c = batch()
    replay = context(ema)
    t, _, dropped = replay.times(x0), replay.noise(x0), replay.drop(x0, 0.1)
    keep = ~dropped & (t <= 0.75)
    with count_nfe() as nfe:
        ModelGuidanceLoss(target=target)(model, x0, c, context(ema))
    k = int(keep.sum())
    assert nfe.total == 400 + 2 * k
    calls = [*model.net.calls, *ema.net.calls]
    assert [call[0] for call in calls] == [400, 2 * k]
    assert calls[1][1] == c[keep].tolist() + [3] * k
    assert calls[1][2:4] == (False, False) and calls[0][2:4] == (True, True)
    assert model.training and ema.training and model.net.training and ema.net.training


def test_plain_limits():
    model, ema = NetworkDenoiser(Watch(3), FlowPath(), 3), NetworkDenoiser(Watch(3), FlowPath(), 3)
    x0, c = batch()
    plain = DenoisingLoss(0.1)(model, x0, c, context(ema, 4))
    for loss in (ModelGuidanceLoss(0.0), ModelGuidanceLoss(start_step=5), ModelGuidanceLoss(interval=(0.0, 0.0))):
        assert torch.equal(loss(model, x0, c, context(ema, 4)), plain)
    assert ema.net.calls == []
    assert not torch.equal(ModelGuidanceLoss(start_step=4)(model, x0, c, context(ema, 4)), plain)
    everything = ModelGuidanceLoss(dropout=1.0)(model, x0, c, context(ema, 4))
    assert torch.equal(everything, DenoisingLoss(1.0)(model, x0, c, context(ema, 4)))


def test_scale_aware_loss_by_hand():
    model, ema = (NetworkDenoiser(Watch(3), FlowPath(), 3, scale_aware=True) for _ in range(2))
    x0, c = batch(1000)
    with torch.no_grad():
        actual = ModelGuidanceLoss(scale_range=(1.5, 3.0), interval=(0.0, 1.0), guided_share=0.3)(
            model, x0, c, context(ema)
        )
    n, labels, *_, fed = model.net.calls[0]
    dropped = torch.tensor(labels) == 3
    assert (fed[dropped] == 0).all() and ((fed[~dropped] == 1) | (fed[~dropped] >= 1.5)).all() and fed.max() < 3
    assert 0.2 < (fed[~dropped] > 1).double().mean() < 0.4
    assert ((fed[fed > 1] - 1.5) / 1.5).mean().item() == pytest.approx(0.5, abs=0.06)
    asked = ema.net.calls[0]
    k = asked[0] // 2
    assert k == int((fed > 1).sum()) and asked[4].tolist() == [1.0] * k + [0.0] * k
    replay = context(ema)
    t, e = replay.times(x0), replay.noise(x0)
    x, null = (1 - t)[:, None] * x0 + t[:, None] * e, torch.full_like(c, 3)
    d = ema.net(x, t, c, torch.ones(n)) - ema.net(x, t, null, torch.zeros(n))
    target = e - x0 + torch.where(dropped, 0.0, fed - 1)[:, None] * d
    assert_close(actual, (model.net(x, t, torch.tensor(labels), fed) - target).square().mean(1), rtol=1e-4, atol=1e-4)


def test_at_scale():
    model = NetworkDenoiser(Watch(3), FlowPath(), 3, scale_aware=True)
    x, c = batch(5)
    t = torch.linspace(0.1, 0.9, 5)
    assert_close(FixedScale(model, 2.5).predict(x, t, c), model.predict(x, t, c, scale=2.5))
    assert_close(FixedScale(model, 2.5).predict(x, t), model.predict(x, t))
    assert (FixedScale(model, 2.5).x0(x, t, c) - model.x0(x, t, c)).abs().max() > 1e-3


@pytest.mark.parametrize("cfg, weight", [(1.5, 0.5), (3.0, 0.25), (0.5, 0.5)])
def test_cfg_on_top_multiplies(cfg, weight):
    y_c, y_u = np.random.default_rng(0).normal(size=(2, 2))
    mg = y_u + (y_c - y_u) / (1 - weight)
    model = NetworkDenoiser(Rows(np.stack([mg, y_u])), FlowPath(), 1)
    velocity = ClassifierFreeGuidance(model, scale=cfg).velocity(
        torch.zeros(1, 2, dtype=torch.float64), torch.tensor(0.5, dtype=torch.float64), torch.tensor([0])
    )
    np.testing.assert_allclose(velocity[0].detach(), y_u + cfg / (1 - weight) * (y_c - y_u), rtol=1e-9)


def test_learned_weight_half_reaches_scale_two():
    "Two points: velocities are known by hand, E[x0 | x, t] = m tanh(...), so the learned scale can be read off."
    model = mlp_denoiser(1, FlowPath(), 2, width=32, depth=2)

    def draw(n, g):
        c = torch.randint(0, 2, (n,), generator=g)
        return (2.0 * c - 1)[:, None] + 0.5 * torch.randn(n, 1, generator=g), c

    loss = ModelGuidanceLoss(0.5, 0.2, interval=(0.0, 1.0))
    ema = train(model, loss, draw, 300, 256, lr=1e-2, ema=0.97, progress=False).ema
    t = 0.6
    x = torch.linspace(-1, 1, 41)[:, None]
    v = (1 - t) ** 2 * 0.25 + t**2
    mean = lambda m: m + (1 - t) * 0.25 / v * (x - (1 - t) * m)  # noqa: E731
    p = torch.sigmoid(2 * (1 - t) * x / v)
    uncond, cond = p * mean(1.0) + (1 - p) * mean(-1.0), mean(1.0)
    with torch.no_grad():
        guided = ema.x0(x, torch.tensor(t), torch.ones(41, dtype=torch.long))
    scale = ((guided - uncond) * (cond - uncond)).sum() / (cond - uncond).square().sum()
    assert scale.item() == pytest.approx(2.0, abs=0.25)


def test_auto_weight_follows_its_equation():
    rng, auto = np.random.default_rng(0), AutoWeight(0.1, 0.08, 0.6, 0.25, 0.5)
    w, h, q = 0.1, 0.08, None
    for _ in range(50):
        error = float(rng.normal())
        new = error if q is None else 0.25 * q + 0.75 * error
        h = -0.5 * h if q is not None and new > q else h
        w, q = float(np.clip(w + h, 0, 0.6)), new
        assert auto.update(error) == pytest.approx(w) and auto() == auto.value


def test_changing_weight_is_checked_at_every_step():
    model, (x0, c) = NetworkDenoiser(Watch(3), FlowPath(), 3), batch()
    weights = iter([0.5, 1.0])
    loss = ModelGuidanceLoss(lambda: next(weights))
    loss(model, x0, c, context(model))
    with pytest.raises(ValueError, match=r"weight = 1.0; allowed: below 1"):
        loss(model, x0, c, context(model))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"weight": 1.0}, "weight = 1.0; allowed: below 1"),
        ({"weight": 1.5, "target": "online"}, "weight = 1.5"),
        ({"weight": math.nan}, "weight = nan"),
        ({"weight": -math.inf}, "weight = -inf"),
        ({"dropout": -0.1}, "dropout = -0.1; allowed: 0 to 1"),
        ({"dropout": math.nan}, "dropout = nan"),
        ({"guided_share": 2.0}, "guided_share = 2.0"),
        ({"target": "mean"}, "target = 'mean'; allowed: 'ema', 'online', 'frozen'"),
        ({"start_step": -1}, "start_step = -1"),
        ({"start_step": 0.5}, "start_step = 0.5"),
        ({"interval": (0.5, 0.2)}, r"interval = \(0.5, 0.2\)"),
        ({"interval": (0.0, math.nan)}, "interval = "),
        ({"scale_range": (2.0, 1.0)}, "scale_range = "),
        ({"scale_range": (1.0, math.inf)}, "scale_range = "),
        ({"unconditional": "none"}, "unconditional = 'none'"),
        ({"unconditional": "posterior"}, "classifier = None"),
        ({"classifier": nn.Identity()}, "classifier = 'Identity'"),
        ({"frozen": nn.Identity()}, "frozen = 'Identity'; allowed: a network if and only if target='frozen'"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message) as error:
        ModelGuidanceLoss(**options)
    assert "\n" not in str(error.value)


def test_frozen_teachers_and_scale_ranges_take_any_weight():
    frozen = NetworkDenoiser(Watch(3), FlowPath(), 3)
    x0, c = batch()
    assert ModelGuidanceLoss(2.0, target="frozen", frozen=frozen)(frozen, x0, c, context(frozen)).shape == (400,)
    assert ModelGuidanceLoss(2.0, scale_range=(1.0, 8.0)).weight == 2.0
    assert scale_from_mg_weight(0.5) == 2.0


def test_other_refusals():
    plain, aware = (NetworkDenoiser(Watch(3), FlowPath(), 3, scale_aware=a) for a in (False, True))
    x0, c = batch()
    for model, loss in ((plain, ModelGuidanceLoss(scale_range=(1.0, 2.0))), (aware, ModelGuidanceLoss())):
        with pytest.raises(ValueError, match=r"scale_range = .*; allowed: .*model.scale_aware"):
            loss(model, x0, c, context(model))
    alien = ModelGuidanceLoss(target="frozen", frozen=NetworkDenoiser(Watch(3), FlowPath(), 3, "eps"))
    with pytest.raises(ValueError, match=r"frozen = \('eps', .*\); allowed: \('velocity', .*\), as the model"):
        alien(plain, x0, c, context(plain))
    with pytest.raises(ValueError, match="c = None; allowed: one condition"):
        ModelGuidanceLoss()(plain, x0, None, context(plain))
    with pytest.raises(ValueError, match=r"model.scale_aware = False"):
        FixedScale(plain, 1.0)
    with pytest.raises(ValueError, match="scale = nan"):
        FixedScale(aware, math.nan)
    for bad in ({"value": -0.1}, {"limit": 1.0}, {"value": 0.8, "limit": 0.7}):
        with pytest.raises(ValueError, match="allowed: 0 <= value <= limit < 1"):
            AutoWeight(**bad)
    with pytest.raises(ValueError, match="error = inf"):
        AutoWeight().update(math.inf)
    contrastive = ModelGuidanceLoss(0.7, unconditional="contrastive")
    with pytest.raises(ValueError, match=r"weight = 0.7; allowed: below 0.66"):
        contrastive(plain, x0, c, context(plain))


def test_a_uniform_direction_keeps_float64():
    "The mean over all classes is not rounded to float32 on the way."
    teacher = mlp_denoiser(2, FlowPath(), num_classes=3, width=8, depth=1).double()
    for weight in teacher.parameters():
        nn.init.normal_(weight, std=0.3)
    x, t, c = torch.randn(5, 2, dtype=torch.float64), torch.rand(5, dtype=torch.float64), torch.arange(5) % 3
    direction = _guidance_direction(teacher, x, t, c, "uniform")
    outputs = [teacher.output(x, t, torch.full((5,), k)).detach() for k in range(3)]
    wanted = torch.stack(outputs)[c, torch.arange(5)] - torch.stack(outputs).mean(0)
    assert direction.dtype == torch.float64
    assert_close(direction, wanted, atol=1e-12, rtol=1e-12)
