"""The papers' claims on CIFAR-10, measured side by side with one command on one GPU.

    python tools/cifar10.py --out runs/cifar10 --budget 60

One network, one budget: it times a training step of every loss, plans the longest equal runs that fit into the budget
(in minutes), trains them, samples, scores, and prints a short table. Everything is kept under --out; started again with
the same --out it goes on with what is missing, and `--stop-after MINUTES` leaves in time for a machine that is lent for
minutes only. `--patch 1` trains the papers' U-Net; the default sees 2x2 patches and has a level less: 3.9 times fewer
operations an image, 25 instead of 36 million weights. `--size 16` is the study on images whose pixels are the means of
2 x 2 pixels, with a network of 3.7 million weights and an evaluation classifier of its own; `--pack FOLDER` writes
these images for a machine without CIFAR-10, which reads them by `--data FOLDER`. `--rehearse` walks the whole way with
a tiny network and 200 images, on a CPU in minutes.
"""

import argparse
import json
import math
import os
import time
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from guidance_nb import _random
from guidance_nb.cli._evaluation import _has_facts, _keep_neighbours, find_feature_extractor, score
from guidance_nb.cli._recipe import DataTable, Recipe, override, read_recipe
from guidance_nb.cli._run import (
    Request,
    Trained,
    _autocast_and_compile,
    _make_training,
    generate,
    load_trained,
    make_data,
    make_loss,
    own_device,
    postprocess,
    recipe_shape,
    train_recipe,
)
from guidance_nb.engine._checkpoints import checkpoints_in, read_checkpoint
from guidance_nb.engine._hardware import choose_precision
from guidance_nb.flow_postprocessing import pair_data
from guidance_nb.images._data import ImageData, SampleFile, from_uint8, load_images, save_samples
from guidance_nb.images._features import Extractor, Features, cifar_resnet, extract, resnet_extractor
from guidance_nb.images._metrics import append_rows, read_rows
from guidance_nb.training import fit

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
STEPS = (5, 10, 20, 50)
RUN_OVERHEAD = 2.0  # seconds a run takes to read its images and write its checkpoints
PARTS = {"training": 0.55, "sampling": 0.33}  # of the budget; the rest is for timing, compiling and looking at images
METRICS = ("fd", "precision", "recall")
PAIRS = [(False, False), (False, True), (True, False), (True, True)]  # CUDA graphs, channels last


class OutOfTime(Exception):
    "The time of this call is up; the next call goes on."


@dataclass(frozen=True)
class Run:
    "One training run: a recipe, what is changed in it, and how long it is in units of the base run."

    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    length: float = 1.0
    checkpoints: int = 1  # how many are needed; four show how quality grows with training
    source: str = ""  # for a post-processing flow: the run whose samples it learns to correct
    annealed: bool = True  # whether the plan's further steps, with a falling learning rate, follow

    def __hash__(self) -> int:
        return hash((self.recipe, str(self.changes)))

    def share(self, steps: int) -> int:
        "Of a number of steps of the base run, as a multiple of eight for the checkpoints."
        return round(steps * self.length / 8) * 8


def correction(space: str, neighbours: int, length: float = 0.2, source: str = "base", **changes: Any) -> Run:
    "A post-processing flow for all scales, on samples of the base run."
    return Run("cifar10-post", {"space": space, "neighbours": neighbours} | changes, length, 1, source, False)


RUNS = {
    "base": Run("cifar10-base", checkpoints=4),
    "wide": Run(
        "cifar10-base", {"batch_size": 2}
    ),  # the aligned loss costs two evaluations an image, so this is equal compute
    "aligned": Run("cifar10-aligned", {"scale": 2.0}),
    "mg-1.5": Run("cifar10-mg", {"scale": 1.5}, checkpoints=4),
    "mg-2": Run("cifar10-mg", {"scale": 2.0}),
    "mg-aware": Run("cifar10-mg-aware", {"scale_range": "1,4"}),
    "classifier": Run("cifar10-classifier", {"compile": False}, 0.25),
    "post-pixels-20": correction("pixels", 20),
    "post-pixels-40": correction("pixels", 40),
    "post-resnet-20": correction("resnet20", 20),
    "post-resnet-40": correction("resnet20", 40),
}
VP = {"path": "vp-cosine", "prediction": "eps"}
VP_RUNS = {
    "vp-wide": Run("cifar10-base", {"batch_size": 2} | VP),
    "vp-aligned": Run("cifar10-aligned", {"scale": 2.0} | VP),
}
PLAIN = {"compile": False}
FEW = {"limit": 5_000}
RUNS_16 = {  # a second seed of training for the headline; what is needed least stands last
    "evaluation": Run("cifar10-evaluation-classifier", length=1.5, annealed=False),
    "base": Run("cifar10-base", checkpoints=8),
    "aligned": Run("cifar10-aligned", {"scale": 2.0}, checkpoints=8),
    "mg-2": Run("cifar10-mg", {"scale": 2.0}, checkpoints=8),
    "classifier": Run("cifar10-classifier", PLAIN, 0.5, annealed=False),
    "post-pixels-20": correction("pixels", 20, 0.3),
    "post-classifier-20": correction("classifier", 20, 0.3),
    "post-pixels-40": correction("pixels", 40, 0.3),
    "post-classifier-40": correction("classifier", 40, 0.3),
    "base-1": Run("cifar10-base", {"seed": 1}),
    "mg-2-1": Run("cifar10-mg", {"scale": 2.0, "seed": 1}),
    "few": Run("cifar10-base", FEW, 0.5),
    "post-few": correction("pixels", 20, 0.5, "few", **FEW),
    "mg-aware": Run("cifar10-mg-aware", {"scale_range": "1,4"}),
}
HALF = {"base-half": Run("cifar10-base", length=0.5)}  # of a falling rate: what twice the training is worth
NEIGHBOURS = "neighbours"  # instead of a flow: what a perfect one would give
OPTIONAL = tuple(RUNS_16)[-4:]  # left out, the last first, if the base would see each image less than sixteen times
PAIRED = (1.0, 2.0, 3.0)  # scales of the samples that the post-processing flows learn from


@dataclass(frozen=True)
class Point:
    "Samples to draw and score: of one run at a scale, perhaps guided by a classifier, and corrected by some flows."

    run: str
    scale: float
    steps: int = 20
    classifier: str = ""
    corrections: tuple[str, ...] = ()
    portion: float = 1.0  # of the run's training
    headline: bool = False  # twice the samples
    until: float = 1.0  # last time with guidance; Model-guidance is trained with .75
    seed: int = 0  # of the samples
    sampler: str = "euler"
    precision: str = ""  # of the network, if not the usual one

    @property
    def at_once(self) -> int:
        "Network evaluations a sample in one step."
        return 1 if self.scale == 1 or self.classifier != "" or self.run.startswith("mg") else 2

    @property
    def nfe(self) -> int:
        "NFE of a sample, at most."
        return self.steps * self.at_once + 16 * len(self.corrections)


def points_16(runs: Collection[str]) -> list[Point]:
    "The same for images of 16 x 16: with three seeds of sampling, and with scales at which CFG may spoil a base."
    scales, posts = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0), tuple(name for name in runs if name.startswith("post-"))
    pixels = (*(name for name in posts if name != "post-few"), *[NEIGHBOURS] * bool(posts))
    followed = (("base", 1.0), ("mg-2", 2.0), ("base", 2.0), ("aligned", 2.0))
    limited, again = Point("base", 2.0, until=0.75), (1, 2)
    wanted = [
        *(Point(name, scale) for name, scale in followed),
        limited,
        *(Point(name, scale, 5) for name, scale in (("base", 1.0), ("aligned", 2.0), ("base", 2.0))),
        *(Point(name, scale, portion=part / 8) for part in (1, 2, 4, 6) for name, scale in followed),
        *(Point("base", scale) for scale in scales),
        *(Point("aligned", scale, steps) for steps in (5, 20) for scale in scales),
        *(Point("base", scale, 5) for scale in scales),
        *(Point("aligned", scale, steps, portion=0.5) for steps in (5, 20) for scale in (2.0, 4.0)),
        *(Point(name, scale, 5, portion=part) for name, scale, part in (("aligned", 2.0, 0.25), ("base", 1.0, 0.5))),
        *(Point(name, scale, 10) for scale in (1.0, 2.0, 4.0) for name in ("base", "aligned")),
        *(Point("mg-2", 2.0, steps) for steps in (5, 10)),
        *(replace(point, seed=seed) for point in (*(Point(*each) for each in followed), limited) for seed in again),
        *(Point(name, scale, 5, seed=seed) for name, scale in (("aligned", 2.0), ("base", 1.0)) for seed in again),
        *(Point("mg-2-1", 2.0, seed=seed) for seed in range(3)),
        *(Point("base-1", 2.0, until=until, seed=seed) for until in (1.0, 0.75) for seed in range(3)),
        *(Point("base", scale, corrections=pixels) for scale in scales),
        *(Point("base", scale, classifier="classifier") for scale in (1.0, 2.0, 4.0, 8.0)),
        *(Point("base-half", scale) for scale in (1.0, 2.0)),
        *(Point("base-1", scale) for scale in scales),
        Point("base", 2.0, precision="fp32"),
        *(Point("base", scale, seed=seed) for seed in again for scale in scales),
        *(Point("few", scale, corrections=("post-few",)) for scale in (1.0, 2.0, 4.0)),
        *(Point("mg-aware", scale) for scale in (1.0, 1.5, 2.0, 3.0, 4.0)),
        *(Point(name, scale, steps) for steps in STEPS for name in ("base", "aligned") for scale in scales),
        *(Point("base", scale, corrections=pixels[:-1], seed=seed) for seed in again for scale in (1.0, 2.0, 4.0, 8.0)),
    ]
    return [point for point in dict.fromkeys(wanted) if point.run in runs]


def points_32(runs: Collection[str]) -> list[Point]:
    "Everything that is drawn, what each claim needs most first, for a call that runs out of time."
    few = ["base", "wide", "aligned", *(name for name in VP_RUNS if name in runs)]
    posts = tuple(name for name in RUNS if name.startswith("post"))
    early = (1 / 4, 1 / 2)
    grid = [Point(name, scale, steps) for steps in sorted(STEPS) for name in few for scale in SCALES]
    return [
        *(Point("base", scale, headline=True) for scale in (1.0, 1.5, 2.0)),
        *(Point(name, scale, headline=True) for name, scale in (("mg-1.5", 1.5), ("mg-2", 2.0))),
        *(Point("base", scale, headline=True, until=0.75) for scale in (1.5, 2.0)),
        *(Point("base", scale, corrections=posts) for scale in SCALES),
        *(point for point in grid if point.steps < max(STEPS)),
        *(Point("mg-aware", scale) for scale in SCALES),
        *(Point("base", scale, portion=part) for part in early for scale in (1.0, 1.5)),
        *(Point("mg-1.5", 1.5, portion=part) for part in early),
        *(Point("base", scale, classifier="classifier") for scale in (1.0, 2.0, 4.0, 8.0)),
        *(Point(name, scale, steps) for name, scale in (("mg-1.5", 1.5), ("mg-2", 2.0)) for steps in STEPS),
        *(point for point in grid if point.steps == max(STEPS)),
    ]


@dataclass(frozen=True)
class Plan:
    "What the measured speeds allow; written once, so that a call that goes on does the same."

    steps: int  # of the base run
    batch_size: int
    engine: dict[str, Any]  # precision, channels_last, compile, graphs
    samples: int  # a point
    pairs: int  # samples for the post-processing flows, at each of their scales
    seconds: dict[str, float]  # expected, by run and for "sampling"
    anneal: int = 0  # further steps of the base run, while the learning rate falls to zero


@dataclass(frozen=True)
class Size:
    "How large everything is."

    changes: dict[str, Any]  # to every recipe
    runs: dict[str, Run] = field(default_factory=lambda: dict(RUNS))
    data: str = "cifar10"  # where the images are, if not where they always are
    batch_size: int = 256
    most: int = 5_120  # samples a point, if the budget allows
    least: int = 20  # samples a point, whatever the budget: what does not fit in is not drawn
    paired: int = 7_680  # samples at each scale of PAIRED
    rows: int = 2560  # samples in one call of the network
    timed: int = 20  # steps
    bare: int = 0  # of a rehearsal: steps of the base run
    steps: int = 0  # of the base run, if they are given and not planned
    anneal: int = 0  # with them: further steps, while the learning rate falls to zero
    precision: str = "auto"  # of a plan of given steps; another plan times what there is
    limit: int | None = None  # real images to compare with

    @property
    def small(self) -> bool:
        "Whether images have 16 x 16 pixels."
        return "evaluation" in self.runs

    def points(self, runs: Collection[str]) -> list[Point]:
        "What is drawn of some runs, what is needed most first."
        return points_16(runs) if self.small else points_32(runs)


REHEARSAL = Size(
    {"network": "unet-tiny", "limit": 200, "warmup": 0, "settings.dropout": 0.0},
    **{"batch_size": 16, "most": 20, "rows": 40, "timed": 2, "bare": 8, "limit": 200},
)


def full_size(patch: int, lr: float) -> Size:
    "ADM's U-Net for CIFAR-10, or its lower levels on patches, without dropout inside: some ten epochs do not overfit."
    levels = {} if patch == 1 else {"settings.patch": patch, "settings.widths": "[128, 256, 256]"}
    return Size({"settings.dropout": 0.0, "lr": lr} | levels)


def small_size(data: str, lr: float, rehearse: bool, gpu: bool = True) -> Size:
    "Images of 16 x 16: two levels on patches, 3.7 M weights; 5,000 samples a point, and as many points as fit."
    levels = {"network": "unet-small", "settings.patch": 2, "settings.widths": "[96, 128]", "lr": lr}
    levels |= {"settings.dropout": 0.0, "settings.film": True, "settings.attention": ()}
    size = Size(levels | {"source": data, "data.size": 16}, RUNS_16, data, 512, 5_000, 5_000, 10_000, 5_000, timed=10)
    if not rehearse:
        return size if gpu else processor_size(size)
    few = {**REHEARSAL.changes, "source": data, "data.size": 16, "settings.patch": 2}
    return replace(REHEARSAL, changes=few, runs=RUNS_16, data=data)


def processor_size(size: Size) -> Size:
    "The same in hours on a CPU: 1.06 M weights, and smaller batches for more steps of as many images."
    changes = size.changes | {"settings.widths": "[48, 72]"}
    return replace(size, changes=changes, batch_size=128, rows=512, paired=6_000)


@dataclass(frozen=True)
class Study:
    "What was asked for."

    out: Path
    size: Size
    minutes: float  # for everything
    deadline: float  # of this call, on the monotonic clock
    compiled: bool  # whether compiling is tried
    classifiers: Path | None  # folder of the evaluation classifiers; None for GUIDANCE_NB_DATA
    only: tuple[str, ...] = ()  # runs to train in this call, which then ends; none for everything

    def check_time(self) -> None:
        "Leave when the time of this call is up."
        if time.monotonic() > self.deadline:
            raise OutOfTime


def synchronize() -> None:
    "Wait for what was started on a GPU."
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def run_recipe(name: str, size: Size, plan: Plan | None = None, samples: tuple[str, ...] = ()) -> Recipe:
    "The recipe of a run at the length of the plan."
    run = size.runs[name]
    network = () if name != "evaluation" or size.bare else ("network", "settings.")  # it keeps its own
    changes = {key: value for key, value in size.changes.items() if not (network and key.startswith(network))}
    changes = dict(run.changes) | changes
    times = changes.pop("batch_size", 1)
    if size.bare and "neighbours" in changes:
        changes["neighbours"] //= 10  # a rehearsal has 20 images of a class
    changes["batch_size"] = times * (plan.batch_size if plan else size.batch_size)
    if plan is not None:
        steps, anneal = max(8, run.share(plan.steps)), run.share(plan.anneal) * run.annealed
        parts = next(n for n in (1, 2, 4, 8) if n == 8 or n >= max(run.checkpoints, plan.seconds.get(name, 0) / 60))
        kept = {
            "save_every": (steps + anneal) // parts,
            "keep": parts if run.checkpoints > 1 else 2,
        }  # one a minute, at most eight
        changes = plan.engine | {"steps": steps + anneal, "grid_every": 0} | kept | changes
        if anneal:
            changes |= {"schedule": "cosine", "hold": steps - steps // 20}
        changes |= {"warmup": steps // 20, "ema": max(0.5, 1 - 20 / steps)}  # the average spans a twentieth of the run
    if samples:
        changes["samples"] = ",".join(samples)
    return override(read_recipe(run.recipe), changes)


@cache
def read_images(table: DataTable) -> Any:
    "The images of a recipe, read once."
    return make_data(Recipe(data=table))


def plain_loop(recipe: Recipe, steps: int) -> float:
    "Images per second of the loop one writes by hand: fp32, eager, AdamW, no average of the weights."
    data, device = read_images(recipe.data), own_device()
    model, _, _ = _make_training(recipe, data)
    model = model.to(device).train()
    optimizer, n = torch.optim.AdamW(model.parameters(), lr=1e-4), recipe.training.batch_size
    pixels = data.images(torch.arange(min(len(data), 4 * n))).float() / 127.5 - 1
    start = 0.0
    for step in range(steps + 3):
        if step == 3:
            synchronize()
            start = time.perf_counter()
        rows = torch.randint(len(pixels), (n,))
        x0, c, t = pixels[rows].to(device), data.labels[rows].to(device), torch.rand(n, device=device)
        eps = torch.randn_like(x0)
        output = model.output(model.path.interpolate(x0, eps, t), t, c)
        loss = (output - model.target(x0, eps, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    synchronize()
    return n * steps / (time.perf_counter() - start)


def matrix_rate() -> float:
    "Floating-point operations a second of a large product of matrices in bf16: what the device can do."
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    for repeat in range(13):
        if repeat == 3:
            synchronize()
            start = time.perf_counter()
        a @ b
    synchronize()
    return 10 * 2 * 8192**3 / (time.perf_counter() - start)


def time_training(recipe: Recipe, steps: int) -> tuple[float, float]:
    "Seconds of a training step of a recipe, and seconds until the fifth is done: compiling, recording, warming up."
    model, source, _ = _make_training(recipe, read_images(recipe.data))
    table = recipe.training
    options: Any = {"batch_size": table.batch_size, "lr": table.lr, "schedule": "constant", "progress": False}
    begin = time.perf_counter()
    run = fit(model, make_loss(recipe), source, 10**6, engine=recipe.training.engine(), **options)
    for _ in range(5):
        next(run)
    synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        next(run)
    synchronize()
    end = time.perf_counter()
    run.close()
    return (end - start) / steps, start - begin


def flops_of_step(recipe: Recipe) -> float:
    "Floating-point operations of the network per image of a training step, forward and backward, counted by torch."
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        model, _, _ = _make_training(recipe, make_data(override(recipe, {"limit": 2})))
        x = torch.randn(2, *recipe_shape(recipe)[0])
        counter = FlopCounterMode(display=False)
        with counter:
            model.net(x, torch.rand(2), torch.zeros(2, dtype=torch.long)).sum().backward()
    return counter.get_total_flops() / 2


def time_engines(size: Size, compiled: bool) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    "Images per second of the base recipe by every way of running it, and the fastest way."
    recipe = override(run_recipe("base", size), {"precision": "fp32", "compile": False, "channels_last": False})
    flops, loop = flops_of_step(recipe), plain_loop(recipe, size.timed)
    peak = matrix_rate() if torch.cuda.is_available() else None
    rows = [{"engine": "plain loop, fp32", "images_per_second": loop}]
    ways: list[dict[str, Any]] = [{"precision": "fp32", "channels_last": False, "compile": False, "cuda_graphs": False}]
    if torch.cuda.is_available():
        ways += [
            ways[0] | {"precision": "bf16", "channels_last": last, "cuda_graphs": graphs}
            for graphs, last in PAIRS[2 * size.small :]
        ]
        ways += [
            ways[0] | {"precision": "bf16", "channels_last": True, "compile": True, "cuda_graphs": True}
        ] * compiled
    elif size.small and not size.bare:
        half = ways[0] | {"precision": "bf16", "channels_last": True}
        ways += [half, half | {"compile": True}][: 1 + compiled]
    tried = []
    for way in ways:
        name = ", ".join([way["precision"], *(key.removeprefix("cuda_") for key in way if way[key] is True)])
        try:
            seconds, warm = time_training(override(recipe, way), size.timed)
        except (RuntimeError, ValueError) as error:  # no compiler, or a device without room for the way
            print(f"{name}: not possible here ({str(error).strip().splitlines()[0]})")
            continue
        tried.append(way)
        rows.append({"engine": name, "images_per_second": recipe.training.batch_size / seconds, "warm_up": warm})
    for row in rows:
        row |= {"over_plain_loop": row["images_per_second"] / loop, "gflops_per_image": flops / 1e9}
        row |= {
            "mfu": row["images_per_second"] * flops / peak if peak else math.nan,
            "batch": recipe.training.batch_size,
        }
        print(
            f"{row['engine']:34} {row['images_per_second']:9.0f} images/s  {row['over_plain_loop']:.2f} of a plain loop"
        )
    speeds = [float(row["images_per_second"]) for row in rows[1:]]
    return tried[speeds.index(max(speeds))], rows


def time_sampling(size: Size, engine: dict[str, Any]) -> dict[float, float]:
    "Samples per second in 20 steps at scale 1, one evaluation a step, and 2, two, by an untrained network."
    recipe = run_recipe("base", size)
    data = read_images(recipe.data)
    model = _make_training(recipe, data)[0].to(own_device()).eval().requires_grad_(False)
    trained, n = Trained(model, recipe, data.shape, data.classes, 0, Path("untrained")), 4 * size.rows
    speeds, ask = dict[float, float](), Request(n=n, steps=20, sampler="euler", **sampling_engine(engine))
    for scale in (1.0, 2.0):
        here = ask.changed(scale=scale, batch_size=size.rows // (1 if scale == 1 else 2))
        generate(trained, here.changed(n=here.batch_size, steps=2), progress=False)  # compiles
        speeds[scale] = n / generate(trained, here, progress=False).facts["seconds"]
    return speeds


def sampling_engine(engine: dict[str, Any]) -> dict[str, Any]:
    return {"precision": engine["precision"], "compile": engine["compile"]}


def given_plan(size: Size, compiled: bool) -> Plan:
    "The plan of given steps: nothing is timed, nothing left out, and every checkpoint kept that a run may keep."
    precision = choose_precision(size.precision, own_device())  # type: ignore[arg-type]
    engine = {"precision": precision, "channels_last": True, "compile": compiled}
    seconds = dict.fromkeys(size.runs, 1_000.0) | {"sampling": 0.0}
    pairs = min(size.paired, size.most * 2)
    engine["cuda_graphs"] = False
    return Plan(size.steps, size.batch_size, engine, size.most, pairs, seconds, size.anneal)


def make_plan(study: Study) -> Plan:
    "Time every loss, then divide the budget."
    size, runs = study.size, study.size.runs
    if size.steps:
        return given_plan(size, study.compiled)
    engine, speeds = time_engines(size, study.compiled)
    budget, seconds, warm = 60 * study.minutes, dict[str, float](), dict[str, float]()
    alike = dict[str, str]()  # what a step does -> a run of such steps
    for name, run in runs.items():  # a correction is a plain step of the same network on pairs
        step = f"{run.recipe} { {key: value for key, value in run.changes.items() if key not in ('seed', 'limit')} }"
        timed = "base" if run.source else alike.setdefault(step, name)
        if timed not in seconds:
            changes = engine | {key: False for key in ("compile",) if key in run.changes}
            seconds[timed], warm[timed] = time_training(override(run_recipe(timed, size), changes), size.timed)
        seconds[name], warm[name] = seconds[timed], warm[timed]
    warm = {name: spent + (0 if size.bare else RUN_OVERHEAD) for name, spent in warm.items()}
    names = list(runs)

    def longest() -> int:
        unit = sum(seconds[name] * runs[name].length for name in names)
        return size.bare or int((PARTS["training"] * budget - sum(warm[name] for name in names)) / unit)

    while size.small and not size.bare and longest() * size.batch_size < 800_000 and names[-1] in OPTIONAL:
        print(f"left out, so that others are trained for longer: {names.pop()}")
    steps = longest()
    if steps < 8:
        unit = sum(seconds[name] * runs[name].length for name in names)
        needed = (8 * unit + sum(warm.values())) / PARTS["training"] / 60
        raise SystemExit(f"budget = {study.minutes:g} minutes; allowed: {needed:.0f} or more on this machine")
    drawn = time_sampling(size, engine)
    speed, whole = 20 * drawn[1.0], 512
    pairs = min(size.paired, size.most * 2)
    cost = sum(point.nfe * (2 if point.headline else 1) for point in size.points(names))
    paired = pairs * sum(40 if scale != 1 else 20 for scale in PAIRED)
    samples = min(size.most, int(max(0.0, PARTS["sampling"] * budget * speed - paired) / cost))
    samples = samples // whole * whole if samples > whole else samples // 10 * 10
    samples = max(samples, min(size.least, size.most))
    expected = {name: round(seconds[name] * runs[name].length * steps + warm[name], 1) for name in names}
    expected["sampling"] = round((samples * cost + paired) / speed, 1)
    for scale, each in drawn.items():
        name = f"sampling at scale {scale:g}, 20 steps, {engine['precision']}"
        speeds.append({"engine": name, "images_per_second": each, "batch": size.rows // (1 if scale == 1 else 2)})
    speeds += [
        {"engine": f"step of {name}", "images_per_second": run_recipe(name, size).training.batch_size / each}
        for name, each in seconds.items()
    ]
    (study.out / "speed.json").write_text(json.dumps({"device": device_name(), "rows": speeds}, indent=1) + "\n")
    return Plan(steps, size.batch_size, engine, samples, pairs, expected)


def device_name() -> str:
    "What this runs on."
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def read_plan(study: Study) -> Plan:
    "The plan of an earlier call, or a new one."
    file = study.out / "plan.json"
    asked = {"minutes": study.minutes, "size": asdict(study.size), "device": device_name()}
    if file.exists():
        saved = json.loads(file.read_text())
        if saved["asked"] != json.loads(json.dumps(asked)):
            raise SystemExit(
                f"{file} was made for other options or another device; allowed: the same, or another --out"
            )
        return Plan(**saved["plan"])
    plan = make_plan(study)
    file.write_text(json.dumps({"asked": asked, "plan": asdict(plan)}, indent=1) + "\n")
    return plan


def train_run(study: Study, plan: Plan, name: str, samples: tuple[str, ...] = ()) -> None:
    "Train one run to its end, from its newest checkpoint; its seconds are added up over calls."
    recipe, folder = run_recipe(name, study.size, plan, samples), study.out / "train" / name
    if study.classifiers and recipe.method.space.startswith("resnet"):
        recipe = override(recipe, {"weights": str(study.classifiers)})
    if recipe.method.space == "classifier":
        recipe = override(recipe, {"weights": str(study.out / "train" / "classifier")})
    steps, clock, start = recipe.training.steps, folder / "seconds.json", time.monotonic()
    if checkpoints_in(folder) and read_checkpoint(folder).path.name == f"step-{steps:08d}":
        return
    before = json.loads(clock.read_text()) if clock.exists() else 0.0
    planned = math.inf if study.size.steps else plan.seconds[name]
    about = f", about {planned:.0f} s" if planned < math.inf else ""
    print(f"{name}: {steps} steps of {recipe.training.batch_size} images{about}", flush=True)
    for state in train_recipe(recipe, folder, progress=False):
        if state.step > 1 and (state.step - 1) % recipe.training.save_every == 0:  # a checkpoint was just written
            clock.write_text(json.dumps(before + time.monotonic() - start))
            study.check_time()
    spent = before + time.monotonic() - start
    clock.write_text(json.dumps(spent))
    over = "" if spent <= 1.25 * planned + 5 else f", {spent / planned:.1f} times the plan"
    print(f"{name}: {spent:.0f} s{over}", flush=True)


def make_pairs(study: Study, plan: Plan, source: str) -> tuple[str, ...]:
    "Samples of a run for the post-processing flows, a third from each scale."
    trained, files = read_run(study.out / "train" / source, 1.0), []
    for scale in PAIRED:
        file = study.out / "pairs" / f"{source}-{scale:g}.npz"
        files.append(str(file))
        if not file.exists():
            study.check_time()
            file.parent.mkdir(exist_ok=True)
            ask = drawing(study, plan).request(Point(source, scale, seed=1000), plan.pairs)
            drawn = generate(trained, ask, progress=False)
            save_samples(file, drawn.x, drawn.c, drawn.facts)
    return tuple(files)


@cache
def read_run(folder: Path, portion: float) -> Trained:
    "A trained network, perhaps as it was after a part of its training; read once."
    last = read_checkpoint(folder).path
    steps = int(last.name.removeprefix("step-"))
    trained = load_trained(last if portion == 1 else folder / f"step-{round(steps * portion):08d}")
    if trained.recipe.training.channels_last:  # on a CPU with bf16, samples take three quarters of the time
        trained.model.to(memory_format=torch.channels_last)
    return trained


Draw = Callable[[Any, list[dict[str, Any]]], Iterator[tuple[SampleFile, dict[str, Any]]]]


@dataclass(frozen=True)
class Scores:
    "A table of scores, and what samples are compared with."

    file: Path
    real: Features
    extractor: Extractor
    metrics: tuple[str, ...]

    def rows(self) -> list[dict[str, Any]]:
        "The rows so far."
        return list(read_rows(self.file)[1]) if self.file.exists() else []

    def find(self, facts: dict[str, Any]) -> dict[str, Any] | None:
        "The first row of some facts."
        return next((row for row in self.rows() if _has_facts(row, facts)), None)

    def add_baselines(self, data: ImageData, sizes: Iterable[int]) -> Iterator[dict[str, Any]]:
        "Rows of so many real images that are not in the reference."
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
        facts = {"method": "real", "labels": "as they are", "classes": list(data.classes)}
        about = {"run": "real", "device": device_name()}
        for n in dict.fromkeys(min(size, len(data)) for size in sizes):
            if not self.find({"run": "real", "n": n}):
                chosen = order[:n]
                file = SampleFile(data.images(chosen), data.labels[chosen], facts)
                row = score(file, self.real, self.extractor, self.metrics, 1024) | about
                append_rows(self.file, [row])
                yield row

    def add_points(self, points: Iterable[Any], draw: Draw) -> Iterator[dict[str, Any]]:
        "Draw what is missing, and score it in threads beside the drawing; yields rows as they are made."
        rows, waiting = self.rows(), deque[tuple[Future, dict[str, Any]]]()
        with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
            try:
                for point in points:
                    for final, about in guarded(draw(point, rows)):
                        job = pool.submit(score, final, self.real, self.extractor, self.metrics, 1024)
                        waiting.append((job, about))
                        rows.append(about)  # a point that two claims need is drawn once
                    while waiting and (len(waiting) > 16 or waiting[0][0].done()):
                        yield from guarded(self.save(*waiting.popleft()))
                while waiting:
                    yield from guarded(self.save(*waiting.popleft()))
            finally:
                for job, about in waiting:  # what is drawn is scored, also when the time is up
                    list(guarded(self.save(job, about)))

    def save(self, job: Future, about: dict[str, Any]) -> Iterator[dict[str, Any]]:
        "Wait for a score and write its row."
        row = job.result()
        for key in ("checkpoint", "classifier", "correction"):  # paths of this machine; the run's name says it
            row.pop(key, None)
        append_rows(self.file, [row | about])
        yield row | about


def guarded(steps: Iterable[Any]) -> Iterator[Any]:
    "The same, but a failure is shown, and what comes after it goes on: time on a lent machine is short."
    try:
        yield from steps
    except (OutOfTime, KeyboardInterrupt, GeneratorExit):
        raise
    except Exception:
        if STRICT:
            raise
        traceback.print_exc()


STRICT = False  # whether a failure ends everything, for tests


def remember_noise() -> None:
    "Draw the noise of a seed once: for thousands of samples it takes as long as some steps of a small network."
    _random.keyed_noise = lru_cache(8)(_random.keyed_noise)


def score_points(study: Study, plan: Plan) -> Iterator[dict[str, Any]]:
    "Rows of all points as they are made, real images first."
    size, data = study.size, read_images(run_recipe("base", study.size).data)
    if size.small:
        extractor = find_feature_extractor(str(study.out / "train" / "evaluation"))
    else:
        extractor = resnet_extractor(cifar_resnet(study.classifiers, 56))
    name = "cifar10 train" + (" at 16 x 16" if size.small else "")
    scores = Scores(study.out / "cifar10.csv", *reference_features(data, name, extractor), METRICS)
    test = load_images(size.data, "test", size=data.shape[1])
    yield from scores.add_baselines(test, (plan.samples, 2 * plan.samples))

    def points() -> Iterator[Point]:
        for point in size.points([name for name in plan.seconds if name != "sampling"]):
            study.check_time()
            yield point

    yield from scores.add_points(points(), lambda point, rows: draw_point(study, plan, point, rows))


@dataclass(frozen=True)
class Drawing:
    "How samples are drawn: where trained runs are found, and how their networks are asked."

    find: Callable[[str, float], Trained]  # by name, and portion of the training
    precision: str
    rows: int  # in one call of a network: one size, so that it is compiled once
    compile: bool = False
    arithmetic: str = ""  # what rows say of it; without it the precision
    real: ImageData | None = None  # training images, for NEIGHBOURS

    def request(self, point: Point, n: int) -> Request:
        "What is drawn at a point."
        ask = Request(n=n, scale=point.scale, steps=point.steps, sampler=point.sampler, interval=(0.0, point.until))
        how = {"precision": point.precision or self.precision, "compile": self.compile}
        return ask.changed(**how, seed=point.seed, batch_size=self.rows // point.at_once)

    def draw(self, point: Point, n: int, rows: list[dict[str, Any]]) -> Iterator[tuple[SampleFile, dict[str, Any]]]:
        "The samples of a point, as drawn and corrected, with what is known of them, unless a row of them is there."
        about = {"run": point.run, "scale": point.scale, "steps": point.steps, "guide": point.classifier}
        about |= {"portion": point.portion, "until": point.until, "n": n, "seed": point.seed, "sampler": point.sampler}
        usual = choose_precision(point.precision or self.precision, own_device())  # type: ignore[arg-type]
        about["arithmetic"] = self.arithmetic or usual
        missing = [
            name
            for name in ("", *point.corrections)
            if not any(_has_facts(row, about | {"flow": name}) for row in rows)
        ]
        if not missing:
            return
        trained = self.find(point.run, point.portion)
        classifier = self.find(point.classifier, 1.0) if point.classifier else None
        drawn = generate(trained, self.request(point, n), classifier, progress=False)
        about |= {"device": device_name(), "images_seen": trained.step * trained.recipe.training.batch_size}
        for name in missing:
            yield self.correct(name, drawn) if name else drawn, about | {"flow": name}

    def correct(self, name: str, drawn: SampleFile) -> SampleFile:
        "Samples after a post-processing flow, or after a perfect one."
        if name == NEIGHBOURS:
            return nearest_images(drawn, self.real)
        flow = self.find(name, 1.0)
        with _autocast_and_compile(flow, self.precision, self.compile):  # type: ignore[arg-type]
            return postprocess(flow, drawn, batch_size=self.rows, progress=False)


def nearest_images(drawn: SampleFile, real: Any) -> SampleFile:
    "What a perfect flow makes of samples: one of the 20 nearest training images of their class by pixels, at random."
    images, k = real.images(torch.arange(len(real))), min(20, int(real.labels.bincount().min()))
    pairs = pair_data(from_uint8(drawn.x), from_uint8(images), drawn.c, real.labels, k, device=own_device())
    chosen = torch.randint(k, (len(drawn.x), 1), generator=torch.Generator().manual_seed(0))
    return SampleFile(images[pairs.neighbours.gather(1, chosen)[:, 0]], drawn.c, drawn.facts)


def drawing(study: Study, plan: Plan) -> Drawing:
    "How the plan draws."
    ways = plan.engine["precision"], study.size.rows, plan.engine["compile"]
    real = read_images(run_recipe("base", study.size).data)
    return Drawing(lambda name, portion: read_run(study.out / "train" / name, portion), *ways, real=real)


def draw_point(
    study: Study, plan: Plan, point: Point, rows: list[dict[str, Any]]
) -> Iterator[tuple[SampleFile, dict[str, Any]]]:
    "The samples of a point and what is known of them; some are kept."
    n = plan.samples * (2 if point.headline else 1)
    for drawn, about in drawing(study, plan).draw(point, n, rows):
        if not about["flow"]:
            keep_samples(study, drawn, point)
        spent = json.loads((study.out / "train" / point.run / "seconds.json").read_text()) * point.portion
        yield drawn, about | {"training_seconds": round(spent, 1)}


def reference_features(data: ImageData, name: str, extractor: Extractor) -> tuple[Features, Extractor]:
    "What an extractor sees in all images of a data set, and the extractor."
    images = data.images(torch.arange(len(data)))
    return _keep_neighbours(extract(images, extractor, name, 1024, metrics=METRICS)), extractor


def keep_samples(study: Study, drawn: SampleFile, point: Point) -> None:
    "The samples of a headline point, for other metrics; of every point at 20 steps a picture, a class a column."
    from torchvision.utils import save_image

    if point.headline:
        name = f"{point.run}-{point.scale:g}" + (f"-until-{point.until:g}" if point.until < 1 else "")
        save_samples(study.out / "samples" / f"{name}.npz", drawn.x, drawn.c, drawn.facts)
    file = study.out / "grids" / f"{point.run}-{point.classifier or 'self'}-{point.scale:g}.png"
    if point.steps == 20 and point.portion == point.until == 1 and not file.exists():
        file.parent.mkdir(exist_ok=True)
        save_image(drawn.x[:80].float() / 255, file, nrow=10, padding=1)


SHOWN = {
    "no guidance": Point("base", 1.0),
    **{f"CFG {scale:g}": Point("base", scale) for scale in (2.0, 4.0, 8.0)},
    "post-processed 8": Point("base", 8.0, corrections=("post-classifier-40",)),
    "MG 2": Point("mg-2", 2.0),
    **{f"aligned at {scale:g}": Point("aligned", scale) for scale in (2.0, 4.0)},
}


def save_shown(study: Study, plan: Plan) -> None:
    "Ten samples from the same noise, one of each class, by each of the main models: a figure's rows, in samples.npz."
    draw, rows = drawing(study, plan), {}
    for label, point in SHOWN.items():
        if {point.run, *point.corrections} <= {*plan.seconds}:
            drawn = generate(draw.find(point.run, 1.0), draw.request(point, 80), progress=False)
            for name in point.corrections:
                drawn = draw.correct(name, drawn)
            rows[label] = drawn.x[:10].numpy()
    np.savez_compressed(study.out / "samples.npz", **rows)


def show_table(study: Study, plan: Plan) -> None:
    "The headline points and the real-data baseline."
    rows = read_rows(study.out / "cifar10.csv")[1]
    shown = [name for name in rows[0] if name.split("_")[0] in (*METRICS, "agreement") and "_" in name]
    for row in rows:
        if int(row["n"]) == (plan.samples if study.size.small else 2 * plan.samples) and not row.get("flow"):
            where = (f"{row.get(name, ''):>10}" for name in ("run", "scale", "until", "steps", "n", "nfe"))
            print(*where, *(f"{name} {float(row[name]):.3f}" for name in shown))


def export_weights(study: Study, names: Iterable[str]) -> None:
    "The averaged weights in half precision, in files of at most 15 MB, for a machine whose files travel in parcels."
    from huggingface_hub import save_torch_state_dict

    for name in names:
        folder, trained = study.out / "weights" / name, load_trained(study.out / "train" / name)
        if not (folder / "recipe.json").exists():  # written last
            weights = {key: value.to(torch.bfloat16).cpu() for key, value in trained.model.state_dict().items()}
            folder.mkdir(parents=True, exist_ok=True)
            save_torch_state_dict(weights, folder, max_shard_size="15MB")
            (folder / "recipe.json").write_text(json.dumps(trained.recipe.model_dump(mode="json"), indent=1) + "\n")


def train_one(study: Study, plan: Plan, name: str) -> None:
    "One run; a post-processing flow learns from samples of its source, which is trained before."
    source = study.size.runs[name].source
    train_run(study, plan, name, make_pairs(study, plan, source) if source else ())


def train_all(study: Study, plan: Plan) -> None:
    "Every run of the plan, the post-processing flows last, for they learn from samples; what cannot end is left out."
    names = [name for name in plan.seconds if name != "sampling"]
    for name in sorted(names, key=lambda name: bool(study.size.runs[name].source)):
        kept = PARTS["sampling"] * 60 * study.minutes if name in OPTIONAL and not study.size.bare else 0.0
        if time.monotonic() + plan.seconds[name] > study.deadline - kept:
            print(f"{name}: no time left")
            continue

        def train(name: str = name) -> Iterator[None]:
            yield train_one(study, plan, name)

        list(guarded(train()))


def carry_out(study: Study) -> None:
    "All of it, from where it stopped."
    try:  # to find out now, not after the training, that there is no evaluation classifier
        for depth in () if study.size.small else (20, 56):
            cifar_resnet(study.classifiers, depth)
    except ValueError as error:
        raise SystemExit(f"no evaluation classifier: {error}; or --classifiers FOLDER") from None
    torch._dynamo.config.recompile_limit = 64  # there are some ten networks, each in some shapes
    plan = read_plan(study)
    print(f"plan: {plan.steps} steps of {plan.batch_size} images, {plan.engine}, {plan.samples} samples a point")
    if plan.samples < 5_000:
        print("fewer than 5,000 samples a point fit into this budget; distances of few samples are biased upwards")
    if study.only:
        for name in study.only:
            train_one(study, plan, name)
        return
    train_all(study, plan)
    try:
        for row in score_points(study, plan):
            kind = " + ".join(str(row[key]) for key in ("run", "guide", "flow") if row.get(key))
            where = f"scale {row.get('scale', '')!s:4} steps {row.get('steps', '')!s:3}"
            distance = next(value for key, value in row.items() if key.startswith("fd_"))
            print(f"  {kind:28} {where} fd {distance:.3f}", flush=True)
    finally:
        if study.size.small:
            export_weights(study, ["evaluation"])
    show_table(study, plan)
    if study.size.small:
        return save_shown(study, plan)
    export_weights(study, [name for name in plan.seconds if name != "sampling"])
    print("FID needs the weights of Inception; with them, for each file in samples/:")
    print(f"  guidance-nb evaluate {study.out}/samples/base-1.npz --reference cifar10 --weights FILE --rows fid.csv")


def pack_images(folder: Path, side: int) -> None:
    "CIFAR-10 at another size as train.npz and test.npz, compressed without loss; `data.source` may name the folder."
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        data = load_images("cifar10", split, size=side)
        facts = {
            "classes": list(data.classes),
            "made": f"cifar10 {split}, means of blocks of pixels, halves rounded up",
        }
        images = data.images(torch.arange(len(data))).permute(0, 2, 3, 1).numpy()
        np.savez_compressed(
            folder / f"{split}.npz", arr_0=images, arr_1=data.labels.numpy(), facts=np.array(json.dumps(facts))
        )


def main(arguments: list[str] | None = None) -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/cifar10"), help="folder for all results; kept and gone on with"
    )
    parser.add_argument("--budget", type=float, default=60.0, help="minutes for everything, over all calls")
    parser.add_argument("--stop-after", type=float, default=math.inf, help="minutes after which this call leaves")
    parser.add_argument("--vp", action="store_true", help="also the aligned loss on a variance-preserving path")
    parser.add_argument(
        "--patch", type=int, default=2, choices=(1, 2), help="side of the U-Net's patches; 1 in the papers"
    )
    parser.add_argument("--size", type=int, default=32, choices=(16, 32), help="pixels of an image's side")
    packed = Path(os.environ.get("GUIDANCE_NB_DATA", ".")) / "cifar10-16"
    parser.add_argument(
        "--data",
        default=str(packed) if (packed / "train.npz").exists() else "cifar10",
        help="with --size 16: folder that --pack wrote; without it cifar10-16 in GUIDANCE_NB_DATA, or CIFAR-10 itself",
    )
    parser.add_argument("--pack", type=Path, help="write the images of 16 x 16 into this folder, and do no more")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of every run")
    parser.add_argument("--steps", type=int, default=0, help="steps of the base run, instead of a plan from the budget")
    how = "with --steps: as many further steps, while the learning rate falls to zero"
    parser.add_argument("--anneal", type=int, default=0, help=how)
    how = "with --steps: arithmetic of networks; auto is bf16 where the hardware is made for it"
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"), help=how)
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="also try torch.compile, which takes minutes for each of some five shapes: for budgets of hours",
    )
    parser.add_argument(
        "--classifiers",
        type=Path,
        help="folder of resnet20-*.th and resnet56-*.th, if not in GUIDANCE_NB_DATA; they are in pretrained_models/ of "
        "github.com/akamaster/pytorch_resnet_cifar10",
    )
    parser.add_argument(
        "--train",
        default="",
        help="train only these runs, as 'base,aligned'; such calls may share --out; a flow needs its base",
    )
    parser.add_argument("--rehearse", action="store_true", help="a tiny network and 200 images")
    asked = parser.parse_args(arguments)
    if not asked.budget > 0 or not asked.stop_after > 0:
        parser.error(
            f"--budget {asked.budget:g}, --stop-after {asked.stop_after:g}; allowed: positive numbers of minutes"
        )
    if not 0 < asked.lr < math.inf:
        parser.error(f"--lr {asked.lr:g}; allowed: a positive number")
    if asked.steps and asked.steps < 8:
        parser.error(f"--steps {asked.steps}; allowed: 8 or more, or 0 for a plan from the budget")
    if asked.anneal and (asked.anneal < 8 or not asked.steps):
        parser.error(f"--anneal {asked.anneal}; allowed: 8 or more and with --steps, or 0")
    if asked.pack:
        return pack_images(asked.pack, 16)
    asked.out.mkdir(parents=True, exist_ok=True)
    size, minutes = REHEARSAL if asked.rehearse else full_size(asked.patch, asked.lr), asked.stop_after
    if asked.vp:
        size = replace(size, runs=RUNS | VP_RUNS)
    if asked.size == 16:
        size = small_size(asked.data, asked.lr, asked.rehearse, torch.cuda.is_available())
        minutes = asked.stop_after if asked.steps else min(asked.stop_after, asked.budget)
    if asked.anneal:  # without it, half of the base's own training tells the same
        size = replace(size, runs=size.runs | HALF)
    size = replace(size, steps=asked.steps, anneal=asked.anneal, precision=asked.precision)
    deadline = time.monotonic() + 60 * minutes
    remember_noise()
    try:
        only = tuple(asked.train.split(",")) if asked.train else ()
        if not {*only} <= {*size.runs}:
            parser.error(f"--train {asked.train}; allowed: of {', '.join(size.runs)}")
        carry_out(Study(asked.out, size, asked.budget, deadline, asked.compile, asked.classifiers, only))
        print("missing: nothing")
    except OutOfTime:
        print(f"missing: what did not fit into this call; the same command goes on from {asked.out}")


if __name__ == "__main__":
    main()
