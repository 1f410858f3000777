"Parametrisations against the formulas of their papers, guidance in every coordinate, and the contract."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from guidance_nb.denoisers import (
    PREDICTIONS,
    NetworkDenoiser,
    Prediction,
    check_inputs,
    choose_batching,
    count_nfe,
    dit_channel_scales,
    guide,
    mg_weight_from_scale,
    scale_from_classifier,
    scale_from_gft,
    scale_from_ho_salimans,
    scale_from_meanflow,
    scale_from_mg_table,
    scale_from_mg_weight,
    target_coefficients,
    to_prediction,
)
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath(5.0)]
numbers = st.floats(-4, 4)


def f64(value):
    return torch.tensor(value, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS, ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@given(t=st.floats(0.01, 0.99), x0=numbers, eps=numbers)
def test_every_parametrisation_decodes_to_what_was_encoded(path, prediction, t, x0, eps):
    t, x0, eps = f64(t), f64([[x0]]), f64([[eps]])
    a, b = target_coefficients(prediction, path, t)
    pair = to_prediction(a * x0 + b * eps, path.interpolate(x0, eps, t), t, path, prediction)
    assert_close(pair, Prediction(x0, eps), rtol=1e-6, atol=1e-6)


@given(t=st.floats(0.02, 0.98), y=numbers, x=numbers)
def test_decoding_restates_each_paper(t, y, x):
    "DDPM, progressive distillation, flow matching and EDM, each in its own words."
    y, x, t = f64([[y]]), f64([[x]]), f64(t)
    vp, flow, edm = VPPath(), FlowPath(), EDMPath()
    bar = vp.alpha(t) ** 2
    assert_close(to_prediction(y, x, t, vp, "eps").x0, (x - (1 - bar).sqrt() * y) / bar.sqrt(), rtol=1e-6, atol=1e-6)
    assert_close(to_prediction(y, x, t, vp, "v").x0, bar.sqrt() * x - (1 - bar).sqrt() * y)
    assert_close(to_prediction(y, x, t, flow, "velocity").x0, x - t * y)
    assert_close(to_prediction(y, x, t, flow, "velocity").eps, x + (1 - t) * y)
    s, d = edm.sigma(t), 0.5
    skip, out = d**2 / (s**2 + d**2), s * d / (s**2 + d**2).sqrt()
    assert_close(to_prediction(y, x, t, edm, "edm").x0, skip * x + out * y)
    assert_close(to_prediction(y, x, t, flow, "velocity").score(flow, t), -((1 - t) * y + x) / t, rtol=1e-8, atol=1e-8)


@given(scale=st.floats(-2, 8))
def test_guidance_is_the_same_in_every_coordinate(scale):
    generator = torch.Generator().manual_seed(0)
    y_c, y_u, x = torch.randn(3, 4, 2, dtype=torch.float64, generator=generator)
    t = torch.linspace(0.1, 0.9, 4, dtype=torch.float64)
    for path in PATHS:
        for name in PREDICTIONS:
            inside = to_prediction(y_u + scale * (y_c - y_u), x, t, path, name)
            outside = guide(*(to_prediction(y, x, t, path, name) for y in (y_c, y_u)), scale)
            assert_close(inside, outside, rtol=1e-7, atol=1e-7)
            assert_close(inside.velocity(path, t), outside.velocity(path, t), rtol=1e-6, atol=1e-6)


def test_guide_at_its_ends():
    c, u = (Prediction(*torch.randn(2, 3, 2)) for _ in range(2))
    assert_close(guide(c, u, 0.0), u)
    assert_close(guide(c, u, 1.0), c)
    assert_close(guide(c, c, 7.0), c)


def test_scale_conversions_are_the_printed_formulas():
    assert scale_from_ho_salimans(3.0) == 4.0
    assert scale_from_classifier(2.5) == 2.5 and scale_from_classifier(2.5, conditional_base=True) == 3.5
    for w, scale in ((0.25, 4 / 3), (0.5, 2.0), (0.75, 4.0)):
        assert_close(scale_from_mg_weight(w), scale)
        assert_close(mg_weight_from_scale(scale), w)
        assert_close(scale_from_mg_table(1 + w), scale)
        assert_close(scale_from_gft(1 - w), scale)
        assert_close(scale_from_meanflow(1.0, w), scale)
    assert dit_channel_scales(1.5).tolist() == [1.5, 1.5, 1.5, 1.0]
    for bad in (1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="allowed: below 1"):
            scale_from_mg_weight(bad)
    with pytest.raises(ValueError, match="allowed: above 0"):
        mg_weight_from_scale(0.0)


class Spy(nn.Module):
    "Returns its label, and remembers the rows that really arrived."

    def __init__(self):
        super().__init__()
        self.rows = 0

    def forward(self, x, time, labels):
        self.rows += len(x)
        return labels[:, None].to(x).expand_as(x) + 0 * time[:, None]


def test_counted_rows_are_the_rows_that_reached_the_network():
    spy = Spy()
    model = NetworkDenoiser(spy, FlowPath(), num_classes=3)
    x, c = torch.randn(7, 2), torch.arange(7) % 3
    with count_nfe() as outer:
        model.predict(x, 0.5, c)
        with count_nfe() as inner:
            for batching in ("batched", "sequential", "auto"):
                model.predict_pair(x, torch.tensor(0.5), c, batching)
        model.predict(x, torch.rand(7))
    assert outer.total == spy.rows == 8 * 7 and inner.total == 6 * 7


def test_batched_and_sequential_pairs_agree_also_with_per_sample_times():
    model = mlp_denoiser(2, VPPath(), num_classes=3, prediction="v", width=16, depth=1)
    nn.init.normal_(model.net.read.weight)
    x, c, t = torch.randn(9, 2), torch.arange(9) % 3, torch.linspace(0.1, 0.9, 9)
    for time in (t, torch.tensor(0.3)):
        assert_close(model.predict_pair(x, time, c, "batched"), model.predict_pair(x, time, c, "sequential"))
        assert_close(model.predict_pair(x, time, c, "batched"), (model.predict(x, time, c), model.predict(x, time)))


def test_drop_marks_single_rows():
    model = NetworkDenoiser(Spy(), FlowPath(), num_classes=5)
    drop = torch.tensor([True, False, True, False])
    assert model.output(torch.zeros(4, 1), 0.5, torch.arange(4), drop=drop)[:, 0].tolist() == [5, 1, 5, 3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((torch.zeros(5, 2), 1.2, None), "t = 1.2; allowed: 0 (data) to 1 (noise)"),
        ((torch.zeros(5, 2), float("nan"), None), "t = nan"),
        ((torch.zeros(5), 0.5, None), "x is torch.float32 (5,)"),
        ((torch.zeros(5, 2, dtype=torch.long), 0.5, None), "x is torch.int64"),
        (([[0.0]], 0.5, None), "x is list"),
        ((torch.zeros(5, 2), torch.rand(5, 1), None), "t has shape (5, 1)"),
        ((torch.zeros(5, 2), 0.5, torch.zeros(5)), "c is torch.float32"),
        ((torch.zeros(5, 2), 0.5, torch.full((5,), -1)), "c contains -1; allowed: 0 to 2"),
        ((torch.zeros(5, 2), 0.5, torch.full((5,), 3)), "c contains 3; allowed: 0 to 2"),
        ((torch.zeros(5, 2), 0.5, torch.zeros(4, dtype=torch.long)), "c has shape (4,)"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_allowed(arguments, words):
    with pytest.raises(ValueError) as caught:
        check_inputs(*arguments, 3)
    assert words in str(caught.value) and "allowed" in str(caught.value) and "\n" not in str(caught.value)


def test_auto_batches_small_batches_alone_on_a_cpu():
    assert choose_batching("auto", torch.zeros(512, 64)) == "batched"
    assert choose_batching("auto", torch.zeros(513, 2)) == "sequential"
    assert choose_batching("auto", torch.zeros(41, 1, 28, 28)) == "batched"
    assert choose_batching("auto", torch.zeros(42, 1, 28, 28)) == "sequential"
    assert choose_batching("batched", torch.zeros(9999, 2)) == "batched"


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="prediction = 'noise'; allowed: 'velocity'"):
        NetworkDenoiser(Spy(), FlowPath(), prediction="noise")
    with pytest.raises(ValueError, match="batching = 'both'"):
        choose_batching("both", torch.zeros(1, 1))
