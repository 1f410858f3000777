"""ImageNet-sized training: images encoded once into sharded latents, read back keyed, and decoded after sampling."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guidance_nb import _files as files
from guidance_nb._checks import Count, checked, require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import Json
from guidance_nb._processes import find_processes, in_all_processes, on_main, prefetch
from guidance_nb.images._data import Crop, ImageData, ImageFiles, Size, from_uint8, load_images, to_uint8
from guidance_nb.images._features import _best_device

if TYPE_CHECKING:
    from diffusers import AutoencoderKL

_Constant = float | list[float]  # one number, or one for each channel


def latent_constants(config: Mapping[str, Any]) -> tuple[_Constant, _Constant]:
    "f and b of z = f (m - b), between an autoencoder's output m and the latents z that networks see."
    factor, mean, std = float(config["scaling_factor"]), config.get("latents_mean"), config.get("latents_std")
    if mean is not None and std is not None:  # per channel, and then nothing else shifts
        return [factor / s for s in std], [float(m) for m in mean]
    return factor, float(config.get("shift_factor") or 0.0)


def _by_channel(constant: _Constant, like: Tensor) -> Tensor:
    value = torch.as_tensor(constant, dtype=torch.float64)
    return (value[:, None, None] if value.ndim else value).to(like)


def draw_latents(moments: Tensor, noise: Tensor | None, factor: _Constant, shift: _Constant = 0.0) -> Tensor:
    """Latents as networks see them, f (mean + std noise - b) `[n, channels, height, width]` (arXiv 2112.10752).

    Moments are means and standard deviations `[n, 2, channels, height, width]`, `noise` is standard normal or None for
    the means, f and b are those of `latent_constants`.
    """
    mean, std = moments.float().unbind(1)
    drawn = mean if noise is None else mean + std * noise
    return _by_channel(factor, drawn) * (drawn - _by_channel(shift, drawn))


@torch.no_grad()
def decode_floats(vae: "AutoencoderKL", latents: Tensor) -> Tensor:
    "What the decoder makes of z / f + b, the one convention for every autoencoder: images around [-1, 1]."
    factor, shift = (_by_channel(constant, latents) for constant in latent_constants(vae.config))
    return vae.decode((latents / factor + shift).to(next(vae.parameters())), return_dict=False)[0]


def load_vae(source: "AutoencoderKL | str | Path") -> "AutoencoderKL":
    "An `AutoencoderKL`, given, or by the folder or name of one or of a pipeline, without gradients."
    if isinstance(source, str | Path):
        find_processes(torch.device(_best_device()))  # where there are several, this points each at its own card
        return _read_vae(str(source)).to(_best_device())
    return source.eval().requires_grad_(False)


@lru_cache(1)
def _read_vae(source: str) -> "AutoencoderKL":
    with extra("diffusers"):
        from diffusers import AutoencoderKL

    inside = {"subfolder": "vae"} if (Path(source) / "vae" / "config.json").is_file() else {}
    return AutoencoderKL.from_pretrained(source, **inside).eval().requires_grad_(False)


def describe_vae(vae: "AutoencoderKL") -> Json:
    "What latents must keep of their autoencoder: factor, shift, sizes, and a digest of its weights."
    facts: Json = dict(zip(("factor", "shift"), latent_constants(vae.config)))
    facts |= {key: int(vae.config[key]) for key in ("in_channels", "latent_channels")}
    facts["reduction"] = 2 ** (len(vae.config["block_out_channels"]) - 1)  # of the sides of images
    return facts | {"sha256": files.weights_digest(vae.state_dict())}


@torch.no_grad()
def encode(vae: "AutoencoderKL", images: Tensor) -> Tensor:
    "The posterior of uint8 images: means and deviations `[n, 2, latent channels, ...]`, float32, on the CPU."
    found = vae.encode(from_uint8(images).to(next(vae.parameters()))).latent_dist
    return torch.stack([found.mean, found.std], 1).float().cpu()


def decode(
    vae: "AutoencoderKL",  # An autoencoder
    latents: Tensor,  # Latents as networks see them `[n, channels, height, width]`
    batch_size: int = 32,  # Latents at a time
) -> Tensor:  # Images `[n, channels, ...]`, uint8, on the CPU
    "Images of latents."
    if not len(latents):
        return torch.empty(0, vae.config["out_channels"], 0, 0, dtype=torch.uint8)
    return torch.cat([to_uint8(decode_floats(vae, part).cpu()) for part in latents.split(batch_size)])


def decode_all(vae: "AutoencoderKL", latents: Tensor, batch_size: int = 32, progress: bool = True) -> Tensor:
    """`decode`, divided among the processes of `accelerate launch`.

    All processes give the same latents, and the main one alone gets images.
    """
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


def shard_name(number: int, stem: str = "shard") -> str:
    "The file name of shard `number`."
    return f"{stem}-{number:05d}.safetensors"


def write_shard(path: Path, moments: Tensor, labels: Tensor, settings: Mapping[str, object]) -> dict[str, object]:
    "Write moments `[n, views, 2, channels, height, width]` and labels `[n]` whole or not at all; its index entry."
    from safetensors.torch import save_file

    promised = files.digest(moments, labels)
    facts = {"format": _FORMAT, "settings": settings, "sha256": promised}
    tensors = {"moments": moments.contiguous(), "labels": labels.contiguous()}
    with files.write_aside(path) as aside:
        save_file(tensors, aside, {"guidance_nb": json.dumps(facts)})  # one key, for several have no order
    return _entry(path, labels, promised)


def _entry(path: Path, labels: Tensor, promised: str) -> dict[str, object]:
    "What the index says of a shard."
    return {"file": path.name, "rows": len(labels), "sha256": promised, "bytes": path.stat().st_size}


class _Damaged(ValueError):
    "A shard that is missing or not whole; an encoding makes it anew."

    def __init__(self, path: Path, what: str):
        advice = "start the encoding again, which makes it anew and keeps the others"
        super().__init__(f"{path} is {what}; allowed: {advice}")


def open_shard(path: Path, verify: bool = False) -> tuple[dict[str, Tensor], object, str]:
    """Map a shard without reading it: tensors, settings, stated SHA-256; no whole shard of ours is a `ValueError`.

    To `verify` it, read it whole and compare it with that SHA-256.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            facts = files.parse_json((file.metadata() or {}).get("guidance_nb", "{}"))
            ours = isinstance(facts, dict) and facts.get("format") == _FORMAT
            require_that(ours, f"{path} holds no latents of this package", "shards of `guidance-nb encode`")
            tensors = {key: file.get_tensor(key) for key in ("moments", "labels")}
            settings, promised = facts["settings"], str(facts["sha256"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise _Damaged(path, f"missing or damaged ({' '.join(str(error).split())[:120]})") from None
    if verify and (found := files.digest(tensors["moments"], tensors["labels"])) != promised:
        raise _Damaged(path, f"damaged: SHA-256 {found[:9]}... instead of {promised[:9]}...")
    return tensors, settings, promised


def _find_shard(path: Path, settings: Mapping[str, object]) -> dict[str, object] | None:
    "The index entry of a shard to keep, or None; other settings are a `ValueError` that names the first."
    try:
        tensors, kept, promised = open_shard(path, verify=True)
    except _Damaged:
        return None
    for key, old, new in files.differences(kept, settings):
        require_that(False, f"{path} was made with {key} = {old!r}, not {new!r}", f"{old!r}, or another folder")
    return _entry(path, tensors["labels"], promised)


def make_shards(
    path: Path, stem: str, index: Json, labels: Tensor, device: torch.device,
    make: Callable[[Tensor], Iterable[Tensor]], progress: bool = False,
) -> Json:  # fmt: skip
    """Make shards of all rows, each process its own, and write the index to a path beside them; returns it.

    A shard is a function of the settings and of its rows, which `make` gives in batches; a whole one of the same
    settings is kept.
    """
    settings, (rank, world) = index["settings"], find_processes(device)
    size, n = settings["shard_rows"], len(labels)

    def one(first: int) -> dict[str, object]:
        file, rows = path.parent / shard_name(first // size, stem), torch.arange(first, min(first + size, n))
        if kept := _find_shard(file, settings):
            bar.update(len(rows))
            return kept
        parts = []
        for part in make(rows):
            parts.append(part)
            bar.update(len(part))
        return write_shard(file, torch.cat(parts), labels[rows], settings)

    path.parent.mkdir(parents=True, exist_ok=True)
    with tqdm(total=-(-n // world), disable=not progress or rank > 0, unit=" images") as bar:
        made = in_all_processes(lambda: {k: one(k) for k in range(rank * size, n, size * world)}, world)
    entries = {first: entry for part in made for first, entry in part.items()}
    index = index | {"shards": [entries[first] for first in sorted(entries)]}
    on_main(lambda: files.write_file(path, json.dumps(index, indent=1)), rank, world)
    for pattern in (f"{stem}-*", path.name) if rank == 0 else ():  # what killed runs left behind
        files.clean_remnants(path.parent, pattern)
    return index


def _posteriors(
    data: ImageData, vae: "AutoencoderKL", settings: Json, batch_size: int, rows: Tensor
) -> Iterator[Tensor]:
    "Moments of some images in batches, `[n, views, 2, channels, height, width]` as they are stored."
    kind = settings["dtype"]
    for indices, images in prefetch(lambda i: (i, data.images(i)), rows.split(batch_size)):
        views = [images, images.flip(3)] if settings["flip"] else [images]
        moments = torch.stack([encode(vae, view) for view in views], 1).to(getattr(torch, kind))
        bad = (~moments.isfinite().flatten(1).all(1)).nonzero()[:, 0]
        if len(bad):
            pixels, first = data.pixels, int(indices[bad[0]])
            file = pixels.paths[first] if isinstance(pixels, ImageFiles) else f"image {first} of {data.name}"
            require_that(False, f"the latents of {file} are not finite in {kind}", "a sound image, or 'float32'")
        yield moments


@checked
def encode_folder(
    source: str | Path | ImageData,  # A folder with one sub-folder per class, "mnist", "cifar10", or images
    out: str | Path,  # Folder for the shards and their index; finished shards in it are kept
    vae: "AutoencoderKL | str | Path",  # An `AutoencoderKL`, or its folder or name
    size: Size | None = None,  # Side, or height and width, to crop and resize to; None wants images of one size
    flip: bool = True,  # Whether to encode the mirror image of each image, too
    shard_rows: Count = 4096,  # Images of a shard
    batch_size: Count = 32,  # Images at a time
    dtype: Literal["float32", "float16"] = "float32",  # How numbers are stored
    crop: Crop = "adm",  # How to crop and resize, as ADM or as torchvision does
    split: str = "train",  # "train" or "test"
    progress: bool = True,  # Whether to show a progress bar
) -> Json:  # The index
    "Encode images into shards of latents, on all processes if there are several; goes on where it was interrupted."
    named, vae = str(vae) if isinstance(vae, str | Path) else "", load_vae(vae)
    facts, data = describe_vae(vae), source
    channels, n = facts["in_channels"], facts["reduction"]
    if not isinstance(data, ImageData):
        data = load_images(data, split, size=size, channels=channels, crop=crop)
    fine = data.shape[0] == channels and not any(side % n for side in data.shape[1:])
    require(fine, "shape of the images", data.shape, f"{channels} channels, and sides that vae can divide by {n}")
    paths = data.pixels.paths if isinstance(data.pixels, ImageFiles) else [data.name]
    told = "\n".join("/".join(Path(file).parts[-2:]) for file in paths)  # class folder and file name
    names = files.digest(f"{told}\n{data.labels.tolist()}")
    settings = {"pictures": len(data), "image": list(data.shape), "names": names, "flip": flip, "dtype": dtype}
    settings |= {"crop": crop, "shard_rows": shard_rows, "vae": facts}
    name = data.name if isinstance(source, ImageData) else str(source)
    index = {"format": _FORMAT, "name": name, "classes": list(data.classes), "settings": settings}
    index |= {"vae": {"name": named} | facts}
    make, device = partial(_posteriors, data, vae, settings, batch_size), next(vae.parameters()).device
    return make_shards(Path(out) / INDEX, "shard", index, data.labels, device, make, progress)


@dataclass
class LatentData:
    "Labelled latents as `fit` reads them: whole batches by index, views and posterior draws keyed."

    index: Json  # What they hold
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
        return files.digest(json.dumps(shards), self.labels, *([] if self.chosen is None else [self.chosen]))[:16]

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


def read_index(folder: str | Path) -> Json:
    "The index of a folder of latents; a folder without one is a `ValueError`."
    advice = "the index of a finished encoding; start it again, which keeps the shards"
    with files.opened(Path(folder) / INDEX, advice) as file:
        index = files.parse_json(file.read().decode("utf-8-sig"))
        stated = index["format"], sum(entry["rows"] for entry in index["shards"])
        wanted = _FORMAT, index["settings"]["pictures"]
        require(stated == wanted and index["classes"], "format and images", stated, f"{wanted}, and classes")
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
        tensors, settings, promised = open_shard(path, verify)
        same = promised == entry["sha256"] and not [*files.differences(settings, index["settings"])]
        require_that(same, f"{path} belongs to another encoding than {folder / INDEX}", "shards of one run")
        shards.append(tensors["moments"])
        labels.append(tensors["labels"].clone())
    c, random = torch.cat(labels), torch.Generator().manual_seed(0)
    chosen = torch.randperm(len(c), generator=random)[:limit].sort().values if limit else None
    return LatentData(index, shards, c if chosen is None else c[chosen], flip, posterior, chosen)
