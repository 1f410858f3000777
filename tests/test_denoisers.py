"Parametrisations against the formulas of their papers, guidance in every coordinate, and the contract."

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

from guidance_nb.denoisers import (
    EMBEDDINGS,
    PREDICTIONS,
    NetworkDenoiser,
    OnPath,
    Prediction,
    check_inputs,
    count_nfe,
    guide,
    target_coefficients,
    to_prediction,
)
from guidance_nb.mixtures import ExactDenoiser, gaussian_pair
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.samplers import sample

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
    for number in (float, torch.tensor):
        assert_close(guide(c, u, number(0.0)), u)
        assert_close(guide(c, u, number(1.0)), c)
        assert_close(guide(c, c, number(7.0)), c)


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
        ((torch.zeros(5, 2), 0.5, torch.zeros(4, dtype=torch.long)), "c is torch.int64 (4,)"),
    ],
)
def test_bad_input_is_one_line_that_says_what_is_allowed(arguments, words):
    with pytest.raises(ValueError) as caught:
        check_inputs(*arguments, 3)
    assert words in str(caught.value) and "allowed" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("batching", "shape", "passes"),
    [
        ("auto", (512, 64), 1),
        ("auto", (513, 2), 2),
        ("auto", (41, 1, 28, 28), 1),
        ("auto", (42, 1, 28, 28), 2),
        ("batched", (999, 2), 1),
        ("sequential", (1, 2), 2),
    ],
)
def test_auto_batches_small_batches_alone_on_a_cpu(batching, shape, passes):
    calls = []

    class Net(nn.Module):
        def forward(self, x, time, labels):
            calls.append(len(x))
            return x

    model = NetworkDenoiser(Net(), FlowPath(), 3)
    model.predict_pair(torch.zeros(shape), torch.tensor(0.5), torch.zeros(shape[0], dtype=torch.long), batching)
    assert len(calls) == passes and sum(calls) == 2 * shape[0]


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match="prediction = 'noise'; allowed: 'velocity'"):
        NetworkDenoiser(Spy(), FlowPath(), prediction="noise")
    with pytest.raises(ValueError, match="batching = 'both'"):
        NetworkDenoiser(Spy(), FlowPath(), 3).predict_pair(torch.zeros(1, 1), 0.5, torch.tensor([0]), "both")


def test_a_model_is_called_like_any_module():
    model = mlp_denoiser(2, FlowPath(), num_classes=3, width=8, depth=1)
    x, t, c = torch.randn(4, 2), torch.tensor(0.5), torch.arange(4) % 3
    seen = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output))
    assert_close(model(x, t, c), model.predict(x, t, c))
    assert len(seen) == 2
    assert "path=FlowPath(), num_classes=3" in repr(model)


class Echo(nn.Module):
    "Returns the mean of its embedding in every value."

    def forward(self, x, time, c):
        c = c["text"] if isinstance(c, dict) else c
        return c.flatten(1).mean(1)[:, None].to(x).expand_as(x)


@pytest.mark.parametrize("null", [None, torch.full((1, 2), 7.0)])
@pytest.mark.parametrize("mapping", [False, True])
def test_a_dropped_embedding_is_dropped_whole(null, mapping):
    "Also where the batch is as long as the embedding is wide; as a tensor and in a mapping."
    wrap = (lambda c: None if c is None else {"text": c, "size": c[:, :1]}) if mapping else (lambda c: c)
    model = NetworkDenoiser(Echo(), FlowPath(), EMBEDDINGS, null=wrap(null))
    c, x = wrap(torch.tensor([[3.0, 3.0], [4.0, 4.0]])), torch.zeros(2, 1)
    blank = 0.0 if null is None else 7.0
    assert model.output(x, 0.5, c, drop=torch.tensor([True, False]))[:, 0].tolist() == [blank, 4.0]
    for batching in ("batched", "sequential"):
        conditional, unconditional = model.predict_pair(x, torch.tensor(0.5), c, batching)
        assert_close(unconditional, model.decode(torch.full((2, 1), blank), x, 0.5))
        assert_close(conditional, model.decode(torch.tensor([[3.0], [4.0]]), x, 0.5))
    if null is None:
        with pytest.raises(ValueError, match="null is None; allowed: a null condition"):
            model(x, 0.5)
    else:
        assert_close(model(x, 0.5), model.decode(torch.full((2, 1), 7.0), x, 0.5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_network_of_sixteen_bits_is_asked_in_its_own_precision_and_at_the_exact_time(dtype):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(2, 2)

        def forward(self, x, time, labels):
            self.time = time
            return self.line(x)

    net = Net().to(dtype)
    pair = NetworkDenoiser(net, FlowPath())(torch.randn(3, 2), torch.tensor(0.997, dtype=torch.float64))
    assert pair.x0.dtype == torch.float32 and net.time.dtype == torch.float32
    assert_close(net.time, torch.full((3,), 0.997))
    half = torch.randn(3, 2, dtype=torch.bfloat16)
    NetworkDenoiser(net, FlowPath())(half, torch.tensor(0.997, dtype=torch.float64))
    assert_close(net.time, torch.full((3,), 0.997))


def test_a_network_without_a_null_label_is_told_so():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(10, 2)

        def forward(self, x, time, labels):
            return x + self.table(labels)

    model = NetworkDenoiser(Net(), FlowPath(), 10)
    model(torch.zeros(1, 2), 0.5, torch.tensor([9]))
    with pytest.raises(ValueError, match="allowed: 11 rows, label 10 being the null label"):
        model(torch.zeros(1, 2), 0.5)


@pytest.mark.parametrize("path", [FlowPath(), VPPath("cosine")], ids=repr)
def test_noise_prediction_where_no_signal_is_left_is_warned_of_and_asked_inside(path):
    class Exact(nn.Module):
        "The noise of data N(1, 0), at the time that the network is told."

        def forward(self, x, time, labels):
            self.time = time
            return (x - path.alpha(time)[:, None]) / path.sigma(time)[:, None]

    model = NetworkDenoiser(Exact(), path, prediction="eps")
    with pytest.warns(UserWarning, match="prediction = 'eps' says nothing about data at t = 1"):
        pair = model(torch.randn(5, 1, dtype=torch.float64), f64(1.0))
    assert model.net.time.max() < 1
    assert_close(pair.x0, torch.ones(5, 1, dtype=torch.float64), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("source", [*PATHS, EDMPath(80.0)], ids=repr)
@pytest.mark.parametrize("target", [*PATHS, EDMPath(80.0)], ids=repr)
def test_a_model_on_another_path_answers_at_every_time(source, target):
    "Beyond the noisiest point of its own path it is asked at that point."
    model = OnPath(ExactDenoiser(gaussian_pair(), source), target)
    t = torch.tensor([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0], dtype=torch.float64)
    x = torch.randn(5, 1, dtype=torch.float64) * target.sigma(t)[:, None]
    pair = model(x, t)
    assert all(part.isfinite().all() for part in pair)
    assert_close(target.interpolate(*pair, t), x, rtol=1e-8, atol=1e-8)
    assert sample(model, 40, (1,), "ddim", 20, progress=False).abs().max() < 3


@pytest.mark.parametrize("path", [*PATHS, VPPath("linear", 0.0, 20.0), EDMPath(1348.0)], ids=repr)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.filterwarnings("ignore:prediction = 'eps'")
def test_decoding_is_finite_and_consistent_on_every_path_at_every_time(path, prediction, dtype):
    model = NetworkDenoiser(nn.Identity(), path, prediction=prediction)
    x0, eps = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    t = torch.tensor([0.0, 1e-6, 0.5, 1 - 1e-6, 1.0], dtype=torch.float64)
    x, y = path.interpolate(x0, eps, t).to(dtype), model.target(x0, eps, t).to(dtype)
    pair = model.decode(y, x, t)
    assert all(part.isfinite().all() for part in pair)
    if dtype == torch.float64 and prediction not in ("eps", "x0"):
        assert_close(pair, Prediction(x0, eps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("path", PATHS, ids=repr)
def test_an_edm_network_sees_unit_variance_and_a_quarter_of_the_log_ratio(path):
    "c_in and c_noise of arXiv 2206.00364, of which alpha = 1, on every path."
    generator, t = torch.Generator().manual_seed(0), f64([0.2, 0.5, 0.9]).repeat_interleave(20_000)
    x0, eps = (torch.randn(len(t), 1, dtype=torch.float64, generator=generator) for _ in range(2))
    model = NetworkDenoiser(nn.Identity(), path, prediction="edm", sigma_data=0.7)
    seen, time = model.network_inputs(path.interpolate(0.7 * x0, eps, t), t)
    assert_close(seen.reshape(3, -1).std(1), torch.ones(3, dtype=torch.float64), rtol=0.02, atol=0)
    assert_close(time, path.noise_to_signal(t).log() / 4)
    plain = NetworkDenoiser(nn.Identity(), path, prediction="velocity").network_inputs(x0, t)
    assert_close(plain, (x0, t))
