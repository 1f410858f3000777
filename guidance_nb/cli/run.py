"""From a recipe to a trained model and its samples: train, stop, resume, open again, guide, generate, correct."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from guidance_nb._checks import check_choice, check_interval, check_number, explained, require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import Json, check_folder, write_aside
from guidance_nb._pictures import tile
from guidance_nb._processes import find_processes, on_main
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance, dit_channel_scales
from guidance_nb.classifier_guidance import ClassifierGuidance
from guidance_nb.cli.load import PATHS, is_scale_aware, make_model, open_checkpoint, own_device, restore
from guidance_nb.cli.recipe import SEED, Pair, Precision, Recipe, Table, find_key, key, override
from guidance_nb.denoisers import Denoiser, check_labels, count_nfe
from guidance_nb.engine._hardware import check_compiler, check_tracker, choose_precision, compile_network
from guidance_nb.engine.cost import cost_sheet, count_loss_nfe, network_cost
from guidance_nb.engine.graphs import recorded
from guidance_nb.engine.run import Engine
from guidance_nb.engine.sampling import sample_sharded
from guidance_nb.flow_postprocessing import FlowPostprocessor, PairDraws, PairLoss, pair_data
from guidance_nb.images.data import (
    FILES,
    ImageData,
    SampleFile,
    find_files,
    find_sides,
    from_uint8,
    load_images,
    load_samples,
    to_uint8,
)
from guidance_nb.images.features import feature_space
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
from guidance_nb.model_guidance import FixedScale, ModelGuidanceLoss, mg_weight_from_scale, scale_from_mg_weight
from guidance_nb.samplers import Sampler, sample, time_grid
from guidance_nb.training import ClassifierLoss, DenoisingLoss, LossContext, State, fit
from guidance_nb.training_times import LogNormalTimes, TrainingTimes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from pandas import DataFrame

T = TypeVar("T")
__all__ = ["generate", "train_recipe"]


def is_main() -> bool:
    "Whether this is the process that writes files."
    return find_processes(own_device())[0] == 0


def main_only(action: Callable[[], T]) -> T:
    "Let the main process do an `action`, which calls no main_only itself; every process gets its result or its error."
    return on_main(action, *find_processes(own_device()))


# Data


def take_images(data: ImageData, n: int) -> ImageData:
    "A part of `data` for a quick trial: n images chosen at random, always the same."
    require(n <= len(data), "data.limit", n, f"0 to {len(data)}, as many as there are")
    chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:n].sort().values
    return replace(data, pixels=lambda indices: data.images(chosen[indices]), labels=data.labels[chosen])


def make_data(recipe: Recipe, split: str = "train") -> ImageData | LatentData:
    "The images of a `recipe`, of the `split` train or test, or their latents."
    table = recipe.data
    if recipe.latents is not None:
        check_choice("split", split, ("train",))
        settings = read_index(recipe.latents)["settings"]
        (_, *sides), most = settings["image"], settings["pictures"]
        allowed = f"{sides[0] if sides[0] == sides[1] else sides}, of which {recipe.latents} is, or 0"
        require(table.size == 0 or [*find_sides(table.size)] == sides, "data.size", table.size, allowed)
        require(table.limit <= most, "data.limit", table.limit, f"0 to {most}, as many as there are")
        require(not table.shift, "data.shift", table.shift, "0, for latents")
        return load_latents(recipe.latents, flip=table.flip, limit=table.limit)
    if table.source in FILES:
        main_only(lambda: str(find_files(table.source)))  # one process downloads
    data = load_images(table.source, split, size=table.size or None, flip=table.flip and split == "train")
    data = replace(data, shift=table.shift if split == "train" else 0)
    return take_images(data, table.limit) if table.limit else data


def _read_generated(files: tuple[str, ...], shape: tuple[int, ...], num_classes: int) -> tuple[Tensor, Tensor | None]:
    "Read samples made here or elsewhere, several files one after the other."
    parts = [load_samples(name, size=(shape[1], shape[2]), channels=shape[0]) for name in files]
    labels = [part.c for part in parts if part.c is not None]
    bare = [name for name, part in zip(files, parts) if part.c is None]
    require_that(len(bare) in (0, len(parts)), f"{', '.join(bare)} has no labels and others have", "all or none")
    x = from_uint8(torch.cat([part.x for part in parts]))
    if not labels:
        return x, None
    check_labels(torch.cat(labels), num_classes, len(x))
    return x, torch.cat(labels)


def _read_pairs(recipe: Recipe, data: ImageData) -> PairDraws:
    "Samples of a `recipe` of post-processing, each with its nearest images of `data`."
    method = recipe.method
    x, c = _read_generated(method.samples, data.shape, data.num_classes)
    real = from_uint8(data.images(torch.arange(len(data))))
    if method.space == "classifier":
        from guidance_nb.cli.evaluation import find_feature_extractor

        space = feature_space(find_feature_extractor(method.weights))
    else:
        space = feature_space(method.space, method.weights or None)
    return pair_data(x, real, c, None if c is None else data.labels, method.neighbours, space, device=own_device())


def recipe_shape(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    "Shape of one sample and number of classes of a `recipe`, unseen; for latents that are not there yet, ImageNet's."
    known: dict[str, tuple[tuple[int, ...], int]] = {"mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10)}
    if recipe.data.source in known:
        (channels, side, _), classes = known[recipe.data.source]
        return (channels, *find_sides(recipe.data.size or side)), classes
    if recipe.latents is None or (recipe.latents / INDEX).is_file():
        data = make_data(recipe)
        return tuple(data.shape), data.num_classes
    return (4, *(side // 8 for side in find_sides(recipe.data.size or 256))), 1000


# Training


_LOOP = ("steps", "save_every", "keep", "precision", "gradient_accumulation_steps", "gradient_checkpointing")
_SPEED = ("compile", "cuda_graphs", "channels_last", "grid_every", "tracker")
_MAY_CHANGE = (  # at a resume; whether more steps may follow is for `fit` to say
    *("recipe.title", "recipe.sampling", "recipe.data.vae"),
    *(f"recipe.training.{name}" for name in (*_LOOP, *_SPEED)),
)


class CleanLoss:
    "Cross-entropy of a classifier of clean images."

    def __call__(self, model: nn.Module, x0: Tensor, c: Tensor, context: LossContext) -> Tensor:
        "Per-sample losses `[batch]`."
        return nn.functional.cross_entropy(model(x0, torch.zeros((), device=x0.device)), c, reduction="none")


def make_loss(recipe: Recipe) -> Callable:
    "The loss of a `recipe`, from the page of its method: `loss(model, x0, c, context)`."
    method = recipe.method
    if method.name == "aligned_loss":
        return AlignedLoss(method.scale, method.anchor)
    if method.name == "model_guidance":
        names = ("dropout", "start_step", "unconditional", "interval", "guided_share")
        options: Json = {name: getattr(method, name) for name in names}
        if method.scale_range:
            return ModelGuidanceLoss(scale_range=method.scale_range, **options)  # type: ignore[arg-type]
        return ModelGuidanceLoss(mg_weight_from_scale(method.scale), **options)
    losses: dict[str, Callable] = {
        "plain": DenoisingLoss(method.dropout),
        "classifier": ClassifierLoss(PATHS[recipe.network.path]()),
        "evaluation_classifier": CleanLoss(),
        "flow_postprocessing": PairLoss(),
    }
    return losses[method.name]


def _make_times(recipe: Recipe) -> TrainingTimes | None:
    "The training times and weights of a `recipe`; None for those usual on its path."
    method = recipe.method
    options: Json = {"shift": method.time_shift, "weight": method.weight or None}
    if method.times:
        return LogNormalTimes(**options, mean=method.times[0], std=method.times[1])
    return TrainingTimes(**options) if options != {"shift": 1.0, "weight": None} else None


def make_engine(recipe: Recipe, folder: Path | None = None, metadata: Json | None = None) -> Engine:
    "How a `recipe` is run, in a `folder` of checkpoints that hold `metadata`."
    table = recipe.training
    same = [*_LOOP[1:], "compile", "cuda_graphs", "channels_last", "warmup", "weight_decay"]
    options: Json = {name: getattr(table, name) for name in same}
    options |= {"folder": folder, "metadata": metadata or {}, "may_change": _MAY_CHANGE}
    return Engine(clip=table.clip or None, tracker=table.tracker or None, **options)


def recipe_cost(recipe: Recipe, gpus: tuple[int, ...] = (), chip: str = "h100", share: float = 0.35) -> "DataFrame":
    "GPU-hours and memory that a recipe will take: an estimate that assumes a fraction of the peak."
    table, network, at_once = recipe.training, recipe.network, recipe.training.gradient_accumulation_steps
    denoisers = ("plain", "aligned_loss", "model_guidance")
    require(recipe.method.name in denoisers, "method.name", recipe.method.name, "methods that train a denoiser")
    precision: Literal["fp32", "bf16"] = "fp32" if table.precision == "fp32" else "bf16"
    recompute = table.gradient_checkpointing
    aware, (shape, classes) = is_scale_aware(recipe), recipe_shape(recipe)
    cost = network_cost(network.name, shape, classes, aware, precision, recompute, **network.settings)
    nfe = count_loss_nfe(make_loss(recipe), steps=table.steps)
    counts = gpus or (1, 8)[: 1 if table.batch_size % (8 * at_once) else 2]
    return cost_sheet(cost, nfe, table.steps, table.batch_size, at_once, counts, chip, share)


def check_trainable(recipe: Recipe) -> None:
    "Raise an error for a `recipe` that cannot be trained here, before any work is done."
    make_loss(recipe)
    make_engine(recipe)
    check_tracker(recipe.training.tracker or None, ".")
    given = recipe.method.name != "flow_postprocessing" or recipe.method.samples
    require_that(given, "method.samples is empty", "sample files, of `guidance-nb sample` or made elsewhere")
    if recipe.training.compile:
        check_compiler()


def _check_fits(recipe: Recipe, data: ImageData | LatentData) -> None:
    "Raise an error, before any work, for a `recipe` too large for its `data` or this machine's memory."
    table, channels = recipe.training, recipe.sampling.guided_channels
    most = data.shape[0]
    require(channels <= most, "sampling.guided_channels", channels, f"0 to {most}, as many as there are")
    require(table.batch_size <= len(data), "training.batch_size", table.batch_size, f"1 to {len(data)}, all images")
    with torch.device("meta"):
        weights = sum(p.numel() for p in make_model(recipe, tuple(data.shape), data.num_classes).parameters())
    device = own_device()
    memory = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else _physical_memory()
    needed = 20 * weights  # four bytes each for weights, gradients, two moments and the average
    told = f"network = {recipe.network.name} with {recipe.network.settings} needs {needed / 1e9:.0f} GB to be trained"
    require_that(needed <= memory, told, f"at most {memory / 1e9:.0f} GB, the memory of this machine")


def _physical_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def make_training(recipe: Recipe, data: Any) -> tuple[Any, Any, tuple[str, ...]]:
    "What a `recipe` trains on its `data`: untrained model, data for fit, names of the classes the model knows."
    if recipe.method.name != "flow_postprocessing":
        return make_model(recipe, data.shape, data.num_classes), data, data.classes
    pairs = _read_pairs(recipe, data)
    classes = () if pairs.labels is None else data.classes
    net = make_model(recipe, data.shape, len(classes)).net
    return FlowPostprocessor.from_pairs(pairs, len(classes), net=net, dropout=recipe.method.dropout), pairs, classes


def train_recipe(
    recipe: Recipe,  # What to train
    folder: str | Path,  # Where checkpoints and grids go; a run in it is continued
    progress: bool = True,  # Whether to show a progress bar
    changes: tuple[str, ...] = (),  # Keys that may differ from those of the run that is continued
) -> Iterator[State]:
    "Train a recipe, from the newest intact checkpoint if there is one, and yield every state of `fit`."
    check_trainable(recipe)
    data = make_data(recipe)  # errors come before a folder is made
    _check_fits(recipe, data)
    folder, table = check_folder("out", Path(folder)), recipe.training
    model, source, classes = make_training(recipe, data)
    facts: Json = {"recipe": recipe.model_dump(mode="json"), "shape": list(data.shape)}
    facts["classes"] = list(classes)
    if isinstance(data, LatentData):  # what decodes them must be kept
        facts["latents"] = {"vae": data.index["vae"], "settings": {"image": data.index["settings"]["image"]}}
        if table.grid_every:
            _find_vae(recipe, data.index)  # rather now than at the first grid
    same = ("batch_size", "lr", "schedule", "ema", "ema_warmup", "seed")
    options: Json = {name: getattr(table, name) for name in same}
    options["times"], loss = _make_times(recipe), make_loss(recipe)
    if recipe.method.auto_every:
        from guidance_nb.cli.evaluation import measured_loss

        loss = measured_loss(recipe, data, facts.get("latents"), loss)
    engine = make_engine(recipe, folder, facts)
    keys = [find_key(name) for name in changes]
    stated = (*engine.may_change, *(f"recipe.{name}" for name in keys), *(name.split(".")[-1] for name in keys))
    options |= {"engine": replace(engine, may_change=stated), "progress": progress}
    for state in fit(model, loss, source, table.steps, description=recipe.method.name, **options):
        if table.grid_every and state.step % table.grid_every == 0 and is_main():
            made = state.step, folder, True, facts.get("latents")
            trained = Trained(state.ema, recipe, data.shape, data.classes, *made)
            _save_grid(trained, folder / f"grid-{state.step:08d}.png")
        yield state


# A trained model


@dataclass
class Trained:
    "A network with the recipe it was trained from."

    model: Any  # A `NetworkDenoiser`, an `ImageClassifier` or a `FlowPostprocessor`, ready to use
    recipe: Recipe  # What it was trained from
    shape: tuple[int, ...]  # Shape of one sample
    classes: tuple[str, ...]  # Names of the classes
    step: int  # Training steps done
    path: Path  # Where it was read
    ema: bool = True  # Whether its weights are the moving average
    latents: Json | None = None  # For a model of latents: the autoencoder and the shape of pictures

    @property
    def image_shape(self) -> tuple[int, ...]:
        "Shape of one picture."
        return self.shape if self.latents is None else tuple(self.latents["settings"]["image"])

    @property
    def scale(self) -> float:
        "The guidance scale unless asked otherwise; that of a Model-guidance network without scale input is built in."
        built_in = self.recipe.method.name == "model_guidance" and not is_scale_aware(self.recipe)
        return self.recipe.method.scale if built_in else self.recipe.sampling.guidance_scale

    def require(self, *methods: str) -> "Trained":
        "Raise an error for a network trained by other `methods`, such as a classifier where a denoiser is needed."
        name = self.recipe.method.name
        require_that(name in methods, f"{self.path} was trained by method {name!r}", ", ".join(map(repr, methods)))
        return self


def load_trained(source: str | Path, ema: bool = True) -> Trained:
    "A trained network with its recipe."
    saved = open_checkpoint(source)
    by = saved.record["versions"]["guidance_nb"]
    with explained(f"{saved.path} holds a recipe of another version, {by}", "those of this version", ValueError):
        recipe = override(Recipe(), saved.metadata["recipe"])
    if recipe.method.auto_every:  # the scale that its weight has reached
        reached = scale_from_mg_weight(saved.record["loss_state"]["weight"]["value"])
        recipe = override(recipe, {"method.scale": reached})
    model, facts = restore(saved, recipe, ema), saved.metadata
    shape, classes = tuple(facts["shape"]), tuple(facts["classes"])
    return Trained(model, recipe, shape, classes, saved.step, saved.path, ema, facts.get("latents"))


def build_guided(
    trained: Trained,  # A trained denoiser
    scale: float | None = None,  # Guidance scale; 1 is the conditional model; None takes the recipe's
    classifier: Trained | None = None,  # Guide by this classifier instead of by the null label
    interval: tuple[float, ...] = (0.0, 1.0),  # Times that classifier-free guidance guides
    channels: int = 0,  # First channels that classifier-free guidance guides; 0 guides all
) -> Denoiser:  # The model to sample from
    "A trained model at a guidance scale, by the method it was trained for."
    method = trained.require("plain", "aligned_loss", "model_guidance").recipe.method
    scale = trained.scale if scale is None else scale
    check_number("scale", scale)
    free = classifier is None and method.name != "model_guidance"
    fine = free or check_interval("interval", interval) == (0, 1)
    require(fine, "interval", interval, "(0, 1), for only classifier-free guidance can pause")
    most = f"0 to {trained.shape[0]}, and only for classifier-free guidance"
    require(not channels or (free and 0 < channels <= trained.shape[0]), "channels", channels, most)
    if classifier is not None:
        same = trained.shape == classifier.require("classifier").shape and trained.classes == classifier.classes
        require_that(same, f"{classifier.path} is for other images or classes than {trained.path}", "the same")
        paths = " and ".join(f"{each.path} is on {each.model.path}" for each in (classifier, trained))
        same = trained.model.path == classifier.model.path
        require_that(same, paths, "one path, since noise must mean the same to both")
        return ClassifierGuidance(trained.model, classifier.model, scale)
    if free:
        by_channel = dit_channel_scales(scale, trained.shape[0], channels) if channels else scale
        return ClassifierFreeGuidance(trained.model, by_channel, check_interval("interval", interval))
    if is_scale_aware(trained.recipe):
        return FixedScale(trained.model, scale)
    told = f"{method.scale:g}, which {trained.path} was trained for"
    require_that(scale == method.scale, f"scale = {scale:g}", told)
    return trained.model


def _find_vae(recipe: Recipe, index: Json, source: str = "") -> "AutoencoderKL":
    """The autoencoder of a `recipe` for latents, or the one named by `source`.

    One whose factor, shift or channels differ from the encoding's, which `index` or a checkpoint keeps, is an error.
    """
    known = index["vae"]
    name = source or recipe.data.vae or known["name"]
    require_that(name, "the latents were encoded by a nameless autoencoder", "data.vae or --vae, its folder")
    vae = load_vae(name)
    config = dict(zip(("factor", "shift"), latent_constants(vae.config)))
    for part, found in (config | {"latent_channels": vae.config.latent_channels}).items():
        allowed = f"{known[part]}, as the latents were encoded with"
        require_that(found == known[part], f"{name} has {part} = {found}", allowed)
    return vae


@torch.no_grad()
def _save_grid(trained: Trained, file: Path, rows: int = 4) -> None:
    "Draw `rows` samples of every class into a PNG `file`, from the same noise each time; a classifier has none."
    if not isinstance(trained.model, Denoiser):
        return
    classes, table = min(10, len(trained.classes)), trained.recipe.sampling
    c, seed = torch.arange(rows * classes) % classes, trained.recipe.training.seed
    x = sample(build_guided(trained), c, trained.shape, table.sampler, table.sampler_steps, seed=seed, progress=False)
    if trained.latents is not None:
        x = from_uint8(decode(_find_vae(trained.recipe, trained.latents), x))
    write_picture(x, file, classes)


def write_picture(x: Tensor, file: Path, columns: int) -> None:
    "Write images in [-1, 1] as a grid of so many `columns` into a PNG `file`, completely or not at all."
    with extra("images"):
        from PIL import Image

    grid = tile(to_uint8(x.clamp(-1, 1)), columns).expand(3, -1, -1)
    with write_aside(file) as aside:
        Image.fromarray(grid.permute(1, 2, 0).numpy()).save(aside, "PNG")


# Samples


def _read_labels(text: str, n: int, classes: tuple[str, ...]) -> Tensor:
    """Labels `[n]` of samples to draw.

    `text` is "balanced", every class equally often, or names of `classes` separated by commas, used in turn. A class
    may also be given by its index, unless some names are numbers themselves.
    """
    if text == "balanced":
        return torch.arange(n) % len(classes)
    numbered = any(name.isdigit() for name in classes)
    known = {name: i for i, name in enumerate(classes)} | ({} if numbered else {str(i): i for i in range(len(classes))})
    indices = "" if numbered else f"0 to {len(classes) - 1}, or "
    for part in text.split(","):
        require(part in known, "labels", part, f"'balanced', {indices}{', '.join(classes[:10])}")
    return torch.tensor([known[part] for part in text.split(",")]).repeat(n)[:n]


class Request(Table):
    "What to draw from a trained model; together with the model it decides every sample."

    n: int = key(1000, "Number of samples", ge=1)
    labels: str = key("balanced", "balanced, or classes separated by commas, in turn")
    scale: float | None = key(None, "Guidance scale; 1 is none. Default: the recipe's")
    sampler: Sampler | None = key(None, "Sampler. Default: the recipe's")
    steps: int | None = key(None, "Steps of the sampler. Default: the recipe's", ge=1)
    seed: int = key(0, "Seed; sample i depends on (seed, i) alone", **SEED)
    interval: Pair = key((0.0, 1.0), "First and last time that classifier-free guidance guides")
    precision: Literal["fp32", "bf16", "auto"] = key(
        "fp32", "fp32, bf16, or auto: bf16 where the hardware is made for it"
    )
    compile: bool = key(False, "Compile the network first")
    cuda_graphs: bool = key(False, "Record each call of the network as a CUDA graph, on a GPU")
    batch_size: int = key(256, "Images at a time; changes no sample", ge=1)
    channels: int | None = key(None, "Guide the first channels only, 3 as DiT's code. Default: the recipe's", ge=0)
    vae: str = key("", "For latents: the autoencoder that decodes. Default: the recipe's")


def complete_request(trained: Trained, request: Request, classifier: Trained | None = None) -> Request:
    "Fill in what the recipe of `trained` says, and raise an error for what cannot be drawn with it."
    table = trained.recipe.sampling
    usual = {"scale": trained.scale, "sampler": table.sampler, "steps": table.sampler_steps}
    usual["channels"] = table.guided_channels
    asked = request.changed(**{name: value for name, value in usual.items() if getattr(request, name) is None})
    _read_labels(asked.labels, asked.n, trained.classes)
    view = build_guided(trained, asked.scale, classifier, asked.interval, asked.channels or 0)
    time_grid(view.path, asked.steps or 0, asked.sampler or "")
    if trained.latents is not None:
        _find_vae(trained.recipe, trained.latents, asked.vae)
    fine = trained.latents is not None or not asked.vae
    require(fine, "vae", asked.vae, f"none, for {trained.path} was trained on pictures")
    return asked


@contextmanager
def autocast_and_compile(
    trained: Trained, precision: Precision, compile: bool, cuda_graphs: bool = False
) -> Iterator[None]:
    "Run a `trained` network inside the block in a `precision`, fp32, bf16 or auto, compiled, and recorded, if asked."
    device = next(trained.model.parameters()).device
    low = choose_precision(precision, device) == "bf16"
    net = getattr(trained.model, "net", trained.model)
    if compile and not any(part._compiled_call_impl for part in net.modules()):
        check_compiler()
        compile_network(net)
    graphs = recorded(trained.model) if cuda_graphs else nullcontext()
    with graphs, torch.autocast(device.type, torch.bfloat16) if low else nullcontext():
        yield


def generate(
    trained: Trained,  # A trained denoiser
    request: Request,  # What to draw
    classifier: Trained | None = None,  # Guide by this classifier
    progress: bool = True,  # Whether to show a progress bar
) -> SampleFile:  # Images `[n, ...]` uint8, classes `[n]`, and the facts of their making
    "Draw samples, on all processes if there are several; latents are decoded, their pictures are in the main process."
    asked = complete_request(trained, request, classifier)
    model = build_guided(trained, asked.scale, classifier, asked.interval, asked.channels or 0)
    c, start = _read_labels(asked.labels, asked.n, trained.classes), time.perf_counter()
    device = next(trained.model.parameters()).device
    rank, world = find_processes(device)
    own = len(torch.arange(asked.n).tensor_split(world)[rank])
    options: Json = {"seed": asked.seed, "batch_size": asked.batch_size, "progress": progress}
    with autocast_and_compile(trained, asked.precision, asked.compile, asked.cuda_graphs), count_nfe() as count:
        x = sample_sharded(model, c, trained.shape, sampler=asked.sampler, steps=asked.steps, **options).float()
    facts = asked.model_dump(exclude={"precision"}) | {"nfe": count.total / own}  # in tables, precision is a metric
    facts = {name: value for name, value in facts.items() if value or name not in ("channels", "vae", "cuda_graphs")}
    facts |= {"arithmetic": choose_precision(asked.precision, device), "seconds": 0.0}
    facts |= {"checkpoint": str(trained.path), "step": trained.step, "method": trained.recipe.method.name}
    facts |= {"classifier": str(classifier.path) if classifier else ""}
    facts |= {"training_seed": trained.recipe.training.seed} | ({} if trained.ema else {"ema": False})
    facts["classes"] = list(trained.classes)
    if trained.latents is None:
        images = to_uint8(x.cpu())
    else:
        vae = _find_vae(trained.recipe, trained.latents, asked.vae)
        images = decode_all(vae, x, min(32, asked.batch_size), progress)
    facts["seconds"] = round(time.perf_counter() - start, 3)
    return SampleFile(images, c, facts)


def postprocess(
    trained: Trained,  # A correction
    file: SampleFile,  # Samples, from anywhere
    steps: int = 8,  # Steps of the correction
    sampler: str = "heun",  # "euler", "heun" or "dopri5"
    scale: float = 1.0,  # Guidance scale of the correction itself
    batch_size: int = 256,  # Samples at a time
    progress: bool = True,  # Whether to show a progress bar
) -> SampleFile:  # Corrected samples, with the facts of both makings
    "Move samples to where real ones are, with a trained correction."
    trained.require("flow_postprocessing")
    found = tuple(file.x.shape[1:])
    require_that(found == trained.shape, f"samples have shape {found}", f"{trained.shape}, as {trained.path}")
    start, labels = time.perf_counter(), file.c if trained.model.num_classes else None
    with count_nfe() as count:
        x = trained.model(from_uint8(file.x), labels, steps, sampler, scale, batch_size, progress)
    before = {name: file.facts.get(name, 0.0) for name in ("nfe", "seconds")}
    nfe, spent = (value if isinstance(value, int | float) else 0.0 for value in before.values())
    facts = {"correction": str(trained.path), "correction_steps": steps, "correction_sampler": sampler}
    facts |= {"correction_scale": scale, "nfe": nfe + count.total / len(x)}
    facts["seconds"] = round(spent + time.perf_counter() - start, 3)
    return SampleFile(to_uint8(x), file.c, file.facts | facts)
