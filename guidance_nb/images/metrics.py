"""FID and the other numbers people quote for images, each with what it leaves unsaid: the network, the reference and N."""

import csv
import difflib
import hashlib
import math
import os
import platform
import re
import shlex
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from guidance_nb import __version__
from guidance_nb.metrics import check_classes


def check_images(
    name: str,  # Name of the argument, for the message
    images: Tensor,  # Images
    at_least: int = 1,  # Required number of images
) -> Tensor:  # The images, as they came
    "Refuse what is not a set of uint8 images with a `ValueError` that names the argument."
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        found = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"{name} is {found}; allowed: a torch.uint8 tensor (from [-1, 1]: x * 127.5 + 127.5, rounded)")
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not min(images.shape[2:]):
        raise ValueError(f"{name} has shape {tuple(images.shape)}; allowed: [n, 1 or 3, height, width]")
    if len(images) < at_least:
        raise ValueError(f"{name} has {len(images)} images; allowed: {at_least} or more")
    return images


INCEPTION = "inception-v3-compat"


@dataclass(frozen=True)
class Extractor:
    "A feature function with a name: uint8 images `[n, 3, h, w]` to features `[n, f]`, or to a dict of layers of these."

    name: str
    network: Callable[[Tensor], Any]
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        if self.name != INCEPTION and not re.fullmatch(r"[a-z][a-z0-9_]*", self.name):
            raise ValueError(f"name = {self.name!r}; allowed: small letters, digits and _, since columns carry it")


@dataclass(frozen=True)
class Features:
    "What a network says of a set of images: rows per layer, moments per layer, and where they come from."

    extractor: str
    rows: dict[str, Tensor] = field(default_factory=dict)  # layer -> [n, f]
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> mean [f], covariance [f, f]
    name: str = "images"
    n: int | None = None
    checksum: str = ""
    size: tuple[int, ...] = ()

    def moment(self, layer: str) -> tuple[Tensor, Tensor]:
        "Mean and unbiased covariance of a layer in float64, computed once."
        if layer not in self.moments:
            rows = self.rows[layer]
            mean = torch.stack([part.double().sum(0) for part in rows.split(4096)]).sum(0) / len(rows)
            spread = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
            for part in rows.split(4096):
                spread += (part.double() - mean).T @ (part.double() - mean)
            self.moments[layer] = mean, spread / (len(rows) - 1)
        return self.moments[layer]

    def take(self, indices: Tensor) -> "Features":
        "The features of some of the images, with moments of their own."
        rows = {layer: values[indices] for layer, values in self.rows.items()}
        return Features(self.extractor, rows, {}, f"{len(indices)} of {self.name}", len(indices), "", self.size)


def checksum(
    data: Tensor | Path,  # Images, or a file
) -> str:  # The first 16 hexadecimal digits of its SHA-256
    "What identifies a set of images, or a file, in a table."
    digest = hashlib.sha256()
    if isinstance(data, Tensor):
        digest.update(str(tuple(data.shape)).encode())
        for part in data.split(4096):
            digest.update(part.contiguous().cpu().numpy().data)
    else:
        with open(data, "rb") as file:
            while block := file.read(2**22):
                digest.update(block)
    return digest.hexdigest()[:16]


def extract(
    images: Tensor,  # uint8, `[n, 1 or 3, h, w]`; grey images are repeated to three channels
    extractor: Extractor,  # From inception, resnet_extractor, or your own
    name: str = "images",  # What the set is called in the table, such as "cifar10 train"
    batch_size: int = 64,  # Images per call of the network
    progress: bool = False,  # Show a progress bar
) -> Features:  # Rows in the order of the images, float32, on the CPU
    "One pass of a network over a set of images: every metric of this module works on the result."
    from tqdm.auto import tqdm

    check_images(name, images)
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad(), tqdm(total=len(images), disable=not progress, unit="image", desc=name) as bar:
        for batch in images.split(batch_size):
            out = extractor.network(batch.to(extractor.device).expand(-1, 3, -1, -1))
            for layer, rows in (out if isinstance(out, dict) else {"features": out}).items():
                if rows.ndim != 2 or len(rows) != len(batch):
                    raise ValueError(f"{extractor.name} returns {tuple(rows.shape)}; allowed: [{len(batch)}, f]")
                parts.setdefault(layer, []).append(rows.float().cpu())
            bar.update(len(batch))
    rows = {layer: torch.cat(values) for layer, values in parts.items()}
    for layer, values in rows.items():
        if not torch.isfinite(values).all():
            bad = int((~torch.isfinite(values)).any(1).sum())
            raise ValueError(f"{extractor.name} returns {layer} that are not finite for {bad} images of {name}")
    return Features(extractor.name, rows, {}, name, len(images), checksum(images), tuple(images.shape[2:]))


INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the name ends with the SHA-256 it must have


def inception_weights(
    weights: str | Path | None = None,  # File or its folder; else GUIDANCE_NB_INCEPTION, else a download
) -> Path:  # The file
    "Find the weights of Inception: as given, in GUIDANCE_NB_INCEPTION, or in torch's cache, downloaded once."
    if given := weights or os.environ.get("GUIDANCE_NB_INCEPTION"):
        path = Path(given).expanduser()
        path = path / INCEPTION_FILE if path.is_dir() else path
        if not path.is_file():
            raise ValueError(f"weights = {path}: no such file; needed: {INCEPTION_FILE}, torch-fidelity release v0.2.0")
        return path
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / INCEPTION_FILE
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=path.stem[-8:], progress=False)
        except (OSError, RuntimeError) as error:
            raise ValueError(
                f"Inception's weights are not here and the download failed ({error}): get {INCEPTION_FILE} from "
                "torch-fidelity's release v0.2.0 on GitHub, and name it by weights= or GUIDANCE_NB_INCEPTION"
            ) from None
    return path


@cache
def spatial_extractor() -> str:  # The name under which torch-fidelity knows it
    "Register with torch-fidelity Inception with sFID's layer: 7 channels of Mixed_6d, 7 x 17 x 17 = 2,023 numbers."
    from torch_fidelity import register_feature_extractor
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class InceptionMixed6d(FeatureExtractorInceptionV3):
        features_list: list[str]
        seen: Tensor

        def __init__(self, name: str, features_list: list[str], **options: Any) -> None:
            super().__init__(name, features_list, **options)
            self.Mixed_6d.register_forward_hook(lambda module, args, out: setattr(self, "seen", out[:, :7].flatten(1)))

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            wanted = self.features_list
            try:  # the parent stops at the last layer it is asked for, and "768" follows Mixed_6d
                self.features_list = [layer for layer in wanted if layer != "mixed_6d_7"] or ["768"]
                found = dict(zip(self.features_list, super().forward(x)), mixed_6d_7=self.seen.float())
            finally:
                self.features_list = wanted
            return tuple(found[layer] for layer in wanted)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return (*FeatureExtractorInceptionV3.get_provided_features_list(), "mixed_6d_7")

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:  # so "fid" with this extractor is sFID
            parent = FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(metric)
            return "mixed_6d_7" if metric == "fid" else parent

    register_feature_extractor("inception-v3-compat-mixed6d", InceptionMixed6d)
    return "inception-v3-compat-mixed6d"


INCEPTION_LAYERS = {"features": "2048", "spatial": "mixed_6d_7", "logits": "logits_unbiased"}


def _best_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def inception(
    weights: str | Path | None = None,  # See inception_weights
    layers: Sequence[str] = ("features", "spatial", "logits"),  # Which to compute
    name: str = INCEPTION,  # Other weights than the ones behind FID need another name, which columns then carry
    device: str | torch.device | None = None,  # CUDA where there is one
) -> Extractor:
    "The network of FID: Inception-v3 with TensorFlow's weights, by torch-fidelity, all layers in one pass."
    from torch_fidelity.utils import create_feature_extractor

    path = inception_weights(weights)
    if name == INCEPTION and not checksum(path).startswith(INCEPTION_FILE[-12:-4]):
        raise ValueError(f"weights = {path} are not FID's; allowed: {INCEPTION_FILE}, or a name= of their own")
    if name != INCEPTION:
        torch.load(path, map_location="cpu", weights_only=True)  # refuses code before torch-fidelity unpickles it
    layers = [layer for layer in INCEPTION_LAYERS if layer in layers]
    kind = spatial_extractor() if "spatial" in layers else INCEPTION
    wanted, device = [INCEPTION_LAYERS[layer] for layer in layers], device or _best_device()
    options = {"cuda": False, "feature_extractor_weights_path": str(path), "verbose": False}
    network = create_feature_extractor(kind, wanted, **options).to(device)

    def features(images: Tensor) -> dict[str, Tensor]:
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if images.is_cuda else nullcontext()
        with exact:  # TF32 would change the third digit of a feature
            return dict(zip(layers, network(images)))

    return Extractor(name, features, device)


@dataclass(frozen=True)
class Reference:
    "The statistics file of a reference set: moments of Inception's layers, and some raw images."

    name: str
    moments: dict[str, tuple[Tensor, Tensor]]
    images: Tensor | None
    checksum: str
    n: int | None = None


def read_reference(
    path: str | Path,  # `.npz` in the layout of ADM's evaluation suite
    n: int | None = None,  # Number of images behind the moments, which the file does not say
) -> Reference:
    "Read an ADM reference: mu, sigma, for sFID mu_s, sigma_s, and for neighbours arr_0 (arXiv 2105.05233)."
    import numpy as np

    path = Path(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files if key in ("mu", "sigma", "mu_s", "sigma_s", "arr_0")}
            keys = ", ".join(file.files)
    except (ValueError, zipfile.BadZipFile, EOFError, AttributeError, TypeError) as error:
        raise ValueError(f"{path} cannot be read as an .npz of numbers: {str(error).splitlines()[0]}") from None
    if not {"mu", "sigma"} <= set(found):
        needed = "mu, sigma (mu_s, sigma_s for sfid; arr_0 for kid, precision, recall)"
        raise ValueError(f"{path} has the keys {keys or 'none'}; needed: {needed}")
    moments = {}
    for layer, size, end in (("features", 2048, ""), ("spatial", 2023, "_s")):
        if "mu" + end in found and "sigma" + end in found:
            mean, cov = (torch.from_numpy(found[key + end]).double() for key in ("mu", "sigma"))
            if mean.shape != (size,) or cov.shape != (size, size) or not (mean.sum() + cov.sum()).isfinite():
                shapes = f"{tuple(mean.shape)} and {tuple(cov.shape)}"
                raise ValueError(f"{path}: mu{end}, sigma{end} are {shapes}; needed: [{size}] and its square, finite")
            moments[layer] = mean, cov
    images = found.get("arr_0")
    if images is not None and (images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8):
        raise ValueError(f"{path}: arr_0 is {images.dtype} {images.shape}; needed: uint8 [n, height, width, 3]")
    pictures = None if images is None else torch.from_numpy(images).permute(0, 3, 1, 2)
    return Reference(path.name, moments, pictures, checksum(path), n)


def frechet_of_moments(
    a: tuple[Tensor, Tensor],  # Mean `[f]` and covariance `[f, f]`
    b: tuple[Tensor, Tensor],  # The same of the other set
) -> float:  # Squared distance
    "Frechet distance of two Gaussians by torch-fidelity, eq. (1) (arXiv 1706.08500)."
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric

    one, other = ({"mu": mean.double().numpy(), "sigma": cov.double().numpy()} for mean, cov in (a, b))
    return fid_statistics_to_metric(one, other, verbose=False)[KEY_METRIC_FID]


def kernel_distance(
    a: Tensor,  # Features `[n, f]`
    b: Tensor,  # Features `[m, f]`
) -> float:  # Squared; its expectation does not depend on n and m, and it may be negative
    "Unbiased squared MMD with the kernel (x y / f + 1)^3 by torch-fidelity, eq. (2) (arXiv 1801.01401)."
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    size = min(1000, len(a), len(b))
    subsets = 1 if len(a) == len(b) == size else 100  # all subsets of the whole are the whole
    return kid_features_to_metric(a, b, kid_subset_size=size, kid_subsets=subsets, verbose=False)[KEY_METRIC_KID_MEAN]


def class_score(
    logits: Tensor,  # `[n, classes]`, n >= 10
) -> float:  # 1 to the number of classes
    "How sure and how varied a classifier's labels are, eq. (3); by torch-fidelity in ten splits (arXiv 1606.03498)."
    from torch_fidelity.metric_isc import KEY_METRIC_ISC_MEAN, isc_features_to_metric

    return isc_features_to_metric(logits)[KEY_METRIC_ISC_MEAN]


def neighbour_scores(
    generated: Tensor,  # Features `[n, f]`
    real: Tensor,  # Features `[m, f]`
    k: int = 3,  # Neighbour that sets the radius
) -> tuple[float, float]:  # Precision and recall
    "Improved precision and recall by torch-fidelity, generated first (arXiv 1904.06991)."
    from torch_fidelity.metric_prc import prc_features_to_metric

    options = {"prc_batch_size": 2048, "save_cpu_ram": True, "verbose": False}
    line = torch.arange(8.0)[:, None]  # typical and narrow: precision 1, recall below 1
    if prc_features_to_metric(line[:2], line, prc_neighborhood=1, **options)["precision"] < 1:
        raise RuntimeError(f"torch-fidelity {version('torch-fidelity')} takes the real set first; needed: 0.4 or newer")
    found = prc_features_to_metric(generated, real, prc_neighborhood=k, **options)
    return found["precision"], found["recall"]


LAYERS = {"fd": "features", "sfd": "spatial", "score": "logits", "kd": "features"}
LAYERS |= {"precision": "features", "recall": "features"}
QUOTED = {"fid": "fd", "sfid": "sfd", "is": "score", "kid": "kd"}  # these names belong to Inception


def check_metrics(
    metrics: Sequence[str] | None,  # Names; without them, all that are usual for the extractor
    extractor: str,  # Name of the extractor
) -> list[str]:  # Names without reference to Inception
    "Refuse unknown metrics, and FID of anything but Inception, with a `ValueError`."
    if metrics is None:
        return [*LAYERS] if extractor == INCEPTION else ["fd", "kd", "precision", "recall"]
    metrics = [metrics] if isinstance(metrics, str) else list(metrics)
    for metric in metrics:
        if metric not in LAYERS and metric not in QUOTED:
            close = difflib.get_close_matches(metric, [*QUOTED, *LAYERS], n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"metric = {metric!r}; allowed: {', '.join([*QUOTED, *LAYERS])}{hint}")
        if metric in QUOTED and extractor != INCEPTION:
            ours = QUOTED[metric]
            raise ValueError(f"metric = {metric!r} is Inception's; allowed for {extractor}: {ours!r}")
    if not metrics:
        raise ValueError(f"metrics is empty; allowed: some of {', '.join([*QUOTED, *LAYERS])}")
    return list(dict.fromkeys(QUOTED.get(metric, metric) for metric in metrics))


def column(
    metric: str,  # "fd", "sfd", "score", "kd", "precision" or "recall"
    extractor: str,  # Name of the extractor
) -> str:  # Such as "fid" or "fd_resnet56"
    "The name of a number: the quoted one for Inception, for every other network one that carries it."
    if extractor != INCEPTION:
        return f"{metric}_{extractor}"
    return next((quoted for quoted, ours in QUOTED.items() if ours == metric), metric)


def _check_sets(samples: Features, reference: Features, metrics: list[str], k: int) -> None:
    "Refuse sets that cannot be compared, or are too small, with a `ValueError`."
    if samples.extractor != reference.extractor:
        seen = f"samples are seen by {samples.extractor}, reference by {reference.extractor}"
        raise ValueError(f"{seen}; allowed: one extractor")
    least = {"fd": 2, "sfd": 2, "kd": 2, "score": 10, "precision": k + 1, "recall": k + 1}
    for metric in metrics:
        layer, label = LAYERS[metric], column(metric, samples.extractor)
        for role, each in (("samples", samples), ("reference", reference))[: 1 if metric == "score" else 2]:
            if layer in each.rows and len(each.rows[layer]) < least[metric]:
                found = f"{role} has {len(each.rows[layer])} images"
                raise ValueError(f"{found}; allowed: {least[metric]} or more for {label}")
            if layer not in each.rows and not (metric in ("fd", "sfd") and layer in each.moments):
                have = ", ".join(sorted({*each.rows, *each.moments})) or "none"
                raise ValueError(f"{role} ({each.name}) has layers {have}; {label} needs rows of {layer}")


def feature_scores(
    samples: Features,  # Of generated images
    reference: Features,  # Of real images
    metrics: Sequence[str] | None = None,  # Names, or all that are usual for the extractor
    k: int = 3,  # Neighbour that sets the radius for precision and recall
) -> dict[str, float]:  # Column -> value
    "The metrics of two sets of features."
    names, values = check_metrics(metrics, samples.extractor), {}
    _check_sets(samples, reference, names, k)
    for metric in names:
        layer = LAYERS[metric]
        if metric in ("fd", "sfd"):
            values[metric] = frechet_of_moments(samples.moment(layer), reference.moment(layer))
        elif metric == "score":
            values[metric] = class_score(samples.rows[layer])
        elif metric == "kd":
            values[metric] = kernel_distance(samples.rows[layer], reference.rows[layer])
        elif metric not in values:
            values["precision"], values["recall"] = neighbour_scores(samples.rows[layer], reference.rows[layer], k)
    for metric, value in values.items():
        if not math.isfinite(value):
            raise ValueError(f"{column(metric, samples.extractor)} is {value}; allowed: features with a finite score")
    return {column(metric, samples.extractor): values[metric] for metric in names}


def find_extractor(
    extractor: str | Extractor,  # "inception-v3-compat", "resnet20", "resnet56", or an Extractor
    weights: str | Path | None = None,  # File with the weights, for a name
    metrics: Sequence[str] | None = None,  # What it is for, to compute no other layer
) -> Extractor:
    "The extractor of a name."
    if isinstance(extractor, Extractor):
        return extractor
    names = [INCEPTION, "resnet20", "resnet56"]
    if extractor not in names:
        close = (difflib.get_close_matches(extractor, names, n=1, cutoff=0.3) or [INCEPTION])[0]
        raise ValueError(f"extractor = {extractor!r}; allowed: {', '.join(names)}; did you mean {close}?")
    wanted = check_metrics(metrics, extractor)
    if extractor == INCEPTION:
        return inception(weights, sorted({LAYERS[metric] for metric in wanted}))
    return resnet_extractor(cifar_resnet(weights, int(extractor[-2:])))


def _name(extractor: str | Extractor | None, *sets: Any) -> str:
    "The name of an extractor; without one, that of the features at hand; without these, Inception."
    if extractor is None:
        return next((each.extractor for each in sets if isinstance(each, Features)), INCEPTION)
    return extractor.name if isinstance(extractor, Extractor) else extractor


def measure(
    images: Tensor | Features | Reference,  # Images, a statistics file, or features, which come back as they are
    extractor: str | Extractor | None = None,  # Name or Extractor; without it "inception-v3-compat"
    metrics: Sequence[str] | None = None,  # What it is for, to compute nothing else
    weights: str | Path | None = None,  # Local file with the extractor's weights
    name: str = "images",  # What the set is called in the table, such as "cifar10 train"
    batch_size: int = 64,  # Images per call of the network
    progress: bool = False,  # Show a progress bar
) -> Features:
    "Features by the extractor's name; do this once for a reference that many sets of samples meet."
    named = _name(extractor, images)
    extractor = named if extractor is None else extractor
    kind = INCEPTION if isinstance(images, Reference) else images.extractor if isinstance(images, Features) else named
    if kind != named:
        raise ValueError(f"{name} holds what {kind} saw; allowed: that extractor, not {named}")
    if isinstance(images, Features):
        return images
    wanted = check_metrics(metrics, named)
    if isinstance(images, Tensor):
        check_images(name, images)
        return extract(images, find_extractor(extractor, weights, wanted), name, batch_size, progress)
    for layer in {LAYERS[metric] for metric in wanted if metric in ("fd", "sfd")} - {*images.moments}:
        raise ValueError(f"{images.name} has no moments of {layer}; needed for sfid: mu_s, sigma_s")
    rows: dict[str, Tensor] = {}
    size: tuple[int, ...] = ()
    if images.images is not None:
        size = tuple(images.images.shape[2:])
        if {"kd", "precision", "recall"} & set(wanted):  # these need rows, not moments
            network = find_extractor(extractor, weights, wanted)
            rows = extract(images.images, network, images.name, batch_size, progress).rows
    return Features(INCEPTION, rows, dict(images.moments), images.name, images.n, images.checksum, size)


def _size(each: Any) -> tuple[int, ...]:
    "Height and width, or nothing where they are not known."
    images = each.images if isinstance(each, Reference) else each
    return each.size if isinstance(each, Features) else () if images is None else tuple(images.shape[2:])


def image_scores(
    samples: Tensor | Features,  # Generated images, uint8 `[n, 1 or 3, h, w]`, or their features
    reference: Tensor | Features | Reference,  # Real images, their features, or a statistics file
    extractor: str | Extractor | None = None,  # Name or Extractor; without it that of features, "inception-v3-compat"
    metrics: Sequence[str] | None = None,  # fid, sfid, is, kid, precision, recall; of other networks fd, kd, ...
    weights: str | Path | None = None,  # Local file with the extractor's weights
    k: int = 3,  # Neighbour that sets the radius for precision and recall
    batch_size: int = 64,  # Images per call of the network
    progress: bool = False,  # Show progress bars
) -> dict[str, float]:  # Column -> value; columns of other networks than Inception carry their name
    "Score generated images against real ones; every image passes the network once."
    pair: tuple[tuple[str, Any], ...] = ("samples", samples), ("reference", reference)
    for role, each in pair:
        if not (isinstance(each, Features) or (role == "reference" and isinstance(each, Reference))):
            check_images(role, each)
    if _size(samples) and _size(reference) and _size(samples) != _size(reference):
        sizes = " and ".join("x".join(map(str, _size(each))) for each in (samples, reference))
        raise ValueError(f"samples and reference have {sizes} pixels; allowed: one size, since resizing changes all")
    named = _name(extractor, samples, reference)
    extractor, wanted = extractor or named, check_metrics(metrics, named)
    if isinstance(samples, Tensor) and isinstance(reference, Tensor):
        extractor = find_extractor(extractor, weights, wanted)  # once for both
    real = measure(reference, extractor, wanted, weights, "reference", batch_size, progress)
    generated = measure(samples, extractor, wanted, weights, "samples", batch_size, progress)
    return feature_scores(generated, real, wanted, k)


def image_baseline(
    real: Tensor | Features | Reference,  # Real images, or their features
    n: int | None = None,  # Size of each half: that of the samples to compare with; without it half of all
    extractor: str | Extractor | None = None,  # Name or Extractor, as for image_scores
    metrics: Sequence[str] | None = None,  # As for image_scores
    weights: str | Path | None = None,  # Local file with the extractor's weights
    k: int = 3,  # Neighbour that sets the radius for precision and recall
    seed: int = 0,  # Of the random halves
    batch_size: int = 64,  # Images per call of the network
) -> dict[str, float]:  # Column with `_floor` -> value
    "The metrics between two random, disjoint sets of real images of the same size."
    if isinstance(real, Reference):
        if real.images is None:
            raise ValueError(f"{real.name} has no images (arr_0); allowed: images, since moments have no halves")
        real = real.images
    features = measure(real, extractor, metrics, weights, "real", batch_size)
    total = min((len(rows) for rows in features.rows.values()), default=0)
    n = total // 2 if n is None else n
    if not 1 <= n <= total // 2:
        raise ValueError(f"n = {n} of {total} real images; allowed: 1 to {total // 2}, for two disjoint sets")
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    a, b = features.take(order[:n]), features.take(order[n : 2 * n])
    return {f"{name}_floor": value for name, value in feature_scores(a, b, metrics, k).items()}


class _Block(nn.Module):
    "Two convolutions and a shortcut without weights: subsample, then pad with zero channels."

    def __init__(self, width: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.stride, self.pad = stride, (out - width) // 2

    def forward(self, x: Tensor) -> Tensor:
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.pad, self.pad))
        return F.relu(short + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class CifarResNet(nn.Module):
    "ResNet of `depth` layers for 32x32 images, option-A shortcuts; uint8 images in, logits out (arXiv 1512.03385)."

    def __init__(self, depth: int = 56) -> None:
        super().__init__()
        self.depth = depth
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        more = range((depth - 2) // 6 - 1)
        self.layer1 = nn.Sequential(_Block(16, 16, 1), *(_Block(16, 16, 1) for _ in more))
        self.layer2 = nn.Sequential(_Block(16, 32, 2), *(_Block(32, 32, 1) for _ in more))
        self.layer3 = nn.Sequential(_Block(32, 64, 2), *(_Block(64, 64, 1) for _ in more))
        self.linear = nn.Linear(64, 10)

    def layers(self, images: Tensor) -> dict[str, Tensor]:
        "Pooled features `[n, 64]` and logits `[n, 10]`."
        mean, std = (images.new_tensor(v, dtype=torch.float32) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        x = (images.float() / 255 - mean[:, None, None]) / std[:, None, None]
        x = self.layer3(self.layer2(self.layer1(F.relu(self.bn1(self.conv1(x))))))
        features = x.mean((2, 3))
        return {"features": features, "logits": self.linear(features)}

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)["logits"]


def cifar_resnet(
    path: str | Path | None = None,  # File, or folder to look in; without it GUIDANCE_NB_DATA/classifiers
    depth: int = 56,  # 20 or 56
    device: str | torch.device | None = None,  # CUDA where there is one
) -> CifarResNet:  # A judge of CIFAR-10; resnet_extractor makes its features an Extractor
    "Load a ResNet trained on CIFAR-10, without executing what the file may hold."
    if depth not in (20, 56):
        raise ValueError(f"depth = {depth}; allowed: 20 or 56")
    folder = os.environ.get("GUIDANCE_NB_DATA")
    if path is None and folder is None:
        raise ValueError(f"path is missing; allowed: resnet{depth}-*.th, or GUIDANCE_NB_DATA with it in classifiers/")
    place = Path(path).expanduser() if path is not None else Path(folder or "") / "classifiers"
    file = next(iter(sorted(place.glob(f"resnet{depth}-*.th"))), place) if place.is_dir() else place
    if not file.is_file():
        raise ValueError(f"path = {file}: no resnet{depth}-*.th there; allowed: the file or the folder that holds it")
    stated = re.search(r"-([0-9a-f]{8})$", file.stem)
    if stated and not checksum(file).startswith(stated[1]):
        raise ValueError(f"{file} is damaged: its name and its SHA-256 disagree; fetch it again")
    network = CifarResNet(depth)
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    except Exception as error:
        raise ValueError(f"{file} does not hold a ResNet-{depth}: {str(error).splitlines()[0]}") from None
    return network.eval().requires_grad_(False).to(device or _best_device())


def resnet_extractor(
    network: CifarResNet,  # From cifar_resnet
) -> Extractor:  # Columns such as fd_resnet56
    "Features of a CIFAR ResNet; a Frechet distance on them is not FID."
    return Extractor(f"resnet{network.depth}", network.layers, next(network.parameters()).device)


def class_agreement(
    images: Tensor,  # uint8, `[n, 1 or 3, h, w]`
    labels: Tensor,  # The classes that were asked for, `[n]`
    judge: Callable[[Tensor], Any] | Extractor,  # uint8 images `[n, 3, h, w]` -> logits `[n, num_classes]`
    batch_size: int = 256,  # Images per call of the judge
) -> tuple[float, Tensor]:  # Share of all, and per class `[num_classes]`, NaN for a class nobody asked for
    "Share of the images in which a judge sees the class that was asked for."
    if not isinstance(judge, Extractor):
        parameter = next(judge.parameters(), None) if isinstance(judge, nn.Module) else None
        judge = Extractor("judge", judge, "cpu" if parameter is None else parameter.device)
    rows = extract(images, judge, "images", batch_size).rows
    logits = rows.get("logits", rows.get("features", torch.empty(0, 0)))
    c = check_classes("labels", labels, len(images), logits.shape[1])
    right = (logits.argmax(1) == c).double()
    hits, asked = (torch.zeros(logits.shape[1], dtype=torch.float64).index_add(0, c, v) for v in (right, right * 0 + 1))
    return right.mean().item(), hits / asked


def nearest_images(
    images: Tensor,  # uint8, `[n, channels, h, w]`
    train: Tensor,  # uint8, `[m, channels, h, w]`
    k: int = 2,  # Neighbours
) -> tuple[Tensor, Tensor]:  # Distances `[n, k]`, root mean square in grey levels, ascending; and indices `[n, k]`
    "The nearest training images in pixels, eq. (4): search by faiss, distances recomputed in whole numbers."
    import faiss

    check_images("images", images)
    check_images("train", train, at_least=k)
    if images.shape[1:] != train.shape[1:]:
        shapes = f"{tuple(images.shape[1:])} and {tuple(train.shape[1:])}"
        raise ValueError(f"images and train have the shapes {shapes}; allowed: equal shapes")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"k = {k!r}; allowed: a whole number, 1 to {len(train)}")
    queries, points = images.cpu().flatten(1), train.cpu().flatten(1)
    _, found = faiss.knn(queries.float().numpy(), points.float().numpy(), k)
    index = torch.from_numpy(found)
    square = [(queries.int() - points[each].int()).square().sum(1).double() for each in index.T]
    distance, order = (torch.stack(square, 1) / queries.shape[1]).sqrt().sort(dim=1, stable=True)
    return distance, index.gather(1, order)


def copy_share(
    images: Tensor,  # uint8, `[n, channels, h, w]`
    train: Tensor,  # uint8, `[m, channels, h, w]`
    ratio: float = 1 / 3,  # Of the distances to the nearest and the second nearest, below which an image is a copy
) -> tuple[float, float]:  # Share of copies, and mean distance to the nearest in grey levels
    "Share of the images far closer to one training image than to any other, eq. (4), and the mean distance."
    if not 0 <= ratio <= 1:
        raise ValueError(f"ratio = {ratio}; allowed: 0 to 1")
    near, second = nearest_images(images, train)[0].T
    return (near <= ratio * second).double().mean().item(), near.mean().item()


def balanced_labels(
    n: int,  # Number of samples
    num_classes: int,  # Number of classes
) -> Tensor:  # `[n]`: 0, 1, ..., num_classes - 1, again and again
    "The label policy of this package: every class equally often, up to one."
    if n < 1 or num_classes < 1:
        raise ValueError(f"n = {n}, num_classes = {num_classes}; allowed: 1 or more of each")
    return torch.arange(n) % num_classes


PROVENANCE = (
    "n", "reference", "reference_n", "reference_checksum", "extractor", "sampler", "steps", "scale", "labels", "seed",
    "command", "guidance_nb", "torch", "torch_fidelity", "hardware",
)  # fmt: skip


def provenance(
    samples: Features | Tensor | int,  # What was scored, or how many
    reference: Features | Reference,  # Against what
    sampler: str,  # Name of the sampler
    steps: int,  # Its steps
    scale: float,  # Guidance scale; 1 is none
    seed: int,  # Seed of the samples
    labels: str = "balanced",  # How labels were chosen
    extractor: str | None = None,  # Name; without it that of the reference
    command: str | None = None,  # Without it that of this process
) -> dict[str, Any]:  # Column -> value, for append_rows
    "What a number means nothing without."
    n = samples if isinstance(samples, int) else samples.n if isinstance(samples, Features) else len(samples)
    cuda = torch.cuda.is_available()
    hardware = torch.cuda.get_device_name() if cuda else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    source = reference.name, reference.n, reference.checksum
    named = extractor or (INCEPTION if isinstance(reference, Reference) else reference.extractor)
    command = command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    versions = __version__, torch.__version__, version("torch-fidelity")
    values = (n, *source, named, sampler, steps, scale, labels, seed, command, *versions, hardware)
    return dict(zip(PROVENANCE, values))


def read_rows(
    path: str | Path,  # A table written by append_rows
) -> tuple[list[str], list[dict[str, str]]]:  # Columns, rows as text
    "Read a table of rows with provenance, or refuse it with a `ValueError`."
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.reader(file))
    columns = lines[0] if lines else []
    missing = [key for key in PROVENANCE if key not in columns]
    if missing or len(set(columns)) < len(columns):
        found = f"lacks {', '.join(missing)}" if missing else "has a column twice"
        raise ValueError(f"{path} is not a table of image metrics: it {found}; allowed: a table that append_rows wrote")
    for number, line in enumerate(lines[1:], 2):
        if len(line) != len(columns):
            raise ValueError(f"{path} is damaged: line {number} has {len(line)} values, the header {len(columns)}")
    return columns, [dict(zip(columns, line)) for line in lines[1:]]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    "Let one process at a time write tables in a folder, where the system has such locks."
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def append_rows(
    path: str | Path,  # Table, `.csv`; made if it is not there
    rows: Sequence[dict[str, Any]],  # Each with the keys of provenance and any further columns
) -> None:
    "Append rows to a table: columns are united, what is there stays, and a crash leaves the old table or the new one."
    path = Path(path)
    for row in rows:
        if missing := [key for key in PROVENANCE if key not in row]:
            raise ValueError(f"a row lacks {', '.join(missing)}; needed: everything that provenance() returns")
    path.parent.mkdir(parents=True, exist_ok=True)
    with _locked(path.parent):
        columns, old = read_rows(path) if path.exists() else (list(PROVENANCE), [])
        columns += [key for key in dict.fromkeys(key for row in rows for key in row) if key not in columns]
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with open(handle, "w", newline="", encoding="utf-8") as file:
                writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
                writer.writeheader()
                writer.writerows([*old, *rows])
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, path.stat().st_mode if path.exists() else 0o644)
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
