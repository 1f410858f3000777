"""From a recipe to a trained model and its samples: train, stop, resume, open again, guide, generate, correct."""

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

import guidance_nb as gnb
from guidance_nb._checks import check_choice, explained, require, require_that
from guidance_nb._extras import extra
from guidance_nb._files import Json, check_folder, write_aside
from guidance_nb._pictures import tile
from guidance_nb._processes import find_processes, row_shares
from guidance_nb.classifier_free_guidance import dit_channel_scales
from guidance_nb.cli._devices import is_main, main_only, own_device
from guidance_nb.cli._load import PATHS, _is_scale_aware, _open_checkpoint, _restore, _shuffled, make_model
from guidance_nb.cli._recipe import SEED, Denoising, Recipe, Table, find_key, key, model_guidance_loss, override
from guidance_nb.denoisers import check_labels
from guidance_nb.engine._cost import cost_sheet, count_loss_nfe, network_cost
from guidance_nb.engine._graphs import recorded
from guidance_nb.engine._hardware import Precision, choose_precision, compile_network
from guidance_nb.engine._sampling import sample_sharded
from guidance_nb.flow_postprocessing import PairDraws, PairLoss, pair_data
from guidance_nb.images import _data as image_data
from guidance_nb.images import _latents as latents
from guidance_nb.images._data import ImageData, SampleFile, from_uint8, to_uint8
from guidance_nb.images._features import feature_space
from guidance_nb.model_guidance import scale_from_mg_weight
from guidance_nb.samplers import Sampler, time_grid
from guidance_nb.training import Data, LossContext, State
from guidance_nb.training_times import LogNormalTimes, TrainingTimes

if TYPE_CHECKING:
    from diffusers import AutoencoderKL
    from pandas import DataFrame

_Samples = ImageData | latents.LatentData


def _check_target(out: Path, overwrite: bool) -> None:
    "Raise an error, before any work, for a name `out` that cannot be written or must not be overwritten."
    kind = out.suffix.lower()
    ours = out.is_file() if kind == ".png" else out.is_dir() != (kind == ".npz") and image_data.may_replace(out, True)
    fine = kind not in image_data.OTHER_KINDS and (not out.exists() or (overwrite and ours))
    require(fine, "out", str(out), "a new .npz, .png or folder, or --overwrite, for samples alone")
    check_folder("out", out.parent)


# Data


def _take_images(data: ImageData, n: int) -> ImageData:
    "A part of `data` for a quick trial: n images chosen at random, always the same."
    chosen = _shuffled(len(data))[:n].sort().values
    return replace(data, pixels=lambda indices: data.images(chosen[indices]), labels=data.labels[chosen])


def make_data(recipe: Recipe) -> _Samples:
    "The images of a `recipe`, or their latents."
    table = recipe.data
    data: _Samples
    if recipe.latents is None:
        if table.source in image_data.FILES:
            main_only(lambda: image_data.find_files(table.source))  # one process downloads
        data = image_data.load_images(table.source, size=table.size or None, flip=table.flip)
        data = replace(data, shift=table.shift)
        data = _take_images(data, table.limit) if table.limit else data
    else:
        sides, size = latents.read_index(recipe.latents)["settings"]["image"][1:], table.size
        fine = size == 0 or [*image_data.find_sides(size)] == sides
        require(fine, "data.size", size, f"{sides}, of which {recipe.latents} is, or 0")
        require(not table.shift, "data.shift", table.shift, "0, for latents")
        data = latents.load_latents(recipe.latents, flip=table.flip, limit=table.limit)
    return data


def _read_generated(files: tuple[str, ...], shape: tuple[int, ...], num_classes: int) -> tuple[Tensor, Tensor | None]:
    "Read samples made here or elsewhere, several files one after the other."
    require(files, "method.samples", files, "sample files, of `guidance-nb sample` or made elsewhere")
    parts = [image_data.load_samples(name, size=(shape[1], shape[2]), channels=shape[0]) for name in files]
    x, labels = from_uint8(torch.cat([part.x for part in parts])), [part.c for part in parts if part.c is not None]
    return x, check_labels(torch.cat(labels), num_classes, len(x)) if labels else None  # of all files, or of none


def _read_pairs(recipe: Recipe, data: ImageData) -> PairDraws:
    "Samples of a `recipe` of post-processing, each with its nearest images of `data`."
    from guidance_nb.cli._evaluation import find_feature_extractor

    method = recipe.method
    x, c = _read_generated(method.samples, data.shape, data.num_classes)
    real = from_uint8(data.images(torch.arange(len(data))))
    if method.space == "classifier":
        space = feature_space(find_feature_extractor(method.weights))
    else:
        space = feature_space(method.space, method.weights or None)
    return pair_data(x, real, c, None if c is None else data.labels, method.neighbours, space, device=own_device())


def recipe_shape(recipe: Recipe) -> tuple[tuple[int, ...], int]:
    "Shape of one sample and number of classes of a `recipe`, unseen; for latents that are not there yet, ImageNet's."
    known: dict[str, tuple[tuple[int, ...], int]] = {"mnist": ((1, 28, 28), 10), "cifar10": ((3, 32, 32), 10)}
    if recipe.data.source in known:
        (channels, side, _), classes = known[recipe.data.source]
        return (channels, *image_data.find_sides(recipe.data.size or side)), classes
    if recipe.latents is None or (recipe.latents / latents.INDEX).is_file():
        data = make_data(recipe)
        return tuple(data.shape), data.num_classes
    return (4, *(side // 8 for side in image_data.find_sides(recipe.data.size or 256))), 1000


# Training


_FREE = (  # in the table of training; whether steps may follow, and at which rate, is for `fit` to say
    *("steps", "schedule", "hold", "grid_every", "tracker", "save_every", "keep", "precision", "compile"),
    *("cuda_graphs", "channels_last", "gradient_accumulation_steps", "gradient_checkpointing"),
)
_MAY_CHANGE = ("recipe.title", "recipe.sampling", "recipe.data.vae", *(f"recipe.training.{name}" for name in _FREE))


class CleanLoss:
    "Cross-entropy of a classifier of clean images."

    def __call__(self, model: nn.Module, x0: Tensor, c: Tensor, context: LossContext) -> Tensor:
        "Per-sample losses `[batch]`."
        return nn.functional.cross_entropy(model(x0, torch.zeros((), device=x0.device)), c, reduction="none")


def make_loss(recipe: Recipe) -> Callable[..., Tensor]:
    "The loss of a `recipe`, from the page of its method: `loss(model, x0, c, context)`."
    method = recipe.method
    if method.name == "aligned_loss":
        return gnb.AlignedLoss(method.scale, method.anchor)
    if method.name == "model_guidance":
        return model_guidance_loss(method)
    losses: dict[str, Callable[..., Tensor]] = {
        "plain": gnb.DenoisingLoss(method.dropout),
        "classifier": gnb.ClassifierLoss(PATHS[recipe.network.path]()),
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


def recipe_cost(recipe: Recipe, gpus: tuple[int, ...] = (), chip: str = "h100", share: float = 0.35) -> "DataFrame":
    "GPU-hours and memory that a recipe will take: an estimate that assumes a fraction of the peak."
    table, network, at_once = recipe.training, recipe.network, recipe.training.gradient_accumulation_steps
    check_choice("method.name", recipe.method.name, get_args(Denoising))
    precision: Literal["fp32", "bf16"] = "fp32" if table.precision == "fp32" else "bf16"
    aware, (shape, classes), again = _is_scale_aware(recipe), recipe_shape(recipe), table.gradient_checkpointing
    cost = network_cost(network.name, shape, classes, aware, precision, again, **network.settings)
    nfe = count_loss_nfe(make_loss(recipe), steps=table.steps)
    counts = gpus or (1, 8)[: 1 if table.batch_size % (8 * at_once) else 2]
    return cost_sheet(cost, nfe, table.steps, table.batch_size, at_once, counts, chip, share)


def _training_memory(recipe: Recipe, data: _Samples) -> int:
    "Bytes that training takes at least: four each for weights, gradients, two moments and the average."
    with torch.device("meta"):
        model = make_model(recipe, tuple(data.shape), data.num_classes)
    return 20 * sum(p.numel() for p in model.parameters())


def _find_memory(device: torch.device) -> float:
    "Bytes that there are in all; on Windows there is no way to ask."
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf


def _make_training(recipe: Recipe, data: _Samples) -> tuple[nn.Module, Data, tuple[str, ...]]:
    "What a `recipe` trains on its `data`: untrained model, data for fit, names of the classes the model knows."
    if recipe.method.name != "flow_postprocessing":
        return make_model(recipe, data.shape, data.num_classes), data, data.classes
    pairs = _read_pairs(recipe, cast(ImageData, data))
    classes = () if pairs.labels is None else data.classes
    net = make_model(recipe, data.shape, len(classes)).net
    return gnb.FlowPostprocessor.from_pairs(pairs, len(classes), net=net, dropout=recipe.method.dropout), pairs, classes


def train_recipe(
    recipe: Recipe,  # What to train
    folder: str | Path,  # Where checkpoints and grids go; a run in it is continued
    progress: bool = True,  # Whether to show a progress bar
    changes: tuple[str, ...] = (),  # Keys that may differ from those of the run that is continued
) -> Iterator[State]:
    "Train a recipe, from the newest intact checkpoint if there is one, and yield every state of `fit`."
    loss, times, table, network = make_loss(recipe), _make_times(recipe), recipe.training, recipe.network
    data = make_data(recipe)  # errors come before a folder is made
    for name, n in (("data.limit", recipe.data.limit), ("training.batch_size", table.batch_size)):
        require(n <= len(data), name, n, f"at most {len(data)}, as many as there are")
    needed, memory = _training_memory(recipe, data), _find_memory(own_device())
    told = f"network = {network.name} with {network.settings} needs {needed / 1e9:.0f} GB to be trained"
    require_that(needed <= memory, told, f"at most {memory / 1e9:.0f} GB, the memory of this machine")
    folder = check_folder("out", Path(folder))
    model, source, classes = _make_training(recipe, data)
    facts: Json = {"recipe": recipe.model_dump(mode="json"), "shape": list(data.shape), "classes": list(classes)}
    if isinstance(data, latents.LatentData):  # what decodes them must be kept
        facts["latents"] = {"vae": data.index["vae"], "settings": {"image": data.index["settings"]["image"]}}
        if table.grid_every:
            _find_vae(recipe, data.index)  # rather now than at the first grid
    average = Trained(model, recipe, data.shape, data.classes, 0, folder, latents=facts.get("latents"))
    may_change = [part for name in map(find_key, changes) for part in (f"recipe.{name}", name.split(".")[-1])]
    engine = table.engine({"folder": folder, "metadata": facts, "may_change": (*_MAY_CHANGE, *may_change)})
    if recipe.method.auto_every:
        from guidance_nb.cli._evaluation import _measured_loss

        loss = _measured_loss(average, cast(gnb.ModelGuidanceLoss, loss))
    options: Json = {"times": times, "engine": engine, "description": recipe.method.name, "progress": progress}
    for state in gnb.fit(model, loss, source, table.steps, **table.fit_options(), **options):
        if table.grid_every and state.step % table.grid_every == 0 and is_main():
            _save_grid(replace(average, model=state.ema), folder / f"grid-{state.step:08d}.png")
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
        built_in = self.recipe.method.name == "model_guidance" and not _is_scale_aware(self.recipe)
        return self.recipe.method.scale if built_in else self.recipe.sampling.guidance_scale

    def require(self, *methods: str) -> "Trained":
        "Raise an error for a network trained by other `methods`, such as a classifier where a denoiser is needed."
        check_choice(f"method of {self.path}", self.recipe.method.name, methods)
        return self


def load_trained(source: str | Path, ema: bool = True) -> Trained:
    """A trained network together with the recipe it was trained from, as `generate` and `sweep` take it.

    `source` is a checkpoint, the folder of a run, whose newest intact checkpoint is taken, or the name of a model of
    the package, such as "mnist-cfg". Its weights are their moving average, with `ema=False` those of the last step.
    The result holds `model`, `recipe`, the `shape` of one sample, `classes`, `step` and `path`. A folder without a
    checkpoint is a `FileNotFoundError`; a checkpoint without a recipe, a damaged one, or one with a recipe that this
    version cannot read is a `ValueError`.
    """
    saved = _open_checkpoint(source)
    by = saved.record["versions"]["guidance_nb"]
    with explained(f"{saved.path} holds a recipe of another version, {by}", "those of this version", ValueError):
        recipe = override(Recipe(), saved.metadata["recipe"])
    if recipe.method.auto_every:  # the scale that its weight has reached
        reached = scale_from_mg_weight(saved.record["loss_state"]["weight"]["value"])
        recipe = override(recipe, {"method.scale": reached})
    model, facts = _restore(saved, recipe, ema), saved.metadata
    shape, classes = tuple(facts["shape"]), tuple(facts["classes"])
    return Trained(model, recipe, shape, classes, saved.step, saved.path, ema, facts.get("latents"))


def build_guided(
    trained: Trained,  # A trained denoiser
    scale: float | None = None,  # Guidance scale; 1 is the conditional model; None takes the recipe's
    classifier: Trained | None = None,  # Guide by this classifier instead of by the null label
    interval: tuple[float, float] = (0.0, 1.0),  # Times that classifier-free guidance guides
    channels: int = 0,  # First channels that classifier-free guidance guides; 0 guides all
) -> gnb.Denoiser:  # The model to sample from
    "A trained model at a guidance scale, by the method it was trained for."
    method = trained.require(*get_args(Denoising)).recipe.method
    scale = trained.scale if scale is None else scale
    free, known = classifier is None and method.name != "model_guidance", trained.shape[0]
    fine = free or tuple(interval) == (0, 1)
    require(fine, "interval", interval, "(0, 1), for only classifier-free guidance can pause")
    fine = channels == 0 or (free and channels <= known)
    require(fine, "channels", channels, f"0 to {known}, and only for classifier-free guidance")
    if classifier is not None:
        facts = [(each.shape, each.classes, each.model.path) for each in (trained, classifier.require("classifier"))]
        told = f"{classifier.path} is for other images, classes or noise than {trained.path}"
        require_that(facts[0] == facts[1], told, "one shape, the same classes, one path")
        return gnb.ClassifierGuidance(trained.model, classifier.model, scale)
    if free:
        by_channel = dit_channel_scales(scale, known, channels) if channels else scale
        return gnb.ClassifierFreeGuidance(trained.model, by_channel, interval)
    if _is_scale_aware(trained.recipe):
        return gnb.FixedScale(trained.model, scale)
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
    vae = latents.load_vae(name)
    config = dict(zip(("factor", "shift"), latents.latent_constants(vae.config)))
    for part, found in (config | {"latent_channels": vae.config.latent_channels}).items():
        told = f"{name} has {part} = {found}"
        require_that(found == known[part], told, f"{known[part]}, as the latents were encoded with")
    return vae


@torch.no_grad()
def _save_grid(trained: Trained, file: Path, rows: int = 4) -> None:
    "Draw `rows` samples of every class into a PNG `file`, from the same noise each time; a classifier has none."
    if not isinstance(trained.model, gnb.Denoiser):
        return
    classes, table = min(10, len(trained.classes)), trained.recipe.sampling
    c, seed = torch.arange(rows * classes) % classes, trained.recipe.training.seed
    model = build_guided(trained)
    x = gnb.sample(model, c, trained.shape, table.sampler, table.sampler_steps, seed=seed, progress=False)
    if trained.latents is not None:
        x = from_uint8(latents.decode(_find_vae(trained.recipe, trained.latents), x))
    _write_picture(x, file, classes)


def _write_picture(x: Tensor, file: Path, columns: int) -> None:
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
    """What to draw from a trained model; together with the model it decides every sample.

    A value of the wrong type or out of range is a `ValueError` of one line. `request.changed(n=4)` is a copy with
    other values.
    """

    n: int = key(1000, "Number of samples; the command draws ten of each class for a .png", ge=1)
    labels: str = key("balanced", "balanced, or classes separated by commas, in turn")
    scale: float | None = key(None, "Guidance scale; 1 is none. Default: the recipe's")
    sampler: Sampler | None = key(None, "Sampler. Default: the recipe's")
    steps: int | None = key(None, "Steps of the sampler. Default: the recipe's", ge=1)
    seed: int = key(0, "Seed; sample i depends on (seed, i) alone", **SEED)
    interval: tuple[float, float] = key((0.0, 1.0), "First and last time that classifier-free guidance guides")
    precision: Literal["fp32", "bf16", "auto"] = key(
        "fp32", "Arithmetic; auto is bf16 where the hardware is made for it"
    )
    compile: bool = key(False, "Compile the network first")
    cuda_graphs: bool = key(False, "Record each call of the network as a CUDA graph, on a GPU")
    batch_size: int = key(256, "Images at a time; changes no sample", ge=1)
    channels: int | None = key(None, "Guide the first channels only, 3 as DiT's code. Default: the recipe's", ge=0)
    vae: str = key("", "For latents: the autoencoder that decodes. Default: the recipe's")


def _complete_request(trained: Trained, request: Request, classifier: Trained | None = None) -> Request:
    "Fill in what the recipe of `trained` says, and raise an error for what cannot be drawn with it."
    table = trained.recipe.sampling
    usual = {"scale": trained.scale, "sampler": table.sampler, "steps": table.sampler_steps}
    usual |= {"channels": table.guided_channels}
    asked = request.changed(**{name: value for name, value in usual.items() if getattr(request, name) is None})
    _read_labels(asked.labels, asked.n, trained.classes)
    view = build_guided(trained, asked.scale, classifier, asked.interval, asked.channels or 0)
    time_grid(view.path, asked.steps or 0, asked.sampler or "")
    if trained.latents:
        _find_vae(trained.recipe, trained.latents, asked.vae)
    require(trained.latents or not asked.vae, "vae", asked.vae, f"none, for {trained.path} was trained on pictures")
    return asked


@contextmanager
def _autocast_and_compile(
    trained: Trained, precision: Precision, compile: bool, cuda_graphs: bool = False
) -> Iterator[None]:
    "Run a `trained` network inside the block in a `precision`, fp32, bf16 or auto, compiled, and recorded, if asked."
    device = next(trained.model.parameters()).device
    low = choose_precision(precision, device) == "bf16"
    net = getattr(trained.model, "net", trained.model)
    if compile and not any(part._compiled_call_impl for part in net.modules()):
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
    asked = _complete_request(trained, request, classifier)
    model = build_guided(trained, asked.scale, classifier, asked.interval, asked.channels or 0)
    c, start = _read_labels(asked.labels, asked.n, trained.classes), time.perf_counter()
    device = next(trained.model.parameters()).device
    rank, world = find_processes(device)
    own = row_shares(asked.n, 1, world)[rank]
    options: Json = {"seed": asked.seed, "batch_size": asked.batch_size, "progress": progress}
    with _autocast_and_compile(trained, asked.precision, asked.compile, asked.cuda_graphs), gnb.count_nfe() as count:
        x = sample_sharded(model, c, trained.shape, sampler=asked.sampler, steps=asked.steps, **options).float()
    if trained.latents is None:
        images = to_uint8(x.cpu())
    else:
        vae = _find_vae(trained.recipe, trained.latents, asked.vae)
        images = latents.decode_all(vae, x, min(32, asked.batch_size), progress)
    facts = asked.model_dump(exclude={"precision"})  # in tables, precision is a metric
    facts = {name: value for name, value in facts.items() if value or name not in ("channels", "vae", "cuda_graphs")}
    facts |= {"nfe": count.total / own, "arithmetic": choose_precision(asked.precision, device)}
    facts |= {"seconds": round(time.perf_counter() - start, 3), "checkpoint": str(trained.path), "step": trained.step}
    facts |= {"method": trained.recipe.method.name, "classifier": str(classifier.path) if classifier else ""}
    facts |= {"training_seed": trained.recipe.training.seed} | ({} if trained.ema else {"ema": False})
    return SampleFile(images, c, facts | {"classes": list(trained.classes)})


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
    start, labels = time.perf_counter(), file.c if trained.model.num_classes else None
    with gnb.count_nfe() as count:
        x = trained.model(from_uint8(file.x), labels, steps, sampler, scale, batch_size, progress and is_main())
    before = {name: file.facts.get(name, 0.0) for name in ("nfe", "seconds")}
    nfe, spent = (value if isinstance(value, int | float) else 0.0 for value in before.values())
    facts = {"correction": str(trained.path), "correction_steps": steps, "correction_sampler": sampler}
    facts |= {"correction_scale": scale, "nfe": nfe + count.total / len(x)}
    facts["seconds"] = round(spent + time.perf_counter() - start, 3)
    return SampleFile(to_uint8(x), file.c, file.facts | facts)
