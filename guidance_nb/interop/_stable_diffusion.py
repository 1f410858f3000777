"""Fine-tune Stable Diffusion by the plain, aligned or Model-guidance loss, from a recipe to an ordinary pipeline."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from guidance_nb._checks import require
from guidance_nb._files import weights_digest
from guidance_nb._processes import find_processes
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.cli._recipe import FineTuning, model_guidance_loss
from guidance_nb.interop import _text_denoiser as text_denoiser
from guidance_nb.interop._captions import _CaptionedLatents, cache_captioned, load_captioned
from guidance_nb.interop._diffusers import _open_pipeline
from guidance_nb.interop._grids import _save_grid, compare_scales
from guidance_nb.training import DenoisingLoss, State, fit

_MAY_CHANGE = (  # at a resume
    "recipe.title", "recipe.data.source", "recipe.pipeline.name", "recipe.grid", "recipe.training.steps",
    "recipe.training.schedule", "recipe.training.hold", "recipe.training.precision", "recipe.training.save_every",
    "recipe.training.gradient_accumulation_steps", "recipe.training.gradient_checkpointing", "recipe.training.keep",
)  # fmt: skip


def _finetuning_loss(recipe: FineTuning) -> Callable[..., Tensor]:
    "The loss of a recipe."
    method = recipe.method
    if method.name == "plain":
        return DenoisingLoss(method.dropout)
    if method.name == "aligned_loss":
        return (text_denoiser.TwoStageAlignedLoss if method.two_stage else AlignedLoss)(method.scale)
    return model_guidance_loss(method)


@contextmanager
def add_memory_hint(recipe: FineTuning) -> Iterator[None]:
    "Add the keys of fine-tuning to the advice when memory runs out."
    try:
        yield
    except torch.OutOfMemoryError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        doubled = recipe.method.name == "aligned_loss" and not recipe.method.two_stage
        keys = ["two_stage = true"] if doubled else []
        keys += [] if recipe.pipeline.lora_rank else ["lora_rank = 16"]
        keys += [] if recipe.training.gradient_checkpointing else ["gradient_checkpointing = true"]
        raise torch.OutOfMemoryError(f"{reason}; of the recipe: {', '.join([*keys, 'a smaller size'])}") from None


def _prepare_data(recipe: FineTuning, folder: str | Path, progress: bool = True) -> _CaptionedLatents:
    "Latents and embeddings of a recipe; the pipeline that makes them is gone afterwards."
    data = recipe.data
    told = "0, for a scale-aware network has a new input"
    require(not (recipe.method.scale_range and recipe.pipeline.lora_rank), "lora_rank", recipe.pipeline.lora_rank, told)
    require(data.source, "data", "", "a folder of captioned pictures, as --data FOLDER")
    pictures = load_captioned(data.source, data.size or None, data.crop, data.column)
    pipeline = _open_pipeline(recipe.pipeline.name).to("cuda" if torch.cuda.is_available() else "cpu")
    return cache_captioned(pictures, folder, pipeline, flip=data.flip, crop=data.crop, progress=progress)


def finetune(
    recipe: FineTuning,  # A recipe
    out: str | Path,  # Folder of the run: cache, checkpoints, and at last pipeline, lora and grid
    progress: bool = True,  # Whether to show progress bars
    cpu: bool = False,  # Whether to stay on the CPU although there is an accelerator
) -> Iterator[State]:
    "Encode, train with checkpoints, go on from the newest, and write the pipeline; yields as `fit` does."
    out, loss, loop = Path(out), _finetuning_loss(recipe), recipe.training
    with add_memory_hint(recipe):
        data = _prepare_data(recipe, out / "cache", progress)
        model = text_denoiser.load_text_denoiser(
            recipe.pipeline.name, data.null, lora_rank=recipe.pipeline.lora_rank, seed=loop.seed,
            lora_layers=recipe.pipeline.lora_layers, scale_aware=bool(recipe.method.scale_range),
        )  # fmt: skip
        metadata = {"recipe": recipe.model_dump(), "data": data.latents.index["settings"]}
        metadata["weights"] = weights_digest(model.net.state_dict())
        engine = loop.engine({"folder": out, "metadata": metadata, "may_change": _MAY_CHANGE, "cpu": cpu})
        for state in fit(model, loss, data, loop.steps, **loop.fit_options(), progress=progress, engine=engine):
            yield state
        _finish(recipe, out, state.ema, data.null, progress)


def _finish(recipe: FineTuning, out: Path, model: text_denoiser.TextDenoiser, null: Tensor, progress: bool) -> None:
    "Write pipeline, LoRA and the grid before and after, in the main process."
    device, grid = next(model.parameters()).device, recipe.grid
    if find_processes(device)[0]:
        return
    pipeline, name = _open_pipeline(recipe.pipeline.name), recipe.method.name
    card = text_denoiser.pipeline_card(
        "scale-aware" if model.scale_aware else name, steps=recipe.training.steps,
        samples=recipe.training.steps * recipe.training.batch_size, base=recipe.pipeline.name,
        data=Path(recipe.data.source).name,
        scale=1.0 if name == "model_guidance" and not model.scale_aware else recipe.method.scale,
    )  # fmt: skip
    text_denoiser.save_pipeline(model, pipeline, out / "pipeline", card)
    if recipe.pipeline.lora_rank:
        text_denoiser.save_lora(model, out / "lora")
    if not grid.prompts:
        return
    pipeline.to(device)
    models = {"before": text_denoiser.load_text_denoiser(recipe.pipeline.name, null).to(device), "after": model}
    pictures, table = compare_scales(
        models, grid.prompts, pipeline, grid.grid_scales, clip=grid.clip_model or None, steps=grid.grid_steps,
        seed=recipe.training.seed, size=recipe.data.size or None, progress=progress,
    )  # fmt: skip
    _save_grid(pictures, table, out)
