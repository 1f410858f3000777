"Weaker models, broken networks, noisy conditions and judges, restated in plain torch."

import math

import numpy as np
import pytest
import torch
from page_code import page_code
from torch import nn
from torch.testing import assert_close
from weights import stir

from guidance_nb._modes import swapped
from guidance_nb._random import keyed_noise
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import EMBEDDINGS, Denoiser, OnPath, Prediction, count_nfe
from guidance_nb.images._networks import image_denoiser
from guidance_nb.mixtures import ExactDenoiser, Mixture, gaussian_pair
from guidance_nb.networks import NoisyClassifier, mlp_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.samplers import sample
from guidance_nb.weak_models import (
    CADS,
    Autoguidance,
    DiscriminatorGuidance,
    EmbeddedLabels,
    IndependentConditionGuidance,
    PerturbedAttentionGuidance,
    SelfAttentionGuidance,
    SkipLayerGuidance,
    SmoothedEnergyGuidance,
    _annealing,
    _attention_layers,
    _blurred_queries,
    _gaussian_blur,
    _identity_attention,
    _log_ratio,
    _recorded_attention,
    _skippable_layers,
    _skipped_layers,
    _token_grid,
    annealed_scale,
    widen,
)

PATHS = [FlowPath(), VPPath(), VPPath("cosine"), EDMPath()]
each_path = pytest.mark.parametrize("path", PATHS, ids=["flow", "linear", "cosine", "edm"])
PAGE = page_code("17_weak_models", "mixed_scales", "repairing_scale", "ExactDiscriminator")
BROKEN = {
    "pag": (PerturbedAttentionGuidance, _identity_attention, {}),
    "seg": (SmoothedEnergyGuidance, _blurred_queries, {"sigma": 1.0}),
    "slg": (SkipLayerGuidance, _skipped_layers, {}),
}
each_broken = pytest.mark.parametrize("name", BROKEN)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def stirred(name: str, seed: int = 0, **changes):
    return stir(image_denoiser(name, (1, 8, 8), FlowPath(), 3, **changes).eval(), 0.2, seed).double()


@pytest.fixture(scope="module")
def dit():
    return stirred("dit-s/2", width=16, depth=3, heads=2)


@pytest.fixture(scope="module")
def unet():
    return stirred("unet-tiny", patch=1, widths=(8, 16), attention=(4,), head=4)


@pytest.fixture(params=["dit", "unet"])
def model(request):
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module")
def batch():
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, 1, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0.1, 0.4, 0.6, 0.9], dtype=torch.float64), torch.tensor([0, 1, 2, 1])


# Autoguidance


@each_path
def test_autoguidance_of_two_gaussians_has_a_gaussian_score(path):
    "With precisions: the guided score is -(g / (a^2 v + s^2) + (1 - g) / (a^2 w + s^2)) x."
    v, w, scale = 0.7, 2.3, 1.8
    law = lambda v: ExactDenoiser(Mixture(torch.zeros(1, 2), torch.tensor([v]).double(), torch.tensor([0])), path)  # noqa: E731
    x, t = torch.randn(12, 2, dtype=torch.float64), torch.linspace(0.05, 0.98, 12, dtype=torch.float64)
    a, s = path.alpha(t)[:, None] ** 2, path.sigma(t)[:, None] ** 2
    score = -x * (scale / (a * v + s) + (1 - scale) / (a * w + s))
    assert_close(Autoguidance(law(v), law(w), scale).score(x, t), score, rtol=1e-6, atol=1e-9)


def test_the_variance_law_by_quadrature():
    "d ln V / d tau = g / (v + tau) + (1 - g) / (w + tau) from a large tau, where V = tau."
    v, w, scale = 1.2, 1.8, PAGE.repairing_scale(1.0, 1.2, 1.8)
    y = np.linspace(math.log(1e-9), math.log(1e7), 200_001)  # tau = e^y
    tau = np.exp(y)
    slope = (scale / (v + tau) + (1 - scale) / (w + tau)) * tau
    log_v = math.log(1e7) - np.trapezoid(slope, y)
    assert math.exp(log_v) == pytest.approx(1.0, abs=1e-5)
    assert v**scale * w ** (1 - scale) == pytest.approx(1.0, abs=1e-12)


def test_sampled_autoguidance_repairs_the_width():
    law = lambda v: ExactDenoiser(Mixture(torch.zeros(1, 1), torch.tensor([v]), torch.tensor([0])), FlowPath())  # noqa: E731
    guided = Autoguidance(law(1.5), law(4.0), PAGE.repairing_scale(0.5, 1.5, 4.0))
    end = sample(guided, 1, (1,), steps=200, init=torch.ones(1, 1), progress=False, dtype=torch.float64)
    assert end.item() ** 2 == pytest.approx(0.5, rel=5e-3)


def test_two_scales_and_their_cost(dit, batch):
    x, t, c = batch
    weak = stirred("dit-s/2", 7, width=16, depth=1, heads=2)
    own, null, poor = (m.predict(x, t, k).eps for m, k in ((dit, c), (dit, None), (weak, c)))
    scale, cfg_scale = PAGE.mixed_scales(3.0, 0.75)
    assert (scale, cfg_scale) == (2.5, 1.5)
    guided = Autoguidance(dit, weak, scale, cfg_scale=cfg_scale)
    with count_nfe() as nfe:
        assert_close(guided.predict(x, t, c).eps, 3.0 * own - 0.5 * null - 1.5 * poor)
    assert nfe.total == 12 and guided.claims.nfe == 3 and not guided.claims.conditional_at_one
    assert Autoguidance.claims.nfe == 2 and Autoguidance.claims.conditional_at_one
    for guided, expected in (
        (Autoguidance(dit, weak, 1.0), 4),
        (Autoguidance(dit, weak, 2.0), 8),
        (Autoguidance(dit, weak, 1.0, cfg_scale=2.0), 8),
        (Autoguidance(dit, weak, 2.0, (0.0, 0.5), cfg_scale=2.0), 2 * 3 + 2 * 2),
    ):
        with count_nfe() as nfe:
            guided.predict(x, t, c)
        assert nfe.total == expected
    schedule = Autoguidance(dit, weak, lambda t: 1 + t)
    assert_close(schedule.predict(x, t, c).eps, own + t[:, None, None, None] * (own - poor))


def test_without_a_condition_there_is_no_classifier_free_part(dit, batch):
    x, t, _ = batch
    weak = stirred("dit-s/2", 7, width=16, depth=1, heads=2)
    null, poor = dit.predict(x, t).x0, weak.predict(x, t).x0
    assert_close(Autoguidance(dit, weak, 3.0, cfg_scale=5.0).predict(x, t).x0, 3 * null - 2 * poor)


def test_widen_is_a_convolution():
    full = Mixture(torch.randn(3, 2), torch.eye(2).repeat(3, 1, 1) * 0.3, torch.arange(3), torch.tensor([1.0, 2, 3]))
    for law in (full, gaussian_pair(0.5)):
        wide = widen(law, 0.4)
        assert_close(wide.eigenvalues, law.eigenvalues + 0.16)
        assert_close((wide.means, wide.weights, wide.labels), (law.means, law.weights, law.labels))


# Broken networks


def attend(layer, h, *, identity=False, queries=None, skip=False):
    "A self-attention layer of diffusers in plain torch; maps or tokens."
    tokens = h.flatten(2).transpose(1, 2) if h.ndim == 4 else h
    if layer.group_norm is not None:
        n, groups = tokens.transpose(1, 2), layer.group_norm.num_groups
        grouped = n.reshape(len(n), groups, -1)
        mean, var = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
        n = ((grouped - mean) / (var + layer.group_norm.eps).sqrt()).view(n.shape)
        n = n * layer.group_norm.weight[:, None] + layer.group_norm.bias[:, None]
        tokens = n.transpose(1, 2)
    linear = lambda part, v: v @ part.weight.T + (0 if part.bias is None else part.bias)  # noqa: E731
    q, k, v = (linear(part, tokens) for part in (layer.to_q, layer.to_k, layer.to_v))
    q = q if queries is None else queries(q)
    width = q.shape[-1] // layer.heads
    out = torch.zeros_like(v)
    for head in range(layer.heads):
        cut = slice(head * width, (head + 1) * width)
        scores = torch.einsum("bik,bjk->bij", q[..., cut], k[..., cut]) / math.sqrt(width)
        weights = torch.eye(len(scores[0])).to(scores).expand_as(scores) if identity else scores.softmax(2)
        out[..., cut] = weights @ v[..., cut]
    out = linear(layer.to_out[0], out)
    out = out.transpose(1, 2).reshape(h.shape) if h.ndim == 4 else out
    return out + h if layer.residual_connection else out


def hidden(layer):
    generator = torch.Generator().manual_seed(3)
    shape = (2, 16, 4, 4) if layer.residual_connection else (2, 16, 16)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def test_one_layer_in_plain_torch(model):
    layer = list(_attention_layers(model).values())[-1]
    h = hidden(layer)
    assert_close(layer(h), attend(layer, h))
    last = len(_attention_layers(model)) - 1
    with _identity_attention(model, last):
        assert_close(layer(h), attend(layer, h, identity=True))
    mean = lambda q: q.mean(1, keepdim=True).expand_as(q)  # noqa: E731
    with _blurred_queries(model, last, math.inf):
        assert_close(layer(h), attend(layer, h, queries=mean))
    with _recorded_attention(model, last) as received:
        assert_close(layer(h), attend(layer, h))
    assert_close(received[0].sum(1), torch.full((2,), 16.0).double())
    whole = layer(h)
    for sigma in (0.0, 1e-3, 0.1):
        with _blurred_queries(model, last, sigma):
            assert torch.equal(layer(h), whole)


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.0])
@pytest.mark.parametrize("shape", [(7, 7), (8, 8), (6, 9)])
def test_blur_against_scipy(sigma, shape):
    "`mirror` is reflection that does not repeat the border."
    ndimage = pytest.importorskip("scipy.ndimage")
    image = torch.randn(2, 3, *shape, dtype=torch.float64)
    radius = min(math.ceil(6 * sigma) | 1, min(shape) | 1) // 2
    x = np.arange(-radius, radius + 1)
    kernel = np.exp(-0.5 * (x / sigma) ** 2)
    kernel /= kernel.sum()
    expected = ndimage.correlate1d(image.numpy(), kernel, 2, mode="mirror")
    expected = ndimage.correlate1d(expected, kernel, 3, mode="mirror")
    assert_close(_gaussian_blur(image, sigma), torch.from_numpy(expected))


def test_blur_keeps_the_ends():
    image = torch.randn(2, 3, 8, 8)
    assert torch.equal(_gaussian_blur(image, 0.0), image)
    assert_close(_gaussian_blur(image, math.inf), image.mean((2, 3), keepdim=True).expand_as(image))
    assert_close(_gaussian_blur(torch.ones_like(image), 2.0), torch.ones_like(image))


@each_broken
def test_broken_networks_guide_and_heal(name, model, batch):
    x, t, c = batch
    method, perturb, options = BROKEN[name]
    own, null = model.predict(x, t, c), model.predict(x, t)
    before = {part: dict(vars(part)) for part in model.modules()}
    processors = {part: getattr(part, "processor", None) for part in model.modules()}
    with perturb(model, [0, 1], **options):
        bad, bad_null = model.predict(x, t, c), model.predict(x, t)
    assert (bad.eps - own.eps).abs().max() > 1e-3
    guided = method(model, [0, 1], 3.5, **options)
    for got, (a, b) in ((guided.predict(x, t, c), (own, bad)), (guided.predict(x, t), (null, bad_null))):
        assert_close(got.eps, b.eps + 3.5 * (a.eps - b.eps))
        assert_close(got.x0, b.x0 + 3.5 * (a.x0 - b.x0))
    both = method(model, [0, 1], 3.5, cfg_scale=2.0, **options).predict(x, t, c)
    assert_close(both.x0, null.x0 + 2.0 * (own.x0 - null.x0) + 2.5 * (own.x0 - bad.x0))
    assert_close(method(model, [], 3.5, **options).predict(x, t, c), own, rtol=1e-12, atol=1e-12)
    for part, state in before.items():
        assert vars(part).keys() == state.keys() and getattr(part, "processor", None) is processors[part]
    assert torch.equal(model.predict(x, t, c).x0, own.x0)


@each_broken
def test_an_exception_inside_leaves_the_network_whole(name, dit, batch):
    x, t, c = batch
    _, perturb, options = BROKEN[name]
    own = dit.predict(x, t, c)
    with pytest.raises(ZeroDivisionError), perturb(dit, 1, **options):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), perturb(dit, 0, **options), perturb(dit, 1, **options):
        raise ZeroDivisionError
    assert torch.equal(dit.predict(x, t, c).x0, own.x0)
    assert not any("forward" in vars(part) for part in dit.modules())


def test_what_was_swapped_before_comes_back():
    "Libraries put a `forward` of their own on an instance (accelerate and diffusers do)."
    layer, ours = nn.Linear(2, 2), lambda x: 5 * x
    layer.forward = ours
    with swapped({layer: lambda x: 7 * x}):
        with swapped({layer: lambda x: 9 * x}):
            assert layer(torch.ones(1)).item() == 9
        assert layer(torch.ones(1)).item() == 7
    assert layer.forward is ours


@each_broken
def test_layers_are_named_in_the_error(name, model):
    method, _, options = BROKEN[name]
    found = _skippable_layers(model) if name == "slg" else _attention_layers(model)
    for wrong in (99, -1, "nowhere", [0, "nowhere"]):
        with pytest.raises(ValueError, match=r"^layers = .*allowed: 0 to \d, or part of a name: ") as error:
            method(model, wrong, **options)
        assert all(each in str(error.value) for each in found) and "\n" not in str(error.value)
    with pytest.raises(ValueError, match="no layer is there"):
        method(mlp_denoiser(2, FlowPath()), 0, **options)


def test_layers_by_name_and_number_are_the_same(unet, batch):
    x, t, c = batch
    names = list(_attention_layers(unet))
    number = next(i for i, each in enumerate(names) if "mid_block" in each)
    for method in (PerturbedAttentionGuidance, SkipLayerGuidance):
        one, other = (method(unet, which, 3.0).predict(x, t, c) for which in (number, "mid_block"))
        assert torch.equal(one.x0, other.x0)


def test_skipping_all_blocks_of_a_transformer_leaves_its_ends(dit, batch):
    "Nothing between the patches and the last layer is computed: a block that would raise is not even called."
    x, t, c = batch
    hooks = [block.register_forward_pre_hook(lambda *_: 1 / 0) for block in _skippable_layers(dit).values()]
    with pytest.raises(ZeroDivisionError):
        dit.predict(x, t, c)
    for hook in hooks:
        hook.remove()
    with _skipped_layers(dit, "transformer_blocks"):
        short = dit.output(x, t, c)
    bare = stirred("dit-s/2", width=16, depth=3, heads=2)
    bare.load_state_dict(dit.state_dict())
    bare.net.net.transformer_blocks = nn.ModuleList([_First(bare)])
    assert_close(short, bare.output(x, t, c))


class _First(nn.Module):
    "Keeps the first block's norm, which the network's last layer borrows, and does nothing."

    def __init__(self, model):
        super().__init__()
        self.norm1 = model.net.net.transformer_blocks[0].norm1

    def forward(self, hidden_states, **_):
        return hidden_states


def test_the_guiders_of_diffusers_agree_up_to_the_meaning_of_their_scale():
    "Without classifier-free guidance theirs is our scale, with it ours is one more."
    from diffusers import guiders

    own, null, bad = torch.randn(3, 2, 4, dtype=torch.float64)
    for guider in (
        guiders.PerturbedAttentionGuidance(1.0, 2.5, perturbed_guidance_layers=[0]),
        guiders.SkipLayerGuidance(1.0, 2.5, skip_layer_guidance_layers=[0]),
        guiders.SmoothedEnergyGuidance(1.0, 2.5, seg_guidance_layers=[0]),
    ):
        assert_close(guider.forward(own, None, bad).pred, bad + 2.5 * (own - bad))
    for guider in (
        guiders.PerturbedAttentionGuidance(4.0, 2.5, perturbed_guidance_layers=[0]),
        guiders.SkipLayerGuidance(4.0, 2.5, skip_layer_guidance_layers=[0]),
        guiders.SmoothedEnergyGuidance(4.0, 2.5, seg_guidance_layers=[0]),
    ):
        ours = own + (4.0 - 1) * (own - null) + (3.5 - 1) * (own - bad)
        theirs = guider.forward(own, null, bad)
        assert_close(getattr(theirs, "pred", theirs), ours)


@pytest.mark.parametrize("sides", [(8, 12), (4, 16), (7, 10)], ids=str)
def test_tokens_of_images_that_are_not_square(sides):
    "16 tokens of 4 x 16 pixels are 2 x 8; the blur does not mix what lies far apart, nor miss what lies near."
    patches = tuple(-(-side // 2) for side in sides)
    numbers = torch.arange(math.prod(patches))[None, None]
    assert torch.equal(_token_grid(numbers, sides)[0, 0], numbers.view(patches))
    if sides[0] % 2:
        return  # the small U-Net halves even sides alone
    wide = stir(image_denoiser("unet-tiny", (1, *sides), FlowPath(), 3, **WIDE).eval(), 0.2, 0).double()
    x, t, c = torch.randn(2, 1, *sides).double(), torch.tensor(0.6).double(), torch.tensor([0, 2])
    found = list(_attention_layers(wide).values())
    layer = next(i for i, part in enumerate(found) if sees(wide, part, x, t, c) == math.prod(patches))
    project = found[layer].to_q.forward
    by_hand = lambda h: _gaussian_blur(project(h).mT.unflatten(2, patches), 0.7).flatten(2).mT  # noqa: E731
    with swapped({found[layer].to_q: by_hand}):
        weak = wide.x0(x, t, c)
    assert_close(SmoothedEnergyGuidance(wide, layer, 0.0, sigma=0.7).x0(x, t, c), weak)
    assert (weak - wide.x0(x, t, c)).abs().max() > 1e-4
    assert SelfAttentionGuidance(wide, layer, 3.0).x0(x, t, c).isfinite().all()


WIDE = {"patch": 1, "widths": (8, 16), "attention": (4,), "head": 4}


def sees(model, layer, x, t, c):
    "Number of tokens that a layer is given."
    seen = []
    hook = layer.to_q.register_forward_hook(lambda part, given, out: seen.append(out.shape[1]))
    model.x0(x, t, c)
    hook.remove()
    return seen[0]


# Self-attention guidance


def test_self_attention_guidance_restated(model, batch):
    x, t, c = batch
    layer, caught = _attention_layers(model)[list(_attention_layers(model))[1]], []
    catch = lambda _, args, kwargs: caught.append(args[0] if args else kwargs["hidden_states"])  # noqa: E731
    hook = layer.register_forward_pre_hook(catch, with_kwargs=True)
    own = model.predict(x, t, c)
    hook.remove()
    h = caught[0]
    tokens = h.flatten(2).transpose(1, 2) if h.ndim == 4 else h
    tokens = tokens if layer.group_norm is None else layer.group_norm(tokens.transpose(1, 2)).transpose(1, 2)
    q, k = layer.head_to_batch_dim(layer.to_q(tokens)), layer.head_to_batch_dim(layer.to_k(tokens))
    maps = layer.get_attention_scores(q, k).view(len(x), layer.heads, 16, 16)
    mask = (maps.mean(1).sum(1) > 1.0).double().view(-1, 1, 4, 4)
    mask = mask.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert 0 < mask.mean() < 1
    wide = lambda v: v[:, None, None, None]  # noqa: E731
    blurred = _gaussian_blur(own.x0, 0.8) * mask + own.x0 * (1 - mask)
    bad = model.predict(wide(1 - t) * blurred + wide(t) * own.eps, t, c)
    eps = bad.eps + 1.75 * (own.eps - bad.eps)
    got = SelfAttentionGuidance(model, 1, sigma=0.8).predict(x, t, c)
    assert_close(got.eps, eps)
    assert_close(got.x0, (x - wide(t) * eps) / wide(1 - t))
    with count_nfe() as nfe:
        SelfAttentionGuidance(model, 1, sigma=0.8, cfg_scale=2.0).predict(x, t, c)
    assert nfe.total == 12


def test_self_attention_guidance_at_the_ends(dit, batch):
    x, _, c = batch
    for path in PATHS:
        moved = SelfAttentionGuidance(OnPath(dit, path), 0, 3.0)
        for end in (0.0, 1.0):
            assert all(part.isfinite().all() for part in moved.predict(x, torch.tensor(end), c))
    with pytest.raises(ValueError, match=r"layer = 'attn1' fits 3 layers; allowed: one"):
        SelfAttentionGuidance(dit, "attn1")
    with pytest.raises(ValueError, match=r"evaluates its network 2 times; allowed: once"):
        SelfAttentionGuidance(ClassifierFreeGuidance(dit, 2.0, batching="sequential"), 0, 3.0).predict(*batch)


# Noisy conditions


def test_the_direction_of_annealing():
    "t = 1 is noise: the condition is gone there, whole near the data, linear between."
    t = torch.tensor([0.0, 0.2, 0.3, 0.45, 0.6, 1.0], dtype=torch.float64)
    assert_close(_annealing(t, (0.2, 0.6)), torch.tensor([1, 1, 0.75, 0.375, 0, 0]).double())
    assert_close(annealed_scale(8.0, (0.2, 0.6))(t), 8 * _annealing(t, (0.2, 0.6)))


def test_the_noisy_question_restated():
    y = torch.randn(5, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    carried = CADS.with_noise(y, seed=9, start=40, draws=2)
    noise = keyed_noise(9, 40, (5, 2, 3, 4), step=2**32 - 1).double()
    assert torch.equal(carried[:, 0], y) and torch.equal(carried[:, 1:], noise)
    t = torch.tensor([0.1, 0.49, 0.51, 0.7, 1.0], dtype=torch.float64)
    cads = CADS(Echo(), 0.6, (0.3, 0.8), 0.7)
    for i in range(5):
        g = min(max((0.8 - t[i].item()) / 0.5, 0), 1)
        n = noise[i, 0 if t[i] < 0.5 else 1]
        raw = math.sqrt(g) * y[i] + 0.6 * math.sqrt(1 - g) * n
        like = (raw - raw.mean()) / raw.std() * y[i].std() + y[i].mean()
        expected = y[i] if g == 1 else 0.7 * like + 0.3 * raw
        assert_close(cads.question(carried, t)[i], expected)


class Echo(Denoiser):
    "A model of embeddings that answers with the sum of its question."

    def __init__(self):
        super().__init__(FlowPath(), EMBEDDINGS)

    def forward(self, x, t, c=None):
        total = torch.zeros(len(x), 1).to(x) if c is None else c.flatten(1).sum(1, keepdim=True)
        return Prediction(0 * x + total, 0 * x + total)


def test_samples_do_not_depend_on_their_batch(dit):
    by_embedding = EmbeddedLabels(dit.float())
    y = by_embedding.embed(torch.arange(6) % 3).detach()
    guided = CADS(ClassifierFreeGuidance(by_embedding, 3.0, (0.1, 0.9)), 0.5)
    draw = lambda c, n, start, size=None: sample(  # noqa: E731
        guided, c, (1, 8, 8), steps=4, seed=2, start=start, batch_size=size, progress=False
    )
    whole = draw(CADS.with_noise(y, seed=2, draws=4), 6, 0)
    assert_close(draw(CADS.with_noise(y, seed=2, draws=4), 6, 0, 1), whole, rtol=1e-4, atol=1e-4)
    assert_close(draw(CADS.with_noise(y[3:5], seed=2, start=3, draws=4), 2, 3), whole[3:5], rtol=1e-4, atol=1e-4)
    assert (draw(CADS.with_noise(y, seed=3, draws=4), 6, 0) - whole).abs().max() > 1e-3
    dit.double()


def test_labels_by_embedding(model, batch):
    x, t, c = batch
    by_embedding = EmbeddedLabels(model)
    assert by_embedding.num_classes == EMBEDDINGS
    assert_close(by_embedding.predict(x, t, by_embedding.embed(c)), model.predict(x, t, c))
    assert_close(by_embedding.predict(x, t), model.predict(x, t))
    for batching in ("batched", "sequential"):
        one = ClassifierFreeGuidance(by_embedding, 3.0, batching=batching).predict(x, t, by_embedding.embed(c))
        assert_close(one, ClassifierFreeGuidance(model, 3.0).predict(x, t, c))
    between = 0.5 * by_embedding.embed(c) + 0.5 * by_embedding.embed((c + 1) % 3)
    assert (by_embedding.predict(x, t, between).x0 - model.predict(x, t, c).x0).abs().max() > 1e-3


# Judges


@each_path
def test_the_optimal_judge_repairs_the_score(path):
    "Both laws single Gaussians: the odds and the scores by hand, without the mixtures' own code."
    m, v, w = 0.4, 0.3, 0.9
    double = lambda *shape, of: torch.full(shape, of, dtype=torch.float64)  # noqa: E731
    real, learned = (
        Mixture(double(2, 1, of=mean), double(2, of=var), torch.arange(2)) for mean, var in ((m, v), (-0.2, w))
    )
    x, t = torch.randn(30, 1, dtype=torch.float64), torch.linspace(0.05, 0.97, 30, dtype=torch.float64)
    a, s = path.alpha(t)[:, None], path.sigma(t)[:, None]
    truth = -(x - a * m) / (a**2 * v + s**2)
    model, judge = ExactDenoiser(learned, path), PAGE.ExactDiscriminator(real, learned, path)
    for c in (None, torch.arange(30) % 2):
        assert_close(DiscriminatorGuidance(model, judge).score(x, t, c), truth, rtol=1e-7, atol=1e-8)
    normal = lambda mean, var: torch.distributions.Normal(a * mean, (a**2 * var + s**2).sqrt()).log_prob(x)[:, 0]  # noqa: E731
    assert_close(_log_ratio(judge, x, t), normal(m, v) - normal(-0.2, w))
    edm = model.predict(x, t)  # D + w sigma^2 grad in EDM's x = x / alpha
    repaired = DiscriminatorGuidance(model, judge, 0.7).predict(x, t)
    gradient = truth + (x + a * 0.2) / (a**2 * w + s**2)
    assert_close(repaired.x0, edm.x0 + 0.7 * (s / a) ** 2 * (a * gradient), rtol=1e-7, atol=1e-7)


def test_judges_and_their_cost():
    model, x, c = mlp_denoiser(2, FlowPath(), 3), torch.randn(6, 2), torch.arange(6) % 3
    one, all_ = NoisyClassifier(2, 2, FlowPath()), NoisyClassifier(2, 6, FlowPath(), seed=1)
    for judge in (one, all_):
        nn.init.normal_(judge.net.read.weight)
        for scale, expected in ((1.0, 12), (0.0, 6)):
            with count_nfe() as nfe, torch.no_grad():
                pair = DiscriminatorGuidance(model, judge, scale).predict(x, 0.4, c)
            assert nfe.total == expected and not pair.x0.requires_grad
    logits = all_(x, 0.4)
    picked = torch.stack([logits[i, 3 + c[i]] - logits[i, c[i]] for i in range(6)])
    assert_close(_log_ratio(all_, x, 0.4, c), picked)
    assert_close(_log_ratio(all_, x, 0.4), logits[:, 3:].exp().sum(1).log() - logits[:, :3].exp().sum(1).log())
    assert_close(_log_ratio(one, x, 0.4, c), one(x, 0.4)[:, 1] - one(x, 0.4)[:, 0])
    early = DiscriminatorGuidance(model, one, 1.0, (0.0, 0.3))
    with count_nfe() as nfe:
        early.predict(x, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]), c)
    assert nfe.total == 9


# Another condition


def test_another_condition_is_uniform_and_depends_on_the_noise_level_alone():
    law = Mixture(torch.randn(5, 2), torch.full((5,), 0.1), torch.arange(5))
    guided = {path: IndependentConditionGuidance(ExactDenoiser(law, path), 3.0) for path in PATHS[:3]}
    flow = torch.linspace(0.001, 0.998, 4000, dtype=torch.float64)
    shifts = guided[PATHS[0]].shift(flow)
    counts = torch.bincount(shifts, minlength=5)
    assert counts.sum() == 4000 and (counts / 4000 - 0.2).abs().max() < 0.12  # three deviations
    for path in PATHS[1:3]:
        same = guided[path].shift(path.time_at(PATHS[0].noise_to_signal(flow))) == shifts
        assert same.double().mean() > 0.995
    other = IndependentConditionGuidance(ExactDenoiser(law, PATHS[0]), 3.0, seed=1).shift(flow)
    assert 0.08 < (other == shifts).double().mean() < 0.32
    model, x, c = guided[PATHS[0]].model, torch.randn(40, 2, dtype=torch.float64), torch.arange(40) % 5
    t = torch.linspace(0.05, 0.95, 40, dtype=torch.float64)
    away = model.eps(x, t, (c + guided[PATHS[0]].shift(t)) % 5)
    assert_close(guided[PATHS[0]].eps(x, t, c), away + 3.0 * (model.eps(x, t, c) - away))


def test_the_uniform_mean_is_not_the_unconditional_score():
    "Mean over the label of the weak branch, against s_u: equal in noise, different near the data."
    law, path = gaussian_pair(1.0), FlowPath()
    x = torch.tensor([[0.8]], dtype=torch.float64)
    for t, low, high in ((0.1, 5.0, math.inf), (0.999, 0.0, 0.02)):
        a, s = 1 - t, t
        var = a * a * 0.05 + s * s
        mean = -x / var
        posterior = torch.sigmoid(2 * a * x / var)
        exact = -(x - a * (2 * posterior - 1)) / var
        assert_close(ExactDenoiser(law, path).score(x, torch.tensor(t).double()), exact)
        assert low <= (mean - exact).abs().item() <= high


BAD = {
    "weak.path, weak.num_classes = (EDMPath": lambda m: Autoguidance(m, OnPath(m, EDMPath()), 2.0),
    "weak.num_classes = (FlowPath(), 2); allowed: (FlowPath(), 3)": lambda m: Autoguidance(
        m, mlp_denoiser(2, FlowPath(), 2), 2.0
    ),
    "scale = nan": lambda m: Autoguidance(m, m, math.nan),
    "scale = inf": lambda m: Autoguidance(m, m, 2.0, cfg_scale=math.inf),
    "interval = (1, 0)": lambda m: Autoguidance(m, m, 2.0, (1, 0)),
    "sigma = nan; allowed: 0 or more": lambda m: SmoothedEnergyGuidance(m, 0, sigma=math.nan),
    "12 tokens; allowed: a square number": lambda m: _tokens_of_no_square(m),
    "model.num_classes = 3; allowed: EMBEDDINGS": lambda m: CADS(m),
    "noise = -1; allowed": lambda m: CADS(Echo(), -1),
    "tau = (0.9, 0.6); allowed": lambda m: CADS(Echo(), tau=(0.9, 0.6)),
    "allowed: [batch, 1 + draws, ...], from with_noise": lambda m: CADS(Echo()).predict(
        torch.zeros(2, 1), 0.5, torch.zeros(2, 3)
    ),
    "label embeddings of model = 0; allowed: one": lambda m: EmbeddedLabels(
        ExactDenoiser(gaussian_pair(), FlowPath())  # type: ignore[arg-type]
    ),
    "c has shape (4, 5); allowed: [batch, 16]": lambda m: EmbeddedLabels(m).predict(
        torch.zeros(4, 1, 8, 8).double(), 0.5, torch.zeros(4, 5).double()
    ),
    "discriminator gives (2, 3); allowed": lambda m: _log_ratio(
        NoisyClassifier(2, 3, FlowPath()), torch.zeros(2, 2), 0.5
    ),
    "model.num_classes = -1; allowed: 2 or more": lambda m: IndependentConditionGuidance(Echo(), 2.0),
}


def _tokens_of_no_square(model):
    with _blurred_queries(model, 0, 1.0):
        _attention_layers(model)["net.net.transformer_blocks.0.attn1"](torch.zeros(1, 12, 16).double())


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_in_one_line(message, dit):
    with pytest.raises(ValueError, match="allowed") as error:
        BAD[message](dit)
    assert message in str(error.value) and "\n" not in str(error.value)
