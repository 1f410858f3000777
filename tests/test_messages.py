"What the taught modules say to a wrong input: one line that names the argument, its value and what is allowed."

import math
import re
from functools import cache

import pytest
import torch
from torch import nn

from guidance_nb import (
    aligned_loss,
    denoisers,
    editing,
    explorer,
    guidance,
    guidance_variants,
    inversion,
    loss_guidance,
    mixtures,
    model_guidance,
    networks,
    paths,
    plots,
    power_tilt,
    samplers,
    several_conditions,
    trained_guidance,
    training,
    weak_models,
)

NAN = math.nan
FIVE = torch.randn(5, 2)
LABELS = torch.tensor([0, 1, 2, 1, 0])
FLOW = paths.FlowPath()
PAIR = mixtures.gaussian_pair()
MODEL = mixtures.ExactDenoiser(PAIR, FLOW)
TREE = mixtures.fractal(depth=1)
GRID = torch.tensor([0.1, 0.5, 0.9])


class Tell(nn.Module):
    def forward(self, x, time, labels):
        return x * 0


TELL = denoisers.NetworkDenoiser(Tell(), FLOW, num_classes=3)


@cache
def dit():
    from guidance_nb.images._networks import image_denoiser

    return image_denoiser("dit-s/2", (1, 8, 8), FLOW, 3, width=16, depth=3, heads=2)


def one(mean: float, variance: float) -> mixtures.Mixture:
    return mixtures.Mixture(torch.full((1, 1), mean), torch.full((1,), variance), torch.tensor([0]))


def scheduled(scale):
    return guidance_variants.RescaledGuidance(MODEL, scale)(FIVE[:, :1], 0.5, LABELS * 0)


def train(loss, *data, steps: int = 5):
    return training.train(nn.Linear(1, 1), loss, data, steps, 4, progress=False)


FOUNDATIONS = [
    (lambda: paths.check_time(torch.tensor([0.5, 1.5])), "t = 1.5"),
    (lambda: paths.check_time(NAN), "allowed: 0 (data) to 1 (noise)"),
    (lambda: paths.VPPath("sigmoid"), "allowed: 'linear', 'cosine'"),
    (lambda: denoisers.check_inputs(FIVE, 1.5, None, 3), "t = 1.5"),
    (lambda: denoisers.check_inputs(FIVE.long(), 0.5, None, 3), "torch.int64 (5, 2)"),
    (lambda: denoisers.check_inputs(FIVE, torch.rand(4), None, 3), "[batch] = [5]"),
    (lambda: denoisers.check_inputs(FIVE, 0.5, torch.zeros(5), 3), "c is torch.float32"),
    (lambda: denoisers.check_inputs(FIVE, 0.5, LABELS + 1, 3), "c contains 3; allowed: 0 to 2"),
    (lambda: denoisers.check_inputs(FIVE, 0.5, torch.tensor([0]), 3), "c is torch.int64 (1,)"),
    (lambda: denoisers.check_inputs(FIVE, 0.5, torch.zeros(4, 7), denoisers.EMBEDDINGS), "c is torch.float32 (4, 7)"),
    (lambda: denoisers.NetworkDenoiser(Tell(), FLOW, prediction="noise"), "prediction = 'noise'"),
    (lambda: TELL.predict_pair(FIVE, 0.5, LABELS, "both"), "allowed: 'auto', 'batched', 'sequential'"),
    (lambda: MODEL(FIVE[:, :1], 0.0, LABELS), "c contains 2; allowed: 0 to 1"),
    (lambda: MODEL(FIVE, 0.5), "allowed: [batch, 1]"),
    (lambda: mixtures.digits("validation"), "allowed: 'train', 'test', 'all'"),
    (
        lambda: mixtures.ExactDenoiser(mixtures.mixture_of_points(FIVE, LABELS), FLOW)(FIVE, 0.0),
        "data points have no density",
    ),
    (lambda: samplers.time_grid(FLOW, 0), "steps = 0; allowed: a whole number"),
    (lambda: samplers.sample(MODEL, torch.tensor([0, 2]), (1,)), "c contains 2; allowed: 0 to 1"),
    (lambda: samplers.sample(MODEL, 2, (1,), "rk4"), "sampler = 'rk4'; allowed: 'ddim'"),
    (lambda: samplers.sample(MODEL, 2, (1,), times=torch.tensor([1.0, 1.0])), "strictly falling"),
    (lambda: samplers.sample(MODEL, 2, ()), "shape = ()"),
    (lambda: next(training.batches((FIVE[:0], LABELS[:0]), 4, 0, 1)), "samples of data = 0"),
    (lambda: next(training.batches((FIVE, LABELS[:3]), 4, 0, 1)), "labels of data = 3"),
    (lambda: next(training.batches((FIVE * NAN, LABELS), 4, 0, 1)), "finite"),
    (lambda: train(training.DenoisingLoss(), torch.ones(4, 1), None, steps=0), "steps = 0"),
    (lambda: training.DenoisingLoss(dropout=1.5), "dropout = 1.5; allowed: 0 to 1"),
    (lambda: plots.show_points(FIVE, role="unguided"), "role = 'unguided'; allowed: 'data', 'conditional'"),
    (lambda: plots.show_points(torch.zeros(4, 3)), "shape of x = (4, 3); allowed: [n, 1] or [n, 2]"),
]

METHODS = [
    (
        lambda: guidance.shift_prediction(MODEL(FIVE[:, :1], 0.5), FIVE[:, :1], FLOW, GRID[1], "v"),
        "space = 'v'; allowed:",
    ),
    (lambda: scheduled(guidance.linear_schedule(2.0, NAN)), "scale = nan; allowed: a finite number"),
    (lambda: guidance_variants.RescaledGuidance(MODEL, 2.0, phi=1.5), "phi = 1.5; allowed: 0 to 1"),
    (lambda: guidance_variants.CFGZeroStar(MODEL, 2.0, zero_from=0.0), "zero_from = 0.0; allowed: a number above 0"),
    (lambda: guidance_variants.AdaptiveProjectedGuidance(MODEL, norm=0.0), "norm = 0.0; allowed: a number above 0"),
    (lambda: guidance_variants.AdaptiveProjectedGuidance(MODEL, 2.0, eta=NAN), "eta = nan; allowed: a finite number"),
    (lambda: guidance_variants._frequency_bands(FIVE), "x of shape = (5, 2); allowed: images [batch, channels"),
    (
        lambda: guidance_variants.FrequencyDecoupledGuidance(MODEL, 2.0)(FIVE[:, :1], 0.5, LABELS % 2),
        "allowed: images",
    ),
    (lambda: guidance_variants.DynamicThresholding(MODEL, 2.0, quantile=2.0), "quantile = 2.0; allowed: 0 to 1"),
    (lambda: guidance_variants.RatioTable(GRID, torch.ones(2, 3)), "times; allowed: two times or more, rising"),
    (lambda: guidance_variants.RectifiedGuidance(MODEL, 2.0, NAN), "ratios = nan; allowed: a finite number"),
    (lambda: weak_models.Autoguidance(MODEL, nn.Linear(2, 2), 2.0), "weak is a Linear; allowed: a Denoiser"),
    (
        lambda: weak_models.Autoguidance(MODEL, mixtures.ExactDenoiser(PAIR, paths.VPPath()), 2.0),
        "weak.path, weak.num_classes = (VPPath(",
    ),
    (lambda: weak_models.SmoothedEnergyGuidance(networks.mlp_denoiser(2, FLOW), 0), "no layer is there"),
    (lambda: weak_models.PerturbedAttentionGuidance(dit(), 7), "layers = 7; allowed: 0 to 2, or part of a name: net."),
    (lambda: weak_models.SkipLayerGuidance(dit(), "mid"), "layers = 'mid'; allowed: 0 to 2"),
    (lambda: weak_models.SmoothedEnergyGuidance(dit(), 0, sigma=-1.0), "sigma = -1.0; allowed: 0 or more"),
    (lambda: weak_models.SelfAttentionGuidance(dit(), "attn1"), "layer = 'attn1' fits 3 layers; allowed: one"),
    (lambda: weak_models.CADS(dit()), "allowed: EMBEDDINGS"),
    (
        lambda: weak_models.IndependentConditionGuidance(mixtures.ExactDenoiser(one(0.0, 1.0), FLOW)),
        "num_classes = 1",
    ),
    (lambda: power_tilt.CharacteristicGuidance(MODEL, 3.0, iterations=0), "iterations = 0; allowed: a whole"),
    (lambda: power_tilt.CharacteristicGuidance(MODEL, 3.0, tolerance=-1), "tolerance = -1; allowed"),
    (lambda: power_tilt.CharacteristicGuidance(MODEL, 3.0, memory=0.5), "memory = 0.5; allowed"),
    (lambda: power_tilt.CharacteristicGuidance(MODEL, 3.0, span="pixel"), "span = 'pixel'; allowed: 'all'"),
    (lambda: power_tilt.PredictorCorrector(MODEL, -1), "count = -1; allowed: a whole number, 0 or more"),
    (lambda: power_tilt.PredictorCorrector(MODEL, 1, 0.0), "size = 0.0; allowed: a positive, finite number"),
    (lambda: power_tilt.sample_feynman_kac(MODEL, 2, 4, (1,), 3.0), "c contains 2; allowed: 0 to 1"),
    (lambda: power_tilt.sample_feynman_kac(MODEL, 0, 4, (1,), NAN), "scale = nan; allowed: a finite number"),
    (lambda: trained_guidance.MeanFlowGuidanceLoss(kappa=1.0), "kappa = 1.0; allowed: a finite number below 1"),
    (lambda: trained_guidance.MeanFlowGuidanceLoss(NAN), "omega = nan; allowed: a finite number"),
    (lambda: trained_guidance.MeanFlowGuidanceLoss(interval=(0.8, 0.2)), "interval = (0.8, 0.2)"),
    (lambda: trained_guidance.GuidanceFreeTrainingLoss(0), "scale = 0; allowed: a positive, finite number"),
    (lambda: trained_guidance.GuidanceFreeTrainingLoss(scale_range=(0.0, 4.0)), "allowed: None, or (low, high)"),
    (lambda: trained_guidance.GuidedDistillationLoss(MODEL, dropout=1.5), "dropout = 1.5; allowed: 0 to 1"),
    (lambda: trained_guidance.GuidedDistillationLoss("CFG"), "teacher is a str; allowed: a Denoiser"),
]


@pytest.mark.parametrize(("call", "words"), FOUNDATIONS + METHODS, ids=lambda value: value if value is str else None)
def test_a_wrong_input_is_one_line(call, words):
    with pytest.raises((ValueError, TypeError), match=re.escape(words)) as caught:
        call()
    assert "\n" not in str(caught.value)


ASKS = [
    (
        lambda: samplers.sample(MODEL, LABELS % 2, (2,), init=FIVE * NAN),
        "not finite; allowed: a floating-point tensor (5, 2) of",
    ),
    (lambda: editing.image_to_image(MODEL, LABELS % 2, FIVE * NAN), "init is torch.float32 (5, 2), not finite"),
    (lambda: inversion.invert(MODEL, FIVE * NAN), "init is torch.float32 (5, 2), not finite"),
    (lambda: inversion.invert(MODEL, FIVE.tolist()), "x is list; allowed: a floating-point tensor"),
    (lambda: editing.slerp([1.0], FIVE, 0.5), "a is list; allowed: a floating-point tensor"),
    (lambda: editing.slerp(FIVE, FIVE.long(), 0.5), "b is torch.int64; allowed: a floating-point tensor"),
    (lambda: editing.slerp(FIVE, FIVE, NAN), "weight = nan; allowed: a finite number"),
    (lambda: editing.slerp(FIVE, FIVE, "half"), "weight = 'half'; allowed: a finite number"),
    (lambda: several_conditions.NormalizedAttentionGuidance(dit(), 1.5, 0), "condition = 1.5; allowed: a class, or"),
    (lambda: several_conditions.NormalizedAttentionGuidance(dit(), 1, 0.5), "layers = 0.5; allowed: 0 to 2, or part"),
]


@pytest.mark.parametrize(("call", "words"), ASKS, ids=[words.split(";")[0] for _, words in ASKS])
def test_a_wrong_input_of_what_people_ask_for_is_one_line(call, words):
    test_a_wrong_input_is_one_line(call, words)


def test_what_is_not_known_may_be_anything():
    known = torch.where(FIVE > 0, FIVE, NAN)
    filled = editing.inpaint(TELL, LABELS, known, FIVE > 0, 2, steps=2, progress=False)
    assert filled.isfinite().all() and torch.equal(filled[FIVE > 0], FIVE[FIVE > 0])


RAW = {
    "sample": lambda net: samplers.sample(net, LABELS, (2,), progress=False),
    "inpaint": lambda net: editing.inpaint(net, LABELS, FIVE, FIVE > 0),
    "image_to_image": lambda net: editing.image_to_image(net, LABELS, FIVE),
    "invert": lambda net: inversion.invert(net, FIVE, LABELS),
    "guidance": lambda net: guidance.Guidance(net),
    "loss": lambda net: loss_guidance.LossGuidance(net, lambda x0, c: x0.sum(1)),
    "conditions": lambda net: several_conditions.ComposedConditions(net),
    "attention": lambda net: several_conditions.NormalizedAttentionGuidance(net, 0, 0),
    "perturbed": lambda net: weak_models.PerturbedAttentionGuidance(net, 0),
    "CADS": lambda net: weak_models.CADS(net),
    "embedded": lambda net: weak_models.EmbeddedLabels(net),
    "path": lambda net: denoisers.OnPath(net, FLOW),
    "fixed scale": lambda net: model_guidance.FixedScale(net, 2.0),
    "corrector": lambda net: power_tilt.PredictorCorrector(net),
    "particles": lambda net: power_tilt.sample_feynman_kac(net, 0, 4, (2,), 2.0),
    "ratios": lambda net: guidance_variants.estimate_ratios(net, FIVE, LABELS, GRID),
    "teacher": lambda net: trained_guidance.GuidedDistillationLoss(net),
    "loss of training": lambda net: training.train(net, training.DenoisingLoss(), (FIVE, LABELS), 1, 4, progress=False),
    "explorer": lambda net: explorer.explore(model=net),
}


@pytest.mark.parametrize("name", RAW)
def test_a_network_that_is_no_denoiser_is_told_how_to_become_one(name):
    with pytest.raises(ValueError, match=r"^\w+ is a Linear; allowed: a Denoiser: NetworkDenoiser\(net, [^\n]+$"):
        RAW[name](nn.Linear(2, 2))


LOSSES = [aligned_loss.AlignedLoss(2.0), model_guidance.ModelGuidanceLoss(0.5)]


@pytest.mark.parametrize("loss", [*LOSSES, trained_guidance.GuidanceFreeTrainingLoss()], ids=lambda x: type(x).__name__)
def test_a_network_that_is_no_denoiser_is_not_trained_as_one(loss):
    with pytest.raises(ValueError, match=r"^model is a Linear; allowed: a Denoiser: [^\n]+$"):
        train(loss, torch.randn(8, 1), torch.arange(8) % 2)
