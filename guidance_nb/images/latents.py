"""ImageNet-sized training: images encoded once into sharded latents, read back keyed, and decoded after sampling."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guidance_nb._checks import Count, checked, explained, require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import (
    clean_remnants,
    differences,
    digest,
    parse_json,
    read_text,
    weights_digest,
    write_aside,
    write_file,
)
from guidance_nb._processes import find_processes, in_all_processes, on_main, prefetch
from guidance_nb.images.data import Crop, Facts, ImageData, ImageFiles, Size, from_uint8, load_images, to_uint8

__all__ = ["decode", "encode_folder", "load_latents"]

VAE = Any  # an AutoencoderKL of diffusers, which types none of its methods
_Constant = float | list[float]  # one number, or one for each channel


def latent_constants(config: Any) -> tuple[_Constant, _Constant]:
    "f and b of z = f (m - b), between an autoencoder's output m and the latents z that networks see."
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:  # per channel, and then nothing else shifts
        return [float(config.scaling_factor) / s for s in std], [float(m) for m in mean]
    return float(config.scaling_factor), float(config.get("shift_factor") or 0.0)


def _by_channel(constant: _Constant, like: Tensor) -> Tensor:
    value = torch.as_tensor(constant, dtype=torch.float64)
    return (value[:, None, None] if value.ndim else value).to(like)


def draw_latents(
    moments: Tensor,  # Means and standard deviations, `[n, 2, channels, height, width]`
    noise: Tensor | None,  # Standard normal, `[n, channels, height, width]`; None takes the means
    factor: _Constant,  # f of latent_constants
    shift: _Constant = 0.0,  # b of latent_constants
) -> Tensor:  # Latents `[n, channels, height, width]`
    "Latents as networks see them, f (mean + std noise - b) (arXiv 2112.10752)."
    mean, std = moments.float().unbind(1)
    drawn = mean if noise is None else mean + std * noise
    return _by_channel(factor, drawn) * (drawn - _by_channel(shift, drawn))


def undo_scaling(config: Any, latents: Tensor) -> Tensor:
    "What the decoder takes, z / f + b: the one convention for every autoencoder."
    factor, shift = (_by_channel(constant, latents) for constant in latent_constants(config))
    return latents / factor + shift


def load_vae(source: VAE | str | Path, device: str | torch.device | None = None) -> VAE:
    "An `AutoencoderKL`, given, or by the folder or name of one or of a pipeline, without gradients."
    if not isinstance(source, str | Path):
        with extra("diffusers"):
            from diffusers import AutoencoderKL

        fine = isinstance(source, AutoencoderKL)
        require(fine, "vae", f"a {type(source).__name__}", "a diffusers AutoencoderKL, or its folder or name")
        return source.eval().requires_grad_(False)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    find_processes(where)  # where there are several, this points each at its own card
    return _read_vae(str(source)).to(where)


@lru_cache(1)
def _read_vae(source: str) -> VAE:
    with extra("diffusers"):
        from diffusers import AutoencoderKL

    inside = {"subfolder": "vae"} if (Path(source) / "vae" / "config.json").is_file() else {}
    kinds = OSError, ValueError, KeyError, RuntimeError
    with explained(f"vae = {source!r} cannot be loaded", "a folder or name of one", *kinds):
        return AutoencoderKL.from_pretrained(source, **inside).eval().requires_grad_(False)


def describe_vae(vae: VAE, name: str = "") -> Facts:
    "What latents must keep of their autoencoder: factor, shift, sizes, and a digest of its weights."
    factor, shift = latent_constants(vae.config)
    return {
        "name": name,
        "factor": factor,
        "shift": shift,
        "in_channels": int(vae.config.in_channels),
        "latent_channels": int(vae.config.latent_channels),
        "reduction": 2 ** (len(vae.config.block_out_channels) - 1),
        "sha256": weights_digest(vae.state_dict()),
    }


@torch.no_grad()
def encode(vae: VAE, images: Tensor) -> Tensor:
    "The posterior of uint8 images: means and deviations `[n, 2, latent channels, ...]`, float32, on the CPU."
    found = vae.encode(from_uint8(images).to(next(vae.parameters()))).latent_dist
    return torch.stack([found.mean, found.std], 1).float().cpu()


@torch.no_grad()
def decode(
    vae: VAE,  # An autoencoder
    latents: Tensor,  # Latents as networks see them `[n, channels, height, width]`
    batch_size: int = 32,  # Latents at a time
) -> Tensor:  # Images `[n, channels, ...]`, uint8, on the CPU
    "Images of latents."
    config, weight = vae.config, next(vae.parameters())
    fine = latents.ndim == 4 and latents.shape[1] == config.latent_channels
    allowed = f"[n, {config.latent_channels}, height, width], as this autoencoder makes"
    require(fine, "shape of latents", tuple(latents.shape), allowed)
    parts = latents.split(batch_size) if len(latents) else []
    images = [to_uint8(vae.decode(undo_scaling(config, part).to(weight)).sample.cpu()) for part in parts]
    return torch.cat(images) if images else torch.empty(0, config.out_channels, 0, 0, dtype=torch.uint8)


def decode_all(
    vae: VAE,  # An autoencoder
    latents: Tensor,  # All samples `[n, channels, height, width]`, the same in every process
    batch_size: int = 32,  # Latents at a time
    progress: bool = True,  # Whether to show a progress bar
) -> Tensor:  # Images `[n, channels, ...]`, uint8; none but in the main process
    "`decode`, divided among the processes of `accelerate launch`."
    rank, world = find_processes(latents.device)
    mine, longest = latents.tensor_split(world)[rank], -(-len(latents) // world)
    kept: list[list[Tensor]] = [[] for _ in range(world)]
    with tqdm(total=longest, disable=not progress or rank > 0, unit=" images") as bar:
        for first in range(0, longest, batch_size):
            part = mine[first : first + batch_size]
            for pile, images in zip(kept, in_all_processes(partial(decode, vae, part), world)):
                if rank == 0 and len(images):
                    pile.append(images)
            bar.update(len(part))
    return torch.cat([part for pile in kept for part in pile]) if rank == 0 else torch.empty(0, dtype=torch.uint8)


INDEX = "latents.json"
_FORMAT = "guidance_nb latents 1"


def shard_name(number: int) -> str:
    "The file name of shard `number`."
    return f"shard-{number:05d}.safetensors"


def write_shard(path: Path, moments: Tensor, labels: Tensor, settings: Facts) -> Facts:
    "Write moments `[n, views, 2, channels, height, width]` and labels `[n]` whole or not at all; its index entry."
    from safetensors.torch import save_file

    promised = digest(moments, labels)
    facts = {"format": _FORMAT, "settings": settings, "sha256": promised}
    tensors = {"moments": moments.contiguous(), "labels": labels.contiguous()}
    with write_aside(path) as aside:
        save_file(tensors, aside, {"guidance_nb": json.dumps(facts)})  # one key, for several have no order
    return {"file": path.name, "rows": len(labels), "sha256": promised, "bytes": path.stat().st_size}


class _DamagedShard(ValueError):
    "A shard that is missing or not whole; an encoding makes it anew."


def open_shard(path: Path) -> tuple[dict[str, Tensor], Facts, str]:
    "Map a shard without reading it: tensors, settings, stated SHA-256; no whole shard of ours is a `ValueError`."
    from safetensors import SafetensorError, safe_open

    advice = "start the encoding again, which makes the shards that are missing or damaged and keeps the others"
    if not path.is_file():
        raise _DamagedShard(f"{path} is missing; allowed: {advice}")
    try:
        with safe_open(path, "pt") as file:
            facts = parse_json((file.metadata() or {}).get("guidance_nb", "{}"))
            if not isinstance(facts, dict) or facts.get("format") != _FORMAT:
                raise ValueError(f"{path} holds no latents of this package; allowed: shards of `guidance-nb encode`")
            tensors = {key: file.get_tensor(key) for key in ("moments", "labels")}
            if len(tensors["moments"]) != len(tensors["labels"]):
                raise KeyError("as many labels as moments")
            return tensors, facts["settings"], str(facts["sha256"])
    except (SafetensorError, OSError, KeyError, TypeError, json.JSONDecodeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise _DamagedShard(f"{path} is damaged ({reason}); allowed: {advice}") from None


def check_shard(path: Path) -> Facts:
    "The index entry of a shard, read whole and compared with its own SHA-256; damage names the file."
    tensors, _, promised = open_shard(path)
    if (found := digest(tensors["moments"], tensors["labels"])) != promised:
        allowed = "delete it and start the encoding again, which makes it anew and keeps the others"
        wrong = f"SHA-256 {found[:9]}... instead of {promised[:9]}..."
        raise _DamagedShard(f"{path} is damaged: {wrong}; allowed: {allowed}")
    return {"file": path.name, "rows": len(tensors["labels"]), "sha256": found, "bytes": path.stat().st_size}


def find_shard(path: Path, settings: Facts) -> Facts | None:
    "The index entry of a shard to keep, or None; other settings are a `ValueError` that names the first."
    try:
        if found := next(differences(open_shard(path)[1], settings), None):
            key, old, new = found
            raise ValueError(f"{path} was made with {key} = {old!r}, not {new!r}; allowed: {old!r}, or another folder")
        return check_shard(path)
    except _DamagedShard:
        return None


@dataclass
class _Encoding:
    "Images on their way to latents; a shard is a function of the settings and of its images, and of nothing else."

    data: ImageData
    vae: VAE  # The autoencoder
    settings: Facts  # What decides the numbers
    out: Path  # Folder of the shards
    batch_size: int  # Images at a time
    progress: Callable[[int], object] = lambda n: None  # Told how many images were done

    def moments(self, indices: Tensor, images: Tensor) -> Tensor:
        "Moments of some images `[n, views, 2, channels, height, width]` as they are stored."
        views = [images, images.flip(3)] if self.settings["flip"] else [images]
        kind = self.settings["dtype"]
        moments = torch.stack([encode(self.vae, view) for view in views], 1).to(getattr(torch, kind))
        bad = (~moments.isfinite().flatten(1).all(1)).nonzero()[:, 0]
        if len(bad):
            files, first = self.data.pixels, int(indices[bad[0]])
            file = files.paths[first] if isinstance(files, ImageFiles) else f"image {first} of {self.data.name}"
            require_that(False, f"the latents of {file} are not finite in {kind}", "a sound image, or 'float32'")
        return moments

    def make(self, number: int) -> Facts:
        "Make a shard, or keep the one that is there if it is whole and has the same settings; its entry in the index."
        size = self.settings["shard_rows"]
        path, rows = self.out / shard_name(number), torch.arange(len(self.data))[number * size :][:size]
        if path.exists() and (kept := find_shard(path, self.settings)) is not None:
            self.progress(len(rows))
            return kept
        parts = []
        for indices, images in prefetch(lambda i: (i, self.data.images(i)), rows.split(self.batch_size)):
            parts.append(self.moments(indices, images))
            self.progress(len(indices))
        return write_shard(path, torch.cat(parts), self.data.labels[rows], self.settings)

    def run(self, index: Facts, progress: bool) -> Facts:
        "Make all shards, each process its own, and write the index, which is returned."
        rank, world = find_processes(next(self.vae.parameters()).device)
        numbers = range(rank, -(-len(self.data) // self.settings["shard_rows"]), world)
        self.out.mkdir(parents=True, exist_ok=True)
        with tqdm(total=-(-len(self.data) // world), disable=not progress or rank > 0, unit=" images") as bar:
            self.progress = bar.update
            found = in_all_processes(lambda: {k: self.make(k) for k in numbers}, world)
        entries = {k: entry for part in found for k, entry in part.items()}
        index = index | {"shards": [entries[k] for k in sorted(entries)]}
        on_main(lambda: _write_index(self.out, index), rank, world)
        return index


@checked
def encode_folder(
    source: str | Path | ImageData,  # A folder with one sub-folder per class, "mnist", "cifar10", or images
    out: str | Path,  # Folder for the shards and their index; finished shards in it are kept
    vae: VAE,  # An `AutoencoderKL`, or its folder or name
    size: Size | None = None,  # Side, or height and width, to crop and resize to; None wants images of one size
    flip: bool = True,  # Whether to encode the mirror image of each image, too
    shard_rows: Count = 4096,  # Images of a shard
    batch_size: Count = 32,  # Images at a time
    dtype: Literal["float32", "float16"] = "float32",  # How numbers are stored
    crop: Crop = "adm",  # How to crop and resize, as ADM or as torchvision does
    split: str = "train",  # "train" or "test"
    progress: bool = True,  # Whether to show a progress bar
) -> Facts:  # The index
    "Encode images into shards of latents, on all processes if there are several; goes on where it was interrupted."
    named, vae = str(vae) if isinstance(vae, str | Path) else "", load_vae(vae)
    facts, data = describe_vae(vae, named), source
    if not isinstance(data, ImageData):
        channels = facts["in_channels"]
        data = load_images(data, split, size=size, channels=channels, crop=crop)
    require(data.shape[0] == facts["in_channels"], "channels", data.shape[0], f"{facts['in_channels']}, as vae takes")
    n, sides = facts["reduction"], "x".join(map(str, data.shape[1:]))
    fine = not any(side % n for side in data.shape[1:])
    require(fine, "sides", sides, f"multiples of {n}, by which vae divides them")
    files = data.pixels.paths if isinstance(data.pixels, ImageFiles) else [data.name]
    names = "\n".join("/".join(Path(file).parts[-2:]) for file in files)  # class folder and file name
    settings = {
        "pictures": len(data),
        "image": list(data.shape),
        "names": digest(f"{names}\n{data.labels.tolist()}"),
        **{"flip": flip, "dtype": dtype, "crop": crop, "shard_rows": shard_rows},
        "vae": {key: value for key, value in facts.items() if key != "name"},
    }
    name = data.name if isinstance(source, ImageData) else str(source)
    index = {"format": _FORMAT, "name": name, "classes": list(data.classes), "settings": settings, "vae": facts}
    return _Encoding(data, vae, settings, Path(out), batch_size).run(index, progress)


def _write_index(out: Path, index: Facts) -> None:
    "Write the index completely or not at all, and remove what killed runs left behind."
    write_file(out / INDEX, json.dumps(index, indent=1))
    for pattern in ("shard-*", INDEX):
        clean_remnants(out, pattern)


@dataclass
class LatentData:
    "Labelled latents as `fit` reads them: whole batches by index, views and posterior draws keyed."

    folder: Path  # Where the shards are
    index: Facts  # What they hold
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

    def digest(self) -> str:
        "What identifies the data at a resume: the numbers of its shards, and which of them it takes."
        shards = [shard["sha256"] for shard in self.index["shards"]]
        return digest(json.dumps(shards), self.labels, *([] if self.chosen is None else [self.chosen]))[:16]

    def moments(self, indices: Tensor, views: Tensor) -> Tensor:
        "Means and deviations `[b, 2, channels, height, width]` of some views, read shard by shard."
        where = indices if self.chosen is None else self.chosen[indices]
        rows, out = self.index["settings"]["shard_rows"], torch.empty(len(indices), *self.shards[0].shape[2:])
        for number in (where // rows).unique().tolist():
            here = (where // rows) == number
            out[here] = self.shards[number][where[here] % rows, views[here]].float()
        return out

    def fetch(self, indices: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        "Rows `rows` of the batch `indices`, as latents with labels; all draws are for the whole batch."
        n, vae, mine = len(indices), self.index["vae"], indices[rows]
        views = (torch.rand(n, generator=generator) < 0.5 if self.flip else torch.zeros(n)).long()[rows]
        noise = torch.randn(n, *self.shape, generator=generator)[rows] if self.posterior else None
        return draw_latents(self.moments(mine, views), noise, vae["factor"], vae["shift"]), self.labels[mine]


def read_index(folder: str | Path) -> Facts:
    "The index of a folder of latents; a folder without one is a `ValueError`."
    path = Path(folder) / INDEX
    found = "an unfinished encoding: start it again" if any(Path(folder).glob("shard-*")) else "no latents"
    require_that(path.is_file(), f"{folder} holds {found}", "a folder that `guidance-nb encode` has finished")
    advice = "start the encoding again, which keeps the shards"
    with explained(f"{path} is damaged", advice, ValueError, KeyError, TypeError):
        index = parse_json(read_text(path))
        require(index["format"] == _FORMAT, "format", index["format"], _FORMAT)
        counts = sum(entry["rows"] for entry in index["shards"]), index["settings"]["pictures"]
        require(index["classes"] and counts[0] == counts[1], "counts", counts, "numbers that agree, and classes")
        return index


def load_latents(
    folder: str | Path,  # Folder that encode_folder wrote
    flip: bool = False,  # Whether to take the mirrored view of a random half
    posterior: bool = True,  # Whether to draw from the encoder's posterior; else its mean
    verify: bool = False,  # Whether to read everything once and compare it with the checksums
    limit: int = 0,  # Use so many, chosen at random but always the same; 0 uses all
) -> LatentData:
    "Latents of a folder; missing, truncated, foreign and, with `verify`, altered shards are named."
    folder, index = Path(folder), read_index(folder)
    stored = index["settings"]["flip"] or not flip
    require(stored, "flip", flip, f"False, since {folder} has no mirrored views, or encode again with flips")
    shards, labels = [], []
    for entry in index["shards"]:
        path = folder / entry["file"]
        if verify:
            check_shard(path)
        tensors, settings, promised = open_shard(path)
        same = promised == entry["sha256"] and not [*differences(settings, index["settings"])]
        require_that(same, f"{path} belongs to another encoding than {folder / INDEX}", "shards of one run")
        shards.append(tensors["moments"])
        labels.append(tensors["labels"].clone())
    data = LatentData(folder, index, shards, torch.cat(labels), flip, posterior)
    if not limit:
        return data
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:limit]
    chosen = order.sort().values
    return replace(data, labels=data.labels[chosen], chosen=chosen)
