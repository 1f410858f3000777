"""Layers of a network by number or name."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from torch import nn

from ._checks import require
from ._extras import extra

Layer: TypeAlias = Any  # A layer of diffusers
Layers: TypeAlias = int | str | Sequence[int | str]  # Numbers, or parts of names


def choose_layers(found: Mapping[str, Layer], layers: Layers) -> list[Layer]:
    "Look up layers by number or part of a name, or say in one line which there are; an empty list chooses none."
    names, chosen = list(found), []
    for wanted in [layers] if isinstance(layers, int | float | str) else layers:
        if isinstance(wanted, str):
            hits = [name for name in names if wanted in name]
        else:
            hits = names[wanted : wanted + 1] if isinstance(wanted, int) and wanted >= 0 else []
        there = f"0 to {len(names) - 1}, or part of a name: {', '.join(names)}" if names else "no layer is there"
        require(hits, "layers", wanted, there)
        chosen += hits
    return [found[name] for name in dict.fromkeys(chosen)]


def attention_layers(model: nn.Module) -> dict[str, Layer]:
    "The attention layers of `diffusers` networks inside a model, self and cross, by name."
    with extra("diffusers"):
        from diffusers.models.attention_processor import Attention

    return {name: part for name, part in model.named_modules() if isinstance(part, Attention)}
