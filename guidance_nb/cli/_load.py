"""A trained network out of its checkpoint: what the public `load` gives, and what the command line builds on."""

import difflib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from guidance_nb._checks import require, require_that
from guidance_nb._files import Json
from guidance_nb.cli._devices import own_device
from guidance_nb.engine._checkpoints import Checkpoint, load_weights, read_checkpoint
from guidance_nb.flow_postprocessing import FlowPostprocessor
from guidance_nb.images._networks import ImageClassifier, build_network, image_denoiser
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.paths import Path as NoisePath

if TYPE_CHECKING:  # to open a model needs no pydantic
    from guidance_nb.cli._recipe import Recipe

PATHS: dict[str, Callable[[], NoisePath]] = {
    "flow": FlowPath,
    "vp-linear": lambda: VPPath("linear"),
    "vp-cosine": lambda: VPPath("cosine"),
    "edm": EDMPath,
}
MODELS = Path(__file__).parent.parent / "models"  # trained models that come with the package, a folder each


def _shuffled(n: int) -> torch.Tensor:
    "The numbers below n in an order that is random and always the same."
    return torch.randperm(n, generator=torch.Generator().manual_seed(0))


def _model_names() -> list[str]:
    "Names of the trained models that come with the package."
    return sorted(path.parent.name for path in MODELS.glob("*/checkpoint.json"))


def make_model(recipe: "Recipe", shape: tuple[int, ...], num_classes: int) -> nn.Module:
    "The untrained network of a recipe, the same on every call."
    network, method, seed = recipe.network, recipe.method, recipe.training.seed
    path = PATHS[network.path]()
    if method.name in ("classifier", "evaluation_classifier"):
        return ImageClassifier(network.name, shape, num_classes, path, seed=seed, **network.settings)
    if method.name == "flow_postprocessing":
        net = build_network(network.name, shape, num_classes, seed=seed, **network.settings)
        return FlowPostprocessor(shape, num_classes, dropout=method.dropout, net=net)
    options: Json = {"scale_aware": _is_scale_aware(recipe), "seed": seed, **network.settings}
    return image_denoiser(network.name, shape, path, num_classes, network.prediction, **options)


def _is_scale_aware(recipe: "Recipe") -> bool:
    "Whether a guidance scale is an input of the network of a `recipe`."
    return recipe.method.name == "model_guidance" and bool(recipe.method.scale_range)


def _open_checkpoint(
    source: str | Path,  # A checkpoint, a folder of them, whose newest intact one is taken, or a name of _model_names
) -> Checkpoint:  # One that holds a recipe
    "Find and check the checkpoint of a trained network."
    folder = Path(source)
    if not folder.exists() and (names := _model_names()):
        near = difflib.get_close_matches(str(source), names, 1, 0.4) or names
        require(str(source) in names, "model", str(source), f"a folder that is there, or {', '.join(near)}")
        folder = MODELS / str(source)
    saved = read_checkpoint(folder)
    holds = {"recipe", "shape", "classes"} <= set(saved.metadata)
    require_that(holds, f"{saved.path} holds no recipe", "checkpoints of `guidance-nb train`")
    return saved


def _restore(saved: Checkpoint, recipe: "Recipe", ema: bool = True) -> nn.Module:
    "Rebuild a trained network."
    model = make_model(recipe, tuple(saved.metadata["shape"]), len(saved.metadata["classes"]))
    load_weights(model, saved.ema if ema else saved.model, str(saved.path))
    return _ready(model)


def _ready(model: nn.Module) -> nn.Module:
    "On the accelerator if there is one, in evaluation mode, its weights without gradients."
    return model.to(own_device()).eval().requires_grad_(False)


def load(
    source: str | Path,  # A model of the package ("mnist-cfg"), a run or checkpoint, a diffusers folder, a Hub name
    ema: bool = True,  # Whether to take the moving average of the weights, of a run
) -> nn.Module:  # A `Denoiser` on the accelerator if there is one; a classifier or flow if one was trained
    "A trained network by name or folder, ready to be guided and sampled from; nothing is unpickled."
    folder = Path(source)
    if (folder / "model_index.json").is_file():
        from guidance_nb.interop._diffusers import from_diffusers

        return _ready(from_diffusers(folder))
    if (folder / "config.json").is_file() or (not folder.exists() and str(source).count("/") == 1):
        from guidance_nb.interop._hub import open_pretrained

        return _ready(open_pretrained(str(source)))
    saved = _open_checkpoint(source)
    tables = {name: part for name, part in saved.metadata["recipe"].items() if isinstance(part, dict)}
    recipe = SimpleNamespace(**{name: SimpleNamespace(**part) for name, part in tables.items()})
    return _restore(saved, cast("Recipe", recipe), ema)
