"The variants restated without the notebook's code, and against the guiders of diffusers."

import copy
import math

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, guiders
from diffusers.guiders import frequency_decoupled_guidance as their_fdg
from diffusers.guiders.adaptive_projected_guidance import MomentumBuffer
from diffusers.hooks.smoothed_energy_guidance_utils import _gaussian_blur_2d
from scipy.integrate import solve_ivp
from scipy.stats import beta
from torch.testing import assert_close

from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import Denoiser, NetworkDenoiser, OnPath, Prediction, count_nfe, record_nfe
from guidance_nb.guidance import (
    beta_schedule,
    cosine_schedule,
    exponential_schedule,
    interval_from_noise,
    interval_from_steps,
    linear_schedule,
    shift_prediction,
    tent_schedule,
)
from guidance_nb.guidance_variants import (
    AdaptiveProjectedGuidance,
    CFGPlusPlus,
    CFGZeroStar,
    DynamicThresholding,
    FrequencyDecoupledGuidance,
    MagnitudeAwareGuidance,
    RatioTable,
    RectifiedGuidance,
    RescaledGuidance,
    TangentialGuidance,
    _frequency_bands,
    _StepMemory,
    cfgpp_scales,
    estimate_ratios,
)
from guidance_nb.paths import EDMPath, FlowPath, VPPath, expand_time
from guidance_nb.power_tilt import PredictorCorrector
from guidance_nb.samplers import sample, sample_trajectory
from guidance_nb.trained_guidance import GuidedDistillationLoss
from guidance_nb.weak_models import Autoguidance

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()]
each_path = pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "cosine", "edm"])
FAMILY = [
    ClassifierFreeGuidance,
    RescaledGuidance,
    MagnitudeAwareGuidance,
    CFGZeroStar,
    TangentialGuidance,
    AdaptiveProjectedGuidance,
    FrequencyDecoupledGuidance,
    DynamicThresholding,
    RectifiedGuidance,
    CFGPlusPlus,
]
each_method = pytest.mark.parametrize("method", FAMILY, ids=lambda method: method.__name__)
# what is said of diffusers' defects is said of the versions in which they were found
known_version = pytest.mark.skipif(not diffusers.__version__.startswith("0.42."), reason="checked in diffusers 0.42")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Told(Denoiser):
    "Answers with given raw outputs of a network, decoded at every point."

    def __init__(self, y_c, y_u, path, prediction):
        super().__init__(path, 1)
        self.decode = NetworkDenoiser(torch.nn.Identity(), path, 1, prediction).decode
        self.outputs = y_c, y_u

    def forward(self, x, t, c=None):
        record_nfe(len(x))
        return self.decode(self.outputs[c is None][: len(x)], x, torch.as_tensor(t))

    def for_rows(self, rows):
        twin = copy.copy(self)
        twin.outputs = tuple(y[rows] for y in self.outputs)
        return twin


def told(prediction, path=PATHS[0], shape=(5, 3, 8, 8)):
    "A model that predicts the two outputs, these, a point and the class."
    y_c, y_u, x = draw(*shape), draw(*shape, seed=1), draw(*shape, seed=2)
    return Told(y_c, y_u, path, prediction), y_c, y_u, x, torch.zeros(shape[0], dtype=torch.long)


HALF = torch.tensor(0.5, dtype=torch.float64)


def theirs(guider, y_c, y_u, step=3):
    "What a guider of diffusers makes of two outputs."
    guider.set_state(step=step, num_inference_steps=10, timestep=torch.tensor(500))
    return guider.forward(y_c, y_u).pred


@pytest.mark.parametrize("prediction", ["eps", "v", "velocity", "x0"])
def test_diffusers_cfg(prediction):
    model, y_c, y_u, x, c = told(prediction)
    guided = theirs(guiders.ClassifierFreeGuidance(guidance_scale=3.5), y_c, y_u)
    assert_close(ClassifierFreeGuidance(model, 3.5).predict(x, HALF, c), model.decode(guided, x, HALF))


@pytest.mark.parametrize(("path", "prediction"), [(PATHS[0], "velocity"), (PATHS[1], "v"), (PATHS[2], "v")])
def test_diffusers_rescale(path, prediction):
    model, y_c, y_u, x, c = told(prediction, path)
    guided = theirs(guiders.ClassifierFreeGuidance(guidance_scale=7.5, guidance_rescale=0.7), y_c, y_u)
    assert_close(RescaledGuidance(model, 7.5).predict(x, HALF, c), model.decode(guided, x, HALF))


def test_diffusers_apg_is_the_papers_only_in_its_original_formulation():
    model, y_c, y_u, x, c = told("x0")
    options = {"eta": 0.3, "norm": 4.0}
    ours = AdaptiveProjectedGuidance(model, 3.0, **options).x0(x, HALF, c)
    asked = {"eta": 0.3, "adaptive_projected_guidance_rescale": 4.0}
    paper = guiders.AdaptiveProjectedGuidance(guidance_scale=2.0, use_original_formulation=True, **asked)
    assert_close(ours, theirs(paper, y_c, y_u))
    assert (theirs(guiders.AdaptiveProjectedGuidance(guidance_scale=3.0, **asked), y_c, y_u) - ours).abs().max() > 0.1
    asked = {"eta": 1.0, "adaptive_projected_guidance_rescale": 0.0}  # 0 is their "no cap": here the two forms agree
    ours = AdaptiveProjectedGuidance(model, 3.0, eta=1.0).x0(x, HALF, c)
    assert_close(theirs(guiders.AdaptiveProjectedGuidance(guidance_scale=3.0, **asked), y_c, y_u), ours)


def test_diffusers_apg_momentum():
    "Three steps with a memory."
    guider = guiders.AdaptiveProjectedGuidance(
        guidance_scale=2.0,
        adaptive_projected_guidance_momentum=-0.5,
        adaptive_projected_guidance_rescale=15.0,
        eta=0.0,
        use_original_formulation=True,
    )
    guider.momentum_buffer = MomentumBuffer(-0.5)
    model, *_, x, c = told("x0")
    ours = AdaptiveProjectedGuidance(model, 3.0, norm=15.0, momentum=-0.5)
    for step, t in enumerate((0.9, 0.6, 0.2)):
        model.outputs = draw(5, 3, 8, 8, seed=10 + step), draw(5, 3, 8, 8, seed=20 + step)
        assert_close(ours.x0(x, torch.tensor(t).double(), c), theirs(guider, *model.outputs, step=step))


def test_diffusers_zero_star():
    "Their first step is zeroed, ours at pure noise, where no network is asked."
    model, y_c, y_u, x, c = told("velocity")
    guider, ours = guiders.ClassifierFreeZeroStarGuidance(guidance_scale=4.0), CFGZeroStar(model, 4.0)
    # their factor is computed in float32
    assert_close(ours.velocity(x, HALF, c), theirs(guider, y_c, y_u), rtol=1e-5, atol=1e-5)
    one = torch.tensor(1.0, dtype=torch.float64)
    with count_nfe() as nfe:
        assert_close(ours.velocity(x, one, c), theirs(guider, y_c, y_u, step=0), rtol=0, atol=1e-12)
    assert nfe.total == 0


def test_diffusers_tangential():
    model, y_c, y_u, x, c = told("eps")
    guided = theirs(guiders.TangentialClassifierFreeGuidance(guidance_scale=4.0), y_c, y_u)
    assert_close(TangentialGuidance(model, 4.0).eps(x, HALF, c), guided, rtol=1e-4, atol=1e-4)  # theirs is float32


def test_dynamic_thresholding_leaves_small_samples_alone():
    "They are clipped at their quantile only where that is beyond the data's largest value, never stretched."
    x = draw(5, 3, 8, 8, seed=2)
    model, c = Told(0.1 * draw(5, 3, 8, 8), 0.1 * draw(5, 3, 8, 8, seed=1), PATHS[0], "x0"), torch.zeros(5).long()
    plain = ClassifierFreeGuidance(model, 2.0).predict(x, HALF, c)
    assert plain.x0.abs().max() < 1
    assert_close(DynamicThresholding(model, 2.0).predict(x, HALF, c), plain)


def test_scale_zero_is_rescaled_like_any_other():
    "It is not the unconditional model, whose velocity has another standard deviation."
    model, y_c, y_u, x, c = told("velocity")
    std, found = (lambda v: v.flatten(1).std(1)), RescaledGuidance(model, 0.0, phi=1.0).velocity(x, HALF, c)
    assert_close(std(found), std(y_c))
    assert ((std(y_u) - std(y_c)).abs() > 1e-3).all()


def test_diffusers_magnitude_aware():
    model, y_c, y_u, x, c = told("velocity", shape=(5, 16, 4))  # theirs takes packed latents only, see below
    guided = theirs(guiders.MagnitudeAwareGuidance(guidance_scale=10.0, alpha=0.7), y_c, y_u)
    assert_close(MagnitudeAwareGuidance(model, 10.0, damping=0.7).velocity(x, HALF, c), guided)
    guided = theirs(guiders.MagnitudeAwareGuidance(guidance_scale=10.0), y_c, y_u)  # by the same default
    assert_close(MagnitudeAwareGuidance(model, 10.0).velocity(x, HALF, c), guided)


def halve(n):
    "Binomial blur with mirrored ends, then the mean of neighbours, as an `[n // 2, n]` matrix."
    taps, blur = np.array([1, 4, 6, 4, 1]) / 16, np.zeros((n, n))
    for i in range(n):
        for j, tap in zip(range(i - 2, i + 3), taps):
            blur[i, abs(j) if j < n else 2 * (n - 1) - j] += tap
    mean = np.kron(np.eye(n // 2), np.array([[0.5, 0.5]]))
    return mean @ blur, blur


def double(n):
    "Linear interpolation to twice the size, then the same blur, as a `[2 n, n]` matrix."
    up = np.zeros((2 * n, n))
    for i in range(2 * n):
        place = min(max((i + 0.5) / 2 - 0.5, 0), n - 1)
        low = int(place)
        up[i, low] += 1 - (place - low)
        up[i, min(low + 1, n - 1)] += place - low
    return halve(2 * n)[1] @ up


def apply(matrix, images):
    matrix = torch.from_numpy(matrix)
    return matrix @ images @ matrix.T


def pyramid(images, levels):
    "The Laplacian pyramid of images of even sides, by matrices."
    out = []
    for _ in range(levels - 1):
        small = apply(halve(images.shape[-1])[0], images)
        out.append(images - apply(double(small.shape[-1]), small))
        images = small
    return [*out, images]


@pytest.fixture
def their_pyramid(monkeypatch):
    "Lets their frequency-decoupled guidance run on our matrices instead of kornia."
    monkeypatch.setattr(their_fdg, "_CAN_USE_KORNIA", True)
    monkeypatch.setattr(their_fdg, "build_laplacian_pyramid_func", pyramid)
    monkeypatch.setattr(their_fdg, "upsample_and_blur_func", lambda y: apply(double(y.shape[-1]), y))


def test_bands_are_a_laplacian_pyramid():
    image = draw(2, 3, 16, 16)
    for levels in (1, 2, 3):
        ours, matrix = _frequency_bands(image, levels), np.eye(16)
        for k, band in enumerate(pyramid(image, levels)):
            assert_close(ours[k], apply(matrix, band))
            matrix = matrix @ double(16 >> (k + 1))


@pytest.mark.parametrize("scales", [(10.0, 5.0), (3.0, 7.0, 2.0)])
def test_diffusers_frequency_decoupled(their_pyramid, scales):
    model, y_c, y_u, x, c = told("v", VPPath(), (2, 3, 16, 16))
    guided = theirs(guiders.FrequencyDecoupledGuidance(guidance_scales=list(scales)), y_c, y_u)
    shares = tuple((scale - 1) / (scales[0] - 1) for scale in scales)
    ours = FrequencyDecoupledGuidance(model, scales[0], shares).predict(x, HALF, c)
    assert_close(ours, model.decode(guided, x, HALF))


def test_diffusers_dynamic_thresholding():
    "Needs `sample_max_value` raised: by default it clips at 1 and rescales nothing."
    model, *_, x, c = told("x0")
    ours = DynamicThresholding(model, 3.0, quantile=0.9).x0(x, HALF, c)
    plain = ClassifierFreeGuidance(model, 3.0).x0(x, HALF, c)
    options = {"thresholding": True, "dynamic_thresholding_ratio": 0.9}
    assert_close(DDPMScheduler(**options, sample_max_value=100.0)._threshold_sample(plain), ours)
    assert_close(DDPMScheduler(**options)._threshold_sample(plain), plain.clamp(-1, 1))
    assert (ours - plain.clamp(-1, 1)).abs().max() > 0.1


@known_version
def test_known_defects_of_diffusers(their_pyramid):
    "Why the comparisons above use parts of their guiders; each line fails once it is repaired there."
    y_c, y_u = draw(1, 1, 8, 8), draw(1, 1, 8, 8, seed=1)
    with pytest.raises(AttributeError, match="is_conditional"):
        _ = guiders.TangentialClassifierFreeGuidance().is_conditional
    with pytest.raises(UnboundLocalError):  # a level of scale 1 counts as switched off
        theirs(guiders.FrequencyDecoupledGuidance(guidance_scales=[1.0, 5.0]), y_c, y_u)
    with pytest.raises(RuntimeError):  # and takes over the band of the level before
        theirs(guiders.FrequencyDecoupledGuidance(guidance_scales=[5.0, 1.0]), y_c, y_u)
    with pytest.raises(RuntimeError, match="2-tuple"):  # asks for a matrix norm over three dimensions
        theirs(guiders.MagnitudeAwareGuidance(), y_c, y_u)
    blurred = [_gaussian_blur_2d(draw(1, 16, 2), 3, sigma, 9999.9).std(1).max() for sigma in (1.0, 1e5)]
    assert blurred[0] < 1e-12 < blurred[1]  # the mean for a finite blur, a finite blur for an infinite one
    guider = guiders.SmoothedEnergyGuidance(seg_guidance_layers=[0])
    guider.set_state(step=1, num_inference_steps=10, timestep=torch.tensor(0))
    guider.prepare_models(torch.nn.Identity())
    assert guider._count_prepared == 0  # so that its hook is never registered


@each_path
@pytest.mark.parametrize("space", ["x0", "eps", "velocity"])
def test_a_shift_moves_one_coordinate(path, space):
    t, x0, eps, h = torch.linspace(0.05, 0.95, 7).double(), draw(7, 3), draw(7, 3, seed=1), draw(7, 3, seed=2)
    a, s, da, ds = (expand_time(f(t), x0) for f in (path.alpha, path.sigma, path.d_alpha, path.d_sigma))
    moved = shift_prediction(Prediction(x0, eps), h, path, t, space)
    assert_close(a * moved.x0 + s * moved.eps, a * x0 + s * eps, rtol=1e-9, atol=1e-9)
    weight = {"x0": (1, 0), "eps": (0, 1), "velocity": (da, ds)}[space]
    assert_close(weight[0] * (moved.x0 - x0) + weight[1] * (moved.eps - eps), h, rtol=1e-9, atol=1e-8)
    still = CFGZeroStar(Told(x0, x0, path, "v")).still(x0, t)
    assert_close(a * still.x0 + s * still.eps, x0, rtol=1e-9, atol=1e-9)
    assert_close(da * still.x0 + ds * still.eps, 0 * x0, rtol=0, atol=1e-8)


@each_path
@pytest.mark.parametrize("space", ["x0", "eps", "velocity", "score"])
@pytest.mark.parametrize("time", [0.0, 1.0])
def test_a_shift_is_finite_at_both_ends(path, space, time):
    "Where no noise or no signal is left, some coordinates would move without bound."
    t, x0, eps, h = torch.tensor(time).double(), draw(7, 3), draw(7, 3, seed=1), draw(7, 3, seed=2)
    moved = shift_prediction(Prediction(x0, eps), h, path, t, space)
    assert moved.x0.isfinite().all() and moved.eps.isfinite().all()


def test_intervals_of_edm2():
    "The published presets: steps of the 32-step grid, sigma_i = (80^(1/7) + i/31 (0.002^(1/7) - 80^(1/7)))^7."
    level = lambda i: (80 ** (1 / 7) + i / 31 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7  # noqa: E731
    for first, last in ((17, 22), (13, 19)):
        interval = interval_from_steps(EDMPath(), 32, first, last)
        assert_close([80 * t for t in interval], [level(last), level(first)])
        for path in PATHS:
            low, high = interval_from_noise(path, level(last), level(first))
            assert_close(
                [path.noise_to_signal(torch.tensor(t, dtype=torch.float64)).item() for t in (low, high)],
                [level(last), level(first)],
            )
    assert interval_from_noise(FlowPath(), 0.0) == (0.0, 1.0)
    assert interval_from_noise(EDMPath(), 1.0, 1000.0)[1] == 1.0  # above the path's largest


@pytest.mark.parametrize(
    ("sampler", "window"), [("euler", (3, 6)), ("heun", (3, 6)), ("heun", (0, 2)), ("heun", (8, 9))]
)
def test_rows_of_an_interval_in_a_real_run(sampler, window):
    "Published Heun guides both stages of a step; here each stage goes by its time. Inner windows cost the same."
    model, *_, c = told("velocity", shape=(1, 2))
    interval = interval_from_steps(FlowPath(), 10, *window, sampler)
    nfe = sample_trajectory(
        ClassifierFreeGuidance(model, 2.0, interval=interval), c, (2,), sampler, 10, progress=False
    ).nfe
    ours = published = 0
    for step in range(10):
        stages = [step] if sampler == "euler" or step == 9 else [step, step + 1]
        ours += sum(1 + (window[0] <= stage <= window[1]) for stage in stages)
        published += len(stages) * (1 + (window[0] <= step <= window[1]))
    assert nfe == ours
    assert (ours == published) == (sampler == "euler" or 0 < window[0] <= window[1] < 9)


def test_schedules():
    t = torch.linspace(0, 1, 101).double()
    mean = lambda f: torch.trapezoid(f(torch.linspace(0, 1, 20_001).double()), dx=1 / 20_000).item()  # noqa: E731
    for schedule in (linear_schedule(4.0), cosine_schedule(4.0), tent_schedule(4.0), beta_schedule(4.0, 2.0, 5.0)):
        assert_close(mean(schedule), 4.0, rtol=0, atol=1e-6)
    assert_close(beta_schedule(4.0, 2.0, 5.0)(t), 1 + 3 * torch.from_numpy(beta.pdf(t.numpy(), 2, 5)))
    assert_close(tent_schedule(4.0)(torch.tensor([0, 0.5, 1]).double()).tolist(), [1.0, 7.0, 1.0])
    assert (linear_schedule(4.0).__call__(t).diff() <= 0).all() and (cosine_schedule(4.0)(t).diff() <= 0).all()
    assert linear_schedule(4.0, floor=2.5)(t).min() == 2.5
    grown = exponential_schedule(1.5, 0.7)(torch.tensor([0.0, 1.0]).double())
    assert_close(grown.tolist(), [1.5 * math.exp(0.7), 1.5])


@each_method
def test_a_schedule_and_a_scale_per_channel(method):
    "Rows with times of their own get the scale of their time; a channel of scale 1 is guided like scale 1."
    model, *_, x, c = told("v")
    t, tent = torch.linspace(0.1, 0.9, 5).double(), tent_schedule(3.0)
    together = method(model, tent).predict(x, t, c)
    for i in range(5):
        model_i = Told(*(y[i : i + 1] for y in model.outputs), model.path, "v")
        alone = method(model_i, tent(t[i]).item()).predict(x[i : i + 1], t[i], c[:1])
        assert_close((together.x0[i], together.eps[i]), (alone.x0[0], alone.eps[0]))
    channels = torch.tensor([1.0, 4.0, 4.0])[None, :, None, None]
    mixed, whole = (method(model, scale).predict(x, HALF, c) for scale in (channels, 4.0))
    plain = model.predict(x, HALF, c).x0
    if method not in (RescaledGuidance, DynamicThresholding):  # which look at all channels after guiding
        assert_close(mixed.x0[:, 1:], whole.x0[:, 1:])
        if method.claims.consistent:
            assert_close(mixed.x0[:, 0], plain[:, 0], rtol=1e-6, atol=1e-6)


@each_path
def test_projections_by_hand(path):
    "Sample by sample in numpy: APG in clean data, TCFG by a singular value decomposition, CFG-Zero* in velocity."
    model, *_, x, c = told("eps", path, (4, 7))
    t, w = torch.linspace(0.2, 0.8, 4).double(), 3.5
    cond, plain = model.predict(x, t, c), model.predict(x, t)
    apg = AdaptiveProjectedGuidance(model, w, eta=0.25, norm=1.5).x0(x, t, c)
    tcfg = TangentialGuidance(model, w).eps(x, t, c)
    star = CFGZeroStar(model, w).velocity(x, t, c)
    for i in range(4):
        d, u = cond.x0[i].numpy(), plain.x0[i].numpy()
        g = (d - u) * min(1, 1.5 / np.linalg.norm(d - u))
        unit = d / np.linalg.norm(d)
        g = g - 0.75 * (g @ unit) * unit
        np.testing.assert_allclose(apg[i], d + (w - 1) * g, rtol=1e-7)
        e_c, e_u = cond.eps[i].numpy(), plain.eps[i].numpy()
        v1 = np.linalg.svd(np.stack([e_c, e_u]))[2][0]
        np.testing.assert_allclose(tcfg[i], w * e_c + (1 - w) * (e_u @ v1) * v1, rtol=1e-7, atol=1e-9)
        v_c, v_u = (pair.velocity(path, t)[i].numpy() for pair in (cond, plain))
        (s,), *_ = np.linalg.lstsq(v_u[:, None], v_c, rcond=None)
        np.testing.assert_allclose(star[i], s * v_u + w * (v_c - s * v_u), rtol=1e-5, atol=1e-5)


def test_step_memory():
    memory, like = _StepMemory(), torch.ones(2, 3, requires_grad=True)
    assert memory.recall(HALF, like).sum() == 0
    memory.keep(HALF, 2 * like)
    kept = memory.recall(HALF / 2, like)
    assert kept.sum() == 12 and not kept.requires_grad
    assert memory.recall(HALF, like).sum() == 0  # the same level sees what it saw
    assert memory.recall(HALF * 1.5, like).sum() == 0
    for other in (like[:1], like.double(), torch.ones(2, 3, 1)):
        assert memory.recall(HALF / 2, other).sum() == 0
    assert memory.recall(torch.tensor([0.2, 0.9]), like)[:, 0].tolist() == [2, 0]
    torch.nn.Sequential(memory).eval()
    assert memory.recall(HALF / 2, like).sum() == 0 and not memory.state_dict()


class Counted(Told):
    "A model whose answer depends on the point."

    def for_rows(self, rows):
        return self

    def forward(self, x, t, c=None):
        y = torch.tanh(x * (2.0 if c is None else 1.0) + (0.3 if c is None else -0.5))
        return self.decode(y, x, torch.as_tensor(t))


def test_momentum_does_not_see_other_samples():
    "One step, a rise in time, changed batches, interrupted runs: a run is the run of a new object."
    model, c = Counted(None, None, FlowPath(), "velocity"), torch.zeros(6, dtype=torch.long)
    make = lambda: AdaptiveProjectedGuidance(model, 3.0, norm=2.0, momentum=-0.6)  # noqa: E731
    used = make()
    for sampler in ("heun", "ddim", "dpmpp_2m", "euler_maruyama", "dopri5"):
        for steps in (2,) if sampler == "dopri5" else (1, 2, 5):
            options = {"sampler": sampler, "steps": steps, "progress": False, "dtype": torch.float64}
            once = sample(make(), c, (3,), **options)
            used.predict(draw(6, 3), torch.tensor(0.99), c)
            assert torch.equal(sample(used, c, (3,), **options), once)
            if sampler != "dopri5":
                assert_close(sample(used, c, (3,), batch_size=4, **options), once, rtol=0, atol=1e-12)
                halves = [sample(used, c[:3], (3,), start=i, **options) for i in (0, 3)]
                assert_close(torch.cat(halves), once, rtol=0, atol=1e-12)
    later = {"times": torch.tensor([0.7, 0.3, 0.0]), "init": draw(6, 3), "progress": False, "dtype": torch.float64}
    for mode in (True, False):
        used.train(mode).predict(draw(6, 3), torch.tensor(1.0), c)  # a higher noise level than that run begins with
        assert torch.equal(sample(used, c, (3,), "ddim", **later), sample(make(), c, (3,), "ddim", **later))


def test_momentum_under_heun():
    "Both evaluations at a time see the past of that time: Heun written out with one history per noise level."
    model, c = Counted(None, None, FlowPath(), "velocity"), torch.zeros(2, dtype=torch.long)
    run = sample_trajectory(
        AdaptiveProjectedGuidance(model, 2.5, eta=1.0, momentum=-0.5),
        c, (3,), "heun", 4, progress=False, dtype=torch.float64,
    )  # fmt: skip

    def field(x, t, past):
        cond, plain = model.predict(x, t, c), model.predict(x, t)
        total = cond.x0 - plain.x0 - 0.5 * past
        data = cond.x0 + 1.5 * total
        return (x - data) / t, total

    x, past = run.points[0], torch.zeros(2, 3).double()
    for t, s in zip(run.times[:-1], run.times[1:]):
        u, total = field(x, t, past)
        guess = x + (s - t) * u
        x = guess if s == 0 else x + (s - t) * (u + field(guess, s, total)[0]) / 2
        past = total
        assert_close(x, run.points[list(run.times).index(s)])


@each_path
def test_cfgpp_by_hand(path):
    "The published step: guided clean data, unconditional noise; and its schedule in plain guidance."
    model, c = Counted(None, None, path, "eps"), torch.zeros(3, dtype=torch.long)
    options = {"progress": False, "dtype": torch.float64}
    times = torch.linspace(0.98, 0, 8).double()  # a network's noise does not settle the pair where alpha is 0
    options["times"] = times
    run = sample_trajectory(CFGPlusPlus(model, 0.7), c, (2,), "ddim", **options)
    x = run.points[0]
    for i, (t, s) in enumerate(zip(times[:-1], times[1:])):
        e_c, e_u = model.eps(x, t, c), model.eps(x, t)
        data = (x - path.sigma(t) * (e_u + 0.7 * (e_c - e_u))) / path.alpha(t)
        assert_close(run.points[i + 1], path.alpha(s) * data + path.sigma(s) * e_u, rtol=1e-9, atol=1e-9)
        x = run.points[i + 1]
    scales = cfgpp_scales(path, times, 0.7)
    level = path.noise_to_signal(times)
    assert_close(scales, 0.7 * level[:-1] / (level[:-1] - level[1:]))
    plain = ClassifierFreeGuidance(model, lambda t: scales[(times[:-1] - t).abs().argmin()])
    assert_close(sample(plain, c, (2,), "ddim", **options), run.x, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler", "heun", "euler_maruyama", "dopri5"])
def test_cfgpp_is_refused_by_what_needs_more_than_a_step(sampler):
    "DPM-Solver++ asked for clean data alone and sampled plain guidance, bit for bit."
    model, c = Counted(None, None, VPPath("cosine"), "v"), torch.zeros(3, dtype=torch.long)
    steps = CFGPlusPlus(model, 0.7)
    for guided in (steps, OnPath(steps, FlowPath())):
        with pytest.raises(ValueError, match="allowed: 'ddim', 'ddpm'"):
            sample(guided, c, (2,), sampler, 5, progress=False)
        assert sample(guided, c, (2,), "ddpm", 5, progress=False).isfinite().all()
    for wrap in (ClassifierFreeGuidance, RescaledGuidance, lambda m: Autoguidance(model, m), lambda m: CFGPlusPlus(m)):
        with pytest.raises(ValueError, match="allowed: a model with a velocity"):
            wrap(steps)
    with pytest.raises(ValueError, match="allowed: a model with a velocity"):
        PredictorCorrector(steps)
    with pytest.raises(ValueError, match="allowed: a model with a velocity"):
        GuidedDistillationLoss(steps)


class Gaussians(Denoiser):
    "N(m, v) under the condition and N(n, w) without, on EDM's path, in one dimension."

    def __init__(self, m, v, n, w):
        super().__init__(EDMPath(), 1)
        self.laws = (m, v), (n, w)

    def forward(self, x, t, c=None):
        m, v = self.laws[c is None]
        s = expand_time(self.path.sigma(torch.as_tensor(t)), x)
        eps = s * (x - m) / (v + s**2)
        return Prediction(x - s * eps, eps)


@pytest.mark.parametrize("w", [0.3, 1.0, 3.0])
def test_recfg_on_gaussians(w):
    "Mean and width of ReCFG from its own linear ODE; its second-moment ratio forgets w, its mean ratio keeps the mean."
    model, gamma = Gaussians(1.0, 0.25, -0.2, w), 2.5
    ratio = lambda t, c: (w + EDMPath().sigma(t) ** 2) / (1.44 + 0.25 + EDMPath().sigma(t) ** 2)  # noqa: E731
    table = estimate_ratios(
        model, 1 + 0.5 * draw(40_000, 1), torch.zeros(40_000, dtype=torch.long), torch.tensor([0.002, 0.02]).double(),
        torch.Generator().manual_seed(3),
    )  # fmt: skip
    for t in (0.002, 0.02):
        t = torch.tensor(t).double()
        assert_close(table(t, torch.zeros(1, dtype=torch.long)).item(), ratio(t, None).item(), rtol=0.03, atol=0)

    def slope(s, y, rho):
        e_c = s * (y - [1, 0]) / (0.25 + s**2)
        return gamma * e_c + (1 - gamma) * (s * (y - [-0.2, 0]) / (1.69 + s**2) if rho else 0)

    c = torch.zeros(2000, dtype=torch.long)
    for rho, ratios in ((True, ratio), (False, 0.0)):
        x = sample_trajectory(
            RectifiedGuidance(model, gamma, ratios),
            c,
            (1,),
            "heun",
            100,
            progress=False,
            dtype=torch.float64,
        )
        start = x.points[0]
        end = solve_ivp(
            slope, (80, 0), [start.mean().item(), start.std().item()], args=(rho,), rtol=1e-9, atol=1e-11
        ).y[:, -1]
        assert_close([x.x.mean().item(), x.x.std().item()], end.tolist(), rtol=0, atol=5e-3)
        assert (abs(end[0] - 1) > 0.2 and end[1] > 0.05) if rho else (abs(end[0] - 1) < 1e-4 and end[1] < 1e-3)


def test_ratio_table():
    table = RatioTable(torch.tensor([0.2, 0.4, 0.8]), torch.arange(12.0).reshape(3, 2, 2))
    c = torch.tensor([0, 1, 1])
    assert_close(table(torch.tensor(0.3), c), torch.tensor([[2.0, 3], [4, 5], [4, 5]]))
    assert_close(table(torch.tensor([0.1, 0.4, 0.9]), c), torch.tensor([[0.0, 1], [6, 7], [10, 11]]))
    assert len(table.state_dict()) == 2


def test_zero_init_by_steps():
    "The official `i <= K` zeroes K + 1 steps, diffusers' `step < K` zeroes K; nothing is evaluated there."
    model, *_, c = told("velocity", shape=(1, 2))
    for official in (0, 1, 3):
        start = interval_from_steps(FlowPath(), 25, 0, official, "euler")[0]
        run = sample_trajectory(CFGZeroStar(model, 2.0, start), c, (2,), "euler", 25, progress=False)
        assert run.nfe == 2 * (25 - official - 1)
        still = (run.points.diff(dim=0).abs().flatten(1).amax(1) == 0).sum().item()
        assert still == official + 1
    never = sample_trajectory(CFGZeroStar(model, 2.0, math.inf), c, (2,), "euler", 25, progress=False)
    assert never.nfe == 50


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda m: RescaledGuidance(m, 2.0, phi=float("nan")), "phi = nan; allowed: 0 to 1"),
        (lambda m: MagnitudeAwareGuidance(m, 2.0, damping=-1.0), "damping = -1.0; allowed: a number, 0 or more"),
        (lambda m: CFGZeroStar(m, 2.0, zero_from=float("nan")), "zero_from = nan; allowed: a number above 0, or inf"),
        (lambda m: AdaptiveProjectedGuidance(m, 2.0, momentum=1.0), "momentum = 1.0; allowed: above -1, below 1"),
        (lambda m: AdaptiveProjectedGuidance(m, 2.0, eta=float("inf")), "eta = inf; allowed: a finite number"),
        (lambda m: DynamicThresholding(m, 2.0, limit=0.0), "limit = 0.0; allowed: a positive, finite number"),
        (lambda m: RectifiedGuidance(m, 2.0, ratios=float("nan")), "nan; allowed: a finite number"),
        (lambda m: _frequency_bands(torch.zeros(1, 1, 5, 5), 4), "both sides 12 or more"),
        (lambda m: interval_from_steps(FlowPath(), 10, 5, 4), "first, last = (5, 4); allowed"),
        (lambda m: interval_from_steps(FlowPath(), 10, -4, -1), "first, last = (-4, -1); allowed"),
        (lambda m: interval_from_noise(FlowPath(), -1.0), "low, high = (-1.0, inf); allowed"),
        (lambda m: ClassifierFreeGuidance(m, beta_schedule(2.0, b=math.nan)).scale_at(HALF, HALF), "scale = "),
        (lambda m: ClassifierFreeGuidance(Denoiser(FlowPath(), 0)), "model.num_classes = 0; allowed"),
    ],
)
def test_bad_input(make, says):
    with pytest.raises(ValueError) as error:
        make(told("eps")[0])
    assert says in str(error.value) and "\n" not in str(error.value)
