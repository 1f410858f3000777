"Several conditions and normalized attention, restated in plain torch."

import pytest
import torch
from page_code import page_code
from test_guidance_contract import Attentive, Toy
from torch.testing import assert_close

from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import EMBEDDINGS, Denoiser, NetworkDenoiser, Prediction, count_nfe, record_nfe
from guidance_nb.mixtures import ExactDenoiser, Mixture, log_prob
from guidance_nb.model_guidance import FixedScale
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.several_conditions import ComposedConditions, NormalizedAttentionGuidance, _normalized


def batch(n: int = 6):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 4, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.linspace(0.1, 0.9, n, dtype=torch.float64), torch.arange(n) % 3


@pytest.fixture(scope="module")
def model():
    return NetworkDenoiser(Toy(), FlowPath(), 3, "v")


def asked(model, x, t, k):
    return model(x, t, None if k is None else torch.full((len(x),), k)).eps


@pytest.mark.parametrize("batching", ["batched", "sequential"])
def test_differences_add_up_with_their_weights(model, batching):
    (x, t, c), scale = batch(), 1.6
    e_u, e_2, e_0, e_c = asked(model, x, t, None), asked(model, x, t, 2), asked(model, x, t, 0), model(x, t, c).eps
    guided = ComposedConditions(model, [2, 0], [0.7, -0.4], scale, batching=batching)
    difference = 0.7 * (e_2 - e_u) - 0.4 * (e_0 - e_u)
    with count_nfe() as nfe:
        assert_close(guided.eps(x, t, c), e_u + scale * (e_c - e_u + difference))
    assert nfe.total == 4 * len(x) == guided.claims.nfe * len(x)
    with count_nfe() as nfe:
        assert_close(guided.eps(x, t), e_u + scale * difference)
    assert nfe.total == 3 * len(x)
    away = ComposedConditions(model, scale=scale, away=2, batching=batching)
    with count_nfe() as nfe:
        assert_close(away.eps(x, t, c), e_2 + scale * (e_c - e_2))
    assert nfe.total == 2 * len(x)


def test_classes_may_be_a_tensor(model):
    x, t, c = batch()
    wanted = ComposedConditions(model, [2, 0], [0.7, -0.4], 1.6, away=1)
    given = ComposedConditions(model, torch.tensor([2, 0]), [0.7, -0.4], 1.6, away=torch.tensor(1), interval=(0.3, 0.7))
    assert_close(given.eps(x[2:4], t[2:4], c[2:4]), wanted.eps(x[2:4], t[2:4], c[2:4]))
    assert given(x, t, c).x0.isfinite().all()  # rows are narrowed
    for wrong in (1.5, "two", torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"^condition = .*; allowed: a class, or"):
            ComposedConditions(model, [wrong], [1.0])


def test_a_batch_is_one_pass_of_the_network(model):
    sizes, (x, t, c) = [], batch()
    hook = model.net.register_forward_hook(lambda net, inputs, y: sizes.append(len(y)))
    ComposedConditions(model, [2, 0], [0.7, -0.4], batching="batched")(x, t, c)
    hook.remove()
    assert sizes == [4 * len(x)]


def test_conditions_of_single_samples(model):
    "A list of conditions is narrowed with the batch, by itself and with an interval."
    x, t, c = batch()
    options = {"weights": [0.5], "interval": (0.3, 0.7), "scale": 2.0}
    together = ComposedConditions(model, [2 - c], away=(c + 1) % 3, **options)(x, t, c)
    for i in range(len(x)):
        k = c[i].item()
        alone = ComposedConditions(model, [2 - k], away=(k + 1) % 3, **options)
        pair = alone(x[i : i + 1], t[i : i + 1], c[i : i + 1])
        assert_close((together.x0[i], together.eps[i]), (pair.x0[0], pair.eps[0]))


class Worded(Denoiser):
    "A model of embeddings in a mapping."

    def __init__(self):
        super().__init__(FlowPath(), EMBEDDINGS)

    def forward(self, x, t, c=None):
        record_nfe(len(x))
        words = 0.0 if c is None else c["words"].sum((1, 2))[:, None]
        return Prediction(torch.sin(x + words), x)


def test_embeddings_in_a_mapping():
    x, t, c, no = torch.randn(4, 3), torch.tensor(0.5), torch.randn(4, 2, 5), torch.randn(1, 2, 5)
    guided = ComposedConditions(Worded(), [{"words": no}], [-0.5], 2.0, batching="batched")
    e_u, e_c, e_no = (torch.sin(x + w) for w in (0.0, c.sum((1, 2))[:, None], no.sum()))
    with count_nfe() as nfe:
        x0 = guided.x0(x, t, {"words": c})
    assert_close(x0, e_u + 2.0 * (e_c - e_u - 0.5 * (e_no - e_u)))
    assert nfe.total == 12


def test_scales_of_a_network_that_takes_them_follow_the_batch():
    "Per-sample scales inside the model are repeated with the conditions."
    network = mlp_denoiser(2, FlowPath(), 3, width=16, depth=1, scale_aware=True)
    torch.nn.init.normal_(network.net.read.weight)
    x, t, c, scales = torch.randn(5, 2), torch.rand(5), torch.arange(5) % 3, torch.linspace(1, 3, 5)
    together = ComposedConditions(FixedScale(network, scales), away=2, scale=1.5, batching="batched")(x, t, c)
    for i in range(5):
        own = FixedScale(network, scales[i].item())
        alone = ComposedConditions(own, away=2, scale=1.5)(x[i : i + 1], t[i : i + 1], c[i : i + 1])
        assert_close(together.x0[i], alone.x0[0])


def test_the_product_is_the_product():
    product_of = page_code("27_several_conditions", "product_of").product_of
    generator = torch.Generator().manual_seed(2)
    root = torch.randn(4, 2, 2, generator=generator, dtype=torch.float64)
    means = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    covariances = root @ root.mT + torch.eye(2)
    experts = Mixture(means[:3], covariances[:3], torch.arange(3))
    base = Mixture(means[3:], 9 * covariances[3:], torch.tensor([0]))
    x, weights = torch.randn(30, 2, generator=generator, dtype=torch.float64), [1.0, 0.5, -0.2]
    ratios = [log_prob(experts, x, torch.full((30,), k)) - log_prob(base, x) for k in range(3)]
    gap = log_prob(product_of(experts, weights, base), x) - log_prob(base, x)
    gap = gap - sum(w * r for w, r in zip(weights, ratios))
    assert_close(gap, gap[0].expand(30))
    with pytest.raises(ValueError, match=r"^eigenvalue of covariances = .*allowed"):
        product_of(experts, [-30.0, 0.1, 0.1], base)


# Normalized attention


def test_lengths_are_limited_token_by_token():
    generator = torch.Generator().manual_seed(3)
    positive, noise = torch.randn(2, 4, 6, 5, generator=generator)
    negative = positive + 0.1 * noise
    z = _normalized(positive, negative, 8.0, 1.5, 1.0)
    moved = 8.0 * positive - 7.0 * negative
    ratio = moved.abs().sum(-1) / positive.abs().sum(-1)
    assert (ratio > 1.5).any() and (ratio < 1.5).any()
    assert_close(z.abs().sum(-1) / positive.abs().sum(-1), ratio.clamp(max=1.5))
    assert_close(z / z.norm(dim=-1, keepdim=True), moved / moved.norm(dim=-1, keepdim=True))
    assert_close(_normalized(positive, negative, 8.0, 1.5, 0.0), positive)
    zero = torch.zeros(1, 1, 5)
    assert _normalized(zero, zero, 8.0, 1.5, 0.5).equal(zero)


def test_every_sample_may_go_away_from_a_condition_of_its_own():
    "In batches of 3 and 3 as in one of 6, and as with the one class that a sample has."
    (x, t, c), model = batch(), NetworkDenoiser(Attentive(), FlowPath(), 3, "v")
    guided = NormalizedAttentionGuidance(model, 2 - c, "mixer", 3.0, tau=1.1, alpha=0.5)
    whole = guided.eps(x, t, c)
    parts = [guided.for_rows(rows).eps(x[rows], t[rows], c[rows]) for rows in (slice(0, 3), slice(3, 6))]
    assert_close(torch.cat(parts), whole)
    for k in range(3):
        alone = NormalizedAttentionGuidance(model, k, "mixer", 3.0, tau=1.1, alpha=0.5)
        assert alone.for_rows(slice(0, 2)) is alone
        assert_close(alone.eps(x, t, c)[2 - c == k], whole[2 - c == k])


def test_layers_are_left_as_they_were():
    "Also after an error, and the negative half passes through the layer unchanged."
    model = NetworkDenoiser(Attentive(), FlowPath(), 3, "v")
    (x, t, c), layer = batch(), model.net.mixer
    guided = NormalizedAttentionGuidance(model, 2, "mixer", 3.0, tau=1.1, alpha=0.5)
    plain, seen = model(x, t, c), []
    hook = layer.register_forward_hook(lambda part, inputs, y: seen.append(y))
    guided(x, t, c)
    model(x, t, torch.full((6,), 2))
    hook.remove()
    assert_close(seen[0][6:], seen[1])
    with pytest.raises(ValueError, match="allowed"):
        guided(x, t, c.float())
    assert "forward" not in vars(layer.to_out[0])
    assert_close(model(x, t, c), plain)


def test_bad_input_is_one_line(model):
    x, t, c = batch()
    for options, found in (
        ({"others": [1]}, r"^weights = \(\); allowed"),
        ({"others": [1], "weights": [0.0]}, r"^weights = 0.0; allowed"),
    ):
        with pytest.raises(ValueError, match=found):
            ComposedConditions(model, **options)
    with pytest.raises(ValueError, match="contains 9; allowed: 0 to 2"):
        ComposedConditions(model, [9], [1.0])(x, t, c)
    with pytest.raises(ValueError, match="no layer is there"):
        NormalizedAttentionGuidance(model, 2, 0)
    attentive = NetworkDenoiser(Attentive(), FlowPath(), 3, "v")
    twice = ClassifierFreeGuidance(attentive, 2.0, batching="batched")
    with pytest.raises(ValueError, match=r"^rows in a layer = 24; allowed: 12, one evaluation"):
        NormalizedAttentionGuidance(twice, 2, 0)(x, t, c)
    for options in ({"tau": 0.5}, {"alpha": 1.5}):
        with pytest.raises(ValueError, match=r"^(tau|alpha) = .*allowed"):
            NormalizedAttentionGuidance(attentive, 2, 0, **options)


def test_an_exact_mixture_is_composed_too():
    law = Mixture(torch.tensor([[-1.0], [0.0], [1.0]]), torch.full((3,), 0.1), torch.arange(3))
    exact, x, t = ExactDenoiser(law, FlowPath()), torch.randn(7, 1).double(), torch.tensor(0.4).double()
    e = [exact(x, t, None).x0, *(exact(x, t, torch.full((7,), k)).x0 for k in range(3))]
    guided = ComposedConditions(exact, [1, 2], [0.5, -1.0], 1.5)
    expected = e[0] + 1.5 * (e[1] - e[0] + 0.5 * (e[2] - e[0]) - (e[3] - e[0]))
    assert_close(guided.x0(x, t, torch.zeros(7).long()), expected)
