"One contract for every guidance method: a line in `CASES` buys all the tests below."

import importlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from page_code import page_code
from torch import nn
from torch.testing import assert_close

from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.classifier_guidance import ClassifierGuidance
from guidance_nb.denoisers import (
    PREDICTIONS,
    Denoiser,
    NetworkDenoiser,
    OnPath,
    Prediction,
    count_nfe,
    record_nfe,
    target_coefficients,
)
from guidance_nb.flow_postprocessing import FlowPostprocessor
from guidance_nb.guidance import Claims, Guidance
from guidance_nb.guidance_variants import (
    AdaptiveProjectedGuidance,
    CFGPlusPlus,
    CFGZeroStar,
    DynamicThresholding,
    FrequencyDecoupledGuidance,
    MagnitudeAwareGuidance,
    RectifiedGuidance,
    RescaledGuidance,
    TangentialGuidance,
)
from guidance_nb.loss_guidance import LossGuidance
from guidance_nb.mixtures import ExactClassifier, ExactDenoiser, Mixture
from guidance_nb.paths import EDMPath, FlowPath, VPPath, change_path, expand_time
from guidance_nb.power_tilt import CharacteristicGuidance
from guidance_nb.samplers import sample
from guidance_nb.several_conditions import ComposedConditions, NormalizedAttentionGuidance
from guidance_nb.weak_models import (
    Autoguidance,
    DiscriminatorGuidance,
    IndependentConditionGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
)
from notebooks import ROOT

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()]
TIGHT = {"rtol": 0, "atol": 0}


def law(seed: int, components: int) -> Mixture:
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(components, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, torch.rand(components, generator=generator) + 0.2, torch.arange(components) % 3)


LAW = law(4, 6)  # of the exact models


class Case(NamedTuple):
    "How to make a method, what it claims, and where it is to be tried."

    make: Callable[..., Denoiser]  # `make(model, scale)`, or with `interval` too
    claims: Claims
    exact: bool = False  # Whether it needs a mixture instead of a network
    step_only: bool = False  # Whether it is a DDIM-type step and has no velocity
    batching: bool = True  # Whether `make` takes `batching`, which it must if it asks the model for a pair
    attention: bool = False  # Whether it breaks the network's attention, which then is its second branch


def case(method: type[Guidance], *, step_only: bool = False, **options) -> Case:
    "The line of a method that takes `options`."
    return Case(partial(method, **options), method.claims, step_only=step_only)


def by_classifier(model: Denoiser, scale: float, **options) -> Denoiser:
    return ClassifierGuidance(model, ExactClassifier(LAW, model.path), scale, base="conditional", **options)


class Blind(Denoiser):
    "The weak model that makes autoguidance classifier-free: it never sees the condition."

    def __init__(self, model: Denoiser):
        super().__init__(model.path, model.num_classes)
        self.model = model

    def forward(self, x, t, c=None):
        return self.model.predict(x, t, None)


def by_blindness(model: Denoiser, scale: float, **options) -> Denoiser:
    return Autoguidance(model, Blind(model), scale, **options)


ExactDiscriminator = page_code("17_weak_models", "ExactDiscriminator").ExactDiscriminator


def by_judge(model: Denoiser, scale: float, **options) -> Denoiser:
    return DiscriminatorGuidance(model, ExactDiscriminator(law(6, 3), law(7, 3), model.path), scale, **options)


def by_loss(model: Denoiser, scale: float, **options) -> Denoiser:
    return LossGuidance(model, lambda x0, c: (x0 - 0.5).square().flatten(1).sum(1) / 40, scale, **options)


def composed(model: Denoiser, scale: float, **options) -> Denoiser:
    return ComposedConditions(model, scale=scale, **options)


def by_attention(model: Denoiser, scale: float, **options) -> Denoiser:
    return NormalizedAttentionGuidance(model, 2, 0, scale, tau=1.1, **options)


def broken(method: type[Denoiser], layers: int | str | list[int], **fixed) -> Case:
    make = lambda model, scale, **options: method(model, layers, scale, **fixed, **options)  # noqa: E731
    return Case(make, method.claims, batching=False, attention=True)


THREE = replace(ComposedConditions.claims, nfe=4, conditional_at_one=False, unconditional_at_zero=True)
NEGATIVE = replace(ComposedConditions.claims, nfe=2, needs_condition=True)
JUDGE = replace(DiscriminatorGuidance.claims, nfe=1)  # an exact judge is no network

# name -> how it is made and what it claims
CASES: dict[str, Case] = {
    "classifier": Case(by_classifier, ClassifierGuidance.claims, exact=True, batching=False),
    "classifier-free": Case(ClassifierFreeGuidance, Claims("2207.12598")),
    "characteristic": case(CharacteristicGuidance, tolerance=1e-9, iterations=16),
    "rescale": case(RescaledGuidance),
    "rescale in full": case(RescaledGuidance, phi=1.0),
    "magnitude-aware": case(MagnitudeAwareGuidance, damping=0.5),
    "zero star": case(CFGZeroStar),
    "tangential": case(TangentialGuidance),
    "adaptive projected": case(AdaptiveProjectedGuidance, norm=20.0),
    "adaptive projected with momentum": case(AdaptiveProjectedGuidance, eta=0.3, norm=20.0, momentum=-0.5),
    "frequency-decoupled": case(FrequencyDecoupledGuidance, shares=(1.0, 4 / 9)),
    "dynamic thresholding": case(DynamicThresholding),
    "rectified": case(RectifiedGuidance, ratios=0.8),
    "cfg++": case(CFGPlusPlus, step_only=True),
    "autoguidance": Case(by_blindness, Autoguidance.claims, batching=False),
    "perturbed attention": broken(PerturbedAttentionGuidance, 0),
    "smoothed energy": broken(SmoothedEnergyGuidance, "mixer", sigma=1.0),
    "skipped layer": broken(SkipLayerGuidance, [0]),
    "self-attention": broken(SelfAttentionGuidance, 0, sigma=1.0),
    "discriminator": Case(by_judge, JUDGE, exact=True, batching=False),
    "loss": Case(by_loss, LossGuidance.claims, batching=False),
    "loss at the output": Case(partial(by_loss, through=False, steps=3), LossGuidance.claims, batching=False),
    "three conditions": Case(partial(composed, others=[2, 0], weights=[0.7, -0.4]), THREE),
    "negative condition": Case(partial(composed, away=2), NEGATIVE),
    "normalized attention": Case(by_attention, NormalizedAttentionGuidance.claims, batching=False, attention=True),
    "independent condition": Case(IndependentConditionGuidance, IndependentConditionGuidance.claims, batching=False),
}

each_case = pytest.mark.parametrize("name", CASES)


def test_no_method_of_the_package_is_missing():
    "Every kind of `Guidance` in the package has a line in `CASES`; one that is only imported fails the linter."
    for path in sorted((ROOT / "guidance_nb").glob("[a-z]*.py")):
        importlib.import_module(f"guidance_nb.{path.stem}")
    leaves, todo = [], [Guidance]
    while todo:
        method = todo.pop()
        todo += method.__subclasses__()
        leaves += [] if method.__subclasses__() else [method]  # what others are made from is no method itself
    public = {method.__name__ for method in leaves if method.__module__.startswith("guidance_nb.")}
    missing = {name for name in public if name not in Path(__file__).read_text(encoding="utf-8")}
    assert missing == set(), "add a line to CASES, as CONTRIBUTING.md says"


class Toy(nn.Module):
    "A smooth random network for images of any shape whose output depends on pixel, time and label."

    def __init__(self, classes: int = 3, channels: int = 4):
        super().__init__()
        generator = torch.Generator().manual_seed(11)
        draw = lambda *shape: nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))  # noqa: E731
        self.mix, self.shift, self.gain = draw(channels, channels), draw(classes + 1, channels, 8, 8), draw(classes + 1)

    def forward(self, x, time, labels):
        seen = torch.einsum("ij,bj...->bi...", self.mix / 2, x) + self.shift[labels]
        wave = torch.cos(3 * time) * self.gain[labels]
        return 0.4 * x + torch.tanh(seen) + wave[:, None, None, None]


class Attentive(Toy):
    "The same with a self-attention layer of `diffusers` over its pixels."

    def __init__(self):
        super().__init__()
        from diffusers.models.attention_processor import Attention

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(12)
            self.mixer = Attention(4, heads=2, dim_head=2, residual_connection=True).double()

    def forward(self, x, time, labels):
        return self.mixer(super().forward(x, time, labels))


class Encoded(nn.Module):
    "A network that predicts, in another parametrisation, the pair that `reference` predicts."

    def __init__(self, reference: NetworkDenoiser, prediction: str):
        super().__init__()
        self.reference, self.prediction = reference, prediction

    def forward(self, x, time, labels):
        ref = self.reference
        if self.prediction == "edm":  # whose network sees x / S and a quarter of the log noise level
            time = ref.path.time_at((4 * time).exp())
            x = x * expand_time((ref.path.sigma(time) ** 2 + ref.path.alpha(time) ** 2 / 4).sqrt(), x)
        pair = ref.decode(ref.net(x, time, labels), x, time)
        a, b = target_coefficients(self.prediction, ref.path, time)
        return expand_time(a, x) * pair.x0 + expand_time(b, x) * pair.eps


class Mixed(ExactDenoiser):
    "An exact model of three classes in four dimensions that counts its evaluations."

    def __init__(self, path):
        super().__init__(LAW, path)

    def forward(self, x, t, c=None):
        record_nfe(len(x))
        return super().forward(x, t, c)


def setting(case: Case, path=PATHS[0], n: int = 9):
    "A model and a batch that suit a case: images of four channels, or points of a mixture."
    generator = torch.Generator().manual_seed(5)
    t = torch.linspace(0.06, 0.94, n, dtype=torch.float64)
    if case.exact:
        model: Denoiser = Mixed(path)
        shape = (n, 4)
    else:
        model, shape = NetworkDenoiser(Attentive() if case.attention else Toy(), path, 3, "v"), (n, 4, 8, 8)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    return model, x * expand_time((path.alpha(t) ** 2 + path.sigma(t) ** 2).sqrt(), x), t, torch.arange(n) % 3


def nfe_of(model: Denoiser, *arguments) -> int:
    with count_nfe() as nfe:
        model.predict(*arguments)
    return nfe.total


@each_case
@pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "cosine", "edm"])
def test_scale_one_is_the_conditional_model(name, path):
    "Exactly, and at its price; where a method says otherwise, there is a time at which it differs."
    case = CASES[name]
    model, x, t, c = setting(case, path)
    guided, plain = case.make(model, 1.0), model.predict(x, t, c)
    if case.claims.conditional_at_one:
        # a classifier's gradient is added and cancels only up to rounding
        assert_close(guided.predict(x, t, c), plain, **({"rtol": 1e-9, "atol": 1e-9} if case.exact else TIGHT))
        assert nfe_of(guided, x, t, c) == nfe_of(model, x, t, c)
    else:
        t[-1] = 1.0
        assert max((a - b).abs().max() for a, b in zip(guided.predict(x, t, c), model.predict(x, t, c))) > 1e-3


class Deaf(Denoiser):
    "A model that ignores its condition."

    def __init__(self, model: Denoiser):
        super().__init__(model.path, model.num_classes)
        self.model = model

    def forward(self, x, t, c=None):
        return self.model.predict(x, t, None)


@each_case
def test_equal_branches_are_left_alone(name):
    case = CASES[name]
    if case.attention:
        pytest.skip("its second branch is a broken network, see test_weak_models")
    if case.exact:
        pytest.skip("a classifier's gradient is no branch of the model")
    model, x, t, c = setting(case)
    guided = case.make(Deaf(model), 3.0)
    if case.claims.equal_unchanged:
        assert_close(guided.predict(x, t, c), model.predict(x, t), rtol=1e-9, atol=1e-9)
    else:
        t[-1] = 1.0
        assert (guided.predict(x, t, c).x0 - model.predict(x, t).x0).abs().max() > 1e-3


@each_case
@pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "cosine", "edm"])
def test_the_parametrisation_does_not_matter(name, path):
    "Whatever the network predicts, the same pair comes out."
    case = CASES[name]
    if case.exact:
        pytest.skip("an exact model has no parametrisation")
    reference, x, t, c = setting(case, path)
    expected = case.make(reference, 2.5).predict(x, t, c)
    for prediction in PREDICTIONS:
        model = NetworkDenoiser(Encoded(reference, prediction), path, 3, prediction)
        assert_close(case.make(model, 2.5).predict(x, t, c), expected, rtol=1e-7, atol=1e-7)


@each_case
def test_the_path_matters_to_velocities_only(name):
    "G(model on another path) is G(model) on another path, unless the method looks at the velocity."
    case = CASES[name]
    if case.exact:
        pytest.skip("its classifier lives on one path")
    model, x, t, c = setting(case)
    gap = 0.0
    for path in PATHS[1:]:
        there, s = change_path(x, t, PATHS[0], path)
        one = case.make(OnPath(model, path), 2.5).predict(there, s, c)
        other = OnPath(case.make(model, 2.5), path).predict(there, s, c)
        if case.claims.space != "velocity":
            assert_close(Prediction(*one), Prediction(*other), rtol=1e-8, atol=1e-8)
        gap = max(gap, (one.x0 - other.x0).abs().max().item())
    assert case.claims.space != "velocity" or gap > 1e-3


@each_case
def test_the_pair_is_consistent(name):
    "x = alpha x0 + sigma eps, unless the method says otherwise."
    case = CASES[name]
    for path in PATHS:
        model, x, t, c = setting(case, path)
        pair = case.make(model, 2.5).predict(x, t, c)
        back = expand_time(path.alpha(t), x) * pair.x0 + expand_time(path.sigma(t), x) * pair.eps
        size = (back - x).abs().max() / x.abs().max()
        assert size < 1e-9 if case.claims.consistent else size > 1e-3


@each_case
def test_all_channels_are_guided(name):
    case = CASES[name]
    model, x, t, c = setting(case)
    moved = case.make(model, 3.0).predict(x, t, c).x0 - model.predict(x, t, c).x0
    assert (moved.transpose(0, 1).flatten(1).abs().amax(1) > 1e-4).all()


@each_case
def test_rows_are_as_declared(name):
    "And outside the interval one row each, nothing of the method evaluated."
    case = CASES[name]
    model, x, t, c = setting(case)
    declared = case.claims.nfe
    if not declared:  # it varies: at least a pair, more for some samples than for others, the same every time
        declared = nfe_of(case.make(model, 3.0), x, t, c) / len(x)
        alone = {nfe_of(case.make(model, 3.0), x[i : i + 1], t[i : i + 1], c[i : i + 1]) for i in range(len(x))}
        assert declared > 2 and min(alone) >= 2 and len(alone) > 1
    assert nfe_of(case.make(model, 3.0), x, t, c) == declared * len(x)
    for options in ({"batching": "batched"}, {"batching": "sequential"}) if case.batching else ({},):
        guided = case.make(model, 3.0, interval=(0.3, 0.7), **options)
        inside = ((t >= 0.3) & (t <= 0.7)).sum().item()
        if case.claims.nfe:
            assert nfe_of(guided, x, t, c) == len(x) + (declared - 1) * inside
        else:
            assert nfe_of(guided, x, t, c) > len(x) + inside
        assert nfe_of(guided, x, torch.tensor(0.71), c) == len(x)
        assert_close(guided.predict(x, torch.tensor(0.29), c), model.predict(x, torch.tensor(0.29), c), **TIGHT)


class Spy(Denoiser):
    "Remembers the times at which it was asked without a condition."

    def __init__(self, model: Denoiser):
        super().__init__(model.path, model.num_classes)
        self.model, self.unconditional = model, []

    def forward(self, x, t, c=None):
        if c is None:
            self.unconditional += torch.as_tensor(t).expand(len(x)).tolist()
        return self.model.predict(x, t, c)


@each_case
def test_nothing_is_evaluated_outside_the_interval(name):
    case = CASES[name]
    model, x, t, c = setting(case)
    spy = Spy(model)
    case.make(spy, 3.0, interval=(0.3, 0.7)).predict(x, t, c)
    assert all(0.3 <= time <= 0.7 for time in spy.unconditional)


@each_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_precision_and_device_are_kept(name, dtype):
    case = CASES[name]
    model, x, t, c = setting(case)
    model = model.to(dtype)
    pair = case.make(model, 2.5).predict(x.to(dtype), t, c)
    assert (pair.x0.dtype, pair.eps.dtype, pair.x0.device) == (dtype, dtype, x.device)
    assert pair.x0.shape == x.shape and all(part.isfinite().all() for part in pair)
    if not case.exact:
        for end in (0.0, 1.0):  # the ends of the path are no exception
            pair = case.make(model, 2.5).predict(x.to(dtype), torch.tensor(end), c)
            assert all(part.isfinite().all() for part in pair)


@each_case
def test_gradients_flow(name):
    case = CASES[name]
    if case.exact:
        pytest.skip("a classifier's gradient is taken once, not twice")
    model, x, t, c = setting(case)
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(case.make(model, 2.5).predict(x, t, c).x0.square().sum(), x)
    assert gradient.isfinite().all() and (gradient.flatten(1).norm(dim=1) > 0).all()
    direction, step = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype), 1e-6
    value = lambda x: case.make(model, 2.5).predict(x, t, c).x0.square().sum()  # noqa: E731
    with torch.no_grad():
        slope = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert_close((gradient * direction).sum(), slope, rtol=1e-4, atol=1e-4)


@each_case
@pytest.mark.parametrize("sampler", ["ddim", "heun", "euler_maruyama"])
def test_composes_with_every_sampler(name, sampler):
    "Finite, the same twice with the same object, and the same in batches of any size."
    case = CASES[name]
    model, x, _, c = setting(case, n=3 if sampler == "dopri5" else 9)
    guided = case.make(model, 1.5)
    draw = partial(sample, guided, c, tuple(x.shape[1:]), sampler, 5, progress=False, dtype=torch.float64)
    if case.step_only and sampler not in ("ddim", "ddpm"):
        with pytest.raises(ValueError, match="allowed"):
            draw()
        return
    first = draw()
    assert first.isfinite().all() and torch.equal(draw(), first)
    if sampler != "dopri5":  # which chooses its steps by the error of the whole batch
        for size in (1, 4):
            assert_close(draw(batch_size=size), first, rtol=0, atol=1e-6)


@each_case
def test_composes_with_postprocessing(name):
    "Samples of a guided model can be corrected, with the labels they were drawn for, each on its own."
    case = CASES[name]
    model, x, _, c = setting(case)
    samples = sample(case.make(model, 1.5), c, tuple(x.shape[1:]), "ddim", 4, progress=False, dtype=torch.float64)
    samples = samples.float()
    correction = FlowPostprocessor(tuple(x.shape[1:]), 3, width=16, depth=1)
    for parameter in correction.parameters():
        torch.nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(2))
    corrected = correction(samples, c)
    assert corrected.shape == samples.shape and corrected.isfinite().all()
    assert (corrected - samples).abs().max() > 1e-4
    assert_close(correction(samples[2:4], c[2:4]), corrected[2:4], rtol=1e-4, atol=1e-4)


@each_case
def test_rows_do_not_mix(name):
    "Each row of a batch gets what it would get alone."
    case = CASES[name]
    model, x, t, c = setting(case)
    together = case.make(model, 2.5).predict(x, t, c)
    for i in range(len(x)):
        alone = case.make(model, 2.5).predict(x[i : i + 1], t[i : i + 1], c[i : i + 1])
        assert_close((together.x0[i], together.eps[i]), (alone.x0[0], alone.eps[0]), rtol=1e-6, atol=1e-6)


@each_case
def test_no_condition_means_no_guidance(name):
    case = CASES[name]
    model, x, t, _ = setting(case)
    if case.claims.needs_condition:
        guided = case.make(model, 3.0)
        assert_close(guided.predict(x, t), model.predict(x, t), **TIGHT)
        assert nfe_of(guided, x, t) == len(x)


@each_case
def test_nests_in_another_guidance_and_on_another_path(name):
    "A guided model is a model: it can be moved to another path, and wrapped again at scale 1 without a change."
    case = CASES[name]
    model, x, t, c = setting(case)
    guided = case.make(model, 2.5)
    expected = guided.predict(x, t, c)
    if case.step_only:
        with pytest.raises(ValueError, match="allowed: a model with a velocity"):
            ClassifierFreeGuidance(guided, 1.0)
    else:
        assert_close(ClassifierFreeGuidance(guided, 1.0).predict(x, t, c), expected, rtol=1e-9, atol=1e-9)
    there, s = change_path(x, t, model.path, EDMPath())
    moved = OnPath(case.make(model, 2.5), EDMPath()).predict(there, s, c)
    assert_close(Prediction(*moved), Prediction(*expected), rtol=1e-7, atol=1e-7)


def modes(model: nn.Module) -> list[bool]:
    return [part.training for part in model.modules()]


class Fragile(Denoiser):
    "A model that breaks at low times, or is told to."

    def __init__(self, model: Denoiser):
        super().__init__(model.path, model.num_classes)
        self.model, self.broken, self.asked = model, False, []

    def forward(self, x, t, c=None):
        self.asked.append(self.model.training)
        if self.broken:
            raise RuntimeError("broken")
        return self.model(x, t, c)


@each_case
def test_the_training_mode_is_kept(name):
    "Sampling asks the model in evaluation mode, and leaves every part in the mode it had, also after an error."
    case = CASES[name]
    model, x, _, c = setting(case)
    inner = Fragile(model)
    guided = case.make(inner, 1.5)
    guided.train()
    model.eval()
    for part in (guided, inner):
        part.training = True
    before = modes(guided)
    draw = partial(sample, guided, c, tuple(x.shape[1:]), "ddim", 3, progress=False, dtype=torch.float64)
    draw()
    assert modes(guided) == before and inner.asked and not any(inner.asked)
    inner.broken = True
    with pytest.raises(RuntimeError, match="broken"):
        draw()
    assert modes(guided) == before
    inner.broken = False
    guided(x, torch.tensor(0.5), c)
    assert modes(guided) == before


@each_case
def test_works_in_inference_mode(name):
    "Also where gradients are asked for, and with the same result."
    case = CASES[name]
    model, x, t, c = setting(case)
    guided = case.make(model, 2.5)
    with torch.inference_mode():
        pair = guided(x.clone(), t.clone(), c.clone())
        drawn = sample(guided, c.clone(), tuple(x.shape[1:]), "ddim", 3, progress=False)
    assert_close(pair, guided(x, t, c), rtol=1e-12, atol=1e-12)
    assert_close(drawn, sample(guided, c, tuple(x.shape[1:]), "ddim", 3, progress=False))


class Halved(Denoiser):
    "A model whose predictions have the precision of the state, as networks in 16 bits give them."

    def __init__(self, model: Denoiser):
        super().__init__(model.path, model.num_classes)
        self.model = model

    def forward(self, x, t, c=None):
        pair = self.model(x.double(), t, c)
        return Prediction(*(part.to(torch.float16).to(x.dtype) for part in pair))


@each_case
@pytest.mark.parametrize("size", [1.0, 60.0])
def test_half_precision_is_enough(name, size):
    "Predictions in 16 bits give what the same numbers give in 32, however many there are; sums of products overflow."
    case = CASES[name]
    if case.attention:
        pytest.skip("recorded and broken layers belong to the network's own precision")
    model, x, t, c = setting(case)
    x, t = (size * x).half(), torch.full_like(t, 0.25)
    guided = case.make(Halved(model), 2.5)
    ours, expected = guided(x, t, c), guided(x.float(), t, c)
    assert ours.x0.dtype == torch.float16
    for one, other in zip(ours, expected):
        assert one.isfinite().all()
        assert (one.float() - other).abs().max() < 2e-3 * max(1.0, other.abs().max().item())


@each_case
def test_each_sample_has_its_own_scale(name):
    "`[batch]` scales belong to single samples: by themselves, with an interval, in batches, nested, on another path."
    case = CASES[name]
    model, x, t, c = setting(case)
    scales = torch.linspace(0.5, 3.0, len(x), dtype=torch.float64)
    scales[2] = 1.0
    for options in ({}, {"interval": (0.3, 0.7)}):
        together = case.make(model, scales, **options)(x, t, c)
        for i, scale in enumerate(scales.tolist()):
            row = slice(i, i + 1)
            alone = case.make(model, scale, **options)(x[row], t[row], c[row])
            assert_close((together.x0[i], together.eps[i]), (alone.x0[0], alone.eps[0]), rtol=1e-6, atol=1e-6)
    guided = case.make(model, scales, interval=(0.2, 0.8))
    draw = partial(sample, c=c, shape=tuple(x.shape[1:]), sampler="ddim", steps=4, progress=False, dtype=torch.float64)
    whole = draw(guided)
    for size in (1, 4):
        assert_close(draw(guided, batch_size=size), whole, rtol=0, atol=1e-6)
    if not case.step_only:
        assert_close(draw(ClassifierFreeGuidance(guided, 1.0), batch_size=4), whole, rtol=0, atol=1e-6)
    wrapped = OnPath(guided, VPPath("cosine"))
    assert_close(draw(wrapped, batch_size=4), draw(wrapped), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="allowed"):
        case.make(model, scales[:3])(x, t, c)


@each_case
def test_numbers_keep_their_precision(name):
    "A scale is not rounded to 32 bits on the way: a number is as good as a float64 for every sample."
    case = CASES[name]
    model, x, t, c = setting(case)
    number, exact = (case.make(model, s) for s in (2.7, torch.full((len(x),), 2.7, dtype=torch.float64)))
    assert_close(number(x, t, c), exact(x, t, c), rtol=1e-12, atol=1e-12)


@each_case
@pytest.mark.parametrize("steps, first, last", [(10, 0.0, 0.3), (20, 0.1, 0.35), (40, 0.3, 0.7)])
def test_interval_ends_on_the_grid_are_guided(name, steps, first, last):
    "Times of the grid that equal an end up to a rounding are inside."
    case = CASES[name]
    model, x, _, c = setting(case, n=2)
    guided, whole = case.make(model, 2.5, interval=(first, last)), case.make(model, 2.5)
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    for t in times[1:-1]:
        inside = first - 1e-4 < t < last + 1e-4
        for precise in (t, t.float().double()):
            expected = (whole if inside else model)(x, precise, c)
            assert_close(Prediction(*guided(x, precise, c)), Prediction(*expected), **TIGHT)


@each_case
def test_bad_input_is_refused_in_one_line(name):
    case = CASES[name]
    model, x, t, c = setting(case)
    wrong: list[dict] = [{"scale": float("nan")}, {"scale": float("inf")}, {"scale": "3"}]
    wrong += [{"interval": (0.7, 0.3)}, {"interval": (0, 2)}, {"interval": 0.5}]
    if case.batching:
        wrong += [{"batching": "both"}]
    for options in wrong:
        with pytest.raises(ValueError, match=r"^\w+ = .*allowed") as error:
            case.make(model, **{"scale": 2.0, **options})
        assert "\n" not in str(error.value) and next(iter(options)) in str(error.value)
    for arguments in ((x, t, c.float()), (x, t, c + 50), (x, 1.5, c), (x, t[:-1], c)):
        with pytest.raises(ValueError, match="allowed"):
            case.make(model, 2.0).predict(*arguments)
