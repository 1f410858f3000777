"""Training times: every loss sees them, every loop draws them alike, and a weight is what its name says."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from guidance_nb._random import keyed_generator
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.cli._recipe import override, read_recipe
from guidance_nb.cli._run import _make_times
from guidance_nb.denoisers import NetworkDenoiser
from guidance_nb.engine._run import Engine
from guidance_nb.mixtures import gaussian_pair, sample_mixture
from guidance_nb.model_guidance import ModelGuidanceLoss
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.training import DenoisingLoss, LossContext, fit, train
from guidance_nb.training_times import LogNormalTimes, TrainingTimes

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()]
PREDICTIONS = ["velocity", "eps", "x0", "v", "edm"]
U = (torch.arange(4000) + 0.5) / 4000


class Zero(nn.Module):
    def forward(self, x, t, labels):
        return 0 * x


def blank(path, prediction="velocity"):
    return NetworkDenoiser(Zero(), path, 2, prediction)


def draw(n, generator):
    return sample_mixture(gaussian_pair(), n, generator)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_log_normal_times_have_their_mean_and_deviation(path):
    t, slope = LogNormalTimes(mean=-0.5, std=0.7).draw(U, path)
    level = path.noise_to_signal(t).log()
    assert_close(level.mean().item(), -0.5, atol=0.01, rtol=0)
    assert_close(level.std().item(), 0.7, atol=0.01, rtol=0)
    numeric = (t[2:] - t[:-2]) / (U[2:] - U[:-2])
    assert_close(slope[500:-500], numeric[499:-499], atol=1e-3, rtol=2e-2)


@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_shift_multiplies_the_noise_to_signal_ratio(path):
    law = LogNormalTimes(mean=-1.0, std=0.5)
    plain, shifted = (
        path.noise_to_signal(each.draw(U, path)[0]) for each in (law, LogNormalTimes(3.0, mean=-1.0, std=0.5))
    )
    assert_close(shifted, 3 * plain, atol=0, rtol=2e-3)
    flow = TrainingTimes(3.0).draw(U, FlowPath())[0]
    assert_close(flow, 3 * U / (1 + 2 * U), atol=1e-5, rtol=1e-4)  # as Stable Diffusion 3 writes it


def test_edm_is_trained_at_its_own_times_and_others_at_uniform_ones():
    for path in PATHS:
        context = LossContext(keyed_generator(0), 0, 1, None, model=blank(path))
        u = LossContext(keyed_generator(0), 0, 1, None).times(torch.zeros(5000, 1))
        t = context.times(torch.zeros(5000, 1))
        if isinstance(path, EDMPath):
            level = path.sigma(t).log()
            assert abs(level.mean() + 1.2) < 0.07 and abs(level.std() - 1.2) < 0.05
        else:
            assert torch.equal(t, u)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", PATHS, ids=str)
def test_a_weight_is_that_of_the_clean_image_whatever_is_predicted(path, prediction):
    "An error d of the clean image costs w d^2."
    model, t = blank(path, prediction), torch.linspace(0.05, 0.9, 9)
    snr = (path.alpha(t) / path.sigma(t)) ** 2
    x0, d = torch.randn(9, 3), 0.1
    eps = torch.randn(9, 3)
    moved = eps - d * snr.sqrt()[:, None]  # the noise that explains the same x with a clean image wrong by d
    error = (model.target(x0 + d, moved, t) - model.target(x0, eps, t)).square().mean(1)
    wanted = {"x0": 1 + 0 * snr, "eps": snr, "v": 1 + snr, "min_snr": snr.clamp(max=5), "p2": snr / (1 + snr)}
    for name, w in wanted.items():
        losses = TrainingTimes(weight=name).weigh(t, torch.ones(9), model) * error
        assert_close(losses, w * d**2, atol=1e-6, rtol=2e-3)


@pytest.mark.parametrize(
    "loss", [DenoisingLoss(), AlignedLoss(2.0), ModelGuidanceLoss()], ids=lambda loss: type(loss).__name__
)
def test_every_loss_sees_the_times_and_the_engine_draws_the_same(loss, tmp_path):
    seen = []

    class Watch(TrainingTimes):
        def draw(self, u, path):
            t, slope = super().draw(u, path)
            seen.append(t)
            return t, slope

    def losses(engine):
        model = mlp_denoiser(1, FlowPath(), 2, width=8, depth=1)
        options = {"times": Watch(4.0, "min_snr"), "progress": False, "engine": engine}
        return [state.loss for state in fit(model, loss, draw, 3, 64, **options)]

    plain = losses(None)
    assert len(seen) == 3 and torch.cat(seen).mean() > 0.6  # uniform ones have a mean of 0.5
    assert_close(losses(Engine(precision="fp32", cpu=True)), plain, atol=1e-6, rtol=1e-5)
    unweighted = mlp_denoiser(1, FlowPath(), 2, width=8, depth=1)
    first = next(fit(unweighted, loss, draw, 3, 64, times=TrainingTimes(4.0), progress=False)).loss
    assert not math.isclose(first, plain[0], rel_tol=1e-3)


def test_a_resumed_run_keeps_its_times(tmp_path):
    def run(times):
        model = mlp_denoiser(1, FlowPath(), 2, width=8, depth=1)
        engine = Engine(folder=tmp_path, precision="fp32", cpu=True)
        return train(
            model, DenoisingLoss(), draw, 4, 16, schedule="constant", times=times, engine=engine, progress=False
        )

    run(LogNormalTimes())
    with pytest.raises(ValueError, match=r"times = 'LogNormalTimes\(shift=1.0"):
        run(LogNormalTimes(2.0))


@pytest.mark.parametrize(
    ("make", "words"),
    {
        "a shift": (lambda: TrainingTimes(0.0), "shift = 0.0; allowed: a positive, finite number"),
        "a weight": (lambda: TrainingTimes(weight="snr"), "weight = 'snr'; allowed: 'x0'"),
        "a deviation": (lambda: LogNormalTimes(std=-1.0), "std = -1.0; allowed: a positive, finite number"),
        "no path": (lambda: TrainingTimes().draw(U, None), "path of the model = None; allowed: one, for times"),
        "a recipe": (
            lambda: _make_times(read_recipe("mnist-base", {"times": "0"})),
            "method.times = '0'; allowed: a list of 2 numbers",
        ),
        "a weighted classifier": (
            lambda: TrainingTimes(weight="p2").weigh(U, U, torch.nn.Identity()),
            "weight = 'p2'; allowed: None for a Identity, which is no NetworkDenoiser",
        ),
    }.values(),
)
def test_bad_input_is_one_line(make, words):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value).startswith(words)


def test_a_recipe_names_its_times():
    base = read_recipe("mnist-base")
    assert _make_times(base) is None
    assert _make_times(override(base, {"times": "0,1", "time_shift": 2.0})) == LogNormalTimes(2.0)
    assert _make_times(override(base, {"method.weight": "min_snr"})) == TrainingTimes(weight="min_snr")
