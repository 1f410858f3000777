"""One line for a rule about an argument: an invalid value raises a `ValueError`, `name = value; allowed: ...`."""

import difflib
import json
import math
from collections.abc import Collection, Hashable, Iterable, Iterator
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from guidance_nb.denoisers import NetworkDenoiser

T = TypeVar("T")


def require(fine: object, name: str, value: object, allowed: str) -> None:
    """Raise the error about `value` unless `fine`."""
    if not fine:
        shown = repr(value) if isinstance(value, str | bytes | list | dict) else value
        raise ValueError(f"{name} = {shown}; allowed: {allowed}")


def check_choice(name: str, value: T, allowed: Collection[T]) -> T:
    """One of a few values; names the nearest where there is one."""
    near = difflib.get_close_matches(str(value), map(str, allowed), 1) if len(allowed) > 12 else []
    shown = f"{near[0]!r}, ..." if near else ", ".join(map(repr, allowed))
    require(value in allowed, name, value, shown)
    return value


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf, allowed: str = "") -> float:
    """A finite number from `low` to `high`, ends included where they are finite."""
    fine = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    ends = {(False, False): "a finite number", (True, False): f"a number, {low:g} or more"}
    words = ends.get((math.isfinite(low), math.isfinite(high)), f"{low:g} to {high:g}")
    require(fine and low <= value <= high, name, value, allowed or words)
    return value


def check_nonzero(name: str, value: float) -> float:
    """A finite number other than 0."""
    allowed = "a finite number other than 0"
    require(check_number(name, value, allowed=allowed), name, value, allowed)
    return value


def check_whole(name: str, value: int, low: int = 0, high: int | None = None) -> int:
    """A whole number from `low` to `high`."""
    fine = isinstance(value, int) and not isinstance(value, bool) and low <= value and (high is None or value <= high)
    require(fine, name, value, f"a whole number, {low} or more" if high is None else f"a whole number, {low} to {high}")
    return value


def check_distinct(name: str, values: Iterable[Hashable]) -> None:
    """One value or more, each once."""
    values = tuple(values)
    require(values and len(set(values)) == len(values), name, values, "one or more, each once")


def check_scale(scale: T, name: str = "scale") -> T:
    """A finite number, a tensor of finite numbers, or a function of time."""
    if not callable(scale):
        import torch

        numeric = isinstance(scale, int | float | torch.Tensor) and not isinstance(scale, bool)
        require(numeric and torch.as_tensor(scale).isfinite().all(), name, scale, "a finite number")
    return scale


def check_interval(interval: Iterable[float]) -> tuple[float, float]:
    """Two times in [0, 1], in order."""
    try:
        low, high = (float(t) for t in interval)
    except (TypeError, ValueError):
        low = high = math.nan
    require(0 <= low <= high <= 1, "interval", interval, "two times, 0 <= first <= last <= 1")
    return low, high


def check_scale_range(scale_range: Iterable[float] | None, positive: bool = False) -> None:
    """None, or two finite scales in order."""
    try:
        low, high = (1.0, 1.0) if scale_range is None else (float(scale) for scale in scale_range)
    except (TypeError, ValueError):
        low = high = math.nan
    fine = (0 < low if positive else 0 <= low) and low <= high < math.inf
    require(fine, "scale_range", scale_range, f"None, or (low, high) with 0 {'<' if positive else '<='} low <= high")


def check_conditional(model: "NetworkDenoiser", c: object, scale_range: object = None) -> None:
    """A condition for every sample, and a range of scales for networks that take a scale, and for no others."""
    require(c is not None, "c", c, "one condition a sample, for guidance needs one")
    allowed = f"{'a range' if model.scale_aware else 'None'}, for model.scale_aware = {model.scale_aware}"
    require(model.scale_aware == (scale_range is not None), "scale_range", scale_range, allowed)


def differences(old: object, new: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    """Where two JSON-able values differ: `a.b` for b inside a, and both values."""
    if isinstance(old, dict | None) and isinstance(new, dict | None):
        old, new = old or {}, new or {}
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif json.dumps(old) != json.dumps(new):
        yield key, old, new
