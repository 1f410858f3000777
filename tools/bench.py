"""Speed as ratios of two things timed side by side in one run: `python tools/bench.py`, or `make bench`.

Both sides are warmed up and then timed in turn, A B B A A B B A ..., so that a machine that slows down slows both.
A ratio is the median over the rounds; the quartiles beside it tell how far it can be trusted. Before anything is timed,
each benchmark checks that both sides compute the same thing. All is measured on one thread, and on as many as there are
cores. Rows go into nbs/results/bench.csv in place of those of the same name, hardware and threads; all others stay.
"""

import argparse
import copy
import csv
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from operator import itemgetter
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor, nn

from guidance_nb import __version__
from guidance_nb._random import keyed_noise
from guidance_nb._runs import one_run
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import Denoiser, NetworkDenoiser, _one_pass, count_nfe
from guidance_nb.engine._run import Engine
from guidance_nb.images._features import CifarResNet, extract, resnet_extractor
from guidance_nb.images._metrics import image_scores
from guidance_nb.images._networks import image_denoiser
from guidance_nb.metrics import nearest_neighbours
from guidance_nb.model_guidance import ModelGuidanceLoss
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath, VPPath
from guidance_nb.samplers import StepContext, ddim_step, sample, time_grid
from guidance_nb.training import DenoisingLoss, fit
from notebooks import ROOT

RESULTS = ROOT / "nbs" / "results" / "bench.csv"
CLASSES, SCALE = 10, 3.0


@dataclass(frozen=True)
class Sizes:
    "How large the benchmarks are; the defaults suit two CPU cores, where one call of the network takes tens of ms."

    network: str = "unet-small"
    shape: tuple[int, int, int] = (1, 28, 28)
    samples: int = 32
    steps: int = 12
    batches: tuple[int, ...] = (1, 8, 64, 512)  # of samples drawn beside the network alone
    batch: int = 64  # of training
    train_steps: int = 4  # per timing
    pairs: tuple[int, ...] = (2, 8, 32, 128)  # batch sizes for batched and sequential guidance
    search: tuple[int, int, int] = (2_000, 10_000, 784)  # queries, real points, numbers in each
    depth: int = 56  # of the network that scores
    scored: tuple[int, ...] = (2_000,)  # numbers of images
    shipped: str = "mnist-cfg"  # a model of the package, to be loaded by a Python that has just started; or none
    settings: dict[str, Any] = field(default_factory=dict)  # changes of the network's settings
    device: str = "cpu"
    seconds: float = 4.0  # of timing per row, more if the least number of rounds takes longer
    rounds: tuple[int, int] = (4, 40)  # least and most; even


CPU = Sizes()
LONG = replace(CPU, scored=(2_000, 10_000), seconds=40.0)
CUDA = replace(CPU, network="unet-mnist", samples=256, batch=256, train_steps=8, device="cuda")
QUICK = replace(
    CPU, network="unet-tiny", samples=4, steps=4, batch=8, train_steps=1, pairs=(2, 4), batches=(1, 2),
    search=(20, 50, 6), depth=20, scored=(64,), seconds=0.0, rounds=(2, 2), settings={}, shipped="",
)  # fmt: skip


@dataclass
class Pair:
    "Two things to time, and what their ratio should be."

    name: str
    ours: Callable[[], Any]
    other: Callable[[], Any]
    goal: float | None = None  # None for a row that only reports
    at_least: bool = False  # The ratio is one of speeds and has to reach the goal, instead of one of times
    expected: float = 1.0  # Time of ours in units of the other's that the ratio is relative to
    note: str | Callable[["Timing"], str] = ""


@dataclass
class Timing:
    "Seconds of both sides in every round, even rounds with ours first."

    ours: list[float]
    other: list[float]

    def ratios(self, pair: Pair) -> list[float]:
        "One ratio per round: of times to the expected ones, or of speeds."
        found = [a / b / pair.expected for a, b in zip(self.ours, self.other)]
        return [1 / each for each in found] if pair.at_least else found


def clock(work: Callable[[], Any], device: str) -> float:
    "Seconds that a piece of work takes, with all that it started on a GPU."
    synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None
    synchronize()
    start = time.perf_counter()
    work()
    synchronize()
    return time.perf_counter() - start


def measure(pair: Pair, sizes: Sizes) -> Timing:
    "Warm up both sides, then time them in turn, in both orders: A B B A A B B A ..."
    turn = lambda: clock(pair.ours, sizes.device) + clock(pair.other, sizes.device)  # noqa: E731
    once, (least, most) = turn(), sizes.rounds
    if once < sizes.seconds / 4:  # a first turn is slow, which would mislead
        once = turn()
    rounds = min(max(least, 2 * round(sizes.seconds / once / 2)), most)
    timing = Timing([], [])
    for number in range(rounds):
        sides = [(pair.ours, timing.ours), (pair.other, timing.other)]
        for work, seconds in sides if number % 2 == 0 else sides[::-1]:
            seconds.append(clock(work, sizes.device))
    return timing


def check_same(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> str:
    "Refuse results that differ by more than a share of the largest value; says how far they differ."
    largest = b.double().abs().max().item()
    gap = (a.double() - b.double()).abs().max().item() / largest if largest else float("inf")
    if not gap <= tolerance:
        raise RuntimeError(f"the two sides differ by {gap:.2g} of the largest value; needed: at most {tolerance:g}")
    return f"results differ by {gap:.0e}" if gap else "results equal"


def build_model(
    sizes: Sizes, path: Any = None, prediction: str = "velocity", name: str = "", **settings: Any
) -> NetworkDenoiser:
    "The network, with random weights where it would start with zeros, since its output should depend on its input."
    settings = settings if name else sizes.settings
    return stirred(
        image_denoiser(name or sizes.network, sizes.shape, path or FlowPath(), CLASSES, prediction, **settings)
    ).to(sizes.device)


def stirred(model: NetworkDenoiser) -> NetworkDenoiser:
    "The model with small random numbers in place of weights that are all zero."
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1 and not weight.any():
                weight.copy_(0.02 * torch.randn(weight.shape, generator=generator))
    return model.eval()


def labels(n: int) -> Tensor:
    "Every class equally often."
    return torch.arange(n) % CLASSES


def draw(model: Denoiser, sizes: Sizes, **options: Any) -> Any:
    "Samples by DDIM."
    usual: dict[str, Any] = {"sampler": "ddim", "steps": sizes.steps, "progress": False}
    return sample(model, labels(sizes.samples), sizes.shape, **(usual | options))


def rows_of(model: Denoiser, sizes: Sizes) -> int:
    "Rows of the network that these samples take."
    with count_nfe() as rows:
        draw(model, sizes)
    return rows.total


def record(model: NetworkDenoiser, guided: Denoiser, sizes: Sizes) -> tuple[Callable[[], None], str]:
    "Nothing but the calls of the network that samples take, and a note that counts them."
    calls: list[tuple] = []
    hook = model.net.register_forward_pre_hook(lambda net, args: calls.append(args))
    draw(guided, sizes)
    hook.remove()

    @torch.no_grad()
    def replay() -> None:
        for args in calls:
            model.net(*args)

    return replay, f"floor 1: {sum(len(args[0]) for args in calls)} rows in {len(calls)} calls on both sides"


def sampling(sizes: Sizes) -> Iterator[Pair]:
    "DDIM with classifier-free guidance against nothing but the calls of the network that it makes, replayed."
    small = {"width": 128, "depth": 4, "heads": 4}
    networks = {
        "unet": (build_model(sizes), sizes.shape),
        "dit": (build_model(sizes, name="dit-s/4", **small), sizes.shape),
        "mlp": (plane_model(sizes), (2,)),
    }
    for name, (model, shape) in networks.items():
        for n in sizes.batches:
            few = replace(sizes, samples=n, shape=shape, steps=max(2, min(sizes.steps, 128 // n)))
            guided = ClassifierFreeGuidance(model, SCALE)
            replay, note = record(model, guided, few)
            ours, bare = partial(draw, guided, few), by_hand(model, few)
            same = check_same(ours(), bare())
            yield Pair(f"sampling/{name} {n}", ours, replay, 1.02, note=note)
            yield Pair(f"by hand/{name} {n}", bare, replay, note=f"eight lines; all samples at once: {same}")


def layers(sizes: Sizes) -> Iterator[Pair]:
    "One sample by guided DDIM, one layer of code after another, against the calls of the network alone."
    yield from layers_of("unet", build_model(sizes), replace(sizes, samples=1))
    yield from layers_of("mlp", plane_model(sizes), replace(sizes, samples=1, shape=(2,)))


def layers_of(name: str, model: NetworkDenoiser, sizes: Sizes) -> Iterator[Pair]:
    "The layers around one network."
    guided, c = ClassifierFreeGuidance(model, SCALE), labels(1).to(sizes.device)
    x, times = keyed_noise(0, 0, (1, *sizes.shape)).to(sizes.device), time_grid(model.path, sizes.steps)
    extra, (replay, note) = StepContext(lambda: x, 0.0, lambda path, t: t, {}), record(model, guided, sizes)

    @torch.no_grad()
    def follow(call: Callable[[Tensor, Tensor], object]) -> None:
        with one_run(times, c) as moments:
            for t, s in pairwise(moments):
                call(t, s)

    calls: dict[str, Callable[[Tensor, Tensor], object]] = {
        "its operations": bare_step(model, x),
        "both predictions": lambda t, s: model.predict_pair(x, t, c),
        "and guidance": lambda t, s: guided(x, t, c),
        "and a step": lambda t, s: ddim_step(guided, x, t, s, c, extra),
    }
    for layer, call in calls.items():
        yield Pair(f"{layer}/{name} 1", partial(follow, call), replay, note=note)
    yield Pair(f"and a run/{name} 1", partial(draw, guided, sizes), replay, note=note)


def bare_step(model: NetworkDenoiser, x: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    "The fifteen operations of a guided step with the call of the network, without the layers of code around them."
    null, time = torch.tensor([0, CLASSES], device=x.device), torch.full((2,), 0.5, device=x.device)
    k, m = torch.tensor(0.5, device=x.device), torch.tensor(0.4, device=x.device)  # any coefficients

    def step(t: Tensor, s: Tensor) -> Tensor:
        twice = torch.cat([x, x])
        y = model.net(twice, time.clone(), null)
        x0, eps = k * twice - m * y, m * y - k * twice
        (x0_c, x0_u), (eps_c, eps_u) = x0.chunk(2), eps.chunk(2)
        return k * torch.lerp(x0_u, x0_c, SCALE) + m * torch.lerp(eps_u, eps_c, SCALE)

    return step


def plane_model(sizes: Sizes) -> NetworkDenoiser:
    "The perceptron of points in the plane."
    return stirred(mlp_denoiser(2, FlowPath(), CLASSES)).to(sizes.device)


def by_hand(model: NetworkDenoiser, sizes: Sizes) -> Callable[[], Tensor]:
    "The same guided samples with nothing around the calls: Euler steps, which are those of DDIM on the straight path."
    n, net, device = sizes.samples, model.net, sizes.device
    noise, given = keyed_noise(0, 0, (n, *sizes.shape)).to(device), labels(n).to(device)
    null, times = torch.full((n,), CLASSES, device=device), torch.linspace(1, 0, sizes.steps + 1).tolist()
    both, one_pass = torch.cat([given, null]), _one_pass("auto", noise)

    @torch.no_grad()
    def loop() -> Tensor:
        x = noise
        for t, s in pairwise(times):
            if one_pass:
                y, away = net(torch.cat([x, x]), torch.full((2 * n,), t, device=device), both).chunk(2)
            else:
                time = torch.full((n,), t, device=device)
                y, away = net(x, time, given), net(x, time, null)
            x = x + (s - t) * (away + SCALE * (y - away))
        return x

    return loop


def model_guidance(sizes: Sizes) -> Iterator[Pair]:
    "Sampling a Model-guidance network against sampling with classifier-free guidance, DDIM with equal steps."
    model = build_model(sizes)
    guided = ClassifierFreeGuidance(model, SCALE)
    same = check_same(draw(model, sizes), draw(ClassifierFreeGuidance(model, 1.0), sizes))
    one, two = rows_of(model, sizes), rows_of(guided, sizes)
    note = f"floor {one / two:g}: {one} rows of {two}; at scale 1 {same}"
    yield Pair("model guidance/cfg", lambda: draw(model, sizes), lambda: draw(guided, sizes), 0.52, note=note)
    (half, _), (whole, calls) = record(model, model, sizes), record(model, guided, sizes)
    yield Pair("its calls/cfg's calls", half, whole, note=f"the floor of the row above; {calls}")


def interval(sizes: Sizes) -> Iterator[Pair]:
    "Classifier-free guidance in a time interval against full guidance times the share of network rows it needs."
    model = build_model(sizes)
    full, part = ClassifierFreeGuidance(model, SCALE), ClassifierFreeGuidance(model, SCALE, (0.25, 0.75))
    rows, every = rows_of(part, sizes), rows_of(full, sizes)
    share, note = rows / every, f"floor 1: {rows} rows of {every}, a share of {rows / every:.3f}"
    ours, replay = partial(draw, part, sizes), record(model, part, sizes)
    yield Pair("cfg interval/share", ours, partial(draw, full, sizes), 1.03, expected=share, note=note)
    yield Pair("cfg interval/its calls", ours, replay[0], 1.02, note=replay[1])


def euler_loop(sizes: Sizes) -> Iterator[Pair]:
    "Euler's method against torchdiffeq's, on the same network and times."
    from torchdiffeq import odeint

    model, n = build_model(sizes), sizes.samples
    times, c = torch.linspace(1, 0, sizes.steps + 1), labels(n).to(sizes.device)
    noise = torch.randn((n, *sizes.shape), generator=torch.Generator().manual_seed(0)).to(sizes.device)

    @torch.no_grad()
    def other() -> Tensor:
        return odeint(lambda t, x: model.net(x, t.expand(n), c), noise, times.to(sizes.device), method="euler")[-1]

    ours = partial(draw, model, sizes, sampler="euler", init=noise)
    note = f"{n * sizes.steps} rows on both sides; {check_same(ours(), other())}"
    yield Pair("euler loop/torchdiffeq", ours, other, 1.0, note=note)
    yield Pair("its calls/torchdiffeq", record(model, model, sizes)[0], other, note="the floor of the row above")


def diffusers_loop(sizes: Sizes) -> Iterator[Pair]:
    "DDIM with classifier-free guidance against the loop one writes around diffusers' DDIMScheduler, on the same U-Net."
    for n in (1, sizes.samples):
        yield from diffusers_pair(replace(sizes, samples=n), n)


def diffusers_pair(sizes: Sizes, n: int) -> Iterator[Pair]:
    "Both loops for a number of samples, and the calls of the network against the loop of diffusers."
    from diffusers import DDIMScheduler

    model = build_model(sizes, VPPath(), "eps")
    scheduler: Any = DDIMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", clip_sample=False)
    scheduler.set_timesteps(sizes.steps, device=sizes.device)
    kept = scheduler.alphas_cumprod[scheduler.timesteps.cpu()].double()
    levels = VPPath().time_at(((1 - kept) / kept).sqrt())
    times, clocks = torch.cat([levels, torch.zeros(1, dtype=torch.float64)]), levels.float().to(sizes.device)
    guided = ClassifierFreeGuidance(model, SCALE)
    both = torch.cat([torch.full((n,), CLASSES), labels(n)]).to(sizes.device)

    def ours(noise: Tensor | None = None) -> Tensor:
        return draw(guided, sizes, times=times, init=noise)

    @torch.no_grad()
    def other(noise: Tensor | None = None) -> Tensor:
        x = torch.randn((n, *sizes.shape), device=sizes.device) if noise is None else noise.to(sizes.device)
        x = x * scheduler.init_noise_sigma
        for step, at in zip(scheduler.timesteps, clocks):
            eps = model.net(torch.cat([x, x]), at.expand(2 * n), both)
            unconditional, conditional = eps.chunk(2)
            x = scheduler.step(unconditional + SCALE * (conditional - unconditional), step, x).prev_sample
        return x

    noise = torch.randn((n, *sizes.shape), generator=torch.Generator().manual_seed(0))
    note = f"{2 * n * sizes.steps} rows on both sides; {check_same(ours(noise), other(noise))}"
    yield Pair(f"ddim loop/diffusers {n}", ours, other, 0.97, note=note)
    yield Pair(f"its calls/diffusers {n}", record(model, guided, sizes)[0], other, note="the floor of the row above")


def training_data(sizes: Sizes) -> tuple[Tensor, Tensor]:
    "Random images and labels."
    n = 16 * sizes.batch
    return torch.rand((n, *sizes.shape), generator=torch.Generator().manual_seed(0)) * 2 - 1, labels(n)


def start_training(model: NetworkDenoiser, loss: Any, sizes: Sizes, engine: Engine | None = None) -> Iterator[Any]:
    "A run without end, past its first step."
    options: Any = {"batch_size": sizes.batch, "lr": 1e-4, "schedule": "constant", "progress": False, "engine": engine}
    run = fit(model, loss, training_data(sizes), 10**6, **options)
    next(run)
    return run


def ahead(run: Iterator[Any], sizes: Sizes) -> Callable[[], None]:
    "Some steps of a run."

    def steps() -> None:
        for _ in range(sizes.train_steps):
            next(run)

    return steps


def count_units(loss: Any, sizes: Sizes, steps: int = 20) -> float:
    "Cost of a training step by counting rows: 1 for a row forward, 2 for a row backward."
    small, units = build_model(sizes, name="unet-tiny"), 0

    def count(net: nn.Module, args: tuple, result: Tensor) -> None:
        nonlocal units
        units += len(args[0]) * (3 if torch.is_grad_enabled() else 1)

    small.net.register_forward_hook(count)  # copied along into the moving average
    run = start_training(small, loss, sizes)
    units = 0
    for _ in range(steps):
        next(run)
    return units / steps


def training_cost(sizes: Sizes) -> Iterator[Pair]:
    "A training step of a loss against a plain one, same network, batch and data, channels last on both sides."
    losses = {
        "aligned": (AlignedLoss(2.0), 1.9),
        "model guidance": (ModelGuidanceLoss(0.5, dropout=0.1), 1.48),
        "mg at any time": (ModelGuidanceLoss(0.5, dropout=0.1, interval=(0.0, 1.0)), None),
    }
    build = lambda: build_model(sizes).to(memory_format=torch.channels_last)  # noqa: E731
    plain = ahead(start_training(build(), DenoisingLoss(0.1), sizes), sizes)
    unit = count_units(DenoisingLoss(0.1), sizes)
    for name, (loss, goal) in losses.items():
        run = ahead(start_training(build(), loss, sizes), sizes)
        cost = count_units(loss, sizes) / unit
        note = f"floor {cost:.2f}, counting a row forward as 1 and backward as 2"
        yield Pair(f"{name}/plain step", run, plain, goal, note=note)
    yield forward_alone(build(), plain, sizes)


def forward_alone(model: NetworkDenoiser, plain: Callable[[], None], sizes: Sizes) -> Pair:
    "What a forward pass without gradients really costs of a plain step; counting rows says a third."
    x, c = (part[: sizes.batch].to(sizes.device) for part in training_data(sizes))
    t = torch.full((sizes.batch,), 0.5, device=sizes.device)

    @torch.no_grad()
    def forward() -> None:
        for _ in range(sizes.train_steps):
            model.net(x, t, c)

    return Pair("forward/plain step", forward, plain, note="0.33 by counting rows")


def choices(sizes: Sizes) -> Iterator[Pair]:
    "Training steps with the memory format, the precision and the threads that one may choose, and batches of sampling."
    engine = partial(Engine, precision="fp32", channels_last=True, cpu=sizes.device == "cpu")

    def run(**options: Any) -> Callable[[], None]:
        model = build_model(sizes)
        return ahead(start_training(model, DenoisingLoss(0.1), sizes, engine(**options)), sizes)

    usual, threads = run(), torch.get_num_threads()
    note = f"a training step of {sizes.batch} images"
    yield Pair("channels last/contiguous", usual, run(channels_last=False), note=note)
    yield Pair("bf16/fp32", run(precision="bf16"), usual, note=note)

    def alone() -> None:
        torch.set_num_threads(1)
        usual()
        torch.set_num_threads(threads)

    if threads > 1:
        yield Pair(f"{threads} threads/one", usual, alone, note=note)
    model, many = build_model(sizes), replace(sizes, samples=2 * sizes.batches[-1], steps=2)
    few = max(1, many.samples // 16)
    parts, whole = (partial(draw, model, many, batch_size=n) for n in (few, many.samples))
    same = check_same(parts(), whole())
    yield Pair(f"{few} images at a time/{many.samples}", parts, whole, note=f"two steps without guidance; {same}")


def batching(sizes: Sizes) -> Iterator[Pair]:
    "Both predictions of guidance in one pass of twice the rows against two passes, and which of them `auto` takes."
    model = build_model(sizes)
    for n in sizes.pairs:
        x = torch.randn((n, *sizes.shape), generator=torch.Generator().manual_seed(0)).to(sizes.device)
        c, t = labels(n).to(sizes.device), torch.tensor(0.5)
        chosen = "batched" if _one_pass("auto", x) else "sequential"
        times = max(1, sizes.samples // n)

        @torch.no_grad()
        def predict(kind: str, x: Tensor = x, t: Tensor = t, c: Tensor = c, times: int = times) -> Tensor:
            for _ in range(times):
                conditional, unconditional = model.predict_pair(x, t, c, kind)
            return torch.stack([conditional.x0, unconditional.x0])

        same = check_same(predict("batched"), predict("sequential"))

        def note(timing: Timing, chosen: str = chosen, same: str = same) -> str:
            ratio = median(a / b for a, b in zip(timing.ours, timing.other))
            faster = "batched" if ratio < 1 else "sequential"
            loss = max(ratio, 1 / ratio) - 1
            verdict = "the faster" if chosen == faster else f"the slower by {loss:.1%}"
            return f"auto: {chosen}, {verdict}; {same}"

        yield Pair(f"batched/sequential {n}", partial(predict, "batched"), partial(predict, "sequential"), note=note)


def throughput(sizes: Sizes) -> Iterator[Pair]:
    "Images per second of `fit` with an engine, channels last, against a plain loop with torchcfm's flow matcher."
    from torchcfm.conditional_flow_matching import ConditionalFlowMatcher

    matcher, (x, c), device = ConditionalFlowMatcher(sigma=0.0), training_data(sizes), sizes.device
    ours = build_model(sizes)
    net, generator = copy.deepcopy(ours.net).train(), torch.Generator().manual_seed(0)
    noise = torch.randn((sizes.batch, *sizes.shape), generator=generator)
    t, xt, velocity = matcher.sample_location_and_conditional_flow(noise, x[: sizes.batch])  # noise at 0, data at 1
    same = check_same(ours.path.interpolate(x[: sizes.batch], noise, 1 - t), xt)
    check_same(ours.target(x[: sizes.batch], noise, 1 - t), -velocity)
    average = copy.deepcopy(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-4, weight_decay=0.0)

    def loop() -> None:
        for _ in range(sizes.train_steps):
            rows = torch.randint(len(x), (sizes.batch,))
            data, y = x[rows].to(device), c[rows].to(device)
            t, xt, velocity = matcher.sample_location_and_conditional_flow(torch.randn_like(data), data)
            y = torch.where(torch.rand(len(y), device=device) < 0.1, CLASSES, y)
            loss = (net(xt, t, y) - velocity).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            with torch.no_grad():
                for kept, new in zip(average.parameters(), net.parameters()):
                    kept.copy_(kept * 0.999 + new * 0.001)

    engine = Engine(precision="fp32", channels_last=True, cpu=device == "cpu")
    run = ahead(start_training(ours, DenoisingLoss(0.1), sizes, engine), sizes)

    def note(timing: Timing) -> str:
        ours, other = (sizes.batch * sizes.train_steps / median(each) for each in (timing.ours, timing.other))
        return f"floor 1: equal rows; {ours:.0f} and {other:.0f} images/s; noisy data and targets: {same}"

    alone = copy.deepcopy(net).to(memory_format=torch.channels_last)
    given = [part.to(device) for part in (xt, t, c[: sizes.batch], velocity)]

    def passes() -> None:
        for _ in range(sizes.train_steps):
            alone.zero_grad()
            (alone(*given[:3]) - given[3]).square().mean().backward()

    yield Pair("fit/torchcfm loop, speed", run, loop, 1.1, at_least=True, note=note)
    told = "the floor of the row above: forward and backward passes, no data, no optimizer, no average"
    yield Pair("its passes/torchcfm loop, speed", passes, loop, at_least=True, note=told)


def search(sizes: Sizes) -> Iterator[Pair]:
    "The 20 nearest neighbours by the exact search against faiss in single precision, both on the CPU."
    n, m, width = sizes.search
    generator = torch.Generator().manual_seed(0)
    queries, real = torch.randn((n, width), generator=generator), torch.randn((m, width), generator=generator)
    k = min(20, m)

    def by_faiss() -> Tensor:
        import faiss

        return torch.from_numpy(faiss.knn(queries.numpy(), real.numpy(), k)[1])

    def exact() -> Tensor:
        return nearest_neighbours(queries, real, k)[1]

    share = (by_faiss().sort(1).values == exact().sort(1).values).float().mean().item()
    if share < 0.99:
        raise RuntimeError(f"only {share:.1%} of the neighbours agree; needed: 99 %")
    note = f"{n} queries, {m} points of {width} numbers; {share:.2%} of neighbours agree"
    ours, other = exact, by_faiss
    yield Pair("exact search/faiss", ours, other, note=note)


def scoring(sizes: Sizes) -> Iterator[Pair]:
    "All scores of a set of images by ResNet-56 features against passing the images through that network alone."
    torch.manual_seed(0)
    network = CifarResNet(sizes.depth).eval().requires_grad_(False).to(sizes.device)
    extractor = resnet_extractor(network)
    for n in sizes.scored:
        images, real = torch.randint(0, 256, (2, n, 3, 32, 32), dtype=torch.uint8)
        reference = extract(real, extractor)
        reference.moment("features")

        def bare(images: Tensor = images) -> Tensor:
            with torch.no_grad():
                parts = [network.layers(part.to(sizes.device))["features"].cpu() for part in images.split(64)]
            return torch.cat(parts)

        def score(metrics: Any, images: Tensor = images, reference: Any = reference) -> dict[str, float]:
            return image_scores(images, reference, extractor, metrics)

        same = check_same(extract(images, extractor).rows["features"], bare())
        note = f"floor 1: {n} images through one network; features: {same}"
        yield Pair(f"scoring all {n}/features", partial(score, None), bare, 1.1, note=note)


def gpu(sizes: Sizes) -> Iterator[Pair]:
    "On a GPU: training images per second of the CIFAR-10 U-Net with bf16 and with torch.compile against without."
    if sizes.device != "cuda":
        return
    large = replace(sizes, network="unet-cifar10", shape=(3, 32, 32), batch=128)

    def run(**options: Any) -> Callable[[], None]:
        return ahead(start_training(build_model(large), DenoisingLoss(0.1), large, Engine(**options)), large)

    def note(timing: Timing) -> str:
        both = (large.batch * large.train_steps / median(each) for each in (timing.ours, timing.other))
        return "{:.0f} and {:.0f} images/s".format(*both)

    half, options = run(precision="bf16"), {"precision": "bf16", "channels_last": True}
    yield Pair("bf16/fp32, speed", half, run(precision="fp32"), at_least=True, note=note)
    yield Pair("channels last/not, speed", run(**options), half, at_least=True, note=note)
    yield Pair("compiled/not, speed", run(precision="bf16", compile=True), half, at_least=True, note=note)


def start(sizes: Sizes) -> Iterator[Pair]:
    "A Python that has just started and loads a trained model, or draws with it, against one that imports PyTorch."
    with tempfile.TemporaryDirectory() as folder:
        words = f"sample {sizes.shipped} --scale 3 --n 10 --steps 1 --no-progress --overwrite --out {folder}/x.png"
        command = f"import sys; from guidance_nb.cli import _main; sys.argv = 'guidance-nb {words}'.split(); _main()"
        load = f"import guidance_nb as gnb; gnb.load('{sizes.shipped}')"
        for name, code, goal in (("load a model", load, 2), ("sample ten digits", command, 3)):
            spent: dict[str, list[float]] = {"ours": [], "PyTorch": []}

            def fresh(side: str, code: str, spent: dict[str, list[float]] = spent) -> None:
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                spent[side].append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)

            def note(timing: Timing, spent: dict[str, list[float]] = spent, goal: int = goal) -> str:
                ours, bare = (median(each) for each in spent.values())
                verdict = "met" if ours <= goal else "MISSED"
                return f"{ours:.2f} s of processor time, PyTorch alone {bare:.2f}; goal {goal} s {verdict}"

            ours, other = (code, "import torch") if sizes.shipped else ("pass", "pass")
            yield Pair(
                f"{name}/import torch", partial(fresh, "ours", ours), partial(fresh, "PyTorch", other), note=note
            )


BENCHMARKS: dict[str, Callable[[Sizes], Iterator[Pair]]] = {
    "start": start,
    "sampling": sampling,
    "layers": layers,
    "model-guidance": model_guidance,
    "interval": interval,
    "diffusers": diffusers_loop,
    "torchdiffeq": euler_loop,
    "training-cost": training_cost,
    "choices": choices,
    "batching": batching,
    "throughput": throughput,
    "search": search,
    "scoring": scoring,
    "gpu": gpu,
}


def hardware(device: str) -> str:
    "The name of the GPU, or of the CPU and its number of cores."
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return f"{named[1] if named else platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def processor(device: str) -> str:
    "The kind of the processor: what it computes with."
    if device == "cuda":
        return "CUDA {}.{}".format(*torch.cuda.get_device_capability())
    amx = getattr(torch.cpu, "_is_amx_tile_supported", lambda: False)()
    return f"{torch.backends.cpu.get_cpu_capability()}{' with AMX' if amx else ''}"


def versions() -> str:
    "What the numbers depend on."
    found = {"guidance_nb": __version__, "python": platform.python_version(), "torch": torch.__version__}
    for package in ("diffusers", "torchcfm", "faiss-cpu", "torch-fidelity"):
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return " ".join(f"{name} {number}" for name, number in found.items())


def describe(pair: Pair, timing: Timing) -> dict[str, Any]:
    "The row of a pair: ratio, quartiles, the medians of both orders, goal and verdict."
    ratios = timing.ratios(pair)
    ratio, (low, _, high) = median(ratios), quantiles(ratios, n=4, method="inclusive")
    met = pair.goal is not None and (ratio >= pair.goal if pair.at_least else ratio <= pair.goal)
    return {
        "benchmark": pair.name,
        "ratio": f"{ratio:.4f}",
        "low_quartile": f"{low:.4f}",
        "high_quartile": f"{high:.4f}",
        "goal": "" if pair.goal is None else f"{'>=' if pair.at_least else '<='} {pair.goal:g}",
        "verdict": "reported" if pair.goal is None else "met" if met else "MISSED",
        "ours_first": f"{median(ratios[::2]):.4f}",
        "other_first": f"{median(ratios[1::2]):.4f}",
        "ours_seconds": f"{median(timing.ours):.4g}",
        "other_seconds": f"{median(timing.other):.4g}",
        "rounds": len(ratios),
        "note": pair.note(timing) if callable(pair.note) else pair.note,
    }


LINE = "{benchmark:<27} {ratio:>8}  [{low_quartile:>8}, {high_quartile:>8}]  {goal:<7}  {verdict:<8}  {note}"
HEAD = f"{'ours/other':<27} {'ratio':>8}  [{'quartile':>8}, {'quartile':>8}]  {'goal':<7}  {'verdict':<8}  note"


def store(path: Path, rows: list[dict[str, Any]]) -> None:
    "Put rows into a table in place of those of the same name, hardware and threads; refuses one with other columns."
    key = itemgetter("benchmark", "hardware", "threads")
    path.parent.mkdir(parents=True, exist_ok=True)
    old: list[dict[str, Any]] = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            old = list(reader)
        if reader.fieldnames != (wanted := list(rows[0])):
            raise SystemExit(f"{path} has columns {reader.fieldnames}, not {wanted}; move it away or give --out")
    new = {tuple(map(str, key(row))) for row in rows}
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows([*(row for row in old if key(row) not in new), *rows])


def run_all(names: list[str], sizes: Sizes) -> list[dict[str, Any]]:
    "Measure the named benchmarks and print their rows as they come."
    where = {"hardware": hardware(sizes.device), "processor": processor(sizes.device)}
    where |= {"threads": str(torch.get_num_threads()), "versions": versions()}
    print(*(f"{key}: {value}" for key, value in where.items()), sep="\n")
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    print(f"processes that want a core at the start: {load}; the network is {sizes.network} on {sizes.shape}")
    print(f"\n{HEAD}")
    rows: list[dict[str, Any]] = []
    for name in names:
        print(f"\n# {name}: {BENCHMARKS[name].__doc__}", flush=True)
        try:
            for pair in BENCHMARKS[name](sizes):
                rows.append(describe(pair, measure(pair, sizes)) | where)
                print(LINE.format(**rows[-1]), flush=True)
        except ModuleNotFoundError as error:
            print(f"skipped, since {error.name} is not installed; `pip install -e '.[bench]'` brings it")
    missed = [row["benchmark"] for row in rows if row["verdict"] == "MISSED"]
    met = sum(row["verdict"] == "met" for row in rows)
    print(f"\n{met} goals met, {len(missed)} MISSED{': ' if missed else ''}{', '.join(missed)}")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Ratios of speed, each of two things timed side by side in one run.")
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=BENCHMARKS, help=", ".join(BENCHMARKS))
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--quick", action="store_true", help="tiny sizes: runs the machinery, the numbers mean nothing")
    how.add_argument("--long", action="store_true", help="more rounds, and scoring of 10,000 images")
    parser.add_argument("--seconds", type=float, help="of timing per row")
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}), help="on a CPU")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, help="table to write to; without it nbs/results/bench.csv, if not --quick")
    chosen = parser.parse_args(arguments)
    sizes = QUICK if chosen.quick else LONG if chosen.long else CPU
    if chosen.device == "cuda":
        small = {"network", "samples", "batch", "train_steps", "device"}
        changes = {"device": "cuda"} if chosen.quick else {key: getattr(CUDA, key) for key in small}
        sizes = replace(sizes, **changes)
    if chosen.seconds is not None:
        sizes = replace(sizes, seconds=chosen.seconds)
    path, usual = chosen.out or (None if chosen.quick else RESULTS), torch.get_num_threads()
    for threads in chosen.threads if chosen.device == "cpu" else [usual]:
        torch.set_num_threads(threads)
        rows = run_all(chosen.only or list(BENCHMARKS), sizes)
        if rows and path:
            store(path, rows)
    torch.set_num_threads(usual)


if __name__ == "__main__":
    main()
