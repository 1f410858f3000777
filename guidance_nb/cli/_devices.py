"""The device of this process, and what the main process does alone."""

from collections.abc import Callable
from typing import TypeVar

import torch

from guidance_nb._processes import find_processes, on_main

_T = TypeVar("_T")


def own_device() -> torch.device:
    "The accelerator of this process if there is one, else the CPU."
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    find_processes(device)  # where there are several, this points each at its own card
    return device


def is_main() -> bool:
    "Whether this is the process that writes files."
    return find_processes(own_device())[0] == 0


def main_only(action: Callable[[], _T]) -> _T:
    "Let the main process do an `action`, which calls no main_only itself; every process gets its result or its error."
    return on_main(action, *find_processes(own_device()))
