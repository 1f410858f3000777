"""How good samples are: features, scores against real images and their baseline, sweeps, a measured weight."""

import math
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guidance_nb._checks import check_choice, require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import Json, write_aside
from guidance_nb.cli._devices import main_only, own_device
from guidance_nb.cli._load import _model_names, _shuffled
from guidance_nb.cli._run import Request, Trained, _complete_request, generate, load_trained, postprocess
from guidance_nb.denoisers import NetworkDenoiser
from guidance_nb.engine._hardware import choose_precision
from guidance_nb.engine._sampling import extract_sharded
from guidance_nb.images import _features as image_features
from guidance_nb.images._data import FILES, SampleFile, from_uint8, load_images, load_samples
from guidance_nb.images._features import INCEPTION, Extractor, Features, Reference
from guidance_nb.images._metrics import append_rows, column, feature_scores, provenance, read_rows
from guidance_nb.model_guidance import AutoWeight, ModelGuidanceLoss
from guidance_nb.training import LossContext

if TYPE_CHECKING:
    from pandas import DataFrame

_METRICS = ("fd", "sfd", "kd", "score", "fid", "sfid", "kid", "is", "precision", "recall", "agreement")
_HIGHER = ("precision", "recall", "agreement", "is", "score")  # better if higher; all others are distances


def is_metric(name: str) -> bool:
    "Whether a column of this `name` holds a metric, such as fid or recall_resnet56."
    return name.split("_")[0] in _METRICS


def find_feature_extractor(
    source: str, weights: str | None = None, metrics: tuple[str, ...] | None = None
) -> Extractor:
    "The feature extractor of a name, or of a checkpoint of an evaluation classifier."
    if not Path(source).exists() and source not in _model_names():
        return image_features.find_extractor(source, weights, metrics)
    trained = load_trained(source).require("evaluation_classifier", "classifier")
    device = next(trained.model.parameters()).device

    def layers(images: Tensor) -> dict[str, Tensor]:
        x = from_uint8(images[:, : trained.shape[0]])  # grey images come with three equal channels
        grey = trained.shape[0] > 1 or torch.equal(images[:, :1].expand_as(images), images)
        told = f"{trained.shape}, which {source} was trained on; grey images may have three equal channels"
        require(grey and x.shape[1:] == trained.shape, "image shape", tuple(images.shape[1:]), told)
        features = trained.model.look(x, torch.zeros((), device=device))
        return {"features": features, "logits": trained.model.head(features)}

    return Extractor(trained.recipe.method.name, layers, device, trained.classes)


def load_real(
    source: str,  # "mnist", "cifar10", a folder of images, an .npz of images, or an ADM statistics file
    split: str = "train",  # "train" or "test", of a published data set
    shape: tuple[int, ...] | None = None,  # Shape of the images to compare with, to whose size a folder is brought
) -> tuple[Tensor | Reference, str]:  # Images or statistics, and a name for tables
    "Real images to compare with."
    path = Path(source)
    if source in FILES:
        data, name = load_images(source, split), f"{source} {split}"
        x = data.images(torch.arange(len(data)))
    elif path.suffix.lower() == ".npz" and path.is_file() and _holds_moments(path):
        return image_features.read_reference(path), path.name
    else:
        size = (shape[1], shape[2]) if shape and path.is_dir() else None
        x, name = load_samples(path, size=size).x, path.name
    sizes = tuple(shape or x.shape[1:])[1:], tuple(x.shape[2:])
    require(sizes[0] == sizes[1], "sizes of samples and reference", sizes, "one size, since resizing changes all")
    return x, name


def _holds_moments(path: Path) -> bool:
    "Whether an .npz file is meant to hold ADM's statistics: moments, or at least no images."
    with suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
        return "mu.npy" in archive.namelist() or "arr_0.npy" not in archive.namelist()
    return False


def choose_metrics(
    real: Tensor | Reference, extractor: Extractor, metrics: tuple[str, ...] | None = None, best: str = ""
) -> tuple[str, ...]:
    "The metrics of a comparison; an error for a column that they do not give."
    names = image_features.metric_names(metrics, extractor.name)
    if isinstance(real, Reference) and metrics is None:
        lacking = set() if real.images is not None else {"kd", "precision", "recall"}
        lacking |= set() if "spatial" in real.moments else {"sfd"}
        names = [name for name in names if name not in lacking]
    columns = [column(name, extractor.name) for name in names]
    columns += [] if extractor.name == INCEPTION else [f"agreement_{extractor.name}"]
    check_choice("best", best, [*columns, ""])
    return tuple(names)


def _keep_neighbours(reference: Features, n: int = 10_000) -> Features:
    "Keep all moments of a `reference` and n rows, always the same, for what takes all pairs, as ADM's suite does."
    total = min((len(rows) for rows in reference.rows.values()), default=0)
    if total <= n:
        return reference
    moments = {layer: reference.moment(layer) for layer in reference.rows if layer != "logits"}
    chosen = _shuffled(total)[:n]
    return replace(reference, rows={layer: rows[chosen] for layer, rows in reference.rows.items()}, moments=moments)


def extract_reference_features(
    source: str,  # See load_real
    split: str,  # "train" or "test"
    shape: tuple[int, ...],  # Shape of the samples
    extractor: Extractor,  # The feature extractor
    metrics: tuple[str, ...] | None = None,  # See choose_metrics
    best: str = "",  # See choose_metrics
    progress: bool = True,  # Whether to show a progress bar
) -> tuple[Features, tuple[str, ...]]:  # Features, which only the main process needs and has; and names of metrics
    "Features of real images, and the metrics they allow."
    found = Features(extractor.name)

    def look() -> tuple[str, ...]:
        nonlocal found
        real, name = load_real(source, split, shape)
        chosen = choose_metrics(real, extractor, metrics, best)
        found = _keep_neighbours(image_features.extract(real, extractor, name, 256, progress, chosen))
        return chosen

    chosen = main_only(look)
    return found, chosen


def _match_labels(file: SampleFile, extractor: Extractor) -> Tensor | None:
    "Labels of the samples in a `file` as the `extractor` numbers its classes, by name where both have names."
    names = file.facts.get("classes")
    if file.c is None or not extractor.classes or not isinstance(names, list) or not names:
        return file.c
    require(int(file.c.max()) < len(names), "label of the samples", int(file.c.max()), f"0 to {len(names) - 1}")
    known = [check_choice("class of the samples", name, extractor.classes) for name in names]
    return torch.tensor([extractor.classes.index(name) for name in known])[file.c]


def score(
    file: SampleFile,  # Samples, their labels and facts
    reference: Features,  # Features of the real images
    extractor: Extractor,  # The feature extractor
    metrics: tuple[str, ...] | None = None,  # Names, or all that are usual for the extractor
    batch_size: int = 256,  # Images per call of the network
    progress: bool = False,  # Whether to show a progress bar
    features: Features | None = None,  # Those of the samples, see extract_sharded; None to extract them now
) -> Json:  # One row of a table
    "Score samples: all metrics, class agreement if the extractor classifies, and the facts of their making."
    sizes = tuple(file.x.shape[2:]), tuple(reference.size or file.x.shape[2:])
    require(sizes[0] == sizes[1], "sizes of samples and reference", sizes, "one size, since resizing changes all")
    labels, facts = _match_labels(file, extractor), dict(file.facts)
    features = features or image_features.extract(file.x, extractor, "samples", batch_size, progress)
    made = (facts.get("sampler", ""), facts.get("steps", 0), facts.get("scale", math.nan), facts.get("seed", 0))
    row = provenance(features, reference, *made, facts.get("labels", "none" if labels is None else "as given"))
    interval = facts.pop("interval", None)
    if isinstance(interval, list | tuple) and tuple(interval) != (0, 1):
        facts["interval"] = ",".join(map(str, interval))
    row |= {name: value for name, value in facts.items() if name not in row and isinstance(value, int | float | str)}
    row |= feature_scores(features, reference, metrics)
    if labels is not None and extractor.name != INCEPTION and "logits" in features.rows:
        row[f"agreement_{extractor.name}"] = (features.rows["logits"].argmax(1) == labels).double().mean().item()
    return row


def _baseline_size(source: str, reference: Features, n: int) -> tuple[str, int]:
    """What can stand for real images that are not in the `reference`, which came from `source`: for n samples.

    The other split of a published data set, or "" for one half of the reference, and how many images there are.
    """
    for split, other, total in (("train", "test", 10_000), ("test", "train", 50_000)):
        if source in FILES and reference.name == f"{source} {split}":
            return other, min(n, total)
    return "", min(n, min((len(rows) for rows in reference.rows.values()), default=0) // 2)


def baseline_row(
    source: str, reference: Features, extractor: Extractor, n: int, metrics: tuple[str, ...] | None = None
) -> Json | None:
    "How n real images score that are not in the reference: the other split, or one half of the reference on the other."
    other, n = _baseline_size(source, reference, n)
    if other:
        data = load_images(source, other)
        chosen = _shuffled(len(data))[:n]
        facts = {"method": "real", "labels": "as they are", "classes": list(data.classes)}
        return score(SampleFile(data.images(chosen), data.labels[chosen], facts), reference, extractor, metrics)
    if n < 4:
        return None
    whole = _shuffled(min(len(rows) for rows in reference.rows.values()))
    one, two = reference.take(whole[:n]), reference.take(whole[n : 2 * n])
    row = provenance(one, two, "", 0, math.nan, 0, "as they are") | {"method": "real"}
    return row | {"reference_checksum": reference.checksum} | feature_scores(one, two, metrics)


class _MeasuredGuidanceLoss:
    "Model-guidance with a weight moved every so many steps by an error of the moving average (arXiv 2502.12154)."

    changes = True  # from step to step

    def __init__(self, loss: ModelGuidanceLoss, measure: Callable[[NetworkDenoiser], float], every: int):
        self.auto, self.measure, self.every, self.moved_at = AutoWeight(), measure, every, 0
        self.loss = replace(loss, weight=self.auto)

    def __call__(self, model: NetworkDenoiser, x0: Tensor, c: Tensor, context: LossContext) -> Tensor:
        "Per-sample losses `[batch]`."
        step = context.step
        if step >= max(1, self.loss.start_step) and step % self.every == 0 and step > self.moved_at:
            self.moved_at = step
            self.auto.update(self.measure(context.ema))
        return self.loss(model, x0, c, context)

    def state_dict(self) -> Json:
        "What a checkpoint keeps."
        return {"weight": asdict(self.auto), "moved_at": self.moved_at}

    def load_state_dict(self, state: Json) -> None:
        "Go on from a checkpoint."
        self.auto, self.moved_at = AutoWeight(**state["weight"]), state["moved_at"]
        self.loss = replace(self.loss, weight=self.auto)


def _measured_loss(average: Trained, loss: ModelGuidanceLoss) -> _MeasuredGuidanceLoss:
    "A Model-guidance `loss` whose weight follows the Fréchet distance of samples of the moving `average`."
    table, shape = average.recipe.method, average.image_shape
    extractor, source = find_feature_extractor(table.auto_features), table.auto_reference or average.recipe.data.source
    real, names = extract_reference_features(source, "train", shape, extractor, ("fd",), progress=False)

    def measure(model: NetworkDenoiser) -> float:
        file = generate(replace(average, model=model), Request(n=table.auto_samples), progress=False)
        return main_only(lambda: float(score(file, real, extractor, names)[column("fd", extractor.name)]))

    return _MeasuredGuidanceLoss(loss, measure, table.auto_every)


# Sweeps


def sweep_points(
    request: Request, scales: tuple[float, ...], steps: tuple[int, ...] = (), samplers: tuple[str, ...] = ()
) -> list[Request]:
    "The points of a sweep, each once."
    grid = dict.fromkeys(product(samplers or (request.sampler,), steps or (request.steps,), scales))
    return [request.changed(sampler=sampler, steps=n, scale=scale) for sampler, n, scale in grid]


def _same(one: object, other: object) -> bool:
    "Whether two values are equal, as text or as numbers: 2 and 2.0 are one scale."
    try:
        return str(one) == str(other) or float(str(one)) == float(str(other))
    except ValueError:
        return False


def _has_facts(row: Json, wanted: Json) -> bool:
    "Whether a `row` of a table has the `wanted` values."
    return all(_same(row.get(name, ""), value) for name, value in wanted.items())


def _is_done(file: Path, wanted: Json) -> bool:
    "Whether a table in a `file` has a row with the `wanted` values."
    return file.exists() and any(_has_facts(row, wanted) for row in read_rows(file)[1])


def _point_facts(trained: Trained, point: Request, reference: Features, classifier: Trained | None) -> Json:
    "What identifies a complete `point` of `trained`, guided by a `classifier` or not, against a `reference`."
    facts = point.model_dump(include={"scale", "steps", "sampler", "seed", "n", "labels"})
    facts |= {"checkpoint": trained.path, "step": trained.step, "training_seed": trained.recipe.training.seed}
    facts |= {"classifier": classifier.path if classifier else "", "extractor": reference.extractor}
    facts |= {"arithmetic": choose_precision(point.precision, own_device()), "reference_checksum": reference.checksum}
    return facts | ({"channels": point.channels} if point.channels else {})


def sweep(
    trained: Trained,  # A trained denoiser
    points: list[Request],  # What to draw, point by point
    reference: Features,  # Features of the real images, of `extract`
    extractor: Extractor,  # The feature extractor
    out: Path,  # Folder for rows.csv; finished points in it are kept
    classifier: Trained | None = None,  # Guide by this classifier
    correction: Trained | None = None,  # Score the corrected samples, too
    progress: bool = True,  # Whether to show progress bars
    source: str = "",  # "mnist" or "cifar10" where that is the reference: its other split gives the row of real images
    metrics: tuple[str, ...] | None = None,  # As for score
) -> Iterator[Json]:  # Rows of the table, each as from `score`
    """Generate and score point after point; yields the rows as they are made, that of real images first.

    A row that is in the table is not made again, so a sweep that was stopped goes on. With a `correction` each point
    has two rows. What `trained` cannot draw, such as a scale that a network was not trained for, is a `ValueError`
    when the first row is asked for, before any sample is drawn.
    """
    file = out / "rows.csv"
    points = [_complete_request(trained, point, classifier) for point in points]

    def lacks(wanted: Json) -> bool:  # in the main process, which alone has all of the reference
        return not main_only(lambda: _is_done(file, wanted))

    def add(make: Callable[[], Json | None]) -> list[Json]:
        "Let the main process make a row, if it can, and write it."
        rows = main_only(lambda: [row for row in [make()] if row is not None])
        main_only(lambda: append_rows(file, rows))
        return rows

    n = max(point.n for point in points)
    wanted = {"method": "real", "n": _baseline_size(source, reference, n)[1], "extractor": reference.extractor}
    if lacks(wanted | {"reference_checksum": reference.checksum}):
        yield from add(partial(baseline_row, source, reference, extractor, n, metrics))
    corrections = {"": None} | ({str(correction.path): correction} if correction else {})
    for point in points:
        wanted = _point_facts(trained, point, reference, classifier)
        missing = [repair for name, repair in corrections.items() if lacks(wanted | {"correction": name})]
        if not missing:
            continue
        drawn = generate(trained, point, classifier, progress)
        for repair in missing:
            final = postprocess(repair, drawn, progress=progress) if repair else drawn
            features = extract_sharded(final.x, extractor, "samples", 256, progress)
            yield from add(partial(score, final, reference, extractor, metrics, features=features))


def _read_curves(out: Path) -> "tuple[DataFrame, DataFrame]":
    "The rows of a sweep in a folder `out` as two pandas tables: points, each with its curve's name, and real images."
    with extra("plots"):
        import pandas as pd
    from guidance_nb.plots import METHOD_LABELS

    table = pd.read_csv(out / "rows.csv", keep_default_na=False)
    for name in table.columns:
        if is_metric(name) or name == "scale":
            table[name] = pd.to_numeric(table[name], errors="coerce")
    real, table = table[table.method == "real"], table[table.method != "real"]
    names = table.method.replace("plain", "classifier_free_guidance")
    for key, name in (("classifier", "classifier_guidance"), ("correction", "flow_postprocessing")):
        if key in table:
            names = names.mask(table[key] != "", name)
    if len(table[["sampler", "steps"]].drop_duplicates()) > 1:
        labels = names.map(lambda name: METHOD_LABELS.get(name, name))
        names = labels + ", " + table.sampler + " " + table.steps.astype(str)
    return table.assign(curve=names), real


def finish_sweep(out: Path, best: str, among: Json | None = None) -> Json:
    "Draw the curves of a sweep into curves.png and pick its best point."
    with extra("plots"):
        from matplotlib.figure import Figure
    from guidance_nb.plots import show_curves

    table, real = _read_curves(out)
    shown = [name for name in table.columns if is_metric(name)]
    fig = Figure(figsize=(3.2 * len(shown), 3), layout="constrained")
    for ax, name in zip(fig.subplots(1, len(shown), squeeze=False)[0], shown):
        show_curves(table.dropna(subset=[name]), "scale", name, hue="curve", ax=ax)
        for value in real[name].dropna() if name in real else ():
            ax.axhline(value, color="0.6", ls="--")
        title = "dashed: real images" if len(real) else ""
        ax.set(xlabel="guidance scale", ylabel=name.replace("_", " "), title=title)
    with write_aside(out / "curves.png") as aside:
        fig.savefig(aside, dpi=120, format="png")
    records: list[Json] = table.dropna(subset=[best]).to_dict("records")  # type: ignore[assignment]
    rows = [row for row in records if _has_facts(row, among or {})]
    require_that(rows, f"{out / 'rows.csv'} has no row of this sweep with {best}", "at least one")
    choose = max if best.split("_")[0] in _HIGHER else min
    return choose(rows, key=lambda row: row[best])
