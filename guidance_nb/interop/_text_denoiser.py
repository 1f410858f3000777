"""The network of Stable Diffusion to be trained, with LoRA or an input for the scale, and as a pipeline again."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys
from torch.utils.checkpoint import checkpoint

from guidance_nb._checks import require
from guidance_nb._conditions import Condition
from guidance_nb._extras import extra
from guidance_nb._files import write_aside
from guidance_nb._random import keyed_global_rng
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.denoisers import NetworkDenoiser
from guidance_nb.interop._diffusers import DiffusersDenoiser, _open_pipeline, _opening, _PipelineParts
from guidance_nb.interop._networks import Network, Pipeline, Scheduler
from guidance_nb.interop._schedulers import path_from_scheduler

_LORA_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


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

    names = [f".{name}" for name, _ in net.named_modules()]
    for layer in layers:
        found = any(name.endswith(f".{layer}") for name in names)
        require(found, "layer", layer, f"ends of the names of layers, {', '.join(_LORA_LAYERS)}")
    net.requires_grad_(False)
    with keyed_global_rng(torch.device("cpu"), seed, 7):
        net.add_adapter(LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=list(layers)))


class TextDenoiser(DiffusersDenoiser):
    "The network of Stable Diffusion to train; frozen weights are shared by its copies and left out of its state."

    frozen: frozenset[str]

    def __init__(self, net: Network, scheduler: Scheduler, null: Tensor):  # `null` is that of `load_text_denoiser`
        super().__init__(_PipelineParts(net), path_from_scheduler(scheduler), null)
        self.frozen = frozenset(name for name, p in self.named_parameters() if not p.requires_grad)
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_miss_no_frozen)

    def __deepcopy__(self, memo: dict[int, object]) -> "TextDenoiser":
        memo |= {id(p): p for name, p in self.named_parameters() if name in self.frozen}
        new = memo[id(self)] = type(self).__new__(type(self))
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new


def _leave_out_frozen(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    assert isinstance(model, TextDenoiser)
    for name in model.frozen:
        del state[prefix + name]


def _miss_no_frozen(model: nn.Module, found: _IncompatibleKeys) -> None:
    assert isinstance(model, TextDenoiser)
    found.missing_keys[:] = [name for name in found.missing_keys if name not in model.frozen]


def load_text_denoiser(
    source: Pipeline | str | Path, null: Tensor, *, lora_rank: int = 0, lora_layers: Sequence[str] = _LORA_LAYERS,
    scale_aware: bool = False, seed: int = 0,
) -> TextDenoiser:  # fmt: skip
    """The network of a pipeline, or of its folder or name, ready to be trained.

    `null` is the embedding of the null prompt, `[1, tokens, width]`. LoRA of a rank, 0 trains all weights, goes into
    layers by the ends of their names; a network that is `scale_aware` gets an input for the guidance scale.
    """
    require(not (scale_aware and lora_rank), "lora_rank", lora_rank, "0, for a scale-aware network has a new input")
    if isinstance(source, str | Path):
        net, scheduler = _read_parts(str(source))
    else:
        net, scheduler = copy.deepcopy(getattr(source, "unet", None)), source.scheduler
    if scale_aware:
        _add_scale_input(net)
    if lora_rank:
        _add_lora(net, lora_rank, lora_layers, seed)
    return TextDenoiser(net, scheduler, null)


def _read_parts(source: str) -> tuple[Network, Scheduler]:
    with extra("diffusers"):
        import diffusers

    with _opening("pipeline", source):
        kinds = diffusers.DiffusionPipeline.load_config(source)
        net, scheduler = (
            getattr(diffusers, kinds[part][1]).from_pretrained(source, subfolder=part) for part in ("unet", "scheduler")
        )
    return net, scheduler


def _two_stage_pair(model: NetworkDenoiser, x: Tensor, t: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
    "Raw outputs with and without the condition, from two passes, one of them repeated on the way back."
    e_u: Tensor = checkpoint(model.output, x, t, use_reentrant=False)  # first, so its turn backward comes last
    return model.output(x, t, c), e_u


class TwoStageAlignedLoss(AlignedLoss):
    "`AlignedLoss` in two backward stages, eq. (3): same value and gradient, the activations of one branch at a time."

    outputs = staticmethod(_two_stage_pair)


_CARD = (Path(__file__).parent / "cards" / "pipeline.txt").read_text(encoding="utf-8")
_ADVICE = {
    "plain": "This model is guided as the one it came from; {scale:g} is what its maker suggests.",
    "aligned_loss": "Trained by the aligned loss at {scale:g}: sampled there it is the conditional model, unguided.",
    "model_guidance": "Guidance is in the weights: `guidance_scale=1` is one pass a step, and more guides it twice.",
    "scale-aware": "The scale is an input of the network: one pass a step whatever `guidance_scale` is.",
}


def pipeline_card(
    method: Literal["plain", "aligned_loss", "model_guidance", "scale-aware"] = "plain", *, steps: int = 0,
    samples: int = 0, base: str = "a pipeline", data: str = "", scale: float = 1.0,
) -> str:  # fmt: skip
    "What the page of a pipeline says that came from `base` and learned `data`, to be sampled at `scale`; for the Hub."
    advice, data = _ADVICE[method].format(scale=scale), f" of {data}" if data else ""
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
    pipeline, folder = _open_pipeline(source), Path(folder)
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

    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(model.net))
    StableDiffusionPipeline.save_lora_weights(str(folder), unet_lora_layers=layers)
