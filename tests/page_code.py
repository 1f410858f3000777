"Functions that only a page has, for tests of them."

import ast
import importlib
import re
from types import ModuleType

from notebooks import NOTEBOOKS, cells, module_of, text


def page_code(stem: str, *wanted: str) -> ModuleType:
    "These functions and classes of a page, or all with its constants, beside what it imports; nothing else runs."
    path = next(path for path in NOTEBOOKS if path.stem == stem)
    page, module = ModuleType(stem), module_of(path)
    vars(page).update(vars(importlib.import_module(f"guidance_nb.{module}")) if module else {}, __name__=stem)
    code = "\n".join(text(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    for node in ast.parse(code).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        name = getattr(node, "name", "") or getattr(targets[0], "id", "")
        taken = name in wanted if wanted else hasattr(node, "name") or re.fullmatch(r"_?[A-Z]\w*", name)
        if isinstance(node, ast.Import | ast.ImportFrom) or taken:
            exec(compile(ast.Module([node], []), path.name, "exec"), vars(page))
    return page
