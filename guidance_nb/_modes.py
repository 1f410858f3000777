"""Modes and layers: whatever a function does to a model, it leaves it as it came in."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put modules and all their parts into evaluation mode inside a `with` block, and each back into its own."""
    parts = [part for model in models for part in model.modules()]
    training = [part for part in parts if part.training]
    for part in parts:
        if part.training:
            part.training = False
        if (type(part).train, type(part).eval) != (nn.Module.train, nn.Module.eval):
            part.eval()  # its own, for what a method keeps from step to step is cleared by it
    try:
        yield
    finally:
        for part in training:
            part.training = True


@contextmanager
def swapped(forwards: Mapping[nn.Module, Callable[..., object]]) -> Iterator[None]:
    """Let modules compute something else inside a `with` block, and leave them exactly as they were."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, old in before.items():
            vars(module).pop("forward", None)
            if old is not None:
                module.forward = old
