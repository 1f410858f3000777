"""The papers' claims on trained models of MNIST: every model at every scale and number of steps, with one command.

    python tools/claims.py --out runs/claims --budget 5

It wants the models that the package ships, `mnist-cfg` and so on, and takes others of these names, and the checkpoints
along their training, from folders named by `--models`. What each claim needs most is drawn first; a row is written as
soon as it is known, started again with the same --out it goes on with what is missing, and what does not fit into the
budget (in minutes) is listed in left_out.txt. `--rehearse` walks the whole way with few samples.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from cifar10 import (
    METRICS,
    NEIGHBOURS,
    Drawing,
    Point,
    Scores,
    device_name,
    reference_features,
    remember_noise,
    synchronize,
)
from guidance_nb.cli._evaluation import find_feature_extractor
from guidance_nb.cli._load import MODELS
from guidance_nb.cli._run import Trained, _take_images, generate, load_trained
from guidance_nb.engine._checkpoints import checkpoints_in
from guidance_nb.images._data import ImageData, load_images

SCALES = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
STEPS = (5, 10, 20, 50)
SEEDS = (0, 1, 2)
CLASSIFIERS = ("classifier", "classifier-linear")
WAYS = {"fp32": ("fp32", False), "tf32": ("fp32", True), "bf16": ("bf16", True)}  # precision; TF32 for fp32 products
MULTISTEP = "dpmpp_2m"  # one evaluation a step, as good in 20 steps as Euler in many; Euler's steps are DDIM's here


@dataclass(frozen=True)
class Grid:
    "What is asked for of every model."

    scales: tuple[float, ...] = SCALES
    steps: tuple[int, ...] = STEPS
    usual: int = 20  # steps, where their number is not the question
    samples: int = 5_000  # a point
    limit: int = 0  # real images to compare with; 0 for all


def first_points(grid: Grid, seed: int) -> list[Point]:
    "What the claims need most."
    few, most = grid.steps[0], grid.scales
    common: Any = {"steps": grid.usual, "seed": seed, "sampler": MULTISTEP}
    return [
        *(Point("cfg", scale, corrections=("post", *[NEIGHBOURS] * (seed == 0)), **common) for scale in most),
        *(Point(name, 2.0, **common) for name in ("mg", "mg-1")),
        *(Point("mg-aware", scale, **common) for scale in most if scale <= 4),
        *(Point("cfg-1", scale, **common) for scale in most),
        *(Point("cfg", 1.0, classifier=each, **common) for each in CLASSIFIERS),
        *(Point("cfg", scale, steps, seed=seed) for steps in (few, grid.usual) for scale in (1.0, 2.0)),
        *(
            Point(name, scale, steps, seed=seed)
            for name in ("aligned", "aligned-1", "cfg-1")
            for steps in (few, grid.usual)
            for scale in ((1.0, 2.0) if name == "cfg-1" else (2.0, 4.0))
        ),
        *(Point("aligned-anchored", scale, steps, seed=seed) for steps in (few, grid.usual) for scale in (2.0, 4.0)),
    ]


def other_points(grid: Grid, seed: int) -> list[Point]:
    "The rest of the grid: steps for the aligned loss, whose scale 2 means 1, and scales of classifier guidance."
    common: Any = {"steps": grid.usual, "seed": seed, "sampler": MULTISTEP}
    plain = [
        Point(name, scale, steps, seed=seed)
        for steps in grid.steps
        for name in ("cfg", "aligned", "aligned-anchored")
        for scale in grid.scales
    ]
    return [
        *(Point("cfg", scale, classifier=each, **common) for scale in (*grid.scales, 16.0) for each in CLASSIFIERS),
        *(Point("aligned", scale, steps, portion=0.5, seed=seed) for steps in grid.steps[::2] for scale in (2.0, 4.0)),
        *(point for point in plain if point.steps < max(grid.steps)),
        *(Point("mg", 2.0, steps, seed=seed) for steps in grid.steps),
        *(point for point in plain if point.steps == max(grid.steps)),
    ]


class Models:
    "Trained models by their names without `mnist-`, and the checkpoints along their training."

    def __init__(self, folders: list[Path]):
        self.folders = [*folders, MODELS]

    @cache  # noqa: B019, they live as long as the process
    def find(self, run: str, portion: float = 1.0) -> Trained:
        "The finished model, or the checkpoint nearest to a portion of its training."
        if portion == 1:
            return load_trained(next(place for place in self.places(run) if self.holds(place)))
        kept = self.checkpoints(run)
        return load_trained(min(kept, key=lambda path: abs(step_of(path) / step_of(kept[-1]) - portion)))

    def places(self, run: str) -> list[Path]:
        return [folder / name for folder in self.folders for name in (f"mnist-{run}", run)]

    def holds(self, place: Path) -> bool:
        return (place / "checkpoint.json").exists() or bool(checkpoints_in(place))

    def has(self, run: str) -> bool:
        "Whether there is such a model."
        return any(map(self.holds, self.places(run)))

    def checkpoints(self, run: str) -> list[Path]:
        "The checkpoints along its training, earliest first; empty if there is only the last."
        found = max((checkpoints_in(place)[::-1] for place in self.places(run)), key=len)
        return found if len(found) > 1 else []


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix("step-"))


def curve_points(models: Models, grid: Grid) -> list[Point]:
    "Quality along the training: at most eight checkpoints of a model, the last of which is the finished model."
    common: Any = {"steps": grid.usual, "sampler": MULTISTEP}
    wanted = {"cfg": (1.0, 2.0), "mg": (2.0,), "mg-aware": (2.0,), "aligned": (2.0,), "cfg-1": (1.0, 2.0)}
    points = [Point(name, scale, **common) for name, scales in wanted.items() for scale in scales]
    for name, scales in wanted.items():
        steps = [step_of(path) for path in models.checkpoints(name)]
        chosen = sorted({round(i * (len(steps) - 2) / 7) for i in range(8)}) if len(steps) > 1 else []
        points += [Point(name, scale, portion=steps[i] / steps[-1], **common) for scale in scales for i in chosen]
    return points


def all_points(models: Models, grid: Grid) -> list[Point]:
    "Every point once, of the models that are there: seed 0 of everything, then what the claims need of other seeds."
    first = first_points(grid, 0) + curve_points(models, grid) + other_points(grid, 0)
    others = [point for seed in SEEDS[1:] for point in first_points(grid, seed)]
    others += [point for seed in SEEDS[1:] for point in other_points(grid, seed)]
    points = []
    for point in dict.fromkeys(first + others):
        near = point.portion == 1 or any(
            abs(step_of(path) / step_of(models.checkpoints(point.run)[-1]) - point.portion) < 0.05
            for path in models.checkpoints(point.run)
        )
        if models.has(point.run) and near and (not point.classifier or models.has(point.classifier)):
            points.append(
                replace(
                    point,
                    corrections=tuple(name for name in point.corrections if name == NEIGHBOURS or models.has(name)),
                )
            )
    return points


def weight(point: Point) -> float:
    "Network evaluations a sample, those of a classifier with its gradient counted thrice."
    return point.steps * point.at_once * (3 if point.classifier else 1) + 16 * len(point.corrections)


def allow_tf32(fine: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = fine
    torch.backends.cudnn.allow_tf32 = fine


def choose_arithmetic(models: Models, grid: Grid, scores: Scores, real: ImageData) -> tuple[Drawing, float]:
    "The fastest arithmetic that leaves the distance of CFG where fp32 has it, within one per cent; and evaluations/s."
    point = first_points(grid, 0)[list(grid.scales).index(2.0)]
    common: Any = {"rows": 2 * grid.samples, "real": real}
    ways = [Drawing(models.find, each, arithmetic=name, **common) for name, (each, _) in WAYS.items()]
    chosen, found, rate = ways[0], dict[str, float](), 0.0
    for way in ways if torch.cuda.is_available() else ways[:1]:
        allow_tf32(WAYS[way.arithmetic][1])
        trained, ask = models.find(point.run), way.request(point, grid.samples)
        generate(trained, ask.changed(steps=2), progress=False)  # looks for algorithms
        synchronize()
        start = time.perf_counter()
        generate(trained, ask, progress=False)
        synchronize()
        speed = grid.samples * point.nfe / (time.perf_counter() - start)
        bare = replace(point, corrections=())
        list(scores.add_points([bare], lambda point, rows: way.draw(point, grid.samples, rows)))  # noqa: B023
        facts = {
            "run": point.run,
            "scale": 2.0,
            "steps": point.steps,
            "seed": 0,
            "portion": 1.0,
            "flow": "",
            "guide": "",
        }
        facts |= {"arithmetic": way.arithmetic, "sampler": point.sampler}
        row = scores.find(facts)
        found[way.arithmetic] = (
            float(next(value for key, value in row.items() if key.startswith("fd_"))) if row else math.nan
        )
        print(f"{way.arithmetic}: {speed:,.0f} evaluations/s, fd {found[way.arithmetic]:.4f}", flush=True)
        if abs(found[way.arithmetic] / found["fp32"] - 1) < 0.01 and speed > rate:
            chosen, rate = way, speed
    allow_tf32(WAYS[chosen.arithmetic][1])
    (scores.file.parent / "speed.json").write_text(
        json.dumps({"device": device_name(), "fd": found, "chosen": chosen.arithmetic, "evaluations_per_second": rate})
    )
    return chosen, rate


def carry_out(out: Path, models: Models, grid: Grid, deadline: float) -> None:
    "All of it, from where it stopped."
    extractor = find_feature_extractor(str(models.find("evaluation").path))
    data, test = load_images("mnist"), load_images("mnist", "test")
    data, test = (_take_images(part, grid.limit) if grid.limit else part for part in (data, test))
    scores = Scores(out / "claims_mnist.csv", *reference_features(data, "mnist train", extractor), METRICS)
    for row in scores.add_baselines(test, (grid.samples, len(test))):
        show(row)
    drawing, rate = choose_arithmetic(models, grid, scores, data)
    points = all_points(models, grid)
    expected = {point: grid.samples * weight(point) / rate + 0.1 for point in points}
    left = deadline - time.monotonic()
    print(f"{len(points)} points, about {sum(expected.values()):.0f} s of sampling; {left:.0f} s are left", flush=True)
    left_out = []

    def fitting() -> Iterator[Point]:
        for point in points:
            if time.monotonic() + expected[point] + 2 < deadline:
                yield point
            else:
                left_out.append(point)

    for row in scores.add_points(fitting(), lambda point, rows: drawing.draw(point, grid.samples, rows)):
        show(row)
    (out / "left_out.txt").write_text("".join(f"{point}\n" for point in left_out))
    told = f"{len(left_out)} points that did not fit in, see left_out.txt; the same command goes on with them"
    print(f"missing: {told if left_out else 'nothing'}")


def show(row: dict[str, Any]) -> None:
    kind = " + ".join(str(row[key]) for key in ("run", "guide", "flow") if row.get(key))
    values = " ".join(f"{key.split('_')[0]} {float(row[key]):.3f}" for key in row if key.endswith("_classifier"))
    where = " ".join(f"{key} {row.get(key, '')}" for key in ("scale", "steps", "sampler", "seed", "portion"))
    print(f"  {kind:28} {where} {values}", flush=True)


def main(arguments: list[str] | None = None) -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/claims"), help="folder for the rows; gone on with")
    parser.add_argument("--budget", type=float, default=5.0, help="minutes after which this call leaves")
    parser.add_argument(
        "--samples", type=int, default=Grid.samples, help="a point; distances of few are biased upwards"
    )
    parser.add_argument("--models", type=Path, nargs="*", default=[Path("runs")], help="folders of further models")
    parser.add_argument("--rehearse", action="store_true", help="20 samples a point, 200 real images, few points")
    asked = parser.parse_args(arguments)
    if not asked.budget > 0:
        parser.error(f"--budget {asked.budget:g}; allowed: a positive number of minutes")
    if asked.samples < 4:
        parser.error(f"--samples {asked.samples}; allowed: 4 or more, for a distance")
    models, deadline = Models(asked.models), time.monotonic() + 60 * asked.budget
    for name in ("cfg", "evaluation"):
        if not models.has(name):
            parser.error(f"no model mnist-{name} in {', '.join(map(str, models.folders))}; allowed: --models FOLDER")
    asked.out.mkdir(parents=True, exist_ok=True)
    remember_noise()
    grid = Grid((1.0, 2.0), (2, 3), 3, 20, 200) if asked.rehearse else Grid(samples=asked.samples)
    carry_out(asked.out, models, grid, deadline)


if __name__ == "__main__":
    main()
