"""How the networks of diffusers are called: names of conditions, Flux's patches, the scale that some take."""

import math
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from guidance_nb._checks import require
from guidance_nb._files import Json

Network: TypeAlias = Any  # A network of diffusers, or one wrapped by peft
Pipeline: TypeAlias = Any  # A pipeline of diffusers
Scheduler: TypeAlias = Any  # A scheduler of diffusers

CONDITIONS = {
    "UNet2DModel": ("class_labels",),
    "DiTTransformer2DModel": ("class_labels",),
    "UNet2DConditionModel": ("encoder_hidden_states",),
    "SD3Transformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "FluxTransformer2DModel": ("encoder_hidden_states", "pooled_projections"),
}


def network_family(net: Network) -> str:
    "The class whose calling convention a network follows; a `ValueError` for any other."
    plain = net.get_base_model() if hasattr(net, "get_base_model") else net
    names = [kind.__name__ for kind in type(plain).__mro__]
    family = next((family for family in CONDITIONS if family in names), "")
    require(family, "network", names[0], f"{', '.join(CONDITIONS)}, or `from_callable`")
    return family


def condition_names(net: Network) -> tuple[str, ...]:
    "The tensors a network is conditioned on."
    names = CONDITIONS[network_family(net)]
    sized = net.config.get("addition_embed_type") == "text_time"  # SDXL
    return (*names, "text_embeds", "time_ids") if sized else names


def takes_labels(net: Network) -> bool:
    "Whether conditions are class indices."
    return condition_names(net) == ("class_labels",)


def name_conditions(net: Network, c: Tensor | Mapping[str, Tensor]) -> dict[str, Tensor]:
    "Conditions by the names the network gives them."
    names = condition_names(net)
    given = c if isinstance(c, Mapping) else {names[0] if len(names) == 1 else "a tensor": c}
    require(sorted(given) == sorted(names), "c", ", ".join(sorted(given)), f"a tensor each for {', '.join(names)}")
    return {name: given[name] for name in names}


def latent_channels(net: Network) -> int:
    "Channels of the noisy data a network takes."
    patch = 4 if network_family(net) == "FluxTransformer2DModel" else 1
    return net.config.in_channels // patch


def to_patches(x: Tensor) -> tuple[Tensor, Tensor]:
    "Latents as the row of 2 x 2 patches that Flux sees `[batch, patches, 4 channels]`, and positions `[patches, 3]`."
    height, width = x.shape[2:]
    positions = torch.cartesian_prod(torch.arange(1), torch.arange(height // 2), torch.arange(width // 2))
    return nn.functional.pixel_unshuffle(x, 2).flatten(2).mT, positions.to(x)


def from_patches(tokens: Tensor, shape: torch.Size) -> Tensor:
    "The inverse of `to_patches`, for latents of a shape."
    return nn.functional.pixel_shuffle(tokens.mT.unflatten(2, (shape[2] // 2, shape[3] // 2)), 2)


def embed_scale(scale: Tensor, width: int) -> Tensor:
    "Sines and cosines of 1000 (scale - 1) `[batch, width]`, as pipelines of Stable Diffusion feed them to the network."
    rates = torch.exp(-math.log(10000.0) / (width // 2 - 1) * torch.arange(width // 2, device=scale.device))
    angles = 1000 * (scale.float() - 1)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], 1)


def takes_scale(net: Network) -> bool:
    "Whether the guidance scale is an input of the network."
    return bool(net.config.get("guidance_embeds") or net.config.get("time_cond_proj_dim"))


def call_network(
    net: Network, x: Tensor, time: Tensor, conditions: Mapping[str, Tensor], scale: Tensor | None = None
) -> Tensor:
    """One evaluation in the calling convention of the network's family; sizes and labels keep their precision.

    `x` is as the network sees it, `time` `[batch]` what it is told, `scale` `[batch]` for networks that take it.
    """
    family, dtype, keep = network_family(net), next(net.parameters()).dtype, ("time_ids", "class_labels")
    given: Json = {key: c if key in keep else c.to(dtype) for key, c in conditions.items()}
    data = x.to(dtype)
    if family == "FluxTransformer2DModel":
        data, positions = to_patches(data)
        text = positions.new_zeros(given["encoder_hidden_states"].shape[1], 3)
        given |= {"img_ids": positions, "txt_ids": text, "guidance": scale}
        return from_patches(net(data, timestep=time / 1000, **given, return_dict=False)[0], x.shape).to(x.dtype)
    if family == "UNet2DConditionModel":
        added = {name: given.pop(name) for name in list(given) if name != "encoder_hidden_states"}
        given |= {"added_cond_kwargs": added} if added else {}
        if scale is not None:
            given["timestep_cond"] = embed_scale(scale, net.config.time_cond_proj_dim).to(dtype)
    y = net(data, timestep=time, **given, return_dict=False)[0]
    return y[:, : x.shape[1]].to(x.dtype)  # a learned variance, in further channels, is left alone
