"""Several processes at one task: who there is, what all of them know, and an error of one as an error of all."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def find_processes(
    device: torch.device,  # Where the work will be done
) -> tuple[int, int]:  # This process's number, and their number
    "The processes that Accelerate or torchrun started, (0, 1) for one."
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not torch.distributed.is_initialized():
        from accelerate.state import PartialState

        PartialState(cpu=device.type == "cpu")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def in_all_processes(
    action: Callable[[], T],  # This process's part
    world: int,  # Number of processes
) -> list[T]:  # The results of all, in every process
    "Let every process do its part and give all results to all; the first error is raised everywhere."
    if world == 1:
        return [action()]
    outcome: list[Any] = [None, None]
    try:
        outcome[0] = action()
    except Exception as error:
        outcome[1] = error
    outcomes: list[Any] = [None] * world
    torch.distributed.all_gather_object(outcomes, outcome)
    for _, problem in outcomes:
        if problem is not None:
            raise problem
    return [result for result, _ in outcomes]


def on_main(
    action: Callable[[], T],  # What only one process should do, such as writing a file
    rank: int,  # This process's number
    world: int,  # Number of processes
) -> T:  # The action's result, in every process
    "Let the main process act and give every process its result, or its error."
    return in_all_processes(action if rank == 0 else lambda: None, world)[0]  # type: ignore[return-value]


def gather_rows(
    x: Tensor,  # This process's rows, `[n, ...]`
    sizes: Sequence[int],  # Rows of each process
) -> Tensor:  # All rows in order, in every process
    "Put the rows of all processes together."
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes)])


def destroy_process_group(
    failed: bool = False,  # Whether an error ends the work; then other processes may be waiting for this one
) -> None:
    "Part from the other processes, if there are any: threads of theirs that outlive Python can abort it at its end."
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and (not failed or torch.distributed.get_backend() == "gloo"):
        torch.distributed.destroy_process_group()
