"""MNIST, CIFAR-10 or any folder of images: checked files, keyed flips, and sample files that round-trip."""

import hashlib
import json
import math
import os
import re
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from guidance_nb._checks import check_choice, check_whole, checked, explained, require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import Json, digest, opened, parse_json, read_text, write_aside

with extra("images"):
    from PIL import Image, ImageOps

Crop = Literal["adm", "torchvision"]
Size = int | tuple[int, int]  # Side of a square, or height and width


def from_uint8(
    x: Tensor,  # Grey levels, uint8, any shape
) -> Tensor:  # Floats in [-1, 1], same shape
    "Grey levels as numbers in [-1, 1]: x = u / 127.5 - 1."
    require(x.dtype == torch.uint8, "type of x", x.dtype, "torch.uint8")
    return x.float() / 127.5 - 1


def to_uint8(
    x: Tensor,  # Floats, meant to be in [-1, 1], any shape
) -> Tensor:  # Grey levels, uint8, same shape
    "Nearest grey levels, u = round(127.5 x + 127.5); values outside [-1, 1] are clipped."
    low, high = x.aminmax() if x.numel() else (x.sum(), x.sum())
    fine = x.is_floating_point() and x.isfinite().all() and not (low >= 0 and high > 2)
    told = f"x is {x.dtype} in [{low:.3g}, {high:.3g}]"
    require_that(fine, told, "finite, floating-point values in [-1, 1] (from_uint8 converts grey levels)")
    return (x.float() * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)


@dataclass
class ImageData:
    "Labelled images as `fit` reads them: whole batches by index, flips keyed, values in [-1, 1]."

    pixels: Tensor | Callable[[Tensor], Tensor]  # uint8 `[n, channels, height, width]`, or a function of indices
    labels: Tensor  # Class indices `[n]`
    classes: tuple[str, ...]  # Names of the classes
    shape: tuple[int, int, int]  # Channels, height, width
    flip: bool = False  # Whether `fetch` mirrors a random half of the images
    name: str = "images"  # Where they come from, for tables
    shift: int = 0  # Most pixels by which `fetch` moves an image at random, each way; black fills the edge

    @property
    def num_classes(self) -> int:
        "Number of classes, also those a subset has no image of."
        return len(self.classes)

    def __len__(self) -> int:
        return len(self.labels)

    def digest(self) -> str:
        "What identifies the data at a resume: pixels in memory, or names, sizes and times of files; and labels."
        files = [Path(file) for file in getattr(self.pixels, "paths", ())]
        facts = [[*file.parts[-2:], file.stat().st_size, file.stat().st_mtime_ns] for file in files]
        pixels = [self.pixels] if isinstance(self.pixels, Tensor) else []
        return digest(json.dumps([facts, self.classes]), *pixels, self.labels)[:16]

    def images(self, indices: Tensor) -> Tensor:
        "The images as stored, uint8 `[b, channels, height, width]`, never flipped."
        return self.pixels[indices] if isinstance(self.pixels, Tensor) else self.pixels(indices)

    def fetch(self, indices: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        "Rows `rows` of the batch `indices`, in [-1, 1], with labels; flips and moves are drawn for the whole batch."
        mine = indices[rows]
        x = from_uint8(self.images(mine))
        if self.shift:
            moves = torch.randint(2 * self.shift + 1, (2, len(indices), 1), generator=generator)[:, rows]
            y, z = (first + torch.arange(side) for first, side in zip(moves, self.shape[1:]))
            wide = torch.nn.functional.pad(x, [self.shift] * 4, value=-1.0)
            seen = (y[:, :, None] * wide.shape[3] + z[:, None]).flatten(1)[:, None].expand(-1, len(x[0]), -1)
            x = wide.flatten(2).gather(2, seen).reshape(x.shape)
        if self.flip:
            flips = torch.rand(len(indices), generator=generator)[rows] < 0.5
            x = torch.where(flips[:, None, None, None], x.flip(3), x)
        return x, self.labels[mine]


FILES = {  # md5 of the files as published; for CIFAR-10 torchvision has the same
    "mnist": {
        "MNIST/raw/train-images-idx3-ubyte": "6bbc9ace898e44ae57da46a324031adb",
        "MNIST/raw/train-labels-idx1-ubyte": "a25bea736e30d166cdddb491f175f624",
        "MNIST/raw/t10k-images-idx3-ubyte": "2646ac647ad5339dbf082846283269ea",
        "MNIST/raw/t10k-labels-idx1-ubyte": "27ae3e4e09519cfbb04c329615203637",
    },
    "cifar10": {
        "cifar-10-batches-py/batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
        "cifar-10-batches-py/data_batch_1": "c99cafc152244af753f735de768cd75f",
        "cifar-10-batches-py/data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "cifar-10-batches-py/data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "cifar-10-batches-py/data_batch_4": "634d18415352ddfa80567beed471001a",
        "cifar-10-batches-py/data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "cifar-10-batches-py/test_batch": "40351d587109b95175f43aff81a1287e",
    },
}


def _missing_files(source: str, root: Path, advice: str) -> list[Path]:
    "The missing files of a published data set; an error names the first truncated or altered one."
    missing = []
    for path, md5 in ((root / name, md5) for name, md5 in FILES[source].items()):
        if not path.is_file():
            missing.append(path)
        else:
            found = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
            require_that(found == md5, f"{path} is damaged: its md5 is not {md5}", advice)
    return missing


def _download_files(source: str, root: Path) -> None:
    "Let torchvision download into a folder aside, check the files, and move each into place whole."
    from http.client import HTTPException

    with extra("images"):
        from torchvision import datasets

    advice = "try again, or set GUIDANCE_NB_DATA to a folder that holds it"
    problem, kinds = f"{source} could not be downloaded to {root}", (OSError, RuntimeError, EOFError, HTTPException)
    with explained(problem, advice, *kinds):  # no network, no space, wrong md5
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".download-", dir=root) as aside:
            {"mnist": datasets.MNIST, "cifar10": datasets.CIFAR10}[source](aside, download=True)
            _missing_files(source, Path(aside), "try again")
            for name in FILES[source]:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(Path(aside) / name, root / name)


def find_files(source: str, root: str | Path | None = None, download: bool = True) -> Path:
    "The folder of a data set, checked: `root`, else GUIDANCE_NB_DATA, never written to, else a cache to download to."
    given = os.environ.get("GUIDANCE_NB_DATA") if root is None else None
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "guidance_nb"
    folder = Path(root or given or cache).expanduser()
    advice = "replace it, or unset GUIDANCE_NB_DATA to download" if given else "delete it and load again to download it"
    if missing := _missing_files(source, folder, advice):
        advice = "set GUIDANCE_NB_DATA to a folder that has it, or unset it to download" if given else "download=True"
        require_that(download and not given, f"{missing[0]} is missing", advice)
        _download_files(source, folder)
    return folder


def find_sides(size: Size) -> tuple[int, int]:
    "Height and width of a size."
    height, width = size if isinstance(size, tuple) and len(size) == 2 else (size, size)
    return check_whole("size", height, 1), check_whole("size", width, 1)


def _shrink(x: Tensor, size: Size | None) -> Tensor:
    "uint8 images brought to sides that divide theirs: a pixel is the mean of its block, halves rounded up."
    stored = x.shape[2], x.shape[3]
    if size is None or (wanted := find_sides(size)) == stored:
        return x
    edges = stored[0] // wanted[0], stored[1] // wanted[1]
    fine = (wanted[0] * edges[0], wanted[1] * edges[1]) == stored
    require(fine, "size", size, f"{stored[0]} x {stored[1]}, as stored, or sides that divide these")
    means = [torch.nn.functional.avg_pool2d(part.float(), edges) for part in x.split(4096)]
    return torch.cat([(part + 0.5).floor().to(torch.uint8) for part in means])


def _read_published(source: str, root: Path, split: str) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    "Images `[n, channels, height, width]`, labels `[n]` and class names of checked files, through torchvision."
    with extra("images"):
        from torchvision import datasets
        from torchvision.datasets.mnist import read_image_file, read_label_file

    if source == "mnist":  # the raw files themselves: the class prefers an unchecked processed copy if there is one
        stem = str(root / "MNIST" / "raw" / ("train" if split == "train" else "t10k"))
        x, labels = read_image_file(f"{stem}-images-idx3-ubyte"), read_label_file(f"{stem}-labels-idx1-ubyte")
        return x[:, None], labels.long(), tuple("0123456789")
    cifar = datasets.CIFAR10(str(root), train=split == "train")
    x = torch.from_numpy(cifar.data).permute(0, 3, 1, 2).contiguous()
    return x, torch.tensor(cifar.targets), tuple(cifar.classes)


_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff")


def image_files(folder: Path) -> list[Path]:
    "The images below a folder, without hidden names (.DS_Store, ._a.png, .ipynb_checkpoints)."
    found: list[Path] = []
    for entry in (entry for entry in os.scandir(folder) if not entry.name.startswith(".")):
        if entry.is_dir():
            found += image_files(Path(entry))
        elif Path(entry).suffix.lower() in _IMAGE_SUFFIXES:
            found.append(Path(entry))
    return sorted(found)


def crop_image(image: Image.Image, size: Size) -> Image.Image:
    "ADM's crop: halve by boxes while at least twice too large, then bicubic, antialiased, then the centre."
    height, width = find_sides(size)
    while image.height >= 2 * height and image.width >= 2 * width:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def _resize_crop(image: Image.Image, size: Size) -> Image.Image:
    "torchvision's Resize, until the image covers the size, and CenterCrop: bilinear with antialiasing."
    with extra("images"):
        from torchvision.transforms.functional import center_crop, resize

    height, width = find_sides(size)
    shorter = max(height / image.height, width / image.width) * min(image.size)
    return center_crop(resize(image, math.ceil(round(shorter, 6))), [height, width])


CROPS: dict[Crop, Callable[[Image.Image, Size], Image.Image]] = {"adm": crop_image, "torchvision": _resize_crop}
_ORIENTATION = 0x0112  # of EXIF; 5 to 8 exchange width and height


def to_pixels(file: Image.Image, channels: int, size: Size | None = None, crop: Crop = "adm") -> Tensor:
    """A PIL image as uint8 `[channels, height, width]`, cropped to `size`.

    It is as viewers show it, in RGB or grey: upright, and what is transparent on white.
    """
    require(not file.mode.startswith(("I", "F")), "mode", file.mode, "8 bits per channel")
    image = ImageOps.exif_transpose(file)
    if "A" in file.getbands() or "transparency" in file.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB" if channels == 3 else "L")
    array = np.array(image if size is None else CROPS[check_choice("crop", crop, CROPS)](image, size))
    return torch.from_numpy(array).reshape(*array.shape[:2], channels).permute(2, 0, 1).contiguous()


@contextmanager
def _opened(path: str | Path) -> Iterator[Image.Image]:
    "An image file; one that is damaged is named."
    with opened(Path(path), "an image file, so replace or delete it") as file, Image.open(file) as image:
        yield image


def read_image(path: str | Path, channels: int, size: Size | None = None, crop: Crop = "adm") -> Tensor:
    "An image file as uint8 `[channels, height, width]`, cropped to `size`; a damaged one is named."
    with _opened(path) as file:
        return to_pixels(file, channels, size, crop)


def _read_header(path: str | Path) -> tuple[tuple[int, int], str]:
    "Height and width as shown, and the mode, of an image file, without decoding it."
    with _opened(path) as image:
        turned = image.getexif().get(_ORIENTATION, 1) >= 5
        return image.size if turned else image.size[::-1], image.mode


def common_size(paths: Sequence[str | Path], size: Size | None = None) -> tuple[int, int]:
    "The `size`, or the one height and width of all images, from their headers; names two files that differ."
    if size is not None:
        return find_sides(size)
    with ThreadPoolExecutor() as pool:
        sizes = [size for size, _ in pool.map(_read_header, paths)]
    other = next((n for n, size in enumerate(sizes) if size != sizes[0]), 0)
    a, b = (f"{paths[n]} is {sizes[n][1]}x{sizes[n][0]}" for n in (0, other))
    require_that(not other, f"{a} and {b}", "images of one size, or give size")
    return sizes[0]


_CACHE_BYTES = 2**28  # image folders that decode to at most this much, 256 MiB, are kept once decoded


class ImageFiles:
    "Image files decoded when asked for, by a pool of threads; small sets are kept."

    def __init__(self, paths: Sequence[str | Path], channels: int, size: Size | None, crop: Crop = "adm"):
        self.paths, self.size, self.crop = [str(path) for path in paths], size, crop
        self.shape = (channels, *common_size(paths, size))
        small = len(paths) * math.prod(self.shape) <= _CACHE_BYTES
        self.cache = torch.empty(len(paths), *self.shape, dtype=torch.uint8) if small else None
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
        read = partial(read_image, channels=self.shape[0], size=self.size, crop=self.crop)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            images = list(pool.map(read, [self.paths[i] for i in indices.tolist()]))
        return torch.stack(images) if images else torch.empty(0, *self.shape, dtype=torch.uint8)


def _class_folders(folder: Path) -> list[str]:
    "Sorted names of the sub-folders that are not hidden."
    return sorted(entry.name for entry in folder.glob("*") if entry.is_dir() and not entry.name.startswith("."))


def _folder_images(folder: Path, split: str, size: Size | None, channels: int, flip: bool, crop: Crop) -> ImageData:
    "A folder of class sub-folders; labels follow the sorted names, as torchvision's `ImageFolder` has it."
    if split != "train" or _class_folders(folder / split):
        folder = folder / split
    classes = _class_folders(folder)
    files = {name: image_files(folder / name) for name in classes}
    empty = ", ".join(name for name in classes if not files[name])
    told = f"{folder} has {len(classes)} class folders{', no images in ' if empty else ''}{empty}"
    require_that(classes and not empty, told, "'mnist', 'cifar10', or a folder with a sub-folder of images per class")
    labels = torch.arange(len(classes)).repeat_interleave(torch.tensor([len(paths) for paths in files.values()]))
    pixels = ImageFiles([path for paths in files.values() for path in paths], channels, size, crop)
    return ImageData(pixels, labels, tuple(classes), pixels.shape, flip, str(folder))


def _read_packed(file: Path) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    "Images, labels and class names of an .npz that `save_samples` wrote with the names of the classes."
    x, labels, facts = _load_npz(file)
    classes = facts.get("classes")
    fine = x.ndim == 4 and labels is not None and isinstance(classes, list) and int(labels.max()) < len(classes)
    allowed = "images in arr_0, labels in arr_1, the names of all classes in the facts"
    require(fine, f"labels and classes of {file}", classes, allowed)
    return x, labels, tuple(classes)  # type: ignore[return-value, arg-type]


@checked
def load_images(
    source: str | Path,  # "mnist", "cifar10", or a folder: of a sub-folder per class, or of train.npz and test.npz
    split: str = "train",  # "train" or "test"; for a folder, the sub-folder of this name if there is one
    root: str | Path | None = None,  # Where MNIST and CIFAR-10 are; default: GUIDANCE_NB_DATA, else the user's cache
    size: Size | None = None,  # Side, or height and width, to bring images to: files by `crop`, others by `_shrink`
    flip: bool = False,  # Whether `fetch` mirrors a random half of the images
    download: bool = True,  # Whether to download MNIST or CIFAR-10 if missing; never into GUIDANCE_NB_DATA
    channels: Literal[1, 3] | None = None,  # For a folder of image files: 3 for RGB, the default, or 1 for grey
    crop: Crop = "adm",  # For a folder: how to crop and resize, as ADM or as torchvision does
) -> ImageData:  # With checked files
    "MNIST, CIFAR-10 or a folder of images; missing and damaged files are named."
    name = str(source)
    if name in FILES:
        check_choice("split", split, ("train", "test"))
        x, labels, classes = _read_published(name, find_files(name, root, download), split)
    elif (file := Path(source) / f"{split}.npz").is_file():
        x, labels, classes = _read_packed(file)
    else:
        return _folder_images(Path(source), split, size, channels or 3, flip, crop)
    require(channels in (None, x.shape[1]), "channels", channels, f"{x.shape[1]}, as stored")
    x = _shrink(x, size)
    return ImageData(x, labels, classes, (x.shape[1], x.shape[2], x.shape[3]), flip, name)


class SampleFile(NamedTuple):
    "Samples as they lie on disk."

    x: Tensor  # uint8 `[n, channels, height, width]`; signals as they were saved, float32
    c: Tensor | None  # Labels `[n]`, int64, if there are any
    facts: Json  # What is known of them


OTHER_KINDS = (".npy", ".pt", ".zip", ".jpg", ".jpeg", ".webp", ".safetensors")  # of files that none of ours is
_FORMAT = "guidance_nb samples 1"
_FACTS = "facts.json"


def may_replace(path: Path, overwrite: bool) -> bool:
    "Whether replacing what is there loses nothing but samples of ours, with `overwrite` of anybody."
    if path.is_file():
        if overwrite or not zipfile.is_zipfile(path):
            return zipfile.is_zipfile(path)
        with zipfile.ZipFile(path) as archive:
            return {"arr_0.npy", "facts.npy"} <= {*archive.namelist()} <= {"arr_0.npy", "arr_1.npy", "facts.npy"}
    files = [p for p in path.rglob("*") if not p.is_dir() and p != path / _FACTS]
    if overwrite:
        return all(p.suffix.lower() in _IMAGE_SUFFIXES for p in files)
    ours = all(re.fullmatch(r"(\d{4,}/)?\d{6,}\.png", p.relative_to(path).as_posix()) for p in files)
    return not any(path.iterdir()) or (ours and _record(path) is not None)


def _record(folder: Path) -> Json | None:
    "What `save_samples` wrote beside its images, or None for a folder made elsewhere."
    try:
        found = parse_json(read_text(folder / _FACTS))
        return found if found["format"] == _FORMAT else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def save_samples(
    path: str | Path,  # A name that ends in .npz, or a folder for PNG files
    x: Tensor,  # Images `[n, channels, height, width]`: floats in [-1, 1], or uint8; or signals `[n, ...]`, floats
    c: Tensor | None = None,  # Labels `[n]`
    facts: Json | None = None,  # What to store with them: seed, scale, command
    overwrite: bool = False,  # Whether to replace a file or folder that this function did not write
) -> Path:  # `path`
    "Write samples completely or not at all: ADM's .npz layout, or PNG files in class sub-folders; signals as float32."
    path = Path(path)
    other = path.suffix.lower() in (*OTHER_KINDS, ".png")
    require(not other, "path", str(path), "a name that ends in .npz, or a folder")
    packed, signals = path.suffix.lower() == ".npz", x.ndim in (2, 3) and x.is_floating_point()
    fine = x.numel() and (x.ndim == 4 or signals) and (packed or (x.ndim == 4 and x.shape[1] in (1, 3)))
    told = "[n, channels, height, width], not empty; with 1 or 3 channels for PNG files"
    require(fine, "type and shape of x", f"{x.dtype} {tuple(x.shape)}", f"{told}; float signals [n, ...] for .npz")
    labels = None if c is None else _whole_numbers("c", c.cpu().numpy(), len(x))
    text = json.dumps(dict(facts or {}))
    y = x.detach().float() if signals else (x if x.dtype == torch.uint8 else to_uint8(x)).permute(0, 2, 3, 1)
    images = y.cpu().contiguous().numpy()
    free = not path.exists() or (path.is_dir() != packed and may_replace(path, overwrite))
    advice = "another name" if overwrite else "another name, or overwrite=True if these are samples"
    require_that(free, f"{path} exists and save_samples did not write all of it", advice)
    with write_aside(path) as aside:
        if packed:
            arrays = {"arr_0": images, "facts": np.array(text)} | ({} if labels is None else {"arr_1": labels})
            with open(aside, "wb") as file:
                np.savez(file, **arrays)  # type: ignore[arg-type]
        else:
            _write_folder(aside, images, labels, text)
    return path


def _whole_numbers(name: str, c: np.ndarray, n: int) -> np.ndarray:
    "Labels of n samples as int64."
    fine = c.shape == (n,) and np.issubdtype(c.dtype, np.integer) and bool((c >= 0).all())
    require(fine, name, f"{c.dtype} {c.shape}", f"{n} whole numbers, 0 or more, one per sample")
    return c.astype(np.int64)


def _write_folder(folder: Path, images: np.ndarray, labels: np.ndarray | None, text: str) -> None:
    "PNG files and what is known of them, with a checksum of the pixels, for decoders pass over some kinds of damage."
    folders = [folder] * len(images) if labels is None else [folder / f"{label:04d}" for label in labels]
    for name in {*folders}:
        name.mkdir(parents=True, exist_ok=True)
    record = {"format": _FORMAT, "shape": images.shape, "sha256": _pixels_digest(images, labels)}
    (folder / _FACTS).write_text(json.dumps(record | {"facts": json.loads(text)}, indent=1), encoding="utf-8")

    def write(i: int) -> None:
        image = Image.fromarray(images[i] if images.shape[3] == 3 else images[i, :, :, 0])
        image.save(folders[i] / f"{i:06d}.png")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(len(images))))


def _pixels_digest(images: np.ndarray, labels: np.ndarray | None) -> str:
    return digest(images, b"" if labels is None else labels)


def _read_arrays(path: Path, *needed: str) -> tuple[dict[str, np.ndarray], Json]:
    "The arrays of an archive and its facts, without executing what it may hold; what is wrong is said in one line."
    allowed = f"an .npz file of numbers with {' and '.join(needed)}, and with a table in JSON as facts, or none"
    with opened(path, allowed) as file, np.load(file, allow_pickle=False) as archive:
        arrays = {key: x for key in archive.files if isinstance(x := archive[key], np.ndarray)}
        return {key: arrays[key] for key in (*needed, *arrays)}, dict(parse_json(str(arrays.get("facts", "{}"))))


def _load_npz(path: Path) -> SampleFile:
    "Samples in ADM's layout; whatever is wrong with the file is said in one line."
    arrays, facts = _read_arrays(path, "arr_0")
    x, c = arrays["arr_0"], arrays.get("arr_1")
    span = f" in [{x.min():.3g}, {x.max():.3g}]" if x.size and np.issubdtype(x.dtype, np.number) else ""
    signals = x.ndim in (2, 3) and x.dtype == np.float32 and bool(np.isfinite(x).all())
    swapped = x.ndim == 4 and x.shape[1] in (1, 3) and x.shape[3] not in (1, 3)
    first = ", channels first" if swapped and (x.shape[3] > 4 or x.shape[2] == x.shape[3]) else ""
    fine = ((x.ndim == 4 and x.dtype == np.uint8) or signals) and not first and x.size > 0
    allowed = "uint8 [n, height, width, channels], not empty (to_uint8 converts floats in [-1, 1])"
    require_that(fine, f"{path}: arr_0 is {x.dtype}{span} of shape {x.shape}{first}", allowed)
    labels = None if c is None else torch.from_numpy(_whole_numbers(f"arr_1 of {path}", c, len(x)))
    y = torch.from_numpy(x)
    return SampleFile(y if signals else y.permute(0, 3, 1, 2).contiguous(), labels, facts)


def _load_folder(path: Path, size: Size | None = None, channels: int | None = None) -> SampleFile:
    "Samples from a folder that `save_samples` wrote; of another one, labels follow the sorted names of sub-folders."
    files = image_files(path)
    depths = {len(file.relative_to(path).parts) for file in files}
    found = "images at several depths" if depths else "no images"
    require(depths in ({1}, {2}), f"content of {path}", found, "all images in it, or all in its sub-folders")
    if record := _record(path):
        return _folder_of_ours(path, files, depths == {2}, record)
    if channels is None:  # grey stays grey if all are
        with ThreadPoolExecutor() as pool:
            channels = 1 if {mode for _, mode in pool.map(_read_header, files)} <= {"1", "L"} else 3
    x = ImageFiles(files, channels, size)(torch.arange(len(files)))
    if depths == {1}:
        return SampleFile(x, None, {})
    names = [file.parent.name for file in files]
    classes = sorted({*names})
    return SampleFile(x, torch.tensor([classes.index(name) for name in names]), {"classes": classes})


def _folder_of_ours(path: Path, files: list[Path], by_class: bool, record: Json) -> SampleFile:
    "File names are the numbers of samples, folder names the labels; all must be there, and unchanged."
    with explained(f"{path / _FACTS} is damaged", "as written", KeyError, TypeError, ValueError):
        (count, _, _, channels), promised, facts = record["shape"], record["sha256"], dict(record["facts"])
    files = sorted(files, key=lambda file: (len(file.stem), file.stem))  # as numbers, and a foreign name somewhere
    labels = [int(file.parent.name) if file.parent.name.isdecimal() else -1 for file in files]
    c = torch.tensor(labels) if by_class else None
    x = ImageFiles(files, channels, None)(torch.arange(len(files)))
    same = _pixels_digest(x.permute(0, 2, 3, 1).numpy(), None if c is None else c.numpy()) == promised
    told = f"{path} holds {len(files)} images, which are not those that were written with their labels"
    require_that(same, told, f"all {count} of them, unchanged, so write it anew")
    return SampleFile(x, c, facts)


def load_samples(
    path: str | Path,  # An .npz file in ADM's layout, or a folder of images
    size: Size | None = None,  # Wanted side, or height and width: folders made elsewhere are resized, others have it
    channels: int | None = None,  # Channels wanted; 1 or 3 for a folder
) -> SampleFile:  # uint8 images, labels if there are any, facts if there are any
    "Samples from an .npz file or a folder, written by `save_samples` or made elsewhere."
    path = Path(path)
    kept = channels if channels in (1, 3) else None  # of the channels that image files have
    found = _load_folder(path, size, kept) if path.is_dir() else _load_npz(path)
    _, stored, *sides = found.x.shape
    wanted = (stored if channels is None else channels, *(sides if size is None else find_sides(size)))
    require((stored, *sides) == wanted, f"shape of the images of {path}", (stored, *sides), f"{wanted}, as asked for")
    return found
