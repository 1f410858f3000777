"Trained guidance restated without the notebook's code: targets by hand, tabular fixed points, rows, runs, refusals."

import math
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from guidance_nb._random import keyed_generator
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import Denoiser, NetworkDenoiser, OnPath, Prediction, count_nfe
from guidance_nb.engine._run import Engine
from guidance_nb.model_guidance import FixedScale, ModelGuidanceLoss
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath, expand_time
from guidance_nb.trained_guidance import (
    GuidanceFreeTrainingLoss,
    GuidedDistillationLoss,
    MeanFlowGuidanceLoss,
    _branch_outputs,
    _draw_scales,
    _Noisy,
)
from guidance_nb.training import DenoisingLoss, LossContext, fit, train

NULL = 3


class Watch(nn.Module):
    "Labels, modes and gradient modes of every call; the answer depends on all inputs."

    def __init__(self, classes=NULL):
        super().__init__()
        self.read, self.embed, self.calls = nn.Linear(2, 2), nn.Embedding(classes + 1, 2), []

    def forward(self, x, time, labels, scale=None):
        self.calls.append((len(x), labels.tolist(), self.training, torch.is_grad_enabled(), scale))
        h = (self.read(x) + self.embed(labels)).tanh() * (1 + time[:, None])
        return h if scale is None else h * (1 + scale[:, None]).sqrt()


class Rows(nn.Module):
    "One free vector per label, for any (x, t)."

    def __init__(self, y):
        super().__init__()
        self.y = nn.Parameter(torch.as_tensor(y).clone())

    def forward(self, x, time, labels):
        return self.y[labels]


class Pairs(LossContext):
    "Noise in opposite pairs, and the last third of the batch dropped."

    def noise(self, x):
        half = torch.randn(len(x) // 2, *x.shape[1:], generator=self.generator).to(x)
        return torch.stack([half, -half], 1).flatten(0, 1)

    def drop(self, x, probability):
        return torch.arange(len(x)) >= 2 * len(x) // 3


def context(step=0, ema=None, kind=LossContext):
    return kind(keyed_generator(11, step), step, 100, ema)


def watch(path=FlowPath(), prediction="velocity", **options):
    return NetworkDenoiser(Watch(), path, NULL, prediction, **options)


def batch(n=400):
    g = torch.Generator().manual_seed(0)
    return torch.randn(n, 2, generator=g), torch.randint(0, NULL, (n,), generator=g)


def gradients(value, model):
    return torch.autograd.grad(value.mean(), list(model.parameters()))


KINDS = [
    (VPPath(), "eps", lambda x0, e, t: e),
    (FlowPath(), "velocity", lambda x0, e, t: e - x0),
    (EDMPath(), "x0", lambda x0, e, t: x0),
    (VPPath("cosine"), "v", lambda x0, e, t: (np.pi * t / 2).cos() * e - (np.pi * t / 2).sin() * x0),
]
each_kind = pytest.mark.parametrize("path, prediction, plain", KINDS, ids=[kind[1] for kind in KINDS])


def drawn(path, x0, dropout):
    "Times, noise, dropped rows and noisy data, as the losses must have drawn them; and what comes next."
    replay = context()
    t, e, dropped = replay.times(x0), replay.noise(x0), replay.drop(x0, dropout)
    return t, e, dropped, path.alpha(t)[:, None] * x0 + path.sigma(t)[:, None] * e, replay


@each_kind
@pytest.mark.parametrize("omega, kappa", [(1.0, 0.5), (2.5, 0.0), (1.3, -0.4), (0.6, 0.4)])
def test_meanflow_target_by_hand(path, prediction, plain, omega, kappa):
    model, (x0, c) = watch(path, prediction), batch()
    t, e, dropped, x, _ = drawn(path, x0, 0.2)
    net, null = model.net, torch.full_like(c, NULL)
    inside = (~dropped & (t >= 0.1) & (t <= 0.6))[:, None]
    y = plain(x0, e, t[:, None])
    guided = omega * y + (1 - omega - kappa) * net(x, t, null).detach() + kappa * net(x, t, c).detach()
    expected = (net(x, t, torch.where(dropped, null, c)) - torch.where(inside, guided, y)).square().mean(1)
    actual = MeanFlowGuidanceLoss(omega, kappa, (0.1, 0.6), 0.2)(model, x0, c, context())
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert_close(gradients(actual, model), gradients(expected, model), rtol=1e-3, atol=1e-4)


@each_kind
@pytest.mark.parametrize("beta", [0.2, 0.8, 1.6])
def test_gft_by_hand(path, prediction, plain, beta):
    model, (x0, c) = watch(path, prediction), batch()
    t, e, dropped, x, _ = drawn(path, x0, 0.2)
    null = torch.full_like(c, NULL)
    e_c, e_u = model.net(x, t, torch.where(dropped, null, c)), model.net(x, t, null).detach()
    mixture = torch.where(dropped[:, None], e_c, beta * e_c + (1 - beta) * e_u)
    expected = (plain(x0, e, t[:, None]) - mixture).square().mean(1)
    actual = GuidanceFreeTrainingLoss(1 / beta, 0.2)(model, x0, c, context())
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert_close(gradients(actual, model), gradients(expected, model), rtol=1e-3, atol=1e-4)


def test_scale_aware_gft_by_hand():
    model, (x0, c) = watch(scale_aware=True), batch(4000)
    t, e, dropped, x, replay = drawn(FlowPath(), x0, 0.1)
    beta = 0.2 + 0.6 * replay.times(x0)
    actual = GuidanceFreeTrainingLoss(scale_range=(1.25, 5.0))(model, x0, c, context())
    (n, labels, *_, fed), (asked, nulls, *modes, at) = model.net.calls
    assert n == 4000 and asked == int((~dropped).sum()) and set(nulls) == {NULL} and modes == [False, False]
    assert (at == 0).all() and (fed[dropped] == 0).all() and set(torch.tensor(labels)[dropped].tolist()) == {NULL}
    assert_close(fed[~dropped], 1 / beta[~dropped])
    null = torch.full_like(c, NULL)
    e_u = model.net(x, t, null, torch.zeros(n)).detach()
    e_c = model.net(x, t, torch.tensor(labels), fed)
    mixture = torch.where(dropped[:, None], e_c, beta[:, None] * e_c + (1 - beta[:, None]) * e_u)
    expected = (e - x0 - mixture).square().mean(1)
    assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert_close(gradients(actual, model), gradients(expected, model), rtol=1e-3, atol=1e-4)
    uniform = (1 / fed[~dropped] - 0.2) / 0.6  # beta is uniform, not the scale
    assert uniform.min() > -1e-5 and uniform.max() < 1 + 1e-5
    assert (uniform.sort().values - torch.linspace(0, 1, len(uniform))).abs().max() < 0.04  # Kolmogorov-Smirnov


def test_scales_are_uniform_for_students():
    s = _draw_scales((1.0, 5.0), torch.zeros(4000, 2), context())
    assert ((s - 1) / 4).sort().values.sub(torch.linspace(0, 1, 4000)).abs().max() < 0.04


class Twice(Denoiser):
    "A guidance of its own: x0 shifted by the scale, and nothing else."

    def __init__(self, model, scale):
        super().__init__(model.path, model.num_classes)
        self.model, self.scale = model, scale

    def forward(self, x, t, c=None):
        pair = self.model.predict(x, t, c)
        alpha, sigma = (expand_time(f(t) * self.scale, x) for f in (self.path.alpha, self.path.sigma))
        return Prediction(pair.x0 + sigma, pair.eps - alpha)

    def for_rows(self, rows):
        return Twice(self.model, self.scale[rows])


@each_kind
@pytest.mark.parametrize("guidance", [ClassifierFreeGuidance, ClassifierFreeGuidance, Twice])
def test_distillation_by_hand(path, prediction, plain, guidance):
    "The teacher predicts velocities whatever the student predicts."
    student, teacher, (x0, c) = watch(path, prediction, scale_aware=True), watch(path).double(), batch()
    student, x0 = student.double(), x0.double()
    t, _, dropped, x, replay = drawn(path, x0, 0.2)
    s = (1 + 3 * replay.times(x0))[:, None]
    one, none = teacher.predict(x, t, c), teacher.predict(x, t)
    shift = path.sigma(t)[:, None], -path.alpha(t)[:, None]
    if guidance is Twice:
        guided = [a + s * d for a, d in zip(one, shift)]
    else:
        guided = [s * a + (1 - s) * b for a, b in zip(one, none)]
    x0_hat, e_hat = (torch.where(dropped[:, None], b, a) for a, b in zip(guided, none))
    fed = torch.where(dropped, 0.0, s[:, 0])
    y = student.net(x, t, c.masked_fill(dropped, NULL), fed)
    expected = (y - plain(x0_hat, e_hat, t[:, None]).detach()).square().mean(1)
    loss = GuidedDistillationLoss(teacher, (1.0, 4.0), 0.2, guidance)
    actual = loss(student, x0, c, context())
    assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert_close(gradients(actual, student), gradients(expected, student), rtol=1e-6, atol=1e-6)
    assert all(p.grad is None for p in teacher.parameters())


def test_distillation_from_any_guided_denoiser():
    "A fixed teacher keeps its own scale, interval and path wrapper, and is asked in evaluation mode without gradients."
    student, plain, (x0, c) = watch(), watch(VPPath(), "eps").train(), batch()
    teacher = OnPath(ClassifierFreeGuidance(plain, 3.0, interval=(0.2, 0.6)), FlowPath()).train()
    t, _, dropped, x, _ = drawn(FlowPath(), x0, 0.1)
    with torch.no_grad():
        u = teacher.velocity(x, t, c)
        u = torch.where(dropped[:, None], teacher.velocity(x, t), u)
    plain.net.calls.clear()
    actual = GuidedDistillationLoss(teacher)(student, x0, c, context())
    assert_close(actual, (student.net(x, t, c.masked_fill(dropped, NULL)) - u).square().mean(1), rtol=1e-4, atol=1e-5)
    assert all(call[2:4] == (False, False) for call in plain.net.calls)
    assert plain.training and plain.net.training and student.training


def test_rows():
    "Exactly the rows that are needed, in evaluation mode and without gradient where no gradient belongs."
    x0, c = batch()
    t, _, dropped, _, _ = drawn(FlowPath(), x0, 0.1)
    kept, early = int((~dropped).sum()), int((~dropped & (t <= 0.5)).sum())
    teacher = watch()
    for loss, extra in (
        (MeanFlowGuidanceLoss(), 2 * kept),
        (MeanFlowGuidanceLoss(interval=(0.0, 0.5)), 2 * early),
        (MeanFlowGuidanceLoss(2.0, 0.0), kept),
        (MeanFlowGuidanceLoss(0.5, 0.5), kept),
        (MeanFlowGuidanceLoss(1.0, 0.0), 0),
        (GuidanceFreeTrainingLoss(2.0), kept),
        (GuidanceFreeTrainingLoss(1.0), 0),
        (GuidanceFreeTrainingLoss(2.0, dropout=1.0), 0),
        (GuidedDistillationLoss(ClassifierFreeGuidance(teacher, 2.0)), 2 * kept + 400 - kept),
        (GuidedDistillationLoss(ClassifierFreeGuidance(teacher, 2.0), dropout=0.0), 2 * 400),
        (GuidedDistillationLoss(teacher), 400),
    ):
        model = watch().train()
        with count_nfe() as nfe:
            loss(model, x0, c, context())
        assert nfe.total == 400 + extra, loss
        assert model.training and model.net.calls[0][2:4] == (True, True)
        assert all(call[2:4] == (False, False) for call in model.net.calls[1:]) and len(model.net.calls) <= 2


def test_branch_outputs():
    model, (x, c) = watch(), batch(7)
    t = torch.rand(7)
    null = torch.full_like(c, NULL)
    assert_close(_branch_outputs(model, x, t, c), torch.stack([model.net(x, t, c), model.net(x, t, null)]).detach())
    assert_close(_branch_outputs(model, x, t, c, ["conditional"])[0], model.net(x, t, c).detach())


MEANS = np.random.default_rng(3).normal(size=(2, 3))
EXACT = -np.concatenate([MEANS, MEANS.mean(0, keepdims=True)])  # velocities E[eps - x0 | c], null last


def descend(loss, steps, start, lr=0.75):
    "Gradient descent with the real loss on a table with exact means; all tables on the way."
    model, found = NetworkDenoiser(Rows(start), FlowPath(), 2), []
    labels, x0 = torch.tensor([0, 0, 1, 1, 0, 1]), torch.tensor(MEANS)[[0, 0, 1, 1, 0, 1]]
    for step in range(steps):
        model.zero_grad()
        loss(model, x0, labels, context(step, model, Pairs)).sum().backward()
        with torch.no_grad():
            model.net.y -= lr * model.net.y.grad
        found.append(model.net.y.detach().numpy().copy())
    return found


def test_gradient_flow_of_each_loss():
    "Each table on the way, against the recursions written in NumPy: two rows per class, means over three entries."
    start, eta = np.random.default_rng(5).normal(size=(3, 3)), 0.5
    losses = {
        "gft": GuidanceFreeTrainingLoss(2.5),
        "flow": MeanFlowGuidanceLoss(1.5, 0.3),
        "distilled": GuidedDistillationLoss(ClassifierFreeGuidance(NetworkDenoiser(Rows(EXACT), FlowPath(), 2), 4.0)),
    }
    for name, loss in losses.items():
        found = descend(loss, 40, start, lr=3 * eta / 4)
        e = start.copy()
        for step in range(40):
            c, u = e[:2], e[2]
            slope = {
                "gft": 0.4 * (0.4 * c + 0.6 * u - EXACT[:2]),
                "flow": c - (1.5 * EXACT[:2] - 0.8 * u + 0.3 * c),
                "distilled": c - (4 * EXACT[:2] - 3 * EXACT[2]),
            }[name]
            e = np.concatenate([c - eta * slope, (u - eta * (u - EXACT[2]))[None]])
            np.testing.assert_allclose(found[step], e, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [0.5, 3.0])
@pytest.mark.parametrize(
    "make",
    [
        GuidanceFreeTrainingLoss,
        lambda s: MeanFlowGuidanceLoss(1.0, 1 - 1 / s),
        lambda s: MeanFlowGuidanceLoss(s, 0.0),
        lambda s: MeanFlowGuidanceLoss(0.7 * s, 0.3),
        lambda s: GuidedDistillationLoss(ClassifierFreeGuidance(NetworkDenoiser(Rows(EXACT), FlowPath(), 2), s)),
    ],
    ids=["gft", "bootstrap", "loud", "both", "distilled"],
)
def test_fixed_points(make, scale):
    expected = EXACT[2] + scale * (EXACT[:2] - EXACT[2])
    end = descend(make(scale), 400, np.zeros((3, 3)), lr=0.3)[-1]
    np.testing.assert_allclose(end, np.concatenate([expected, EXACT[2:]]), rtol=0, atol=1e-5)


@pytest.mark.parametrize("w", [0.3, 0.8])
def test_bridges_to_model_guidance(w):
    "MeanFlow at omega = 1 is online Model-guidance; GFT at beta = 1 - w is beta^2 times MeanFlow without bootstrap."
    model, (x0, c) = watch(VPPath(), "eps"), batch()
    one = MeanFlowGuidanceLoss(1.0, w, (0.0, 0.75))(model, x0, c, context())
    other = ModelGuidanceLoss(w, target="online")(model, x0, c, context())
    assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert_close(gradients(one, model), gradients(other, model), rtol=1e-3, atol=1e-5)
    beta, loud = 1 - w, MeanFlowGuidanceLoss(1 / (1 - w), 0.0, dropout=0.0)(model, x0, c, context())
    direct = GuidanceFreeTrainingLoss(1 / beta, dropout=0.0)(model, x0, c, context())
    assert_close(direct, beta**2 * loud, rtol=1e-4, atol=1e-5)
    assert_close(gradients(direct, model), gradients(beta**2 * loud, model), rtol=1e-3, atol=1e-5)


def test_beyond_one():
    "Past w = 1 the shared rest point attracts GFT and repels the bootstrap, and both losses refuse to go there."
    start, rest = EXACT.copy(), EXACT[2] - 4 * (EXACT[:2] - EXACT[2])  # w = 1.25
    direct, bootstrap = GuidanceFreeTrainingLoss(), MeanFlowGuidanceLoss()
    direct.scale, bootstrap.kappa = -4.0, 1.25
    np.testing.assert_allclose(descend(direct, 400, start)[-1][:2], rest, rtol=0, atol=1e-5)
    away = [np.abs(table[:2] - rest).max() for table in descend(bootstrap, 40, start, lr=0.3)]
    assert np.diff(away).min() > 0 and away[-1] > 10 * away[0]
    near = np.concatenate([rest + 1e-6, EXACT[2:]])
    assert np.abs(descend(bootstrap, 40, near, lr=0.3)[-1][:2] - rest).max() > 3e-6
    assert np.abs(descend(direct, 200, near)[-1][:2] - rest).max() < 1e-9
    small = descend(GuidanceFreeTrainingLoss(1e6), 100, start)[-1]
    np.testing.assert_allclose(small, start, rtol=0, atol=1e-3)  # as beta -> 0 nothing moves, and nothing diverges


@pytest.mark.parametrize("scale", [3.0])
def test_noise_costs_scale_squared(scale):
    "Relaxation time times stationary variance is close to scale^2 / 2 for every method that sees noisy targets."
    cells, eta, steps = 1000, 0.08, int(6 * scale**2 / 0.08)
    x0, products = -torch.ones(1, cells, dtype=torch.float64), []
    for loss in (
        GuidanceFreeTrainingLoss(scale, dropout=0.0),
        MeanFlowGuidanceLoss(1.0, 1 - 1 / scale, dropout=0.0),
    ):
        y = torch.zeros(2, cells, dtype=torch.float64)
        y[0] = scale
        model, kept, ahead = NetworkDenoiser(Rows(y), FlowPath(), 1), [], []
        for step in range(steps):
            model.zero_grad()
            loss(model, x0, torch.zeros(1, dtype=torch.long), context(step)).sum().backward()
            before = model.net.y.detach()[0].clone() - scale
            with torch.no_grad():
                model.net.y -= eta * cells / 2 * model.net.y.grad
            if step > steps // 2:
                after = model.net.y.detach()[0] - scale
                kept.append(before.square().mean().item())
                ahead.append((before * after).mean().item())
        rate = 1 - np.mean(ahead) / np.mean(kept)  # one minus the correlation of neighbouring steps
        products.append(np.mean(kept) / rate)
    np.testing.assert_allclose(products, scale**2 / 2, rtol=0.15)


def test_plain_limits():
    model, (x0, c) = watch(), batch()
    plain = DenoisingLoss(0.1)(model, x0, c, context())
    for loss in (
        GuidanceFreeTrainingLoss(1.0),
        MeanFlowGuidanceLoss(1.0, 0.0),
        MeanFlowGuidanceLoss(interval=(0.0, 0.0)),
    ):
        assert torch.equal(loss(model, x0, c, context()), plain)
    for loss in (GuidanceFreeTrainingLoss(dropout=1.0), MeanFlowGuidanceLoss(dropout=1.0)):
        assert torch.equal(loss(model, x0, c, context()), DenoisingLoss(1.0)(model, x0, c, context()))
    assert not torch.equal(GuidanceFreeTrainingLoss(1.1)(model, x0, c, context()), plain)


def mlp(seed=0, **options):
    model = mlp_denoiser(2, FlowPath(), 3, width=16, depth=1, seed=seed, **options)
    nn.init.normal_(model.net.read.weight, std=0.1, generator=keyed_generator(seed))
    return model


RUNS = {
    "flow": (lambda: mlp(), lambda: MeanFlowGuidanceLoss(1.2, 0.3)),
    "gft": (lambda: mlp(scale_aware=True), lambda: GuidanceFreeTrainingLoss(scale_range=(1.0, 4.0))),
    "distilled": (lambda: mlp(scale_aware=True), lambda: GuidedDistillationLoss(mlp(7), (1.0, 4.0))),
}


@pytest.mark.parametrize("name", RUNS)
def test_runs_shared_and_resumed(name, tmp_path):
    "Two passes by Accelerate see the batch of one; a run that stops and resumes ends at the same bits; losses pickle."
    make_model, make_loss = RUNS[name]
    x, c = batch(64)
    options = {"steps": 6, "batch_size": 16, "lr": 0.01, "ema": 0.9, "progress": False}
    once = train(make_model(), pickle.loads(pickle.dumps(make_loss())), (x, c), **options).model
    shared = train(
        make_model(),
        make_loss(),
        (x, c),
        engine=Engine(precision="fp32", gradient_accumulation_steps=2, cpu=True),
        **options,
    )
    for p, q in zip(once.parameters(), shared.model.parameters()):
        assert_close(p, q, rtol=1e-3, atol=1e-4)
    kept = Engine(folder=tmp_path, save_every=2, precision="fp32", cpu=True)
    run = fit(make_model(), make_loss(), (x, c), engine=kept, **options)
    for _ in range(4):
        next(run)
    run.close()
    resumed = train(make_model(), make_loss(), (x, c), engine=kept, **options).model
    assert all(torch.equal(p, q) for p, q in zip(once.parameters(), resumed.parameters()))


def test_another_loss_does_not_resume(tmp_path):
    x, c = batch(64)
    options = {"steps": 2, "batch_size": 16, "progress": False, "engine": Engine(folder=tmp_path, cpu=True)}
    next(fit(mlp(), MeanFlowGuidanceLoss(1.2, 0.3), (x, c), **options))
    run = fit(mlp(), MeanFlowGuidanceLoss(1.2, 0.4), (x, c), **options)
    with pytest.raises(ValueError, match="kappa"):
        next(run)


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.embed = nn.Conv2d(2, 2, 3, padding=1), nn.Embedding(NULL + 1, 2)

    def forward(self, x, time, labels, scale=None):
        strength = 1 if scale is None else 1 + scale[:, None, None, None]
        return self.conv(x) * strength + self.embed(labels)[:, :, None, None]


def test_images():
    "Any shape of sample; a scale belongs to its row."
    make = lambda aware: NetworkDenoiser(Convolution(), FlowPath(), NULL, scale_aware=aware)  # noqa: E731
    x0, c = torch.randn(6, 2, 4, 4), torch.arange(6) % 3
    teacher = make(False)
    for loss, aware in (
        (MeanFlowGuidanceLoss(1.3, 0.3), False),
        (GuidanceFreeTrainingLoss(scale_range=(1.0, 4.0)), True),
        (GuidedDistillationLoss(teacher, (1.0, 4.0)), True),
    ):
        value = loss(make(aware), x0, c, context())
        assert value.shape == (6,) and value.requires_grad
    t, none, s = torch.rand(6), torch.zeros(6, dtype=torch.bool), torch.linspace(1, 4, 6)
    answers = GuidedDistillationLoss(teacher, (1.0, 4.0)).answer(_Noisy(teacher, x0, t, c, none, s))
    for row in range(6):
        i = slice(row, row + 1)
        alone = ClassifierFreeGuidance(teacher, s[row].item()).predict(x0[i], t[i], c[i])
        assert_close(answers.x0[i], alone.x0, rtol=1e-4, atol=1e-5)


def test_learned_scale():
    "Two points: velocities are known by hand, so the scale of a trained network can be read off."
    model = mlp_denoiser(1, FlowPath(), 2, width=32, depth=2, scale_aware=True)

    def draw(n, g):
        c = torch.randint(0, 2, (n,), generator=g)
        return (2.0 * c - 1)[:, None] + 0.5 * torch.randn(n, 1, generator=g), c

    loss = GuidanceFreeTrainingLoss(scale_range=(1.0, 3.0), dropout=0.2)
    ema = train(model, loss, draw, 300, 256, lr=1e-2, ema=0.97, progress=False).ema
    t = 0.6
    x = torch.linspace(-1, 1, 41)[:, None]
    v = (1 - t) ** 2 * 0.25 + t**2
    mean = lambda m: m + (1 - t) * 0.25 / v * (x - (1 - t) * m)  # noqa: E731
    p = torch.sigmoid(2 * (1 - t) * x / v)
    uncond, cond = p * mean(1.0) + (1 - p) * mean(-1.0), mean(1.0)
    found = []
    for s in (1.0, 2.0, 2.8):
        with torch.no_grad():
            guided = FixedScale(ema, s).x0(x, torch.tensor(t), torch.ones(41, dtype=torch.long))
        found.append((((guided - uncond) * (cond - uncond)).sum() / (cond - uncond).square().sum()).item())
    assert found[:2] == pytest.approx([1, 2], abs=0.35) and found[2] > found[1] + 0.1  # it lags at the top: 1 / scale^2


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MeanFlowGuidanceLoss(kappa=1.0), "kappa = 1.0; allowed: a finite number below 1"),
        (lambda: MeanFlowGuidanceLoss(kappa=-math.inf), "kappa = -inf"),
        (lambda: MeanFlowGuidanceLoss(kappa=math.nan), "kappa = nan"),
        (lambda: MeanFlowGuidanceLoss(math.inf), "omega = inf; allowed: a finite number"),
        (lambda: MeanFlowGuidanceLoss("2"), "omega = '2'"),
        (lambda: MeanFlowGuidanceLoss(interval=(0.5, 0.2)), r"interval = \(0.5, 0.2\)"),
        (lambda: MeanFlowGuidanceLoss(dropout=1.1), "dropout = 1.1; allowed: 0 to 1"),
        (lambda: GuidanceFreeTrainingLoss(0.0), "scale = 0.0; allowed: a positive, finite number"),
        (lambda: GuidanceFreeTrainingLoss(-2.0), "scale = -2.0"),
        (lambda: GuidanceFreeTrainingLoss(math.inf), "scale = inf"),
        (lambda: GuidanceFreeTrainingLoss(None), "scale = None"),
        (lambda: GuidanceFreeTrainingLoss(scale_range=(0.0, 2.0)), r"scale_range = \(0.0, 2.0\); allowed: None, or"),
        (lambda: GuidanceFreeTrainingLoss(scale_range=(1.0, math.inf)), "scale_range = "),
        (lambda: GuidanceFreeTrainingLoss(scale_range=(3.0, 1.0)), "scale_range = "),
        (lambda: GuidanceFreeTrainingLoss(scale_range=(1.0,)), "scale_range = "),
        (lambda: GuidanceFreeTrainingLoss(scale_range=2.0), "scale_range = 2.0"),
        (lambda: GuidedDistillationLoss(nn.Identity()), "teacher is a Identity; allowed: a Denoiser"),
        (lambda: GuidedDistillationLoss(watch(), dropout=math.nan), "dropout = nan"),
        (lambda: GuidedDistillationLoss(watch(), guidance="cfg"), "guidance = 'cfg'; allowed: a function"),
    ],
)
def test_refusals(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "\n" not in str(error.value)


def test_networks_that_do_not_fit():
    plain, aware, (x0, c) = watch(), watch(scale_aware=True), batch()
    for model, loss, message in (
        (aware, MeanFlowGuidanceLoss(), "scale_range = None; allowed: a range"),
        (aware, GuidanceFreeTrainingLoss(), "scale_range = None; allowed: a range, for model.scale_aware = True"),
        (plain, GuidanceFreeTrainingLoss(scale_range=(1.0, 2.0)), "allowed: None, for model.scale_aware = False"),
        (aware, GuidedDistillationLoss(plain), "scale_range = None; allowed: a range"),
        (plain, GuidedDistillationLoss(plain, (1.0, 2.0)), "allowed: None, for model.scale_aware = False"),
        (plain, GuidedDistillationLoss(watch(VPPath())), "teacher.path = VPPath.*allowed: FlowPath"),
    ):
        with pytest.raises(ValueError, match=message):
            loss(model, x0, c, context())
    for loss in (MeanFlowGuidanceLoss(), GuidanceFreeTrainingLoss(), GuidedDistillationLoss(plain)):
        with pytest.raises(ValueError, match="c = None; allowed: one condition"):
            loss(plain, x0, None, context())
