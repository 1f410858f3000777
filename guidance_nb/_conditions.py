"""Conditions: class labels `[batch]`, embeddings `[batch, ...]`, or a mapping of such tensors; None is no condition."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import torch
from torch import Tensor

from guidance_nb._checks import check_kind, require, require_that

if TYPE_CHECKING:
    from .denoisers import NetworkDenoiser

Condition: TypeAlias = Tensor | Mapping[str, Tensor]
C = TypeVar("C", bound=Condition | None)


def map_condition(change: Callable[[Tensor], Tensor], c: C) -> C:
    """Change every tensor of a condition."""
    if c is None:
        return c
    return {name: change(part) for name, part in c.items()} if isinstance(c, Mapping) else change(c)  # type: ignore


def take_rows(c: C, rows: Tensor | slice) -> C:
    """Some samples of a condition."""
    return map_condition(lambda part: part[rows], c)


def repeat(c: C, copies: int) -> C:
    """A condition several times over, `[copies * batch, ...]`."""
    return map_condition(lambda part: torch.cat([part] * copies), c)


def join(conditions: Sequence[Condition]) -> Condition:
    """Several batches of conditions as one."""
    first = conditions[0]
    if isinstance(first, Mapping):
        return {name: torch.cat([c[name] for c in conditions]) for name in first}  # type: ignore
    return torch.cat(list(conditions))  # type: ignore


def output_pair(model: "NetworkDenoiser", x: Tensor, t: Tensor, c: Condition) -> tuple[Tensor, Tensor]:
    """Raw outputs with and without the condition, in one pass of twice the batch."""
    drop = torch.arange(2 * len(x), device=x.device) >= len(x)
    conditional, unconditional = model.output(torch.cat([x, x]), torch.cat([t, t]), repeat(c, 2), drop=drop).chunk(2)
    return conditional, unconditional


def count(c: Condition) -> int:
    """The number of samples of a condition."""
    return len(next(iter(c.values()))) if isinstance(c, Mapping) else len(c)


def drop_rows(c: Condition, drop: Tensor, null: Condition | None) -> Condition:
    """Put the null condition `[1, ...]`, or zeros where there is none, in the place of whole samples."""
    if isinstance(c, Mapping):
        return {name: drop_rows(c[name], drop, null and null[name]) for name in c}  # type: ignore
    where = drop.to(c.device).reshape(-1, *[1] * (c.ndim - 1))
    blank = torch.zeros((), dtype=c.dtype, device=c.device) if null is None else null.to(c)  # type: ignore
    allowed = f"[batch, ...] as the null condition {tuple(blank.shape)}"
    require_that(not blank.ndim or blank.shape[1:] == c.shape[1:], f"c has shape {tuple(c.shape)}", allowed)
    return torch.where(where, blank, c)


def null_rows(null: Condition | None, batch: int, device: torch.device) -> Condition:
    """The null condition for a whole batch."""
    require_that(null is not None, "null is None", "a null condition, given when the denoiser was made, for no c")
    return map_condition(lambda part: part.to(device).expand(batch, *part.shape[1:]), null)  # type: ignore[return-value]


def check_conditional(model: "NetworkDenoiser", c: object, scale_range: object = None) -> None:
    """A condition for every sample, and a range of scales for networks that take a scale, and for no others."""
    check_kind("model", model)
    require(c is not None, "c", c, "one condition a sample, for guidance needs one")
    allowed = f"{'a range' if model.scale_aware else 'None'}, for model.scale_aware = {model.scale_aware}"
    require(model.scale_aware == (scale_range is not None), "scale_range", scale_range, allowed)
