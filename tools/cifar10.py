"""The papers' claims on CIFAR-10, measured side by side with one command on one GPU.

    python tools/cifar10.py --out runs/cifar10 --budget 60

One network, one budget: it times a training step of every loss, plans the longest equal runs that fit into the budget
(in minutes), trains them, samples, scores, and prints a short table. Everything is kept under --out; started again with
the same --out it goes on with what is missing, and `--stop-after MINUTES` leaves in time for a machine that is lent for
minutes only. `--rehearse` walks the whole way with a tiny network and 200 images, on a CPU in minutes.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from guidance_nb.image_data import SampleFile, save_samples
from guidance_nb.image_metrics import (
    Extractor,
    Features,
    append_rows,
    cifar_resnet,
    measure,
    read_rows,
    resnet_extractor,
)
from guidance_nb.recipes import (
    Recipe,
    Request,
    Trained,
    choose_metrics,
    draw,
    floor_row,
    has_facts,
    load_trained,
    look_at_real,
    make_data,
    make_engine,
    make_loss,
    make_training,
    override,
    own_device,
    postprocess,
    read_recipe,
    score,
    train_recipe,
)
from guidance_nb.training import check_compiler, checkpoints_in, fit, latest_checkpoint

SCALES = (1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
STEPS = (5, 10, 20, 50)
PARTS = {"training": 0.6, "sampling": 0.35}  # of the budget; the rest is for timing, compiling and looking at images


class OutOfTime(Exception):
    "The time of this call is up; the next call goes on."


@dataclass(frozen=True)
class Run:
    "One training run: a recipe, what is changed in it, and how long it is in units of the base run."

    recipe: str
    changes: dict[str, Any] = field(default_factory=dict)
    length: float = 1.0
    checkpoints: int = 2  # how many to keep; eight show how quality grows with training

    def __hash__(self) -> int:
        return hash((self.recipe, str(self.changes)))


def correction(space: str, neighbours: int) -> Run:
    "A postprocessing flow for all scales, on samples of the base run."
    return Run("cifar10-post", {"space": space, "neighbours": neighbours}, 0.5)


RUNS = {
    "base": Run("cifar10-base", checkpoints=8),
    "wide": Run(
        "cifar10-base", {"batch_size": 2}
    ),  # the aligned loss costs two rows an image, so this is equal compute
    "aligned": Run("cifar10-aligned", {"scale": 2.0}),
    "mg-1.5": Run("cifar10-mg", {"scale": 1.5}, checkpoints=8),
    "mg-2": Run("cifar10-mg", {"scale": 2.0}),
    "mg-aware": Run("cifar10-mg-aware", {"scale_range": "1,4"}),
    "classifier": Run("cifar10-classifier", length=0.5),
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
PAIRED = (1.0, 2.0, 3.0)  # scales of the samples that the postprocessing flows learn from


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

    @property
    def rows(self) -> int:
        "Network rows that drawing costs a sample."
        one = self.scale == 1 or self.classifier != "" or self.run.startswith("mg")
        return self.steps * (1 if one else 2) + 15 * len(self.corrections)


def all_points(vp: bool) -> list[Point]:
    "Everything that is drawn, the headline points first."
    few = ["base", "wide", "aligned", *(VP_RUNS if vp else ())]
    posts = tuple(name for name in RUNS if name.startswith("post"))
    early = (1 / 8, 1 / 4, 1 / 2)
    return [
        *(Point("base", scale, headline=True) for scale in (1.0, 1.5, 2.0)),
        *(Point(name, scale, headline=True) for name, scale in (("mg-1.5", 1.5), ("mg-2", 2.0))),
        *(Point(name, scale, steps) for name in few for steps in STEPS for scale in SCALES),
        *(Point("base", scale, corrections=posts) for scale in SCALES),
        *(Point(name, scale, steps) for name, scale in (("mg-1.5", 1.5), ("mg-2", 2.0)) for steps in STEPS),
        *(Point("mg-aware", scale) for scale in SCALES),
        *(Point("base", scale, classifier="classifier") for scale in (*SCALES, 8.0)),
        *(Point("base", scale, portion=part) for part in early for scale in (1.0, 1.5)),
        *(Point("mg-1.5", 1.5, portion=part) for part in early),
    ]


@dataclass(frozen=True)
class Plan:
    "What the measured speeds allow; written once, so that a call that goes on does the same."

    steps: int  # of the base run
    batch_size: int
    engine: dict[str, Any]  # precision, channels_last, compile
    samples: int  # a point
    pairs: int  # samples for the postprocessing flows, at each of their scales
    seconds: dict[str, float]  # expected, by run and for "sampling"


@dataclass(frozen=True)
class Size:
    "How large everything is."

    changes: dict[str, Any]  # to every recipe
    batch_size: int = 128
    most: int = 5_000  # samples a point, if the budget allows
    timed: int = 20  # steps
    bare: int = 0  # of the plan: steps of the base run when they are not to be planned
    limit: int | None = None  # real images to compare with


FULL = Size({})
REHEARSAL = Size(
    {"network": "unet-tiny", "limit": 200, "warmup": 0, "settings.dropout": 0.0}, 16, 20, timed=2, bare=8, limit=200
)


@dataclass(frozen=True)
class Study:
    "What was asked for."

    out: Path
    size: Size
    minutes: float  # for everything
    vp: bool
    deadline: float  # of this call, on the monotonic clock
    peak: float | None  # operations per second of the device
    classifiers: Path | None  # folder of the networks that judge; None for GUIDANCE_NB_DATA

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
        changes |= plan.engine | {"steps": steps, "save_every": steps // 8, "keep": run.checkpoints, "grid_every": 0}
        changes |= {"warmup": steps // 20, "ema": max(0.5, 1 - 20 / steps)}  # the average spans a twentieth of the run
    if samples:
        changes["samples"] = ",".join(samples)
    return override(read_recipe(run.recipe), changes)


def plain_loop(recipe: Recipe, steps: int) -> float:
    "Images per second of the loop one writes by hand: fp32, eager, AdamW, no average of the weights."
    data, device = make_data(recipe), own_device()
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


def time_training(recipe: Recipe, steps: int) -> tuple[float, float]:
    "Seconds of a training step of a recipe, and seconds until the third is done: compiling and warming up."
    model, source, _ = make_training(recipe, make_data(recipe))
    table = recipe.training
    options: Any = {"batch_size": table.batch_size, "lr": table.lr, "schedule": "constant", "progress": False}
    begin = time.perf_counter()
    run = fit(model, make_loss(recipe), source, 10**6, engine=make_engine(table), **options)
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
        model, _, _ = make_training(recipe, make_data(replace(recipe, data=replace(recipe.data, limit=2))))
        x = torch.randn(2, *((1, 28, 28) if recipe.data.source == "mnist" else (3, 32, 32)))
        counter = FlopCounterMode(display=False)
        with counter:
            model.net(x, torch.rand(2), torch.zeros(2, dtype=torch.long)).sum().backward()
    return counter.get_total_flops() / 2


def time_engines(size: Size, peak: float | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    "Images per second of the base recipe by every way of running it, and the fastest way."
    recipe = override(run_recipe("base", size), {"precision": "fp32", "compile": False, "channels_last": False})
    flops, loop = flops_of_step(recipe), plain_loop(recipe, size.timed)
    rows = [{"engine": "plain loop, fp32", "images_per_second": loop}]
    ways: list[dict[str, Any]] = [{"precision": "fp32", "channels_last": False, "compile": False}]
    if torch.cuda.is_available() or not size.bare:
        ways += [{"precision": "bf16", "channels_last": last, "compile": False} for last in (False, True)]
        try:
            check_compiler()
            ways.append({"precision": "bf16", "channels_last": True, "compile": True})
        except RuntimeError as error:
            print(f"no compiled runs: {error}")
    for way in ways:
        seconds, warm = time_training(override(recipe, way), size.timed)
        name = ", ".join([way["precision"], *(key for key in ("channels_last", "compile") if way[key])])
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
    return ways[max(range(len(ways)), key=lambda i: rows[i + 1]["images_per_second"])], rows


def time_sampling(size: Size, engine: dict[str, Any], out: Path) -> float:
    "Network rows per second of sampling, with a network of a few steps of training."
    few = {"steps": 8, "save_every": 8, "keep": 1, "grid_every": 0} | engine
    list(train_recipe(override(run_recipe("base", size), few), out / "timing", progress=False))
    trained, n = load_trained(out / "timing"), 2 * size.timed * size.batch_size
    ask = Request(n=n, scale=1.0, steps=5, sampler="euler", precision=engine["precision"], compile=engine["compile"])
    ask = replace(ask, batch_size=sampling_batch(size))
    draw(trained, replace(ask, n=min(n, ask.batch_size)), progress=False)  # compiles
    drawn = draw(trained, ask, progress=False)
    return n * drawn.facts["rows_per_sample"] / drawn.facts["seconds"]


def sampling_batch(size: Size) -> int:
    "Samples at a time."
    return 1024 if torch.cuda.is_available() else 8 * size.batch_size


def make_plan(study: Study) -> Plan:
    "Time every loss, then divide the budget."
    size, vp = study.size, study.vp
    engine, speeds = time_engines(size, study.peak)
    names, runs = [*RUNS, *(VP_RUNS if vp else ())], RUNS | VP_RUNS
    budget, seconds, warm = 60 * study.minutes, dict[str, float](), dict[str, float]()
    for name in names:  # a correction is a plain step of the same network on pairs
        timed = name if not name.startswith("post") else "base"
        if timed not in seconds:
            seconds[timed], warm[timed] = time_training(override(run_recipe(timed, size), engine), size.timed)
        seconds[name], warm[name] = seconds[timed], warm[timed]
    unit = sum(seconds[name] * runs[name].length for name in names)
    steps = size.bare or int((PARTS["training"] * budget - sum(warm[name] for name in names)) / unit)
    if steps < 8:
        needed = (8 * unit + sum(warm.values())) / PARTS["training"] / 60
        raise SystemExit(f"budget = {study.minutes:g} minutes; allowed: {needed:.0f} or more on this machine")
    speed = time_sampling(size, engine, study.out)
    pairs = min(16_667, size.most * 2)
    cost = sum(point.rows * (2 if point.headline else 1) for point in all_points(vp))
    paired = pairs * sum(40 if scale != 1 else 20 for scale in PAIRED)
    samples = min(size.most, int(max(0.0, PARTS["sampling"] * budget * speed - paired) / cost) // 10 * 10)
    samples = max(samples, 20)
    expected = {name: round(seconds[name] * runs[name].length * steps + warm[name], 1) for name in names}
    expected["sampling"] = round((samples * cost + paired) / speed, 1)
    speeds.append({"engine": f"sampling, {engine['precision']}", "rows_per_second": speed})
    speeds += [
        {"engine": f"step of {name}", "images_per_second": size.batch_size / each} for name, each in seconds.items()
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
    steps, clock, start = recipe.training.steps, folder / "seconds.json", time.monotonic()
    if checkpoints_in(folder) and latest_checkpoint(folder).name == f"step-{steps:08d}":
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


def request(study: Study, plan: Plan, n: int, scale: float, steps: int, seed: int = 0) -> Request:
    "What is drawn at a point."
    ask = Request(n=n, scale=scale, steps=steps, sampler="euler", seed=seed, precision=plan.engine["precision"])
    return replace(ask, compile=plan.engine["compile"], batch_size=sampling_batch(study.size))


def make_pairs(study: Study, plan: Plan) -> tuple[str, ...]:
    "Samples of the base run for the postprocessing flows, a third from each scale."
    trained, files = load_trained(study.out / "train" / "base"), []
    for scale in PAIRED:
        file = study.out / "pairs" / f"base-{scale:g}.npz"
        files.append(str(file))
        if not file.exists():
            study.check_time()
            file.parent.mkdir(exist_ok=True)
            drawn = draw(trained, request(study, plan, plan.pairs, scale, 20, seed=1), progress=False)
            save_samples(file, drawn.x, drawn.c, drawn.facts)
    return tuple(files)


def find_run(study: Study, name: str, portion: float = 1.0) -> Trained:
    "A trained network, perhaps as it was after a part of its training."
    folder = study.out / "train" / name
    last = latest_checkpoint(folder)
    steps = int(last.name.removeprefix("step-"))
    return load_trained(last if portion == 1 else folder / f"step-{round(steps * portion):08d}")


def score_points(study: Study, plan: Plan) -> Iterator[dict[str, Any]]:
    "Draw and score what is missing; yields rows as they are made, that of real images first."
    file = study.out / "cifar10.csv"
    eyes = resnet_extractor(cifar_resnet(study.classifiers, 56))
    real, metrics = look_at(study, eyes)
    rows = read_rows(file)[1] if file.exists() else []
    for n in (plan.samples, 2 * plan.samples):
        if not any(has_facts(row, {"run": "real", "n": n}) for row in rows):
            floor = floor_row("cifar10", real, eyes, n, metrics)
            if floor is not None:
                append_rows(file, [floor | {"run": "real", "device": device_name()}])
                yield floor | {"run": "real"}
    for point in all_points(study.vp):
        study.check_time()
        n = plan.samples * (2 if point.headline else 1)
        about = {"run": point.run, "scale": point.scale, "steps": point.steps, "guide": point.classifier}
        about |= {"portion": point.portion, "n": n}
        wanted = ("", *point.corrections)
        missing = [name for name in wanted if not any(has_facts(row, about | {"flow": name}) for row in rows)]
        if not missing:
            continue
        trained = find_run(study, point.run, point.portion)
        classifier = find_run(study, point.classifier) if point.classifier else None
        drawn = draw(trained, request(study, plan, n, point.scale, point.steps), classifier, progress=False)
        keep_samples(study, drawn, point)
        spent = json.loads((study.out / "train" / point.run / "seconds.json").read_text()) * point.portion
        about |= {"training_seconds": round(spent, 1), "device": device_name()}
        about["images_seen"] = trained.step * trained.recipe.training.batch_size
        for name in missing:
            final = postprocess(find_run(study, name), drawn, progress=False) if name else drawn
            row = score(final, real, eyes, metrics)
            for key in ("checkpoint", "classifier", "correction"):  # paths of this machine; the run's name says it
                row.pop(key, None)
            rows.append(row | about | {"flow": name})
            append_rows(file, rows[-1:])
            yield rows[-1]


def look_at(study: Study, eyes: Extractor) -> tuple[Features, tuple[str, ...]]:
    "Features of the training images, of a part of them in a rehearsal, and the metrics they allow."
    if study.size.limit is None:
        return look_at_real("cifar10", "train", (3, 32, 32), eyes, progress=False)
    data = make_data(run_recipe("base", study.size))
    metrics = choose_metrics(data.images(torch.arange(len(data))), eyes)
    return measure(data.images(torch.arange(len(data))), eyes, metrics, name="cifar10 train"), metrics


def keep_samples(study: Study, drawn: SampleFile, point: Point) -> None:
    "The samples of a headline point, for other metrics; of every point at 20 steps a picture, a class a column."
    from torchvision.utils import save_image

    if point.headline:
        save_samples(study.out / "samples" / f"{point.run}-{point.scale:g}.npz", drawn.x, drawn.c, drawn.facts)
    file = study.out / "grids" / f"{point.run}-{point.classifier or 'self'}-{point.scale:g}.png"
    if point.steps == 20 and point.portion == 1 and not file.exists():
        file.parent.mkdir(exist_ok=True)
        save_image(drawn.x[:80].float() / 255, file, nrow=10, padding=1)


def show_table(study: Study, plan: Plan) -> None:
    "The headline points and the floor."
    import pandas as pd

    table = pd.DataFrame(read_rows(study.out / "cifar10.csv")[1])
    table = table[table.n.astype(int) == 2 * plan.samples]
    names = ["run", "scale", "steps", "n", "fd_resnet56", "agreement_resnet56", "precision_resnet56", "recall_resnet56"]
    names += ["rows_per_sample", "training_seconds"]
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
            (folder / "recipe.json").write_text(json.dumps(asdict(trained.recipe), indent=1) + "\n")


def carry_out(study: Study) -> None:
    "All of it, from where it stopped."
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
    parser.add_argument("--peak", type=float, help="bf16 TFLOP/s of the device, for the share of it that is used (MFU)")
    parser.add_argument(
        "--classifiers", type=Path, help="folder of resnet20-*.th and resnet56-*.th, if not in GUIDANCE_NB_DATA"
    )
    parser.add_argument("--rehearse", action="store_true", help="a tiny network and 200 images")
    asked = parser.parse_args(arguments)
    if not asked.budget > 0 or not asked.stop_after > 0:
        parser.error(
            f"--budget {asked.budget:g}, --stop-after {asked.stop_after:g}; allowed: positive numbers of minutes"
        )
    asked.out.mkdir(parents=True, exist_ok=True)
    size, peak = REHEARSAL if asked.rehearse else FULL, asked.peak * 1e12 if asked.peak else None
    deadline = time.monotonic() + 60 * asked.stop_after
    try:
        carry_out(Study(asked.out, size, asked.budget, asked.vp, deadline, peak, asked.classifiers))
    except OutOfTime:
        print(f"the time of this call is up; the same command goes on from {asked.out}")


if __name__ == "__main__":
    main()
