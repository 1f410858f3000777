"""What a package offers: the names that its stub, `__init__.pyi`, imports, each of them when it is first asked for."""

import ast
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path


def stub_names(file: str | Path) -> dict[str, str]:
    "The names that the stub beside a package's `file` imports, with the modules, inside the package, that hold them."
    tree = ast.parse(Path(file).with_suffix(".pyi").read_text(encoding="utf-8"))
    found = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level]
    return {alias.name: node.module or "" for node in found for alias in node.names}


def offer(package: str, file: str) -> tuple[list[str], Callable[[str], object], Callable[[], list[str]]]:
    "`__all__`, `__getattr__` and `__dir__` of a package, whose stub editors and type checkers read."
    names = stub_names(file)

    def find(name: str) -> object:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        value = getattr(import_module(f".{names[name]}", package), name)
        setattr(sys.modules[package], name, value)
        return value

    return [*names], find, lambda: sorted({*vars(sys.modules[package]), *names})
