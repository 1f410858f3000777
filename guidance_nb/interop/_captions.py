"""Captioned pictures, and what of them is computed once: latents, and an embedding for each distinct caption."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guidance_nb._checks import explained, require, require_that
from guidance_nb._files import Json, digest, parse_json, read_csv, read_text, weights_digest
from guidance_nb.images._data import Crop, ImageData, ImageFiles, Size, common_size, image_files, to_pixels
from guidance_nb.images._latents import LatentData, encode_folder, load_latents, make_shards, open_shard
from guidance_nb.interop._diffusers import _PipelineParts
from guidance_nb.interop._networks import Network, Pipeline, condition_names
from guidance_nb.interop._schedulers import path_from_scheduler

if TYPE_CHECKING:
    from datasets import Dataset  # type: ignore[import-untyped]

_SHARD_ROWS = 1024  # Pictures, or captions, of a file
_TABLES = ("metadata.jsonl", "metadata.csv")


def _read_table(path: Path, column: str) -> dict[Path, object]:
    "Pictures and their captions in a table; a row that cannot be read is a `ValueError` that names file and row."
    rows: Sequence[Json | str]
    if path.suffix == ".csv":
        columns, *lines = read_csv(path) or [[]]
        rows = [dict(zip(columns, line)) for line in lines]
    else:
        rows = [text.strip() for text in read_text(path).split("\n")]
    found: dict[Path, object] = {}
    for number, row in ((number, row) for number, row in enumerate(rows, 1) if row):
        told = f"{path} row {number} names no picture"
        with explained(told, "a file_name in every row", ValueError, KeyError, TypeError):
            values = parse_json(row) if isinstance(row, str) else row
            found[path.parent / values["file_name"]] = values.get(column)
    return found


def _said(caption: object, place: str, allowed: str) -> str:
    "A caption without the spaces around it; one that is missing names its picture."
    require_that(isinstance(caption, str) and caption.strip(), f"{place} has no caption", allowed)
    return str(caption).strip()


def find_captions(folder: Path, column: str = "text") -> dict[Path, str]:
    "The captions of a folder; a picture without one, and a row without a picture, is named."
    pictures = image_files(folder)
    table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
    if table is None:
        beside = {path: path.with_suffix(".txt") for path in pictures}
        found: dict[Path, object] = {path: read_text(text) for path, text in beside.items() if text.is_file()}
    else:
        found = _read_table(table, column)
    for path in sorted(found.keys() - set(pictures)):
        require_that(False, f"{path} is in {table} but not in the folder", "rows of pictures that are there")
    require(pictures, "pictures", f"none in {folder}", "a folder of captioned pictures, or a datasets.Dataset")
    where = "" if table is None else f"a row of {table.name} with {column!r}"
    return {path: _said(found.get(path), str(path), where or path.with_suffix(".txt").name) for path in pictures}


def _dataset_pictures(
    dataset: "Dataset", column: str, size: Size | None, crop: Crop, name: str, indices: Tensor
) -> Tensor:
    "Some pictures of a `datasets.Dataset`, uint8 `[b, 3, height, width]`."
    found = []
    for i in indices.tolist():
        with explained(f"picture {i} of {name} cannot be read", f"pictures in {column!r}", Exception):  # of many kinds
            found.append(to_pixels(dataset[i][column], 3, size, crop))
    return torch.stack(found)


def load_captioned(
    source: "Dataset | str | Path", size: Size | None = None, crop: Crop = "adm", column: str = "text",
    pictures: str = "image",
) -> ImageData:  # fmt: skip
    "Captioned pictures, decoded when asked for; missing captions and unreadable pictures are named."
    pixels: Callable[[Tensor], Tensor]
    if not isinstance(source, str | Path):
        name = f"dataset {getattr(source, '_fingerprint', '')}".strip()
        captions = [_said(text, f"picture {i} of {name}", f"{column!r}") for i, text in enumerate(source[column])]
        pixels = partial(_dataset_pictures, source, pictures, size, crop, name)
        height, width = pixels(torch.zeros(1, dtype=torch.long)).shape[2:] if size is None else common_size([], size)
    else:
        found, name = find_captions(Path(source), column), str(source)
        paths, captions = [str(path) for path in found], list(found.values())
        pixels = files = ImageFiles(paths, 3, size, crop)
        height, width = files.shape[1:]
    number = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([number[caption] for caption in captions], dtype=torch.long)
    return ImageData(pixels, labels, tuple(number), (3, height, width), name=name)


def _texts_digest(captions: Sequence[str]) -> str:
    return digest(json.dumps(["", *captions]))


def _cache_text(pipeline: Pipeline, captions: Sequence[str], out: Path) -> None:
    "Embeddings of the null prompt and of distinct captions, computed once, on all processes if there are several."
    texts, parts = ["", *captions], _PipelineParts(pipeline.unet, pipeline)
    settings = {"captions": _texts_digest(captions), "dtype": "float32", "shard_rows": _SHARD_ROWS}
    settings |= {"encoder": weights_digest(pipeline.text_encoder.state_dict())}

    def embed(rows: Tensor) -> Iterator[Tensor]:
        for some in rows.split(64):
            yield parts.encode([texts[i] for i in some]).cpu().float()  # type: ignore[union-attr]

    device = next(pipeline.text_encoder.parameters()).device
    make_shards(out / "text.json", "text", {"settings": settings}, torch.arange(len(texts)), device, embed)


@dataclass
class _CaptionedLatents:
    "Latents with text embeddings as `fit` reads them: whole batches by index, posterior draws keyed."

    latents: LatentData  # Latents, labelled by the number of their caption
    text: list[Tensor]  # Embeddings of each shard, mapped from its file; row 0 is the null prompt's
    shard_rows: int  # Embeddings of a shard

    @property
    def shape(self) -> tuple[int, ...]:
        "Channels, height, width of a latent."
        return self.latents.shape

    @property
    def null(self) -> Tensor:
        "Embedding of the null prompt, `[1, tokens, width]`."
        return self.rows(torch.zeros(1, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.latents)

    def digest(self) -> str:
        "What identifies the data at a resume."
        return self.latents.digest()

    def rows(self, numbers: Tensor) -> Tensor:
        "Embeddings by number `[b, tokens, width]`, float32; caption k is number k + 1."
        places = zip((numbers // self.shard_rows).tolist(), (numbers % self.shard_rows).tolist())
        return torch.stack([self.text[shard][row] for shard, row in places]).float()

    def fetch(self, indices: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        "Rows `rows` of the batch `indices`, as latents with text embeddings."
        x, labels = self.latents.fetch(indices, generator, rows)
        return x, self.rows(labels + 1)


def cache_captioned(
    source: ImageData | str | Path, out: str | Path, pipeline: Pipeline, flip: bool = False, crop: Crop = "adm",
    batch_size: int = 8, progress: bool = True,
) -> _CaptionedLatents:  # fmt: skip
    """Encode captions and pictures once into a folder; goes on where it was interrupted.

    `source` is what load_captioned gave, or a folder of captioned pictures of one size. With `flip` mirror images are
    encoded, too; they belie captions with "left" and "right".
    """
    net: Network = getattr(pipeline, "unet", pipeline)
    plain = condition_names(net) == ("encoder_hidden_states",) and net.config.in_channels == net.config.out_channels
    told = "one conditioned on text alone, not on sizes, as SDXL's is, or pictures, as those for inpainting are"
    require(plain, "network", type(net).__name__, told)
    path_from_scheduler(pipeline.scheduler, numbered=True)  # an error where it does not say what is predicted
    data = source if isinstance(source, ImageData) else load_captioned(source)
    _cache_text(pipeline, data.classes, Path(out) / "text")
    encode_folder(
        data, Path(out) / "latents", pipeline.vae, flip=flip, shard_rows=_SHARD_ROWS, batch_size=batch_size, crop=crop,
        progress=progress,
    )  # fmt: skip
    return load_cached(out, flip)


def load_cached(folder: str | Path, flip: bool = False) -> _CaptionedLatents:
    "Latents and embeddings of a folder; missing, truncated and foreign files are named."
    latents, text = load_latents(Path(folder) / "latents", flip), Path(folder) / "text"
    index = parse_json(read_text(text / "text.json"))
    captions, rows = (index["settings"][key] for key in ("captions", "shard_rows"))
    files = [text / entry["file"] for entry in index["shards"]]
    same = captions == _texts_digest(latents.classes)
    require_that(same, f"{text} has embeddings of other captions than the latents", "both of one run")
    return _CaptionedLatents(latents, [open_shard(file)[0]["moments"] for file in files], rows)
