"Classifier-free guidance and its exact laws, restated without the notebook's code."

import math
from typing import get_args

import numpy as np
import pytest
import torch
from scipy.integrate import odeint, quad
from scipy.stats import norm
from torch.testing import assert_close

from guidance_nb._checks import Interval, check_scale
from guidance_nb.classifier_free_guidance import (
    ClassifierFreeGuidance,
    ode_variance,
    sde_variance,
    tilt_variance,
    two_class_law,
    two_class_map,
)
from guidance_nb.denoisers import Denoiser, NetworkDenoiser, OnPath, Prediction, count_nfe
from guidance_nb.guidance import predict_where
from guidance_nb.guidance_variants import RescaledGuidance
from guidance_nb.mixtures import ExactDenoiser, gaussian_pair
from guidance_nb.networks import MLP, mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.samplers import sample, sample_trajectory

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()]
each_path = pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "cosine", "edm"])


def network(path=PATHS[0], prediction="eps"):
    "A model with random weights in float64 whose every row differs between conditions."
    torch.manual_seed(3)
    net = MLP(2, num_classes=4, width=16, depth=1).double()
    torch.nn.init.normal_(net.read.weight)
    return NetworkDenoiser(net, path, 4, prediction)


def batch(n=12):
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0.04, 0.96, n, dtype=torch.float64), torch.arange(n) % 4


@each_path
@pytest.mark.parametrize("prediction", ["velocity", "eps", "x0", "v", "edm"])
def test_every_quantity_is_extrapolated(path, prediction):
    x, t, c = batch()
    model = network(path, prediction)
    guided = ClassifierFreeGuidance(model, -1.5)
    for name in ("x0", "eps", "score", "velocity"):
        u, v = getattr(model, name)(x, t), getattr(model, name)(x, t, c)
        assert_close(getattr(guided, name)(x, t, c), -1.5 * v + 2.5 * u, rtol=1e-9, atol=1e-9)
    pair = guided.predict(x, t, c)
    a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
    assert_close(a * pair.x0 + s * pair.eps, x, rtol=1e-9, atol=1e-9)


@each_path
def test_exact_field_of_two_classes(path):
    "Guided score in closed form: -(y - m) / V + (scale - 1) (2 m / V) sigmoid(-2 m y / V) in y = x / alpha."
    m, v, scale = 0.7, 0.3, 3.5
    t = torch.linspace(0.05, 0.95, 9, dtype=torch.float64)
    y = torch.linspace(-2, 2, 9, dtype=torch.float64)
    alpha, ratio = path.alpha(t), path.sigma(t) / path.alpha(t)
    total = v + ratio**2
    score_y = -(y - m) / total + (scale - 1) * 2 * m / total * torch.sigmoid(-2 * m * y / total)
    guided = ClassifierFreeGuidance(ExactDenoiser(gaussian_pair(m, v), path), scale)
    got = guided.score((alpha * y)[:, None], t, torch.ones(9, dtype=torch.long))[:, 0]
    assert_close(got, score_y / alpha, rtol=1e-6, atol=1e-8)  # m and v pass through float32


class Recorder(Denoiser):
    "Remembers which (row, condition) was asked for."

    def __init__(self):
        super().__init__(FlowPath(), 4)
        self.asked = []

    def forward(self, x, t, c=None):
        labels = [None] * len(x) if c is None else c.tolist()
        self.asked += list(zip(x[:, 0].tolist(), labels))
        value = x * 0 if c is None else x * 0 + 1.0 + c[:, None]
        return Prediction(value, value)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.25, 0.5), (0.5, 0.5), (0.6, 0.7)])
def test_only_needed_evaluations_are_made(scale, interval):
    x, c = torch.arange(5.0)[:, None], torch.tensor([0, 1, 2, 3, 0])
    t = torch.tensor([0.0, 0.25, 0.4, 0.5, 1.0])
    model = Recorder()
    pair = ClassifierFreeGuidance(model, scale, interval).predict(x, t, c)
    expected = []
    for i in range(5):
        inside = interval[0] <= t[i] <= interval[1]
        gamma = scale if inside else 1.0
        expected += [(float(i), c[i].item())] if gamma != 0 else []
        expected += [(float(i), None)] if gamma != 1 else []
        assert_close(pair.x0[i, 0].item(), gamma * (1.0 + c[i].item()))
    key = lambda asked: (asked[0], -1 if asked[1] is None else asked[1])  # noqa: E731
    assert sorted(model.asked, key=key) == sorted(expected, key=key)


def test_no_condition_is_never_guided():
    x, t, _ = batch()
    model = network()
    with count_nfe() as rows:
        pair = ClassifierFreeGuidance(model, 9.0).predict(x, t)
    assert rows.total == len(x)
    assert_close(pair, model.predict(x, t))


@pytest.mark.parametrize("batching", ["batched", "sequential"])
def test_batching_changes_nothing_but_the_number_of_passes(batching):
    x, t, c = batch()
    passes = []
    model = network()
    model.net.register_forward_hook(lambda *_: passes.append(1))
    with count_nfe() as rows:
        pair = ClassifierFreeGuidance(model, 2.5, batching=batching).predict(x, t, c)
    assert (len(passes), rows.total) == ({"batched": 1, "sequential": 2}[batching], 2 * len(x))
    eps = -1.5 * model.eps(x, t) + 2.5 * model.eps(x, t, c)
    assert_close(pair.eps, eps, rtol=1e-9, atol=1e-9)


def test_guidance_composes_with_itself():
    x, t, c = batch()
    model = network()
    twice = ClassifierFreeGuidance(ClassifierFreeGuidance(model, 2.0), 3.0).predict(x, t, c)
    assert_close(twice, ClassifierFreeGuidance(model, 6.0).predict(x, t, c), rtol=1e-8, atol=1e-8)


def test_a_scale_per_channel():
    x, t, c = batch()
    model = network()
    pair = ClassifierFreeGuidance(model, torch.tensor([[4.0, 0.0]])).predict(x, t, c)
    conditional, unconditional = model.predict(x, t, c), model.predict(x, t)
    assert_close(pair.x0[:, 0], 4 * conditional.x0[:, 0] - 3 * unconditional.x0[:, 0], rtol=1e-9, atol=1e-9)
    assert_close(pair.x0[:, 1], unconditional.x0[:, 1])


@each_path
@pytest.mark.parametrize("interval", [(0.0, 1.0), (0.3, 0.7)])
def test_a_scale_for_each_sample_acts_as_if_each_were_alone(path, interval):
    "At one time a sample, at one time for all, and in batches of any size."
    x, t, c = batch()
    model, scales = network(path=path), torch.linspace(-1, 5, len(batch()[0]), dtype=torch.float64)
    for times in (t, t[0], torch.tensor(0.5)):
        mixed = ClassifierFreeGuidance(model, scales, interval)(x, times, c)
        for i in range(len(x)):
            time = times[i] if times.ndim else times
            alone = ClassifierFreeGuidance(model, scales[i].item(), interval)(x[i : i + 1], time, c[i : i + 1])
            assert_close(mixed.x0[i : i + 1], alone.x0, rtol=1e-9, atol=1e-9)
    nested = OnPath(ClassifierFreeGuidance(model, scales, interval), FlowPath())
    whole = sample(nested, c, (2,), "euler", 5, progress=False, dtype=torch.float64)
    parts = sample(nested, c, (2,), "euler", 5, batch_size=5, progress=False, dtype=torch.float64)
    assert_close(parts, whole, rtol=1e-9, atol=1e-9)
    with pytest.raises(ValueError, match=r"t has shape|scale"):
        ClassifierFreeGuidance(model, scales[:3])(x, t, c)


def test_each_sample_gets_the_answer_to_its_own_question():
    "Whether it is guided or not, in whatever order the two kinds come."
    x, inside = torch.arange(6.0)[:, None], torch.tensor([False, True, False, False, True, False])
    part = lambda sign: lambda model, x, t, c: Prediction(sign * x, t[:, None])  # noqa: E731
    pair = predict_where(inside, ExactDenoiser(gaussian_pair(), FlowPath()), part(-1), part(1), x, x[:, 0], None)
    assert_close(pair, Prediction(torch.where(inside[:, None], -x, x), x))


@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_an_interval_that_ends_on_the_grid_guides_its_ends(steps):
    "Whatever the rounding of the grid: 3 of 10 steps is 0.30000000000000004."
    model = network(path=FlowPath())
    for last in range(1, steps + 1):
        with count_nfe() as bill:
            sample(ClassifierFreeGuidance(model, 2.0, (0.0, last / steps)), torch.zeros(1).long(), (2,), "euler", steps,
                   progress=False)  # fmt: skip
        assert bill.total == steps + min(last, steps), f"{last} of {steps}"


def test_mean_shift_passes_through():
    class Pushed(Recorder):
        def mean_shift(self, x, t, c=None):
            return None if c is None else x + c[:, None]

    x, t, c = batch()
    guided = ClassifierFreeGuidance(Pushed(), 3.0)
    assert guided.mean_shift(x, t) is None
    assert_close(guided.mean_shift(x, t, c), x + c[:, None])


def rescale(guided, conditional, path, t, phi):
    "A guided pair rescaled; at scale 0 it is the second."
    return RescaledGuidance(Denoiser(path, 1), phi=phi).combine(conditional, guided, guided.x0, t, 0.0)


@pytest.mark.parametrize("phi", [0.3, 1.0])
def test_rescale_is_the_published_formula_on_flow_output(phi):
    "On the flow path the raw output is eps - x0; numpy, ddof 1, one sample at a time."
    generator = torch.Generator().manual_seed(0)
    x, y_c, y = torch.randn(3, 4, 3, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0.1, 0.4, 0.7, 1.0], dtype=torch.float64)
    decode = NetworkDenoiser(torch.nn.Identity(), FlowPath()).decode
    out = rescale(decode(y, x, t), decode(y_c, x, t), FlowPath(), t, phi)
    for i in range(4):
        u, u_c = y[i].numpy(), y_c[i].numpy()
        u = phi * u * u_c.std(ddof=1) / u.std(ddof=1) + (1 - phi) * u
        assert_close(out.x0[i].numpy(), x[i].numpy() - t[i].item() * u, rtol=1e-9, atol=1e-9)
        assert_close(out.eps[i].numpy(), x[i].numpy() + (1 - t[i].item()) * u, rtol=1e-9, atol=1e-9)


@each_path
@pytest.mark.parametrize("time", [0.0, 1e-6, 0.5, 1.0])
def test_rescale_is_finite_and_consistent_up_to_the_ends(path, time):
    generator = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 4, 6, generator=generator, dtype=torch.float64)
    t = torch.tensor(time, dtype=torch.float64)
    x, other = path.interpolate(x0, eps, t), Prediction(2 * x0, 0.5 * eps)
    out = rescale(Prediction(x0, eps), other, path, t, 0.7)
    assert torch.isfinite(out.x0).all() and torch.isfinite(out.eps).all()
    assert_close(path.interpolate(*out, t), x)


def test_rescale_leaves_zeros_and_unguided_outputs_alone():
    x, t, c = batch()
    zeros = Prediction(x * 0, x * 0)
    assert_close(rescale(zeros, Prediction(x, x), FlowPath(), t, 1.0), zeros)
    model = network()
    assert_close(RescaledGuidance(model, 1.0, 0.7)(x, t, c), model(x, t, c))
    same = Prediction(x, 2 * x)
    assert_close(rescale(same, same, FlowPath(), t, 0.7), same)
    with pytest.raises(ValueError, match="values per sample = 1"):
        rescale(Prediction(x[:, :1], x[:, :1]), Prediction(x[:, :1], x[:, :1]), FlowPath(), t, 0.5)


def test_two_gaussians_by_integration():
    "Solve dV/dtau = g V and dV/dtau = 2 g V - 1 numerically, from a large start."
    v_c, v_u, top = 0.8, 1.7, 1e5
    for scale in (0.5, 1.0, 2.0, 5.0):

        def g(tau, scale=scale):
            return scale / (v_c + tau) + (1 - scale) / (v_u + tau)

        # in log(tau + 1), where both equations are smooth
        grid = np.linspace(math.log(top + 1), 0, 2000)
        ode = odeint(lambda v, k: v * g(math.exp(k) - 1) * math.exp(k), top, grid, rtol=1e-10, atol=1e-10)
        sde = odeint(lambda v, k: (2 * v * g(math.exp(k) - 1) - 1) * math.exp(k), top, grid, rtol=1e-10, atol=1e-10)
        assert_close(ode_variance(v_c, v_u, scale, start=math.sqrt(top)), ode[-1, 0], rtol=1e-5, atol=0)
        assert_close(ode_variance(v_c, v_u, scale), ode[-1, 0], rtol=1e-3, atol=0)
        assert_close(sde_variance(v_c, v_u, scale), sde[-1, 0], rtol=1e-3, atol=0)


def test_variances_of_the_published_example():
    "Variances 1 and 2: tilt 2 / (scale + 1), ODE 2^(1 - scale), SDE (2 - 2^(2 - 2 scale)) / (2 scale - 1)."
    for scale, sde in ((3.0, 0.3875), (7.0, 0.153827)):
        assert tilt_variance(1.0, 2.0, scale) == pytest.approx(2 / (scale + 1))
        assert ode_variance(1.0, 2.0, scale) == pytest.approx(2 ** (1 - scale))
        assert sde_variance(1.0, 2.0, scale) == pytest.approx(sde, abs=1e-6)
    assert sde_variance(1.0, 2.0, 0.5) == pytest.approx(2 * math.log(2))


def test_tilt_by_quadrature():
    density = lambda x: norm.pdf(x, scale=math.sqrt(0.8)) ** 2.5 * norm.pdf(x, scale=math.sqrt(1.7)) ** -1.5  # noqa: E731
    mass = quad(density, -8, 8)[0]
    assert tilt_variance(0.8, 1.7, 2.5) == pytest.approx(quad(lambda x: x * x * density(x), -8, 8)[0] / mass, rel=1e-6)


@pytest.mark.parametrize(
    "scale, ratio, expected",
    [
        (1.5, 4.4721, (0.3827, 0.8054, 0.3246)),
        (2.0, 4.4721, (0.6491, 0.7195, 0.5784)),
        (4.0, 4.4721, (1.3633, 0.5826, 1.2934)),
        (8.0, 4.4721, (2.2643, 0.4999, 2.2080)),
        (3.0, 1.0, (1.0269, 0.6537, 0.9648)),
        (8.0, 1.0, (2.2605, 0.5030, 2.2054)),
        (2.0, 0.1 / math.sqrt(0.05), (0.3954, 0.9144, 0.3910, 0.1774)),
        (4.0, 0.1 / math.sqrt(0.05), (1.0571, 0.7793, 1.0411, 0.0237)),
    ],
)
def test_two_class_table(scale, ratio, expected):
    assert_close(two_class_law(scale, ratio)[: len(expected)], expected, rtol=0, atol=1.2e-4)


@pytest.mark.parametrize("scale, log_odds", [(3.0, 0.0), (0.5, 0.7), (-1.0, -0.4)])
def test_two_class_map_is_the_ode_in_the_original_variables(scale, log_odds):
    "RK4 in log(V) of dy/dV = -score / 2, with unequal priors, against the reduced equation."
    m, v, top, steps = 0.6, 0.2, 50.0, 1000
    y = m + math.sqrt(v + top) * torch.linspace(-2, 2, 5, dtype=torch.float64)
    start = (y - m) / math.sqrt(v + top)

    def slope(y, k):
        total = math.exp(k)
        push = (scale - 1) * 2 * m / total * torch.sigmoid(-2 * m * y / total - log_odds)
        return -0.5 * (-(y - m) / total + push) * total

    k, h = math.log(v + top), (math.log(v) - math.log(v + top)) / steps
    for _ in range(steps):
        a = slope(y, k)
        b = slope(y + h / 2 * a, k + h / 2)
        c = slope(y + h / 2 * b, k + h / 2)
        y, k = y + h / 6 * (a + 2 * b + 2 * c + slope(y + h * c, k + h)), k + h
    end = two_class_map(start, scale, m / math.sqrt(v), m / math.sqrt(v + top), log_odds)
    assert_close(end, (y - m) / math.sqrt(v), rtol=1e-7, atol=1e-7)


def test_two_class_moments_by_monte_carlo():
    start, ratio = 0.2, 0.8
    z = torch.randn(20_000, generator=torch.Generator().manual_seed(2), dtype=torch.float64) - start
    end, law = two_class_map(z, 2.5, ratio, start, 0.3), two_class_law(2.5, ratio, start, 0.3)
    assert end.mean().item() == pytest.approx(law.shift, abs=0.03)
    assert end.std().item() == pytest.approx(law.std, abs=0.03)
    assert end.median().item() == pytest.approx(law.median, abs=0.04)
    assert (end < -ratio).double().mean().item() == pytest.approx(law.wrong, abs=0.005)
    assert (end.sort().indices == z.sort().indices).all()  # increasing


def test_interval_law_when_sampling():
    "Outside the interval the position does not move: the law integrates over the interval alone."
    m, s, interval = 1.0, 0.5, (0.25, 0.75)
    path = VPPath("cosine")
    r = [m / math.sqrt(s**2 + math.tan(math.pi / 2 * t) ** 2) for t in interval]
    model = ClassifierFreeGuidance(ExactDenoiser(gaussian_pair(m, s**2), path), 5.0, interval)
    c = torch.ones(8, dtype=torch.long)
    run = sample_trajectory(model, c, (1,), "heun", 160, progress=False, dtype=torch.float64)
    assert_close((run.x[:, 0] - m) / s, two_class_map(run.points[0][:, 0], 5.0, r[0], r[1]), rtol=0, atol=0.05)


def test_guidance_translates_equal_widths():
    "Equal variances, different means: the ODE ends on the extrapolated mean with the same variance."

    class Means(Denoiser):
        def forward(self, x, t, c=None):
            mean, v = (0.3, 0.4) if c is None else (1.0, 0.4)
            alpha, sigma = self.path.alpha(t), self.path.sigma(t)
            eps = sigma * (x - alpha * mean) / (alpha**2 * v + sigma**2)
            return Prediction(mean + alpha * v * (x - alpha * mean) / (alpha**2 * v + sigma**2), eps)

    guided = ClassifierFreeGuidance(Means(FlowPath(), 1), 4.0)
    c = torch.zeros(2, dtype=torch.long)
    init = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    x = sample(guided, c, (1,), "heun", 200, init=init, progress=False, dtype=torch.float64)
    assert x.mean().item() == pytest.approx(0.3 + 4 * 0.7, abs=1e-3)
    assert ((x[1] - x[0]) / 2).item() ** 2 == pytest.approx(0.4, abs=1e-3)


@pytest.mark.parametrize("scale", [math.nan, math.inf, "2", None, True, torch.tensor([1.0, math.nan])])
def test_bad_scale(scale):
    with pytest.raises(ValueError, match="allowed: a finite number"):
        check_scale("scale", scale)
    with pytest.raises(ValueError, match="allowed: a finite number"):
        ClassifierFreeGuidance(network(), scale)


@pytest.mark.parametrize(
    "interval", [(0.5, 0.4), (-0.1, 1.0), (0.0, 1.1), (0.0, math.nan), (0.5,), 0.5, ("a", 1.0), None]
)
def test_bad_interval(interval):
    with pytest.raises(ValueError, match="allowed: two times, 0 <= first <= last <= 1"):
        get_args(Interval)[1]("interval", interval)


def test_bad_input():
    with pytest.raises(ValueError, match="allowed: 'auto', 'batched', 'sequential'"):
        ClassifierFreeGuidance(network(), 2.0, batching="parallel")
    with pytest.raises(ValueError, match=r"model\.num_classes = 0"):
        ClassifierFreeGuidance(mlp_denoiser(2, FlowPath()), 2.0)
    x, t, c = batch()
    with pytest.raises(ValueError, match="c contains 4; allowed: 0 to 3"):
        ClassifierFreeGuidance(network(), 2.0, (0.2, 0.5)).predict(x, t, c + 1)
    with pytest.raises(ValueError, match=r"c is torch\.int64"):
        ClassifierFreeGuidance(network(), 2.0, (0.2, 0.5)).predict(x, t, c[:-1])
    with pytest.raises(ValueError, match="allowed: scale / v_c"):
        tilt_variance(2.0, 1.0, 2.0)
