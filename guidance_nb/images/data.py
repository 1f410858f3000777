"""MNIST, CIFAR-10 or any folder of images: checked files, a keyed order, keyed flips, and sample files that round-trip."""

import hashlib
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guidance_nb._random import keyed_generator


def from_uint8(
    x: Tensor,  # Grey levels, uint8, any shape
) -> Tensor:  # Floats in [-1, 1], same shape
    "Grey levels as numbers in [-1, 1], eq. (1)."
    if x.dtype != torch.uint8:
        raise ValueError(f"x is {x.dtype}; allowed: torch.uint8")
    return x.float() / 127.5 - 1


def to_uint8(
    x: Tensor,  # Floats, meant to be in [-1, 1], any shape
) -> Tensor:  # Grey levels, uint8, same shape
    "Nearest grey levels, eq. (2); values outside [-1, 1] are clipped."
    if not x.is_floating_point():
        raise ValueError(f"x is {x.dtype}; allowed: floating-point values in [-1, 1]")
    if not torch.isfinite(x).all():
        raise ValueError(f"x has {(~torch.isfinite(x)).sum()} values that are not finite; allowed: numbers in [-1, 1]")
    if x.numel() and x.min() >= 0 and x.max() > 2:
        raise ValueError(f"x is in [{x.min():.3g}, {x.max():.3g}]; allowed: [-1, 1] (from_uint8 converts grey levels)")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass
class ImageData:
    "Labelled images as `fit` reads them: whole batches by index, flips keyed, values in [-1, 1]."

    pixels: Any  # uint8 Tensor `[n, channels, height, width]`, or a callable from indices to such a tensor
    labels: Tensor  # Class indices `[n]`
    classes: tuple[str, ...]  # Names of the classes
    shape: tuple[int, int, int]  # Channels, height, width
    flip: bool = False  # Whether `fetch` mirrors a random half of the images
    name: str = "images"  # Where they come from, for tables

    @property
    def num_classes(self) -> int:
        "Number of classes, also those a subset has no image of."
        return len(self.classes)

    def __post_init__(self) -> None:
        wanted = torch.uint8, (len(self), *self.shape)
        if isinstance(self.pixels, Tensor) and (found := (self.pixels.dtype, tuple(self.pixels.shape))) != wanted:
            raise ValueError(f"pixels are {found[0]} {found[1]}; allowed: {wanted[0]} {wanted[1]}")

    def __len__(self) -> int:
        return len(self.labels)

    def images(self, indices: Tensor) -> Tensor:
        "The images as stored, uint8 `[b, channels, height, width]`, never flipped."
        return self.pixels[indices] if isinstance(self.pixels, Tensor) else self.pixels(indices)

    def fetch(self, indices: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        "Rows `rows` of the batch `indices`, in [-1, 1], with labels; flips are drawn for the whole batch, eq. (3)."
        mine = indices[rows]
        x = from_uint8(self.images(mine))
        if self.flip:
            flips = torch.rand(len(indices), generator=generator)[rows] < 0.5
            x = torch.where(flips[:, None, None, None], x.flip(3), x)
        return x, self.labels[mine]


def balanced_subset(
    data: ImageData,  # Data to choose from
    per_class: int,  # Images of each class
    seed: int = 0,  # Seed of the choice
) -> ImageData:  # `per_class * num_classes` images, class after class
    "As many images of every class, chosen by seed."
    counts = data.labels.bincount(minlength=data.num_classes)
    if not isinstance(per_class, int) or not 1 <= per_class <= counts.min():
        raise ValueError(f"per_class = {per_class!r}; allowed: 1 to {counts.min()}, the size of the smallest class")
    chosen = []
    for label in range(data.num_classes):
        members = (data.labels == label).nonzero()[:, 0]
        order = torch.randperm(len(members), generator=keyed_generator(seed, 4, label))
        chosen.append(members[order[:per_class]])
    indices = torch.cat(chosen)
    pixels = data.pixels[indices] if isinstance(data.pixels, Tensor) else _Chosen(data.pixels, indices)
    return replace(data, pixels=pixels, labels=data.labels[indices])


@dataclass
class _Chosen:
    pixels: Callable[[Tensor], Tensor]
    indices: Tensor

    def __call__(self, indices: Tensor) -> Tensor:
        return self.pixels(self.indices[indices])


FILES = {  # bytes and md5 of the files as published; for CIFAR-10 torchvision has the same md5s
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": (47_040_016, "6bbc9ace898e44ae57da46a324031adb"),
        "MNIST/raw/train-labels-idx1-ubyte": (60_008, "a25bea736e30d166cdddb491f175f624"),
        "MNIST/raw/t10k-images-idx3-ubyte": (7_840_016, "2646ac647ad5339dbf082846283269ea"),
        "MNIST/raw/t10k-labels-idx1-ubyte": (10_008, "27ae3e4e09519cfbb04c329615203637"),
    },
    "cifar10": {
        "cifar-10-batches-py/batches.meta": (158, "5ff9c542aee3614f3951f8cda6e48888"),
        "cifar-10-batches-py/data_batch_1": (31_035_704, "c99cafc152244af753f735de768cd75f"),
        "cifar-10-batches-py/data_batch_2": (31_035_320, "d4bba439e000b95fd0a9bffe97cbabec"),
        "cifar-10-batches-py/data_batch_3": (31_035_999, "54ebc095f3ab1f0389bbae665268c751"),
        "cifar-10-batches-py/data_batch_4": (31_035_696, "634d18415352ddfa80567beed471001a"),
        "cifar-10-batches-py/data_batch_5": (31_035_623, "482c414d41f54cd18b22e5b47cb7c3cb"),
        "cifar-10-batches-py/test_batch": (31_035_526, "40351d587109b95175f43aff81a1287e"),
    },
}


def check_files(
    source: str,  # "mnist" or "cifar10"
    root: Path,  # Folder that holds them
    advice: str,  # What to do about a damaged file
) -> list[str]:  # Names of the files that are missing
    "Refuse truncated and altered files by name; report missing ones."
    missing = []
    for name, (size, md5) in FILES[source].items():
        path = root / name
        if not path.is_file():
            missing.append(name)
        elif path.stat().st_size != size:
            raise ValueError(f"{path} is damaged: {path.stat().st_size:,} bytes instead of {size:,}; allowed: {advice}")
        elif (found := hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()) != md5:
            raise ValueError(f"{path} is damaged: md5 {found} instead of {md5}; allowed: {advice}")
    return missing


def download_files(
    source: str,  # "mnist" or "cifar10"
    root: Path,  # Folder to put the files into
) -> None:
    "Let torchvision download into a folder aside, check the files, and move each into place whole."
    from http.client import HTTPException

    from torchvision import datasets

    kind: Any = {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[source]
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as aside:
            kind(aside, download=True)
            if missing := check_files(source, Path(aside), "try again"):
                raise ValueError(f"the download of {source} lacks {missing[0]}; allowed: try again")
            for name in FILES[source]:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(aside) / name, root / name)
    except (OSError, RuntimeError, EOFError, HTTPException) as error:  # no network, no space, wrong md5
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{source} could not be downloaded to {root} ({reason}); allowed: try again, or set GUIDANCE_NB_DATA to a "
            "folder that holds it"
        ) from None


def find_files(
    source: str,  # "mnist" or "cifar10"
    root: str | Path | None = None,  # Folder; default: GUIDANCE_NB_DATA, else the user's cache
    download: bool = True,  # Whether to download missing files; never into GUIDANCE_NB_DATA
) -> Path:  # The folder, with all files present and intact
    "The folder of a published data set, checked, downloaded first if need be."
    given = os.environ.get("GUIDANCE_NB_DATA") if root is None else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guidance_nb"
    folder = Path(root or given or cache).expanduser()
    advice = "replace it, or unset GUIDANCE_NB_DATA to download" if given else "delete it and load again to download it"
    missing = check_files(source, folder, advice)
    if missing and download and not given:
        download_files(source, folder)
        missing = check_files(source, folder, advice)
    if missing:
        advice = "set GUIDANCE_NB_DATA to a folder that has it, or unset it to download" if given else "download=True"
        raise ValueError(f"{folder / missing[0]} is missing; allowed: {advice}")
    return folder


def read_published(
    source: str,  # "mnist" or "cifar10"
    root: Path,  # Folder whose files have been checked
    split: str,  # "train" or "test"
) -> tuple[Tensor, Tensor, tuple[str, ...]]:  # uint8 images `[n, channels, height, width]`, labels `[n]`, class names
    "Images, labels and class names of a published data set, through torchvision."
    from torchvision import datasets
    from torchvision.datasets.mnist import read_image_file, read_label_file

    if source == "mnist":  # the raw files themselves: the class prefers an unchecked processed copy if there is one
        stem = str(root / "MNIST" / "raw" / ("train" if split == "train" else "t10k"))
        x, labels = read_image_file(f"{stem}-images-idx3-ubyte"), read_label_file(f"{stem}-labels-idx1-ubyte")
        return x[:, None], labels.long(), tuple("0123456789")
    cifar = datasets.CIFAR10(str(root), train=split == "train")
    x = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(cifar.targets), tuple(cifar.classes)


def crop_image(
    image: Any,  # A PIL image
    size: int,  # Height and width of the result
) -> Any:  # A PIL image of `size` by `size`
    "ADM's crop: halve by boxes while at least twice too large, then bicubic with antialiasing, then the centre square."
    from PIL.Image import Resampling

    while min(image.size) >= 2 * size:
        image = image.resize(tuple(n // 2 for n in image.size), Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize(tuple(round(n * scale) for n in image.size), Resampling.BICUBIC)
    left, top = ((n - size) // 2 for n in image.size)
    return image.crop((left, top, left + size, top + size))


def read_image(
    path: str | Path,  # Image file
    channels: int,  # 3 for RGB, 1 for grey
    size: int | None = None,  # Side of the square to crop and resize to; None keeps the image as it is
) -> Tensor:  # uint8 `[channels, height, width]`
    "Decode one image file, without transparency; a damaged one is a `ValueError` that names it."
    from PIL import Image

    try:
        with Image.open(path) as file:
            mode, image = file.mode, file.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # decoders of damaged files raise errors of many kinds
        reason = " ".join(str(error).split()).replace(f" {str(path)!r}", "")
        raise ValueError(f"{path} cannot be read ({reason}); allowed: an image file, so replace or delete it") from None
    if mode.startswith(("I", "F")):
        raise ValueError(f"{path} has pixels of mode {mode}; allowed: 8 bits per channel")
    array = np.array(image if size is None else crop_image(image, size))
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()


def common_size(
    paths: Sequence[str | Path],  # Image files
) -> tuple[int, int]:  # Height and width
    "The one size of all images, from their headers; names two files that differ."
    with ThreadPoolExecutor() as pool:
        sizes = list(pool.map(_header, paths))
    for path, (size, _) in zip(paths, sizes):
        if size != sizes[0][0]:
            a, b = (f"{n[0]}x{n[1]}" for n in (sizes[0][0], size))
            raise ValueError(f"{paths[0]} is {a} and {path} is {b}; allowed: images of one size, or give size")
    return sizes[0][0][1], sizes[0][0][0]


def _header(path: str | Path) -> tuple[tuple[int, int], str]:
    "Width and height, and mode, of an image file."
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.size, image.mode
    except Exception:  # decoders of damaged files raise errors of many kinds
        raise ValueError(f"{path} is no image file; allowed: replace or delete it") from None


CACHE_BYTES = 2**28  # image folders that decode to at most this much, 256 MiB, are kept once decoded


class ImageFiles:
    "Image files decoded when asked for, by a pool of threads; small sets are remembered."

    def __init__(
        self,
        paths: Sequence[str],  # Image files
        shape: tuple[int, int, int],  # Channels, height, width of the result
        size: int | None,  # Side to crop and resize to, or None
    ):
        self.paths, self.shape, self.size = list(paths), shape, size
        small = len(paths) * shape[0] * shape[1] * shape[2] <= CACHE_BYTES
        self.cache = torch.empty(len(paths), *shape, dtype=torch.uint8) if small else None
        self.known = torch.zeros(len(paths), dtype=torch.bool)

    def __call__(self, indices: Tensor) -> Tensor:
        "The images `[b, channels, height, width]`, uint8."
        if self.cache is None:
            return self.decode(indices)
        new = indices[~self.known[indices]].unique()
        if len(new):
            self.cache[new] = self.decode(new)
            self.known[new] = True
        return self.cache[indices]

    def decode(self, indices: Tensor) -> Tensor:
        "Read and decode, without the memory."
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = list(pool.map(lambda i: read_image(self.paths[i], self.shape[0], self.size), indices.tolist()))
        for i, image in zip(indices.tolist(), images):
            if image.shape != self.shape:
                raise ValueError(f"{self.paths[i]} is {tuple(image.shape)}; allowed: {self.shape}, as when first seen")
        return torch.stack(images) if images else torch.empty(0, *self.shape, dtype=torch.uint8)


def folder_images(
    folder: Path,  # Folder with one sub-folder per class
    split: str = "train",  # Sub-folder to use if the folder has one of this name that holds the classes
    size: int | None = None,  # Side of the square to crop and resize to; needed if sizes differ
    channels: int = 3,  # 3 for RGB, 1 for grey
    flip: bool = False,  # Whether `fetch` mirrors a random half of the images
) -> ImageData:  # Images are decoded when fetched
    "A folder of class sub-folders, by torchvision's `ImageFolder`; labels follow the sorted names."
    from torchvision.datasets import ImageFolder

    if channels not in (1, 3):
        raise ValueError(f"channels = {channels!r}; allowed: 1, 3")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size = {size!r}; allowed: a whole number, 1 or more")
    if any(entry.is_dir() for entry in (folder / split).glob("*")):
        folder = folder / split
    elif split != "train":
        raise ValueError(f"split = {split!r}; allowed: 'train', or a sub-folder of {folder} that holds class folders")
    if not any(entry.is_dir() for entry in folder.iterdir()):
        raise ValueError(f"{folder} has no sub-folders; allowed: one sub-folder of images per class")
    found = ImageFolder(str(folder), allow_empty=True)
    labels = torch.tensor(found.targets, dtype=torch.long)
    for name, count in zip(found.classes, labels.bincount(minlength=len(found.classes))):
        if not count:
            raise ValueError(f"{folder / name} holds no images; allowed: at least one per class, or delete the folder")
    paths = [path for path, _ in found.samples]
    shape = (channels, *(common_size(paths) if size is None else (size, size)))
    return ImageData(ImageFiles(paths, shape, size), labels, tuple(found.classes), shape, flip, str(folder))


def load_images(
    source: str | Path,  # "mnist", "cifar10", or a folder with one sub-folder per class
    split: str = "train",  # "train" or "test"; for a folder, the sub-folder of this name if there is one
    root: str | Path | None = None,  # Where MNIST and CIFAR-10 are; default: GUIDANCE_NB_DATA, else the user's cache
    size: int | None = None,  # Side to crop and resize the images of a folder to
    flip: bool = False,  # Whether `fetch` mirrors a random half of the images
    download: bool = True,  # Whether to download MNIST or CIFAR-10 if missing; never into GUIDANCE_NB_DATA
    channels: int | None = None,  # For a folder: 3 for RGB, the default, or 1 for grey
) -> ImageData:  # With checked files
    "MNIST, CIFAR-10 or a folder of images; missing and damaged files are named."
    if source not in FILES:
        if not Path(source).is_dir():
            raise ValueError(f"source = {str(source)!r}; allowed: 'mnist', 'cifar10', or a folder of class sub-folders")
        return folder_images(Path(source), split, size, 3 if channels is None else channels, flip)
    if split not in ("train", "test"):
        raise ValueError(f"split = {split!r}; allowed: 'train', 'test'")
    x, labels, classes = read_published(str(source), find_files(str(source), root, download), split)
    if size not in (None, x.shape[2]) or channels not in (None, x.shape[1]):
        raise ValueError(f"size = {size}, channels = {channels}; allowed: {x.shape[2]}, {x.shape[1]}, as stored")
    return ImageData(x, labels, classes, (x.shape[1], x.shape[2], x.shape[3]), flip, str(source))


class SampleFile(NamedTuple):
    "Samples as they lie on disk."

    x: Tensor  # uint8 `[n, channels, height, width]`
    c: Tensor | None  # Labels `[n]`, int64, if there are any
    facts: dict[str, Any]  # What is known of them


FORMAT = "guidance_nb samples 1"


def check_samples(
    x: Tensor,  # Floats in [-1, 1] or uint8, `[n, channels, height, width]`
    c: Tensor | None,  # Labels `[n]` or None
    facts: dict[str, Any] | None,  # JSON-able
) -> tuple[np.ndarray, np.ndarray | None, str]:  # NHWC uint8, labels int64, JSON
    "What will be written, or a one-line refusal."
    if x.ndim != 4 or x.shape[1] not in (1, 3) or not x.numel():
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [n, 1 or 3, height, width], not empty")
    if c is not None and (c.is_floating_point() or c.shape != x.shape[:1] or bool((c < 0).any())):
        raise ValueError(f"c is {c.dtype} {tuple(c.shape)}; allowed: {len(x)} whole numbers, 0 or more, one per sample")
    if not isinstance(facts, dict | None):
        raise ValueError(f"facts is a {type(facts).__name__}; allowed: a dict")
    try:
        text = json.dumps(facts or {})
    except (TypeError, ValueError) as error:
        raise ValueError(f"facts cannot be written as JSON ({error}); allowed: text, numbers, lists, dicts") from None
    x = (x if x.dtype == torch.uint8 else to_uint8(x)).cpu()
    return x.permute(0, 2, 3, 1).contiguous().numpy(), None if c is None else c.cpu().long().numpy(), text


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    "Ask for a file's bytes, or a folder's names, to be on disk."
    if path.is_dir() and os.name == "nt":
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def write_aside(
    path: Path,  # File or folder that will stand there
) -> Iterator[Path]:  # A temporary name beside it, to write to
    "Write under a temporary name and rename when all is on disk; a failure leaves what was there."
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{os.getpid()}.tmp"
    old = path.parent / f".{path.name}.{os.getpid()}.old"
    _remove(aside)
    try:
        yield aside
        if aside.is_dir() and path.exists():
            os.rename(path, old)
        try:
            os.replace(aside, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        _sync(path.parent)
        _remove(old)
    finally:
        _remove(aside)


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def may_replace(
    path: Path,  # An existing file or folder
    overwrite: bool,  # Whether samples made elsewhere may be replaced too
) -> bool:  # True if `path` holds samples and nothing else
    "Whether replacing `path` loses nothing but samples."
    if path.is_file():
        try:
            with zipfile.ZipFile(path) as archive:
                names = set(archive.namelist())
        except zipfile.BadZipFile:
            return False
        return overwrite or {"arr_0.npy", "facts.npy"} <= names <= {"arr_0.npy", "arr_1.npy", "facts.npy"}
    files = [p for p in path.rglob("*") if not p.is_dir() and p != path / "facts.json"]
    if overwrite:
        return all(p.suffix.lower() in IMAGE_SUFFIXES for p in files)
    ours = all(re.fullmatch(r"(\d{4,}/)?\d{6,}\.png", p.relative_to(path).as_posix()) for p in files)
    return not any(path.iterdir()) or (ours and _folder_facts(path) is not None)


def _folder_facts(path: Path) -> dict[str, Any] | None:
    "The facts.json of a folder that `save_samples` wrote, or None."
    try:
        found = json.loads((path / "facts.json").read_text(encoding="utf-8"))
        return found if found["format"] == FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_samples(
    path: str | Path,  # A name that ends in .npz, or a folder for PNG files
    x: Tensor,  # Samples `[n, channels, height, width]`: floats in [-1, 1], or uint8
    c: Tensor | None = None,  # Labels `[n]`
    facts: dict[str, Any] | None = None,  # What to remember of them: seed, scale, command
    overwrite: bool = False,  # Whether to replace a file or folder that this function did not write
) -> Path:  # `path`
    "Write samples completely or not at all: ADM's .npz layout, or PNG files in class sub-folders."
    path = Path(path)
    if path.suffix.lower() in (".npy", ".pt", ".zip", ".png", ".jpg", ".jpeg", ".webp", ".safetensors"):
        raise ValueError(f"path = {str(path)!r}; allowed: a name that ends in .npz, or a folder")
    images, labels, text = check_samples(x, c, facts)
    if path.exists() and (path.is_dir() == (path.suffix == ".npz") or not may_replace(path, overwrite)):
        advice = "another name" if overwrite else "another name, or overwrite=True if these are samples"
        raise ValueError(f"{path} exists and save_samples did not write all of it; allowed: {advice}")
    with write_aside(path) as aside:
        if path.suffix == ".npz":
            arrays: dict[str, Any] = {"arr_0": images, "facts": np.array(text)}
            arrays |= {} if labels is None else {"arr_1": labels}
            with open(aside, "wb") as file:
                np.savez(file, **arrays)
            _sync(aside)
        else:
            _write_folder(aside, images, labels, text)
    return path


def _write_folder(folder: Path, images: np.ndarray, labels: np.ndarray | None, text: str) -> None:
    from PIL import Image

    folders = [folder] if labels is None else [folder / f"{label:04d}" for label in np.unique(labels)]
    for name in folders:
        name.mkdir(parents=True)
    facts = {"format": FORMAT, "shape": images.shape, "sha256": _digest(images, labels), "facts": json.loads(text)}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1), encoding="utf-8")

    def write(i: int) -> None:
        path = (folder if labels is None else folder / f"{labels[i]:04d}") / f"{i:06d}.png"
        Image.fromarray(images[i] if images.shape[3] == 3 else images[i, :, :, 0]).save(path)
        _sync(path)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(len(images))))
    for name in [folder / "facts.json", *folders, folder]:
        _sync(name)


def _digest(images: np.ndarray, labels: np.ndarray | None) -> str:
    "SHA-256 of NHWC pixels and labels, for PNG decoders pass over some kinds of damage."
    digest = hashlib.sha256(images.tobytes())
    digest.update(b"" if labels is None else labels.tobytes())
    return digest.hexdigest()


def load_npz(
    path: Path,  # An .npz file with NHWC uint8 images as arr_0, perhaps labels as arr_1
) -> SampleFile:  # Its content
    "Samples in ADM's layout; whatever is wrong with the file is said in one line."
    try:
        if not zipfile.is_zipfile(path):
            raise ValueError("no complete zip archive")
        with np.load(path, allow_pickle=False) as file:
            if "arr_0" not in file.files:
                raise ValueError(f"no array arr_0, only {', '.join(file.files) or 'nothing'}")
            x, c = file["arr_0"], file["arr_1"] if "arr_1" in file.files else None
            facts = json.loads(str(file["facts"])) if "facts" in file.files else {}
    except Exception as error:  # a damaged archive raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{path} is damaged or holds no samples ({reason}); allowed: ADM's .npz layout") from None
    if x.dtype != np.uint8:
        span = f" in [{x.min():.3g}, {x.max():.3g}]" if x.size and np.issubdtype(x.dtype, np.number) else ""
        raise ValueError(f"{path}: arr_0 is {x.dtype}{span}; allowed: uint8 (to_uint8 converts floats in [-1, 1])")
    if x.ndim == 4 and x.shape[3] not in (1, 3) and x.shape[1] in (1, 3):
        raise ValueError(f"{path}: arr_0 has shape {x.shape}, channels first; allowed: [n, height, width, channels]")
    if x.ndim != 4 or x.shape[3] not in (1, 3) or not x.size:
        raise ValueError(f"{path}: arr_0 has shape {x.shape}; allowed: [n, height, width, 1 or 3], not empty")
    if c is not None and (c.shape != x.shape[:1] or not np.issubdtype(c.dtype, np.integer) or (c < 0).any()):
        raise ValueError(f"{path}: arr_1 is {c.dtype} {c.shape}; allowed: {len(x)} whole numbers, 0 or more")
    labels = None if c is None else torch.from_numpy(c.astype(np.int64))
    return SampleFile(torch.from_numpy(x).permute(0, 3, 1, 2).contiguous(), labels, facts)


def load_folder(
    path: Path,  # Folder of images, flat or in class sub-folders
    size: int | None = None,  # Side to crop and resize images made elsewhere to
    channels: int | None = None,  # 1 or 3; default: 1 if every image is grey
) -> SampleFile:  # Its content
    "Samples from a folder, ours or made elsewhere; labels are our numbers, or follow the sorted names of sub-folders."
    files = sorted(p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES and p.is_file())
    depths = {len(p.relative_to(path).parts) for p in files}
    if depths not in ({1}, {2}):
        found = "images at several depths" if depths else "no images"
        raise ValueError(f"{path} holds {found}; allowed: all images in it, or all in its sub-folders")
    known = _folder_facts(path)
    if known is not None:
        if len(files) != known["shape"][0]:
            raise ValueError(f"{path} holds {len(files)} of {known['shape'][0]} images; allowed: all, so write it anew")
        files.sort(key=lambda p: int(p.stem))
        size, channels = None, known["shape"][3]
    elif channels is None:
        with ThreadPoolExecutor() as pool:
            channels = 1 if {mode for _, mode in pool.map(_header, files)} <= {"1", "L"} else 3
    shape = (channels, *(common_size(files) if size is None else (size, size)))
    x = ImageFiles([str(p) for p in files], shape, size).decode(torch.arange(len(files)))
    names = [] if depths == {1} else sorted({p.parent.name for p in files})
    numbers = {name: int(name) if known else i for i, name in enumerate(names)}
    c = torch.tensor([numbers[p.parent.name] for p in files]) if names else None
    if known and known["sha256"] != _digest(x.permute(0, 2, 3, 1).numpy(), None if c is None else c.numpy()):
        raise ValueError(f"{path} holds other images or labels than were written; allowed: unchanged, so write anew")
    return SampleFile(x, c, known["facts"] if known else {"classes": names} if names else {})


def load_samples(
    path: str | Path,  # An .npz file in ADM's layout, or a folder of images
    size: int | None = None,  # Side wanted: images of a folder made elsewhere are resized, other files must have it
    channels: int | None = None,  # Channels wanted, 1 or 3
) -> SampleFile:  # uint8 images, labels if there are any, facts if there are any
    "Samples from an .npz file or a folder, written by `save_samples` or made elsewhere."
    path = Path(path)
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size = {size!r}; allowed: a whole number, 1 or more")
    if channels not in (None, 1, 3):
        raise ValueError(f"channels = {channels!r}; allowed: 1, 3")
    if not path.exists():
        raise ValueError(f"{path} does not exist; allowed: an .npz file or a folder of images")
    found = load_folder(path, size, channels) if path.is_dir() else load_npz(path)
    if size is not None and tuple(found.x.shape[2:]) != (size, size):
        raise ValueError(f"{path} has images of {tuple(found.x.shape[2:])}; allowed: {size}x{size}, as asked for")
    if channels is not None and found.x.shape[1] != channels:
        raise ValueError(f"{path} has {found.x.shape[1]} channels; allowed: {channels}, as asked for")
    return found
