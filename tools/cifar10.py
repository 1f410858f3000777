"""The papers' claims on CIFAR-10, measured side by side with one command on one GPU.

    python tools/cifar10.py --out runs/cifar10 --budget 60

One network, one budget: it times a training step of every loss, plans the longest equal runs that fit into the budget
(in minutes), trains them, samples, scores, and prints a short table. Everything is kept under --out; started again with
the same --out it goes on with what is missing, and `--stop-after MINUTES` leaves in time for a machine that is lent for
minutes only. `--patch 1` trains the papers' U-Net; the default sees 2x2 patches and has a level less: 3.9 times fewer
operations an image, 25 instead of 36 million weights. `--rehearse` walks the whole way with a tiny network and 200
images, on a CPU in minutes.
"""

import argparse
import json
import math
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from guidance_nb.cli.evaluation import (
    baseline_row,
    choose_metrics,
    extract_reference_features,
    has_facts,
    score,
)
from guidance_nb.cli.recipe import DataTable, Recipe, override, read_recipe
from guidance_nb.cli.run import (
    Request,
    Trained,
    autocast_and_compile,
    generate,
    load_trained,
    make_data,
    make_engine,
    make_loss,
    make_training,
    own_device,
    postprocess,
    train_recipe,
)
from guidance_nb.engine.checkpoints import checkpoints_in, read_checkpoint
from guidance_nb.images.data import SampleFile, save_samples
from guidance_nb.images.features import Extractor, Features, cifar_resnet, extract, resnet_extractor
from guidance_nb.images.metrics import append_rows, read_rows
from guidance_nb.training import fit

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
STEPS = (5, 10, 20, 50)
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

    def __hash__(self) -> int:
        return hash((self.recipe, str(self.changes)))


def correction(space: str, neighbours: int) -> Run:
    "A post-processing flow for all scales, on samples of the base run."
    return Run("cifar10-post", {"space": space, "neighbours": neighbours}, 0.2)


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

    @property
    def at_once(self) -> int:
        "Network evaluations a sample in one step."
        return 1 if self.scale == 1 or self.classifier != "" or self.run.startswith("mg") else 2

    @property
    def nfe(self) -> int:
        "NFE of a sample, at most."
        return self.steps * self.at_once + 15 * len(self.corrections)


def all_points(vp: bool) -> list[Point]:
    "Everything that is drawn, what each claim needs most first, for a call that runs out of time."
    few = ["base", "wide", "aligned", *(VP_RUNS if vp else ())]
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


@dataclass(frozen=True)
class Size:
    "How large everything is."

    changes: dict[str, Any]  # to every recipe
    batch_size: int = 256
    most: int = 5_120  # samples a point, if the budget allows
    rows: int = 2560  # samples in one call of the network
    timed: int = 20  # steps
    bare: int = 0  # of the plan: steps of the base run when they are not to be planned
    limit: int | None = None  # real images to compare with


REHEARSAL = Size(
    {"network": "unet-tiny", "limit": 200, "warmup": 0, "settings.dropout": 0.0}, 16, 20, 40, timed=2, bare=8, limit=200
)


def full_size(patch: int, lr: float) -> Size:
    "ADM's U-Net for CIFAR-10, or its lower levels on patches, without dropout inside: some ten epochs do not overfit."
    levels = {} if patch == 1 else {"settings.patch": patch, "settings.widths": "[128, 256, 256]"}
    return Size({"settings.dropout": 0.0, "lr": lr} | levels)


@dataclass(frozen=True)
class Study:
    "What was asked for."

    out: Path
    size: Size
    minutes: float  # for everything
    vp: bool
    deadline: float  # of this call, on the monotonic clock
    compiled: bool  # whether compiling is tried
    classifiers: Path | None  # folder of the evaluation classifiers; None for GUIDANCE_NB_DATA

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
    run = (RUNS | VP_RUNS)[name]
    changes = dict(run.changes) | size.changes
    times = changes.pop("batch_size", 1)
    if size.bare and "neighbours" in changes:
        changes["neighbours"] //= 10  # a rehearsal has 20 images of a class
    changes["batch_size"] = times * (plan.batch_size if plan else size.batch_size)
    if plan is not None:
        steps = max(8, round(plan.steps * run.length / 8) * 8)
        parts = next(n for n in (1, 2, 4, 8) if n == 8 or n >= max(run.checkpoints, plan.seconds.get(name, 0) / 60))
        kept = {
            "save_every": steps // parts,
            "keep": parts if run.checkpoints > 1 else 2,
        }  # one a minute, at most eight
        changes = plan.engine | {"steps": steps, "grid_every": 0} | kept | changes
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
    model, _, _ = make_training(recipe, data)
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
    "Seconds of a training step of a recipe, and seconds until the third is done: compiling and warming up."
    model, source, _ = make_training(recipe, read_images(recipe.data))
    table = recipe.training
    options: Any = {"batch_size": table.batch_size, "lr": table.lr, "schedule": "constant", "progress": False}
    begin = time.perf_counter()
    run = fit(model, make_loss(recipe), source, 10**6, engine=make_engine(recipe), **options)
    for _ in range(3):
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
        model, _, _ = make_training(recipe, make_data(override(recipe, {"limit": 2})))
        x = torch.randn(2, *((1, 28, 28) if recipe.data.source == "mnist" else (3, 32, 32)))
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
            ways[0] | {"precision": "bf16", "channels_last": last, "cuda_graphs": graphs} for graphs, last in PAIRS
        ]
        ways += [
            ways[0] | {"precision": "bf16", "channels_last": True, "compile": True, "cuda_graphs": True}
        ] * compiled
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


def time_sampling(size: Size, engine: dict[str, Any], out: Path) -> dict[float, float]:
    "Samples per second in 20 steps at scale 1, one evaluation a step, and 2, two, by a network barely trained."
    few = {"steps": 8, "save_every": 8, "keep": 1, "grid_every": 0, "warmup": 0} | engine
    list(train_recipe(override(run_recipe("base", size), few), out / "timing", progress=False))
    trained, n, speeds = load_trained(out / "timing"), 4 * size.rows, dict[float, float]()
    ask = Request(n=n, steps=20, sampler="euler", precision=engine["precision"], compile=engine["compile"])
    for scale in (1.0, 2.0):
        here = ask.changed(scale=scale, batch_size=size.rows // (1 if scale == 1 else 2))
        generate(trained, here.changed(n=here.batch_size, steps=2), progress=False)  # compiles
        speeds[scale] = n / generate(trained, here, progress=False).facts["seconds"]
    return speeds


def make_plan(study: Study) -> Plan:
    "Time every loss, then divide the budget."
    size, vp = study.size, study.vp
    engine, speeds = time_engines(size, study.compiled)
    names, runs = [*RUNS, *(VP_RUNS if vp else ())], RUNS | VP_RUNS
    budget, seconds, warm = 60 * study.minutes, dict[str, float](), dict[str, float]()
    for name in names:  # a correction is a plain step of the same network on pairs
        timed = name if not name.startswith("post") else "base"
        if timed not in seconds:
            changes = engine | {key: False for key in ("compile",) if key in runs[timed].changes}
            seconds[timed], warm[timed] = time_training(override(run_recipe(timed, size), changes), size.timed)
        seconds[name], warm[name] = seconds[timed], warm[timed]
    unit = sum(seconds[name] * runs[name].length for name in names)
    steps = size.bare or int((PARTS["training"] * budget - sum(warm[name] for name in names)) / unit)
    if steps < 8:
        needed = (8 * unit + sum(warm.values())) / PARTS["training"] / 60
        raise SystemExit(f"budget = {study.minutes:g} minutes; allowed: {needed:.0f} or more on this machine")
    drawn = time_sampling(size, engine, study.out)
    speed, whole = 20 * drawn[1.0], 512
    pairs = min(7_680, size.most * 2)
    cost = sum(point.nfe * (2 if point.headline else 1) for point in all_points(vp))
    paired = pairs * sum(40 if scale != 1 else 20 for scale in PAIRED)
    samples = min(size.most, int(max(0.0, PARTS["sampling"] * budget * speed - paired) / cost))
    samples = max(samples // whole * whole, 20) if samples > whole else max(samples // 10 * 10, 20)
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
    asked = {"minutes": study.minutes, "vp": study.vp, "size": asdict(study.size), "device": device_name()}
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
    steps, clock, start = recipe.training.steps, folder / "seconds.json", time.monotonic()
    if checkpoints_in(folder) and read_checkpoint(folder).path.name == f"step-{steps:08d}":
        return
    before = json.loads(clock.read_text()) if clock.exists() else 0.0
    planned = plan.seconds[name]
    print(f"{name}: {steps} steps of {recipe.training.batch_size} images, about {planned:.0f} s", flush=True)
    for state in train_recipe(recipe, folder, progress=False):
        if state.step > 1 and (state.step - 1) % recipe.training.save_every == 0:  # a checkpoint was just written
            clock.write_text(json.dumps(before + time.monotonic() - start))
            study.check_time()
    spent = before + time.monotonic() - start
    clock.write_text(json.dumps(spent))
    over = "" if spent <= 1.25 * planned + 5 else f", {spent / planned:.1f} times the plan"
    print(f"{name}: {spent:.0f} s{over}", flush=True)


def request(study: Study, plan: Plan, point: Point, n: int, seed: int = 0) -> Request:
    "What is drawn at a point; the network sees batches of one size, so that it is compiled once."
    ask = Request(n=n, scale=point.scale, steps=point.steps, sampler="euler", seed=seed, interval=(0.0, point.until))
    how = {"precision": plan.engine["precision"], "compile": plan.engine["compile"]}
    return ask.changed(**how, batch_size=study.size.rows // point.at_once)


def make_pairs(study: Study, plan: Plan) -> tuple[str, ...]:
    "Samples of the base run for the post-processing flows, a third from each scale."
    trained, files = load_trained(study.out / "train" / "base"), []
    for scale in PAIRED:
        file = study.out / "pairs" / f"base-{scale:g}.npz"
        files.append(str(file))
        if not file.exists():
            study.check_time()
            file.parent.mkdir(exist_ok=True)
            drawn = generate(trained, request(study, plan, Point("base", scale), plan.pairs, seed=1), progress=False)
            save_samples(file, drawn.x, drawn.c, drawn.facts)
    return tuple(files)


def find_run(study: Study, name: str, portion: float = 1.0) -> Trained:
    "A trained network, perhaps as it was after a part of its training."
    return read_run(study.out / "train" / name, portion)


@cache
def read_run(folder: Path, portion: float) -> Trained:
    "The same, read once."
    last = read_checkpoint(folder).path
    steps = int(last.name.removeprefix("step-"))
    return load_trained(last if portion == 1 else folder / f"step-{round(steps * portion):08d}")


def score_points(study: Study, plan: Plan) -> Iterator[dict[str, Any]]:
    "Draw what is missing, and score it in threads beside the drawing; yields rows as they are made, real images first."
    file = study.out / "cifar10.csv"
    extractor = resnet_extractor(cifar_resnet(study.classifiers, 56))
    real, metrics = reference_features(study, extractor)
    rows, waiting = read_rows(file)[1] if file.exists() else [], deque[tuple[Future, dict[str, Any]]]()
    for n in (plan.samples, 2 * plan.samples):
        if not any(has_facts(row, {"run": "real", "n": n}) for row in rows):
            baseline = baseline_row("cifar10", real, extractor, n, metrics)
            if baseline is not None:
                append_rows(file, [baseline | {"run": "real", "device": device_name()}])
                yield baseline | {"run": "real"}
    with ThreadPoolExecutor(max(1, (os.cpu_count() or 1) // 4)) as pool:
        try:
            for point in all_points(study.vp):
                study.check_time()
                for final, about in draw_point(study, plan, point, rows):
                    waiting.append((pool.submit(score, final, real, extractor, metrics, 1024), about))
                    rows.append(about)  # a point that two claims need is drawn once
                while waiting and (len(waiting) > 16 or waiting[0][0].done()):
                    yield save_score(file, *waiting.popleft())
            while waiting:
                yield save_score(file, *waiting.popleft())
        finally:
            for future, about in waiting:  # what is drawn is scored, also when the time is up
                save_score(file, future, about)


def draw_point(
    study: Study, plan: Plan, point: Point, rows: list[dict[str, Any]]
) -> Iterator[tuple[SampleFile, dict[str, Any]]]:
    "The samples of a point, as drawn and corrected, with what is known of them, unless a row of them is there."
    n = plan.samples * (2 if point.headline else 1)
    about = {"run": point.run, "scale": point.scale, "steps": point.steps, "guide": point.classifier}
    about |= {"portion": point.portion, "until": point.until, "n": n}
    missing = [
        name for name in ("", *point.corrections) if not any(has_facts(row, about | {"flow": name}) for row in rows)
    ]
    if not missing:
        return
    trained = find_run(study, point.run, point.portion)
    classifier = find_run(study, point.classifier) if point.classifier else None
    drawn = generate(trained, request(study, plan, point, n), classifier, progress=False)
    keep_samples(study, drawn, point)
    spent = json.loads((study.out / "train" / point.run / "seconds.json").read_text()) * point.portion
    about |= {"training_seconds": round(spent, 1), "device": device_name()}
    about["images_seen"] = trained.step * trained.recipe.training.batch_size
    for name in missing:
        yield correct(study, plan, name, drawn) if name else drawn, about | {"flow": name}


def correct(study: Study, plan: Plan, name: str, drawn: SampleFile) -> SampleFile:
    "Samples carried by a post-processing flow."
    flow = find_run(study, name)
    with autocast_and_compile(flow, plan.engine["precision"], plan.engine["compile"]):
        return postprocess(flow, drawn, batch_size=study.size.rows, progress=False)


def save_score(file: Path, future: Future, about: dict[str, Any]) -> dict[str, Any]:
    "Wait for a score and write its row."
    row = future.result()
    for key in ("checkpoint", "classifier", "correction"):  # paths of this machine; the run's name says it
        row.pop(key, None)
    append_rows(file, [row | about])
    return row | about


def reference_features(study: Study, extractor: Extractor) -> tuple[Features, tuple[str, ...]]:
    "Features of the training images, of a part of them in a rehearsal, and the metrics they allow."
    if study.size.limit is None:
        return extract_reference_features("cifar10", "train", (3, 32, 32), extractor, METRICS, progress=False)
    data = read_images(run_recipe("base", study.size).data)
    metrics = choose_metrics(data.images(torch.arange(len(data))), extractor, METRICS)
    return extract(data.images(torch.arange(len(data))), extractor, "cifar10 train", metrics=metrics), metrics


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


def show_table(study: Study, plan: Plan) -> None:
    "The headline points and the real-data baseline."
    import pandas as pd

    table = pd.DataFrame(read_rows(study.out / "cifar10.csv")[1])
    table = table[table.n.astype(int) == 2 * plan.samples]
    names = ["run", "scale", "until", "steps", "n"]
    names += [f"{metric}_resnet56" for metric in ("fd", "agreement", "precision", "recall")]
    names += ["nfe", "training_seconds"]
    print(table[[name for name in names if name in table]].to_string(index=False))


def export_weights(study: Study, names: list[str]) -> None:
    "The averaged weights in bf16, in files of at most 15 MB, for a machine whose files travel in small parcels."
    from huggingface_hub import save_torch_state_dict

    for name in names:
        folder, trained = study.out / "weights" / name, load_trained(study.out / "train" / name)
        if not (folder / "recipe.json").exists():  # written last
            weights = {key: value.to(torch.bfloat16).cpu() for key, value in trained.model.state_dict().items()}
            folder.mkdir(parents=True, exist_ok=True)
            save_torch_state_dict(weights, folder, max_shard_size="15MB")
            (folder / "recipe.json").write_text(json.dumps(trained.recipe.model_dump(mode="json"), indent=1) + "\n")


def carry_out(study: Study) -> None:
    "All of it, from where it stopped."
    try:  # to find out now, not after the training, that there is no evaluation classifier
        for depth in (20, 56):
            cifar_resnet(study.classifiers, depth)
    except ValueError as error:
        raise SystemExit(f"no evaluation classifier: {error}; or --classifiers FOLDER") from None
    torch._dynamo.config.recompile_limit = 64  # there are some ten networks, each in some shapes
    plan = read_plan(study)
    print(f"plan: {plan.steps} steps of {plan.batch_size} images, {plan.engine}, {plan.samples} samples a point")
    if plan.samples < 5_000:
        print("fewer than 5,000 samples a point fit into this budget; distances of few samples are biased upwards")
    names = [*RUNS, *(VP_RUNS if study.vp else ())]
    flows = [name for name in names if name.startswith("post")]
    for name in names:
        if name not in flows:
            train_run(study, plan, name)
    samples = make_pairs(study, plan)
    for name in flows:
        train_run(study, plan, name, samples)
    for row in score_points(study, plan):
        kind = " + ".join(str(row[key]) for key in ("run", "guide", "flow") if row.get(key))
        where = f"scale {row.get('scale', '')!s:4} steps {row.get('steps', '')!s:3}"
        print(f"  {kind:28} {where} fd_resnet56 {row['fd_resnet56']:.3f}", flush=True)
    show_table(study, plan)
    export_weights(study, names)
    print("FID needs the weights of Inception; with them, for each file in samples/:")
    print(f"  guidance-nb evaluate {study.out}/samples/base-1.npz --reference cifar10 --weights FILE --rows fid.csv")


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
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate of every run")
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
    parser.add_argument("--rehearse", action="store_true", help="a tiny network and 200 images")
    asked = parser.parse_args(arguments)
    if not asked.budget > 0 or not asked.stop_after > 0:
        parser.error(
            f"--budget {asked.budget:g}, --stop-after {asked.stop_after:g}; allowed: positive numbers of minutes"
        )
    if not 0 < asked.lr < math.inf:
        parser.error(f"--lr {asked.lr:g}; allowed: a positive number")
    asked.out.mkdir(parents=True, exist_ok=True)
    size, compiled = REHEARSAL if asked.rehearse else full_size(asked.patch, asked.lr), asked.compile
    deadline = time.monotonic() + 60 * asked.stop_after
    try:
        carry_out(Study(asked.out, size, asked.budget, asked.vp, deadline, compiled, asked.classifiers))
    except OutOfTime:
        print(f"the time of this call is up; the same command goes on from {asked.out}")


if __name__ == "__main__":
    main()
