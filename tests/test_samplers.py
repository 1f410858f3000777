"Samplers against diffusers' schedulers, closed forms, and their own promises."

import math
import warnings
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from guidance_nb import denoisers
from guidance_nb._random import keyed_noise
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import NetworkDenoiser, OnPath, count_nfe
from guidance_nb.mixtures import ExactDenoiser, Mixture, fractal, gaussian_pair, mixture_of_points
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.samplers import (
    SAMPLERS,
    StepContext,
    _sit_diffusion,
    ddim_step,
    sample,
    sample_trajectory,
    solve_adaptively,
    time_grid,
)

F64 = {"progress": False, "dtype": torch.float64}


@pytest.fixture(scope="module")
def trained_like():
    "A network with random weights: wrong about everything, but smooth."
    model = mlp_denoiser(2, VPPath("cosine"), num_classes=2, prediction="eps", width=32, depth=2).double()
    torch.nn.init.normal_(model.net.read.weight, std=0.2, generator=torch.Generator().manual_seed(0))
    return model.eval()


def by_scheduler(scheduler, model, x, c, steps, to_ratio, noises=None):
    "Run a diffusers scheduler with our model as its noise predictor at the same noise-to-signal ratio."
    scheduler.set_timesteps(steps)
    ratios = []
    for t in scheduler.timesteps:
        ratio = to_ratio(scheduler, t)
        ratios.append(ratio)
        with torch.no_grad():
            eps = model.predict(x, model.path.time_at(ratio), c).eps
        x = scheduler.step(eps, t, x).prev_sample
    return x, torch.stack([*ratios, torch.zeros((), dtype=torch.float64)])


def ratio_of_alpha_bar(scheduler, t):
    bar = scheduler.alphas_cumprod[t].double()
    return ((1 - bar) / bar).sqrt()


def test_ddim_agrees_with_diffusers(trained_like):
    diffusers = pytest.importorskip("diffusers")
    x, c = torch.randn(6, 2, dtype=torch.float64), torch.arange(6) % 2
    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    theirs, ratios = by_scheduler(scheduler, trained_like, x, c, 20, ratio_of_alpha_bar)
    ours = sample(trained_like, c, (2,), "ddim", times=trained_like.path.time_at(ratios), init=x, **F64)
    assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


class CountingPath(FlowPath):
    "Counts how often its functions are asked for."

    asked = 0

    def alpha(self, t):
        CountingPath.asked += 1
        return super().alpha(t)


@pytest.mark.parametrize("batching", ["batched", "sequential"])
def test_what_belongs_to_a_run_is_computed_once(batching, monkeypatch):
    "However many steps there are; and step by step, outside of a run, the samples are the same bit for bit."
    model = mlp_denoiser(2, CountingPath(), 3)
    torch.nn.init.normal_(model.net.read.weight)
    guided, c = ClassifierFreeGuidance(model, 2.0, (0.2, 0.8), batching), torch.arange(4) % 3
    checks, counts, options = [], [], {"sampler": "ddim", "progress": False}
    monkeypatch.setattr(denoisers, "check_labels", lambda *given: checks.append(given))
    for steps in (5, 25):
        checks.clear()
        CountingPath.asked = 0
        drawn = sample(guided, c, (2,), steps=steps, **options)
        counts.append((CountingPath.asked, len(checks)))
    assert counts[0] == counts[1]
    x, times = keyed_noise(0, 0, (4, 2)), time_grid(model.path, 25)
    with torch.no_grad():
        for t, s in zip(times, times[1:]):
            x = ddim_step(guided, x, t, s, c, StepContext(None, 0.0, None, {}))
    assert torch.equal(x, drawn) and CountingPath.asked > 25


def test_ddpm_agrees_with_diffusers_given_the_same_noise(trained_like, monkeypatch):
    pytest.importorskip("diffusers")
    from diffusers.schedulers import scheduling_ddpm

    x, c, step = torch.randn(6, 2, dtype=torch.float64), torch.arange(6) % 2, iter(range(1, 100))
    monkeypatch.setattr(
        scheduling_ddpm, "randn_tensor", lambda shape, **_: keyed_noise(0, 0, shape, next(step)).double()
    )
    scheduler = scheduling_ddpm.DDPMScheduler(clip_sample=False, variance_type="fixed_small")
    theirs, ratios = by_scheduler(scheduler, trained_like, x, c, 25, ratio_of_alpha_bar)
    ours = sample(trained_like, c, (2,), "ddpm", times=trained_like.path.time_at(ratios), init=x, **F64)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_dpm_solver_agrees_with_diffusers(trained_like):
    diffusers = pytest.importorskip("diffusers")
    x, c = torch.randn(6, 2, dtype=torch.float64), torch.arange(6) % 2
    scheduler = diffusers.DPMSolverMultistepScheduler(final_sigmas_type="zero", lower_order_final=True)
    theirs, ratios = by_scheduler(
        scheduler, trained_like, x, c, 20, lambda s, t: s.sigmas[0 if s.step_index is None else s.step_index].double()
    )
    ours = sample(trained_like, c, (2,), "dpmpp_2m", times=trained_like.path.time_at(ratios), init=x, **F64)
    assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("path", [VPPath(), VPPath("cosine"), EDMPath(60.0)], ids=repr)
def test_ddim_is_euler_on_a_matched_grid(path):
    model, c = ExactDenoiser(fractal(depth=3), FlowPath()), torch.arange(32) % 2
    times = torch.linspace(0.98, 0, 12, dtype=torch.float64)
    euler = sample(model, c, (2,), "euler", times=times, **F64)
    matched = path.time_at(FlowPath().noise_to_signal(times))
    for other in (ExactDenoiser(model.mixture, path), OnPath(model, path)):
        assert_close(sample(other, c, (2,), "ddim", times=matched, **F64), euler, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_convergence_orders_on_the_flow_path(sampler, order):
    model = ExactDenoiser(Mixture(torch.tensor([[0.7]]), torch.tensor([0.2]), torch.tensor([0])), FlowPath())
    errors = []
    for steps in (40, 80):
        run = sample_trajectory(model, 20, (1,), sampler, steps, **F64)
        exact = 0.7 + run.points[0] * math.sqrt(0.2)  # noise N(0, 1) to data, monotone map
        errors.append((run.x - exact).abs().max().item())
    assert abs(math.log2(errors[0] / errors[1]) - order) < 0.15


def test_ddim_on_a_gaussian_shrinks_by_the_closed_form():
    variance, path = 0.3, VPPath()
    model = ExactDenoiser(Mixture(torch.zeros(1, 1), torch.tensor([variance]), torch.tensor([0])), path)
    run = sample_trajectory(model, 4, (1,), "ddim", 7, **F64)
    expected = 1.0
    for t, s in zip(run.times[:-1], run.times[1:]):
        a, b, p, q = path.alpha(t), path.sigma(t), path.alpha(s), path.sigma(s)
        factor = (p * a * variance + q * b) / (a * a * variance + b * b)
        assert factor <= ((p * p * variance + q * q) / (a * a * variance + b * b)).sqrt() + 1e-12
        expected *= factor.item()
    assert_close(run.x, expected * run.points[0])


@pytest.mark.parametrize("sampler", ["ddpm", "euler_maruyama"])
@pytest.mark.parametrize("path", [FlowPath(), VPPath()], ids=repr)
def test_stochastic_samplers_keep_the_marginals(sampler, path):
    model, c = ExactDenoiser(gaussian_pair(0.5), path), torch.zeros(3000, dtype=torch.long)
    x = sample(model, c, (1,), sampler, 300, **F64)
    assert abs(x.mean() + 0.5) < 0.02 and abs(x.var() - 0.05) < 0.006


def test_partial_eta_lies_between():
    model, spread = ExactDenoiser(gaussian_pair(0.5), VPPath()), []
    c, start = (
        torch.zeros(500, dtype=torch.long),
        {"init": torch.full((500, 1), 0.3), "times": torch.linspace(0.2, 0, 11)},
    )
    for eta in (0.0, 0.5, 1.0):
        runs = [sample(model, c, (1,), "ddim", seed=s, eta=eta, **start, **F64) for s in (1, 2)]
        spread.append((runs[0] - runs[1]).abs().mean().item())
    assert spread[0] == 0 < spread[1] < spread[2]


@pytest.mark.parametrize("sampler", [*SAMPLERS])
def test_sample_i_does_not_depend_on_the_batch(sampler):
    model, c = ExactDenoiser(fractal(depth=2), FlowPath()), torch.arange(300) % 2
    whole = sample(model, c, (2,), sampler, 6, seed=5, **F64)
    assert_close(sample(model, c, (2,), sampler, 6, seed=5, batch_size=97, **F64), whole, rtol=0, atol=1e-10)
    assert_close(
        sample(model, c[250:260], (2,), sampler, 6, seed=5, start=250, **F64), whole[250:260], rtol=0, atol=1e-10
    )
    assert not torch.equal(sample(model, c, (2,), sampler, 6, seed=6, **F64), whole)


@pytest.mark.parametrize(
    ("sampler", "per_sample"),
    [("ddim", 9), ("ddpm", 9), ("euler", 9), ("heun", 17), ("euler_maruyama", 9), ("dpmpp_2m", 9)],
)
def test_rows_counted_are_rows_evaluated(sampler, per_sample):
    seen = []
    model = mlp_denoiser(2, FlowPath(), num_classes=2, width=8, depth=1)
    model.net.register_forward_hook(lambda module, inputs, output: seen.append(len(inputs[0])))
    with count_nfe() as rows:
        sample(model, torch.arange(5) % 2, (2,), sampler, steps=9, batch_size=2, progress=False)
    assert rows.total == sum(seen) == 5 * per_sample
    options = {"sampler": sampler, "steps": 9, "batch_size": 2, "progress": False}
    run = sample_trajectory(model, torch.arange(5) % 2, (2,), **options)
    assert run.nfe == per_sample  # of each sample
    guided = ClassifierFreeGuidance(model, 2.0)
    assert sample_trajectory(guided, torch.arange(5) % 2, (2,), **options).nfe == 2 * per_sample


def test_dopri5_solves_the_ode_to_its_tolerance():
    model = ExactDenoiser(Mixture(torch.tensor([[0.7]]), torch.tensor([0.2]), torch.tensor([0])), FlowPath())
    run = sample_trajectory(model, 20, (1,), "dopri5", steps=4, **F64)
    assert_close(run.x, 0.7 + run.points[0] * math.sqrt(0.2), rtol=0, atol=1e-4)
    assert len(run.points) == 5


def test_sampling_leaves_the_model_as_it_was():
    model = mlp_denoiser(2, FlowPath(), width=8, depth=1)
    model.train()
    sample(model, 2, (2,), steps=2, progress=False)
    assert model.training and all(p.grad is None for p in model.parameters())


def test_divergence_is_reported():
    class Explode(torch.nn.Module):
        def forward(self, x, time, labels):
            return x * 1e30

    with pytest.raises(FloatingPointError, match="samples are not finite"):
        sample(NetworkDenoiser(Explode(), FlowPath()), 2, (2,), "euler", 4, progress=False)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sampler": "rk4"}, "sampler = 'rk4'; allowed: 'ddim'"),
        ({"steps": 0}, "steps = 0; allowed: a whole number"),
        ({"steps": 2.5}, "steps = 2.5"),
        ({"shape": ()}, "shape = (); allowed: the shape of one sample"),
        ({"shape": (0, 2), "c": 2}, "shape = (0, 2)"),
        ({"c": torch.tensor([0, 5])}, "c contains 5; allowed: 0 to 1"),
        ({"c": torch.tensor([0.0, 1.0])}, "c is torch.float32"),
        ({"c": torch.tensor([[0]])}, "c is torch.int64 (1, 1)"),
        ({"c": 0}, "c = 0; allowed: labels [n] or the number of unconditional samples"),
        ({"c": torch.zeros(0, dtype=torch.long)}, "c = tensor([], dtype=torch.int64); allowed: labels [n]"),
        ({"c": torch.tensor(1)}, "c = tensor(1)"),
        ({"c": 2.0}, "c = 2.0"),
        ({"shape": 2}, "shape = 2"),
        ({"eta": 1.5}, "eta = 1.5; allowed: 0 to 1"),
        ({"dtype": torch.int64}, "dtype = torch.int64; allowed: a floating-point type"),
        ({"dtype": "float32"}, "dtype = 'float32'"),
        ({"start": -1}, "start = -1; allowed: a whole number, 0 or more"),
        ({"batch_size": 0}, "batch_size = 0; allowed: a whole number, 1 or more"),
        ({"init": torch.zeros(3, 1)}, "init is torch.float32 (3, 1); allowed: a floating-point tensor (2, 1)"),
        ({"init": torch.zeros(2, 1, dtype=torch.uint8)}, "init is torch.uint8"),
        ({"init": [[0.0], [0.0]]}, "init is list"),
        ({"seed": -1}, "seed = -1"),
        ({"times": torch.tensor([0.0, 1.0])}, "for rising times"),
        ({"times": torch.tensor([1.0, 0.0, 0.5])}, "strictly falling"),
        ({"times": torch.tensor([2.0, 1.0])}, "in [0, 1]"),
    ],
)
def test_bad_requests(arguments, words):
    request = {"c": torch.tensor([0, 1]), "shape": (1,), "progress": False} | arguments
    with pytest.raises(ValueError) as caught:
        sample(ExactDenoiser(gaussian_pair(), FlowPath()), **request)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_numbers_of_numpy_are_numbers():
    "A scale, a seed or a number of steps that comes from an array or a table gives the same samples."
    model, labels = ExactDenoiser(gaussian_pair(), FlowPath()), torch.tensor([0, 1])
    plain = sample(ClassifierFreeGuidance(model, 2.5), labels, (1,), steps=2, seed=3, progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_numpy = ClassifierFreeGuidance(model, np.float32(2.5))
    options = {"steps": np.int64(2), "seed": np.int64(3), "batch_size": np.int32(2), "times": [1.0, 0.5, 0.0]}
    assert torch.equal(sample(of_numpy, labels, (1,), **options, progress=False), plain)
    for scale in (np.float32("nan"), np.float32("inf"), np.array([2.5, 3]), 10**400):
        with pytest.raises(ValueError, match="; allowed: a finite number"):
            ClassifierFreeGuidance(model, scale)


@pytest.mark.parametrize("size", [0, 1, 3, 4])
def test_a_scale_per_sample_has_one_for_each(size):
    "Too many were cut off in silence, too few blamed on the time."
    guided = ClassifierFreeGuidance(ExactDenoiser(gaussian_pair(), FlowPath()), torch.full((size,), 2.0))
    with nullcontext() if size in (1, 3) else pytest.raises(ValueError, match=rf"scale = \({size},\); .* = 1 or 3"):
        sample(guided, torch.tensor([0, 1, 1]), (1,), steps=2, progress=False)


def test_grids_end_where_they_should():
    edm = EDMPath()
    times = time_grid(edm, 18)
    levels = edm.sigma(times)
    assert_close(levels[0], torch.tensor(80.0, dtype=torch.float64))
    assert_close(levels[-2:], torch.tensor([0.002, 0.0], dtype=torch.float64))
    expected = (80 ** (1 / 7) + 3 / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
    assert_close(levels[3].item(), expected)
    assert_close(time_grid(FlowPath(), 250, "euler_maruyama")[-2].item(), 0.04)


@pytest.mark.parametrize("sigma_max", [3.0, 10.0, 14.6, 80.0, 157.0])
def test_sample_takes_its_own_grid_at_any_largest_noise(sigma_max):
    "A power and its root need not meet again: the first time must not be a rounding above 1."
    path = EDMPath(sigma_max)
    for steps in (1, 18, 32):
        times = time_grid(path, steps)
        assert times[0] == 1 and times[-1] == 0 and (times.diff() < 0).all()
    assert sample(ExactDenoiser(fractal(depth=2), path), 3, (2,), "euler", 4, **F64).isfinite().all()


class Times(ExactDenoiser):
    "An exact model that remembers the times it was asked at."

    def forward(self, x, t, c=None):
        self.asked = [*getattr(self, "asked", []), float(t)]
        return super().forward(x, t, c)


@pytest.mark.parametrize("path", [FlowPath(), VPPath(), VPPath("cosine"), EDMPath(), VPPath("linear", 0.0)], ids=repr)
@pytest.mark.parametrize("span", [None, (0.9, 0.89), (0.2, 0.0)])
def test_dopri5_works_on_every_path_and_never_asks_outside_its_times(path, span):
    "The exact ODE of one Gaussian keeps every point at its number of standard deviations."
    model = Times(Mixture(torch.zeros(1, 1), torch.tensor([0.2]), torch.tensor([0])), path)
    times = torch.tensor(span or (1.0, 0.0), dtype=torch.float64)
    run = sample_trajectory(model, 20, (1,), "dopri5", times=times, **F64)
    first, last = ((path.alpha(t) ** 2 * 0.2 + path.sigma(t) ** 2).sqrt() for t in times)
    assert_close(run.x, run.points[0] * last / first, rtol=1e-3, atol=1e-3 * last.item())
    assert times[-1] <= min(model.asked) and max(model.asked) <= times[0]


def test_a_sixteen_bit_state_is_asked_at_exact_times():
    seen = []

    class Net(torch.nn.Module):
        def forward(self, x, time, labels):
            seen.append(time[0].item())
            return x

    model = NetworkDenoiser(Net(), FlowPath())
    sample(model, 1, (2,), "euler", 1000, dtype=torch.bfloat16, progress=False)
    assert_close(torch.tensor(seen), torch.linspace(1, 0, 1001)[:-1], rtol=0, atol=1e-6)


@pytest.mark.parametrize("failing", [False, True])
def test_every_part_keeps_the_mode_it_had(failing):
    "Also when the model fails, and when a guided model is made from one that evaluates."

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.drop, self.norm = torch.nn.Dropout(0.5), torch.nn.BatchNorm1d(2)

        def forward(self, x, time, labels):
            assert not self.drop.training and not failing
            return self.norm(self.drop(x))

    model = NetworkDenoiser(Net(), FlowPath(), 3)
    model.eval()
    model.net.norm.train()
    modes, statistics = [part.training for part in model.modules()], model.net.norm.running_mean.clone()
    guided = ClassifierFreeGuidance(model, 2.0)
    try:
        sample(guided, torch.tensor([0, 1]), (2,), steps=2, progress=False)
    except AssertionError:
        assert failing
    assert [part.training for part in model.modules()] == modes and guided.training
    assert_close(model.net.norm.running_mean, statistics)
    assert not torch.is_grad_enabled() or all(p.grad is None for p in model.parameters())


def test_no_gradient_is_kept_while_sampling():
    model = mlp_denoiser(2, FlowPath(), width=8, depth=1)
    assert not sample(model, 2, (2,), steps=2, progress=False).requires_grad


@pytest.mark.parametrize("path", [FlowPath(), VPPath(), EDMPath(7.0)], ids=repr)
def test_the_diffusion_of_sit_is_twice_the_noise_level(path):
    "The marginals are right for any diffusion, so they do not show it."
    t = torch.tensor([0.0, 0.25, 0.5, 1.0], dtype=torch.float64)
    assert_close(_sit_diffusion(path, t), 2 * path.sigma(t))


def test_keyed_noise_of_far_samples_is_not_that_of_near_ones():
    "Blocks of 256 samples and steps of the sampler must not share a key."
    draws = [keyed_noise(0, start, (4, 3), step) for start in (0, 256, 512, 256 * 2**20) for step in (0, 1, 255, 256)]
    flat = torch.stack(draws).flatten(1)
    assert len(torch.unique(flat, dim=0)) == len(draws)


@pytest.mark.parametrize("times", [(0.0, 1.0), (1.0, 0.0), (0.3, 0.2)])
def test_an_adaptive_solver_never_asks_outside_its_times(times):
    "Its first guess of a step is long where the field hardly moves, and would look beyond the last time."
    asked, span = [], torch.tensor(times, dtype=torch.float64)

    def field(t, x):
        asked.append(float(t))
        return torch.cos(3 * t) + 0 * x

    end = solve_adaptively(field, torch.full((1, 1), 1e3, dtype=torch.float64), span)[-1]
    assert min(times) <= min(asked) and max(asked) <= max(times)
    assert_close(end.item(), 1e3 + (math.sin(3 * times[1]) - math.sin(3 * times[0])) / 3, rtol=1e-5, atol=0)


@pytest.mark.parametrize(("options", "parts"), [
    ({}, [167, 167, 66]), ({"batch_size": 400}, [400]),
    ({"callback": lambda *_: None}, [400]), ({"sampler": ddim_step}, [400]),
])  # fmt: skip
def test_many_images_are_drawn_in_parts_on_a_cpu(options, parts):
    "As many as fit into its caches, unless somebody looks at all of them or the step is not ours."
    model, rows = ExactDenoiser(mixture_of_points(torch.randn(4, 784), torch.zeros(4).long()), FlowPath()), []
    model.register_forward_pre_hook(lambda model, args: rows.append(len(args[0])))
    sample(model, 400, (784,), **({"sampler": "ddim", "steps": 1, "progress": False} | options))
    assert rows == parts


@pytest.mark.parametrize("n", [1, 3])
def test_a_network_may_change_its_time_in_place(n):
    class Network(torch.nn.Module):
        def __init__(self, in_place):
            super().__init__()
            self.in_place = in_place

        def forward(self, x, t, c):
            if self.in_place:
                t *= 3
            else:
                t = 3 * t
            return x * t[:, None]

    runs = [sample(NetworkDenoiser(Network(k), FlowPath()), n, (2,), "heun", 5, progress=False) for k in (False, True)]
    assert torch.equal(*runs)
