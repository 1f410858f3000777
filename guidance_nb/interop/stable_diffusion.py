"""Fine-tune Stable Diffusion by the plain, aligned or Model-guidance loss, from a recipe to an ordinary pipeline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch
from torch import Tensor

from guidance_nb._files import weights_digest
from guidance_nb._processes import find_processes
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.engine.run import Engine
from guidance_nb.interop.captions import CaptionedLatents, cache_captioned, load_captioned
from guidance_nb.interop.diffusers import open_pipeline
from guidance_nb.interop.grids import compare_scales, save_grid
from guidance_nb.interop.text_denoiser import (
    LORA_LAYERS,
    TextDenoiser,
    TwoStageAlignedLoss,
    load_text_denoiser,
    pipeline_card,
    save_lora,
    save_pipeline,
)
from guidance_nb.model_guidance import ModelGuidanceLoss, mg_weight_from_scale
from guidance_nb.training import DenoisingLoss, State, fit

__all__ = ["finetune"]


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
        model = load_text_denoiser(
            recipe.pipeline, data.null, lora_rank=recipe.lora_rank, lora_layers=recipe.lora_layers,
            scale_aware=aware, seed=recipe.seed,
        )  # fmt: skip
        facts = {"recipe": asdict(recipe), "weights": weights_digest(model.net.state_dict())}
        facts |= {"data": data.latents.index["settings"]}
        engine = Engine(folder=out, save_every=recipe.save_every, keep=recipe.keep, metadata=facts, may_change=MAY_CHANGE,
                        precision=recipe.precision, gradient_accumulation_steps=recipe.accumulate,
                        gradient_checkpointing=recipe.recompute, clip=recipe.clip or None, warmup=recipe.warmup,
                        weight_decay=recipe.weight_decay, cpu=cpu)  # fmt: skip
        how: dict[str, Any] = {key: getattr(recipe, key) for key in ("batch_size", "lr", "schedule", "ema", "seed")}
        for state in fit(model, loss, data, recipe.steps, **how, progress=progress, engine=engine):
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
    card = pipeline_card(
        method, steps=recipe.steps, samples=recipe.steps * recipe.batch_size, base=recipe.pipeline,
        data=Path(recipe.data).name, scale=scale,
    )  # fmt: skip
    save_pipeline(model, pipeline, out / "pipeline", card)
    if recipe.lora_rank:
        save_lora(model, out / "lora")
    if not recipe.prompts:
        return
    device = next(model.parameters()).device
    pipeline.to(device)
    models = {"before": load_text_denoiser(recipe.pipeline, null).to(device), "after": model}
    pictures, table = compare_scales(
        models, recipe.prompts, pipeline, recipe.grid_scales, clip=recipe.judge or None, steps=recipe.grid_steps,
        seed=recipe.seed, size=recipe.size or None, progress=progress,
    )  # fmt: skip
    save_grid(pictures, table, out)
