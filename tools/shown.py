"""What happens to a page between nbdev and Quarto; settings.ini names it under `procs`.

nbdev would show a box with signature and docstring, and below it the source that holds both. Here the source stands
alone, with the anchors that links to its names lead to; imports are folded; a numbered equation keeps its number beside
it at every width; cells that take minutes say so.
"""

import ast
import re
from collections.abc import Iterator
from typing import Any

from execnb.nbio import mk_cell

NUMBERED = re.compile(r"^\$\$((?:(?!\$\$).)*?)\s*\\tag\{(\d+)\}((?:(?!\$\$).)*?)\$\$", re.DOTALL | re.MULTILINE)
FOLDED = '#| code-fold: true\n#| code-summary: "Imports of the module"\n'
FROM_PACKAGE, SLOW = '#| classes: "from-package"\n', '#| classes: "slow"\n'


def defined(body: list[ast.stmt], prefix: str = "") -> Iterator[str]:
    "Functions, classes and methods, as nbdev spells their anchors."
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield f"{prefix}{node.name}".lower()
            yield from defined(node.body, f"{prefix}{node.name}.") if isinstance(node, ast.ClassDef) else ()


def is_import(node: ast.stmt) -> bool:
    "An import, or those that only a type checker reads, with what stands for them."
    checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    return checked or isinstance(node, ast.Import | ast.ImportFrom)


def numbered(source: str) -> str:
    "Equations with `\\tag{n}` as blocks of two columns: the formula, which scrolls by itself, and its number."
    block = "\n\n::: {{.numbered #equation-{1}}}\n$${0}{2}$$\n\n[({1})]{{.number}}\n:::\n\n"
    return re.sub(r"\n{3,}", "\n\n", NUMBERED.sub(lambda found: block.format(*found.groups()), source)).strip("\n")


class Shown:
    "Rewrite the cells of one page; nbdev makes one of these for each."

    def __init__(self, nb: Any) -> None:
        self.nb = nb

    def begin(self) -> None:
        "Anchors before the code of the package, numbers beside equations."
        cells = []
        for cell in self.nb.cells:
            flags = getattr(cell, "directives_", None) or {}
            if cell.cell_type == "markdown":
                cell.source = numbered(cell.source)
            elif "slow" in flags:
                cell.source = SLOW + cell.source
            elif "exports" in flags:
                body = ast.parse(cell.source).body
                names = list(dict.fromkeys(defined(body)))
                anchors = "".join(f"[]{{#{name}}}" for name in names)
                cells += [mk_cell(anchors, cell_type="markdown")] if names else []
                imports = all(map(is_import, body))
                cell.source = (FOLDED if imports else FROM_PACKAGE) + cell.source
            cells.append(cell)
        self.nb.cells = cells
