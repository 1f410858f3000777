"""ImageNet-sized training: images encoded once into sharded latents, read back keyed, and decoded after sampling."""

import hashlib
import json
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guidance_nb._files import force_to_disk
from guidance_nb._processes import find_processes
from guidance_nb.images.data import (
    ImageData,
    ImageFiles,
    crop_image,
    from_uint8,
    load_images,
    read_image,
    to_uint8,
    write_aside,
)
from guidance_nb.training import first_difference, prefetch


def resize_crop(
    image: Any,  # A PIL image
    size: int,  # Height and width of the result
) -> Any:  # A PIL image of `size` by `size`
    "torchvision's Resize and CenterCrop: bilinear with antialiasing, then the centre square."
    from torchvision.transforms.functional import center_crop, resize

    return center_crop(resize(image, size), [size, size])


CROPS: dict[str, Callable[[Any, int], Any]] = {"adm": crop_image, "torchvision": resize_crop}


class CroppedFiles(ImageFiles):
    "Image files decoded when asked for, squared by a crop of `CROPS`."

    def __init__(
        self,
        paths: list[str],  # Image files
        shape: tuple[int, int, int],  # Channels, height, width of the result
        crop: Callable[[Any, int], Any],  # From a PIL image and a size to a square PIL image
    ):
        super().__init__(paths, shape, shape[1])
        self.crop = crop

    def decode(self, indices: Tensor) -> Tensor:
        "Read, decode and crop."
        from torchvision.transforms.functional import pil_to_tensor, to_pil_image

        def one(i: int) -> Tensor:
            return pil_to_tensor(self.crop(to_pil_image(read_image(self.paths[i], self.shape[0])), self.shape[1]))

        with ThreadPoolExecutor(8) as pool:
            return torch.stack(list(pool.map(one, indices.tolist())))


def load_pictures(
    source: str | Path | ImageData,  # A folder with one sub-folder per class, "mnist", "cifar10", or pictures
    size: int | None = None,  # Side of the square to crop and resize to; None wants images of one size
    channels: int = 3,  # Channels that the encoder takes
    crop: str = "adm",  # A key of `CROPS`
    split: str = "train",  # "train" or "test"
) -> ImageData:  # Pictures, decoded when asked for
    "Pictures to encode; those that are `ImageData` already are taken as they are."
    if isinstance(source, ImageData):
        return source
    if crop not in CROPS:
        raise ValueError(f"crop = {crop!r}; allowed: {', '.join(map(repr, CROPS))}")
    data = load_images(source, split, size=size, channels=channels)
    if crop == "adm" or size is None or not isinstance(data.pixels, ImageFiles):
        return data
    return replace(data, pixels=CroppedFiles(data.pixels.paths, data.shape, CROPS[crop]))


def draw_latents(
    moments: Tensor,  # Means and standard deviations, `[n, 2, channels, height, width]`
    noise: Tensor | None,  # Standard normal, `[n, channels, height, width]`; None takes the means
    factor: float,  # f of eq. (1)
    shift: float = 0.0,  # b of eq. (1)
) -> Tensor:  # Latents `[n, channels, height, width]`
    "Latents as networks see them, eq. (1) (arXiv 2112.10752)."
    mean, std = moments.float().unbind(1)
    return factor * ((mean if noise is None else mean + std * noise) - shift)


def load_vae(
    source: Any,  # An `AutoencoderKL`, or the folder or name of one or of a pipeline that has one
    device: str | torch.device | None = None,  # Where to put one that is loaded; the accelerator if there is one
) -> Any:  # The autoencoder, without gradients
    "An autoencoder of `diffusers`; one that cannot be loaded is a `ValueError`."
    if not isinstance(source, str | Path):
        from diffusers import AutoencoderKL

        vae: Any = source if isinstance(source, AutoencoderKL) else None
        if vae is None:
            kind = type(source).__name__
            raise ValueError(f"vae is a {kind}; allowed: a diffusers AutoencoderKL, or its folder or name")
        return vae.eval().requires_grad_(False)
    where = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    find_processes(torch.device(where))  # where there are several, this points each at its own card
    return _read_vae(str(source)).to(where)


@lru_cache(1)
def _read_vae(source: str) -> Any:
    from diffusers import AutoencoderKL

    inside = {"subfolder": "vae"} if (Path(source) / "vae" / "config.json").is_file() else {}
    try:
        return AutoencoderKL.from_pretrained(source, **inside).eval().requires_grad_(False)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"vae = {source!r} cannot be loaded ({reason}); allowed: a folder or name of one") from None


def describe_vae(
    vae: Any,  # An autoencoder
    name: str = "",  # Its folder or name, if it has one
) -> dict[str, Any]:  # JSON-able
    "What latents must remember of their autoencoder: factor, shift, sizes, and a digest of its weights."
    digest = hashlib.sha256()
    for key, value in sorted(vae.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    config = vae.config
    return {
        "name": name,
        "factor": float(config.scaling_factor),
        "shift": float(config.shift_factor or 0.0),
        "in_channels": int(config.in_channels),
        "latent_channels": int(config.latent_channels),
        "reduction": 2 ** (len(config.block_out_channels) - 1),
        "sha256": digest.hexdigest(),
    }


@torch.no_grad()
def encode(
    vae: Any,  # An autoencoder
    images: Tensor,  # Pictures `[n, channels, height, width]`, uint8
) -> Tensor:  # Means and standard deviations `[n, 2, latent channels, ...]`, float32, on the CPU
    "The encoder's posterior of pictures."
    weight = next(vae.parameters())
    found = vae.encode(from_uint8(images).to(weight)).latent_dist
    return torch.stack([found.mean, found.std], 1).float().cpu()


@torch.no_grad()
def decode(
    vae: Any,  # An autoencoder
    latents: Tensor,  # Latents as networks see them `[n, channels, height, width]`
    batch_size: int = 32,  # Latents at a time
) -> Tensor:  # Pictures `[n, channels, ...]`, uint8, on the CPU
    "Pictures of latents, eq. (2)."
    weight, config = next(vae.parameters()), vae.config
    if latents.ndim != 4 or latents.shape[1] != config.latent_channels:
        found = f"latents have shape {tuple(latents.shape)}"
        raise ValueError(f"{found}; allowed: [n, {config.latent_channels}, height, width], as this autoencoder makes")
    parts = [
        to_uint8(vae.decode((part / config.scaling_factor + (config.shift_factor or 0.0)).to(weight)).sample.cpu())
        for part in latents.split(batch_size)
    ]
    return torch.cat(parts) if parts else torch.empty(0, config.out_channels, 0, 0, dtype=torch.uint8)


INDEX = "latents.json"
FORMAT = "guidance_nb latents 1"


def shard_name(number: int) -> str:
    "The file name of shard `number`."
    return f"shard-{number:05d}.safetensors"


def _digest(tensors: dict[str, Tensor]) -> str:
    "SHA-256 of the numbers of a shard."
    digest = hashlib.sha256()
    for key in ("moments", "labels"):
        digest.update(tensors[key].contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_shard(
    path: Path,  # File to write
    moments: Tensor,  # `[n, views, 2, channels, height, width]`
    labels: Tensor,  # `[n]`
    settings: dict[str, Any],  # What decided the numbers
) -> dict[str, Any]:  # The shard's entry in the index
    "Write a shard completely or not at all."
    from safetensors.torch import save_file

    tensors = {"moments": moments.contiguous(), "labels": labels.contiguous()}
    entry = {"file": path.name, "rows": len(labels), "sha256": _digest(tensors)}
    with write_aside(path) as aside:
        facts = {"format": FORMAT, "settings": settings, "sha256": entry["sha256"]}
        save_file(tensors, aside, {"guidance_nb": json.dumps(facts)})  # one key, for several have no order
        force_to_disk(aside)
    return entry | {"bytes": path.stat().st_size}


class DamagedShard(ValueError):
    "A shard that is missing or not whole; an encoding makes it anew."


def open_shard(
    path: Path,  # File to read
) -> tuple[dict[str, Tensor], dict[str, Any], str]:  # Tensors mapped from the file, settings, promised SHA-256
    "Map a shard into memory without reading it; a missing, truncated or foreign file is a `ValueError` that names it."
    from safetensors import SafetensorError, safe_open

    advice = "start the encoding again, which makes the shards that are missing or damaged and keeps the others"
    if not path.is_file():
        raise DamagedShard(f"{path} is missing; allowed: {advice}")
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {}).get("guidance_nb", "{}"))
            if facts.get("format") != FORMAT:
                raise ValueError(f"{path} holds no latents of this package; allowed: shards of `guidance-nb encode`")
            tensors = {key: file.get_tensor(key) for key in ("moments", "labels")}
            return tensors, facts["settings"], facts["sha256"]
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise DamagedShard(f"{path} is damaged ({reason}); allowed: {advice}") from None


def check_shard(
    path: Path,  # File to read
) -> dict[str, Any]:  # The shard's entry in the index
    "Read all of a shard and compare it with its own SHA-256; damage is a `ValueError` that names the file."
    tensors, _, promised = open_shard(path)
    if (found := _digest(tensors)) != promised:
        allowed = "delete it and start the encoding again, which makes it anew and keeps the others"
        wrong = f"SHA-256 {found[:9]}... instead of {promised[:9]}..."
        raise DamagedShard(f"{path} is damaged: {wrong}; allowed: {allowed}")
    return {"file": path.name, "rows": len(tensors["labels"]), "sha256": found, "bytes": path.stat().st_size}


@dataclass
class Encoding:
    "Pictures on their way to latents."

    data: ImageData  # Pictures
    vae: Any  # The autoencoder
    settings: dict[str, Any]  # What decides the numbers
    out: Path  # Folder of the shards
    batch_size: int = 32  # Pictures at a time
    progress: Callable[[int], Any] = field(default=lambda n: None)  # Told how many pictures were done

    def rows(self, number: int) -> Tensor:
        "Indices of the pictures of a shard."
        first, size = number * self.settings["shard_rows"], self.settings["shard_rows"]
        return torch.arange(first, min(first + size, len(self.data)))

    def file_of(self, index: int) -> str:
        "What to call a picture in a message."
        files = self.data.pixels
        return files.paths[index] if isinstance(files, ImageFiles) else f"picture {index} of {self.data.name}"

    def encoded(self, indices: Tensor, images: Tensor) -> Tensor:
        "Moments of some pictures `[n, views, 2, channels, height, width]` as they are stored."
        views = [images, images.flip(3)] if self.settings["flip"] else [images]
        moments = torch.stack([encode(self.vae, view) for view in views], 1).to(getattr(torch, self.settings["dtype"]))
        bad = ~moments.isfinite().flatten(1).all(1)
        if bad.any():
            file = self.file_of(int(indices[bad.nonzero()[0, 0]]))
            kind = self.settings["dtype"]
            raise ValueError(f"the latents of {file} are not finite in {kind}; allowed: a sound picture, or 'float32'")
        return moments


def find_shard(
    path: Path,  # A file that is there
    settings: dict[str, Any],  # What it should have been made with
) -> dict[str, Any] | None:  # Its entry in the index, or None if it is damaged
    "A shard to keep; one that was made with other settings is a `ValueError` that names the first."
    try:
        was = open_shard(path)[1]
        if found := first_difference(was, settings):
            key, old, new = found
            allowed = f"{old!r}, or another folder"
            raise ValueError(f"{path} was made with {key} = {old!r}, not {new!r}; allowed: {allowed}")
        return check_shard(path)
    except DamagedShard:
        return None


def encode_shard(
    job: Encoding,  # What to encode, and how
    number: int,  # Which shard
) -> dict[str, Any]:  # Its entry in the index
    "Make a shard, or keep the one that is there if it is whole and was made with the same settings."
    path, rows = job.out / shard_name(number), job.rows(number)
    if path.exists() and (kept := find_shard(path, job.settings)) is not None:
        job.progress(len(rows))
        return kept
    parts = []
    for indices, images in prefetch(lambda i: (i, job.data.images(i)), rows.split(job.batch_size)):
        parts.append(job.encoded(indices, images))
        job.progress(len(indices))
    return write_shard(path, torch.cat(parts), job.data.labels[rows], job.settings)


def encoding_settings(
    data: ImageData,  # Pictures
    vae: dict[str, Any],  # See describe_vae
    **choices: Any,  # `flip`, `dtype`, `crop`, `shard_rows`
) -> dict[str, Any]:  # JSON-able
    "What decides the numbers of all shards; refuses what cannot be encoded with a `ValueError`."
    if choices["dtype"] not in ("float32", "float16"):
        raise ValueError(f"dtype = {choices['dtype']!r}; allowed: 'float32', 'float16'")
    if not isinstance(choices["shard_rows"], int) or choices["shard_rows"] < 1:
        raise ValueError(f"shard_rows = {choices['shard_rows']!r}; allowed: a whole number, 1 or more")
    if data.shape[0] != vae["in_channels"]:
        found, wanted = data.shape[0], vae["in_channels"]
        raise ValueError(f"pictures have {found} channels; allowed: {wanted}, as the autoencoder takes")
    if any(side % vae["reduction"] for side in data.shape[1:]):
        side, n = "x".join(map(str, data.shape[1:])), vae["reduction"]
        raise ValueError(f"pictures are {side}; allowed: sides divisible by {n}, by which the autoencoder divides them")
    files = data.pixels.paths if isinstance(data.pixels, ImageFiles) else [data.name]
    names = "\n".join("/".join(Path(file).parts[-2:]) for file in files)  # class folder and file name
    names += f"\n{data.labels.tolist()}"
    facts: dict[str, Any] = {"pictures": len(data), "image": list(data.shape)}
    facts |= {"names": hashlib.sha256(names.encode()).hexdigest()}
    return {**facts, **choices, "vae": {key: value for key, value in vae.items() if key != "name"}}


def in_all_processes(
    action: Callable[[], Any],  # This process's part
    world: int,  # Number of processes
) -> list[Any]:  # The results of all
    "Let every process do its part and give all results to all; the first error is raised everywhere."
    if world == 1:
        return [action()]
    outcome: list[Any] = [None, None]
    try:
        outcome[0] = action()
    except Exception as error:
        outcome[1] = error
    outcomes: list[Any] = [None] * world
    torch.distributed.all_gather_object(outcomes, outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [result for result, _ in outcomes]


def encode_folder(
    source: str | Path | ImageData,  # See load_pictures
    out: str | Path,  # Folder for the shards and their index; finished shards in it are kept
    vae: Any,  # An `AutoencoderKL`, or its folder or name
    size: int | None = None,  # Side of the square to crop and resize to; None wants images of one size
    flip: bool = True,  # Whether to encode the mirror image of each picture, too
    shard_rows: int = 4096,  # Pictures of a shard
    batch_size: int = 32,  # Pictures at a time
    dtype: str = "float32",  # How numbers are stored: "float32" or "float16"
    crop: str = "adm",  # A key of `CROPS`
    split: str = "train",  # "train" or "test"
    progress: bool = True,  # Whether to show a progress bar
) -> dict[str, Any]:  # The index
    "Encode pictures into shards of latents, on all processes if there are several; goes on where it was interrupted."
    if not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size = {batch_size!r}; allowed: a whole number, 1 or more")
    named, vae, out = str(vae) if isinstance(vae, str | Path) else "", load_vae(vae), Path(out)
    facts = describe_vae(vae, named)
    data = load_pictures(source, size, facts["in_channels"], crop, split)
    settings = encoding_settings(data, facts, flip=flip, dtype=dtype, crop=crop, shard_rows=shard_rows)
    name = data.name if isinstance(source, ImageData) else str(source)
    index = {"format": FORMAT, "name": name, "classes": list(data.classes), "settings": settings, "vae": facts}
    return encode_shards(Encoding(data, vae, settings, out, batch_size), index, progress)


def encode_shards(
    job: Encoding,  # What to encode, and how
    index: dict[str, Any],  # The index without its shards
    progress: bool,  # Whether to show a progress bar
) -> dict[str, Any]:  # The index
    "Make all shards, each process its own, and write the index."
    rank, world = find_processes(next(job.vae.parameters()).device)
    pictures, rows = len(job.data), job.settings["shard_rows"]
    numbers = range(rank, -(-pictures // rows), world)
    job.out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=-(-pictures // world), disable=not progress or rank > 0, unit=" pictures") as bar:
        job.progress = bar.update
        found = in_all_processes(lambda: {k: encode_shard(job, k) for k in numbers}, world)
    entries = {k: entry for part in found for k, entry in part.items()}
    index = index | {"shards": [entries[k] for k in sorted(entries)]}
    in_all_processes(partial(write_index, job.out, index) if rank == 0 else lambda: None, world)
    return index


def write_index(
    out: Path,  # Folder of the shards
    index: dict[str, Any],  # What it holds
) -> None:
    "Write the index completely or not at all, and remove what killed runs left behind."
    with write_aside(out / INDEX) as aside:
        aside.write_text(json.dumps(index, indent=1), encoding="utf-8")
        force_to_disk(aside)
    for path in out.glob(".*.tmp"):
        if re.fullmatch(r"\.(shard-\d{5}\.safetensors|latents\.json)\.\d+\.tmp", path.name):
            path.unlink(missing_ok=True)


@dataclass
class LatentStore:
    "Moments of pictures on disk, by index."

    folder: Path  # Where the shards are
    index: dict[str, Any]  # What they hold
    shards: list[Tensor]  # Moments of each shard, mapped from its file
    labels: Tensor  # Class indices `[n]`
    flip: bool = False  # Whether `fetch` takes the mirrored view of a random half
    posterior: bool = True  # Whether `fetch` draws from the encoder's posterior; else its mean
    chosen: Tensor | None = None  # Which of the stored latents these are; None for all

    @property
    def classes(self) -> tuple[str, ...]:
        "Names of the classes."
        return tuple(self.index["classes"])

    @property
    def num_classes(self) -> int:
        "Number of classes."
        return len(self.classes)

    @property
    def shape(self) -> tuple[int, ...]:
        "Channels, height, width of a latent."
        return tuple(self.shards[0].shape[3:])

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, indices: Tensor, views: Tensor) -> Tensor:
        "Means and deviations `[b, 2, channels, height, width]` of some views, read shard by shard."
        where = indices if self.chosen is None else self.chosen[indices]
        rows, out = self.index["settings"]["shard_rows"], torch.empty(len(indices), *self.shards[0].shape[2:])
        for number in (where // rows).unique().tolist():
            here = (where // rows) == number
            out[here] = self.shards[number][where[here] % rows, views[here]].float()
        return out


class LatentData(LatentStore):
    "Labelled latents as `fit` reads them: whole batches by index, views and posterior draws keyed, eq. (3)."

    def fetch(self, indices: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        "Rows `rows` of the batch `indices`, as latents with labels; all draws are for the whole batch, eq. (3)."
        n, vae, mine = len(indices), self.index["vae"], indices[rows]
        views = (torch.rand(n, generator=generator) < 0.5 if self.flip else torch.zeros(n)).long()[rows]
        noise = torch.randn(n, *self.shape, generator=generator)[rows] if self.posterior else None
        return draw_latents(self.moments(mine, views), noise, vae["factor"], vae["shift"]), self.labels[mine]


def read_index(
    folder: str | Path,  # Folder that encode_folder wrote
) -> dict[str, Any]:  # The index
    "The index of a folder of latents; a folder without one is a `ValueError`."
    path = Path(folder) / INDEX
    if not path.is_file():
        found = "an unfinished encoding: start it again" if any(Path(folder).glob("shard-*")) else "no latents"
        raise ValueError(f"{folder} holds {found}; allowed: a folder that `guidance-nb encode` has finished")
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise ValueError(f"format {index['format']!r}")
        if not index["classes"] or sum(entry["rows"] for entry in index["shards"]) != index["settings"]["pictures"]:
            raise ValueError("its counts do not add up")
        return index
    except (ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:120]
        advice = "start the encoding again, which keeps the shards"
        raise ValueError(f"{path} is damaged ({reason}); allowed: {advice}") from None


def load_latents(
    folder: str | Path,  # Folder that encode_folder wrote
    flip: bool = False,  # Whether to take the mirrored view of a random half
    posterior: bool = True,  # Whether to draw from the encoder's posterior; else its mean
    verify: bool = False,  # Whether to read everything once and compare it with the checksums
    limit: int = 0,  # Use so many, chosen at random but always the same; 0 uses all
) -> LatentData:
    "Latents of a folder; missing, truncated, foreign and, with `verify`, altered shards are named."
    folder, index = Path(folder), read_index(folder)
    if flip and not index["settings"]["flip"]:
        raise ValueError(f"flip = True, but {folder} has no mirrored views; allowed: False, or encode again with flips")
    shards, labels = [], []
    for entry in index["shards"]:
        path = folder / entry["file"]
        if verify:
            check_shard(path)
        tensors, settings, promised = open_shard(path)
        if promised != entry["sha256"] or first_difference(settings, index["settings"]):
            raise ValueError(f"{path} belongs to another encoding than {folder / INDEX}; allowed: shards of one run")
        shards.append(tensors["moments"])
        labels.append(tensors["labels"].clone())
    data = LatentData(folder, index, shards, torch.cat(labels), flip, posterior)
    if not limit:
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit]
    chosen = order.sort().values
    return replace(data, labels=data.labels[chosen], chosen=chosen)


def decode_all(
    vae: Any,  # An autoencoder
    latents: Tensor,  # All samples `[n, channels, height, width]`, the same in every process
    batch_size: int = 32,  # Latents at a time
    progress: bool = True,  # Whether to show a progress bar
) -> Tensor:  # Pictures `[n, channels, ...]`, uint8; none but in the main process
    "`decode`, divided among the processes of `accelerate launch`."
    rank, world = find_processes(latents.device)
    mine, longest = latents.tensor_split(world)[rank], -(-len(latents) // world)
    kept: list[list[Tensor]] = [[] for _ in range(world)]
    with tqdm(total=longest, disable=not progress or rank > 0, unit=" pictures") as bar:
        for first in range(0, longest, batch_size):
            part = mine[first : first + batch_size]
            for pile, pictures in zip(kept, in_all_processes(partial(decode, vae, part), world)):
                if rank == 0 and len(pictures):
                    pile.append(pictures)
            bar.update(len(part))
    return torch.cat([part for pile in kept for part in pile]) if rank == 0 else torch.empty(0, dtype=torch.uint8)
