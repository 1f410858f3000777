"The aligned loss and its minimisers, restated without the notebook's code."

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from guidance_nb.aligned_loss import AlignedLoss, scale_from_aligned
from guidance_nb.denoisers import PREDICTIONS, NetworkDenoiser, count_nfe
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.training import DenoisingLoss, LossContext, train

PATHS = [FlowPath(), VPPath("cosine"), EDMPath()]


def context(seed=0):
    return LossContext(torch.Generator().manual_seed(seed), 0, 1, None)


def network(path, prediction="velocity", classes=3):
    model = mlp_denoiser(2, path, num_classes=classes, prediction=prediction, width=16, depth=1)
    with torch.random.fork_rng():
        torch.manual_seed(4)
        nn.init.normal_(model.net.read.weight)
    return model.double()


def batch(n=12, classes=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, dtype=torch.float64, generator=generator), torch.arange(n) % classes


class Rows(nn.Module):
    "One free vector per label, whatever the point and the time."

    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, x, time, labels):
        return self.rows[labels]


def cell(rows):
    "A single cell of the tabular problem; it predicts x0, so its exact targets are means of the data."
    return NetworkDenoiser(Rows(rows), FlowPath(), len(rows) - 1, "x0")


def gradient_descent(loss, rows, x0, c, lr, steps):
    model = cell(rows.clone())
    for _ in range(steps):
        (slope,) = torch.autograd.grad(loss(model, x0, c, context()).mean(), model.net.rows)
        with torch.no_grad():
            model.net.rows -= lr * slope
    return model.net.rows.detach()


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=["flow", "cosine", "edm"])
def test_formula_from_two_separate_passes(path, prediction):
    "Numpy arithmetic on conditional and unconditional outputs evaluated one after the other."
    model, (x0, c), w, a = network(path, prediction), batch(), 2.5, 0.3
    same = context()
    t, eps = same.times(x0), same.noise(x0)
    x = path.interpolate(x0, eps, t)
    e_c, e_u, y = (v.detach().numpy() for v in (model.output(x, t, c), model.output(x, t), model.target(x0, eps, t)))
    guided = w * e_c + (1 - w) * e_u
    plain = ((y - guided) ** 2).mean(1)
    with torch.no_grad():
        assert_close(AlignedLoss(w)(model, x0, c, context()).numpy(), plain, rtol=1e-10, atol=1e-10)
        anchored = plain + a * ((y - e_u) ** 2).mean(1)
        assert_close(AlignedLoss(w, a)(model, x0, c, context()).numpy(), anchored, rtol=1e-10, atol=1e-10)


def test_images_and_scale_one():
    "Any shape after the batch; at w = 1 the plain loss without dropout, in values and in gradients."

    class Picture(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.tensor([0.3, -0.2, 0.9]))

        def forward(self, x, time, labels):
            return 0.5 * x + self.shift[labels][:, None, None, None]

    model, x0, c = NetworkDenoiser(Picture(), FlowPath(), 2), torch.randn(6, 3, 4, 4), torch.arange(6) % 2
    aligned, plain = AlignedLoss(1.0)(model, x0, c, context()), DenoisingLoss(0.0)(model, x0, c, context())
    assert aligned.shape == (6,)
    assert_close(aligned, plain)
    slopes = [torch.autograd.grad(loss.mean(), model.net.shift)[0] for loss in (aligned, plain)]
    assert_close(*slopes)
    assert slopes[0][2] == 0


@pytest.mark.parametrize("anchor", [0.0, 0.7])
def test_both_branches_learn_from_twice_the_rows_in_one_pass(anchor):
    "The gradients are -2 w r and -2 (1 - w) r (plus the anchor's), by hand."
    w, (x0, c) = 3.0, batch(8, 2)
    rows = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    model = cell(rows)
    calls = []
    model.net.register_forward_hook(lambda *args: calls.append(len(args[1][0])))
    with count_nfe() as counted:
        loss = AlignedLoss(w, anchor)(model, x0, c, context()).mean()
    assert counted.total == 16 and calls == [16]
    loss.backward()
    residual = x0 - (w * rows[c] + (1 - w) * rows[2])
    by_hand = [(-2 * w * residual[c == k]).sum(0) for k in range(2)]
    by_hand.append((-2 * (1 - w) * residual - 2 * anchor * (x0 - rows[2])).sum(0))
    assert_close(model.net.rows.grad, torch.stack(by_hand).detach() / x0.numel())


@pytest.mark.parametrize("classes, w", [(2, 0.5), (4, 3.0), (7, 2.0), (4, -1.0)])
def test_zero_start_selects_the_closed_form(classes, w):
    "e_u = (1 - w) sum e_c* / (w^2 + C (1 - w)^2), and any s gives (s/w) e_c* + (1 - s/w) e_u."
    x0, c = batch(3 * classes, classes)
    x0 = x0 + c[:, None]
    rows = gradient_descent(AlignedLoss(w), torch.zeros(classes + 1, 2).double(), x0, c, 1 / (w**2 + (1 - w) ** 2), 800)
    best = np.stack([x0[c == k].numpy().mean(0) for k in range(classes)])
    e_c, e_u = rows[:-1].numpy(), rows[-1].numpy()
    np.testing.assert_allclose(w * e_c + (1 - w) * e_u, best, atol=1e-12)
    np.testing.assert_allclose(e_u, (1 - w) * best.sum(0) / (w**2 + classes * (1 - w) ** 2), atol=1e-12)
    for s in (-1.0, 0.0, 1.0, 2 * w, 9.0):
        np.testing.assert_allclose(e_u + s * (e_c - e_u), s / w * best + (1 - s / w) * e_u, atol=1e-11)


def test_start_decides_away_from_the_matched_scale():
    "Minimum-norm least squares from a start: gradient flow converges to the solution nearest to where it began."
    w, (x0, c) = 2.0, batch(8, 2)
    best = torch.stack([x0[c == k].mean(0) for k in range(2)])
    system = torch.tensor([[w, 0, 1 - w], [0, w, 1 - w]], dtype=torch.float64)
    found = []
    for seed in (0, 1):
        start = torch.randn(3, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        rows = gradient_descent(AlignedLoss(w), start, x0, c, 0.2, 200)
        nearest = start + torch.linalg.pinv(system) @ (best - system @ start)
        assert_close(rows, nearest, rtol=0, atol=1e-12)
        found.append(rows)
    guided = lambda rows, s: rows[2] + s * (rows[:2] - rows[2])  # noqa: E731
    assert_close(guided(found[0], w), guided(found[1], w), rtol=0, atol=1e-12)
    assert (guided(found[0], 2 * w) - guided(found[1], 2 * w)).abs().max() > 0.1


@pytest.mark.parametrize("w, anchor", [(2.0, 1.0), (3.0, 0.5), (0.5, 2.0), (1.0, 0.25)])
def test_anchor_makes_sampling_at_s_guidance_at_s_over_w(w, anchor):
    "The joint minimiser by stacked least squares in numpy, and what sampling makes of it."
    c = torch.tensor([0] * 2 + [1] * 6 + [2] * 4)
    x0 = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) + 2 * c[:, None]
    one_hot = np.eye(3)[c.numpy()]
    ones = np.ones((12, 1))
    design = np.concatenate([np.hstack([w * one_hot, (1 - w) * ones]), anchor**0.5 * np.hstack([0 * one_hot, ones])])
    solved = np.linalg.lstsq(design, np.concatenate([x0.numpy(), anchor**0.5 * x0.numpy()]), rcond=None)[0]
    model = cell(torch.from_numpy(solved))
    (slope,) = torch.autograd.grad(AlignedLoss(w, anchor)(model, x0, c, context()).mean(), model.net.rows)
    assert slope.abs().max() < 1e-12
    best_u = x0.numpy().mean(0)
    best_c = np.stack([x0[c == k].numpy().mean(0) for k in range(3)])
    np.testing.assert_allclose(solved[3], best_u, atol=1e-12)
    for s in (1.0, w, 7.0):
        gamma = scale_from_aligned(s, w)
        np.testing.assert_allclose(
            solved[3] + s * (solved[:3] - solved[3]), best_u + gamma * (best_c - best_u), atol=1e-11
        )


def test_fine_tuning_starts_at_the_floor_plus_the_gap():
    "At the optimum of the plain loss the aligned loss is larger by (w - 1)^2 E |e_c* - e_u*|^2, exactly in one cell."
    c = torch.tensor([0] * 2 + [1] * 6 + [2] * 4)
    x0 = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) + c[:, None]
    best = torch.stack([x0[c == k].mean(0) for k in range(3)] + [x0.mean(0)])
    model = cell(best)
    floor = (x0 - best[c]).square().mean()
    for w in (1.0, 2.0, 5.0):
        excess = AlignedLoss(w)(model, x0, c, context()).mean() - floor
        assert_close(excess.detach(), (w - 1) ** 2 * (best[c] - best[3]).square().mean())


def test_trains_in_the_common_loop_and_repeats():
    x0, c = batch(64, 2)
    runs = [
        train(network(FlowPath(), classes=2).float(), AlignedLoss(2.0, 0.5), (x0.float(), c), 5, 16, progress=False)
        for _ in range(2)
    ]
    assert runs[0].loss == runs[1].loss and math.isfinite(runs[0].loss)


@pytest.mark.parametrize("scale", [0, 0.0, math.nan, math.inf, -math.inf, "2", None])
def test_refuses_scales(scale):
    with pytest.raises(ValueError, match=r"scale = .*; allowed: a finite number other than 0"):
        AlignedLoss(scale)


@pytest.mark.parametrize("anchor", [-1e-9, math.nan, math.inf, "1", None])
def test_refuses_anchors(anchor):
    with pytest.raises(ValueError, match=r"anchor = .*; allowed: a number, 0 or more"):
        AlignedLoss(2.0, anchor)


def test_refuses_missing_or_wrong_labels():
    model, (x0, c) = network(FlowPath()), batch()
    with pytest.raises(ValueError, match="c = None"):
        AlignedLoss()(model, x0, None, context())
    with pytest.raises(ValueError, match="c contains 3; allowed: 0 to 2"):
        AlignedLoss()(model, x0, c + 1, context())


def test_ablation_relation():
    "Models at w and w' with one null branch: sampled at s and s w'/w they agree."
    e_u, best = torch.randn(2, 5, 2, dtype=torch.float64)
    guided = lambda w, s: e_u + s * ((best - (1 - w) * e_u) / w - e_u)  # noqa: E731
    for w, other, s in ((2.0, 3.0, 5.0), (1.5, 4.0, 0.7)):
        assert scale_from_aligned(s, w) == pytest.approx(scale_from_aligned(s * other / w, other))
        assert_close(guided(w, s), guided(other, s * other / w))
