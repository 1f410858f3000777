"""A training run as a small file: keys with types, ranges and meanings, and one reader for all kinds of run."""

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import fields
from functools import cache, reduce
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar, get_args, get_origin

from guidance_nb._checks import explained, require
from guidance_nb._extras import extra
from guidance_nb._files import Json
from guidance_nb.engine._hardware import Precision
from guidance_nb.engine._run import Engine
from guidance_nb.images._features import Space
from guidance_nb.images._networks import IMAGE_NETWORKS, change_settings
from guidance_nb.model_guidance import ModelGuidanceLoss, mg_weight_from_scale
from guidance_nb.samplers import Sampler

with extra("cli"):
    import pydantic
    import tomli

_R = TypeVar("_R", bound="Table")


class Table(pydantic.BaseModel):
    "Keys with values of a known type and range; what does not fit is a `ValueError` of one line."

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    place: ClassVar[str] = ""  # What stands before its keys in messages

    def __init__(self, /, **values: object):
        try:
            super().__init__(**values)
        except pydantic.ValidationError as error:
            raise ValueError(_explain(type(self), error)) from None

    @pydantic.field_validator("*", mode="before")
    @classmethod
    def _read(cls, value: object, info: pydantic.ValidationInfo) -> object:
        "A list may be text with commas, a table some of its keys or the first one's value; no number is true or false."
        name = str(info.field_name)
        hint = cls.model_fields[name].annotation
        if inner := _inner(cls, name):
            given = value if isinstance(value, Mapping | Table) else {next(iter(inner.model_fields)): value}
            return dict(cls.model_fields[name].default) | dict(given)
        if isinstance(value, str) and (get_origin(hint) is tuple or (hint in (_Size, _Pair) and "," in value)):
            value = [part for part in map(str.strip, value.strip("[]").split(",")) if part]
        parts = value if isinstance(value, list | tuple) else [value]
        plain = hint is bool or not any(isinstance(part, bool) for part in parts)
        require(plain, name, value, _allowed(cls, name))
        return value

    def changed(self: _R, **values: object) -> _R:
        "The same with other values, which are checked like the first."
        return type(self)(**dict(self) | values)


def _inner(kind: type[Table], name: str) -> type[Table] | None:
    "The table that a key of a table is, if it is one."
    hint = kind.model_fields[name].annotation if name in kind.model_fields else None
    return hint if isinstance(hint, type) and issubclass(hint, Table) else None


def _allowed(kind: type[Table], name: str) -> str:
    "What a key may be, in words."
    schema = kind.model_json_schema()["properties"][name]
    return ", or ".join(_in_words(part) for part in schema.get("anyOf", [schema]) if part.get("type") != "null")


def _in_words(schema: Json) -> str:
    "What values a JSON schema allows."
    if "enum" in schema:
        return ", ".join(map(repr, schema["enum"]))
    kinds = {"boolean": "true or false", "integer": "a whole number", "number": "a number", "string": "text"}
    count = f"{schema['minItems']} " if "minItems" in schema else ""
    kinds["array"] = f"a list of {count}{'texts' if schema.get('items') == {'type': 'string'} else 'numbers'}"
    ends = {"minimum": "{} or more", "exclusiveMinimum": "above {}", "maximum": "at most {}"}
    ends |= {"exclusiveMaximum": "below {}"}
    rules = [words.format(schema[end]) for end, words in ends.items() if end in schema]
    return ", ".join([kinds.get(str(schema.get("type")), "a table"), *rules])


def _explain(kind: type[Table], error: pydantic.ValidationError) -> str:
    "The first thing that is wrong, in one line."
    first = error.errors(include_url=False)[0]
    name = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "extra_forbidden":
        return _unknown(kind.place + name, list(kind.model_fields))
    if first["type"] != "value_error":
        return f"{kind.place}{name} = {first['input']!r}; allowed: {_allowed(kind, name)}"
    told = str(first["ctx"]["error"])
    return f"{name}.{told}" if _inner(kind, name) and re.match(r"[\w.]+ = ", told) else told


def _unknown(name: str, keys: list[str]) -> str:
    near = difflib.get_close_matches(name.split(".")[-1], {key.split(".")[-1]: 0 for key in keys}, 1, 0.5)
    likely = [key for key in keys if near and key.split(".")[-1] == near[0]]
    hint = f"did you mean {' or '.join(likely)}?" if likely else f"allowed: {', '.join(keys) or 'none'}"
    return f"unknown key {name!r}; {hint}"


def key(default: object, meaning: str, **rules: Any) -> Any:
    "A key of a table: its default, its meaning and the range of its values."
    return pydantic.Field(default, description=meaning, **rules)


SEED: Json = {"ge": 0, "lt": 2**63}
_Size = pydantic.NonNegativeInt | tuple[pydantic.PositiveInt, pydantic.PositiveInt]
_Pair = tuple[float, float] | tuple[()]


class DataTable(Table):
    "What is learned."

    source: str = key("mnist", '"mnist", "cifar10", a folder with one sub-folder per class, or "latents:FOLDER"')
    size: _Size = key(0, "Side in pixels that images are brought to, or height and width; 0 keeps theirs")
    flip: bool = key(False, "Whether to mirror images at random")
    shift: int = key(0, "Most pixels by which images are moved at random, up, down, left or right", ge=0)
    limit: int = key(0, "Use so many images only; 0 uses all", ge=0)
    vae: str = key("", "For latents: folder or name of the autoencoder that decodes; empty takes the one that encoded")


class _Settings(Table):
    "Settings of the U-Nets and the transformers, of which a network has some."

    place = "settings."
    widths: tuple[int, ...] = key((), "Channels of each level")
    blocks: int = key(1, "Residual blocks of each level", ge=1, le=64)
    attention: tuple[int, ...] = key((), "Sides in pixels of the feature maps that get attention")
    head: int = key(64, "Channels of an attention head", ge=1)
    film: bool = key(True, "Whether time and class also scale the features, not only shift them")
    width: int = key(384, "Width of the tokens", ge=1)
    depth: int = key(12, "Blocks", ge=1, le=256)
    heads: int = key(6, "Attention heads", ge=1)
    patch: int = key(2, "Side of the patches that become tokens, or the channels of one pixel", ge=1)
    dropout: float = key(0.0, "Dropout inside the blocks", ge=0, le=1)


class _NetworkTable(Table):
    "What learns it."

    name: str = key("unet-small", 'A key of `IMAGE_NETWORKS`, or "linear" for a classifier')
    path: Literal["flow", "vp-linear", "vp-cosine", "edm"] = key("flow", "How noise is mixed in")
    prediction: Literal["velocity", "eps", "x0", "v", "edm"] = key("velocity", "What the network predicts")
    settings: Json = key({}, "Changes of the network's settings, such as dropout")

    @pydantic.model_validator(mode="after")
    def _read_settings(self) -> "_NetworkTable":
        self.settings.update(_Settings(**self.settings).model_dump(exclude_unset=True))
        change_settings(self.name, ["linear", *IMAGE_NETWORKS], self.settings)  # those of this network alone
        return self


Denoising = Literal["plain", "aligned_loss", "model_guidance"]
_Method = Literal[Denoising, "classifier", "evaluation_classifier", "flow_postprocessing"]
_Weight = Literal["", "x0", "eps", "v", "min_snr", "p2"]


class _MethodTable(Table):
    "The loss it trains by."

    name: _Method = key("plain", "The loss; classifiers see noisy images, evaluation classifiers clean ones")
    dropout: float = key(0.1, "Probability of training without the label, for losses with label dropout", ge=0, le=1)
    scale: float = key(2.0, 'Guidance scale trained for ("aligned_loss", "model_guidance" without `scale_range`)')
    anchor: float = key(0.0, 'Weight of the unconditional term of "aligned_loss"', ge=0)
    scale_range: tuple[float, ...] = key((), 'Lowest and highest scale of a scale-aware "model_guidance"')
    guided_share: float = key(0.5, 'Share of a scale-aware "model_guidance" at a drawn scale, not at 1', ge=0, le=1)
    unconditional: Literal["null", "contrastive", "uniform"] = key("null", 'What "model_guidance" guides away from')
    interval: tuple[float, float] = key((0.0, 0.75), 'Times at which "model_guidance" guides')
    times: _Pair = key((), "Mean and deviation of log(sigma / alpha) at training times; empty: usual ones")
    time_shift: float = key(1.0, "Factor on sigma / alpha at training times, above 1 for larger images", gt=0)
    weight: _Weight = key("", "Weighting over noise levels; empty keeps the loss's own")
    start_step: int = key(0, 'Step at which "model_guidance" begins to guide', ge=0)
    auto_every: int = key(0, 'Steps between moves of the "model_guidance" weight by a measured error; 0: none', ge=0)
    auto_samples: int = key(1000, "Samples of each such measurement", ge=4)
    auto_features: str = key("inception-v3-compat", "Their feature extractor: a name, or an evaluation classifier")
    auto_reference: str = key("", "Real images to compare them with, as for `evaluate`; empty takes the data's source")
    samples: tuple[str, ...] = key((), 'Sample files "flow_postprocessing" learns to correct')
    neighbours: int = key(20, 'Real neighbours per sample, for "flow_postprocessing"', ge=1)
    space: Literal[Space, "classifier"] = key("pixels", "Where neighbours are near; classifier: the run in `weights`")
    weights: str = key("", "Folder of the weights of `space`")


class _LoopTable(Table):
    "For how long, and with what care."

    steps: int = key(2000, "Optimiser steps", ge=1)
    batch_size: int = key(128, "Images per optimiser step, over all processes together", ge=1)
    lr: float = key(1e-3, "Peak learning rate of AdamW", gt=0, le=1)
    schedule: Literal["cosine", "constant"] = key("cosine", "Decay of the learning rate")
    warmup: int = key(0, "Steps of linear warm-up", ge=0)
    hold: int = key(0, "Steps at the peak learning rate after it, before a cosine falls", ge=0)
    weight_decay: float = key(0.0, "Weight decay of AdamW", ge=0)
    clip: float = key(0.0, "Largest norm of the gradient; 0 does not clip", ge=0)
    ema: float = key(0.999, "Decay of the moving average of the weights", ge=0, lt=1)
    ema_warmup: bool = key(True, "Whether the decay rises to `ema`, min(ema, (1 + n) / (10 + n)), for short runs")
    seed: int = key(0, "Seed of weights, data order, times, noise and dropout", **SEED)
    precision: Precision = key("fp32", "Arithmetic; auto is bf16 where the hardware is made for it")
    gradient_accumulation_steps: int = key(1, "Micro-batches per optimiser step", ge=1)
    gradient_checkpointing: bool = key(False, "Whether to compute activations twice: less memory, more time")
    save_every: int = key(500, "Steps between checkpoints", ge=1)
    keep: int = key(2, "Newest checkpoints to keep", ge=1)

    def fit_options(self) -> Json:
        "Arguments of `fit`, besides the number of steps."
        return self.model_dump(include={"batch_size", "lr", "schedule", "ema", "ema_warmup", "seed"})

    def engine(self, options: Json | None = None) -> Engine:
        "How `fit` is run; `options` are those of an engine that no recipe holds, such as its folder."
        asked = self.model_dump(include={each.name for each in fields(Engine)})
        return Engine(**{name: value for name, value in asked.items() if value}, **options or {})  # empty: as usual


class _TrainingTable(_LoopTable):
    "For how long, and with what care."

    compile: bool = key(False, "Whether to compile the network")
    cuda_graphs: bool = key(False, "Whether to record a step as a CUDA graph; without dropout inside the network")
    channels_last: bool = key(False, "Whether to store feature maps channels last")
    grid_every: int = key(0, "Steps between grids of samples; 0 draws none", ge=0)
    tracker: str = key("", 'A tracker of Accelerate, such as "tensorboard"')


class _SamplingTable(Table):
    "How it is sampled, unless the call says otherwise."

    sampler: Sampler = key("heun", "Sampler")
    sampler_steps: int = key(18, "Steps of the sampler", ge=1)
    guidance_scale: float = key(1.0, "Guidance scale; 1 is none")
    guided_channels: int = key(0, "Guide the first channels only, 3 as in DiT's code; 0 guides all", ge=0)


class Recipe(Table):
    "All that decides a training run, and how its model is sampled by default."

    title: str = key("", "What this is, in one line")
    data: DataTable = DataTable()
    network: _NetworkTable = _NetworkTable()
    method: _MethodTable = _MethodTable()
    training: _TrainingTable = _TrainingTable()
    sampling: _SamplingTable = _SamplingTable()

    @property
    def latents(self) -> Path | None:
        "Where its latents are; None for pictures."
        kind, found, folder = self.data.source.partition(":")
        return Path(folder) if found and kind == "latents" else None

    @pydantic.model_validator(mode="after")
    def _check_together(self) -> "Recipe":
        method, guided = self.method, self.method.name == "model_guidance"
        fine = not method.auto_every or (guided and not method.scale_range)
        require(fine, "method.auto_every", method.auto_every, "0, except for model_guidance without scale_range")
        fine = not method.weight or method.name in get_args(Denoising)
        require(fine, "method.weight", method.weight, "'', except for losses that train a denoiser")
        fine = not guided or method.start_step < self.training.steps
        require(fine, "method.start_step", method.start_step, f"below training.steps = {self.training.steps}")
        fine = self.latents is None or method.name not in ("evaluation_classifier", "flow_postprocessing")
        require(fine, "method.name", method.name, "methods that need no clean pictures, for latents")
        return self


class _CaptionedTable(Table):
    "What is learned."

    source: str = key("", "Folder of captioned pictures")
    column: str = key("text", "Column of the captions, where there is a table")
    size: _Size = key(0, "Side in pixels to crop and resize to, or height and width; 0 wants pictures of one size")
    flip: bool = key(False, "Whether to mirror pictures at random")
    crop: Literal["adm", "torchvision"] = key("adm", "How pictures are cropped")


class _PipelineTable(Table):
    "What learns it."

    name: str = key("", "Folder or Hub name of a Stable Diffusion pipeline")
    lora_rank: int = key(0, "Rank of LoRA; 0 trains all weights", ge=0)
    lora_layers: tuple[str, ...] = key(("to_q", "to_k", "to_v", "to_out.0"), "Ends of the names of layers that get it")


class _FineTuningMethodTable(Table):
    "The loss it trains by."

    name: Denoising = key("plain", "The loss")
    dropout: float = key(0.1, 'Probability of training without the caption ("plain", "model_guidance")', ge=0, le=1)
    scale: float = key(7.5, 'Guidance scale trained for; for "plain" the one suggested for sampling')
    two_stage: bool = key(False, 'Whether "aligned_loss" keeps the activations of one branch at a time')
    scale_range: tuple[float, ...] = key((), 'Lowest and highest scale of a scale-aware "model_guidance"')
    interval: tuple[float, float] = key((0.0, 1.0), 'Times at which "model_guidance" guides')


class _GridTable(Table):
    "Pictures before and after."

    prompts: tuple[str, ...] = key((), "Prompts of the grid; none draws no grid")
    grid_scales: tuple[float, ...] = key((1.0, 2.0, 4.0, 7.5), "Its guidance scales")
    grid_steps: int = key(50, "Its steps of DDIM", ge=1)
    clip_model: str = key("", "Folder or name of a CLIP that scores it")


class FineTuning(Table):
    "All that decides a fine-tuning run of a text-to-image pipeline."

    title: str = key("", "What this is, in one line")
    data: _CaptionedTable = _CaptionedTable()
    pipeline: _PipelineTable = _PipelineTable()
    method: _FineTuningMethodTable = _FineTuningMethodTable()
    training: _LoopTable = _LoopTable(
        steps=1000, batch_size=16, lr=1e-5, schedule="constant", clip=1.0, precision="auto"
    )
    grid: _GridTable = _GridTable()


def model_guidance_loss(method: _MethodTable | _FineTuningMethodTable) -> ModelGuidanceLoss:
    "The loss by Model-guidance, for one scale or a range of them."
    options: Json = method.model_dump(include={"dropout", "start_step", "unconditional", "interval", "guided_share"})
    if method.scale_range:
        return ModelGuidanceLoss(**options | {"scale_range": method.scale_range})
    return ModelGuidanceLoss(mg_weight_from_scale(method.scale), **options)


_FOLDERS: dict[type[Table], Path] = {Recipe: Path(__file__).parent / "recipe_files"}
_FOLDERS[FineTuning] = _FOLDERS[Recipe] / "finetuning"


def _fields(kind: type[Table]) -> Iterator[tuple[str, pydantic.fields.FieldInfo]]:
    for name, field in kind.model_fields.items():
        inner = _inner(kind, name)
        yield from ((f"{name}.{part}", each) for part, each in inner.model_fields.items()) if inner else [(name, field)]


@cache
def recipe_keys(
    kind: type[Table] = Recipe,  # Recipe or FineTuning
) -> dict[str, str]:
    "Every key of a recipe, `table.key`, with its meaning."
    meanings = {name: str(field.description) for name, field in _fields(kind)}
    choices = {n: get_args(f.annotation) for n, f in _fields(kind) if get_origin(f.annotation) is Literal}
    return meanings | {name: f"{meanings[name]}: {', '.join(map(repr, names))}" for name, names in choices.items()}


def find_key(name: str, kind: type[Table] = Recipe) -> str:
    "The key a name stands for; an unknown or ambiguous name is a `ValueError` with the nearest keys."
    keys, name = list(recipe_keys(kind)), name.replace("-", "_")
    if name in keys:
        return name
    if "network.settings" in keys and name.removeprefix("network.").startswith("settings."):
        return f"network.{name.removeprefix('network.')}"
    found = [key for key in keys if key.split(".")[-1] == name or key.startswith(f"{name}.")]
    if len(found) == 1 or (found and found[0].startswith(f"{name}.")):  # a table's name is short for its first key
        return found[0]
    raise ValueError(f"{name} is in several tables; allowed: {', '.join(found)}" if found else _unknown(name, keys))


def is_switch(name: str, kind: type[Table] = Recipe) -> bool:
    "Whether a key is true or false."
    known = dict(_fields(kind)) | {f"network.settings.{part}": field for part, field in _Settings.model_fields.items()}
    return name in known and known[name].annotation is bool


def override(recipe: _R, changes: Json) -> _R:
    "Replace values of a recipe by key, and check the whole."
    tables, kind = recipe.model_dump(), type(recipe)
    for name, value in changes.items():
        whole = isinstance(value, Mapping) and _inner(kind, name)
        for full, each in (
            {f"{name}.{part}": each for part, each in value.items()} if whole else {name: value}
        ).items():
            *places, last = find_key(full, kind).split(".", 2)
            reduce(dict.__getitem__, places, tables)[last] = each
    return kind(**tables)


def recipe_names(
    kind: type[Table] = Recipe,  # Recipe or FineTuning
) -> list[str]:
    "Names of the recipes that come with the package; models/NAME is the one that the shipped model NAME comes from."
    found = [path for end in ("*.toml", "models/*.toml") for path in _FOLDERS[kind].glob(end)]
    return sorted(path.relative_to(_FOLDERS[kind]).with_suffix("").as_posix() for path in found)


def read_recipe(
    source: str | Path,  # A name out of recipe_names, or a TOML file
    changes: Json | None = None,  # Values that replace those of the file, by key
    kind: type[_R] = Recipe,  # type: ignore[assignment]  # Recipe or FineTuning
) -> _R:  # The recipe
    "Read a recipe; unknown names and keys, and values out of range, are a `ValueError` of one line."
    names = recipe_names(kind)
    path = _FOLDERS[kind] / f"{source}.toml" if str(source) in names else Path(source)
    near = difflib.get_close_matches(str(source), names, 3, 0.4) or names
    told = f"a TOML file such as `guidance-nb info` shows, or a name such as {', '.join(near)}"
    kinds = OSError, tomli.TOMLDecodeError, UnicodeDecodeError, RecursionError
    with explained(f"recipe = {str(source)!r} cannot be read", told, *kinds):
        tables = tomli.loads(path.read_text(encoding="utf-8-sig"))
    return override(override(kind(), tables), changes or {})


def describe_recipe(
    recipe: Table,  # A recipe
) -> str:  # TOML, with the meaning of every key
    "A recipe in full, defaults included, as a TOML file."
    meanings = recipe_keys(type(recipe))

    def lines(values: Json, place: str = "") -> Iterator[str]:
        for name, value in values.items():
            meaning = f"  # {meanings[place + name]}" if place + name in meanings else ""
            if isinstance(value, dict):
                yield from ["", f"[{place}{name}]{meaning}", *lines(value, f"{place}{name}.")]
            else:  # JSON agrees with TOML for all that a recipe holds
                yield f"{name} = {json.dumps(value, ensure_ascii=False)}{meaning}"

    return "\n".join(lines(recipe.model_dump()))
