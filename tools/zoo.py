"""The models that come with the package: trained from their recipes, followed over the training, and written down.

    python tools/zoo.py train --out runs/zoo --workers 1      # goes on from the last checkpoints
    python tools/zoo.py curve --out runs/zoo --samples 5000   # metrics against images seen, in runs/zoo/curve.csv
    python tools/zoo.py ship --out runs/zoo                   # into guidance_nb/models
    python tools/zoo.py train mnist-cfg --long 14000 --out runs/long   # longer, small batches, a falling rate

On two cores of a CPU a model takes some hours; on a GPU, with `--cuda-graphs`, half a minute.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from guidance_nb._files import write_aside
from guidance_nb.cli._evaluation import (
    _has_facts,
    baseline_row,
    extract_reference_features,
    find_feature_extractor,
    score,
)
from guidance_nb.cli._load import MODELS
from guidance_nb.cli._recipe import override, read_recipe
from guidance_nb.cli._run import Request, _take_images, generate, load_trained, train_recipe
from guidance_nb.engine._checkpoints import _NAMES, Checkpoint, _measure, _seal_record, checkpoints_in, read_checkpoint
from guidance_nb.images._data import from_uint8, load_images, save_samples
from guidance_nb.images._metrics import append_rows, read_rows

SCALES = {  # what is sampled of a model along its training
    "mnist-cfg": (1.0, 2.0),
    "mnist-aligned": (1.0, 2.0),
    "mnist-aligned-anchored": (1.0, 2.0),
    "mnist-mg": (2.0,),
    "mnist-mg-aware": (1.0, 2.0),
}
FIRST = ("mnist-evaluation", "mnist-cfg", "mnist-mg", "mnist-mg-aware", "mnist-aligned", "mnist-classifier")
NAMES = (*FIRST, "mnist-post", "mnist-classifier-linear", "mnist-aligned-anchored")
SECOND = ("mnist-cfg", "mnist-mg", "mnist-aligned")  # trained with a second seed, too, in NAME-1
COST = {"mnist-mg": 1.5, "mnist-mg-aware": 1.5, "mnist-aligned": 2.0, "mnist-aligned-anchored": 2.0}  # of a plain step
COST |= {"mnist-evaluation": 0.2, "mnist-classifier": 0.4, "mnist-classifier-linear": 0.2}  # and shorter
LONG = {"batch_size": 128, "schedule": "cosine", "precision": "bf16", "compile": True}
PAIRED = (1.0, 2.0, 3.0)  # scales of the samples that the post-processing flow learns from
METRICS = ("fd", "precision", "recall")
AT_ONCE = 2500 if torch.cuda.is_available() else 64  # samples of a batch; on a CPU large ones leave its caches


def train_one(out: Path, name: str, changes: dict[str, Any], seconds: float) -> None:
    "Train one model, or leave it in a checkpoint when the time is up."
    base = name.removesuffix("-1")
    portion = changes.pop("portion", 1.0)
    changes = changes | ({"seed": 10} if name != base else {})
    if portion < 1:
        steps = max(8, round(read_recipe(f"models/{base}").training.steps * portion / 8) * 8)
        changes |= {"steps": steps, "save_every": steps // 8, "warmup": min(200, steps // 8)}
    if base == "mnist-post":
        changes |= {"samples": ",".join(make_samples(out))}
    start, recipe = time.monotonic(), read_recipe(f"models/{base}", changes)
    done = read_checkpoint(out / name).step if checkpoints_in(out / name) else 0
    if done >= recipe.training.steps:
        return
    for state in train_recipe(recipe, out / name, progress=sys.stderr.isatty()):
        if time.monotonic() - start > seconds:
            print(f"{name}: the time is up at step {state.step}")
            return
    spent = time.monotonic() - start
    images = (recipe.training.steps - done) * recipe.training.batch_size
    print(f"{name}: {images} images in {spent:.0f} s, loss {float(state.loss):.4f}", flush=True)


def lengthened(steps: int) -> dict[str, Any]:
    "Changes of a recipe for a long training: the full rate for half of the steps, which then falls to zero."
    return LONG | {"steps": steps, "hold": steps // 2, "save_every": steps // 8}


def make_samples(out: Path, n: int = 10_000) -> list[str]:
    "Samples of mnist-cfg for the post-processing flow, a third at each scale."
    files = [out / "samples" / f"mnist-cfg-{scale:g}.npz" for scale in PAIRED]
    trained = None
    for file, scale in zip(files, PAIRED):
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            trained = trained or load_trained(out / "mnist-cfg")
            few = n if trained.recipe.data.limit == 0 else trained.recipe.data.limit
            ask = Request(n=few, scale=scale, seed=1, precision="auto", batch_size=min(few, 2500))
            drawn = generate(trained, ask, progress=False)
            save_samples(file, drawn.x, drawn.c, drawn.facts)
    return [str(file) for file in files]


def plan_steps(out: Path, names: list[str], changes: dict[str, Any], seconds: float) -> dict[str, Any]:
    "Changes that shorten all trainings alike, so that they fit into a budget; the speed is measured."
    recipe = read_recipe("models/mnist-cfg", changes | {"steps": 10**6, "save_every": 10**6})
    start, last = 0.0, None
    for state in train_recipe(recipe, out / "speed", progress=False):
        if state.step == 100:
            float(state.loss)
            start = time.monotonic()
        if state.step == 400:
            float(state.loss)
            last = (time.monotonic() - start) / 300
            break
    assert last is not None
    work = sum(COST.get(name.removesuffix("-1"), 1.0) for name in names)
    full = read_recipe("models/mnist-cfg").training.steps
    portion = min(1.0, seconds / (work * last * full))
    print(f"{recipe.training.batch_size / last:.0f} images/s; {portion:.2f} of the recipes' steps", flush=True)
    return {"portion": portion}


def train_all(out: Path, names: list[str], extra: list[str], workers: int, seconds: float) -> None:
    "Train models beside each other, each in a process of its own; the flow waits for the model that it corrects."
    end = time.monotonic() + seconds
    threads = str(max(1, (os.cpu_count() or 1) // workers))
    waiting: dict[str, Any] = {}

    def run(name: str) -> None:
        if name == "mnist-post" and "mnist-cfg" in waiting:
            waiting["mnist-cfg"].result()
        left = str(max(1.0, end - time.monotonic()))
        command = [sys.executable, __file__, "one", name, "--out", str(out), "--seconds", left, *extra]
        done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": threads}, check=False)
        if done.returncode:
            print(f"{name} ended with {done.returncode}", flush=True)

    with ThreadPoolExecutor(workers) as pool:
        for name in names:
            waiting[name] = pool.submit(run, name)


def follow(
    out: Path, samples: int, portions: tuple[int, ...], split: str = "train", seeds: int = 1
) -> Iterator[dict[str, Any]]:
    "Rows of metrics along the training of each model, eighths of it, of real images first; a `split` is compared with."
    classifier = next(place / "mnist-evaluation" for place in (out, MODELS) if (place / "mnist-evaluation").exists())
    file, extractor = out / "curve.csv", find_feature_extractor(str(classifier))
    rows = read_rows(file)[1] if file.exists() else []
    real, metrics = extract_reference_features("mnist", split, (1, 28, 28), extractor, METRICS, progress=False)
    if not any(_has_facts(row, {"run": "real", "n": samples}) for row in rows):
        row = (baseline_row("mnist", real, extractor, samples, metrics) or {}) | {"run": "real"}
        append_rows(file, [row])
        yield row
    for part in portions:
        for name, scales in SCALES.items():
            for run in (name, f"{name}-1") if part == 8 else (name,):
                if not (found := checkpoints_in(out / run)):
                    continue
                steps = read_checkpoint(found[0]).record["settings"]["steps"] * part // 8
                folder = out / run / f"step-{steps:08d}"
                for scale, seed in product(scales, range(seeds)) if folder.exists() else ():
                    about = {"run": run, "scale": scale, "step": steps, "n": samples, "seed": seed}
                    if any(_has_facts(row, about) for row in rows):
                        continue
                    trained = load_trained(folder)
                    ask = Request(n=samples, scale=scale, seed=seed, precision="auto", batch_size=min(samples, AT_ONCE))
                    row = score(generate(trained, ask, progress=False), real, extractor, metrics, 2500)
                    row |= about | {"images_seen": steps * trained.recipe.training.batch_size}
                    append_rows(file, [{**row, "checkpoint": ""}])
                    yield row


CARD = """# {name}

{title}.

* **Data**: MNIST, 60,000 digits of 28 x 28 (Y. LeCun, C. Cortes, C. Burges; CC BY-SA 3.0).
* **Recipe**: `guidance-nb train models/{name}`; {images:,} images seen, {steps:,} optimiser steps of {batch}.
* **Weights**: moving average, half precision, {weights:,} numbers; trained on {hardware}.
{rows}
```python
import guidance_nb as gnb

model = gnb.load("{name}")
```
"""


def write_weights(saved: Checkpoint, target: Path, metadata: dict[str, Any]) -> None:
    "Write the moving average alone, in half precision, as a folder that is read like a checkpoint."
    weights = {name: value.half() if value.is_floating_point() else value for name, value in saved.ema.items()}
    with write_aside(target) as aside:
        aside.mkdir()
        save_file(weights, aside / _NAMES[1])
        record = saved.record | {"metadata": metadata, "files": {_NAMES[1]: _measure(aside / _NAMES[1])}}
        (aside / "checkpoint.json").write_text(_seal_record(record), encoding="utf-8")


def ship(out: Path, target: Path) -> None:
    "Write the averages in half precision with a card each."
    rows = read_rows(out / "curve.csv")[1] if (out / "curve.csv").exists() else []
    for name in NAMES:
        if not checkpoints_in(out / name):
            print(f"{name}: not trained")
            continue
        saved, trained = read_checkpoint(out / name), load_trained(out / name)
        facts = dict(saved.metadata)
        facts["recipe"] = override(trained.recipe, {"samples": [Path(s).name for s in trained.recipe.method.samples]})
        facts["recipe"] = facts["recipe"].model_dump(mode="json")
        write_weights(saved, target / name, facts)
        told = [f"* **Accuracy** on the test images: {accuracy(trained):.4f}"] if "evaluation" in name else []
        for row in rows:
            if row["run"] == name and int(row["step"]) == saved.step:
                numbers = ", ".join(f"{key.split('_')[0]} {float(row[key]):.3f}" for key in row if is_result(row, key))
                told.append(f"* **At scale {float(row['scale']):g}**, {row['n']} samples, NFE {row['nfe']}: {numbers}")
        table = trained.recipe.training
        card = CARD.format(
            name=name, title=trained.recipe.title.split(";")[0], images=saved.step * table.batch_size, steps=saved.step,
            batch=table.batch_size, rows="\n".join([*told, ""]), hardware=device_name(),
            weights=sum(p.numel() for p in trained.model.parameters()),
        )  # fmt: skip
        (target / name / "README.md").write_text(card)
        size = sum(part.stat().st_size for part in (target / name).iterdir())
        print(f"{name}: {size / 1e6:.2f} MB")


def device_name() -> str:
    "What this runs on."
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"


def is_result(row: dict[str, Any], key: str) -> bool:
    "Whether a column is a metric that the row has."
    return key.split("_")[0] in (*METRICS, "agreement") and row[key] not in ("", None)


@torch.no_grad()
def accuracy(trained: Any) -> float:
    "Share of the test images that a classifier of clean images gets right."
    table = trained.recipe.data
    data = load_images(table.source, "test", size=table.size or None)
    data = _take_images(data, table.limit) if table.limit else data
    x, device = from_uint8(data.images(torch.arange(len(data)))), next(trained.model.parameters()).device
    found = [trained.model(part.to(device), torch.zeros((), device=device)).argmax(1).cpu() for part in x.split(1000)]
    return (torch.cat(found) == data.labels).double().mean().item()


def main() -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("train", "one", "curve", "ship"))
    parser.add_argument("names", nargs="*", help="models; none takes all")
    parser.add_argument("--out", type=Path, default=Path("runs/zoo"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=1, help="trainings beside each other")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which every training is left")
    parser.add_argument("--budget", type=float, default=0.0, help="seconds for all trainings; 0 for the whole")
    parser.add_argument("--samples", type=int, default=5000, help="samples of a point of the curve")
    parser.add_argument("--seeds", type=int, default=1, help="seeds of sampling of a point of the curve")
    parser.add_argument("--portions", default="1,2,3,4,6,8", help="eighths of the training at which they are drawn")
    parser.add_argument("--long", type=int, default=0, help="steps of 128 images, in place of the recipes' training")
    parser.add_argument("--cuda-graphs", action="store_true", help="record the steps as CUDA graphs")
    parser.add_argument("--changes", default="{}", help="of the recipes, as JSON, for a rehearsal")
    parser.add_argument("--target", type=Path, default=MODELS, help="where models are written")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.action == "train":
        names, changes = asked.names or [*NAMES, *(f"{name}-1" for name in SECOND)], json.loads(asked.changes)
        changes |= lengthened(asked.long) if asked.long else {}
        if asked.budget:
            graphs = {"cuda_graphs": True} if asked.cuda_graphs else {}
            changes |= plan_steps(asked.out, names, changes | graphs, asked.budget)
        extra = ["--changes", json.dumps(changes), *(["--cuda-graphs"] if asked.cuda_graphs else [])]
        train_all(asked.out, names, extra, asked.workers, asked.seconds)
    elif asked.action == "one":
        changes = json.loads(asked.changes) | ({"cuda_graphs": True} if asked.cuda_graphs else {})
        train_one(asked.out, asked.names[0], changes, asked.seconds)
    elif asked.action == "curve":
        portions = tuple(int(part) for part in asked.portions.split(","))
        for row in follow(asked.out, asked.samples, portions, seeds=asked.seeds):
            told = ", ".join(f"{key.split('_')[0]} {float(row[key]):.3f}" for key in row if is_result(row, key))
            print(f"{row['run']} scale {row.get('scale')} step {row.get('step')}: {told}", flush=True)
    else:
        ship(asked.out, asked.target)


if __name__ == "__main__":
    main()
