"Rising times and inversion: closed forms on Gaussians, and a round trip exact to rounding."

import math

import pytest
import torch
from torch.testing import assert_close

from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import count_nfe
from guidance_nb.guidance_variants import CFGPlusPlus
from guidance_nb.inversion import invert
from guidance_nb.mixtures import ExactDenoiser, Mixture, sample_mixture
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.samplers import sample, sample_trajectory, time_grid

F64 = {"progress": False, "dtype": torch.float64}
PATHS = [FlowPath(), VPPath("cosine"), EDMPath(20.0)]
ONE = Mixture(torch.tensor([[0.7]]), torch.tensor([0.2]), torch.tensor([0]))
X = 0.7 + math.sqrt(0.2) * torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]


def truth(path):
    "Noise of the points `X` of one Gaussian: every point keeps its number of standard deviations."
    one = torch.ones((), dtype=torch.float64)
    alpha, sigma = path.alpha(one), path.sigma(one)
    return alpha * 0.7 + (X - 0.7) * ((alpha**2 * 0.2 + sigma**2) / 0.2).sqrt()


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize(("sampler", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_rising_times_find_the_noise_with_the_order_of_the_sampler(path, sampler, order):
    errors = []
    for steps in (40, 80):
        rising = time_grid(path, steps).flip(0)
        up = sample(ExactDenoiser(ONE, path), 9, (1,), sampler, times=rising, init=X, **F64)
        assert_close(up, invert(ExactDenoiser(ONE, path), X, None, sampler, steps, **F64))
        errors.append((up - truth(path)).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15


@pytest.mark.parametrize("path", [*PATHS, VPPath()], ids=repr)
def test_dopri5_finds_the_noise_to_its_tolerance_and_asks_at_rising_times_alone(path):
    asked = []

    class Times(ExactDenoiser):
        def forward(self, x, t, c=None):
            asked.append(float(t))
            return super().forward(x, t, c)

    times = torch.tensor([0.1, 0.9], dtype=torch.float64)
    middle = sample_trajectory(Times(ONE, path), 9, (1,), "dopri5", times=times, init=X, **F64)
    assert 0.1 <= min(asked) and max(asked) <= 0.9 and middle.times.tolist() == times.tolist()
    up = sample(ExactDenoiser(ONE, path), 9, (1,), "dopri5", times=torch.tensor([0.0, 1.0]), init=X, **F64)
    assert_close(up, truth(path), rtol=1e-4, atol=1e-4 * path.sigma(torch.ones(())).item())


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("sampler", ["ddim", "heun"])
def test_a_fixed_point_makes_the_round_trip_exact(path, sampler):
    wide = Mixture(torch.tensor([[-1.0, -0.5], [1.0, 0.5]]), torch.tensor([0.3, 0.3]), torch.tensor([0, 1]))
    x, c = sample_mixture(wide, 8, torch.Generator().manual_seed(0))
    model, x, errors = ExactDenoiser(wide, path), x.double(), []
    for repeat in (0, 2, 25):
        noise = invert(model, x, c, sampler, 24, repeat, **F64)
        back = sample(model, c, (2,), sampler, 24, init=noise, **F64)
        errors.append((back - x).abs().max().item())
    assert errors[0] > 10 * errors[1] > 0 and errors[2] < 1e-8


def test_ddim_back_and_forth_shrinks_by_the_closed_form():
    model = ExactDenoiser(Mixture(torch.zeros(1, 1), torch.ones(1), torch.tensor([0])), VPPath("cosine"))
    up = invert(model, X, steps=7, **F64)
    assert_close(up, math.cos(math.pi / 14) ** 7 * X)
    assert_close(sample(model, 9, (1,), "ddim", 7, init=up, **F64), math.cos(math.pi / 14) ** 14 * X)


def test_batches_and_nfe():
    model, c = mlp_denoiser(2, FlowPath(), num_classes=2, width=8, depth=1), torch.arange(5) % 2
    guided, x = ClassifierFreeGuidance(model, 2.0), torch.randn(5, 2)
    for sampler, cost in (("ddim", 6 * 4), ("heun", 4 * (2 * 6 - 1))):
        with count_nfe() as nfe:
            whole = invert(guided, x, c, sampler, 6, 3, progress=False)
        assert nfe.total == 5 * 2 * cost
        assert_close(invert(guided, x, c, sampler, 6, 3, batch_size=2, progress=False), whole)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"init": None}, "init is NoneType, eta = 0.0; allowed: an init, and eta = 0, for rising times"),
        ({"sampler": "dpmpp_2m"}, "strictly rising, for ddim, euler, heun, dopri5"),
        ({"sampler": "ddpm"}, "strictly rising, for ddim"),
        ({"sampler": "ddim", "eta": 0.5}, "eta = 0.5; allowed: an init, and eta = 0, for rising times"),
        ({"times": torch.tensor([0.0, 0.5, 0.5])}, "strictly falling; or strictly rising"),
    ],
)
def test_bad_rising_requests(options, words):
    request = {"sampler": "heun", "times": torch.tensor([0.0, 1.0]), "init": X} | options
    with pytest.raises(ValueError) as caught:
        sample(ExactDenoiser(ONE, FlowPath()), 9, (1,), **request, **F64)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_requests_to_invert():
    model = ExactDenoiser(ONE, FlowPath())
    for call, words in (
        ({"sampler": "dopri5"}, "sampler = 'dopri5'; allowed: 'ddim'"),
        ({"iterations": -1}, "iterations"),
    ):
        with pytest.raises(ValueError, match=words):
            invert(model, X, **call)
    with pytest.raises(ValueError, match="sampler = 'heun'; allowed: 'ddim', 'ddpm'"):
        invert(CFGPlusPlus(model, 0.5), X, torch.zeros(9).long(), "heun")
