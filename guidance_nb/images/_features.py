"""Feature extractors: what networks see in images, on which image metrics and neighbours are computed."""

import os
import re
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from guidance_nb._checks import check_choice, explained, require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import digest, opened
from guidance_nb._points import moments
from guidance_nb.denoisers import shown
from guidance_nb.images._data import _read_arrays, from_uint8, to_uint8

if TYPE_CHECKING:
    from transformers import Dinov2WithRegistersModel

INCEPTION = "inception-v3-compat"
_NETWORKS = INCEPTION, "resnet20", "resnet56"  # of images with three channels; grey ones are repeated
PIXELS = "pixels"  # no network: the values themselves, of any number of channels
LAYERS = {"fd": "features", "sfd": "spatial", "score": "logits", "kd": "features"}
LAYERS |= {"precision": "features", "recall": "features"}  # metric -> layer
QUOTED = {"fid": "fd", "sfid": "sfd", "is": "score", "kid": "kd"}  # these names belong to Inception
FeatureFunction = Callable[[Tensor], Tensor | dict[str, Tensor]]


def check_images(name: str, images: Tensor, at_least: int = 1) -> Tensor:
    "Raise a `ValueError` for what is not a set of uint8 images."
    fine = getattr(images, "dtype", None) == torch.uint8 and images.ndim == 4 and len(images) >= at_least
    require_that(fine, f"{name} is {shown(images)}", f"torch.uint8 [n, c, h, w], n >= {at_least} (to_uint8 converts)")
    return images


@dataclass(frozen=True)
class Extractor:
    "A feature function with a name: uint8 images, grey ones as RGB, to features `[n, f]` or a dict of layers of these."

    name: str  # Columns contain it
    network: FeatureFunction
    device: str | torch.device = "cpu"
    classes: tuple[str, ...] = ()  # Names of the classes of a layer "logits", where they have names


@dataclass(frozen=True)
class Features:
    "What an extractor makes of a set of images: rows per layer, moments per layer, and where they come from."

    extractor: str
    rows: dict[str, Tensor] = field(default_factory=dict)  # layer -> [n, f]
    moments: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)  # layer -> mean [f], covariance [f, f]
    name: str = "images"
    n: int | None = None
    checksum: str = ""
    size: tuple[int, ...] = ()

    def layer(self, layer: str) -> Tensor:
        "Rows of a layer; a `ValueError` where there are none."
        rows, known = (", ".join(each) or "no layer" for each in (self.rows, self.moments))
        require_that(layer in self.rows, f"{self.name} has rows of {rows}, moments of {known}", f"rows of {layer}")
        return self.rows[layer]

    def moment(self, layer: str) -> tuple[Tensor, Tensor]:
        "Mean and unbiased covariance of a layer in float64, computed once."
        if layer not in self.moments:
            self.moments[layer] = moments(layer, self.layer(layer))
        return self.moments[layer]

    def take(self, indices: Tensor) -> "Features":
        "The features of some of the images, with moments of their own."
        rows = {layer: values[indices] for layer, values in self.rows.items()}
        return Features(self.extractor, rows, {}, f"{len(indices)} of {self.name}", len(indices), "", self.size)


@dataclass(frozen=True)
class Reference(Features):
    "A statistics file: moments of Inception's layers, and perhaps some of the images behind them."

    images: Tensor | None = None


def checksum(data: Tensor | Path) -> str:
    "The first 16 digits of the SHA-256 of images or of a file, which identify them in a table."
    return digest(*((str(tuple(data.shape)), data) if isinstance(data, Tensor) else (data,)))[:16]


def read_reference(path: str | Path, n: int | None = None) -> Reference:
    "Read an ADM reference: mu, sigma, for sFID mu_s, sigma_s, and for neighbours arr_0 (arXiv 2105.05233)."
    path = Path(path)
    found, known = _read_arrays(path, "mu", "sigma")[0], {}
    for layer, f, end in (("features", 2048, ""), ("spatial", 2023, "_s")):
        if "mu" + end in found and "sigma" + end in found:
            mean, cov = found["mu" + end], found["sigma" + end]
            numbers = all(np.issubdtype(part.dtype, np.floating) for part in (mean, cov))
            fine = numbers and (mean.shape, cov.shape) == ((f,), (f, f)) and np.isfinite(mean.sum() + cov.sum())
            require(fine, f"mu{end}, sigma{end} of {path}", (mean.shape, cov.shape), f"[{f}] and its square, finite")
            known[layer] = torch.from_numpy(mean).double(), torch.from_numpy(cov).double()
    if (images := found.get("arr_0")) is None:
        return Reference(INCEPTION, {}, known, path.name, n, checksum(path))
    fine = images.ndim == 4 and images.shape[3] == 3 and images.dtype == np.uint8
    require(fine, f"arr_0 of {path}", f"{images.dtype} {images.shape}", "uint8 [n, height, width, 3]")
    pictures = torch.from_numpy(images).permute(0, 3, 1, 2)
    return Reference(INCEPTION, {}, known, path.name, n, checksum(path), images.shape[1:3], pictures)


def metric_names(metrics: Sequence[str] | None, extractor: str) -> list[str]:
    "Names without reference to Inception; without names, the usual ones. FID belongs to Inception alone."
    if metrics is None:
        return [*LAYERS] if extractor == INCEPTION else ["fd", "kd", "precision", "recall"]
    names, known = [metrics] if isinstance(metrics, str) else list(metrics), [*QUOTED, *LAYERS]
    for name in names:
        ours = check_choice("metric", name, known) not in QUOTED or extractor == INCEPTION
        require(ours, f"metric of {extractor}", name, f"{QUOTED.get(name)!r}, since {name!r} is Inception's")
    return list(dict.fromkeys(QUOTED.get(name, name) for name in names))


def extract(
    images: Tensor | Features,  # uint8 `[n, channels, h, w]`, a statistics file, or features, which come back
    extractor: str | Extractor | None = None,  # A name or an extractor; without it "inception-v3-compat"
    name: str = "images",  # What the set is called in the table, such as "cifar10 train"
    batch_size: int = 64,  # Images per call of the network
    progress: bool = False,  # Show a progress bar
    metrics: Sequence[str] | None = None,  # What it is for, to compute nothing else
    weights: str | Path | None = None,  # File with the weights, for a name
) -> Features:  # Rows in the order of the images, float32, on the CPU
    "One pass of a network over a set of images, grey ones in three channels; do it once for a reference."
    named = extractor.name if isinstance(extractor, Extractor) else extractor or INCEPTION
    if isinstance(images, Features):
        same = not extractor or images.extractor == named
        require(same, name, f"seen by {images.extractor}", f"features of {named}")
        if isinstance(images, Reference):
            wanted = metric_names(metrics, INCEPTION)
            for metric in {"fd", "sfd"} & {*wanted}:
                images.moment(LAYERS[metric])  # an error where the file has none
            if images.images is not None and {"kd", "precision", "recall"} & {*wanted}:
                network = find_extractor(extractor or INCEPTION, weights, wanted)
                images.rows.update(extract(images.images, network, images.name, batch_size, progress).rows)
        return images
    images = check_images(name, images)
    extractor = find_extractor(extractor or INCEPTION, weights, metrics)
    parts: dict[str, list[Tensor]] = {}
    with torch.no_grad(), tqdm(total=len(images), disable=not progress, unit="image", desc=name) as bar:
        for batch in images.split(batch_size):
            grey = batch.shape[1] == 1 and extractor.name != PIXELS
            out = extractor.network(batch.to(extractor.device).expand(-1, 3 if grey else -1, -1, -1))
            layers = out if isinstance(out, dict) else {"features": out}
            for layer, rows in layers.items():
                fine = rows.ndim == 2 and len(rows) == len(batch)
                require(fine, f"features of {extractor.name}", tuple(rows.shape), f"[{len(batch)}, f]")
                parts.setdefault(layer, []).append(rows.float().cpu())
            bar.update(len(batch))
    found = {layer: torch.cat(values) for layer, values in parts.items()}
    return Features(extractor.name, found, {}, name, len(images), checksum(images), tuple(images.shape[2:]))


def find_extractor(
    extractor: str | Extractor, weights: str | Path | None = None, metrics: Sequence[str] | None = None
) -> Extractor:
    "The feature extractor of a name."
    if isinstance(extractor, Extractor):
        return extractor
    if check_choice("extractor", extractor, (*_NETWORKS, PIXELS)) == PIXELS:
        return Extractor(PIXELS, lambda images: from_uint8(images).flatten(1))
    wanted = metric_names(metrics, extractor)
    if extractor == INCEPTION:
        return _inception(weights, sorted({LAYERS[metric] for metric in wanted}))
    return resnet_extractor(cifar_resnet(weights, 20 if extractor == "resnet20" else 56))


def _best_device() -> str:
    "CUDA where there is one."
    return "cuda" if torch.cuda.is_available() else "cpu"


_INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"  # the name ends with the SHA-256 it must have


def inception_weights(weights: str | Path | None = None) -> Path:
    "Find the weights of Inception: as given, in GUIDANCE_NB_INCEPTION, or in torch's cache, downloaded once."
    if given := weights or os.environ.get("GUIDANCE_NB_INCEPTION"):
        path = Path(given).expanduser()
        return path / _INCEPTION_FILE if path.is_dir() else path
    with extra("images"):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path = Path(torch.hub.get_dir()) / "checkpoints" / _INCEPTION_FILE
    if not path.is_file():
        advice = f"another extractor, such as resnet56; or {_INCEPTION_FILE} of torch-fidelity's release v0.2.0"
        advice += " on GitHub, named by weights= or GUIDANCE_NB_INCEPTION"
        with explained("the download of Inception's weights failed", advice, OSError, RuntimeError):
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=path.stem[-8:], progress=False)
    return path


# Ours to torch-fidelity's. It computes all layers up to the last one that it is asked for; "768" follows Mixed_6d,
# 7 channels of which are sFID's layer, 7 x 17 x 17 = 2,023 numbers.
_INCEPTION_LAYERS = {"features": "2048", "spatial": "768", "logits": "logits_unbiased"}


def _inception(weights: str | Path | None = None, layers: Collection[str] = tuple(_INCEPTION_LAYERS)) -> Extractor:
    "The network of FID: Inception-v3 with TensorFlow's weights, by torch-fidelity, all layers in one pass."
    with extra("images"):
        from torch_fidelity.utils import create_feature_extractor

    path = inception_weights(weights)
    theirs = checksum(path).startswith(_INCEPTION_FILE[-12:-4])
    require(theirs, "weights", f"{path}, which are not FID's", _INCEPTION_FILE)
    wanted = {layer: theirs for layer, theirs in _INCEPTION_LAYERS.items() if layer in layers}
    options = {"cuda": False, "feature_extractor_weights_path": str(path), "verbose": False}
    network = create_feature_extractor(INCEPTION, [*wanted.values()], **options).to(_best_device())
    seen: dict[str, Tensor] = {}
    network.Mixed_6d.register_forward_hook(lambda module, args, out: seen.update(spatial=out[:, :7].flatten(1).float()))

    def features(images: Tensor) -> dict[str, Tensor]:
        exact = torch.backends.cudnn.flags(enabled=True, allow_tf32=False) if images.is_cuda else nullcontext()
        with exact:  # TF32 would change the third digit of a feature
            found = dict(zip(wanted, network(images)))
        return {layer: seen.get(layer, rows) for layer, rows in found.items()}

    return Extractor(INCEPTION, features, _best_device())


_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # means and deviations of the channels, in [0, 1]


def _normalise(images: Tensor) -> Tensor:
    "uint8 images `[n, 3, h, w]` as networks trained on ImageNet's statistics want them."
    mean, deviation = torch.tensor(_IMAGENET, device=images.device)[..., None, None]
    return (images.float() / 255 - mean) / deviation


class _Subsample(nn.Module):
    "A shortcut without weights: every second pixel, in twice the channels, of which the outer ones are zero."

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, x.shape[1] // 2, x.shape[1] // 2))


class CifarResNet(nn.Module):
    "ResNet of `depth` layers for 32x32 images, option-A shortcuts; uint8 images in, logits out (arXiv 1512.03385)."

    def __init__(self, depth: int = 56) -> None:
        with extra("images"):
            from torchvision.models.resnet import BasicBlock

        def stage(width: int, first: nn.Module) -> nn.Sequential:
            return nn.Sequential(first, *(BasicBlock(width, width) for _ in range((depth - 2) // 6 - 1)))

        super().__init__()
        self.depth = depth
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = stage(16, BasicBlock(16, 16))
        self.layer2 = stage(32, BasicBlock(16, 32, 2, _Subsample()))
        self.layer3 = stage(64, BasicBlock(32, 64, 2, _Subsample()))
        self.linear = nn.Linear(64, 10)

    def layers(self, images: Tensor) -> dict[str, Tensor]:
        "Pooled features `[n, 64]` and logits `[n, 10]`."
        x = F.relu(self.bn1(self.conv1(_normalise(images))))
        x = self.layer3(self.layer2(self.layer1(x)))
        features = x.mean((2, 3))
        return {"features": features, "logits": self.linear(features)}

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images)["logits"]


def cifar_resnet(
    path: str | Path | None = None, depth: int = 56, device: str | torch.device | None = None
) -> CifarResNet:
    """Load a ResNet trained on CIFAR-10, without executing what the file may hold.

    Without the path of a file or of its folder, it is in classifiers/ of GUIDANCE_NB_DATA. `resnet_extractor` makes its
    features an `Extractor`.
    """
    wanted, folder = f"resnet{depth}-*.th", Path(os.environ.get("GUIDANCE_NB_DATA", "")) / "classifiers"
    place = folder if path is None else Path(path).expanduser()
    file = next(iter(sorted(place.glob(wanted))), place)
    stated = re.search(r"-([0-9a-f]{8})$", file.stem)
    whole = not stated or checksum(file).startswith(stated[1])
    require_that(whole, f"{file} is damaged: its name and its SHA-256 disagree", "the file as published")
    network = CifarResNet(depth)
    with opened(file, f"{wanted} as published, or its folder, or GUIDANCE_NB_DATA with it in classifiers/") as handle:
        state = torch.load(handle, map_location="cpu", weights_only=True)["state_dict"]
        network.load_state_dict({key.removeprefix("module."): value for key, value in state.items()})
    return network.eval().requires_grad_(False).to(device or _best_device())


def resnet_extractor(network: CifarResNet) -> Extractor:
    "Features of a CIFAR ResNet; a Frechet distance on them is not FID."
    classes = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
    return Extractor(f"resnet{network.depth}", network.layers, next(network.parameters()).device, classes)


def _load_dinov2(path: str | Path | None) -> "Dinov2WithRegistersModel":
    "DINOv2 with registers (arXiv 2304.07193, 2309.16588) from a local folder; nothing is downloaded."
    with extra("dinov2"):
        from transformers import Dinov2WithRegistersModel

    require(path is not None, "path", path, "a folder with config.json and model.safetensors")
    options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
    model, report = Dinov2WithRegistersModel.from_pretrained(Path(path), **options)  # type: ignore[arg-type]
    missing = sorted(set(report["missing_keys"]) - {"embeddings.mask_token"})
    require(not missing, f"missing weights in {path}", missing[:1], "none")
    return model.eval().requires_grad_(False)


def _dinov2_extractor(path: str | Path | None, size: int = 224, device: str | torch.device | None = None) -> Extractor:
    """Features of DINOv2: layers "features", the class token, and "patches", the mean of the patch tokens.

    Images are resized bicubically with antialiasing to `size`, a multiple of the network's patch size, and normalised;
    register tokens take no part.
    """
    network, device = _load_dinov2(path), device or _best_device()
    patch, first = network.config.patch_size, 1 + network.config.num_register_tokens
    require(size >= 1 and size % patch == 0, "size", size, f"a multiple of the patch size {patch}")
    network = network.to(device)

    def features(images: Tensor) -> dict[str, Tensor]:
        # Normalised first: resizing is linear, and keeps a constant.
        x = F.interpolate(_normalise(images), (size, size), mode="bicubic", antialias=True)
        tokens = network(pixel_values=x).last_hidden_state  # class, registers, patches
        return {"features": tokens[:, 0], "patches": tokens[:, first:].mean(1)}

    return Extractor("dinov2", features, device)


Space = Literal["pixels", "dinov2", "dinov2-patches", "resnet20", "resnet56"]


def feature_space(
    name: Space | Extractor,  # "dinov2" is its class token
    path: str | Path | None = None,  # Where the weights are
    batch_size: int = 64,  # Images per call of the network
    progress: bool = False,  # Show a progress bar
    size: int = 224,  # Height and width that DINOv2 sees, a multiple of its patch size
) -> Literal["pixels"] | Callable[[Tensor], Tensor]:  # From images in [-1, 1] to features `[n, f]`
    "Where neighbours are sought: pixels, or what an extractor makes of images as a file would hold them."
    if name == "pixels":
        return name
    if isinstance(name, Extractor) or check_choice("space", name, get_args(Space)).startswith("resnet"):
        extractor = find_extractor(name, path)
    else:
        extractor = _dinov2_extractor(path, size)
    layer = "patches" if name == "dinov2-patches" else "features"

    def features(x: Tensor) -> Tensor:
        images = to_uint8(x.clamp(-1, 1))
        return extract(images, extractor, f"{extractor.name} features", batch_size, progress).rows[layer]

    return features
