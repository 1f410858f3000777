"""One line for a rule about an argument: an invalid value raises a `ValueError`, `name = value; allowed: ...`.

A rule about one argument alone stands in its type: `@checked` reads `Share`, `Count` or a `Literal` in a signature.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial, wraps
from numbers import Integral, Real
from typing import TYPE_CHECKING, Annotated, Literal, TypeVar, get_args, get_origin

if TYPE_CHECKING:
    from torch import Tensor

    from guidance_nb.denoisers import Denoiser

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., object])
Ends = tuple[float, float]
_MOST = math.nextafter(math.inf, 0)


def require(fine: object, name: str, value: object, allowed: str) -> None:
    """Raise the error about `value` unless `fine`."""
    if not fine:
        raise ValueError(f"{name} = {repr(value) if isinstance(value, str) else value}; allowed: {allowed}")


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
        raise ValueError(f"{problem} ({' '.join(str(error).split())[:200]}); allowed: {allowed}") from None


def check_choice(name: str, value: _T, allowed: Collection[_T]) -> _T:
    """One of a few values; names the nearest where there is one."""
    if value not in allowed:
        near = difflib.get_close_matches(str(value), map(str, allowed), 1)
        shown = f"{near[0]!r}, ..." if near and len(allowed) > 12 else ", ".join(map(repr, allowed))
        require(False, name, value, f"{shown}; did you mean {near[0]!r}?" if near else shown)
    return value


def check_number(
    name: str, value: float, low: float = -_MOST, high: float = _MOST, allowed: str = "", but: float = math.nan
) -> float:
    """A number from `low` to `high`, ends included, `but` not this one; finite unless an end is infinite."""
    plain = float(value) if isinstance(value, Real) and not isinstance(value, int) else value  # also numpy's
    fine = isinstance(plain, int | float) and not isinstance(plain, bool) and low <= plain <= high and plain != but
    words = "a finite number" if low == -_MOST else f"a number, {low:g} or more"
    require(fine, name, value, allowed or (words if high == _MOST else f"{low:g} to {high:g}"))
    return plain


def check_whole(name: str, value: int, low: int = 0, high: float = math.inf) -> int:
    """A whole number from `low` to `high`."""
    fine = isinstance(value, Integral) and not isinstance(value, bool) and low <= value <= high
    require(fine, name, value, f"a whole number, {low} {'or more' if high == math.inf else f'to {high}'}")
    return int(value)


def check_callable(name: str, value: _T) -> _T:
    """A function, or what can be called as one."""
    require(callable(value), name, value, "a function")
    return value


def check_scale(name: str, scale: _T) -> _T:
    """A finite number, a tensor of finite numbers, or a function of time."""
    fine = callable(scale) or (hasattr(scale, "isfinite") and scale.isfinite().all())
    return scale if fine else check_number(name, scale)  # type: ignore


def check_floats(name: str, x: _T) -> _T:
    """A tensor of numbers that are neither rounded nor wrapped around in silence."""
    found = f"{name} is {getattr(x, 'dtype', type(x).__name__)}"
    require_that(getattr(x, "is_floating_point", bool)(), found, "a floating-point tensor [n, ...]")
    return x


def check_kind(name: str, model: "Denoiser") -> "Denoiser":
    """A denoiser, guided or not."""
    made = "NetworkDenoiser(net, path, num_classes) for a network, from_diffusers(model) for one of diffusers"
    require_that(hasattr(model, "predict_pair"), f"{name} is a {type(model).__name__}", f"a Denoiser: {made}")
    return model


def check_denoiser(name: str, model: "Denoiser") -> "Denoiser":
    """A denoiser that has a velocity and a score."""
    require(check_kind(name, model).consistent, name, model, "a model with a velocity and a score; CFG++ has none")
    return model


def check_range(name: str, ends: Iterable[float], allowed: str, low: float = 0.0, high: float = 1e308) -> Ends:
    """Two numbers in order, from `low` to `high`."""
    first = last = math.nan
    with suppress(TypeError, ValueError):
        first, last = map(float, ends)
    require(low <= first <= last <= high, name, ends, allowed)
    return first, last


def _rule(hint: object) -> Callable[[str, object], object] | None:
    """What the type of an argument says of its value; None may stand where it is allowed."""
    parts, kind = get_args(hint), get_origin(hint)
    if kind is Literal:
        return lambda name, value: check_choice(name, value, parts)
    if kind is Callable:
        return check_callable
    if type(None) in parts and (rule := _rule(parts[0])):
        return lambda name, value: value if value is None else rule(name, value)
    return parts[1] if kind is Annotated else None


def checked(made: _F) -> _F:
    """Let a function, or the constructor of a class, check the arguments given by the rules in their types."""
    if isinstance(made, type):
        made.__init__ = checked(made.__init__)  # type: ignore[misc]
        return made
    parts = inspect.signature(made).parameters
    rules = {name: rule for name, part in parts.items() if (rule := _rule(part.annotation))}
    order = [name for name, part in parts.items() if part.kind in (part.POSITIONAL_ONLY, part.POSITIONAL_OR_KEYWORD)]

    @wraps(made)
    def call(*args: object, **options: object) -> object:
        fixed = [rules[name](name, value) if name in rules else value for name, value in zip(order, args)]
        named = {name: rules[name](name, value) if name in rules else value for name, value in options.items()}
        return made(*fixed, *args[len(fixed) :], **named)

    return call  # type: ignore[return-value]


_TINY = math.ulp(0.0)

WithScore = Annotated["Denoiser", check_denoiser]
AnyDenoiser = Annotated["Denoiser", check_kind]
Floats = Annotated["Tensor", check_floats]
Number = Annotated[float, check_number]  # finite
AtLeastZero = Annotated[float, partial(check_number, low=0)]
NonZero = Annotated[float, partial(check_number, but=0, allowed="a finite number other than 0")]
Positive = Annotated[float, partial(check_number, low=_TINY, allowed="a positive, finite number")]
PositiveOrInf = Annotated[float, partial(check_number, low=_TINY, high=math.inf, allowed="a number above 0, or inf")]
AtLeastZeroOrInf = Annotated[float, partial(check_number, low=0, high=math.inf, allowed="0 or more, or inf")]
Share = Annotated[float, partial(check_number, low=0, high=1)]
PositiveShare = Annotated[float, partial(check_number, low=_TINY, high=1, allowed="above 0, at most 1")]
Whole = Annotated[int, check_whole]  # 0 or more
Count = Annotated[int, partial(check_whole, low=1)]
Seed = Annotated[int, partial(check_whole, high=2**64 - 1)]
Interval = Annotated[Ends, partial(check_range, allowed="two times, 0 <= first <= last <= 1", high=1)]
ScaleRange = Annotated[Ends, partial(check_range, allowed="None, or (low, high) with 0 <= low <= high")]
PositiveRange = Annotated[Ends, partial(check_range, low=_TINY, allowed="None, or (low, high) with 0 < low <= high")]
