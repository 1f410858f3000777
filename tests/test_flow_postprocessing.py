"Post-processing restated with sorting, sums and plain NumPy."

import numpy as np
import pytest
import torch
from page_code import page_code
from weights import stir

from guidance_nb.denoisers import count_nfe
from guidance_nb.flow_postprocessing import (
    FlowPostprocessor,
    PairDraws,
    PairLoss,
    _neighbours,
    integrate_flow,
    memorisation_report,
    pair_data,
)
from guidance_nb.images._networks import build_network
from guidance_nb.networks import MLP
from guidance_nb.training import LossContext, train


def brute_force(queries, real, k, labels, real_labels):
    "Indices of the k nearest points of the same class, by sorting every row in NumPy."
    q, r = queries.double().flatten(1).numpy(), real.double().flatten(1).numpy()
    squares = ((q[:, None] - r[None]) ** 2).sum(2)
    squares[labels.numpy()[:, None] != real_labels.numpy()[None]] = np.inf
    return np.argsort(squares, 1, kind="stable")[:, :k]


@pytest.fixture
def clouds():
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(150, 4, generator=g), torch.randn(260, 4, generator=g)
    return x, y, torch.randint(3, (150,), generator=g), torch.randint(3, (260,), generator=g)


@pytest.mark.parametrize("k", [1, 5, 40])
def test_neighbours_are_brute_force(clouds, k):
    x, y, c, d = clouds
    assert (_neighbours(x, y, k, c, d).numpy() == brute_force(x, y, k, c, d)).all()


def test_neighbours_of_images_and_features(clouds):
    x, y, c, d = clouds
    same = _neighbours(x.reshape(150, 1, 2, 2), y.reshape(260, 1, 2, 2), 3, c, d)
    assert torch.equal(same, _neighbours(x, y, 3, c, d))
    first = _neighbours(x, y, 3, c, d, space=lambda z: z[:, :1])
    assert (first.numpy() == brute_force(x[:, :1], y[:, :1], 3, c, d)).all()


def test_one_class_needs_no_labels(clouds):
    x, y, c, d = clouds
    expected = brute_force(x, y, 2, torch.zeros_like(c), torch.zeros_like(d))
    assert (_neighbours(x, y, 2).numpy() == expected).all()


def test_weights_are_counts(clouds):
    x, y, c, d = clouds
    w = np.zeros(260)
    for row in brute_force(x, y, 7, c, d):
        w[row] += 1 / (7 * 150)
    np.testing.assert_allclose(pair_data(x, y, c, d, 7).weights().numpy(), w, atol=1e-12)


def test_weights_by_hand():
    "Cells of lengths 1, 2, 1 on a line of length 4; all real points as neighbours; and one real point."
    effective_sample_size = page_code("14_flow_postprocessing", "effective_sample_size").effective_sample_size
    line = torch.linspace(-1, 1, 4001)[:, None]
    real = torch.tensor([[-1.0], [0.0], [1.0]])
    assert effective_sample_size(line, real, 1) == pytest.approx(16 / 6, rel=1e-3)
    assert effective_sample_size(line, real, 3) == pytest.approx(3, rel=1e-9)
    assert effective_sample_size(line, real[:1], 1) == pytest.approx(1, rel=1e-9)


def test_pairs_share_a_class_and_end_on_neighbours(clouds):
    x, y, c, d = clouds
    found = _neighbours(x, y, 4, c, d)
    pairs, labels = PairDraws(x, y, found, c)(5000, torch.Generator().manual_seed(1))
    start = {tuple(v): i for i, v in enumerate(x.tolist())}
    end = {tuple(v): i for i, v in enumerate(y.tolist())}
    used = set()
    for (a, b), label in zip(pairs.tolist(), labels.tolist()):
        i, j = start[tuple(a)], end[tuple(b)]
        assert c[i] == d[j] == label and j in found[i]
        used.add((i, j))
    assert len(used) > 0.99 * 150 * 4


class Answer(torch.nn.Module):
    "A table of answers in place of a network."

    dropout, spread = torch.tensor(0.0), torch.tensor(1.0)

    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def velocity(self, z, tau, c, drop):
        return self.answer(z, tau)


def test_loss_vanishes_at_the_right_sign_only():
    g = torch.Generator().manual_seed(0)
    start, end = torch.randn(2, 64, 3, generator=g)
    pairs = torch.stack([start, end], 1)
    context = lambda: LossContext(torch.Generator().manual_seed(2), 0, 1, None)  # noqa: E731
    right = PairLoss()(Answer(lambda z, tau: end - start), pairs, None, context())
    printed = PairLoss()(Answer(lambda z, tau: start - end), pairs, None, context())
    assert right.abs().max() < 1e-12
    torch.testing.assert_close(printed, 4 * (end - start).square().mean(1))
    # On its way the point is (1 - tau) start + tau end, so this answer is the target again.
    on_line = PairLoss()(Answer(lambda z, tau: (z - start) / tau[:, None]), pairs, None, context())
    assert on_line.max() < 1e-6


def test_loss_is_least_at_the_neighbour_mean():
    "At tau = 0 the point is x_hat whatever the neighbour: a free vector descends to the mean, and Euler lands there."
    y = torch.tensor([[1.0, 0.0], [0.0, 2.0], [-1.0, 1.0], [9.0, 9.0]])
    x = torch.zeros(1, 2)
    found = _neighbours(x, y, 3)
    v = torch.zeros(2, requires_grad=True)
    everyone = torch.stack([x.expand(3, 2), y[found[0]]], 1)
    optimiser = torch.optim.SGD([v], lr=0.4)
    for _ in range(100):
        context = LossContext(torch.Generator(), 0, 1, None)
        optimiser.zero_grad()
        PairLoss()(Answer(lambda z, tau: v.expand(3, 2)), everyone, None, context).mean().backward()
        optimiser.step()
    landed = integrate_flow(lambda z, tau: v.detach().expand_as(z), x, 1, "euler")
    torch.testing.assert_close(landed[0], y[:3].mean(0), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("sampler", "steps", "evaluations"), [("euler", 7, 7), ("heun", 7, 14)])
def test_evaluations(sampler, steps, evaluations):
    model = FlowPostprocessor(2, 2)
    with count_nfe() as nfe:
        model(torch.zeros(5, 2), torch.zeros(5, dtype=torch.long), steps, sampler)
    assert nfe.total == 5 * evaluations


@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5"])
def test_carry_against_numpy(sampler):
    "A field that depends on z and tau, dz/dtau = tau - z, whose solution is tau - 1 + (z0 + 1) exp(-tau)."
    z0 = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    end = integrate_flow(lambda z, tau: tau[:, None] - z, z0, 2000 if sampler == "euler" else 50, sampler)
    np.testing.assert_allclose(end.numpy(), (z0.numpy() + 1) * np.exp(-1), atol=1e-3)


def test_exact_straight_transport_lands_on_the_nearest_point(clouds):
    "For k = 1 the optimal velocity is (NN(z) - z) / (1 - tau): any number of Euler steps lands on NN(x_hat)."
    x, y, _, _ = clouds
    x, y = x.double(), y.double()
    velocity = lambda z, tau: (y[torch.cdist(z, y).argmin(1)] - z) / (1 - tau)[:, None]  # noqa: E731
    nearest = y[brute_force(x, y, 1, torch.zeros(150), torch.zeros(260))[:, 0]]
    for steps in (1, 2, 9):
        torch.testing.assert_close(integrate_flow(velocity, x, steps, "euler"), nearest)


def test_learned_correction_reaches_the_class_and_repeats():
    g = torch.Generator().manual_seed(0)
    real_c, c = torch.arange(200) % 2, torch.arange(300) % 2
    real = torch.where(real_c == 0, -1.0, 1.0)[:, None] + 0.05 * torch.randn(200, 2, generator=g)
    generated = 0.5 * torch.randn(300, 2, generator=g)
    arguments = {"k": 10, "steps": 200, "batch_size": 128, "lr": 1e-2, "ema": 0.95, "width": 32, "depth": 2}
    post = FlowPostprocessor.fit(generated, real, c, real_c, progress=False, **arguments)
    out = post(generated, c)
    assert (out - torch.where(c == 0, -1.0, 1.0)[:, None]).norm(dim=1).mean() < 0.2
    assert not post.training and not any(p.requires_grad for p in post.parameters())
    again = FlowPostprocessor.fit(generated, real, c, real_c, progress=False, **arguments)
    assert torch.equal(again(generated, c), out)


def test_state_and_own_network_and_images():
    z, c = torch.randn(6, 1, 2, 2), torch.arange(6) % 3
    a, b = FlowPostprocessor((1, 2, 2), 3, seed=0, octaves=2), FlowPostprocessor((1, 2, 2), 3, seed=5, octaves=2)
    torch.nn.init.normal_(a.net.read.weight)
    assert a(z, c).shape == z.shape and not torch.equal(a(z, c), b(z, c))
    b.load_state_dict(a.state_dict())
    assert torch.equal(a(z, c), b(z, c))
    own = FlowPostprocessor((2,), 3, net=MLP(2, 3))
    assert own(torch.zeros(6, 2), c).shape == (6, 2)


def test_guided_correction_is_linear_in_the_scale():
    model = FlowPostprocessor(2, 2, dropout=0.5)
    torch.nn.init.normal_(model.net.read.weight)
    z, tau, c = torch.randn(9, 2), torch.rand(9), torch.arange(9) % 2
    v_c, v_u = model.velocity(z, tau, c), model.velocity(z, tau)
    torch.testing.assert_close(model.guided(z, tau, c, 3.0), 3 * v_c - 2 * v_u)
    assert torch.equal(model.guided(z, tau, c, 1.0), v_c)
    dropped = model.velocity(z, tau, c, drop=torch.arange(9) < 4)
    torch.testing.assert_close(dropped, torch.cat([v_u[:4], v_c[4:]]))


def test_the_unit_of_the_velocity_is_the_size_of_the_displacements():
    g = torch.Generator().manual_seed(0)
    real = torch.randn(50, 2, generator=g)
    generated = real + 0.01 * torch.randn(50, 2, generator=g)
    post = FlowPostprocessor.fit(generated, real, None, k=1, steps=1, batch_size=8, progress=False)
    nearest = real[torch.cdist(generated, real).argmin(1)]
    torch.testing.assert_close(post.spread, (nearest - generated).square().mean().sqrt())
    post.net.read.bias.data = torch.tensor([1.0, 2.0])
    at_rest = post.velocity(generated, torch.zeros(50))
    post.spread.mul_(3)
    torch.testing.assert_close(post.velocity(generated, torch.zeros(50)), 3 * at_rest)


def test_copies_of_real_samples_are_carried_to_their_other_neighbours():
    real = torch.tensor([[0.0], [1.0], [5.0]])
    unit = pair_data(real, real, k=2).displacement()  # 0 and 1, 0 and 1, 0 and 4
    torch.testing.assert_close(unit, torch.tensor(18 / 6).sqrt())


def test_memorisation_report_by_hand():
    training = torch.tensor([[0.0], [10.0]])
    fresh, samples = torch.tensor([[1.0], [11.0], [8.0]]), torch.tensor([[0.05], [10.0], [3.0]])
    report = memorisation_report(samples, training, fresh)
    assert report["nearest"] == pytest.approx(0.05) and report["nearest_fresh"] == 1.0
    assert report["ratio"] == pytest.approx(0.05)
    assert report["copies"] == pytest.approx(2 / 3) and report["copies_fresh"] == 0


def test_bad_input(clouds):
    x, y, c, d = clouds
    few = torch.cat([d[:-1].clamp(max=1), torch.tensor([2])])
    with pytest.raises(ValueError, match="k = 2 with 1 real points in class 2; allowed: 1 to 1"):
        _neighbours(x, y, 2, c, few)
    with pytest.raises(ValueError, match="0 real points in class 2"):
        _neighbours(x, y, 1, c, d.clamp(max=1))
    with pytest.raises(ValueError, match="k = 0"):
        _neighbours(x, y, 0)
    with pytest.raises(ValueError, match="y has 3 values per sample; allowed: 4"):
        _neighbours(x, y[:, :3], 1)
    with pytest.raises(ValueError, match="finite"):
        _neighbours(x, y * float("nan"), 1)
    with pytest.raises(ValueError, match=r"y has shape \(0, 4\); allowed"):
        _neighbours(x, y[:0], 1)
    with pytest.raises(ValueError, match="space = 'dino'"):
        _neighbours(x, y, 1, space="dino")
    with pytest.raises(ValueError, match="allowed: of both or of none"):
        _neighbours(x, y, 1, c)
    with pytest.raises(ValueError, match=r"\[batch\] = \[150\]"):
        _neighbours(x, y, 1, c[:3], d)
    model = FlowPostprocessor(4, 3)
    for samples, labels, message in (
        (x[:, :2], c, r"allowed: floating-point values \[n, \*\[4\]\]"),
        (x, None, r"labels is NoneType; allowed: a LongTensor \[batch\] = \[150\]"),
        (x, c + 5, "allowed: 0 to 2"),
        (x.to(torch.uint8), c, "samples is torch.uint8 .*; allowed: floating-point"),
    ):
        with pytest.raises(ValueError, match=message):
            model(samples, labels)
    with pytest.raises(ValueError, match="labels contains 2; allowed: None, for the model has no classes"):
        FlowPostprocessor(4)(x, c)
    with pytest.raises(ValueError, match="scale = 2; allowed: 1"):
        model(x, c, scale=2)
    with pytest.raises(ValueError, match="sampler = 'rk4'"):
        model(x, c, sampler="rk4")
    with pytest.raises(ValueError, match="steps = 0"):
        model(x, c, steps=0)
    with pytest.raises(ValueError, match="dropout = 2"):
        FlowPostprocessor(4, 3, dropout=2)
    with pytest.raises(ValueError, match=r"shape of a generated sample = \[3\]; allowed: \[4\]"):
        pair_data(x[:, :3], y)


def test_ties_go_to_the_lower_index():
    "A lattice with many copies of every point: most distances are tied, whole numbers, and exact."
    g = torch.Generator().manual_seed(0)
    x, y = torch.randint(3, (90, 2), generator=g).float(), torch.randint(3, (700, 2), generator=g).float()
    for k in (1, 4, 100, 700):
        expected = brute_force(x, y, k, torch.zeros(90), torch.zeros(700))
        assert (_neighbours(x, y, k).numpy() == expected).all()


def test_the_parts_of_fit_are_fit(clouds):
    x, y, c, d = clouds
    arguments = {"steps": 5, "batch_size": 32, "ema": 0.5, "progress": False}
    whole = FlowPostprocessor.fit(x, y, c, d, k=4, width=16, depth=1, seed=3, **arguments)
    pairs = pair_data(x, y, c, d, k=4)
    flow = FlowPostprocessor.from_pairs(pairs, width=16, depth=1, seed=3)
    paired = y[brute_force(x, y, 4, c, d)]
    torch.testing.assert_close(flow.spread, (paired - x[:, None]).square().mean().sqrt())
    parts = train(flow, PairLoss(), pairs, seed=3, **arguments).ema
    for one, other in zip(whole.state_dict().values(), parts.state_dict().values()):
        assert torch.equal(one, other)
    expected = np.bincount(brute_force(x, y, 4, c, d).ravel(), minlength=len(y)) / (4 * len(x))
    np.testing.assert_allclose(pairs.weights().numpy(), expected, atol=1e-12)
    assert FlowPostprocessor.from_pairs(pairs, num_classes=9, width=16).num_classes == 9
    assert pair_data(x, y, c.clamp(max=0), d, k=4).num_classes == 3
    assert pair_data(x, y, k=4).num_classes == 0


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 16)])
def test_image_network_by_name(shape):
    "Batches do not matter, the scale is the caller's, the state rebuilds it, and nothing is clamped."
    model = stir(FlowPostprocessor(shape, 4, net="unet-tiny", dropout=0.1), seed=0)
    g = torch.Generator().manual_seed(1)
    x, c = 2 * torch.randn(7, *shape, generator=g), torch.arange(7) % 4
    with count_nfe() as nfe:
        whole = model(x, c, 3)
    assert nfe.total == 7 * 6 and whole.abs().max() > 1
    torch.testing.assert_close(model(x, c, 3, batch_size=3), whole, atol=1e-4, rtol=1e-4)
    one, three = (model(x, c, 1, "euler", scale) - x for scale in (1.0, 3.0))
    null = model(x, c, 1, "euler", 0.0) - x
    torch.testing.assert_close(three, 3 * one - 2 * null, atol=1e-4, rtol=1e-4)
    assert (one - null).abs().max() > 1e-3
    twin = FlowPostprocessor(shape, 4, net="unet-tiny", seed=9)
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x, c, 3), whole)
    same = FlowPostprocessor(shape, 4, net=build_network("unet-tiny", shape, 4, seed=5))
    for a, b in zip(same.net.parameters(), FlowPostprocessor(shape, 4, net="unet-tiny", seed=5).net.parameters()):
        assert torch.equal(a, b)


def test_images_of_any_origin_without_classes():
    g = torch.Generator().manual_seed(0)
    real, found = torch.rand(40, 1, 8, 8, generator=g) - 0.5, torch.randn(20, 1, 8, 8, generator=g)
    arguments = {"k": 3, "steps": 3, "batch_size": 8, "ema": 0.5, "progress": False}
    post = FlowPostprocessor.fit(found, real, None, net="unet-tiny", dropout=0.1, **arguments)
    assert post.num_classes == 0 and post(found, batch_size=6).shape == found.shape
    assert memorisation_report(found, real, real + 1)["nearest"] > 0


class Halving(torch.nn.Module):
    "Moves everything by 1, half of it if dropout acts, and says how much it is asked for."

    def __init__(self):
        super().__init__()
        self.dropout, self.sizes = torch.nn.Dropout(0.5), []

    def forward(self, z, tau, labels):
        self.sizes.append(len(z))
        assert 0 <= tau.min() and tau.max() <= 1
        return self.dropout(torch.ones_like(z))


@pytest.mark.parametrize("of_samples", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("of_network", [torch.bfloat16, torch.float32, torch.float64])
def test_samples_of_any_precision_are_corrected_in_it(of_samples, of_network):
    "The network is asked in its own precision; the way is followed in that of the samples."
    model = FlowPostprocessor(2, width=8, depth=1)
    stir(model)
    samples = torch.randn(5, 2)
    found, exact = model.to(of_network)(samples.to(of_samples), steps=2), model.float()(samples, steps=2)
    assert found.dtype == of_samples
    torch.testing.assert_close(found.float(), exact, rtol=0.05, atol=0.05)  # ten roundings of bfloat16, 1/256 each


def test_batches_and_modes():
    "Each batch in turn, in evaluation mode; every part keeps the mode it had, also after an error."
    post = FlowPostprocessor((4,), net=Halving())
    post.net.dropout.eval()
    post.net.train()
    x, modes = torch.randn(10, 4), [part.training for part in post.modules()]
    torch.testing.assert_close(post(x, steps=1, sampler="euler", batch_size=4), x + 1)
    assert post.net.sizes == [4, 4, 2] and [part.training for part in post.modules()] == modes
    assert post(x[:0]).shape == (0, 4)
    with pytest.raises(ValueError, match="batch_size = 0"):
        post(x, batch_size=0)
    with pytest.raises(ValueError, match="sampler = 'rk4'"):
        post(x, sampler="rk4")
    assert [part.training for part in post.modules()] == modes


@pytest.mark.parametrize("speed", [1e-8, 1e-3, 1.0, 30.0])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dopri5"])
def test_the_clock_never_leaves_the_unit_interval(sampler, speed):
    "The first step that an adaptive solver tries was 1.77 long where little moves."
    asked = []

    def velocity(z, tau):
        asked.append(tau)
        return speed * torch.cos(tau)[:, None] * torch.ones_like(z)

    end = integrate_flow(velocity, torch.full((3, 2), 5.0, dtype=torch.float64), 200, sampler)
    asked = torch.cat(asked)
    assert asked.min() >= 0 and asked.max() <= 1
    torch.testing.assert_close(end, torch.full_like(end, 5 + speed * np.sin(1)), rtol=1e-3, atol=1e-3 * speed)


def test_report_and_neighbours_in_a_space(clouds):
    "A space and its features, computed beforehand, are the same."
    x, y, _, _ = clouds
    space = lambda z: z[:, :2] ** 3  # noqa: E731
    assert memorisation_report(x, y, y + 1, space) == memorisation_report(space(x), space(y), space(y + 1))
    assert torch.equal(_neighbours(x, y, 5, space=space), _neighbours(space(x), space(y), 5))


def test_bad_input_of_images(clouds):
    x, y, c, d = clouds
    with pytest.raises(ValueError, match="with 1 real points in class 2"):
        pair_data(x, y, c, torch.cat([d[:-1].clamp(max=1), torch.tensor([2])]), k=2)
    with pytest.raises(ValueError, match=r"shape of a generated sample = \[4\]; allowed: \[3\]"):
        pair_data(x, y[:, :3], k=1, space=lambda z: z[:, :2])
    with pytest.raises(ValueError, match=r"samples is torch\.int64 .*; allowed: floating-point"):
        FlowPostprocessor(4)(x.long())
    with pytest.raises(ValueError, match="did you mean 'unet-tiny'"):
        FlowPostprocessor((1, 8, 8), 3, net="unet-tyni")


def test_the_loss_is_in_the_unit_of_the_displacements():
    "A velocity of zero errs by the displacement, whose mean square is one in its own unit."
    real, generated = torch.randn(2, 40, 3, generator=torch.Generator().manual_seed(0))
    pairs = pair_data(generated, 5 * real, k=1)
    model = FlowPostprocessor.from_pairs(pairs, width=8, depth=1)
    ends = torch.stack([generated, pairs.real[pairs.neighbours[:, 0]]], 1)
    loss = PairLoss()(model, ends, None, LossContext(torch.Generator().manual_seed(0), 0, 1, None))
    torch.testing.assert_close(loss.mean(), torch.tensor(1.0))
