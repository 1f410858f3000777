"""Pictures of networks over guidance scales, and how well CLIP finds them to agree with their prompts."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm.auto import tqdm

from guidance_nb._checks import require
from guidance_nb._extras import extra
from guidance_nb._files import Json, write_aside
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import NetworkDenoiser, count_nfe
from guidance_nb.images._data import Size, to_uint8
from guidance_nb.interop._diffusers import _opening, from_diffusers
from guidance_nb.interop._networks import Pipeline
from guidance_nb.interop._schedulers import scheduler_times
from guidance_nb.model_guidance import FixedScale
from guidance_nb.samplers import sample

with extra("images"):
    from torchvision.transforms.functional import to_pil_image
    from torchvision.utils import make_grid

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPProcessor


@torch.no_grad()
def clip_score(
    images: Tensor, prompts: Sequence[str], clip: "tuple[CLIPModel, CLIPProcessor] | str | Path", batch_size: int = 32
) -> Tensor:
    """Agreement of pictures with their texts `[n]`, 0 to 100, eq. (4) (arXiv 2104.08718, factor of torchmetrics).

    `images` are `[n, 3, height, width]`, in [-1, 1] or uint8; `clip` is a model and its processor, or their folder.
    """
    require(len(images) == len(prompts), "prompts", f"{len(prompts)} for {len(images)} images", "one an image")
    if isinstance(clip, str | Path):
        with extra("sd"):
            from transformers import CLIPModel, CLIPProcessor

        with _opening("clip", clip):
            clip = CLIPModel.from_pretrained(str(clip)).eval(), CLIPProcessor.from_pretrained(str(clip))
    model, processor = clip
    levels, scores = images if images.dtype == torch.uint8 else to_uint8(images.cpu().clamp(-1, 1)), []
    for i in range(0, len(prompts), batch_size):
        pictures, texts = [to_pil_image(x.cpu()) for x in levels[i : i + batch_size]], list(prompts[i : i + batch_size])
        inputs = processor(text=texts, images=pictures, return_tensors="pt", padding=True, truncation=True)
        found = model(**inputs.to(model.device))
        cosine = torch.cosine_similarity(found.image_embeds.float(), found.text_embeds.float())
        scores.append(100 * cosine.clamp(min=0).cpu())
    return torch.cat(scores)


def compare_scales(
    models: Mapping[str, NetworkDenoiser], prompts: Sequence[str], pipeline: Pipeline,
    scales: Sequence[float] = (1.0, 2.0, 4.0, 7.5), *, steps: int = 50, seed: int = 0, size: Size | None = None,
    clip: "tuple[CLIPModel, CLIPProcessor] | str | Path | None" = None, progress: bool = True,
) -> tuple[Tensor, list[Json]]:  # fmt: skip
    """Pictures of several networks over guidance scales, and a table with NFE and, given `clip`, CLIP score.

    `models` are denoisers of the latents of `pipeline`, by name. A scale of 1 is the conditional model; a network that
    has the scale as an input is told it, and any other is guided by classifier-free guidance. `size` is a side in
    pixels, or height and width; None for the pipeline's own. `clip` is a CLIP model and its processor, or their folder.

    Pictures are `[models, scales, prompts, 3, height, width]`, uint8, by so many `steps` of DDIM on the times of the
    pipeline's scheduler; picture i depends on (`seed`, i) alone, and not on model and scale. A row of the table has
    `model`, `scale`, `steps`, `seed`, `n`, the number of prompts, `nfe`, evaluations per picture, and `clip_score`,
    the mean of eq. (4) from 0 to 100 (arXiv 2104.08718). A size that the pipeline cannot draw, and a `clip` that cannot
    be opened, raise `ValueError`.
    """
    around = from_diffusers(pipeline, null=None, size=size)
    conditions, times = around.encode(prompts), scheduler_times(pipeline.scheduler, steps)
    rows, pictures = [], []
    jobs = [(name, float(scale)) for name in models for scale in scales]
    for name, scale in tqdm(jobs, disable=not progress, unit=" grids"):
        guided = (FixedScale if models[name].scale_aware else ClassifierFreeGuidance)(models[name], scale)
        with count_nfe() as counted:
            latents = sample(guided, conditions, around.shape, "ddim", times=times, seed=seed, progress=False)
        pictures.append(to_uint8(around.decode_latents(latents).cpu().clamp(-1, 1).float()))
        row = {"model": name, "scale": scale, "steps": len(times) - 1, "seed": seed, "n": len(prompts)}
        row["nfe"] = counted.total / len(prompts)
        if clip is not None:
            row["clip_score"] = clip_score(pictures[-1], prompts, clip).mean().item()
        rows.append(row)
    return torch.stack(pictures).unflatten(0, (len(models), len(scales))), rows


def _save_grid(pictures: Tensor, table: list[Json], out: Path) -> None:
    "Write a grid, one row for each model and scale and one column for each prompt, and its table."
    with write_aside(out / "grid.csv") as aside, open(aside, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(table[0]))
        writer.writeheader()
        writer.writerows(table)
    with write_aside(out / "grid.png") as aside:
        to_pil_image(make_grid(pictures.flatten(0, 2), nrow=pictures.shape[2])).save(aside, "PNG")
