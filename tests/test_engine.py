"One loop, wherever it runs: engine, passes, precision, average, prefetching, other people's randomness."

import copy
import math
import platform
import sys
import threading
import time
from dataclasses import replace

import pytest
import torch
from engine_cases import STEPS, Shelf, assert_same_weights, case, finish, points, start
from torch import nn
from torch.testing import assert_close
from weights import stir

from guidance_nb._processes import prefetch
from guidance_nb._random import has_dropout, keyed_generator, keyed_global_rng
from guidance_nb.denoisers import NetworkDenoiser
from guidance_nb.engine._checkpoints import read_checkpoint
from guidance_nb.engine._hardware import choose_precision, compile_network
from guidance_nb.engine._run import Engine
from guidance_nb.images._networks import build_network
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import DenoisingLoss, LossContext, batches, fit, learning_rate, train


def plain_loop(model, x, c, steps, batch_size, lr, decay, seed, dropout):
    "What `fit` does, from memory and in the simplest words: data order, loss, AdamW, cosine, average."
    adam = torch.optim.AdamW(model.parameters(), lr, weight_decay=0.0, fused=True)
    cosine = torch.optim.lr_scheduler.LambdaLR(adam, lambda n: 0.5 * (1 + math.cos(math.pi * n / steps)))
    epochs = range(steps * batch_size // len(x) + 1)
    order = torch.cat([torch.randperm(len(x), generator=keyed_generator(seed, 2, epoch)) for epoch in epochs])
    losses, average = [], None
    for step in range(steps):
        rows, generator = order[step * batch_size :][:batch_size], keyed_generator(seed, 0, step)
        t = torch.rand(batch_size, generator=generator)
        eps = torch.randn(batch_size, x.shape[1], generator=generator)
        drop = torch.rand(batch_size, generator=generator) < dropout
        labels = torch.where(drop, torch.tensor(3), c[rows])
        y = model.net((1 - t)[:, None] * x[rows] + t[:, None] * eps, t, labels)
        loss = (y - (-1 * x[rows] + eps)).square().mean(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
        cosine.step()
        losses.append(loss.item())
        weights = [p.detach().clone() for p in model.parameters()]
        average = weights if average is None else [torch.lerp(a, w, 1 - decay) for a, w in zip(average, weights)]
    return losses, weights, average


@pytest.mark.parametrize("engine", [None, Engine(precision="fp32")], ids=["alone", "accelerate"])
def test_bits_are_those_of_a_plain_loop(engine):
    losses, state = finish(start("plain", engine=engine))
    expected = plain_loop(case("plain")[0], *points(), STEPS, 16, 0.01, 0.9, 0, 0.2)
    assert losses == expected[0]
    for model, weights in ((state.model, expected[1]), (state.ema, expected[2])):
        assert all(torch.equal(p, w) for p, w in zip(model.parameters(), weights))


def test_no_engine_no_accelerate(monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)  # importing it fails now
    finish(start("plain"))
    with pytest.raises(ImportError):
        finish(start("plain", engine=Engine()))


@pytest.mark.parametrize("name", ["plain", "fetch", "draw", "teacher", "scales", "contrast", "buffers", "idle"])
@pytest.mark.parametrize("passes", [2, 4])
def test_passes_change_nothing_but_rounding(name, passes):
    whole, one = finish(start(name))
    parts, many = finish(start(name, engine=Engine(precision="fp32", gradient_accumulation_steps=passes)))
    assert_close(parts, whole, rtol=2e-5, atol=2e-6)
    assert_same_weights(many.ema.parameters(), one.ema.parameters())


def test_every_share_draws_its_rows_of_the_whole():
    x = torch.zeros(12, 3)
    draws = lambda context, x: (  # noqa: E731
        context.times(x), context.noise(x), context.drop(x, 0.5), context.integers(x, 2, 9), context.times(x)
    )  # fmt: skip
    whole = draws(LossContext(keyed_generator(1), 0, 1, None), x)
    rows = [slice(0, 6), slice(6, 9), slice(9, 12)]
    shares = [draws(LossContext(keyed_generator(1), 0, 1, None, r, 12), x[r]) for r in rows]
    for n, drawn in enumerate(whole):
        assert torch.equal(drawn, torch.cat([share[n] for share in shares]))


def test_runs_of_different_precision_and_passes_take_turns():
    "Accelerate's state is shared by all its users in a process; runs must not feel each other."
    engines = [
        Engine(precision="bf16"),
        Engine(precision="fp32", gradient_accumulation_steps=2),
        Engine(precision="fp32"),
    ]
    alone = [finish(start("plain", engine=engine))[0] for engine in engines]
    runs = [start("plain", engine=engine) for engine in engines]
    together = [[] for _ in runs]
    for _ in range(STEPS):
        for run, losses in zip(runs, together):
            losses.append(next(run).loss)
    assert together == alone and alone[0] != alone[2]
    assert_close(alone[0], alone[2], rtol=0.05, atol=0.05)


def test_precision():
    assert choose_precision("auto", torch.device("cpu")) in ("fp32", "bf16")
    assert [choose_precision(p, torch.device("cpu")) for p in ("fp32", "bf16")] == ["fp32", "bf16"]
    seen = []

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.read = nn.Linear(2, 2)

        def forward(self, x, time, labels):
            seen.append(self.read(x).dtype)
            return self.read(x)

    def loss(model, x0, c, context):
        context.ema.output(x0, context.times(x0))  # a teacher inside a loss
        return DenoisingLoss()(model, x0, c, context)

    model = NetworkDenoiser(Net(), FlowPath())
    state = train(model, loss, (points()[0], None), 2, 10, progress=False, engine=Engine(precision="bf16"))
    assert seen == [torch.bfloat16] * 4
    assert {p.dtype for p in [*state.model.parameters(), *state.ema.parameters()]} == {torch.float32}


def test_an_emulated_precision_is_told_in_one_line(monkeypatch, recwarn):
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for kind in ("amx_tile", "avx512_bf16"):
        monkeypatch.setattr(torch.cpu, f"_is_{kind}_supported", lambda: False)
    assert choose_precision("auto", torch.device("cpu")) == "fp32" and not recwarn.list
    with pytest.warns(
        UserWarning, match="^precision = 'bf16' is emulated on this processor, so 'fp32' is faster here$"
    ):
        choose_precision("bf16", torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert choose_precision("bf16", torch.device("cpu")) == "bf16" and not recwarn.list


class Convolution(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lift, self.label, self.read = nn.Conv2d(3, 8, 3), nn.Embedding(4, 8), nn.ConvTranspose2d(8, 3, 3)

    def forward(self, x, time, labels):
        self.strides = x.stride()
        return self.read(torch.sin(self.lift(x) + self.label(labels)[..., None, None]))


def image_run(folder=None, **options):
    model = NetworkDenoiser(Convolution(), FlowPath(), 3)
    x = torch.randn(40, 3, 6, 6, generator=keyed_generator(1))
    kept = {} if folder is None else {"engine": replace(options.pop("engine"), folder=folder)}
    return fit(model, DenoisingLoss(), (x, points()[1][:40]), 6, 8, ema=0.7, lr=0.01, progress=False, **options, **kept)


def test_channels_last(tmp_path):
    engine = Engine(precision="fp32", channels_last=True)
    losses, state = finish(image_run(engine=engine))
    assert_close(losses, finish(image_run())[0], rtol=1e-5, atol=1e-6)
    assert state.model.net.strides[1] == 1
    for model in (state.model, state.ema):
        assert model.net.lift.weight.is_contiguous(memory_format=torch.channels_last)
    run = image_run(tmp_path, engine=engine)
    assert [next(run).loss for _ in range(3)] == losses[:3]
    run.close()
    again, state = finish(image_run(tmp_path, engine=engine))
    assert again == losses[3:]  # moments came back in the same layout
    assert state.model.net.lift.weight.is_contiguous(memory_format=torch.channels_last)


def follows_the_recursion(run, decay: float) -> list[float]:
    "Check the average of every step against the recursion in float64."
    by_hand, losses = None, []
    for state in run:
        weights = [p.detach().double().clone() for p in state.model.parameters()]
        by_hand = weights if by_hand is None else [decay * a + (1 - decay) * w for a, w in zip(by_hand, weights)]
        assert_close([p.detach().double() for p in state.ema.parameters()], by_hand, rtol=1e-5, atol=1e-6)
        losses.append(state.loss)
    assert {name.split(".")[0] for name, _ in state.ema.named_parameters()} == {"net"}
    assert not any(p.requires_grad for p in state.ema.parameters())
    return losses


@pytest.mark.parametrize(
    "engine", [None, Engine(precision="fp32", gradient_accumulation_steps=2), Engine(precision="bf16", clip=0.1)]
)
def test_the_average_follows_its_recursion(engine):
    follows_the_recursion(image_run(engine=engine), 0.7)


@pytest.mark.parametrize("engine", [None, Engine(precision="fp32", cpu=True)], ids=["loop", "engine"])
def test_the_average_has_the_buffers_of_its_model(engine):
    "Such as the statistics of batch normalisation."

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.read = nn.BatchNorm1d(2), nn.Linear(2, 2)

        def forward(self, x, time, labels):
            return self.read(self.norm(x))

    state = train(
        NetworkDenoiser(Net(), FlowPath(), 3), DenoisingLoss(), points(), 5, 16, progress=False, engine=engine
    )
    assert state.model.net.norm.running_mean.abs().max() > 0.1
    assert_close(state.ema.net.norm.running_mean, state.model.net.norm.running_mean)
    assert not any(part.training for part in state.ema.modules())


def test_a_compiled_network():
    "Same losses to rounding, an average that is right, names without a prefix, and a plain copy to sample from."
    try:
        compile_network(nn.Linear(1, 1))
    except ValueError as error:
        pytest.skip(str(error))
    torch.compiler.reset()
    losses = follows_the_recursion(start("plain", engine=Engine(precision="fp32", compile=True)), 0.9)
    assert_close(losses, finish(start("plain"))[0], rtol=1e-4, atol=1e-5)


def test_the_average_is_compiled_too(monkeypatch, tmp_path):
    "Model-guidance asks it at every step; the numbers, the names of the weights and the checkpoints stay plain."
    real, asked = torch.compile, []

    def eager(function, **options):
        def backend(graph, inputs):
            asked.append(torch.is_grad_enabled())
            return graph.forward

        return real(function, backend=backend)

    monkeypatch.setattr(torch, "compile", eager)
    torch.compiler.reset()
    losses, state = finish(start("teacher", tmp_path, engine=Engine(precision="fp32", compile=True)))
    torch.compiler.reset()
    assert True in asked and False in asked  # graphs of the network in training, and of the average
    assert state.ema.net._compiled_call_impl is not None
    assert len(asked) <= 6  # the number of guided rows differs from step to step, which must not compile anew
    plain, other = finish(start("teacher"))
    names = [[name for name, _ in model.named_parameters()] for model in (state.ema, other.ema)]
    assert names[0] == names[1]
    assert_close(losses, plain, rtol=1e-6, atol=1e-7)
    saved = read_checkpoint(tmp_path / "teacher")
    assert_close(saved.ema, other.ema.state_dict(), rtol=1e-6, atol=1e-7)
    assert copy.deepcopy(state.ema).net._compiled_call_impl is None


@pytest.mark.parametrize(("network", "parts", "compiled"), [("dit", 2, 1), ("unet", 1, 1)])
def test_equal_blocks_are_compiled_once(network, parts, compiled, monkeypatch):
    "A transformer is ready as soon as one block is; a U-Net, whose blocks differ, is compiled whole; same numbers."
    real, asked, graphs = torch.compile, [], []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def eager(function, **options):
        asked.append(function)
        return real(function, backend=backend)

    changes = {"width": 16, "depth": 2, "heads": 2} if network == "dit" else {"widths": (8, 16), "patch": 1}
    net = build_network({"dit": "dit-s/2", "unet": "unet-tiny"}[network], (1, 8, 8), 3, **changes)
    inputs = torch.randn(4, 1, 8, 8), torch.rand(4), torch.arange(4)
    expected = stir(net, seed=0)(*inputs)
    monkeypatch.setattr(torch, "compile", eager)
    torch.compiler.reset()
    names = [*net.state_dict()]
    compile_network(net)
    y = net(*inputs)
    torch.compiler.reset()
    # the first is the tiny function that shows whether there is a compiler
    assert (len(asked), len(graphs)) == (1 + parts, 1 + compiled) and [*net.state_dict()] == names
    assert torch.equal(y, expected) and y.std() > 0.01


@pytest.mark.parametrize("network", ["dit", "unet"])
def test_recomputed_activations_change_nothing_but_memory(network):
    losses, state = finish(start(network, steps=4))
    kept = []
    for recompute in (False, True):
        sizes, run = [], start(network, steps=4, engine=Engine(precision="fp32", gradient_checkpointing=recompute))
        with torch.autograd.graph.saved_tensors_hooks(lambda x, sizes=sizes: sizes.append(x.numel()) or x, lambda x: x):
            again, other = finish(run)
        kept.append(sum(sizes))
        assert again == losses
        assert all(torch.equal(p, q) for p, q in zip(other.ema.parameters(), state.ema.parameters()))
    assert kept[1] < 0.7 * kept[0]
    with pytest.raises(
        ValueError, match="gradient_checkpointing = True; allowed: False for this network, which is none of diffusers"
    ):
        next(start("plain", engine=Engine(gradient_checkpointing=True)))


@pytest.mark.parametrize(
    ("error", "options", "knobs"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nand a long story"),
            {"engine": Engine(precision="fp32")},
            "a smaller batch_size than 16, gradient_accumulation_steps = 2, precision = 'bf16', "
            "gradient_checkpointing = True",
        ),
        (
            RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
            {"engine": Engine(precision="bf16", gradient_accumulation_steps=4)},
            "a smaller batch_size than 16, gradient_accumulation_steps = 8, gradient_checkpointing = True",
        ),
    ],
)  # fmt: skip
def test_too_little_memory_names_the_knobs(error, options, knobs):
    model, plain, data, usual = case("plain")

    def hungry(*args):
        if args[-1].step == 2:
            raise error
        return plain(*args)

    with pytest.raises(torch.OutOfMemoryError) as caught:
        train(model, hungry, data, 5, progress=False, **(usual | options))
    words = str(caught.value)
    assert words.startswith("out of memory at step 2 with ") and "\n" not in words and "long story" not in words
    assert words.endswith(f"allowed: {knobs}, or more processes") and str(error).splitlines()[0].rstrip(".") in words


def test_other_errors_keep_their_name():
    def broken(*args):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match=r"^shapes do not fit$") as caught:
        train(case("plain")[0], broken, points(), 5, 8, progress=False)
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_no_compiler(monkeypatch):
    def broken(*args):
        raise RuntimeError("No working C++ compiler found\nand a long story")

    monkeypatch.setattr(torch, "compile", lambda *args: broken)
    with pytest.raises(
        ValueError, match=r"compile = True \(.*No working C.. compiler found.*\); allowed: False"
    ) as caught:
        next(start("plain", engine=Engine(compile=True)))
    assert "\n" not in str(caught.value)


def test_clipping_warm_up_and_weight_decay():
    model = case("plain")[0]
    rate = lambda step: learning_rate(step, 0.1, "cosine", 10, 4)  # noqa: E731
    ramp, fall = [0.1 * n / 4 for n in (1, 2, 3, 4)], [0.05 * (1 + math.cos(math.pi * n / 6)) for n in range(6)]
    assert_close([rate(n) for n in range(10)], ramp + fall)
    assert [learning_rate(n, 0.1, "constant", 10, 2) for n in range(4)] == [0.05, 0.1, 0.1, 0.1]
    held = [learning_rate(n, 0.1, "cosine", 13, 4, 3) for n in range(13)]
    assert_close(held, ramp + [0.1] * 3 + fall)
    norms = []

    def watch(model, x0, c, context):
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        return DenoisingLoss()(model, x0, c, context) * 100 + 0 * len(gradients)

    for state in fit(model, watch, points(), 3, 10, progress=False, engine=Engine(precision="fp32", clip=0.5)):
        norms.append(torch.stack([p.grad.norm() for p in state.model.parameters() if p.grad is not None]).norm())
    assert_close(torch.stack(norms), torch.full((3,), 0.5), rtol=1e-4, atol=0)


def test_dropout_layers_are_keyed_and_the_caller_keeps_its_randomness():
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first = finish(start("drop"))[0]
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(2)
    assert finish(start("drop"))[0] == first
    assert finish(start("drop", seed=1))[0] != first
    assert has_dropout(case("drop")[0]) and not has_dropout(case("plain")[0])
    with keyed_global_rng(torch.device("cpu"), 1, 2):
        a = torch.rand(3)
    with keyed_global_rng(torch.device("cpu"), 1, 3):
        b = torch.rand(3)
    assert not torch.equal(a, b)


def test_evaluating_between_steps_changes_nothing():
    losses = []
    for state in start("drop"):
        state.model.eval()
        losses.append(state.loss)
    assert losses == finish(start("drop"))[0]


def threads() -> int:
    return sum(thread.name.startswith("ThreadPool") for thread in threading.enumerate())


def test_fetched_data_is_ahead_and_in_order():
    before = threads()
    shelf = Shelf(*points())
    source = batches(shelf, 8, 0, 20, start=3)
    _, c = next(source)
    deadline = time.time() + 10
    while len(shelf.asked) < 3 and time.time() < deadline:
        time.sleep(0.01)
    assert len(shelf.asked) == 3  # the one in use and two more
    source.close()
    assert threads() == before
    order = [b[1].tolist() for b in batches(points(), 8, 0, 20)]
    assert [b[1].tolist() for b in batches(Shelf(*points()), 8, 0, 20)] == order and c.tolist() == order[3]
    halves = [[b[0] for b in batches(Shelf(*points()), 8, 0, 9, rows=r)] for r in (slice(0, 3), slice(3, 8))]
    for whole, a, b in zip(batches(Shelf(*points()), 8, 0, 9), *halves):
        assert torch.equal(whole[0], torch.cat([a, b]))  # the shift of a row does not depend on who reads it


def test_an_error_while_fetching_ends_the_thread():
    before = threads()

    def make(job):
        if job == 4:
            raise OSError("image 4 is unreadable")
        return job

    source = prefetch(make, range(10))
    assert [next(source) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(OSError, match="image 4"):
        next(source)
    assert threads() == before


def test_a_tracker_logs_into_the_folder(tmp_path):
    pytest.importorskip("tensorboard")
    engine = Engine(precision="fp32", tracker="tensorboard", log_every=4)
    finish(start("plain", tmp_path, engine=engine))
    (file,) = (tmp_path / "plain" / "log").glob("events*")
    assert file.stat().st_size > 100


def test_the_bar_shows_the_loss(capsys):
    finish(start("plain", progress=True, description="a title"))
    assert "a title: 100%" in (told := capsys.readouterr().err) and "loss" in told and "steps/s" in told


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Engine(precision="fp8"), "precision = 'fp8'; allowed: 'fp32', 'bf16', 'fp16', 'auto'"),
        (
            lambda: Engine(gradient_accumulation_steps=0),
            "gradient_accumulation_steps = 0; allowed: a whole number, 1 or more",
        ),
        (lambda: Engine(clip=-1.0), "clip = -1.0; allowed: a positive, finite number"),
        (lambda: Engine(warmup=-1), "warmup = -1"),
        (lambda: Engine(weight_decay=math.inf), "weight_decay = inf"),
        (lambda: Engine(log_every=0), "log_every = 0"),
        (
            lambda: next(start("plain", engine=Engine(precision="fp16"))),
            "precision = 'fp16'; allowed: 'auto', 'fp32', 'bf16' on a CPU",
        ),
        (
            lambda: next(start("plain", engine=Engine(gradient_accumulation_steps=3))),
            "batch_size = 16; allowed: a multiple of 1 ",
        ),
        (lambda: next(start("plain", engine=Engine(warmup=12))), "warmup + hold = 12; allowed: below steps = 12"),
        (lambda: next(start("plain", engine=Engine(warmup=6, hold=6))), "warmup + hold = 12; allowed: below steps"),
        (lambda: next(start("plain", engine=Engine(tracker="nope"))), "tracker = 'nope'; allowed: "),
        (lambda: next(batches(Shelf(*(p[:0] for p in points())), 4, 0, 1)), "samples of data = 0; allowed: 1 or more"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_another_network_beside_a_loss_moves_along():
    "Networks that a loss holds, such as a frozen teacher, are put where the run takes place, and not trained."
    from guidance_nb.model_guidance import ModelGuidanceLoss

    frozen = mlp_denoiser(2, FlowPath(), 3, width=8, depth=1, seed=4)
    loss = ModelGuidanceLoss(2.0, target="frozen", frozen=frozen)
    before = [p.clone() for p in frozen.parameters()]
    train(case("plain")[0], loss, points(), 3, 10, progress=False, engine=Engine(precision="fp32"))
    assert all(torch.equal(a, b) for a, b in zip(before, frozen.parameters()))
