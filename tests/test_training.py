"The loop, its randomness and its failures; networks' promises."

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from guidance_nb._random import keyed_generator
from guidance_nb.mixtures import gaussian_pair, sample_mixture
from guidance_nb.networks import LinearClassifier, NoisyClassifier, fourier_features, mlp_denoiser
from guidance_nb.paths import FlowPath, VPPath
from guidance_nb.training import ClassifierLoss, DenoisingLoss, LossContext, batches, fit, train


class Point(nn.Module):
    "One weight, to follow the arithmetic by hand."

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor(0.0))


def to_one(model, x0, c, context):
    return (model.w - x0[:, 0]) ** 2


ONES = (torch.ones(8, 1), None)


def test_adam_ema_and_cosine_by_hand():
    "AdamW's first step is lr in the direction of the gradient; the average and the schedule follow their formulas."
    model, average, m, v = Point(), None, 0.0, 0.0
    w = 0.0
    for n, state in enumerate(fit(model, to_one, ONES, steps=6, batch_size=8, lr=0.1, ema=0.7, progress=False)):
        gradient = 2 * (w - 1)
        m, v = 0.9 * m + 0.1 * gradient, 0.999 * v + 0.001 * gradient**2
        step = 0.1 * 0.5 * (1 + math.cos(math.pi * n / 6))
        w -= step * (m / (1 - 0.9 ** (n + 1))) / (math.sqrt(v / (1 - 0.999 ** (n + 1))) + 1e-8)
        average = w if average is None else 0.7 * average + 0.3 * w
        assert_close(model.w.item(), w, rtol=1e-5, atol=1e-6)
        assert_close(state.ema.w.item(), average, rtol=1e-5, atol=1e-6)


def test_the_average_takes_buffers_as_they_are_and_evaluates():
    "Batch normalisation keeps its statistics in buffers; they belong to the average, which is not in training mode."
    model = Point()
    model.norm, model.drop = nn.BatchNorm1d(1), nn.Dropout(0.5)
    loss = lambda model, x0, c, context: (model.w - model.drop(model.norm(3 + x0))[:, 0]) ** 2  # noqa: E731
    state = train(model, loss, (torch.randn(8, 1), None), 5, 8, 0.1, ema=0.9, progress=False)
    assert model.training and not any(part.training for part in state.ema.modules())
    assert model.norm.running_mean.abs() > 1
    assert_close(state.ema.norm.running_mean, model.norm.running_mean)


def test_a_short_run_by_default_ends_near_its_weights():
    "The default average of 300 steps: it follows the run, where a decay of 0.999 from the start keeps its beginning."
    ends = {}
    for name, options in {"default": {}, "slow": {"ema": 0.999}, "warm": {"ema": 0.9999, "ema_warmup": True}}.items():
        state = train(Point(), to_one, ONES, 300, 8, 0.02, progress=False, **options)
        assert state.model.w.item() == pytest.approx(1, abs=0.01)
        ends[name] = state.ema.w.item()
    assert ends["slow"] < 0.4 and ends["default"] > 0.97 and ends["warm"] > 0.97


def test_the_loop_can_be_left_and_gives_the_same_prefix():
    draw = lambda n, generator: sample_mixture(gaussian_pair(), n, generator)  # noqa: E731
    make = lambda: mlp_denoiser(1, FlowPath(), 2, width=8, depth=1)  # noqa: E731
    run = fit(make(), DenoisingLoss(), draw, steps=10, batch_size=16, schedule="constant", progress=False)
    prefix = [next(run).loss for _ in range(4)]
    whole = [
        s.loss for s in fit(make(), DenoisingLoss(), draw, steps=10, batch_size=16, schedule="constant", progress=False)
    ]
    assert prefix == whole[:4]
    other = [s.loss for s in fit(make(), DenoisingLoss(), draw, 10, 16, schedule="constant", seed=1, progress=False)]
    assert other[0] != whole[0]


def test_every_epoch_visits_each_sample_once():
    x, c = torch.arange(12.0)[:, None], torch.arange(12)
    order = torch.cat([b[1] for b in batches((x, c), 5, seed=0, steps=12)])
    for epoch in range(5):
        assert sorted(order[12 * epoch : 12 * epoch + 12].tolist()) == list(range(12))
    assert order[:12].tolist() != order[12:24].tolist()


def test_keyed_generators_are_unrelated():
    streams = [torch.randn(4000, generator=keyed_generator(0, 0, step)) for step in range(4)]
    correlation = torch.corrcoef(torch.stack(streams)) - torch.eye(4)
    assert correlation.abs().max() < 0.06
    assert torch.equal(torch.randn(5, generator=keyed_generator(3, 1)), torch.randn(5, generator=keyed_generator(3, 1)))


def test_the_plain_loss_is_the_squared_error_to_the_noise():
    model = mlp_denoiser(2, VPPath(), 3, prediction="eps", width=8, depth=1)
    x0, c = torch.randn(50, 2), torch.arange(50) % 3
    context = LossContext(torch.Generator().manual_seed(0), 0, 1, None)
    twin = LossContext(torch.Generator().manual_seed(0), 0, 1, None)
    t, eps = twin.times(x0), twin.noise(x0)
    assert_close(DenoisingLoss()(model, x0, c, context), eps.square().mean(1))  # the untrained model predicts zero
    assert 0 <= t.min() and t.max() <= 1


def test_global_randomness_is_not_touched():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    mlp_denoiser(2, FlowPath(), 2, seed=3), NoisyClassifier(2, 2, FlowPath()), LinearClassifier(2, 2)
    train(Point(), to_one, ONES, 3, 4, progress=False)
    assert torch.equal(before, torch.random.get_rng_state())


def test_classifier_loss_prefers_the_truth():
    class Sure(nn.Module):
        def __init__(self, sign):
            super().__init__()
            self.sign = sign

        def forward(self, x, t):
            return self.sign * 5 * torch.cat([-x, x], 1)

    x0, c = sample_mixture(gaussian_pair(1.0), 200, torch.Generator().manual_seed(0))
    losses = [
        ClassifierLoss(FlowPath())(Sure(s), x0, c, LossContext(torch.Generator().manual_seed(0), 0, 1, None))
        for s in (1, -1)
    ]
    assert losses[0].shape == (200,) and losses[0].mean() < losses[1].mean()


def test_fourier_features_are_sines_of_doubling_frequency():
    t = torch.tensor([0.25])
    expected = [math.cos(math.pi * 2**j / 4) for j in range(8)] + [math.sin(math.pi * 2**j / 4) for j in range(8)]
    assert_close(fourier_features(t)[0], torch.tensor(expected), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (
            lambda: train(Point(), to_one, (torch.ones(0, 1), None), 2, progress=False),
            ValueError,
            "samples of data = 0",
        ),
        (
            lambda: train(Point(), to_one, (torch.full((4, 1), torch.nan), None), 2, progress=False),
            ValueError,
            "finite floating-point",
        ),
        (
            lambda: train(Point(), to_one, (torch.ones(4, 1), torch.zeros(3)), 2, progress=False),
            ValueError,
            "labels of data = 3; allowed: 4",
        ),
        (lambda: train(Point(), to_one, ONES, 0, progress=False), ValueError, "steps = 0"),
        (lambda: train(Point(), to_one, ONES, 2, seed=1.5, progress=False), ValueError, "seed = 1.5"),
        (lambda: train(Point(), to_one, ONES[0], 2, progress=False), ValueError, "data is a Tensor; allowed: tensors"),
        (
            lambda: train(Point(), to_one, (ONES[0].numpy(), None), 2, progress=False),
            ValueError,
            "data is a tuple; allowed: tensors (x, c)",
        ),
        (lambda: train(Point(), to_one, ONES, 2, schedule="linear", progress=False), ValueError, "schedule = 'linear'"),
        (lambda: DenoisingLoss(-0.1), ValueError, "dropout = -0.1; allowed: 0 to 1"),
        (
            lambda: train(Point(), lambda m, *_: m.w * torch.nan, ONES, 2, progress=False),
            FloatingPointError,
            "at step 0",
        ),
    ],
)
def test_bad_input(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
