"Inpainting, image-to-image and interpolation: what is exact is exact, and a batch changes nothing."

import pytest
import torch
from torch.testing import assert_close

from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import count_nfe
from guidance_nb.editing import _with_jumps, image_to_image, inpaint, slerp
from guidance_nb.guidance_variants import CFGPlusPlus
from guidance_nb.mixtures import ExactDenoiser, Mixture, gaussian_pair
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.samplers import SAMPLERS, sample, sample_trajectory, time_grid

QUIET = {"progress": False}
TILT = Mixture(torch.zeros(1, 2), torch.tensor([[[1.0, 0.9], [0.9, 1.0]]]), torch.tensor([0]))
FIRST = torch.tensor([True, False])


class Seen(ExactDenoiser):
    "An exact model that keeps the times and the first coordinates it was given."

    def forward(self, x, t, c=None):
        self.seen = [*getattr(self, "seen", []), (float(t), x[:, 0].clone())]
        return super().forward(x, t, c)


@pytest.mark.parametrize("path", [FlowPath(), VPPath(), EDMPath(20.0)], ids=repr)
def test_resampling_brings_the_mean_to_that_of_the_conditional(path):
    "The second of two unit Gaussians with correlation 0.9 has mean 0.9 where the first is 1."
    known = torch.tensor([[1.0, 0.0]]).expand(300, 2)
    model = ExactDenoiser(TILT, path)
    replaced, resampled = (inpaint(model, 300, known, FIRST, n, steps=16, seed=1, **QUIET)[:, 1] for n in (1, 16))
    assert abs(resampled.mean() - 0.9) < 0.1 < 0.2 < 0.9 - replaced.mean()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_with_every_sampler_the_known_part_stays_and_an_empty_mask_changes_nothing(sampler):
    model = ExactDenoiser(gaussian_pair(dim=2), FlowPath())
    c, known = torch.arange(6) % 2, torch.full((6, 2), 0.25)
    filled = inpaint(model, c, known, FIRST, 2, 2, sampler, 5, **QUIET)
    assert (filled[:, 0] == 0.25).all() and filled.isfinite().all()
    for size in (1, 4):
        parts = inpaint(model, c, known, FIRST, 2, 2, sampler, 5, batch_size=size, **QUIET)
        assert_close(parts, filled, rtol=0, atol=1e-5)
    if sampler in ("ddim", "euler", "heun", "dpmpp_2m"):  # those that draw no noise of their own
        free = inpaint(model, c, known, ~FIRST & FIRST, 1, 1, sampler, 5, **QUIET)
        assert_close(free, sample(model, c, (2,), sampler, times=time_grid(FlowPath(), 5), **QUIET))


def test_a_mask_for_each_sample_and_guidance_with_a_scale_for_each():
    model = mlp_denoiser(2, FlowPath(), num_classes=2, width=8, depth=1)
    guided = ClassifierFreeGuidance(model, torch.tensor([1.5, 2.0, 3.0]))
    mask, known = torch.tensor([[True, False], [False, True], [True, True]]), torch.randn(3, 2)
    with count_nfe() as nfe:
        x = inpaint(guided, torch.tensor([0, 1, 1]), known, mask, 3, steps=4, batch_size=2, **QUIET)
    assert torch.equal(x[mask], known[mask]) and nfe.total == 3 * 2 * 3 * 4


def test_the_model_is_given_a_noisy_copy_of_what_is_known():
    "At every time it has mean alpha y and variance sigma^2."
    model = Seen(gaussian_pair(dim=2), FlowPath())
    inpaint(model, 4000, torch.full((4000, 2), 2.0), FIRST, 1, steps=4, **QUIET)
    for t, known in model.seen:
        assert abs(known.mean() - 2 * (1 - t)) < 0.07 and abs(known.var() / t**2 - 1) < 0.1


def test_the_times_of_jumps():
    "Every stretch of two steps three times, the last one shorter."
    times = torch.tensor([3.0, 2.0, 1.0, 0.0])
    assert _with_jumps(times, 3, 2).tolist() == [3, 2, 1, 3, 2, 1, 3, 2, 1, 0, 1, 0, 1, 0]
    assert _with_jumps(times, 1, 5).tolist() == times.tolist()


def test_a_step_back_gives_the_distribution_of_its_time():
    "Data of one point: at every time the mean is alpha and the variance sigma^2, also after a jump back."
    point = ExactDenoiser(Mixture(torch.ones(1, 1), torch.zeros(1), torch.tensor([0])), FlowPath())
    run = {}
    known, nothing = torch.zeros(4000, 1), torch.tensor([False])
    inpaint(point, 4000, known, nothing, 2, 2, steps=4, callback=lambda k, t, x: run.update({k: (t, x)}), **QUIET)
    t, x = run[3]
    assert t == 1 and abs(x.mean()) < 0.06 and abs(x.var() - 1) < 0.08
    t, x = run[7 + 1]
    assert t == 0.5 and abs(x.mean() - 0.5) < 0.03 and abs(x.var() - 0.25) < 0.03


@pytest.mark.parametrize("tau", [0.2, 0.7])
def test_image_to_image_of_one_gaussian_is_the_closed_form(tau):
    model, v = ExactDenoiser(gaussian_pair(1.0, 0.05), VPPath("cosine")), 0.05
    x = image_to_image(model, torch.ones(2000).long(), torch.full((2000, 1), -1.0), tau, steps=64, **QUIET)
    t = torch.tensor(tau, dtype=torch.float64)
    alpha, sigma = model.path.alpha(t).item(), model.path.sigma(t).item()
    size = (alpha**2 * v + sigma**2) ** 0.5
    assert abs(x.mean() - (1 - 2 * alpha * v**0.5 / size)) < 0.02
    assert abs(x.var() / (sigma**2 * v / size**2) - 1) < 0.15


def test_image_to_image_at_full_strength_is_sampling_and_costs_what_is_left_of_the_steps():
    model, c = mlp_denoiser(2, FlowPath(), num_classes=2, width=8, depth=1), torch.tensor([0, 1])
    options = {"sampler": "ddim", "steps": 8, "seed": 3, **QUIET}
    assert_close(image_to_image(model, c, torch.zeros(2, 2), 1.0, **options), sample(model, c, (2,), **options))
    with count_nfe() as nfe:
        image_to_image(model, c, torch.zeros(2, 2), 0.5, **options)
    assert nfe.total == 2 * 4
    whole = image_to_image(model, c, torch.zeros(2, 2), 0.5, **options)
    second = image_to_image(model, c[1:], torch.zeros(1, 2), 0.5, start=1, **options)
    assert_close(second, whole[1:])


def test_slerp_keeps_ends_norms_and_planes():
    a, b = torch.randn(2, 5, 3, 4, dtype=torch.float64)
    a, b = (v / v.flatten(1).norm(dim=1).view(-1, 1, 1) for v in (a, b))
    weight = torch.tensor([0.0, 0.3, 0.5, 0.8, 1.0], dtype=torch.float64)
    x = slerp(a, b, weight)
    assert_close(x[0], a[0])
    assert_close(x[4], b[4])
    assert_close(x.flatten(1).norm(dim=1), torch.ones(5, dtype=torch.float64))
    angle = torch.linalg.vecdot(a.flatten(1), b.flatten(1)).acos()
    assert_close(torch.linalg.vecdot(a.flatten(1), x.flatten(1)).clamp(-1, 1).acos(), weight * angle)
    assert_close(slerp(a, a, 0.4), a, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"resamplings": 0}, "resamplings = 0; allowed: a whole number, 1 or more"),
        ({"jump": 0}, "jump = 0"),
        ({"sampler": "dopri5"}, "sampler = 'dopri5'; allowed: 'ddim'"),
        (
            {"mask": torch.ones(2)},
            "mask.dtype = torch.float32; allowed: bool",
        ),
        ({"known": torch.zeros(3, 2)}, "samples of known = 3; allowed: 1, as of c"),
        ({"c": 2}, "samples of known = 1; allowed: 2, as of c"),
        ({"known": torch.zeros(1, 2).byte()}, "known is torch.uint8; allowed: a floating-point tensor"),
        ({"model": CFGPlusPlus(ExactDenoiser(TILT, FlowPath()), 0.5), "sampler": "heun"}, "allowed: 'ddim', 'ddpm'"),
    ],
)
def test_bad_requests_to_inpaint(call, words):
    request = {"model": ExactDenoiser(TILT, FlowPath()), "c": 1, "known": torch.zeros(1, 2), "mask": FIRST} | call
    with pytest.raises(ValueError) as caught:
        inpaint(**request, **QUIET)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_other_bad_requests():
    model, x = ExactDenoiser(TILT, FlowPath()), torch.zeros(2, 2)
    for strength in (0, 1.5, float("nan")):
        with pytest.raises(ValueError, match=r"^strength = .*; allowed: [^\n]*$"):
            image_to_image(model, 2, x, strength)
    with pytest.raises(ValueError, match=r"^x is torch.uint8; allowed: a floating-point tensor"):
        image_to_image(model, 2, x.byte())  # its noise would wrap around


def test_a_step_of_ones_own_may_go_up_and_down_and_others_may_not():
    model, times = ExactDenoiser(TILT, FlowPath()), torch.tensor([1.0, 0.5, 0.8, 0.0])
    run = sample_trajectory(model, 2, (2,), lambda model, x, t, s, c, extra: x + s - t, times=times, **QUIET)
    assert_close(run.x, run.points[0] - 1)
    assert_close(run.times, times.double())
    with pytest.raises(ValueError, match="strictly falling; or strictly rising, for ddim, euler, heun, dopri5"):
        sample(model, 2, (2,), "heun", times=times, **QUIET)
