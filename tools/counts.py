"""What the package weighs, counted from its source: `python tools/counts.py`.

Public names are those in `__all__` of the modules whose name does not begin with an underscore, and those that the stub
of a package imports. Code lines hold neither
blanks nor comments nor docstrings. Validation is what only refuses input: a `raise` with the condition above it, a call
of `require...`, `explained` or a `check_...`, a `@checked`, those functions themselves, and all of `_checks`. `Any`
counts where it stands in annotations, and so do the uses of names that a module makes of it, in a column of their own:
another library's objects and what JSON holds.
"""

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from notebooks import ROOT

sys.path.insert(0, str(ROOT))

from guidance_nb._lazy import stub_names

PACKAGE = ROOT / "guidance_nb"
CHECKS = re.compile(r"_*(require(_that)?|explained|checked|check_\w+)")
SKIPPED = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
Function = ast.FunctionDef | ast.AsyncFunctionDef
DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def modules(package: Path = PACKAGE) -> dict[str, Path]:
    "Dotted name, without the package's, to file; what nbdev looks names up in is no module."
    found = {}
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        if name and name != "_modidx":
            found[name] = path
    return found


def is_private(name: str) -> bool:
    return any(part.startswith("_") for part in name.split("."))


def public_names(path: Path) -> list[str]:
    "The names of `__all__`; of a package with a stub, what that imports."
    if path.with_suffix(".pyi").exists():
        return [*stub_names(path)]
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and getattr(target, "id", "") == "__all__" and node.value:
            return list(ast.literal_eval(node.value))
    return []


def unlisted_names(path: Path) -> list[str]:
    "Functions and classes without an underscore that are not public."
    made = [node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, DEFINITIONS)]
    return [name for name in made if not name.startswith("_") and name not in public_names(path)]


def docstring_lines(tree: ast.Module) -> set[int]:
    found: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | Function) and ast.get_docstring(node, clean=False) is not None:
            found |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    return found


def code_lines(source: str, tree: ast.Module) -> set[int]:
    "Numbers of the lines that hold code."
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SKIPPED:
            found |= set(range(token.start[0], token.end[0] + 1))
    return found - docstring_lines(tree)


def names_check(node: ast.AST | None) -> bool:
    "Whether it is a check, or the call of one."
    node = node.func if isinstance(node, ast.Call) else node
    name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", "")
    return bool(CHECKS.fullmatch(name))


def is_check(node: ast.AST) -> bool:
    "Whether a statement only refuses: `raise ...`, `require(...)`, `self.check_it(...)`, `x = check_number(...)`."
    call = getattr(node, "value", None) if isinstance(node, ast.Expr | ast.Assign | ast.AnnAssign) else None
    return isinstance(node, ast.Raise) or (isinstance(call, ast.Call) and names_check(call))


def validation_lines(tree: ast.Module) -> set[int]:
    "Numbers of the lines that only refuse input."
    found: set[int] = set()
    for node in ast.walk(tree):
        parts = [item.context_expr for item in node.items] if isinstance(node, ast.With) else []
        parts = [part for part in [*parts, *getattr(node, "decorator_list", [])] if names_check(part)]
        whole = isinstance(node, ast.If) and not node.orelse and all(map(is_check, node.body))
        if whole or is_check(node) or (isinstance(node, Function) and CHECKS.fullmatch(node.name)):
            parts.append(node)  # type: ignore[arg-type]
        found |= {n for part in parts for n in range(part.lineno, (part.end_lineno or 0) + 1)}
    return found


def functions(tree: ast.Module) -> Iterator[tuple[str, Function]]:
    for node in ast.walk(tree):
        if isinstance(node, Function):
            yield node.name, node


@dataclass
class Weight:
    "What one module, or all of them, weigh."

    public: int = 0
    lines: int = 0
    validation: int = 0
    longest: tuple[int, str] = (0, "")  # Lines of code of the longest function, and its name
    any: int = 0  # How often `Any` stands in it
    alias: int = 0  # How often a name made of `Any` does

    def __add__(self, other: "Weight") -> "Weight":
        sums = (getattr(self, name) + getattr(other, name) for name in ("public", "lines", "validation"))
        return Weight(*sums, max(self.longest, other.longest), self.any + other.any, self.alias + other.alias)


def aliases(tree: ast.Module, names: set[str]) -> set[str]:
    "Names that a module makes of `Any` and its like."
    found = set()
    for node in tree.body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(target, ast.Name) and node.value:
            parts = [*ast.walk(node.value)]
            if not any(isinstance(part, ast.Call) for part in parts) and count(parts, names):
                found.add(target.id)
    return found


def count(nodes: Iterable[ast.AST], names: set[str]) -> int:
    return sum(isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in names for node in nodes)


def weigh(name: str, path: Path, made: set[str]) -> Weight:
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = code_lines(source, tree)
    bodies = [
        (len({n for n in lines if node.body[0].lineno <= n <= (node.end_lineno or 0)}), f"{name}.{function}")
        for function, node in functions(tree)
    ]
    return Weight(
        0 if is_private(name) else len(public_names(path)),
        len(lines),
        len(lines if name == "_checks" else lines & validation_lines(tree)),
        max(bodies, default=(0, "")),
        count(ast.walk(tree), {"Any"}),
        count(ast.walk(tree), made),
    )


def weights(package: Path = PACKAGE) -> dict[str, Weight]:
    found = modules(package)
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in found.values()]
    made: set[str] = set()
    for _ in range(2):  # an alias of an alias is one, too
        made |= set().union(*(aliases(tree, {"Any", *made}) for tree in trees))
    return {name: weigh(name, path, made) for name, path in found.items()}


LINE = "{:<28} {:>7} {:>7} {:>11} {:>5} {:>6} {:>8}  {}"


def show(name: str, weight: Weight) -> str:
    share = f"{weight.validation} {weight.validation / max(1, weight.lines):>5.1%}"
    return LINE.format(name, weight.public, weight.lines, share, weight.any, weight.alias, *weight.longest)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", nargs="?", type=Path, default=PACKAGE, help="another copy of guidance_nb")
    found = weights(parser.parse_args().package)
    print(LINE.format("module", "public", "lines", "validation", "Any", "alias", "longest", "function"))
    print(*(show(name, weight) for name, weight in found.items()), sep="\n")
    print(show("all", sum(found.values(), Weight())))
