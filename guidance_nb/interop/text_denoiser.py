"""The network of Stable Diffusion to be trained, with LoRA or an input for the scale, and as a pipeline again."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from guidance_nb._checks import Whole, check_choice, checked, require
from guidance_nb._extras import extra
from guidance_nb._files import write_aside
from guidance_nb._random import keyed_generator
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.denoisers import NetworkDenoiser
from guidance_nb.interop._networks import Network, Pipeline, Scheduler, condition_names, latent_channels
from guidance_nb.interop.diffusers import DiffusersDenoiser, PipelineParts, has_encoder, open_pipeline, opening
from guidance_nb.interop.schedulers import path_from_scheduler
from guidance_nb.training import LossContext

__all__: list[str] = []

_LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


def _check_network(net: Network, scheduler: Scheduler) -> None:
    "Raise an error for a network that is not fine-tuned here, or a scheduler that does not say what it predicts."
    name = type(net).__name__
    fine = name == "UNet2DConditionModel" and condition_names(net) == ("encoder_hidden_states",)
    require(fine, "network", name, "a UNet2DConditionModel conditioned on text alone")
    clock = path_from_scheduler(scheduler).clock
    require(clock, "scheduler", type(scheduler).__name__, "any but those of EDM")


def check_pipeline(pipeline: Pipeline) -> None:
    "Raise a one-line error for a pipeline that cannot be fine-tuned."
    name, vae, allowed = type(pipeline).__name__, getattr(pipeline, "vae", None), "a Stable Diffusion pipeline"
    for part in ("unet", "vae"):
        require(getattr(pipeline, part, None) is not None, f"{part} of {name}", None, allowed)
    _check_network(pipeline.unet, pipeline.scheduler)
    for part in ("text_encoder", "tokenizer"):
        told = "one, for the null prompt"
        require(has_encoder(pipeline) and getattr(pipeline, part, None) is not None, f"{part} of {name}", None, told)
    channels, made = latent_channels(pipeline.unet), vae.config.latent_channels  # type: ignore[union-attr]
    allowed = f"{made}, as the autoencoder makes (inpainting and depth models have more)"
    require(channels == made, "channels of the unet", channels, allowed)


def _add_scale_input(net: Network, width: int = 256) -> None:
    "Give a network an input for the guidance scale, of zero weight, in place."
    if net.config.time_cond_proj_dim is not None:
        return
    layer, like = net.time_embedding, next(net.parameters())
    layer.cond_proj = nn.Linear(width, layer.linear_1.in_features, bias=False, device=like.device, dtype=like.dtype)
    nn.init.zeros_(layer.cond_proj.weight)
    net.register_to_config(time_cond_proj_dim=width)


def _add_lora(net: Network, rank: int, layers: Sequence[str] = _LORA_LAYERS, seed: int = 0) -> None:
    "Freeze a network and add low-rank matrices to some of its layers, in place (arXiv 2106.09685)."
    with extra("sd"):
        from peft import LoraConfig

    names = [name for name, _ in net.named_modules()]
    for layer in layers:
        found = any(name == layer or name.endswith(f".{layer}") for name in names)
        require(found, "layer", layer, f"ends of the names of layers, {', '.join(_LORA_LAYERS)}")
    net.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(keyed_generator(seed, 7).initial_seed())
        net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(layers)))


class TextDenoiser(DiffusersDenoiser):
    "The network of Stable Diffusion to train; frozen weights are shared by its copies and left out of its state."

    frozen: frozenset[str]

    def __init__(
        self,
        net: Network,  # A UNet2DConditionModel, perhaps with LoRA layers or a scale input
        scheduler: Scheduler,  # Its scheduler
        null: Tensor,  # Embedding of the null prompt, `[1, tokens, width]`
    ):
        _check_network(net, scheduler)
        width = net.config.cross_attention_dim
        require(null.shape[-1] == width, "shape of null", tuple(null.shape), f"width {width}, as the network takes")
        super().__init__(PipelineParts(net), path_from_scheduler(scheduler), null)
        self.frozen = frozenset(name for name, p in self.named_parameters() if not p.requires_grad)

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        "The weights that are trained, and the null prompt."
        whole = super().state_dict(*args, **kwargs)
        return {k: v for k, v in whole.items() if k not in self.frozen} if self.frozen and not kwargs else whole

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        "Load what `state_dict` gave."
        return super().load_state_dict(state_dict, strict and not self.frozen, assign)

    def __deepcopy__(self, memo: dict[int, object]) -> "TextDenoiser":
        memo |= {id(p): p for name, p in self.named_parameters() if name in self.frozen}
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


@checked
def load_text_denoiser(
    source: Pipeline | str | Path,  # A pipeline; or its folder or name, of which network and scheduler are read
    null: Tensor,  # Embedding of the null prompt, `[1, tokens, width]`
    *,
    lora_rank: Whole = 0,  # Rank of LoRA; 0 trains all weights
    lora_layers: Sequence[str] = _LORA_LAYERS,  # How the names of the layers end that get it
    scale_aware: bool = False,  # Whether to give the network an input for the scale
    seed: int = 0,  # Seed of LoRA
) -> TextDenoiser:  # Ready for fit
    "The network of a pipeline, ready to be trained."
    require(not (scale_aware and lora_rank), "lora_rank", lora_rank, "0, for a scale-aware network has a new input")
    if isinstance(source, str | Path):
        net, scheduler = _read_parts(str(source))
    else:
        check_pipeline(source)
        net, scheduler = copy.deepcopy(source.unet), source.scheduler
    _check_network(net, scheduler)
    if scale_aware:
        _add_scale_input(net)
    if lora_rank:
        _add_lora(net, lora_rank, lora_layers, seed)
    return TextDenoiser(net, scheduler, null)


def _read_parts(source: str) -> tuple[Any, Any]:
    with extra("diffusers"):
        import diffusers

    with opening("pipeline", source):
        kinds = diffusers.DiffusionPipeline.load_config(source)
        read = lambda part: getattr(diffusers, kinds[part][1]).from_pretrained(source, subfolder=part)  # noqa: E731
        return read("unet"), read("scheduler")


class TwoStageAlignedLoss(AlignedLoss):
    "`AlignedLoss` in two backward stages, eq. (3): same value and gradient, the activations of one branch at a time."

    def __call__(self, model: NetworkDenoiser, x0: Tensor, c: Tensor, context: LossContext) -> Tensor:
        "Per-sample losses `[batch]`, from two passes, one of them repeated on the way back."
        require(c is not None, "c", None, "one condition per sample")
        t, eps = context.times(x0), context.noise(x0)
        x, y = model.path.interpolate(x0, eps, t), model.target(x0, eps, t)
        e_u: Tensor = checkpoint(model.output, x, t, use_reentrant=False)  # first, so its turn backward comes last
        e_c = model.output(x, t, c)
        error = (y - (e_u + self.scale * (e_c - e_u))).square()
        if self.anchor:
            error = error + self.anchor * (y - e_u).square()
        return error.flatten(1).mean(1)


_CARD = (Path(__file__).parent / "cards" / "pipeline.txt").read_text(encoding="utf-8")
_ADVICE = {
    "plain": "This model is guided as the one it came from; {scale:g} is what its maker suggests.",
    "aligned_loss": "Trained by the aligned loss at {scale:g}: sampled there it is the conditional model, unguided.",
    "model_guidance": "Guidance is in the weights: `guidance_scale=1` is one pass a step, and more guides it twice.",
    "scale-aware": "The scale is an input of the network: one pass a step whatever `guidance_scale` is.",
}


def pipeline_card(
    method: str = "plain",  # A key of `ADVICE`
    *,
    steps: int = 0,  # Optimiser steps
    samples: int = 0,  # Samples seen
    base: str = "a pipeline",  # What it came from
    data: str = "",  # What was learned
    scale: float = 1.0,  # `guidance_scale` to sample with
) -> str:  # Markdown with the Hub's header
    "What the page of a fine-tuned pipeline says."
    advice, data = _ADVICE[check_choice("method", method, _ADVICE)].format(scale=scale), f" of {data}" if data else ""
    return _CARD.format(method=method, steps=steps, samples=samples, data=data, base=base, advice=advice, scale=scale)


def merged_network(model: TextDenoiser) -> Network:
    "The network with its LoRA layers merged into the weights."
    net: Network = copy.deepcopy(model.net).cpu().eval().requires_grad_(False)
    if getattr(net, "peft_config", None):
        net.fuse_lora()
        net.unload_lora()
    return net


def save_pipeline(model: TextDenoiser, source: Pipeline | str | Path, folder: str | Path, card: str = "") -> None:
    "Write an ordinary pipeline of `diffusers`, completely or not at all."
    pipeline, folder = open_pipeline(source), Path(folder)
    free = not folder.exists() or (folder / "model_index.json").is_file()
    require(free, "folder", str(folder), "a new one, or one that holds a pipeline")
    old = pipeline.unet
    pipeline.register_modules(unet=merged_network(model))
    try:
        with write_aside(folder) as aside:
            pipeline.save_pretrained(str(aside))
            (aside / "README.md").write_text(card or pipeline_card(), encoding="utf-8")
    finally:
        pipeline.register_modules(unet=old)


def save_lora(model: TextDenoiser, folder: str | Path) -> None:
    "Write LoRA's additions as `load_lora_weights` of `diffusers` reads them."
    with extra("diffusers"):
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import convert_state_dict_to_diffusers
    with extra("sd"):
        from peft import get_peft_model_state_dict

    require(getattr(model.net, "peft_config", None), "LoRA layers", None, "a network trained with lora_rank")
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.net))
    StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=layers)
