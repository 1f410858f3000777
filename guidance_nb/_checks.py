"""One line for a rule about an argument: an invalid value raises a `ValueError`, `name = value; allowed: ...`.

A rule about one argument alone stands in its type: `@checked` reads `Share`, `Count` or a `Literal` in a signature.
"""

import difflib
import functools
import inspect
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator
from contextlib import contextmanager
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args, get_origin

if TYPE_CHECKING:
    from guidance_nb.denoisers import Denoiser, NetworkDenoiser

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])
Rule = Callable[[str, Any], Any]  # of a name and a value, which it returns


def require(fine: object, name: str, value: object, allowed: str) -> None:
    """Raise the error about `value` unless `fine`."""
    if not fine:
        shown = repr(value) if isinstance(value, str | bytes | list | dict) else value
        raise ValueError(f"{name} = {shown}; allowed: {allowed}")


def require_that(fine: object, problem: str, allowed: str) -> None:
    """Raise the error about a `problem` in words unless `fine`."""
    if not fine:
        raise ValueError(f"{problem}; allowed: {allowed}")


@contextmanager
def explained(problem: str, allowed: str, *kinds: type[Exception]) -> Iterator[None]:
    """Say in one line what an error of other code means: `problem (its reason); allowed: ...`."""
    try:
        yield
    except kinds as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{problem} ({reason}); allowed: {allowed}") from None


def check_choice(name: str, value: _T, allowed: Collection[_T]) -> _T:
    """One of a few values; names the nearest where there is one."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), map(str, allowed), 1)
        shown = f"{near[0]!r}, ..." if near and len(allowed) > 12 else ", ".join(map(repr, allowed))
        require(False, name, value, f"{shown}; did you mean {near[0]!r}?" if near else shown)
    return value


def check_number(name: str, value: float, low: float = -math.inf, high: float = math.inf, allowed: str = "") -> float:
    """A finite number from `low` to `high`, ends included where they are finite."""
    end = 10**308 if isinstance(value, int) else math.inf
    fine = isinstance(value, Real) and not isinstance(value, bool) and -end < value < end
    ends = {(False, False): "a finite number", (True, False): f"a number, {low:g} or more"}
    words = ends.get((math.isfinite(low), math.isfinite(high)), f"{low:g} to {high:g}")
    require(fine and low <= value <= high, name, value, allowed or words)
    return value if isinstance(value, int | float) else float(value)  # numpy's numbers are numbers, too


def check_whole(name: str, value: int, low: int = 0, high: int | None = None) -> int:
    """A whole number from `low` to `high`."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    fine = whole and low <= value <= (math.inf if high is None else high)
    require(fine, name, value, f"a whole number, {low} or more" if high is None else f"a whole number, {low} to {high}")
    return int(value)


def check_distinct(name: str, values: Iterable[Hashable]) -> None:
    """One value or more, each once."""
    values = tuple(values)
    require(values and len(set(values)) == len(values), name, values, "one or more, each once")


def check_nonzero(name: str, value: float) -> float:
    """A finite number other than 0."""
    allowed = "a finite number other than 0"
    require(check_number(name, value, allowed=allowed), name, value, allowed)
    return value


def check_scale(scale: _T, name: str = "scale") -> _T:
    """A finite number, a tensor of finite numbers, or a function of time."""
    if isinstance(scale, Real):
        return check_number(name, scale)  # type: ignore
    if not callable(scale):
        import torch  # here, for the help of the command needs none

        require(isinstance(scale, torch.Tensor) and scale.isfinite().all(), name, scale, "a finite number")
    return scale


def check_denoiser(name: str, model: "Denoiser") -> "Denoiser":
    """A denoiser that has a velocity and a score."""
    from .denoisers import Denoiser

    made = "NetworkDenoiser(net, path, num_classes) for a network, from_diffusers(model) for one of diffusers"
    require_that(isinstance(model, Denoiser), f"{name} is a {type(model).__name__}", f"a Denoiser: {made}")
    require(model.consistent, name, model, "a model with a velocity and a score; CFG++ has none")
    return model


def _two_numbers(values: object) -> tuple[float, float]:
    """Both as numbers, NaN for what is none."""
    try:
        low, high = (float(value) for value in values)  # type: ignore[attr-defined]
        return low, high
    except (TypeError, ValueError):
        return math.nan, math.nan


def check_interval(interval: Iterable[float]) -> tuple[float, float]:
    """Two times in [0, 1], in order."""
    low, high = _two_numbers(interval)
    require(0 <= low <= high <= 1, "interval", interval, "two times, 0 <= first <= last <= 1")
    return low, high


def check_scale_range(name: str, scale_range: _T, positive: bool = False) -> _T:
    """Two finite scales in order."""
    low, high = _two_numbers(scale_range)
    fine = (0 < low if positive else 0 <= low) and low <= high < math.inf
    require(fine, name, scale_range, f"None, or (low, high) with 0 {'<' if positive else '<='} low <= high")
    return scale_range


def _rule(hint: object) -> Rule | None:
    """What the type of an argument says of its value; None may stand where it is allowed."""
    kind, parts = get_origin(hint), get_args(hint)
    if kind is Annotated:
        return next((part for part in hint.__metadata__ if callable(part)), None)  # type: ignore[attr-defined]
    if kind is Literal:
        return lambda name, value: check_choice(name, value, parts)
    if type(None) in parts and len(parts) == 2 and (rule := _rule(parts[0])):
        return lambda name, value: value if value is None else rule(name, value)
    return None


def checked(made: _F) -> _F:
    """Let a function, or the constructor of a class, check the arguments given by the rules in their types."""
    function = made.__init__ if isinstance(made, type) else made  # type: ignore[misc]
    signature = inspect.signature(function)
    rules = {name: rule for name, part in signature.parameters.items() if (rule := _rule(part.annotation))}

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Any:
        try:
            given = signature.bind(*args, **options)
        except TypeError:
            return function(*args, **options)  # which names itself in its error
        for name in [name for name in rules if name in given.arguments]:
            given.arguments[name] = rules[name](name, given.arguments[name])
        return function(*given.args, **given.kwargs)

    if not isinstance(made, type):
        return call  # type: ignore[return-value]
    made.__init__ = call  # type: ignore[misc]
    return made


WithScore = Annotated["Denoiser", check_denoiser]
Number = Annotated[float, check_number]  # finite
AtLeastZero = Annotated[float, functools.partial(check_number, low=0)]
NonZero = Annotated[float, check_nonzero]
Positive = Annotated[float, functools.partial(check_number, low=math.ulp(0.0), allowed="a positive, finite number")]
Share = Annotated[float, functools.partial(check_number, low=0, high=1)]
Whole = Annotated[int, check_whole]  # 0 or more
Count = Annotated[int, functools.partial(check_whole, low=1)]
Seed = Annotated[int, functools.partial(check_whole, high=2**64 - 1)]
Interval = Annotated[tuple[float, float], lambda name, value: check_interval(value)]
ScaleRange = Annotated[tuple[float, float], check_scale_range]

PositiveRange = Annotated[tuple[float, float], functools.partial(check_scale_range, positive=True)]


def check_conditional(model: "NetworkDenoiser", c: object, scale_range: object = None) -> None:
    """A condition for every sample, and a range of scales for networks that take a scale, and for no others."""
    require(c is not None, "c", c, "one condition a sample, for guidance needs one")
    allowed = f"{'a range' if model.scale_aware else 'None'}, for model.scale_aware = {model.scale_aware}"
    require(model.scale_aware == (scale_range is not None), "scale_range", scale_range, allowed)
