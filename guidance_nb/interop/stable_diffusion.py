"""Fine-tune a text-to-image pipeline with the plain, aligned or Model-guidance loss, at the memory of the plain one, and get an ordinary pipeline back."""

import copy
import csv
import hashlib
import io
import json
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from tqdm.auto import tqdm

from guidance_nb._files import force_to_disk
from guidance_nb._processes import find_processes
from guidance_nb._random import keyed_generator
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import NetworkDenoiser, check_inputs, count_nfe, record_nfe
from guidance_nb.images.data import IMAGE_SUFFIXES, ImageData, ImageFiles, common_size, to_uint8, write_aside
from guidance_nb.images.latents import (
    CROPS,
    CroppedFiles,
    LatentData,
    check_shard,
    encode_folder,
    in_all_processes,
    load_latents,
    open_shard,
    write_shard,
)
from guidance_nb.interop.diffusers import (
    DiffusersDenoiser,
    condition_names,
    decode_latents,
    encode_text,
    fill_null,
    has_encoder,
    latent_channels,
    path_from_scheduler,
    scheduler_times,
)
from guidance_nb.model_guidance import FixedScale, ModelGuidanceLoss, mg_weight_from_scale
from guidance_nb.samplers import sample
from guidance_nb.training import Checkpoints, Context, DenoisingLoss, Engine, State, first_difference, fit

TABLES = ("metadata.jsonl", "metadata.csv")


def read_table(
    path: Path,  # metadata.jsonl or metadata.csv
) -> list[dict[str, Any]]:  # Its rows
    "Rows of a table of captions; what cannot be read is a `ValueError` that names file and line."
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        rows: list[dict[str, Any]] = list(csv.DictReader(io.StringIO(text, newline="")))
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), 1):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except json.JSONDecodeError as error:
                raise ValueError(f"{path} line {number} is no JSON ({error}); allowed: one object a line") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or not isinstance(row.get("file_name"), str):
            raise ValueError(f"{path} row {number} has no file_name; allowed: one for every row")
    return rows


def find_captions(
    folder: Path,  # Pictures, in sub-folders or not
    column: str = "text",  # Column of the captions, where there is a table
) -> dict[Path, str]:  # Caption of each picture, in the order of their names
    "The captions of a folder; a picture without one, and a row without a picture, is named."
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
    if table is None:
        beside = {path: path.with_suffix(".txt") for path in pictures}
        found: dict[Path, Any] = {path: text.read_text("utf-8") for path, text in beside.items() if text.is_file()}
    else:
        found = {folder / row["file_name"]: row.get(column) for row in read_table(table)}
    if missing := sorted(found.keys() - set(pictures)):
        raise ValueError(f"{missing[0]} is in {table} but not in the folder; allowed: rows of pictures that are there")
    if not pictures:
        raise ValueError(f"{folder} holds no pictures; allowed: a folder with captioned pictures")
    for path in pictures:
        if not isinstance(caption := found.get(path), str) or not caption.strip():
            where = path.with_suffix(".txt").name if table is None else f"a row of {table.name} with {column!r}"
            raise ValueError(f"{path} has no caption; allowed: {where}")
    return {path: found[path].strip() for path in pictures}


@dataclass
class DatasetPictures:
    "Pictures of a `datasets.Dataset`, decoded and cropped when asked for."

    dataset: Any  # What is indexed by number and gives rows
    column: str  # Column of the pictures
    size: int | None  # Side to crop and resize to; None wants pictures of one size
    crop: str  # A key of `CROPS`
    name: str  # What to call the data in messages

    def one(self, i: int) -> Tensor:
        "Picture i, uint8 `[3, height, width]`."
        from torchvision.transforms.functional import pil_to_tensor

        try:
            picture = self.dataset[i][self.column].convert("RGB")
        except Exception as error:  # decoders of damaged files raise errors of many kinds
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"picture {i} of {self.name} cannot be read ({reason}); allowed: pictures") from None
        return pil_to_tensor(picture if self.size is None else CROPS[self.crop](picture, self.size))

    def __call__(self, indices: Tensor) -> Tensor:
        "The pictures `[b, 3, height, width]`, uint8."
        found = [self.one(i) for i in indices.tolist()]
        for i, picture in zip(indices.tolist(), found):
            if picture.shape != found[0].shape:
                a, b = ("x".join(map(str, x.shape[:0:-1])) for x in (found[0], picture))
                told = f"picture {indices[0]} of {self.name} is {a} and picture {i} is {b}"
                raise ValueError(f"{told}; allowed: pictures of one size, or give size")
        return torch.stack(found)


def by_caption(
    pixels: Any,  # See ImageData
    captions: list[str],  # One caption a picture
    shape: tuple[int, int, int],  # Channels, height, width
    name: str,  # Where they come from
) -> ImageData:
    "Pictures with one class for each distinct caption."
    number = {caption: k for k, caption in enumerate(dict.fromkeys(captions))}
    labels = torch.tensor([number[caption] for caption in captions], dtype=torch.long)
    return ImageData(pixels, labels, tuple(number), shape, name=name)


def load_captioned(
    source: Any,  # A folder of captioned pictures, or a `datasets.Dataset`
    size: int | None = None,  # Side of the square to crop and resize to; None wants pictures of one size
    crop: str = "adm",  # A key of `CROPS`
    column: str = "text",  # Column of the captions
    pictures: str = "image",  # Column of the pictures, of a `datasets.Dataset`
) -> ImageData:  # Pictures whose classes are their captions
    "Captioned pictures, decoded when asked for; missing captions, unreadable and unlike pictures are named."
    if crop not in CROPS:
        raise ValueError(f"crop = {crop!r}; allowed: {', '.join(map(repr, CROPS))}")
    if size is not None and (not isinstance(size, int) or size < 1):
        raise ValueError(f"size = {size!r}; allowed: a whole number, 1 or more, or None")
    if hasattr(source, "column_names"):
        return _from_dataset(source, size, crop, column, pictures)
    if not Path(source).is_dir():
        raise ValueError(f"source = {str(source)!r}; allowed: a folder of captioned pictures, or a datasets.Dataset")
    found = find_captions(Path(source), column)
    paths = [str(path) for path in found]
    shape = (3, *(common_size(paths) if size is None else (size, size)))
    pixels = ImageFiles(paths, shape, size) if size is None else CroppedFiles(paths, shape, CROPS[crop])
    return by_caption(pixels, list(found.values()), shape, str(source))


def _from_dataset(source: Any, size: int | None, crop: str, column: str, pictures: str) -> ImageData:
    name = f"dataset {getattr(source, '_fingerprint', '')}".strip()
    for wanted in (column, pictures):
        if wanted not in source.column_names:
            raise ValueError(f"{name} has no column {wanted!r}; allowed: {', '.join(source.column_names)}")
    captions = list(source[column])
    for i, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise ValueError(f"picture {i} of {name} has no caption in {column!r}; allowed: text, not empty")
    pixels = DatasetPictures(source, pictures, size, crop, name)
    shape: Any = tuple(pixels.one(0).shape) if size is None else (3, size, size)
    return by_caption(pixels, [caption.strip() for caption in captions], shape, name)


def weights_digest(
    module: nn.Module,  # Any network
) -> str:  # Hexadecimal SHA-256
    "Checksum of the weights of a network, names, types and shapes included."
    digest = hashlib.sha256()
    for key, value in sorted(module.state_dict().items()):
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_network(
    net: Any,  # The network of a pipeline
    scheduler: Any,  # Its scheduler
) -> None:
    "Refuse a network that is not fine-tuned here, or a scheduler that does not say what it predicts."
    if type(net).__name__ != "UNet2DConditionModel" or condition_names(net) != ("encoder_hidden_states",):
        needs = "" if type(net).__name__ != "UNet2DConditionModel" else ", conditioned on more than text"
        allowed = "a UNet2DConditionModel with text alone, as in Stable Diffusion 1 and 2"
        raise ValueError(f"the network is a {type(net).__name__}{needs}; allowed: {allowed}")
    if path_from_scheduler(scheduler).clock is None:
        raise ValueError(f"scheduler is {type(scheduler).__name__}; allowed: any but those of EDM")


def check_pipeline(
    pipeline: Any,  # A Stable Diffusion pipeline
) -> None:
    "Refuse a pipeline that cannot be fine-tuned, in one line."
    name, net, vae = type(pipeline).__name__, getattr(pipeline, "unet", None), getattr(pipeline, "vae", None)
    if net is None or vae is None:
        raise ValueError(f"{name} has no {'unet' if net is None else 'vae'}; allowed: a Stable Diffusion pipeline")
    check_network(net, pipeline.scheduler)
    if not has_encoder(pipeline) or getattr(pipeline, "tokenizer", None) is None:
        raise ValueError(f"{name} has no text encoder, so no null prompt; allowed: one with text_encoder and tokenizer")
    if latent_channels(net) != vae.config.latent_channels:
        found = f"the unet takes {latent_channels(net)} channels, the autoencoder makes {vae.config.latent_channels}"
        raise ValueError(f"{found}; allowed: equal numbers (inpainting and depth models have more)")


def cache_text(
    pipeline: Any,  # A pipeline with a text encoder
    captions: Sequence[str],  # Distinct captions
    out: str | Path,  # Folder of the shards; whole ones in it are kept
    shard_rows: int = 1024,  # Captions of a shard
    dtype: str = "float32",  # How numbers are stored: "float32" or "float16"
    batch_size: int = 64,  # Captions at a time
) -> dict[str, Any]:  # The index
    "Embeddings of the null prompt and of captions, computed once, on all processes if there are several."
    out, texts = Path(out), ["", *captions]
    words = hashlib.sha256(json.dumps(texts).encode()).hexdigest()
    settings = {"captions": words, "dtype": dtype, "shard_rows": shard_rows}
    settings |= {"encoder": weights_digest(pipeline.text_encoder)}
    rank, world = find_processes(next(pipeline.text_encoder.parameters()).device)

    def make(number: int) -> dict[str, Any]:
        path, first = out / f"text-{number:05d}.safetensors", number * shard_rows
        if path.exists():
            if found := first_difference(open_shard(path)[1], settings):
                key, was, now = found
                raise FileExistsError(f"{path} was made with {key} = {was!r}, not {now!r}; allowed: another folder")
            return check_shard(path)
        rows = texts[first : first + shard_rows]
        parts = [rows[i : i + batch_size] for i in range(0, len(rows), batch_size)]
        kept = [encode_text(pipeline, part, {})[0].to("cpu", getattr(torch, dtype)) for part in parts]
        return write_shard(path, torch.cat(kept), torch.arange(first, first + len(rows)), settings)

    numbers = range(rank, -(-len(texts) // shard_rows), world)
    found = in_all_processes(lambda: [make(number) for number in numbers], world)
    index = {"settings": settings, "shards": sorted((s for part in found for s in part), key=lambda s: s["file"])}
    in_all_processes(partial(_write_json, out / "text.json", index) if rank == 0 else lambda: None, world)
    return index


def _write_json(path: Path, value: Any) -> None:
    with write_aside(path) as aside:
        aside.write_text(json.dumps(value, indent=1), encoding="utf-8")
        force_to_disk(aside)


@dataclass
class CaptionedLatents:
    "Latents with text embeddings as `fit` reads them: whole batches by index, posterior draws keyed."

    latents: LatentData  # Latents, labelled by the number of their caption
    text: list[Tensor]  # Embeddings of each shard, mapped from its file; row 0 is the null prompt's
    shard_rows: int  # Embeddings of a shard

    @property
    def shape(self) -> tuple[int, ...]:
        "Channels, height, width of a latent."
        return self.latents.shape

    @property
    def captions(self) -> tuple[str, ...]:
        "Distinct captions."
        return self.latents.classes

    @property
    def null(self) -> Tensor:
        "Embedding of the null prompt, `[1, tokens, width]`."
        return self.rows(torch.zeros(1, dtype=torch.long))

    def __len__(self) -> int:
        return len(self.latents)

    def rows(self, numbers: Tensor) -> Tensor:
        "Embeddings by number `[b, tokens, width]`, float32; caption k is number k + 1."
        places = zip((numbers // self.shard_rows).tolist(), (numbers % self.shard_rows).tolist())
        return torch.stack([self.text[shard][row] for shard, row in places]).float()

    def fetch(self, indices: Tensor, generator: torch.Generator, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        "Rows `rows` of the batch `indices`, as latents with text embeddings."
        x, labels = self.latents.fetch(indices, generator, rows)
        return x, self.rows(labels + 1)


def cache_captioned(
    source: Any,  # A folder of captioned pictures, a `datasets.Dataset`, or what load_captioned gave
    out: str | Path,  # Folder for latents and embeddings; what is whole in it is kept
    pipeline: Any,  # A Stable Diffusion pipeline
    size: int | None = None,  # Side of the square to crop and resize to; None wants pictures of one size
    flip: bool = False,  # Whether to encode mirror images, too; they belie captions with "left" and "right"
    crop: str = "adm",  # A key of `CROPS`
    column: str = "text",  # Column of the captions
    batch_size: int = 8,  # Pictures at a time
    progress: bool = True,  # Whether to show a progress bar
) -> CaptionedLatents:
    "Encode pictures and captions once; goes on where it was interrupted."
    check_pipeline(pipeline)
    data = source if isinstance(source, ImageData) else load_captioned(source, size, crop, column)
    encode_folder(data, Path(out) / "latents", pipeline.vae, None, flip, 1024, batch_size, crop=crop, progress=progress)
    cache_text(pipeline, data.classes, Path(out) / "text")
    return load_cached(out, flip)


def load_cached(
    folder: str | Path,  # What cache_captioned wrote
    flip: bool = False,  # Whether to take the mirror image of a random half
) -> CaptionedLatents:
    "Latents and embeddings of a folder; missing, truncated and foreign files are named."
    latents, text = load_latents(Path(folder) / "latents", flip), Path(folder) / "text"
    if not (text / "text.json").is_file():
        raise ValueError(f"{text} has no embeddings; allowed: a folder that `cache_captioned` has finished")
    index = json.loads((text / "text.json").read_text(encoding="utf-8"))
    words = hashlib.sha256(json.dumps(["", *latents.classes]).encode()).hexdigest()
    if index["settings"]["captions"] != words:
        raise ValueError(f"{text} has embeddings of other captions than the latents; allowed: both of one run")
    shards = [open_shard(text / entry["file"])[0]["moments"] for entry in index["shards"]]
    return CaptionedLatents(latents, shards, index["settings"]["shard_rows"])


def embed_scale(
    scale: Tensor,  # Guidance scales `[batch]`
    width: int,  # Even width of the embedding
) -> Tensor:  # `[batch, width]`
    "Sines and cosines of 1000 (scale - 1), as Stable Diffusion's pipeline feeds them to its network."
    half = width // 2
    rates = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, device=scale.device))
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def add_scale_input(
    net: Any,  # A UNet2DConditionModel
    width: int = 256,  # Width of the embedding
) -> None:
    "Give a network an input for the guidance scale, of zero weight, in place."
    if net.config.time_cond_proj_dim is not None:
        return
    layer, like = net.time_embedding, next(net.parameters())
    layer.cond_proj = nn.Linear(width, layer.linear_1.in_features, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.cond_proj.weight)
    net.register_to_config(time_cond_proj_dim=width)


LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def add_lora(
    net: Any,  # A UNet2DConditionModel
    rank: int,  # Rank of the additions
    layers: Sequence[str] = LORA_LAYERS,  # How the names of the layers end
    seed: int = 0,  # Seed of the additions
) -> None:
    "Freeze a network and add low-rank matrices to some of its layers, in place (arXiv 2106.09685)."
    from peft import LoraConfig

    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank = {rank!r}; allowed: a whole number, 1 or more")
    names = [name for name, _ in net.named_modules()]
    for layer in layers:
        if not any(name == layer or name.endswith(f".{layer}") for name in names):
            raise ValueError(f"the network has no layer {layer!r}; allowed: ends of names, {', '.join(LORA_LAYERS)}")
    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_generator(seed, 7).initial_seed())
        net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(layers)))


class PartlyFrozen(DiffusersDenoiser):
    "A denoiser whose frozen weights are shared by its copies and left out of its state."

    frozen: frozenset[str]

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        "The weights that are trained, and the null prompt."
        whole = super().state_dict(*args, **kwargs)
        return {k: v for k, v in whole.items() if k not in self.frozen} if self.frozen and not kwargs else whole

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        "Load what `state_dict` gave."
        return super().load_state_dict(state_dict, strict and not self.frozen, assign)

    def __deepcopy__(self, memo: dict[int, Any]) -> "PartlyFrozen":
        memo |= {id(p): p for name, p in self.named_parameters() if name in self.frozen}
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


class TextDenoiser(PartlyFrozen):
    "The network of Stable Diffusion as a denoiser to train."

    def __init__(
        self,
        net: Any,  # A UNet2DConditionModel, perhaps with LoRA layers or a scale input
        scheduler: Any,  # Its scheduler
        null: Tensor,  # Embedding of the null prompt, `[1, tokens, width]`
    ):
        check_network(net, scheduler)
        if null.shape[-1] != net.config.cross_attention_dim:
            allowed = f"width {net.config.cross_attention_dim}, as the network takes"
            raise ValueError(f"null has shape {tuple(null.shape)}; allowed: {allowed}")
        super().__init__(net, scheduler, null)
        self.scale_width = net.config.time_cond_proj_dim
        self.scale_aware = self.scale_width is not None
        self.frozen = frozenset(name for name, p in self.named_parameters() if not p.requires_grad)

    def output(
        self, x: Tensor, t: Tensor | float, c: Tensor | None = None, drop: Tensor | None = None, scale: Any = None
    ) -> Tensor:
        "Raw network output, see `NetworkDenoiser.output`."
        if not self.scale_aware:
            return super().output(x, t, c, drop)
        t, weight, clock = check_inputs(x, t, c, self.num_classes), next(self.net.parameters()), self.facts.clock
        assert clock is not None  # `check_network` has refused EDM
        plain = torch.full((len(x),), c is None, device=x.device) if c is None or drop is None else drop
        asked = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=x.device).expand(len(x))
        told = embed_scale(asked.masked_fill(plain, 0.0), self.scale_width)
        text, time = fill_null(self.null, x, c, drop), clock(t).to(x.device).expand(len(x))
        record_nfe(len(x))
        inputs = {"encoder_hidden_states": text.to(weight.dtype), "timestep_cond": told.to(weight.dtype)}
        return self.net(x.to(weight.dtype), time, **inputs, return_dict=False)[0].to(x.dtype)


def open_pipeline(
    source: Any,  # A pipeline, or its folder or name on the Hub
) -> Any:  # A Stable Diffusion pipeline, on the CPU if it is opened here
    "A pipeline of `diffusers`; one that cannot be opened is a `ValueError`."
    if not isinstance(source, str | Path):
        return source
    from diffusers import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(str(source))
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"pipeline = {str(source)!r} cannot be opened ({reason}); allowed: a folder or name") from None


def load_text_denoiser(
    source: Any,  # A pipeline, or its folder or name; of a folder or name, only network and scheduler are read
    null: Tensor,  # Embedding of the null prompt, `[1, tokens, width]`
    lora_rank: int = 0,  # Rank of LoRA; 0 trains all weights
    lora_layers: Sequence[str] = LORA_LAYERS,  # How the names of the layers end that get it
    scale_aware: bool = False,  # Whether to give the network an input for the scale
    seed: int = 0,  # Seed of LoRA
) -> TextDenoiser:  # Ready for fit
    "The network of a pipeline, ready to be trained."
    if scale_aware and lora_rank:
        raise ValueError(f"lora_rank = {lora_rank}; allowed for a scale-aware network, whose new input is trained: 0")
    if isinstance(source, str | Path):
        net, scheduler = _read_parts(str(source))
    else:
        check_pipeline(source)
        net, scheduler = copy.deepcopy(source.unet), source.scheduler
    check_network(net, scheduler)
    if scale_aware:
        add_scale_input(net)
    if lora_rank:
        add_lora(net, lora_rank, lora_layers, seed)
    return TextDenoiser(net, scheduler, null)


def _read_parts(source: str) -> tuple[Any, Any]:
    import diffusers

    try:
        kinds = diffusers.DiffusionPipeline.load_config(source)
        parts = [getattr(diffusers, kinds[part][1]) for part in ("unet", "scheduler")]
        net, scheduler = (kind.from_pretrained(source, subfolder=n) for kind, n in zip(parts, ("unet", "scheduler")))
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"pipeline = {source!r} cannot be opened ({reason}); allowed: a folder or name") from None
    return net, scheduler


class TwoStageAlignedLoss(AlignedLoss):
    "`AlignedLoss` in two backward stages, eq. (3): same value and gradient, the activations of one branch at a time."

    def __call__(self, model: NetworkDenoiser, x0: Tensor, c: Tensor, context: Context) -> Tensor:
        "Per-sample losses `[batch]`, from two passes, one of them repeated on the way back."
        if c is None:
            raise ValueError("c = None; allowed: one condition per sample")
        t, eps = context.times(x0), context.noise(x0)
        x, y = model.path.interpolate(x0, eps, t), model.target(x0, eps, t)
        e_u: Any = checkpoint(model.output, x, t, use_reentrant=False)  # first, so its turn backward comes last
        e_c = model.output(x, t, c)
        error = (y - (e_u + self.scale * (e_c - e_u))).square()
        if self.anchor:
            error = error + self.anchor * (y - e_u).square()
        return error.flatten(1).mean(1)


class MemoryWatch(TorchDispatchMode):
    "Bytes of the tensors made inside a `with` block and still alive: `live` now, `peak` at most, `curve` over time."

    def __init__(self) -> None:
        super().__init__()
        self.live, self.peak = 0, 0
        self.curve: list[int] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in old | self.known:
                self.meet(x.untyped_storage())
        return result

    def meet(self, storage: Any) -> None:
        "Count a storage until it ends."
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.change(size)
        weakref.finalize(storage, self.part, key, size).atexit = False

    def part(self, key: int, size: int) -> None:
        "A storage has ended."
        self.known.discard(key)
        self.change(-size)

    def change(self, size: int) -> None:
        "Remember the number of bytes."
        self.live += size
        self.peak = max(self.peak, self.live)
        self.curve.append(self.live)


CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
---
Fine-tuned with guidance_nb by **{method}** for {steps:,} optimiser steps on {rows:,} rows (samples seen){data}, from
`{base}`.

**Scale.** e = e_u + scale (e_c - e_u): 0 is unconditional, 1 is the conditional model, no guidance. {advice}

```python
from diffusers import DiffusionPipeline

pipeline = DiffusionPipeline.from_pretrained("FOLDER OR HUB NAME")
image = pipeline("a prompt", guidance_scale={scale:g}).images[0]
```
"""
ADVICE = {
    "plain": "This model is guided as the one it came from; {scale:g} is what its maker suggests.",
    "aligned_loss": "Trained by the aligned loss at {scale:g}: sampled there it is the conditional model, unguided.",
    "model_guidance": "Guidance is in the weights: `guidance_scale=1` is one pass a step, and more guides it twice.",
    "scale-aware": "The scale is an input of the network: one pass a step whatever `guidance_scale` is.",
}


@dataclass(frozen=True)
class PipelineFacts:
    "What the page of a fine-tuned pipeline says."

    method: str = "plain"  # A key of `ADVICE`
    steps: int = 0  # Optimiser steps
    rows: int = 0  # Samples seen
    base: str = "a pipeline"  # What it came from
    data: str = ""  # What was learned
    scale: float = 1.0  # `guidance_scale` to sample with

    def card(self) -> str:
        "The page."
        advice = ADVICE[self.method].format(scale=self.scale)
        return CARD.format(**asdict(self) | {"advice": advice, "data": f" of {self.data}" if self.data else ""})


def merged_network(
    model: TextDenoiser,  # A trained network; left as it is
) -> Any:  # A plain UNet2DConditionModel on the CPU
    "The network with its LoRA layers merged into the weights."
    net: Any = copy.deepcopy(model.net).cpu().eval().requires_grad_(False)
    if getattr(net, "peft_config", None):
        net.fuse_lora()
        net.unload_lora()
    return net


def save_pipeline(
    model: TextDenoiser,  # A trained network
    source: Any,  # The pipeline it came from, or its folder or name
    folder: str | Path,  # Folder to write
    facts: PipelineFacts = PipelineFacts(),  # For its page
) -> Path:  # The folder
    "Write an ordinary pipeline of `diffusers`, completely or not at all."
    pipeline, folder = open_pipeline(source), Path(folder)
    if folder.exists() and not (folder / "model_index.json").is_file():
        raise ValueError(f"{folder} holds other things than a pipeline; allowed: another folder")
    old = pipeline.unet
    pipeline.register_modules(unet=merged_network(model))
    try:
        with write_aside(folder) as aside:
            pipeline.save_pretrained(str(aside))
            (aside / "README.md").write_text(facts.card(), encoding="utf-8")
    finally:
        pipeline.register_modules(unet=old)
    return folder


def save_lora(
    model: TextDenoiser,  # A network trained with LoRA
    folder: str | Path,  # Folder to write
) -> Path:  # The folder
    "Write LoRA's additions as `load_lora_weights` of `diffusers` reads them."
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import get_peft_model_state_dict

    if not getattr(model.net, "peft_config", None):
        raise ValueError("the network has no LoRA layers; allowed: one trained with lora_rank")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.net))
    StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=layers)
    return Path(folder)


def load_clip(
    source: Any,  # `(CLIPModel, CLIPProcessor)`, or the folder or name of both
) -> tuple[Any, Any]:  # Model and processor
    "A CLIP of `transformers`; one that cannot be loaded is a `ValueError`."
    if not isinstance(source, str | Path):
        return source
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(str(source)).eval(), CLIPProcessor.from_pretrained(str(source))
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        reason = " ".join(str(error).split())[:150]
        raise ValueError(f"clip = {str(source)!r} cannot be loaded ({reason}); allowed: a folder or name") from None


@torch.no_grad()
def clip_score(
    images: Tensor,  # `[n, 3, height, width]`, in [-1, 1] or uint8
    prompts: Sequence[str],  # One a picture
    clip: Any,  # See load_clip
    batch_size: int = 32,  # Pictures at a time
) -> Tensor:  # `[n]`, 0 to 100
    "Agreement of pictures with texts, eq. (4) (arXiv 2104.08718, with the factor of torchmetrics)."
    from torchvision.transforms.functional import to_pil_image

    if len(images) != len(prompts):
        raise ValueError(f"{len(images)} images and {len(prompts)} prompts; allowed: one prompt an image")
    model, processor = load_clip(clip)
    levels, scores = images if images.dtype == torch.uint8 else to_uint8(images.cpu().clamp(-1, 1)), []
    for i in range(0, len(prompts), batch_size):
        pictures = [to_pil_image(x.cpu()) for x in levels[i : i + batch_size]]
        inputs = processor(text=list(prompts[i : i + batch_size]), images=pictures, return_tensors="pt", padding=True,
                           truncation=True).to(model.device)  # fmt: skip
        found = model(**inputs)
        cosine = torch.cosine_similarity(found.image_embeds.float(), found.text_embeds.float())
        scores.append(100 * cosine.clamp(min=0).cpu())
    return torch.cat(scores)


def compare_scales(
    models: dict[str, TextDenoiser],  # Networks by name, such as "before" and "after"
    prompts: Sequence[str],  # Prompts
    pipeline: Any,  # Encodes the prompts and decodes the latents
    scales: Sequence[float] = (1.0, 2.0, 4.0, 7.5),  # Guidance scales; 1 is none
    clip: Any = None,  # See load_clip; None leaves the score out
    steps: int = 50,  # Steps of DDIM on the times of the pipeline's scheduler
    seed: int = 0,  # Picture i depends on (seed, i) alone, and not on model and scale
    size: int | None = None,  # Edge in pixels; None for the pipeline's own
    progress: bool = True,  # Whether to show a progress bar
) -> tuple[Tensor, list[dict[str, Any]]]:  # Pictures `[models, scales, prompts, 3, height, width]`, uint8, and a table
    "Pictures of several networks over guidance scales from the same noise, with CLIP score and network rows."
    conditions, rows, pictures = encode_text(pipeline, list(prompts), {})[0].float(), [], []
    factor = 2 ** (len(pipeline.vae.config.block_out_channels) - 1)
    edge = pipeline.unet.config.sample_size if size is None else size // factor
    shape = latent_channels(pipeline.unet), edge, edge
    times = scheduler_times(pipeline.scheduler, steps)
    jobs = [(name, float(scale)) for name in models for scale in scales]
    for name, scale in tqdm(jobs, disable=not progress, unit=" grids"):
        guided = (FixedScale if models[name].scale_aware else ClassifierFreeGuidance)(models[name], scale)
        with count_nfe() as counted:
            latents = sample(guided, conditions, shape, "ddim", times=times, seed=seed, progress=False)
        pictures.append(to_uint8(decode_latents(pipeline.vae, latents).cpu().clamp(-1, 1).float()))
        row = {"model": name, "scale": scale, "steps": len(times) - 1, "seed": seed, "n": len(prompts)}
        row |= {"rows_per_image": counted.total / len(prompts)}
        if clip is not None:
            row["clip_score"] = clip_score(pictures[-1], prompts, clip).mean().item()
        rows.append(row)
    return torch.stack(pictures).unflatten(0, (len(models), len(scales))), rows


@dataclass(frozen=True)
class FineTuning:
    "All that decides a fine-tuning run."

    title: str = ""  # What this is, in one line
    pipeline: str = ""  # Folder or Hub name of a Stable Diffusion pipeline
    data: str = ""  # Folder of captioned pictures
    column: str = "text"  # Column of the captions, where there is a table
    size: int = 0  # Edge in pixels to crop and resize to; 0 wants pictures of one size
    flip: bool = False  # Whether to mirror pictures at random
    crop: str = "adm"  # "adm" or "torchvision"
    method: str = "plain"  # "plain", "aligned_loss" or "model_guidance"
    dropout: float = 0.1  # Probability of training without the caption ("plain", "model_guidance")
    scale: float = 7.5  # Guidance scale trained for; for "plain" the one suggested for sampling
    two_stage: bool = False  # Whether "aligned_loss" keeps the activations of one branch at a time
    scale_range: tuple[float, ...] = ()  # Lowest and highest scale of a scale-aware "model_guidance"
    interval: tuple[float, ...] = (0.0, 1.0)  # Times at which "model_guidance" guides
    lora_rank: int = 0  # Rank of LoRA; 0 trains all weights
    lora_layers: tuple[str, ...] = LORA_LAYERS  # How the names of the layers end that get it
    steps: int = 1000  # Optimiser steps
    batch_size: int = 16  # Pictures per optimiser step, over all processes together
    lr: float = 1e-5  # Peak learning rate of AdamW
    schedule: str = "constant"  # "cosine" decay to zero, or "constant"
    warmup: int = 0  # Steps of linear warm-up
    weight_decay: float = 0.0  # Weight decay of AdamW
    clip: float = 1.0  # Largest norm of the gradient; 0 does not clip
    ema: float = 0.999  # Decay of the moving average, which is saved, and the teacher of "model_guidance"
    seed: int = 0  # Seed of LoRA, data order, times, noise and dropout
    precision: str = "auto"  # "fp32", "bf16", "fp16", or "auto": bf16 where the hardware is made for it
    accumulate: int = 1  # Micro-batches per optimiser step
    recompute: bool = False  # Whether blocks forget activations (gradient checkpointing)
    save_every: int = 500  # Steps between checkpoints
    keep: int = 2  # Newest checkpoints to keep
    prompts: tuple[str, ...] = ()  # Prompts of the grid before and after; none draws no grid
    grid_scales: tuple[float, ...] = (1.0, 2.0, 4.0, 7.5)  # Its guidance scales
    grid_steps: int = 50  # Its steps of DDIM
    judge: str = ""  # Folder or name of a CLIP that scores it


def to_value(
    key: str,  # Name of the key, for the message
    value: Any,  # As read from TOML, or the text of a flag
    hint: Any,  # Type wanted
) -> Any:  # The value in that type
    "Bring a value to the type of its key, or refuse it with a `ValueError`."
    if get_origin(hint) is tuple:
        parts = [part.strip() for part in value.split(",")] if isinstance(value, str) else value
        if isinstance(parts, list | tuple):
            return tuple(to_value(key, part, get_args(hint)[0]) for part in parts if part != "")
    if hint is bool and value in ("true", "false"):
        return value == "true"
    if hint in (int, float) and isinstance(value, str | int) and not isinstance(value, bool):
        try:
            return hint(value)
        except ValueError:
            pass
    if isinstance(value, get_origin(hint) or hint) and not (hint is not bool and isinstance(value, bool)):
        return value
    wanted = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    raise ValueError(f"{key} = {value!r}; allowed: {wanted.get(hint, 'a list')}")


FINETUNE_FOLDER = Path(__file__).parent.parent / "cli" / "recipe_files" / "finetune"


def finetuning_names() -> list[str]:
    "Names of the fine-tuning recipes that come with the package."
    return sorted(path.stem for path in FINETUNE_FOLDER.glob("*.toml"))


def finetuning_key(
    name: str,  # A key, with - or _
) -> str:  # The key
    "A key of `FineTuning`; an unknown one is a `ValueError` with all that there are."
    key, known = name.replace("-", "_"), [field.name for field in fields(FineTuning)]
    if key not in known:
        raise ValueError(f"unknown key {name!r}; allowed: {', '.join(known)}")
    return key


def read_finetuning(
    source: str | Path,  # A name out of finetuning_names, or a TOML file
    changes: dict[str, Any] | None = None,  # Values that replace those of the file, by key
) -> FineTuning:
    "Read a recipe; unknown names and keys, wrong types and settings that contradict are a `ValueError`."
    import tomli

    path = FINETUNE_FOLDER / f"{source}.toml" if str(source) in finetuning_names() else Path(source)
    if not path.is_file():
        known = ", ".join(finetuning_names())
        raise ValueError(f"recipe = {str(source)!r}; allowed: a TOML file, or a name such as {known}")
    try:
        given = tomli.loads(path.read_text(encoding="utf-8")) | (changes or {})
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not TOML: {error}") from None
    hints = get_type_hints(FineTuning)
    keys = {finetuning_key(name): value for name, value in given.items()}
    recipe = replace(FineTuning(), **{key: to_value(key, value, hints[key]) for key, value in keys.items()})
    finetuning_loss(recipe)
    return recipe


def finetuning_loss(
    recipe: FineTuning,  # A recipe
) -> Callable:  # The loss, for fit
    "The loss of a recipe; settings that contradict each other are a `ValueError`."
    if len(recipe.interval) != 2 or len(recipe.scale_range) not in (0, 2):
        found = f"interval = {recipe.interval}, scale_range = {recipe.scale_range}"
        raise ValueError(f"{found}; allowed: two times, and two scales or none")
    if recipe.method == "plain":
        return DenoisingLoss(recipe.dropout)
    if recipe.method == "aligned_loss":
        return (TwoStageAlignedLoss if recipe.two_stage else AlignedLoss)(recipe.scale)
    if recipe.method != "model_guidance":
        raise ValueError(f"method = {recipe.method!r}; allowed: 'plain', 'aligned_loss', 'model_guidance'")
    settings: dict[str, Any] = {"dropout": recipe.dropout, "interval": recipe.interval}
    if recipe.scale_range:
        return ModelGuidanceLoss(scale_range=(recipe.scale_range[0], recipe.scale_range[1]), **settings)
    return ModelGuidanceLoss(mg_weight_from_scale(recipe.scale), **settings)


@contextmanager
def add_memory_hint(
    recipe: FineTuning,  # A recipe
) -> Iterator[None]:
    "Add the knobs of fine-tuning to the advice when memory runs out."
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        knobs = ["two_stage = true"] if recipe.method == "aligned_loss" and not recipe.two_stage else []
        knobs += [] if recipe.lora_rank else ["lora_rank = 16"]
        knobs += [] if recipe.recompute else ["recompute = true"]
        raise torch.OutOfMemoryError(f"{reason}; of the recipe: {', '.join([*knobs, 'a smaller size'])}") from None


def prepare_data(
    recipe: FineTuning,  # A recipe
    folder: str | Path,  # Folder of the cache
    progress: bool = True,  # Whether to show a progress bar
) -> CaptionedLatents:
    "Latents and embeddings of a recipe; the pipeline that makes them is gone afterwards."
    for key in ("pipeline", "data"):
        if not getattr(recipe, key):
            allowed = "a folder or name" if key == "pipeline" else "a folder of captioned pictures"
            raise ValueError(f"{key} = ''; allowed: {allowed}, as --{key} FOLDER")
    pictures = load_captioned(recipe.data, recipe.size or None, recipe.crop, recipe.column)
    pipeline = open_pipeline(recipe.pipeline).to("cuda" if torch.cuda.is_available() else "cpu")
    return cache_captioned(pictures, folder, pipeline, flip=recipe.flip, crop=recipe.crop, progress=progress)


def finetune(
    recipe: FineTuning,  # A recipe
    out: str | Path,  # Folder of the run: cache, checkpoints, and at last pipeline, lora and grid
    progress: bool = True,  # Whether to show progress bars
    cpu: bool = False,  # Whether to stay on the CPU although there is an accelerator
) -> Iterator[State]:
    "Encode, train with checkpoints, go on from the newest, and write the pipeline; yields as `fit` does."
    out, loss = Path(out), finetuning_loss(recipe)
    with add_memory_hint(recipe):
        data = prepare_data(recipe, out / "cache", progress)
        aware = recipe.method == "model_guidance" and bool(recipe.scale_range)
        parts = recipe.lora_rank, recipe.lora_layers, aware, recipe.seed
        model = load_text_denoiser(recipe.pipeline, data.null, *parts)
        engine = Engine(recipe.precision, recipe.accumulate, recompute=recipe.recompute, clip=recipe.clip or None,
                        warmup=recipe.warmup, weight_decay=recipe.weight_decay, cpu=cpu)  # fmt: skip
        facts = {"recipe": asdict(recipe), "weights": weights_digest(model.net), "data": data.latents.index["settings"]}
        kept = Checkpoints(out, recipe.save_every, recipe.keep, facts=facts, may_change=MAY_CHANGE)
        how: dict[str, Any] = {key: getattr(recipe, key) for key in ("batch_size", "lr", "schedule", "ema", "seed")}
        for state in fit(model, loss, data, recipe.steps, **how, progress=progress, engine=engine, checkpoints=kept):
            yield state
        finish(recipe, out, state.ema, data.null, progress)


MAY_CHANGE = tuple(  # at a resume
    f"recipe.{key}"
    for key in ("title", "pipeline", "data", "steps", "precision", "accumulate", "recompute", "save_every", "keep",
                "prompts", "grid_scales", "grid_steps", "judge")
)  # fmt: skip


def finish(
    recipe: FineTuning,  # A recipe
    out: Path,  # Folder of the run
    model: TextDenoiser,  # The trained network
    null: Tensor,  # Embedding of the null prompt
    progress: bool = True,  # Whether to show a progress bar
) -> None:
    "Write pipeline, LoRA and the grid before and after, in the main process."
    if find_processes(next(model.parameters()).device)[0]:
        return
    pipeline = open_pipeline(recipe.pipeline)
    method = "scale-aware" if model.scale_aware else recipe.method
    scale = 1.0 if method == "model_guidance" else recipe.scale
    rows = recipe.steps * recipe.batch_size
    facts = PipelineFacts(method, recipe.steps, rows, recipe.pipeline, Path(recipe.data).name, scale)
    save_pipeline(model, pipeline, out / "pipeline", facts)
    if recipe.lora_rank:
        save_lora(model, out / "lora")
    if not recipe.prompts:
        return
    models = {"before": load_text_denoiser(recipe.pipeline, null).to(next(model.parameters()).device), "after": model}
    pipeline.to(next(model.parameters()).device)
    options = recipe.prompts, pipeline, recipe.grid_scales, recipe.judge or None, recipe.grid_steps, recipe.seed
    pictures, table = compare_scales(models, *options, recipe.size or None, progress)
    save_grid(pictures, table, out)


def save_grid(
    pictures: Tensor,  # See compare_scales
    table: list[dict[str, Any]],  # See compare_scales
    out: Path,  # Folder for grid.png and grid.csv
) -> None:
    "Write a grid, one row for each model and scale and one column for each prompt, and its table."
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

    with write_aside(out / "grid.csv") as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    with write_aside(out / "grid.png") as aside:
        to_pil_image(make_grid(pictures.flatten(0, 2), nrow=pictures.shape[2])).save(aside, "PNG")
