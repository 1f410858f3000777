"Networks for images: weights counted by hand, a U-Net walked through by hand, and what a builder must refuse."

import copy
import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from weights import stir

from guidance_nb.images._networks import IMAGE_NETWORKS, ImageClassifier, build_network, image_denoiser
from guidance_nb.networks import MLP, LinearClassifier, NoisyClassifier, fourier_features
from guidance_nb.paths import FlowPath, VPPath

UNETS = [name for name in IMAGE_NETWORKS if name.startswith("unet")]
DITS = [name for name in IMAGE_NETWORKS if name.startswith("dit")]
SMALL = {
    "unet-tiny": {},
    "unet-small": {"widths": (8, 16)},
    "unet-cifar10": {"widths": (16, 16, 32, 32), "head": 8, "dropout": 0.0},
    "dit-s/2": {"width": 32, "depth": 2, "heads": 2},
    "dit-s/4": {"width": 16, "depth": 3, "heads": 4},
}
each_small = pytest.mark.parametrize("name", SMALL)
SHAPE = (3, 32, 32)


def small(name: str, classes: int = 5, scale_aware: bool = False, seed: int = 0) -> nn.Module:
    return build_network(name, SHAPE, classes, scale_aware, seed, **SMALL[name])


def question(n: int = 4, classes: int = 5, shape: tuple = SHAPE) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(2)
    x, t = torch.randn(n, *shape, generator=generator), torch.rand(n, generator=generator)
    return x, t, torch.randint(0, classes + 1, (n,), generator=generator)


def count(net: nn.Module) -> int:
    return sum(weight.numel() for weight in net.parameters())


# Weights, counted by hand


def linear(i: int, o: int) -> int:
    return i * o + o


def conv(i: int, o: int, side: int = 3) -> int:
    return i * o * side**2 + o


def residual(i: int, o: int, film: bool, time: int) -> int:
    shortcut = conv(i, o, 1) if i != o else 0
    return 2 * i + conv(i, o) + linear(time, 2 * o if film else o) + 2 * o + conv(o, o) + shortcut


def attend(width: int) -> int:
    return 2 * width + 4 * linear(width, width)


def unet_weights(shape, classes, widths, blocks, attention, film, patch, **_) -> int:
    "A U-Net as ADM lists it: every map that the way down keeps is joined to one block of the way up."
    channels, first, time = shape[0] * patch**2, widths[0], 4 * widths[0]
    heights = [shape[1] // patch // 2**level for level in range(len(widths))]
    total = linear(first, time) + linear(time, time) + (classes + 1) * time + conv(channels, first)
    kept, width = [first], first
    for level, (wide, height) in enumerate(zip(widths, heights)):
        for _ in range(blocks):
            total += residual(width, wide, film, time) + (attend(wide) if height in attention else 0)
            width = wide
            kept.append(width)
        if level < len(widths) - 1:
            total += conv(width, width)
            kept.append(width)
    total += 2 * residual(width, width, film, time) + (attend(width) if attention else 0)
    for level in reversed(range(len(widths))):
        for _ in range(blocks + 1):
            total += residual(width + kept.pop(), widths[level], film, time)
            total += attend(widths[level]) if heights[level] in attention else 0
            width = widths[level]
        total += conv(width, width) if level else 0
    assert not kept
    return total + 2 * first + conv(first, channels)


def transformer_weights(shape, classes, width, depth, patch, **_) -> int:
    "A DiT: one embedder, then blocks of four projections, a perceptron of fourfold width and six modulations."
    pixels = patch**2 * shape[0]
    block = 4 * linear(width, width) + linear(width, 4 * width) + linear(4 * width, width) + linear(width, 6 * width)
    embedder = linear(256, width) + linear(width, width) + (classes + 1) * width
    return embedder + linear(pixels, width) + depth * block + linear(width, 2 * width) + linear(width, pixels)


@pytest.mark.parametrize("name", IMAGE_NETWORKS)
def test_every_name_has_the_weights_of_its_description(name):
    "On the meta device, where the largest costs nothing."
    formula = unet_weights if name in UNETS else transformer_weights
    for shape, classes in (((1, 32, 32), 10), ((4, 32, 32), 1000)):
        with torch.device("meta"):
            net = build_network(name, shape, classes)
        assert count(net) == formula(shape, classes, **IMAGE_NETWORKS[name])


@pytest.mark.parametrize(
    "changes", [{"film": True}, {"attention": (16,), "head": 4}, {"blocks": 2, "widths": (8, 8, 16)}]
)
def test_a_u_net_is_that_of_diffusers_number_for_number(changes):
    "Names, first weights, outputs and gradients of its `UNet2DModel`."
    from diffusers import UNet2DModel

    settings = {"widths": (8, 16), "blocks": 1, "attention": (), "film": False, "patch": 1, "head": 8} | changes
    net = build_network("unet-tiny", (2, 16, 16), 3, seed=5, **settings)
    widths, attention = settings["widths"], settings["attention"]
    kinds = ["Attn" * (16 // 2**level in attention) for level in range(len(widths))]
    torch.manual_seed(5)
    nn.Embedding(4, 4 * widths[0])  # drawn before
    other = UNet2DModel(
        in_channels=2, out_channels=2, block_out_channels=widths, layers_per_block=settings["blocks"],
        down_block_types=[f"{kind}DownBlock2D" for kind in kinds],
        up_block_types=[f"{kind}UpBlock2D" for kind in reversed(kinds)],
        add_attention=bool(attention), attention_head_dim=settings["head"], norm_num_groups=2, attn_norm_num_groups=2,
        class_embed_type="identity", resnet_time_scale_shift="scale_shift" if settings["film"] else "default",
    ).eval()  # fmt: skip
    ours, theirs = net.net.eval().state_dict(), other.state_dict()
    assert [*ours] == [*theirs]
    assert all(torch.equal(weight, theirs[name]) or not weight.any() for name, weight in ours.items())
    stir(net)
    other.load_state_dict(ours)
    asked = torch.randn(3, 2, 16, 16), 1000 * torch.rand(3), torch.randn(3, 4 * widths[0])
    found = net.net(*asked), other(*asked, return_dict=False)[0]
    assert torch.equal(*found) and found[0].std() > 0.1
    for y in found:
        y.square().sum().backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.net.parameters(), other.parameters()))


def test_film_and_attention_can_be_chosen():
    for changes in ({"film": True}, {"attention": ()}, {"attention": (32, 8)}, {"blocks": 3, "patch": 2}):
        with torch.device("meta"):
            net = build_network("unet-cifar10", SHAPE, 10, **changes)
        assert count(net) == unet_weights(SHAPE, 10, **(IMAGE_NETWORKS["unet-cifar10"] | changes))


def test_a_scale_costs_one_small_perceptron():
    for name, width in (("unet-tiny", 64), ("dit-s/4", 16)):
        extra = count(small(name, scale_aware=True)) - count(small(name))
        assert extra == linear(16, width) + linear(width, width)


# The contract


@each_small
def test_fresh_networks_are_zero_and_repeatable(name):
    state = torch.get_rng_state()
    net, again, other = (small(name, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert net(*question()).abs().max() == 0
    weights, same, different = (list(n.parameters()) for n in (net, again, other))
    assert all(torch.equal(a, b) for a, b in zip(weights, same))
    assert not all(torch.equal(a, b) for a, b in zip(weights, different))


@each_small
def test_copies_and_saved_weights_answer_alike(name):
    net = stir(small(name, scale_aware=True)).eval()
    asked = (*question(), torch.tensor([0.0, 1.0, 2.5, 7.0]))
    copied, loaded = copy.deepcopy(net), small(name, scale_aware=True, seed=9).eval()
    loaded.load_state_dict(net.state_dict())
    assert torch.equal(net(*asked), copied(*asked)) and torch.equal(net(*asked), loaded(*asked))
    stir(copied)
    assert not torch.equal(net(*asked), copied(*asked)) and torch.equal(net(*asked), loaded(*asked))


@each_small
def test_rows_do_not_mix(name):
    "The answer to a row is that to the row alone, in training mode too."
    net = stir(small(name, scale_aware=True)).train().double()
    x, t, c = question()
    x, t, s = x.double(), t.double(), torch.tensor([0.0, 1.0, 2.5, 7.0], dtype=torch.float64)
    whole = net(x, t, c, s)
    alone = [net(*(part[i : i + 1] for part in (x, t, c, s))) for i in range(len(x))]
    assert_close(whole, torch.cat(alone), rtol=1e-6, atol=1e-6)


@each_small
def test_every_weight_is_used(name):
    "No dead embedders, no dead conditioning: each tensor gets a gradient."
    net = stir(small(name, scale_aware=True))
    net(*question(), torch.ones(4)).square().sum().backward()
    assert [key for key, weight in net.named_parameters() if weight.grad is None or not weight.grad.any()] == []


@each_small
def test_log_noise_levels_are_times_too(name):
    "EDM feeds a quarter of the log noise level, which may be negative."
    net = stir(small(name))
    x, _, c = question(1)
    low, high = net(x, torch.tensor([-1.5]), c), net(x, torch.tensor([1.5]), c)
    assert low.isfinite().all() and (low - high).abs().max() > 1e-3


def test_dropout_is_on_in_training_alone():
    for name in ("unet-tiny", "dit-s/4"):
        net = stir(build_network(name, SHAPE, 5, dropout=0.5, **SMALL[name]))
        asked = question()
        assert not torch.equal(net.train()(*asked), net(*asked))
        assert torch.equal(net.eval()(*asked), net(*asked))


def test_a_denoiser_trains_a_step():
    for prediction in ("velocity", "edm"):
        model = image_denoiser("unet-tiny", (1, 28, 28), VPPath(), 10, prediction, scale_aware=True)
        x, t, c = question(8, 9, (1, 28, 28))
        (model.output(x, t, c, scale=2.0) - model.target(x, x.flip(0), t)).square().mean().backward()
        assert model.net.net.conv_out.weight.grad.abs().max() > 0
        assert model.scale_aware and model.prediction == prediction


def test_the_scale_hardly_counts_at_first():
    net = small("dit-s/4", scale_aware=True)
    labels = torch.arange(6)
    assert_close(net.ask(labels, torch.linspace(0, 8, 6)), net.ask(labels), rtol=0, atol=2e-3)
    assert net.ask.scale[2].bias.abs().max() == 0
    assert 1e-4 < net.ask.scale[2].weight.std() < 3e-4


@pytest.mark.parametrize("net", [MLP(2, 5, 8, 1, scale_aware=True), "unet-tiny", "dit-s/4"])
def test_scales_up_to_eight_lie_within_one_slow_period(net):
    "Else scales a whole number apart would look alike."
    if isinstance(net, str):
        net, (x, t, labels) = small(net, scale_aware=True), question(8)
    else:
        x, t, labels = torch.zeros(8, 2), torch.rand(8), torch.arange(8) % 5
    scales, seen = torch.arange(1.0, 9), []
    layer = net.scale if isinstance(net, MLP) else net.ask.scale
    layer.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    net(x, t, labels, scales)
    assert_close(seen[0], fourier_features(scales / 8))
    assert (seen[0][:, 0].diff() < 0).all()  # the slowest cosine falls from scale 0 to scale 8


# Classifiers


def test_the_encoder_is_the_way_down():
    "The same weights in a whole U-Net whose label embedding is zero, caught after the middle."
    for changes in ({}, {"widths": (8, 16), "patch": 2, "blocks": 2}):
        judge = stir(ImageClassifier("unet-tiny", SHAPE, 5, FlowPath(), **changes))
        whole = build_network("unet-tiny", SHAPE, 5, **changes)
        missing = whole.load_state_dict(judge.encoder.state_dict(), strict=False).missing_keys
        assert {key.split(".")[0 if key.startswith("ask") else 1] for key in missing} == {
            "ask", "up_blocks", "conv_norm_out", "conv_out",
        }  # fmt: skip
        nn.init.zeros_(whole.ask.label.weight)
        caught = []
        whole.net.mid_block.register_forward_hook(lambda part, given, h, caught=caught: caught.append(h[0]))
        x, t, c = question()
        factor = (1 - t) / ((1 - t) ** 2 + t**2)
        whole(x * factor[:, None, None, None], t, c)
        groups = math.gcd(32, math.gcd(*changes.get("widths", (16,))) // 4)
        h = nn.functional.group_norm(caught[0], groups, judge.encoder.norm.weight, judge.encoder.norm.bias)
        pooled = nn.functional.silu(h).mean((2, 3))
        assert_close(judge.features(x, t), pooled)
        assert_close(judge(x, t), pooled @ judge.head.weight.T + judge.head.bias)


@pytest.mark.parametrize("name", ["linear", "unet-tiny"])
def test_gradient_of_an_image_classifier(name):
    judge = stir(ImageClassifier(name, (1, 8, 8), 3, VPPath()).double())
    x, t, _ = question(2, 2, (1, 8, 8))
    assert torch.autograd.gradcheck(lambda x: judge(x, t.double()), x.double().requires_grad_(), fast_mode=True)


def test_classifiers_take_states_in_double_precision():
    "Weights in single precision; in single precision not a bit differs from the plain formula."
    x, t = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)), torch.linspace(0.1, 0.9, 6)
    noisy, line = stir(NoisyClassifier(5, 3, FlowPath())), LinearClassifier(5, 3)
    alpha, sigma = FlowPath().alpha(t), FlowPath().sigma(t)
    plain = noisy.net(x * (alpha / (alpha**2 + sigma**2))[:, None], t, torch.zeros(6, dtype=torch.long))
    assert torch.equal(noisy(x, t), plain)
    assert torch.equal(line(x, t), line.net(torch.cat([x, t[:, None]], 1)))
    for judge in (noisy, line):
        assert judge(x.double(), t.double()).dtype == torch.float64
        assert_close(judge(x.double(), t.double()).float(), judge(x, t))
        assert judge(x.double(), 0.5).dtype == torch.float64


# What is refused


@pytest.mark.parametrize(
    ("name", "shape", "changes", "message"),
    [
        ("resnet50", SHAPE, {}, "name = 'resnet50'; allowed: 'unet-tiny', 'unet-small'"),
        ("dit-s2", SHAPE, {}, "did you mean 'dit-s/2'"),
        (
            "unet-mnist",
            SHAPE,
            {"block": 3},
            "'patch', 'widths', 'blocks'; did you mean 'blocks'?",
        ),
        (
            "dit-b/4",
            SHAPE,
            {"widths": (8,)},
            "setting = 'widths'; allowed: 'width', 'depth', 'heads', 'dropout', 'patch'; did you mean 'width'?",
        ),
        ("unet-cifar10", (3, 28, 28), {}, "height and width divisible by 8, for patch 1 and 4 levels"),
        (
            "unet-small",
            (3, 28, 30),
            {},
            "shape = (3, 28, 30); allowed: (channels, height, width), height and width divisible by 4",
        ),
        ("dit-s/8", (1, 28, 28), {}, "divisible by 8, for patch 8"),
        ("dit-s/2", (3, 32, 64), {}, "square"),
        ("dit-s/2", SHAPE, {"width": 30}, "width = 30; allowed: multiples of 4 and of heads = 6"),
        ("dit-s/2", SHAPE, {"heads": 0}, "heads = 0; allowed: a whole number, 1 or more"),
        ("unet-tiny", (32, 32), {}, "shape = (32, 32); allowed: (channels, height, width)"),
        ("unet-tiny", (3, 32.0, 32), {}, "shape = (3, 32.0, 32); allowed: (channels"),
        ("unet-tiny", SHAPE, {"widths": ()}, "widths = (); allowed"),
        ("unet-tiny", SHAPE, {"widths": (10,)}, "multiples of 4"),
        ("unet-tiny", SHAPE, {"attention": (8,)}, "head = 64"),
        ("unet-tiny", SHAPE, {"patch": 0}, "patch = 0"),
        ("unet-tiny", SHAPE, {"blocks": True}, "blocks = True"),
        ("unet-tiny", SHAPE, {"dropout": 1.5}, "dropout = 1.5; allowed: 0 to 1"),
        ("dit-s/2", SHAPE, {"dropout": float("nan")}, "dropout = nan"),
    ],
)
def test_bad_networks_are_refused_in_one_line(name, shape, changes, message):
    with pytest.raises(ValueError) as error:
        build_network(name, shape, 10, **changes)
    assert message in str(error.value) and "\n" not in str(error.value)


@each_small
def test_images_of_another_shape_are_refused(name):
    with pytest.raises(ValueError, match=r"shape of x = \(2, 3, 16, 16\); allowed: \[batch, 3, 32, 32\]"):
        small(name)(torch.zeros(2, 3, 16, 16), torch.zeros(2), torch.zeros(2, dtype=torch.long))


def test_bad_classifiers_are_refused():
    with pytest.raises(ValueError, match="name = 'dit-s/2'; allowed: 'linear', 'unet-tiny'"):
        ImageClassifier("dit-s/2", SHAPE, 10, FlowPath())
    with pytest.raises(ValueError, match="setting = 'widths'"):
        ImageClassifier("linear", SHAPE, 10, FlowPath(), widths=(8,))
    with pytest.raises(ValueError, match="t = 2; allowed"):
        ImageClassifier("linear", SHAPE, 10, FlowPath())(torch.zeros(1, *SHAPE), 2.0)
