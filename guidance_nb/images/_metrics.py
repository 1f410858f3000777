"""FID and other numbers that are quoted for images, each with what it leaves unsaid: network, reference and N."""

import csv
import io
import math
import platform
import shlex
import sys
from collections.abc import Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from guidance_nb import __version__
from guidance_nb._checks import Share, checked, require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import Json, locked, read_csv, write_file
from guidance_nb._points import as_labels
from guidance_nb.images._features import (
    INCEPTION,
    LAYERS,
    PIXELS,
    QUOTED,
    Extractor,
    FeatureFunction,
    Features,
    Reference,
    _best_device,
    check_images,
    extract,
    find_extractor,
    metric_names,
)
from guidance_nb.metrics import frechet, nearest_neighbours, precision_recall


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Unbiased squared MMD of features `[n, f]` and `[m, f]` (arXiv 1801.01401).

    The kernel is (x y / f + 1)^3, the subsets are torch-fidelity's. The expectation does not depend on n and m; the
    distance may be negative.
    """
    size = min(1000, len(a), len(b))
    subsets = 1 if len(a) == len(b) == size else 100  # all subsets of the whole are the whole
    if len(a) * len(b) > 50 * size**2:  # then one subset after another is faster
        with extra("images"):
            from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

        options = {"kid_subset_size": size, "kid_subsets": subsets, "verbose": False}
        return kid_features_to_metric(a, b, **options)[KEY_METRIC_KID_MEAN]
    random, a, b = np.random.RandomState(2020), a.cpu().double(), b.cpu().double()  # its seed, so its subsets
    u, v = (torch.zeros(subsets, len(x), dtype=torch.float64) for x in (a, b))  # which rows are in which subset
    for subset in range(subsets):
        for chosen in (u, v):
            chosen[subset, random.choice(chosen.shape[1], size, replace=False)] = 1

    def total(x: Tensor, y: Tensor, u: Tensor, v: Tensor) -> Tensor:
        parts = zip((x / x.shape[1]).split(128), u.split(128, 1))
        return torch.stack([(w @ (part @ y.T).add_(1).pow_(3) * v).sum() for part, w in parts]).sum()

    same = [total(x, x, w, w) - (w @ (x.square().mean(1) + 1) ** 3).sum() for x, w in ((a, u), (b, v))]
    return (sum(same) / (size * (size - 1)) - 2 * total(a, b, u, v) / size**2).item() / subsets


def class_score(logits: Tensor) -> float:
    "How sure and how varied a classifier's labels are, by torch-fidelity in 10 splits (arXiv 1606.03498)."
    with extra("images"):
        from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN]


def column(metric: str, extractor: str) -> str:
    "The name of a number: the quoted one for Inception, for every other network one that contains it."
    if extractor != INCEPTION:
        return f"{metric}_{extractor}"
    return next((quoted for quoted, ours in QUOTED.items() if ours == metric), metric)


def feature_scores(
    samples: Features, reference: Features, metrics: Sequence[str] | None = None, k: int = 3
) -> dict[str, float]:
    "The metrics of two sets of features of one extractor."
    one, names, values = samples.extractor, metric_names(metrics, samples.extractor), {}
    require(one == reference.extractor, "extractors", f"{one} and {reference.extractor}", "one for both sets")
    for metric in names:
        layer = LAYERS[metric]
        if metric in ("fd", "sfd"):
            values[metric] = frechet(samples.moment(layer), reference.moment(layer))
        elif metric == "score":
            values[metric] = class_score(samples.layer(layer))
        elif metric == "kd":
            values[metric] = kernel_distance(samples.layer(layer), reference.layer(layer))
        elif metric not in values:
            found = precision_recall(reference.layer(layer), samples.layer(layer), k, _best_device())
            values["precision"], values["recall"] = found
        require(math.isfinite(values[metric]), column(metric, one), values[metric], "features with a finite score")
    return {column(metric, one): values[metric] for metric in names}


def image_scores(
    samples: Tensor | Features,  # Generated images, uint8 `[n, channels, h, w]`, or their features
    reference: Tensor | Features,  # Real images, their features, or a statistics file
    extractor: str | Extractor | None = None,  # Name or Extractor; without it that of features, "inception-v3-compat"
    metrics: Sequence[str] | None = None,  # fid, sfid, is, kid, precision, recall; of other networks fd, kd, ...
    weights: str | Path | None = None,  # Local file with the extractor's weights
    k: int = 3,  # Neighbour that sets the radius for precision and recall
    batch_size: int = 64,  # Images per call of the network
    progress: bool = False,  # Show progress bars
) -> dict[str, float]:  # Column -> value; columns of other networks than Inception contain their name
    "Score generated images against real ones; every image passes the network once."
    sets = {"samples": samples, "reference": reference}
    shapes = [x.size if isinstance(x, Features) else tuple(check_images(name, x).shape[1:]) for name, x in sets.items()]
    sizes, channels = ({shape[-2:] for shape in shapes if shape}, {shape[0] for shape in shapes if len(shape) == 3})
    fine = len(sizes) < 2 and (len(channels) < 2 or (channels == {1, 3} and extractor != PIXELS))
    require(fine, "shapes of samples and reference", shapes, "one size, since resizing changes all, and equal channels")
    seen = (each.extractor for each in sets.values() if isinstance(each, Features))
    extractor = extractor or next(seen, INCEPTION)
    wanted = metric_names(metrics, extractor if isinstance(extractor, str) else extractor.name)
    if isinstance(samples, Tensor) and isinstance(reference, Tensor):
        extractor = find_extractor(extractor, weights, wanted)  # once for both
    look = partial(extract, batch_size=batch_size, progress=progress, metrics=wanted, weights=weights)
    real = look(reference, extractor, "reference")
    return feature_scores(look(samples, extractor, "samples"), real, wanted, k)


def image_baseline(
    real: Tensor | Features,  # Real images, their features, or a statistics file with images
    n: int | None = None,  # Size of each half: that of the samples to compare with; without it half of all
    extractor: str | Extractor | None = None,  # Name or Extractor, as for image_scores
    metrics: Sequence[str] | None = None,  # As for image_scores
    weights: str | Path | None = None,  # Local file with the extractor's weights
    k: int = 3,  # Neighbour that sets the radius for precision and recall
    seed: int = 0,  # Of the random halves
    batch_size: int = 64,  # Images per call of the network
) -> dict[str, float]:  # Column with `_baseline` -> value
    "The real-data baseline: the metrics between two random, disjoint sets of real images of the same size."
    name = "real"
    if isinstance(real, Reference):
        real, name = real.images, f"arr_0 of {real.name}"  # type: ignore[assignment]
    features = extract(real, extractor, name, batch_size, metrics=metrics, weights=weights)
    total = min((len(rows) for rows in features.rows.values()), default=0)
    n = total // 2 if n is None else n
    require(1 <= n <= total // 2, "n", n, f"1 to {total // 2}, for two disjoint sets of {total} images")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    a, b = features.take(order[:n]), features.take(order[n : 2 * n])
    return {f"{name}_baseline": value for name, value in feature_scores(a, b, metrics, k).items()}


def class_agreement(
    images: Tensor,  # uint8, `[n, channels, h, w]`
    labels: Tensor,  # The classes that were asked for, `[n]`
    classifier: FeatureFunction | Extractor,  # uint8 images `[n, 3, h, w]` -> logits `[n, num_classes]`
    batch_size: int = 256,  # Images per call of the classifier
) -> tuple[float, Tensor]:  # Share of all, and per class `[num_classes]`, NaN for a class nobody asked for
    "Share of the images in which an evaluation classifier sees the class that was asked for."
    if not isinstance(classifier, Extractor):
        parameter = next(classifier.parameters(), None) if isinstance(classifier, nn.Module) else None
        classifier = Extractor("classifier", classifier, "cpu" if parameter is None else parameter.device)
    rows = extract(images, classifier, "images", batch_size).rows
    logits = rows.get("logits", rows.get("features", torch.empty(0, 0)))
    c = as_labels("labels", labels, len(images), logits.shape[1])
    right = (logits.argmax(1) == c).double()
    hits, asked = (torch.zeros(logits.shape[1], dtype=torch.float64).index_add(0, c, v) for v in (right, right * 0 + 1))
    return right.mean().item(), hits / asked


def nearest_images(images: Tensor, train: Tensor, k: int = 2) -> tuple[Tensor, Tensor]:
    """Distances to the k nearest training images, and which they are: `[n, k]` each, the nearest first.

    Images are uint8, `images` `[n, channels, h, w]` and `train` `[m, channels, h, w]` with m >= k; other types or
    shapes are a `ValueError`. A distance is the root of the mean squared difference of values, in grey levels. The
    search is exact.
    """
    shapes = check_images("images", images).shape[1:], check_images("train", train, at_least=k).shape[1:]
    require(shapes[0] == shapes[1], "shapes of images and train", shapes, "equal shapes")
    distance, index = nearest_neighbours(images, train, k, device=_best_device())
    return distance / math.sqrt(images[0].numel()), index


@checked
def copy_share(
    images: Tensor,  # uint8, `[n, channels, h, w]`
    train: Tensor,  # uint8, `[m, channels, h, w]`
    ratio: Share = 1 / 3,  # Of the distances to the nearest and the second nearest, below which an image is a copy
) -> tuple[float, float]:  # Share of copies, and mean distance to the nearest in grey levels
    "Share of the images far closer to one training image than to any other, and the mean distance."
    near, second = nearest_images(images, train)[0].T
    return (near <= ratio * second).double().mean().item(), near.mean().item()


PROVENANCE = (
    "n", "reference", "reference_n", "reference_checksum", "extractor", "sampler", "steps", "scale", "labels", "seed",
    "command", "guidance_nb", "torch", "torch_fidelity", "hardware",
)  # fmt: skip


def provenance(
    samples: Features | Tensor, reference: Features, sampler: str, steps: int, scale: float, seed: int,
    labels: str = "balanced", command: str | None = None,
) -> Json:  # fmt: skip
    "What a number means nothing without, by column, for `append_rows`; a guidance scale of 1 is none."
    n, source = samples.n if isinstance(samples, Features) else len(samples), (reference.name, reference.n)
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = __version__, torch.__version__, version("torch-fidelity")
    made = reference.extractor, sampler, steps, scale, labels, seed, command
    return dict(zip(PROVENANCE, (n, *source, reference.checksum, *made, *versions, hardware)))


def read_rows(path: str | Path) -> tuple[list[str], list[dict[str, str]]]:
    "Read a table of rows with provenance; a `ValueError` for any other."
    columns, *lines = read_csv(Path(path)) or [[*PROVENANCE]]  # nothing was written to an empty file yet
    missing = ", ".join(key for key in PROVENANCE if key not in columns)
    faults = [f"it lacks {missing}"] if missing else []
    faults += ["two columns have one name"] if len({*columns}) < len(columns) else []
    faults += [f"line {n} has {len(line)} values" for n, line in enumerate(lines, 2) if len(line) != len(columns)]
    told = f"{path} is not a table of image metrics: {', '.join(faults[:3])}"
    require_that(not faults, told, f"a table that append_rows wrote, {len(columns)} values in each line")
    return columns, [dict(zip(columns, line)) for line in lines]


def append_rows(path: str | Path, rows: Sequence[Json]) -> None:
    "Append rows to a table: columns are united, what is there stays, and a crash leaves the old table or the new one."
    path = Path(path)
    for row in rows:
        missing = [key for key in PROVENANCE if key not in row]
        require(not missing, "missing keys of a row", ", ".join(missing), "none that provenance() returns")
    path.parent.mkdir(parents=True, exist_ok=True)
    with locked(path.parent):
        columns, old = read_rows(path) if path.exists() else (list(PROVENANCE), [])
        columns += [key for key in dict.fromkeys(key for row in rows for key in row) if key not in columns]
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *rows])
        write_file(path, text.getvalue())
