"""Libraries that only some uses need: a missing one is one line with the command that installs it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec, module_from_spec
from types import ModuleType
from typing import Literal

Extra = Literal["plots", "images", "engine", "diffusers", "cli", "sd", "dinov2", "live"]


@contextmanager
def extra(name: Extra) -> Iterator[None]:
    """Import inside `with extra("images"):` what the extra `images` of settings.ini installs."""
    try:
        if name == "diffusers":
            _postpone("diffusers.models.transformers", "diffusers.models.unets")
        yield
    except ModuleNotFoundError as error:
        command = f"pip install 'guidance_nb[{name}]'"
        raise ImportError(f"{error.name} is not installed, and this needs it: {command}", name=error.name) from None


class _Postponed(ModuleType):
    """A package that runs when it is first asked for something that is not there yet."""

    def __getattr__(self, name: str) -> object:
        if not name.startswith("__") and self.__spec__ and self.__spec__.loader:
            self.__class__ = ModuleType  # type: ignore[assignment]
            self.__spec__.loader.exec_module(self)
        return ModuleType.__getattribute__(self, name)  # or its own AttributeError


def _postpone(*packages: str) -> None:
    """Let one module of a package be imported without all others that the package imports, peft among them."""
    for package in packages:
        if package not in sys.modules and (spec := find_spec(package)):
            module = sys.modules[package] = module_from_spec(spec)
            module.__class__ = _Postponed
            parent, _, name = package.rpartition(".")
            setattr(sys.modules[parent], name, module)
