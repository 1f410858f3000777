"""Libraries that only some uses need: a missing one is one line with the command that installs it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

Extra = Literal["plots", "images", "engine", "diffusers", "cli", "sd", "dinov2", "live"]


@contextmanager
def extra(name: Extra) -> Iterator[None]:
    """Import inside `with extra("images"):` what the extra `images` of settings.ini installs."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] == "guidance_nb":
            raise
        command = f"pip install 'guidance_nb[{name}]'"
        raise ImportError(f"{error.name} is not installed, and this needs it: {command}", name=error.name) from None
