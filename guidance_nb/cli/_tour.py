"""The tour: train, sample and score every method of the comparison, and write tables, figures and one page."""

import base64
import functools
import html
import io
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

import guidance_nb as gnb
from guidance_nb._checks import explained, require
from guidance_nb._extras import extra
from guidance_nb._files import check_folder, clean_remnants, digest, parse_json, write_aside, write_file
from guidance_nb.cli._tables import METHODS, METRICS, show_scores, summary
from guidance_nb.comparison import Problem, load_problem, score_samples
from guidance_nb.mixtures import sample_mixture
from guidance_nb.model_guidance import mg_weight_from_scale
from guidance_nb.networks import NoisyClassifier
from guidance_nb.plots import COLOURS, METHOD_LABELS, show_density, show_images, show_points

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from pandas import DataFrame

Row = dict[str, object]
SCALES = (1.0, 1.5, 2.0, 3.0, 5.0)
MATCHED = 2.0  # Scale of the aligned loss, and of the Model-guidance network that takes none
NETWORKS = {  # What each method evaluates; base learned with label dropout, post from samples of it under CFG
    "none": ("base",),
    "exact": (),
    "classifier_guidance": ("base", "classifier"),
    "classifier_free_guidance": ("base",),
    "aligned_loss": ("aligned",),
    "model_guidance": ("mg", "mg_aware"),
    "flow_postprocessing": ("post",),
}
SECONDS = {  # Of training each network, and of sampling from the exact model, on one slow core; the bar corrects them
    "fractal": {"base": 28, "classifier": 26, "aligned": 42, "mg": 40, "mg_aware": 39, "post": 40, "exact": 20},
    "digits": {"base": 33, "classifier": 23, "aligned": 46, "mg": 47, "mg_aware": 40, "post": 38, "exact": 17},
}
SAMPLING, SCORING = 5, 2  # Of any other method


@dataclass(frozen=True)
class Budget:
    "What decides a result besides data, method, scale and seed; by default, a few seconds for each data set."

    width: int = 32  # Of the networks
    depth: int = 2  # Residual blocks
    octaves: int = 0  # Sines of the coordinates, for the plane
    train_steps: int = 150  # Of every network
    batch: int = 256  # Samples per training step
    lr: float = 5e-3  # Peak learning rate
    ema: float = 0.9  # Decay of the moving average
    samples: int = 200  # Samples drawn for each row of the table
    steps: int = 8  # Heun steps of sampling
    cost_steps: tuple[int, ...] = (4,)  # Fewer steps, for the curves of quality against cost
    pairs: int = 400  # Generated samples per scale that the postprocessing flow learns from
    post_scales: tuple[float, ...] = (1.0, 2.0, 3.0)  # Those scales


def budget_for(data: str, quick: bool = False) -> Budget:
    "Three to seven minutes on two cores for both data sets; `quick`: everything in miniature."
    if quick:
        return Budget()
    number = 3000 if data == "fractal" else 4000
    same = replace(Budget(), train_steps=number, ema=1 - 8 / number, steps=32, cost_steps=(4, 8, 16))
    if data == "fractal":
        return replace(same, width=128, depth=4, octaves=6, batch=512, lr=5e-3, samples=2000, pairs=8000)
    return replace(same, width=256, depth=3, batch=128, lr=2e-3, samples=1000, pairs=2000)


# Stages


@dataclass(frozen=True)
class Stage:
    "One unit of work, whose `file` is named by a hash of everything that decides the result."

    data: str
    seed: int
    kind: Literal["train", "sample"]
    name: str  # A network, or a method
    scales: tuple[float, ...]  # To sample at, or to train a network for; empty for networks without a scale
    budget: Budget

    @property
    def needs(self) -> tuple["Stage", ...]:
        "The training stages whose networks this one uses, and the stage whose samples it corrects."
        names = NETWORKS[self.name] if self.kind == "sample" else ("base",) if self.name == "post" else ()
        drawn = (replace(self, name="classifier_free_guidance"),) if self.name == "flow_postprocessing" else ()
        return *(training_stage(self.data, self.seed, name, self.scales, self.budget) for name in names), *drawn

    @property
    def file(self) -> str:
        "Name of the result, `data-seed-kind-name-hash.safetensors`."
        decides = digest(json.dumps(asdict(self), sort_keys=True))[:10]
        return f"{self.data}-{self.seed}-{self.kind}-{self.name}-{decides}.safetensors"

    @property
    def seconds(self) -> float:
        "How long it is expected to take, for the progress bar."
        seconds = SECONDS[self.data].get(self.name, SAMPLING) + (SCORING if self.kind == "sample" else 0)
        return seconds * self.budget.train_steps / budget_for(self.data).train_steps

    @property
    def own_scales(self) -> tuple[float, ...]:
        "The scales a sampling stage has rows for; no guidance means scale 1."
        return (1.0,) if self.name == "none" else self.scales

    @property
    def jobs(self) -> list[tuple[float, int]]:
        "Scales and steps to sample with: every scale at all steps, and the scale nearest to 2 with fewer steps."
        near = min(self.own_scales, key=lambda scale: abs(scale - 2))
        fewer = () if self.name == "exact" else self.budget.cost_steps  # the exact model costs no network evaluation
        return [(scale, self.budget.steps) for scale in self.own_scales] + [(near, steps) for steps in fewer]

    def labels(self, problem: Problem) -> Tensor:
        "The classes of its samples, in turn."
        return torch.arange(self.budget.samples) % problem.mixture.num_classes


def training_stage(data: str, seed: int, name: str, scales: tuple[float, ...], budget: Budget) -> Stage:
    "The stage that trains a network; only the one that takes a scale depends on the scales asked for."
    aware = (min(1.0, *scales), max(1.0, *scales)) if name == "mg_aware" else ()
    return Stage(data, seed, "train", name, aware, budget)


def save_stage(path: Path, tensors: dict[str, Tensor], info: dict[str, list[float]]) -> None:
    "Write a stage's tensors, and small facts beside them, whole or not at all."
    from safetensors.torch import save_file

    with write_aside(path) as aside:
        save_file({name: x.contiguous() for name, x in tensors.items()}, aside, {"info": json.dumps(info)})


def load_stage(path: Path) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    "Read a stage; a damaged file is a `ValueError` that says which and what to do."
    from safetensors import SafetensorError, safe_open

    kinds = SafetensorError, KeyError, TypeError, json.JSONDecodeError
    with explained(f"stage file {path} is damaged", "delete it and start again", *kinds), safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, parse_json(file.metadata()["info"])  # noqa: SIM118


# Networks


def make_network(stage: Stage, problem: Problem) -> nn.Module:
    "The untrained network of a stage, the same on every call."
    (d,), classes, path = problem.x.shape[1:], problem.mixture.num_classes, gnb.FlowPath()
    width, depth, octaves = stage.budget.width, stage.budget.depth, stage.budget.octaves
    if stage.name == "post":
        return gnb.FlowPostprocessor((d,), classes, width, depth, octaves)
    if stage.name == "classifier":
        return NoisyClassifier(d, classes, path, width, depth, seed=stage.seed)
    aware = stage.name == "mg_aware"
    return gnb.mlp_denoiser(d, path, classes, "velocity", width, depth, aware, octaves=octaves, seed=stage.seed)


def make_loss(stage: Stage) -> Callable[..., Tensor]:
    "The loss that trains a network. Model-guidance acts at all times here, as guidance by CFG does."
    if stage.name == "mg_aware":
        return gnb.ModelGuidanceLoss(scale_range=(stage.scales[0], stage.scales[1]), interval=(0.0, 1.0))
    losses: dict[str, Callable[..., Tensor]] = {
        "classifier": gnb.ClassifierLoss(gnb.FlowPath()),
        "aligned": gnb.AlignedLoss(MATCHED),
        "mg": gnb.ModelGuidanceLoss(mg_weight_from_scale(MATCHED), interval=(0.0, 1.0)),
    }
    return losses.get(stage.name, gnb.DenoisingLoss())


def train_network(stage: Stage, problem: Problem, folder: Path) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    "Train the network of a stage: weights of the moving average, and no facts beside them."
    if stage.name == "post":
        return train_post(stage, problem, folder).state_dict(), {}
    budget, model, loss, data = stage.budget, make_network(stage, problem), make_loss(stage), (problem.x, problem.c)
    size = budget.train_steps, budget.batch, budget.lr
    state = gnb.train(model, loss, data, *size, ema=budget.ema, seed=stage.seed, progress=False)
    return state.ema.state_dict(), {}


def train_post(stage: Stage, problem: Problem, folder: Path) -> gnb.FlowPostprocessor:
    "Generate with the base at several scales, and fit one flow to all of these samples."
    budget, (need,), shape = stage.budget, stage.needs, tuple(problem.x.shape[1:])
    base = load_network(need, problem, folder)
    labels, generated = torch.arange(budget.pairs) % problem.mixture.num_classes, []
    for number, scale in enumerate(budget.post_scales):
        guided, seed = gnb.ClassifierFreeGuidance(base, scale), 1000 + 10 * stage.seed + number
        x = gnb.sample(guided, labels, shape, steps=budget.steps, seed=seed, batch_size=1000, progress=False)
        generated.append(x)
    return gnb.FlowPostprocessor.fit(
        torch.cat(generated), problem.x[:20_000], labels.repeat(len(generated)), problem.c[:20_000],
        steps=budget.train_steps, batch_size=budget.batch, lr=budget.lr, ema=budget.ema, seed=stage.seed,
        progress=False, width=budget.width, depth=budget.depth, octaves=budget.octaves,
    )  # fmt: skip


def load_network(stage: Stage, problem: Problem, folder: Path) -> Any:
    "Rebuild a trained network from its stage."
    network = make_network(stage, problem)
    network.load_state_dict(load_stage(folder / stage.file)[0])
    return network.eval()


# Samples


def guided_model(method: str, networks: dict[str, Any], problem: Problem, scale: float) -> gnb.Denoiser:
    "The denoiser that stands for a method at a scale."
    if method == "none":
        return networks["base"]
    if method == "exact":
        return gnb.ClassifierFreeGuidance(gnb.ExactDenoiser(problem.mixture, gnb.FlowPath()), scale)
    if method == "classifier_guidance":
        return gnb.ClassifierGuidance(networks["base"], networks["classifier"], scale)
    if method == "model_guidance":
        return networks["mg"] if scale == MATCHED else gnb.FixedScale(networks["mg_aware"], scale)
    return gnb.ClassifierFreeGuidance(networks["aligned" if method == "aligned_loss" else "base"], scale)


def sample_method(stage: Stage, problem: Problem, folder: Path) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Samples and some trajectories by scale and steps; NFE and seconds beside them. Post-processing begins with the
    samples of CFG as they are, and their cost is part of its own."""
    networks = {need.name: load_network(need, problem, folder) for need in stage.needs if need.kind == "train"}
    earlier = [load_stage(folder / need.file) for need in stage.needs if need.kind == "sample"]
    drawn, costs = earlier[0] if earlier else ({}, {})
    tensors: dict[str, Tensor] = {}
    info: dict[str, list[float]] = {}
    shape, c = tuple(problem.x.shape[1:]), stage.labels(problem)
    for scale, steps in stage.jobs:
        which, begin = f"{scale:g} {steps}", time.perf_counter()
        with gnb.count_nfe() as nfe:
            if drawn:
                points = torch.stack([drawn[f"x {which}"], networks["post"](drawn[f"x {which}"], c)])
            else:
                model = guided_model(stage.name, networks, problem, scale)
                points = gnb.sample_trajectory(model, c, shape, steps=steps, seed=stage.seed, progress=False).points
        own = nfe.total / len(c), time.perf_counter() - begin
        info[which] = [before + more for before, more in zip(costs.get(which, (0.0, 0.0)), own)]
        tensors |= {f"x {which}": points[-1], f"paths {which}": points[:, :60]}
    return tensors, info


# Scores


def score_stage(stage: Stage, folder: Path) -> list[Row]:
    "Rows of the table for one method and seed."
    problem = problem_of(stage.data)
    tensors, info = load_stage(folder / stage.file)
    rows, c = [], stage.labels(problem)
    for scale, steps in stage.jobs:
        weight = f"weight {mg_weight_from_scale(scale):g}" if scale == MATCHED else "scale-aware"
        variant = {"aligned_loss": f"trained at {MATCHED:g}", "model_guidance": weight}.get(stage.name, "")
        row: Row = {"data": stage.data, "method": stage.name, "scale": scale, "seed": stage.seed, "variant": variant}
        row |= {"sampler": "heun", "steps": steps, "samples": stage.budget.samples}
        row |= dict(zip(("nfe", "seconds"), info[f"{scale:g} {steps}"]))
        rows.append({**row, **score_samples(tensors[f"x {scale:g} {steps}"], c, problem)})
    return rows


def baseline_rows(data: str, samples: int, seeds: int = 3) -> list[Row]:
    "Real samples scored in place of generated ones: what a perfect model would get."
    problem, rows = problem_of(data), []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(100 + seed)
        if data == "fractal":
            x, c = sample_mixture(problem.mixture, torch.arange(samples) % 2, generator)
        else:
            chosen = torch.randperm(len(problem.x), generator=generator)[:samples]
            x, c = problem.x[chosen], problem.c[chosen]
        rows.append({"data": data, "method": "real", "seed": seed, **score_samples(x, c, problem)})
    return rows


# Worker processes


def _end_with_parent() -> None:
    "A worker would never stop waiting for the next job of a main process that was killed."
    if parent := multiprocessing.parent_process():
        parent.join()
        os._exit(1)


def start_worker(threads: int) -> None:
    "Set up a worker process."
    torch.set_num_threads(threads)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interruption is the main process's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    tqdm.set_lock(threading.RLock())  # tqdm's own is a system semaphore, left behind by a stopped worker


@contextmanager
def worker_pool(workers: int) -> Iterator[ProcessPoolExecutor]:
    "Worker processes of equally many threads each, which end with an error as well."
    threads = max(1, (os.cpu_count() or 1) // workers)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), start_worker, (threads,))
    try:
        yield pool
    except BrokenProcessPool:
        raise OSError("a worker process died, perhaps out of memory; start again to continue") from None
    finally:  # all is done, or nobody waits for it any more
        for process in list(pool._processes.values()):
            process.terminate()
        pool.shutdown(cancel_futures=True)


problem_of = functools.cache(load_problem)  # once a process, with its threshold and classifier


def run_stage(stage: Stage, folder: Path) -> list[Row]:
    "Run one stage and write its file, unless it is there; the rows of its samples."
    problem, file = problem_of(stage.data), folder / stage.file
    if not file.exists():
        make = train_network if stage.kind == "train" else sample_method
        save_stage(file, *make(stage, problem, folder))
    return score_stage(stage, folder) if stage.kind == "sample" else []


class Job(NamedTuple):
    "Work for a process: what is called with what, its expected seconds, and the numbers of the jobs it waits for."

    call: Callable[..., list[Row]]
    arguments: tuple[object, ...]
    seconds: float
    after: frozenset[int] = frozenset()


def run_jobs(jobs: list[Job], pool: Executor, workers: int, bar: tqdm) -> list[list[Row]]:
    """Results of jobs, the first that can begin first. The bar counts a job in full once it is done, never before, and
    until then by how fast those before it were."""
    done: dict[int, list[Row]] = {}
    running: dict[Future[list[Row]], tuple[int, float]] = {}
    waiting, expected, passed = list(range(len(jobs))), 0.0, 0.0  # seconds of what is done
    while waiting or running:
        for number in [n for n in waiting if jobs[n].after <= done.keys()][: workers - len(running)]:
            waiting.remove(number)
            running[pool.submit(jobs[number].call, *jobs[number].arguments)] = (number, time.monotonic())
        for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
            number, start = running.pop(future)
            done[number] = future.result()
            expected, passed = expected + jobs[number].seconds, passed + time.monotonic() - start
        now, speed = time.monotonic(), expected / passed if passed else 1
        partly = sum(min(speed * (now - start), 0.95 * jobs[number].seconds) for number, start in running.values())
        bar.update(max(0, expected + partly - bar.n))
    return [done[number] for number in range(len(jobs))]


def plan(stages: list[Stage], folder: Path) -> list[Job]:
    "Train networks, those that others wait for first, sample as soon as they are there, and score; files are reused."
    missing = (need for stage in stages for need in stage.needs if not (folder / need.file).exists())
    needs = dict.fromkeys(need for need in missing if need.kind == "train")
    work = [*sorted(needs, key=lambda need: (need.name != "base", need.name != "post", -need.seconds)), *stages]
    number = {stage: n for n, stage in enumerate(work)}
    after = [frozenset(number[need] for need in stage.needs if need in number) for stage in work]
    seconds = [SCORING if (folder / stage.file).exists() else stage.seconds for stage in work]
    return [Job(run_stage, (stage, folder), long, each) for stage, long, each in zip(work, seconds, after)]


def finish(jobs: list[Job], progress: bool = True, workers: int = 2) -> list[list[Row]]:
    "All jobs, and the rows of each."
    style = "{percentage:3.0f} % |{bar}| {elapsed} passed, about {remaining} left"
    total = sum(job.seconds for job in jobs)
    with worker_pool(workers) as pool, tqdm(total=total, bar_format=style, smoothing=0, disable=not progress) as bar:
        return run_jobs(jobs, pool, workers, bar)


# The tour


def run_tour(
    data: tuple[str, ...] = tuple(METRICS),  # Data sets
    seeds: int = 1,  # Number of seeds, from 0
    out: str | Path = "tour",  # Folder for results and finished stages
    scales: tuple[float, ...] = SCALES,  # Guidance scales
    quick: bool = False,  # Whether to run everything in miniature
    progress: bool = True,  # Whether to show a progress bar
) -> "tuple[DataFrame, DataFrame]":  # Rows of the methods and of real samples
    "Train, sample and score all methods; writes comparison.csv, cost.csv, baseline.csv, figures and index.html."
    with extra("plots"):
        import pandas as pd

    scales = tuple(sorted(dict.fromkeys(map(float, scales))))  # NaN stays where it is
    require(scales and all(0 < scale < 100 for scale in scales), "scales", scales, "numbers above 0 and below 100")
    budgets = {problem_of(name).name: budget_for(name, quick) for name in data}  # an unknown name ends here
    folder = check_folder("out", Path(out)) / "stages"
    folder.mkdir(exist_ok=True)
    clean_remnants(folder)
    stages = [Stage(d, seed, "sample", m, scales, budgets[d]) for d in data for seed in range(seeds) for m in METHODS]
    work, last = plan(stages, folder), [Job(baseline_rows, (name, budgets[name].samples), SCORING) for name in data]
    done = finish([*work, *last], progress, min(4, os.cpu_count() or 1))
    rows, real = (pd.DataFrame([row for job in part for row in job]) for part in (done[: len(work)], done[len(work) :]))
    full = rows.steps == rows.data.map({name: budget.steps for name, budget in budgets.items()})
    table, cost = rows[full].reset_index(drop=True), rows[~full].reset_index(drop=True)
    for name, frame in (("comparison.csv", table), ("cost.csv", cost), ("baseline.csv", real)):
        write_file(Path(out) / name, frame.to_csv(index=False, float_format="%.6g"))
    write_page(table, cost, real, stages, Path(out))
    return table, real


# Figures and page


def show_stage(stage: Stage, folder: Path, problem: Problem, trajectories: bool, ax: "Axes") -> None:
    "Samples of a method, or their trajectories, at the scale nearest to 3 of those asked for."
    scale = min(stage.own_scales, key=lambda scale: abs(scale - 3))
    tensors, which = load_stage(folder / stage.file)[0], f"{scale:g} {stage.budget.steps}"
    x, paths = tensors[f"x {which}"], tensors[f"paths {which}"]
    ax.set_title(METHOD_LABELS[stage.name] + ("" if stage.name == "none" else f", scale {scale:g}"), fontsize=9)
    if trajectories:
        show_density(problem.mixture, ax=ax)
        ax.plot(paths[:, :, 0], paths[:, :, 1], lw=0.5, alpha=0.6, color=COLOURS[stage.name])
        ax.plot(*paths[-1].T, ".", ms=2, color="black")
    else:
        show_samples(x, stage.labels(problem), problem, ax)


def show_samples(x: Tensor, c: Tensor, problem: Problem, ax: "Axes") -> None:
    "Points over the true density, or eighty images with a column for each class."
    if problem.name == "digits":
        order = torch.argsort(c[:200], stable=True)
        columns = [order[c[order] == k][:8] for k in range(10)]
        show_images(x[torch.stack(columns, 1).flatten()], columns=10, ax=ax)
    else:
        show_density(problem.mixture, ax=ax)
        show_points(x, c, ax=ax, size=0.8)


def draw_gallery(stages: list[Stage], folder: Path, problem: Problem, trajectories: bool = False) -> "Figure":
    "One panel for each method, and one for real samples beside samples."
    with extra("plots"):
        from matplotlib import figure

    fig = figure.Figure(figsize=(10, 5.4), layout="constrained")
    axes = fig.subplots(2, 4)
    for ax, stage in zip(axes.flat, stages):
        show_stage(stage, folder, problem, trajectories, ax)
    if not trajectories:
        axes.flat[-1].set_title("real samples", fontsize=9)
        show_samples(problem.real, problem.real_c, problem, axes.flat[-1])
    for ax in axes.flat:
        ax.axis("off")
    return fig


CAPTIONS = {
    "samples": "Samples (colours: classes) over the true density. Points beside the grey branches are errors.",
    "trajectories": "How sixty samples travel from noise to data; postprocessing only moves the last bit.",
    "scale": "Quality against scale. Dashed: real samples. Bars: standard deviation over seeds.",
    "cost": "Quality against NFE at the scale nearest to 2: few steps left, many steps right.",
}
TITLES = {"fractal": "The 2-D fractal", "digits": "Handwritten digits, 8x8 pixels"}


def embed(fig: "Figure", file: Path, caption: str) -> str:
    "Save a figure as a file, and return it with its caption as HTML that needs no file."
    buffer = io.BytesIO()
    fig.savefig(buffer, dpi=110)
    write_file(file, buffer.getvalue())
    picture = base64.b64encode(buffer.getvalue()).decode()
    image = f'<img alt="{html.escape(caption)}" src="data:image/png;base64,{picture}">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def write_page(
    table: "DataFrame",  # Rows at all steps
    cost: "DataFrame",  # Rows with fewer steps
    real: "DataFrame",  # Rows of real samples
    stages: list[Stage],  # Finished sampling stages
    out: Path,  # Folder to write to
) -> None:
    "Draw the figures, and write them with the table into one index.html."
    sections = []
    for data in table.data.unique():
        first = [stage for stage in stages if stage.data == data and stage.seed == 0]
        figures = {"samples": draw_gallery(first, out / "stages", problem_of(data))}
        if data == "fractal":
            figures["trajectories"] = draw_gallery(first, out / "stages", problem_of(data), trajectories=True)
        figures["scale"] = show_scores(table, real, data)
        figures["cost"] = show_scores(table, real, data, cost)
        captions = CAPTIONS | ({"samples": "Samples of every class."} if data == "digits" else {})
        sections.append(f"<h2>{TITLES[data]}</h2>")
        sections += [embed(fig, out / f"{data}-{name}.png", captions[name]) for name, fig in figures.items()]
        sections.append(f'<div class="wide">{summary(table, real, data).to_html(index=False, border=0)}</div>')
    budgets = {stage.data: asdict(stage.budget) for stage in stages}
    facts = html.escape(f"torch {torch.__version__}; seeds {table.seed.nunique()}; budgets {json.dumps(budgets)}")
    page = Path(__file__).with_name("tour.html").read_text(encoding="utf-8")
    write_file(out / "index.html", page.replace("{sections}", "\n".join(sections)).replace("{facts}", facts))
