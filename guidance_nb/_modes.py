"""Training and evaluation mode: whatever a function does to a model, it leaves it in the mode it came in."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put modules and all their parts into evaluation mode inside a `with` block, and each back into its own."""
    training = [part for model in models for part in model.modules() if part.training]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for part in training:
            part.training = True
