"""Samples drawn by many processes: sample i depends on the seed and i alone, so each draws a range of its own."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from guidance_nb._conditions import Condition, count, take_rows
from guidance_nb._processes import find_processes, share_rows
from guidance_nb.denoisers import Denoiser
from guidance_nb.samplers import sample

if TYPE_CHECKING:
    from guidance_nb.images._features import Extractor, Features

__all__: list[str] = []


def sample_sharded(model: Denoiser, c: Condition | int, shape: tuple[int, ...], **options: Any) -> Tensor:
    """`sample`, divided among the processes of `accelerate launch`; the result is in all of them."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    start, init = options.pop("start", 0), options.pop("init", None)
    options["progress"] = options.get("progress", True) and find_processes(device)[0] == 0

    def draw(rows: slice) -> dict[str, Tensor]:
        own: Condition | int = rows.stop - rows.start if isinstance(c, int) else take_rows(c, rows)
        begin = None if init is None else init[rows]
        return {"x": sample(model, own, shape, start=start + rows.start, init=begin, **options)}

    return share_rows(draw, c if isinstance(c, int) else count(c), device)["x"]


def extract_sharded(
    images: Tensor, extractor: "Extractor", name: str = "images", batch_size: int = 64, progress: bool = False
) -> "Features":
    """`extract`, divided among the processes of a launch in whole batches; the result is in all of them, on the CPU."""
    from guidance_nb.images._features import Features, check_images, checksum, extract

    device = torch.device(extractor.device)
    progress = progress and find_processes(device)[0] == 0

    def look(rows: slice) -> dict[str, Tensor]:
        return extract(images[rows], extractor, name, batch_size, progress).rows

    rows = share_rows(look, len(check_images(name, images)), device, batch_size)
    whole = {layer: part.cpu() for layer, part in rows.items()}
    return Features(extractor.name, whole, {}, name, len(images), checksum(images), tuple(images.shape[2:]))
