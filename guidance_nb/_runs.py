"""What a run of `sample` computes once: functions of its times, and what follows from its conditions alone."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from torch import Tensor
from torch.compiler import is_dynamo_compiling

from ._conditions import Condition

T = TypeVar("T")
Functions = Callable[[Tensor], tuple[Tensor, ...]]  # of times, each shaped like them


class _Run:
    def __init__(self, times: Tensor, c: Condition | None):
        self.grid, self.times = times, times.unbind()
        self.places = {id(t): place for place, t in enumerate(self.times)}
        self.known: dict[int, object] = {id(None): None, id(c): c}  # conditions, and what was made of them
        self.tables: dict[tuple, tuple[object, Sequence[Any]]] = {}
        self.kept: dict[tuple, tuple[object, Any]] = {}


_open: ContextVar[_Run | None] = ContextVar("run", default=None)


@contextmanager
def one_run(times: Tensor, c: Condition | None) -> Iterator[tuple[Tensor, ...]]:
    "The times `[steps + 1]` of a run one by one; they and its conditions have been checked."
    run = _Run(times, c)
    token = _open.set(run)
    try:
        yield run.times
    finally:
        _open.reset(token)


def _this_run() -> _Run | None:
    return None if is_dynamo_compiling() else _open.get()


def is_of_run(t: Tensor, c: Condition | None) -> bool:
    "Whether a time and conditions are those of a run."
    run = _this_run()
    return run is not None and id(t) in run.places and id(c) in run.known


def at_time(owner: object, name: object, compute: Callable[[Tensor], Sequence[Any]], t: Tensor) -> Any:
    """What belongs to a time of a run; `compute` gives it for all times of the run together.

    It is known by its `owner` and a `name`; None for a time that is of no run.
    """
    run = _this_run()
    if run is None or id(t) not in run.places:
        return None
    key = (id(owner), name)
    if key not in run.tables:
        run.tables[key] = owner, compute(run.grid)
    return run.tables[key][1][run.places[id(t)]]


def once(c: Condition | None, make: Callable[[], T], *key: object) -> T:
    "What follows from conditions `c` and a `key` alone, made once if they are those of a run."
    run = _this_run()
    if run is None or id(c) not in run.known:
        return make()
    name = (id(c), *map(id, key))
    if name not in run.kept:
        run.kept[name] = key, (made := make())
        run.known |= {id(part): part for part in (made if isinstance(made, tuple) else (made,))}
    return run.kept[name][1]
