"""A training run as a small file: read, checked, trained, stopped, resumed, loaded again, sampled and scored."""

import difflib
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field, is_dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from guidance_nb._checks import check_choice, check_interval, check_scale
from guidance_nb._processes import find_processes
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance, dit_channel_scales
from guidance_nb.classifier_guidance import ClassifierGuidance
from guidance_nb.denoisers import Denoiser, check_labels, count_nfe
from guidance_nb.engine.cost import cost_sheet, count_loss_nfe, network_cost
from guidance_nb.flow_postprocessing import (
    FlowPostprocessor,
    PairDraws,
    PairLoss,
    pair_data,
)
from guidance_nb.images.data import (
    FILES,
    ImageData,
    SampleFile,
    find_files,
    from_uint8,
    load_images,
    load_samples,
    to_uint8,
)
from guidance_nb.images.features import (
    INCEPTION,
    Extractor,
    Features,
    Reference,
    check_metrics,
    extract,
    feature_space,
    find_extractor,
    read_reference,
)
from guidance_nb.images.latents import (
    INDEX,
    LatentData,
    decode,
    decode_all,
    latent_constants,
    load_latents,
    load_vae,
    read_index,
)
from guidance_nb.images.metrics import append_rows, column, feature_scores, provenance, read_rows
from guidance_nb.images.networks import IMAGE_NETWORKS, ImageClassifier, build_network, image_denoiser
from guidance_nb.interop.stable_diffusion import to_value
from guidance_nb.model_guidance import (
    AutoWeight,
    FixedScale,
    ModelGuidanceLoss,
    mg_weight_from_scale,
    scale_from_mg_weight,
)
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.plots import METHOD_LABELS, show_curves
from guidance_nb.samplers import SAMPLERS, sample, time_grid
from guidance_nb._processes import on_main
from guidance_nb.engine.checkpoints import load_weights, read_checkpoint
from guidance_nb.engine.hardware import check_compiler, check_tracker, choose_precision
from guidance_nb.engine.run import Engine
from guidance_nb.engine.sampling import extract_sharded, sample_sharded
from guidance_nb.training import ClassifierLoss, DenoisingLoss, State, fit


@dataclass(frozen=True)
class DataTable:
    "The table `data` of a recipe: what is learned."

    source: str = "mnist"  # "mnist", "cifar10", a folder with one sub-folder per class, or "latents:FOLDER"
    size: int = 0  # Edge in pixels that images of a folder are brought to, or that latents are of; 0 keeps theirs
    flip: bool = False  # Whether to mirror images at random
    limit: int = 0  # Use the first n images only; 0 uses all
    vae: str = ""  # For latents: folder or name of the autoencoder that decodes; empty takes the one that encoded


@dataclass(frozen=True)
class NetworkTable:
    "The table `network` of a recipe: what learns the data."

    name: str = "unet-small"  # A key of `IMAGE_NETWORKS`, or "linear" for a classifier
    path: str = "flow"  # "flow", "vp-linear", "vp-cosine" or "edm"
    prediction: str = "velocity"  # What the network predicts: "velocity", "eps", "x0", "v" or "edm"
    settings: dict[str, Any] = field(default_factory=dict)  # Changes of the network's settings, such as dropout


METHOD_NAMES = ("plain", "aligned_loss", "model_guidance", "classifier", "judge", "flow_postprocessing")


@dataclass(frozen=True)
class MethodTable:
    "The table `method` of a recipe: the loss it trains by."

    name: str = "plain"  # One of `METHOD_NAMES`; "classifier" sees noisy images, "judge" clean ones
    dropout: float = 0.1  # Probability of training without the label ("plain", "model_guidance", "flow_postprocessing")
    scale: float = 2.0  # Guidance scale trained for ("aligned_loss", "model_guidance" without `scale_range`)
    anchor: float = 0.0  # Weight of the unconditional term of "aligned_loss"
    scale_range: tuple[float, ...] = ()  # Lowest and highest scale of a scale-aware "model_guidance"
    guided_share: float = 0.5  # Share of a scale-aware "model_guidance" trained at a drawn scale, the rest at 1
    unconditional: str = "null"  # What "model_guidance" guides away from: "null", "contrastive" or "uniform"
    auto_every: int = 0  # Steps between moves of the weight of "model_guidance" by a measured error; 0 keeps it
    auto_samples: int = 1000  # Samples of each such measurement
    auto_features: str = INCEPTION  # The network that looks at them, by name, or a checkpoint of a judge
    auto_reference: str = ""  # Real images to compare them with, as for `load_real`; empty takes the data's source
    interval: tuple[float, ...] = (0.0, 0.75)  # Times at which "model_guidance" guides
    start_step: int = 0  # Step at which "model_guidance" begins to guide
    samples: tuple[str, ...] = ()  # Sample files "flow_postprocessing" learns to correct
    neighbours: int = 20  # Real neighbours per sample, for "flow_postprocessing"
    space: str = "pixels"  # Where neighbours are near: "pixels", "dinov2", "dinov2-patches", "resnet20", "resnet56"
    weights: str = ""  # Folder of the weights of `space`


@dataclass(frozen=True)
class TrainingTable:
    "The table `training` of a recipe: for how long, and with what care."

    steps: int = 2000  # Optimiser steps
    batch_size: int = 128  # Images per optimiser step, over all processes together
    lr: float = 1e-3  # Peak learning rate of AdamW
    schedule: str = "cosine"  # "cosine" decay to zero, or "constant"
    warmup: int = 0  # Steps of linear warm-up
    weight_decay: float = 0.0  # Weight decay of AdamW
    clip: float = 0.0  # Largest norm of the gradient; 0 does not clip
    ema: float = 0.999  # Decay of the moving average of the weights
    seed: int = 0  # Seed of weights, data order, times, noise and dropout
    precision: str = "fp32"  # "fp32", "bf16", "fp16", or "auto": bf16 where the hardware is made for it
    accumulate: int = 1  # Micro-batches per optimiser step
    recompute: bool = False  # Whether to forget activations and compute them again: less memory, more time
    compile: bool = False  # Whether to compile the network
    graphs: bool = False  # Whether to record a step as a CUDA graph; without dropout inside the network
    channels_last: bool = False  # Whether to store feature maps channels last
    save_every: int = 500  # Steps between checkpoints
    keep: int = 2  # Newest checkpoints to keep
    grid_every: int = 0  # Steps between grids of samples; 0 draws none
    tracker: str = ""  # A tracker of Accelerate, such as "tensorboard"


@dataclass(frozen=True)
class SamplingTable:
    "How it is sampled, unless the call says otherwise."

    sampler: str = "heun"  # A key of `SAMPLERS`, or "dopri5"
    sampler_steps: int = 18  # Steps of the sampler
    guidance_scale: float = 1.0  # Guidance scale; 1 is none
    channels: int = 0  # First channels that classifier-free guidance guides, 3 as in DiT's code; 0 guides all


@dataclass(frozen=True)
class Recipe:
    "All that decides a training run, and how its model is sampled by default."

    title: str = ""  # What this is, in one line
    data: DataTable = DataTable()
    network: NetworkTable = field(default_factory=NetworkTable)
    method: MethodTable = MethodTable()
    training: TrainingTable = TrainingTable()
    sampling: SamplingTable = SamplingTable()


def recipe_keys() -> dict[str, Any]:
    "Every key of a recipe, `table.key`, with its type."
    keys: dict[str, Any] = {"title": str}
    for table, kind in get_type_hints(Recipe).items():
        if is_dataclass(kind):
            keys |= {f"{table}.{name}": hint for name, hint in get_type_hints(kind).items()}
    return keys


RECIPE_FOLDER = Path(__file__).parent / "recipe_files"


def key_meanings() -> dict[str, str]:
    "What every key means, read off the comments beside it; empty where the package comes without its source."
    file, found = RECIPE_FOLDER.parent / "recipes.py", dict[str, str]()
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    for table, kind in [("", Recipe), *get_type_hints(Recipe).items()]:
        if is_dataclass(kind):
            body = re.search(rf"^class {getattr(kind, '__name__', '')}:\n((    .*)?\n)+", text, re.MULTILINE)
            pairs = re.findall(r"^    (\w+): .+?  # (.+)$", body[0] if body else "", re.MULTILINE)
            found |= {f"{table}.{name}".lstrip("."): meaning for name, meaning in pairs}
    return found


def find_key(
    name: str,  # "training.lr", "lr", or "settings.dropout" for a change of the network's settings
) -> str:  # The full key, `table.key`
    "The key a name stands for; an unknown or ambiguous name is a `ValueError` with the nearest keys."
    keys = recipe_keys()
    name = name.replace("-", "_")
    if name in keys:
        return name
    if name.removeprefix("network.").startswith("settings."):
        return f"network.{name.removeprefix('network.')}"
    found = [key for key in keys if key.split(".")[-1] == name or key.startswith(f"{name}.")]
    if len(found) == 1 or (found and found[0].startswith(f"{name}.")):  # a table's name is short for its first key
        return found[0]
    if found:
        raise ValueError(f"{name} is in several tables; allowed: {', '.join(found)}")
    near = difflib.get_close_matches(name.split(".")[-1], {key.split(".")[-1]: 0 for key in keys}, 1, 0.5)
    likely = [key for key in keys if near and key.split(".")[-1] == near[0]]
    hint = f"did you mean {' or '.join(likely)}?" if likely else f"allowed: {', '.join(keys)}"
    raise ValueError(f"unknown key {name!r}; {hint}")


def parse_setting(
    value: Any,  # As read from TOML, or the text of a flag
) -> Any:  # A number, truth value, list or text
    "The value of a network setting, whose type is the network's affair."
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


def override(
    recipe: Recipe,  # A recipe
    changes: dict[str, Any],  # Values by key, as text or typed
) -> Recipe:  # The changed recipe
    "Replace values of a recipe by key."
    hints = recipe_keys()
    for name, value in changes.items():
        key = find_key(name)
        table, _, part = key.partition(".")
        if not part:
            recipe = replace(recipe, **{table: to_value(key, value, hints[key])})
            continue
        old = getattr(recipe, table)
        if part.startswith("settings."):
            new = replace(old, settings=old.settings | {part.removeprefix("settings."): parse_setting(value)})
        else:
            new = replace(old, **{part: to_value(key, value, hints[key])})
        recipe = replace(recipe, **{table: new})
    return recipe


def recipe_names() -> list[str]:
    "Names of the recipes that come with the package."
    return sorted(path.stem for path in RECIPE_FOLDER.glob("*.toml"))


def recipe_from(
    tables: dict[str, Any],  # Tables of keys, as in the TOML file
) -> Recipe:  # The recipe
    "A recipe out of nested dictionaries; the inverse of `dataclasses.asdict`."
    flat: dict[str, Any] = {}
    for table, values in tables.items():
        parts = {f"{table}.{key}": value for key, value in values.items()} if isinstance(values, dict) else None
        flat |= {table: values} if parts is None else parts
    settings = flat.pop("network.settings", {})
    if not isinstance(settings, dict):
        raise ValueError(f"network.settings = {settings!r}; allowed: a table")
    return override(Recipe(), flat | {f"network.settings.{key}": value for key, value in settings.items()})


def read_recipe(
    source: str | Path,  # A name out of recipe_names, or a TOML file
    changes: dict[str, Any] | None = None,  # Values that replace those of the file, by key
) -> Recipe:  # The recipe
    "Read a recipe; unknown names, keys and values of a wrong type are a `ValueError` of one line."
    import tomli

    path = RECIPE_FOLDER / f"{source}.toml" if str(source) in recipe_names() else Path(source)
    if not path.is_file():
        near = difflib.get_close_matches(str(source), recipe_names(), 3, 0.4) or recipe_names()
        raise ValueError(f"recipe = {str(source)!r}; allowed: a TOML file, or a name such as {', '.join(near)}")
    try:
        tables = tomli.loads(path.read_text(encoding="utf-8"))
    except (tomli.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"recipe {path} is not TOML: {error}") from None
    return override(recipe_from(tables), changes or {})


def describe_recipe(
    recipe: Recipe,  # A recipe
) -> str:  # TOML, with the meaning of every key
    "A recipe in full, defaults included, as a TOML file."
    meanings = key_meanings()
    note = lambda key: f"  # {meanings[key]}" if key in meanings else ""  # noqa: E731
    lines = [f"title = {to_toml(recipe.title)}{note('title')}"]
    for table, values in asdict(recipe).items():
        if isinstance(values, dict):
            plain = {key: value for key, value in values.items() if not isinstance(value, dict)}
            lines += ["", f"[{table}]"]
            lines += [f"{key} = {to_toml(value)}{note(f'{table}.{key}')}" for key, value in plain.items()]
            for key in values.keys() - plain:
                lines += ["", f"[{table}.{key}]{note(f'{table}.{key}')}"]
                lines += [f"{name} = {to_toml(part)}" for name, part in values[key].items()]
    return "\n".join(lines)


def to_toml(
    value: Any,  # A number, truth value, text or list of these
) -> str:  # As TOML writes it
    "One value as TOML; JSON agrees with it for all that a recipe holds."
    return json.dumps(list(value) if isinstance(value, tuple) else value, ensure_ascii=False)


PATHS: dict[str, Callable[[], Any]] = {
    "flow": FlowPath,
    "vp-linear": lambda: VPPath("linear"),
    "vp-cosine": lambda: VPPath("cosine"),
    "edm": EDMPath,
}


def take_images(
    data: ImageData,  # Images
    n: int,  # How many to keep, chosen at random but always the same
) -> ImageData:  # n of them
    "A part of a data set, for a quick trial."
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n].sort().values
    return replace(data, pixels=lambda indices: data.images(chosen[indices]), labels=data.labels[chosen])


def own_device() -> torch.device:
    "The accelerator of this process if there is one, else the CPU."
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    find_processes(device)  # where there are several, this points each at its own card
    return device


def is_main() -> bool:
    "Whether this is the process that writes files."
    return find_processes(own_device())[0] == 0


def main_only(
    action: Callable[[], Any],  # What one process should do, such as writing a file; calls no main_only itself
) -> Any:  # Its result, in every process
    "Let the main process act, and give every process the result or the error."
    return on_main(action, *find_processes(own_device()))


def latent_folder(
    recipe: Recipe,  # A recipe
) -> Path | None:  # Where its latents are, None for pictures
    "The folder of a source such as latents:FOLDER."
    kind, found, folder = recipe.data.source.partition(":")
    return Path(folder) if found and kind == "latents" else None


def make_latents(
    table: DataTable,  # What is learned
    folder: Path,  # Folder of latents
    split: str,  # Only "train" is there
) -> LatentData:
    "The latents of a recipe."
    if split != "train":
        raise ValueError(f"split = {split!r}; allowed: 'train', for latents are one set")
    data = load_latents(folder, flip=table.flip, limit=table.limit)
    side = data.index["settings"]["image"][1]
    if table.size not in (0, side):
        raise ValueError(f"data.size = {table.size}; allowed: {side}, of which {folder} is, or 0")
    return data


def make_data(
    recipe: Recipe,  # A recipe
    split: str = "train",  # "train" or "test"
) -> ImageData | LatentData:  # Its images
    "The images of a recipe, or their latents."
    table = recipe.data
    if (folder := latent_folder(recipe)) is not None:
        return make_latents(table, folder, split)
    if table.source in FILES:
        main_only(lambda: str(find_files(table.source)))  # one process downloads
    data = load_images(table.source, split, size=table.size or None, flip=table.flip and split == "train")
    return take_images(data, table.limit) if table.limit else data


def make_model(
    recipe: Recipe,  # A recipe
    shape: tuple[int, ...],  # Shape of one image, (channels, height, width)
    num_classes: int,  # Number of classes
) -> Any:  # A NetworkDenoiser, an ImageClassifier or a FlowPostprocessor, untrained
    "The untrained network of a recipe, the same on every call."
    table, method, seed = recipe.network, recipe.method, recipe.training.seed
    path = PATHS[check_choice("network.path", table.path, PATHS)]()
    check_choice("method.name", method.name, METHOD_NAMES)
    if method.name in ("classifier", "judge"):
        return ImageClassifier(table.name, shape, num_classes, path, seed=seed, **table.settings)
    if method.name == "flow_postprocessing":
        net = build_network(table.name, shape, num_classes, seed=seed, **table.settings)
        return FlowPostprocessor(shape, num_classes, dropout=method.dropout, net=net)
    aware = method.name == "model_guidance" and bool(method.scale_range)
    options: dict[str, Any] = {"scale_aware": aware, "seed": seed, **table.settings}
    return image_denoiser(table.name, shape, path, num_classes, table.prediction, **options)


class CleanLoss:
    "Cross-entropy of a classifier of clean images: the loss of a judge."

    def __call__(self, model: nn.Module, x0: Tensor, c: Tensor, context: Any) -> Tensor:
        "Per-sample losses `[batch]`."
        return nn.functional.cross_entropy(model(x0, torch.zeros((), device=x0.device)), c, reduction="none")


def as_pair(
    key: str,  # Name of the key, for the message
    values: tuple[float, ...],  # Its value
) -> tuple[float, float]:  # The same
    "Refuse a list of any other length with a `ValueError`."
    if len(values) != 2:
        raise ValueError(f"{key} = {list(values)}; allowed: two numbers, the lower first")
    return values[0], values[1]


def make_loss(
    recipe: Recipe,  # A recipe
) -> Callable:  # `loss(model, x0, c, context)`
    "The loss of a recipe, from the notebook of its method."
    method, path = recipe.method, PATHS[check_choice("network.path", recipe.network.path, PATHS)]()
    if method.name == "aligned_loss":
        return AlignedLoss(method.scale, method.anchor)
    if method.name == "model_guidance":
        options: dict[str, Any] = {"dropout": method.dropout, "start_step": method.start_step}
        choices = ("null", "contrastive", "uniform")
        options |= {"unconditional": check_choice("method.unconditional", method.unconditional, choices)}
        options |= {"interval": as_pair("method.interval", method.interval), "guided_share": method.guided_share}
        if method.scale_range:
            return ModelGuidanceLoss(scale_range=as_pair("method.scale_range", method.scale_range), **options)
        return ModelGuidanceLoss(mg_weight_from_scale(method.scale), **options)
    losses: dict[str, Callable] = {
        "plain": DenoisingLoss(method.dropout),
        "classifier": ClassifierLoss(path),
        "judge": CleanLoss(),
        "flow_postprocessing": PairLoss(),
    }
    return losses[check_choice("method.name", method.name, METHOD_NAMES)]


def recipe_shape(
    recipe: Recipe,  # A recipe
) -> tuple[tuple[int, ...], int]:  # Shape of one sample, number of classes
    "What a recipe trains on, without reading images; of latents that are not there yet, ImageNet's."
    known: dict[str, tuple[tuple[int, ...], int]] = {"mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10)}
    table, folder = recipe.data, latent_folder(recipe)
    if table.source in known:
        return known[table.source]
    if folder is None or (folder / INDEX).is_file():
        data = make_data(recipe)
        return tuple(data.shape), data.num_classes
    return (4, (table.size or 256) // 8, (table.size or 256) // 8), 1000


def recipe_cost(
    recipe: Recipe,  # A recipe that trains a denoiser
    gpus: tuple[int, ...] = (),  # Numbers of GPUs; none takes 1 and, if it divides the batch, 8
    chip: str = "h100",  # Their kind
    share: float = 0.35,  # Assumed share of the peak
) -> Any:  # A pandas table, see cost_sheet
    "GPU-hours and memory that a recipe will take: an estimate that assumes its share of the peak."
    method, training = recipe.method, recipe.training
    if method.name in ("classifier", "judge", "flow_postprocessing"):
        raise ValueError(f"method.name = {method.name!r}; allowed: methods that train a denoiser")
    shape, classes = recipe_shape(recipe)
    aware, loss = method.name == "model_guidance" and bool(method.scale_range), make_loss(recipe)
    precision = "fp32" if training.precision == "fp32" else "bf16"
    how = aware, precision, training.recompute
    cost = network_cost(recipe.network.name, shape, classes, *how, **recipe.network.settings)
    rows = count_loss_nfe(loss, steps=training.steps)
    counts = gpus or (1, 8)[: 1 if training.batch_size % (8 * training.accumulate) else 2]
    return cost_sheet(cost, rows, training.steps, training.batch_size, training.accumulate, counts, chip, share)


def check_recipe(
    recipe: Recipe,  # A recipe
) -> None:
    "Refuse a recipe that cannot be trained, before any work is done."
    method, training, sampling = recipe.method, recipe.training, recipe.sampling
    for key, value, least in (
        *(("data.limit", recipe.data.limit, 0), ("data.size", recipe.data.size, 0)),
        *(("training.steps", training.steps, 1), ("training.batch_size", training.batch_size, 1)),
        *(("training.grid_every", training.grid_every, 0), ("method.neighbours", method.neighbours, 1)),
        *(("sampling.sampler_steps", sampling.sampler_steps, 1), ("sampling.channels", sampling.channels, 0)),
        *(("method.auto_every", method.auto_every, 0), ("method.auto_samples", method.auto_samples, 4)),
    ):
        if value < least:
            raise ValueError(f"{key} = {value}; allowed: {least} or more")
    make_loss(recipe)
    make_engine(training)
    linear = ["linear"] if method.name in ("classifier", "judge") else []
    check_choice("network.name", recipe.network.name, [*linear, *IMAGE_NETWORKS])
    check_choice("sampling.sampler", sampling.sampler, [*SAMPLERS, "dopri5"])
    check_tracker(training.tracker or None, ".")
    if latent_folder(recipe) is not None and method.name in ("judge", "flow_postprocessing"):
        raise ValueError(f"method.name = {method.name!r}; allowed for latents: methods that need no clean pictures")
    if method.auto_every and (method.name != "model_guidance" or method.scale_range):
        raise ValueError("method.auto_every; allowed: 0, except for model_guidance without scale_range")
    if method.auto_every and latent_folder(recipe) is not None and not method.auto_reference:
        raise ValueError("method.auto_reference is empty; allowed for latents: real images, such as ADM's statistics")
    if method.name == "flow_postprocessing" and not method.samples:
        raise ValueError("method.samples is empty; allowed: sample files, of `guidance-nb sample` or made elsewhere")


def check_folder(
    name: str,  # Name of the argument, for the message
    folder: Path,  # Where something will be written; made here
) -> Path:  # The same
    "Refuse a folder that cannot be written to, before any work is done."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        reason = f"cannot be written ({error.strerror})"
        raise ValueError(f"{name} = {str(folder)!r} {reason}; allowed: a writable folder") from None
    return folder


def make_engine(
    table: TrainingTable,  # Settings of a run
    folder: Path | None = None,  # Where checkpoints go
    metadata: dict[str, Any] | None = None,  # What they say of the run
) -> Engine:  # For fit
    "The engine of a run."
    same = ("precision", "compile", "channels_last", "warmup", "weight_decay", "save_every", "keep")
    options: dict[str, Any] = {name: getattr(table, name) for name in same}
    options |= {"gradient_accumulation_steps": table.accumulate, "gradient_checkpointing": table.recompute}
    options |= {"folder": folder, "cuda_graphs": table.graphs, "metadata": metadata or {}, "may_change": MAY_CHANGE}
    return Engine(clip=table.clip or None, tracker=table.tracker or None, **options)


def read_generated(
    files: tuple[str, ...],  # Sample files or folders of images
    shape: tuple[int, ...],  # Shape that one image must have
    num_classes: int,  # Number of classes
) -> tuple[Tensor, Tensor | None]:  # Images `[n, ...]` in [-1, 1] and their classes `[n]`, None if no file has any
    "Read samples made here or elsewhere, several files one after the other."
    if not files:
        raise ValueError("method.samples is empty; allowed: sample files, of `guidance-nb sample` or made elsewhere")
    parts = [load_samples(name, size=shape[-1], channels=shape[0]) for name in files]
    labelled = [part.c is not None for part in parts]
    if any(labelled) != all(labelled):
        raise ValueError(
            f"{files[labelled.index(False)]} has no labels and {files[labelled.index(True)]} has; allowed: all or none"
        )
    x = from_uint8(torch.cat([part.x for part in parts]))
    c = torch.cat([part.c for part in parts if part.c is not None]) if all(labelled) else None
    return x, None if c is None else check_labels(c, num_classes, len(x))


def read_pairs(
    recipe: Recipe,  # A recipe of "flow_postprocessing"
    data: ImageData,  # Its real images
) -> PairDraws:  # `draw(n, generator)` of pairs
    "Samples of a recipe, each with its nearest real images."
    method = recipe.method
    x, c = read_generated(method.samples, data.shape, data.num_classes)
    real = from_uint8(data.images(torch.arange(len(data))))
    space = feature_space(method.space, method.weights or None)
    labels = None if c is None else data.labels
    return pair_data(x, real, c, labels, method.neighbours, space, device=own_device())


def make_training(
    recipe: Recipe,  # A recipe
    data: Any,  # Its images or latents
) -> tuple[Any, Any, tuple[str, ...]]:  # Untrained model, data for fit, names of the classes the model knows
    "What a recipe trains on what."
    if recipe.method.name != "flow_postprocessing":
        return make_model(recipe, data.shape, data.num_classes), data, data.classes
    pairs = read_pairs(recipe, data)
    classes = () if pairs.labels is None else data.classes
    net = make_model(recipe, data.shape, len(classes)).net
    return FlowPostprocessor.from_pairs(pairs, len(classes), net=net, dropout=recipe.method.dropout), pairs, classes


def require_compiler() -> None:
    "Refuse to compile where that does not work with a `ValueError`: it is the choice of a recipe or a flag."
    try:
        check_compiler()
    except RuntimeError as error:
        raise ValueError(str(error)) from None


LATER_KEYS = (
    *("data.vae", "method.guided_share", "method.unconditional", "sampling.channels", "training.recompute"),
    "training.graphs",
    *("method.auto_every", "method.auto_samples", "method.auto_features", "method.auto_reference"),
)


def recorded(
    recipe: Recipe,  # A recipe
) -> dict[str, Any]:  # Tables of keys
    "A recipe as a checkpoint keeps it: keys added since the first release only where they differ from their default."
    tables, usual = asdict(recipe), asdict(Recipe())
    for table, key in (name.split(".") for name in LATER_KEYS):
        if tables[table][key] == usual[table][key]:
            del tables[table][key]
    return tables


def latent_facts(
    data: Any,  # What is trained on
) -> dict[str, Any]:  # For the checkpoint; nothing for pictures
    "What a model of latents must remember: shape of the pictures, and the autoencoder."
    if not isinstance(data, LatentData):
        return {}
    return {"latents": {"vae": data.index["vae"], "settings": {"image": data.index["settings"]["image"]}}}


def find_vae(
    recipe: Recipe,  # A recipe for latents
    index: dict[str, Any],  # The index of its latents, or what a checkpoint kept of it
    source: str = "",  # An autoencoder to take instead
) -> Any:  # The autoencoder that decodes
    "The autoencoder of a recipe; one whose factor, shift or channels differ from the encoding's is a `ValueError`."
    known = index["vae"]
    name = source or recipe.data.vae or known["name"]
    if not name:
        raise ValueError("the latents were encoded by a nameless autoencoder; allowed: data.vae or --vae, its folder")
    vae = load_vae(name)
    config = dict(zip(("factor", "shift"), latent_constants(vae.config)))
    for key, found in (config | {"latent_channels": vae.config.latent_channels}).items():
        if found != known[key]:
            raise ValueError(f"{name} has {key} = {found}; allowed: {known[key]}, as the latents were encoded with")
    return vae


MAY_CHANGE = (
    *(
        "recipe.title",
        "recipe.sampling",
        "recipe.data.vae",
        "recipe.training.steps",
    ),  # whether more steps may follow is for `fit` to say
    *(f"recipe.training.{key}" for key in ("save_every", "keep", "grid_every", "tracker", "precision", "compile")),
    *(f"recipe.training.{key}" for key in ("channels_last", "accumulate", "recompute", "graphs")),
)


def train_recipe(
    recipe: Recipe,  # What to train
    folder: str | Path,  # Where checkpoints and grids go; a run in it is continued
    progress: bool = True,  # Whether to show a progress bar
) -> Iterator[State]:
    "Train a recipe, from the newest intact checkpoint if there is one, and yield every state of `fit`."
    check_recipe(recipe)
    if (latents := latent_folder(recipe)) is not None:
        read_index(latents)  # refused before a folder is made
    folder, data, table = check_folder("out", Path(folder)), make_data(recipe), recipe.training
    if table.compile:
        require_compiler()
    model, source, classes = make_training(recipe, data)
    facts = {"recipe": recorded(recipe), "shape": list(data.shape), "classes": list(classes)} | latent_facts(data)
    if table.grid_every and isinstance(data, LatentData):
        find_vae(recipe, data.index)  # rather now than at the first grid
    same = ("steps", "batch_size", "lr", "schedule", "ema", "seed")
    options: dict[str, Any] = {name: getattr(table, name) for name in same}
    options |= {"engine": make_engine(table, folder, facts), "progress": progress, "description": recipe.method.name}
    loss = measured_loss(recipe, data) if recipe.method.auto_every else make_loss(recipe)
    for state in fit(model, loss, source, **options):
        if table.grid_every and state.step % table.grid_every == 0 and is_main():
            save_grid(recipe, state.ema, data, folder / f"grid-{state.step:08d}.png")
        yield state


@dataclass
class Trained:
    "A network with the recipe it was trained from."

    model: Any  # A `NetworkDenoiser`, an `ImageClassifier` or a `FlowPostprocessor`, ready to use
    recipe: Recipe  # What it was trained from
    shape: tuple[int, ...]  # Shape of one image
    classes: tuple[str, ...]  # Names of the classes
    step: int  # Training steps done
    path: Path  # Where it was read
    ema: bool = True  # Whether its weights are the moving average
    latents: dict[str, Any] | None = None  # For a model of latents: the autoencoder and the shape of pictures

    @property
    def image_shape(self) -> tuple[int, ...]:
        "Shape of one picture."
        return self.shape if self.latents is None else tuple(self.latents["settings"]["image"])


def load_trained(
    source: str | Path,  # A checkpoint, or a folder of them, whose newest intact one is taken
    ema: bool = True,  # Whether to take the moving average of the weights
) -> Trained:  # On the accelerator if there is one
    "Rebuild a trained network from its checkpoint."
    folder = Path(source)
    path = folder if (folder / "checkpoint.json").is_file() else read_checkpoint(folder).path
    saved = read_checkpoint(path)
    if not {"recipe", "shape", "classes"} <= set(saved.metadata):
        raise ValueError(f"{path} holds no recipe; allowed: checkpoints of `guidance-nb train`")
    try:
        recipe = recipe_from(saved.metadata["recipe"])
    except ValueError as error:
        by = saved.record["versions"]["guidance_nb"]
        raise ValueError(f"{path} holds a recipe of another version ({by}): {error}") from None
    if recipe.method.auto_every:  # the scale that its weight has reached
        reached = scale_from_mg_weight(saved.record["loss_state"]["weight"]["value"])
        recipe = override(recipe, {"method.scale": reached})
    shape, classes = tuple(saved.metadata["shape"]), tuple(saved.metadata["classes"])
    model = make_model(recipe, shape, len(classes))
    load_weights(model, saved.ema if ema else saved.model, str(path))
    model.to(own_device()).eval().requires_grad_(False)
    return Trained(model, recipe, shape, classes, saved.step, path, ema, saved.metadata.get("latents"))


def check_kind(
    trained: Trained,  # A trained network
    *kinds: str,  # Methods that will do
) -> Trained:  # The same
    "Refuse a network of another kind, such as a classifier where a denoiser is needed, with a `ValueError`."
    name = trained.recipe.method.name
    if name not in kinds:
        raise ValueError(f"{trained.path} was trained by method {name!r}; allowed: {', '.join(map(repr, kinds))}")
    return trained


def default_scale(
    trained: Trained,  # A trained denoiser
) -> float:  # Its scale unless asked otherwise
    "The scale of the recipe; that of a Model-guidance network without scale input is built in."
    method = trained.recipe.method
    built_in = method.name == "model_guidance" and not method.scale_range
    return method.scale if built_in else trained.recipe.sampling.guidance_scale


def guided(
    trained: Trained,  # A trained denoiser
    scale: float | None = None,  # Guidance scale; 1 is the conditional model; None takes default_scale
    classifier: Trained | None = None,  # Guide by this classifier instead of by the null label
    interval: tuple[float, float] = (0.0, 1.0),  # Times that classifier-free guidance guides
    channels: int = 0,  # First channels that classifier-free guidance guides; 0 guides all
) -> Denoiser:  # The model to sample from
    "A trained model at a guidance scale, by the method it was trained for."
    method = check_kind(trained, "plain", "aligned_loss", "model_guidance").recipe.method
    scale = default_scale(trained) if scale is None else float(check_scales(scale))
    if check_interval(interval) != (0, 1) and (classifier is not None or method.name == "model_guidance"):
        raise ValueError(f"interval = {interval}; allowed: (0, 1), for only classifier-free guidance can pause")
    if channels and (classifier is not None or method.name == "model_guidance" or not 0 < channels <= trained.shape[0]):
        most = f"0 to {trained.shape[0]}, and only for classifier-free guidance"
        raise ValueError(f"channels = {channels}; allowed: {most}")
    if classifier is not None:
        if trained.shape != check_kind(classifier, "classifier").shape or trained.classes != classifier.classes:
            raise ValueError(f"{classifier.path} is for other images or classes than {trained.path}; allowed: the same")
        if trained.model.path != classifier.model.path:
            paths = (f"{each.path} is on {each.model.path}" for each in (classifier, trained))
            raise ValueError(f"{' and '.join(paths)}; allowed: one path, since noise must mean the same to both")
        return ClassifierGuidance(trained.model, classifier.model, scale)
    if method.name != "model_guidance":
        by_channel = dit_channel_scales(scale, trained.shape[0], channels)[:, None, None] if channels else scale
        return ClassifierFreeGuidance(trained.model, by_channel, interval)
    if method.scale_range:
        return FixedScale(trained.model, scale)
    if scale != method.scale:
        raise ValueError(f"scale = {scale:g}; allowed: {method.scale:g}, which {trained.path} was trained for")
    return trained.model


@torch.no_grad()
def save_grid(
    recipe: Recipe,  # The recipe in training
    model: Any,  # Its moving average
    data: Any,  # Its images or latents
    file: Path,  # PNG file to write
    rows: int = 4,  # Images of each class
) -> None:
    "Draw a few samples of every class, the same noise every time, one class a column; a classifier has none to draw."
    from torchvision.utils import save_image

    if not isinstance(model, Denoiser):
        return
    classes = min(10, data.num_classes)
    c, table = torch.arange(rows * classes) % classes, recipe.sampling
    view = guided(Trained(model, recipe, data.shape, data.classes, 0, file))
    seed = recipe.training.seed
    x = sample(view, c, data.shape, table.sampler, table.sampler_steps, seed=seed, progress=False)
    if isinstance(data, LatentData):
        x = from_uint8(decode(find_vae(recipe, data.index), x))
    temporary = file.with_suffix(".tmp.png")
    save_image((x.clamp(-1, 1) + 1) / 2, temporary, nrow=classes, padding=1)
    os.replace(temporary, file)


def read_labels(
    text: str,  # "balanced", or class numbers or names separated by commas, used in turn
    n: int,  # Number of samples
    classes: tuple[str, ...],  # Names of the classes
) -> Tensor:  # Labels `[n]`
    "The labels of samples to draw; balanced is 0, 1, ..., 0, 1, ..."
    if not isinstance(n, int) or n < 1:
        raise ValueError(f"n = {n}; allowed: a whole number, 1 or more")
    names = [str(i) for i in range(len(classes))]
    chosen = []
    for part in names if text == "balanced" else text.split(","):
        if part not in names and part not in classes:
            raise ValueError(
                f"labels contains {part!r}; allowed: 'balanced', 0 to {len(classes) - 1}, or {', '.join(classes[:10])}"
            )
        chosen.append(classes.index(part) if part in classes else int(part))
    return torch.tensor(chosen).repeat(-(-n // len(chosen)))[:n]


@dataclass(frozen=True)
class Request:
    "What to draw from a trained model; together with the model it decides every sample."

    n: int = 1000  # Number of samples
    labels: str = "balanced"  # See `read_labels`
    scale: float | None = None  # Guidance scale; None takes `default_scale`
    sampler: str = ""  # A key of `SAMPLERS`, or "dopri5"; empty takes the recipe's
    steps: int = 0  # Steps of the sampler; 0 takes the recipe's
    seed: int = 0  # Seed of the noise; sample i depends on (seed, i) alone
    interval: tuple[float, float] = (0.0, 1.0)  # Times at which classifier-free guidance guides
    precision: str = "fp32"  # "fp32", "bf16", or "auto"
    compile: bool = False  # Whether to compile the network
    batch_size: int = 256  # Samples at a time; never changes a sample
    channels: int | None = None  # First channels that classifier-free guidance guides; None takes the recipe's
    vae: str = ""  # For latents: the autoencoder that decodes; empty takes the recipe's


def complete_request(
    trained: Trained,  # A trained denoiser
    request: Request,  # What to draw from it
    classifier: Trained | None = None,  # Guide by this classifier
) -> Request:  # With the recipe's scale, sampler and steps where none are given
    "Fill in what the recipe says, and refuse what cannot be drawn, before any work is done."
    table = trained.recipe.sampling
    scale = default_scale(trained) if request.scale is None else float(check_scales(request.scale))
    request = replace(request, scale=scale, sampler=request.sampler or table.sampler)
    request = replace(request, steps=request.steps or table.sampler_steps)
    request = replace(request, channels=table.channels if request.channels is None else request.channels)
    check_choice("precision", request.precision, ("fp32", "bf16", "auto"))
    check_choice("sampler", request.sampler, [*SAMPLERS, "dopri5"])
    if request.batch_size < 1:
        raise ValueError(f"batch_size = {request.batch_size}; allowed: 1 or more")
    read_labels(request.labels, request.n, trained.classes)
    view = guided(trained, scale, classifier, request.interval, request.channels or 0)
    time_grid(view.path, request.steps, request.sampler)
    if trained.latents is not None:
        find_vae(trained.recipe, trained.latents, request.vae)
    elif request.vae:
        raise ValueError(f"vae = {request.vae!r}; allowed: none, for {trained.path} was trained on pictures")
    return request


@contextmanager
def prepared(
    trained: Trained,  # A trained network, used inside the block
    precision: str,  # "fp32", "bf16" or "auto"
    compile: bool,  # Whether to compile it
) -> Iterator[None]:
    "Run a network in another precision, and compiled."
    device = next(trained.model.parameters()).device
    low = choose_precision(precision, device) == "bf16"
    net = getattr(trained.model, "net", trained.model)
    if compile and net._compiled_call_impl is None:
        require_compiler()
        net.compile()
    with torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
        yield


def draw(
    trained: Trained,  # A trained denoiser
    request: Request,  # What to draw
    classifier: Trained | None = None,  # Guide by this classifier
    progress: bool = True,  # Whether to show a progress bar
) -> SampleFile:  # Images `[n, ...]` uint8, classes `[n]`, and the facts of their making
    "Draw samples, on all processes if there are several; latents are decoded, their pictures are in the main process."
    request = complete_request(trained, request, classifier)
    model = guided(trained, request.scale, classifier, request.interval, request.channels or 0)
    c, start = read_labels(request.labels, request.n, trained.classes), time.perf_counter()
    device = next(trained.model.parameters()).device
    rank, world = find_processes(device)
    own = len(torch.arange(request.n).tensor_split(world)[rank])
    with prepared(trained, request.precision, request.compile), count_nfe() as rows:
        options: dict[str, Any] = {"seed": request.seed, "batch_size": request.batch_size, "progress": progress}
        x = sample_sharded(model, request.n if c is None else c, trained.shape, sampler=request.sampler, steps=request.steps, **options)
    facts = asdict(request) | {"nfe": rows.total / own}
    del facts["precision"]  # in tables, precision is a metric
    facts = {key: value for key, value in facts.items() if key not in ("channels", "vae") or value}
    facts |= {"arithmetic": choose_precision(request.precision, device)}
    facts |= {"seconds": round(time.perf_counter() - start, 3), "checkpoint": str(trained.path), "step": trained.step}
    facts |= {"method": trained.recipe.method.name, "classifier": str(classifier.path) if classifier else ""}
    facts |= {"training_seed": trained.recipe.training.seed} | ({} if trained.ema else {"ema": False})
    if trained.latents is None:
        return SampleFile(to_uint8(torch.as_tensor(x).float().cpu()), c, facts)
    vae = find_vae(trained.recipe, trained.latents, request.vae)
    images = decode_all(vae, torch.as_tensor(x).float(), min(32, request.batch_size), progress)
    facts["seconds"] = round(time.perf_counter() - start, 3)
    return SampleFile(images, c, facts)


def find_feature_extractor(
    source: str,  # "inception-v3-compat", "resnet20", "resnet56", or a checkpoint of a judge or classifier
    weights: str | None = None,  # Local file with the weights of a named network
    metrics: tuple[str, ...] | None = None,  # What it is for
) -> Extractor:  # For extract
    "The network that looks at images, by name or from a checkpoint."
    if not Path(source).exists():
        return find_extractor(source, weights, metrics)
    trained = check_kind(load_trained(source), "judge", "classifier")
    if trained.latents is not None:
        raise ValueError(f"{source} was trained on latents; allowed: a judge or classifier of pictures")
    device = next(trained.model.parameters()).device

    def layers(images: Tensor) -> dict[str, Tensor]:
        x = from_uint8(images[:, : trained.shape[0]])  # grey images come with three equal channels
        if x.shape[1:] != trained.shape:
            found = f"images are {tuple(x.shape[1:])}"
            raise ValueError(f"{found}; allowed: {trained.shape}, which {source} was trained on")
        if trained.shape[0] == 1 and not torch.equal(images[:, :1].expand_as(images), images):
            raise ValueError(f"images have colours; allowed: grey ones, which {source} was trained on")
        features = trained.model.features(x, torch.zeros((), device=device))
        return {"features": features, "logits": trained.model.head(features)}

    return Extractor(trained.recipe.method.name, layers, device)


def load_real(
    source: str,  # "mnist", "cifar10", a folder of images, an .npz of images, or an ADM statistics file
    split: str = "train",  # "train" or "test", of a published data set
    shape: tuple[int, ...] | None = None,  # Shape of the images to compare with, to whose size a folder is brought
) -> tuple[Tensor | Reference, Tensor | None, str]:  # Images or statistics, labels, and a name for tables
    "Real images to compare with."
    path = Path(source)
    if source in FILES:
        data, name = load_images(source, split), f"{source} {split}"
        real = SampleFile(data.images(torch.arange(len(data))), data.labels, {})
    elif path.suffix == ".npz" and path.is_file() and holds_moments(path):
        return read_reference(path), None, path.name
    else:
        square = shape[-1] if shape and shape[-1] == shape[-2] and path.is_dir() else None
        real, name = load_samples(path, size=square), path.name
    if shape and tuple(real.x.shape[2:]) != tuple(shape[1:]):
        sizes = " and ".join("x".join(map(str, size)) for size in (shape[1:], real.x.shape[2:]))
        raise ValueError(f"samples and reference have {sizes} pixels; allowed: one size, since resizing changes all")
    return real.x, real.c, name


def holds_moments(
    path: Path,  # An .npz file
) -> bool:
    "Whether a file is meant to hold ADM's statistics: moments, or at least no images."
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
    except zipfile.BadZipFile:
        return False
    return "mu" in names or "arr_0" not in names


def choose_metrics(
    real: Tensor | Reference,  # What will be compared with
    eyes: Extractor,  # The network that looks
    metrics: tuple[str, ...] | None = None,  # Names, or all that these two allow
    best: str = "",  # Column that somebody will ask for
) -> tuple[str, ...]:  # Names for score
    "The metrics of a comparison; a column that they do not give is refused."
    names = check_metrics(metrics, eyes.name)
    if isinstance(real, Reference) and metrics is None:
        lacking = set() if real.images is not None else {"kd", "precision", "recall"}
        lacking |= set() if "spatial" in real.moments else {"sfd"}
        names = [name for name in names if name not in lacking]
    columns = [column(name, eyes.name) for name in names]
    columns += [] if eyes.name == INCEPTION else [f"agreement_{eyes.name}"]
    if best:
        check_choice("best", best, columns)
    return tuple(names)


def keep_neighbours(
    reference: Features,  # Features of real images
    n: int = 10_000,  # Rows to keep
    seed: int = 0,  # Of their choice
) -> Features:  # Moments of all images, rows of n
    "A reference of which only some rows are kept, for the metrics whose cost grows with the square of their number."
    total = min((len(rows) for rows in reference.rows.values()), default=0)
    if total <= n:
        return reference
    moments = {layer: reference.moment(layer) for layer in reference.rows if layer != "logits"}
    chosen = torch.randperm(total, generator=torch.Generator().manual_seed(seed))[:n]
    return replace(reference, rows={layer: rows[chosen] for layer, rows in reference.rows.items()}, moments=moments)


def extract_reference_features(
    source: str,  # See load_real
    split: str,  # "train" or "test"
    shape: tuple[int, ...],  # Shape of the samples
    eyes: Extractor,  # The network that looks
    metrics: tuple[str, ...] | None = None,  # See choose_metrics
    best: str = "",  # See choose_metrics
    progress: bool = True,  # Whether to show a progress bar
) -> tuple[Features, tuple[str, ...]]:  # Features, which only the main process needs and has; and names of metrics
    "Features of real images, and the metrics they allow."
    seen = [Features(eyes.name)]

    def look() -> tuple[str, ...]:
        real, _, name = load_real(source, split, shape)
        chosen = choose_metrics(real, eyes, metrics, best)
        seen[0] = keep_neighbours(extract(real, eyes, name, 256, progress, chosen))
        return chosen

    chosen = main_only(look)
    return seen[0], chosen


def score(
    file: SampleFile,  # Samples, their labels and facts
    reference: Features,  # Features of the real images
    eyes: Extractor,  # The network that looks
    metrics: tuple[str, ...] | None = None,  # Names, or all that are usual for the network
    batch_size: int = 256,  # Images per call of the network
    progress: bool = False,  # Whether to show a progress bar
    seen: Features | None = None,  # What the eyes saw of the samples, see extract_sharded; None to look now
) -> dict[str, Any]:  # One row of a table
    "Score samples: all metrics of one look, class agreement if the network classifies, and the facts of their making."
    if reference.size and tuple(file.x.shape[2:]) != tuple(reference.size):
        sizes = " and ".join("x".join(map(str, size)) for size in (file.x.shape[2:], reference.size))
        raise ValueError(f"samples and reference have {sizes} pixels; allowed: one size, since resizing changes all")
    seen = extract(file.x, eyes, "samples", batch_size, progress) if seen is None else seen
    facts = dict(file.facts or {})
    interval = tuple(facts.get("interval", (0, 1)))
    facts["interval"] = "" if interval == (0, 1) else ",".join(map(str, interval))
    made = (facts.get("sampler", ""), facts.get("steps", 0), facts.get("scale", math.nan), facts.get("seed", 0))
    row = provenance(seen, reference, *made, facts.get("labels", "as given" if file.c is not None else "none"))
    plain = {key: value for key, value in facts.items() if isinstance(value, int | float | str)}
    row |= {key: value for key, value in plain.items() if key not in row and (key != "interval" or value)}
    row |= feature_scores(seen, reference, metrics)
    if file.c is not None and eyes.name != INCEPTION and "logits" in seen.rows:
        row[f"agreement_{eyes.name}"] = (seen.rows["logits"].argmax(1) == file.c).double().mean().item()
    return row


METRICS = ("fd", "sfd", "kd", "score", "fid", "sfid", "kid", "is", "precision", "recall", "agreement")
HIGHER = ("precision", "recall", "agreement", "is", "score")  # better if higher; all others are distances


def is_metric(
    name: str,  # Name of a column
) -> bool:
    "Whether a column holds a metric, such as fid or recall_judge."
    return name.split("_")[0] in METRICS


def baseline_size(
    source: str,  # Where the reference came from, see load_real
    reference: Features,  # Features of the reference
    n: int,  # Number of samples to compare with
) -> tuple[str, int]:  # The other split of a published data set, or "", and how many images there are for the row
    "What can stand for real images that are not in the reference."
    for split, other, total in (("train", "test", 10_000), ("test", "train", 50_000)):
        if source in FILES and reference.name == f"{source} {split}":
            return other, min(n, total)
    total = min((len(rows) for rows in reference.rows.values()), default=0)
    return "", min(n, total // 2)


def baseline_row(
    source: str,  # Where the reference came from, see load_real
    reference: Features,  # Features of the reference
    eyes: Extractor,  # The network that looks
    n: int,  # Number of samples to compare with
    metrics: tuple[str, ...] | None = None,  # As for score
) -> dict[str, Any] | None:  # A row of method "real", or None where there are no other real images
    "How n real images score that are not in the reference: the other split, or one half of the reference on the other."
    other, n = baseline_size(source, reference, n)
    order = lambda total: torch.randperm(total, generator=torch.Generator().manual_seed(0))  # noqa: E731
    if other:
        data = load_images(source, other)
        chosen = order(len(data))[:n]
        facts = {"method": "real", "labels": "as they are"}
        return score(SampleFile(data.images(chosen), data.labels[chosen], facts), reference, eyes, metrics)
    if n < 4:
        return None
    whole = order(min(len(rows) for rows in reference.rows.values()))
    one, two = reference.take(whole[:n]), reference.take(whole[n : 2 * n])
    row = provenance(one, two, "", 0, math.nan, 0, "as they are") | {"method": "real"}
    return row | {"reference_checksum": reference.checksum} | feature_scores(one, two, metrics)


class MeasuredGuidanceLoss:
    "Model-guidance with a weight moved every so many steps by an error of the moving average (arXiv 2502.12154)."

    changes = True  # from step to step

    def __init__(
        self,
        loss: ModelGuidanceLoss,  # The loss at any weight
        measure: Callable[[Any], float],  # Error of a model; lower is better
        every: int,  # Steps between two moves
    ):
        self.auto, self.measure, self.every, self.seen = AutoWeight(), measure, every, 0
        self.loss = replace(loss, weight=self.auto)

    def __call__(self, model: Any, x0: Tensor, c: Tensor, context: Any) -> Tensor:
        "Per-sample losses `[batch]`."
        if context.step >= max(1, self.loss.start_step) and context.step % self.every == 0 and context.step > self.seen:
            self.seen = context.step
            self.auto.update(self.measure(context.ema))
        return self.loss(model, x0, c, context)

    def state_dict(self) -> dict[str, Any]:
        "What a checkpoint keeps."
        return {"weight": asdict(self.auto), "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        "Go on from a checkpoint."
        self.auto, self.seen = AutoWeight(**state["weight"]), state["seen"]
        self.loss = replace(self.loss, weight=self.auto)


def measured_loss(
    recipe: Recipe,  # A recipe of "model_guidance" with `auto_every`
    data: Any,  # Its images or latents
) -> MeasuredGuidanceLoss:
    "The loss whose weight follows the Fréchet distance of samples."
    table, folder = recipe.method, Path("the run in training")
    eyes = find_feature_extractor(table.auto_features)
    metrics, best = ("fid" if eyes.name == INCEPTION else "fd",), column("fd", eyes.name)
    kept = latent_facts(data).get("latents")
    blank = Trained(None, recipe, data.shape, data.classes, 0, folder, latents=kept)
    source = table.auto_reference or recipe.data.source
    real, names = extract_reference_features(source, "train", blank.image_shape, eyes, metrics, best, progress=False)

    def measure(model: Any) -> float:
        file = draw(replace(blank, model=model), Request(n=table.auto_samples), progress=False)
        return main_only(lambda: float(score(file, real, eyes, names)[best]))

    return MeasuredGuidanceLoss(make_loss(recipe), measure, table.auto_every)  # type: ignore[arg-type]


def postprocess(
    trained: Trained,  # A correction
    file: SampleFile,  # Samples, from anywhere
    steps: int = 8,  # Steps of the correction
    sampler: str = "heun",  # "euler", "heun" or "dopri5"
    scale: float = 1.0,  # Guidance scale of the correction itself
    batch_size: int = 256,  # Samples at a time
    progress: bool = True,  # Whether to show a progress bar
) -> SampleFile:  # Corrected samples, with the facts of both makings
    "Carry samples to where real ones are, with a trained correction."
    check_kind(trained, "flow_postprocessing")
    if tuple(file.x.shape[1:]) != trained.shape:
        raise ValueError(f"samples have shape {tuple(file.x.shape[1:])}; allowed: {trained.shape}, as {trained.path}")
    start, labels = time.perf_counter(), file.c if trained.model.num_classes else None
    with count_nfe() as rows:
        x = trained.model(from_uint8(file.x), labels, steps, sampler, scale, batch_size, progress)
    facts = dict(file.facts or {})
    facts |= {"correction": str(trained.path), "correction_steps": steps, "correction_sampler": sampler}
    facts |= {"correction_scale": scale, "nfe": facts.get("nfe", 0.0) + rows.total / len(x)}
    facts["seconds"] = round(facts.get("seconds", 0.0) + time.perf_counter() - start, 3)
    return SampleFile(to_uint8(x), file.c, facts)


def sweep_points(
    request: Request,  # What all points share
    scales: tuple[float, ...],  # Guidance scales
    steps: tuple[int, ...],  # Steps; empty takes those of `request`
    samplers: tuple[str, ...],  # Samplers; empty takes that of `request`
) -> list[Request]:  # One for each combination
    "The points of a sweep."
    for name, values in (("scales", scales), ("steps", steps), ("samplers", samplers)):
        if len(set(values)) < len(values) or (name == "scales" and not values):
            raise ValueError(f"{name} = {values}; allowed: one or more, each once")
    for sampler in samplers:
        check_choice("sampler", sampler, [*SAMPLERS, "dopri5"])
    return [
        replace(request, scale=scale, steps=n, sampler=sampler)
        for sampler in samplers or (request.sampler,)
        for n in steps or (request.steps,)
        for scale in scales
    ]


def same_value(
    one: Any,  # Text out of a table, or a value
    other: Any,  # The same
) -> bool:
    "Whether two values are equal, as text or as numbers: 2 and 2.0 are one scale."
    try:
        return str(one) == str(other) or float(one) == float(other)
    except (TypeError, ValueError):
        return False


def has_facts(
    row: dict[str, Any],  # A row of a table
    wanted: dict[str, Any],  # Facts, such as those of point_facts
) -> bool:
    "Whether a row has these facts."
    return all(same_value(row.get(key, ""), value) for key, value in wanted.items())


def is_done(
    file: Path,  # Table of finished points
    wanted: dict[str, Any],  # Facts that identify a point
) -> bool:
    "Whether a table has a row with these facts."
    rows = read_rows(file)[1] if file.exists() else []
    return any(has_facts(row, wanted) for row in rows)


def point_facts(
    trained: Trained,  # A trained denoiser
    point: Request,  # One point, complete
    reference: Features,  # Features of the real images
    classifier: Trained | None = None,  # What guides
) -> dict[str, Any]:  # Column -> value
    "What identifies a point in a table."
    names = ("scale", "steps", "sampler", "seed", "n", "labels")
    device = next(trained.model.parameters()).device
    facts: dict[str, Any] = {name: getattr(point, name) for name in names}
    facts |= {"checkpoint": trained.path, "step": trained.step, "training_seed": trained.recipe.training.seed}
    facts |= {"classifier": classifier.path if classifier else "", "extractor": reference.extractor}
    facts |= {"arithmetic": choose_precision(point.precision, device)}
    facts |= {"channels": point.channels} if point.channels else {}
    return facts | {"reference_checksum": reference.checksum}


def sweep(
    trained: Trained,  # A trained denoiser
    points: list[Request],  # See sweep_points
    reference: Features,  # Features of the real images; see extract_reference_features
    eyes: Extractor,  # The network that looks
    out: Path,  # Folder for rows.csv; finished points in it are kept
    classifier: Trained | None = None,  # Guide by this classifier
    correction: Trained | None = None,  # Score the corrected samples, too
    progress: bool = True,  # Whether to show progress bars
    source: str = "",  # Where the reference came from, for baseline_row
    metrics: tuple[str, ...] | None = None,  # As for score
) -> Iterator[dict[str, Any]]:
    "Draw and score point after point; yields the rows as they are made, that of real images first."
    file = out / "rows.csv"
    points = [complete_request(trained, point, classifier) for point in points]
    most = max(point.n for point in points)
    if (floor := main_only(lambda: add_baseline(file, source, reference, eyes, most, metrics))) is not None:
        yield floor
    for point in points:
        wanted = point_facts(trained, point, reference, classifier)
        missing = main_only(partial(missing_parts, file, wanted, correction))
        if not missing:
            continue
        drawn = draw(trained, point, classifier, progress)
        for part in missing:
            repair = correction if part else None
            yield add_row(file, drawn, repair, reference, eyes, metrics, progress)


def add_baseline(
    file: Path,  # Table of a sweep
    source: str,  # See baseline_row
    reference: Features,  # Features of the real images
    eyes: Extractor,  # The network that looks
    n: int,  # Number of samples to compare with
    metrics: tuple[str, ...] | None,  # As for score
) -> dict[str, Any] | None:  # The row, or None if it is there or cannot be had
    "Write the row of real images, once."
    wanted = {"method": "real", "n": baseline_size(source, reference, n)[1], "extractor": reference.extractor}
    if is_done(file, wanted | {"reference_checksum": reference.checksum}):
        return None
    row = baseline_row(source, reference, eyes, n, metrics)
    if row is not None:
        append_rows(file, [row])
    return row


def missing_parts(
    file: Path,  # Table of a sweep
    wanted: dict[str, Any],  # What identifies the point
    correction: Trained | None,  # What corrects
) -> list[str]:  # "" for the samples as drawn, the correction's path for the corrected ones
    "What of a point a table does not hold yet."
    parts = [""] if correction is None else ["", str(correction.path)]
    return [part for part in parts if not is_done(file, wanted | {"correction": part})]


def add_row(
    file: Path,  # Table of a sweep
    drawn: SampleFile,  # Samples of a point
    correction: Trained | None,  # Correct them first
    reference: Features,  # Features of the real images
    eyes: Extractor,  # The network that looks
    metrics: tuple[str, ...] | None,  # As for score
    progress: bool,  # Whether to show progress bars
) -> dict[str, Any]:  # The row
    "Score a point, on all processes if there are several, and write its row."
    final = drawn if correction is None else postprocess(correction, drawn, progress=progress and is_main())
    seen = extract_sharded(final.x, eyes, "samples", 256, progress)

    def write() -> dict[str, Any]:
        row = score(final, reference, eyes, metrics, seen=seen)
        append_rows(file, [row])
        return row

    return main_only(write)


def read_curves(
    out: Path,  # Folder of a sweep
) -> tuple[Any, Any]:  # Two pandas tables: points with a column "curve", and real images
    "The rows of a sweep with numbers as numbers, and each point's curve: method, sampler, steps."
    import pandas as pd

    table = pd.read_csv(out / "rows.csv", keep_default_na=False)
    for name in table.columns:
        if is_metric(name) or name == "scale":
            table[name] = pd.to_numeric(table[name], errors="coerce")
    floor, table = table[table.method == "real"], table[table.method != "real"]
    names = table.method.replace("plain", "classifier_free_guidance")
    for key, name in (("classifier", "classifier_guidance"), ("correction", "flow_postprocessing")):
        if key in table:
            names = names.mask(table[key] != "", name)
    several = len(table[["sampler", "steps"]].drop_duplicates()) > 1
    kinds = names.map(lambda name: METHOD_LABELS.get(name, name)) + ", " + table.sampler + " " + table.steps.astype(str)
    return table.assign(curve=kinds if several else names), floor


def finish_sweep(
    out: Path,  # Folder of a sweep
    best: str,  # Column to judge by
    among: dict[str, Any] | None = None,  # Facts that the best row must have, such as its checkpoint
) -> dict[str, Any]:  # The best row
    "Draw the curves of a sweep into curves.png and pick its best point."
    from matplotlib import pyplot

    table, floor = read_curves(out)
    shown = [name for name in table.columns if is_metric(name)]
    check_choice("best", best, shown)
    size = (3.2 * len(shown), 3)
    fig, axes = pyplot.subplots(1, len(shown), figsize=size, layout="constrained", squeeze=False)
    for ax, name in zip(axes[0], shown):
        show_curves(table.dropna(subset=[name]), "scale", name, hue="curve", ax=ax)
        for value in floor[name].dropna() if name in floor else ():
            ax.axhline(value, color="0.6", ls="--")
        ax.set(xlabel="guidance scale", ylabel=name.replace("_", " "), title="dashed: real" if len(floor) else "")
    fig.savefig(out / "curves.png", dpi=120)
    pyplot.close(fig)
    rows = [row for row in table.dropna(subset=[best]).to_dict("records") if has_facts(row, among or {})]
    if not rows:
        raise ValueError(f"{out / 'rows.csv'} has no row of this sweep with {best}; allowed: at least one")
    choose = max if best.split("_")[0] in HIGHER else min
    return choose(rows, key=lambda row: row[best])


def describe_trained(
    trained: Trained,  # A trained network
) -> str:  # Lines of text
    "What a checkpoint holds."
    weights = sum(p.numel() for p in trained.model.parameters())
    size = "x".join(map(str, trained.shape))
    if trained.latents is not None:
        size = f"{'x'.join(map(str, trained.image_shape))} from latents {size}"
    lines = [
        f"{trained.path}: {trained.recipe.title or trained.recipe.method.name}",
        f"step {trained.step} of {trained.recipe.training.steps}, {weights:,} weights, images {size}",
        f"{len(trained.classes)} classes: {', '.join(trained.classes[:10])}{', ...' * (len(trained.classes) > 10)}",
    ]
    return "\n".join([*lines, "", describe_recipe(trained.recipe)])
