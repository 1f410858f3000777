"""Several processes at one task: who there is, what all of them know, an error of one as an error of all; a thread."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

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
    outcome: T | Exception
    try:
        outcome = action()
    except Exception as error:
        outcome = error
    outcomes = [outcome] * world
    torch.distributed.all_gather_object(outcomes, outcome)
    for found in outcomes:
        if isinstance(found, Exception):
            raise found
    return outcomes  # type: ignore[return-value]


def on_main(action: Callable[[], T], rank: int, world: int) -> T:
    "Let the main process act and give every process its result, or its error."
    return in_all_processes(action if rank == 0 else lambda: None, world)[0]  # type: ignore[return-value]


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

    def act() -> dict[str, Tensor]:
        made = action(slice(first, first + sizes[rank])) if sizes[rank] else {}
        return {key: rows.cpu() for key, rows in made.items()}

    shares = [share for share in in_all_processes(act, world) if share]
    return {key: torch.cat([share[key] for share in shares]).to(device) for key in shares[0]}


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
