"""Several processes at one task: who there is, what all of them know, an error of one as an error of all; a thread."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from guidance_nb._extras import extra

T = TypeVar("T")
J = TypeVar("J")


def find_processes(device: torch.device) -> tuple[int, int]:
    "The processes that Accelerate or torchrun started, (0, 1) for one."
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched > 1 and not torch.distributed.is_initialized():
        with extra("engine"):
            from accelerate.state import PartialState

        PartialState(cpu=device.type == "cpu")
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def in_all_processes(action: Callable[[], T], world: int) -> list[T]:
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


def on_main(action: Callable[[], T], rank: int, world: int) -> T:
    "Let the main process act and give every process its result, or its error."
    return in_all_processes(action if rank == 0 else lambda: None, world)[0]  # type: ignore[return-value]


def _gather(x: Tensor, sizes: Sequence[int]) -> Tensor:
    "The rows of all processes in order, in every process."
    padded = torch.cat([x, x.new_zeros(max(sizes) - len(x), *x.shape[1:])]).contiguous()
    parts = [torch.empty_like(padded) for _ in sizes]
    torch.distributed.all_gather(parts, padded)
    return torch.cat([part[:n] for part, n in zip(parts, sizes)])


def row_shares(n: int, batch_size: int, world: int) -> list[int]:
    "Rows of each process: whole batches, the last one aside."
    ends = [min(n, batch_size * (-(-n // batch_size) * number // world)) for number in range(world + 1)]
    return [end - start for start, end in zip(ends, ends[1:])]


def share_rows(
    action: Callable[[slice], dict[str, Tensor]], n: int, device: torch.device, batch_size: int = 1
) -> dict[str, Tensor]:
    "Make rows, each process a contiguous share of them; an error of one is raised in all."
    rank, world = find_processes(device)
    if world == 1:
        return action(slice(0, n))
    sizes = row_shares(n, batch_size, world)
    first = sum(sizes[:rank])
    made: dict[str, Tensor] = {}

    def act() -> dict[str, Tensor]:
        made.update(action(slice(first, first + sizes[rank])) if sizes[rank] else {})
        return {key: rows[:0].cpu() for key, rows in made.items()}

    forms = next(filter(None, in_all_processes(act, world)))
    where = device if torch.distributed.get_backend() != "gloo" else torch.device("cpu")
    return {key: _gather(made.get(key, form).to(where), sizes) for key, form in forms.items()}


def destroy_process_group(failed: bool = False) -> None:
    "Part from the other processes, if there are any: threads of theirs that outlive Python can abort it at its end."
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several and (not failed or torch.distributed.get_backend() == "gloo"):
        torch.distributed.destroy_process_group()


def prefetch(make: Callable[[J], T], jobs: Iterable[J], depth: int = 2) -> Generator[T, None, None]:
    "Make batches in a thread, ahead of their use; ends the thread when it is closed or a batch fails."
    waiting: deque[Future[T]] = deque()
    pool = ThreadPoolExecutor(1)
    try:
        for job in jobs:
            waiting.append(pool.submit(make, job))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
