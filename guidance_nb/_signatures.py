"""One signature for two functions: what `help`, editors and type checkers show of a function that passes all on."""

import inspect
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def takes_arguments_of(source: Callable[P, object]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Show a function `f(*args, **kwargs)` with the arguments of `source` and its own result."""

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        result = inspect.signature(function).return_annotation
        shown = inspect.signature(source).replace(return_annotation=result)
        function.__signature__ = shown  # type: ignore[attr-defined]
        return function

    return decorate
