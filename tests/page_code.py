"Functions that only a page has, for tests of them."

import ast
import importlib
from types import SimpleNamespace

from notebooks import NOTEBOOKS, cells, module_of, text


def page_code(stem: str, *wanted: str) -> SimpleNamespace:
    "These functions and classes of a page, beside what it imports; none of its other code runs."
    path = next(path for path in NOTEBOOKS if path.stem == stem)
    names = dict(vars(importlib.import_module(f"guidance_nb.{module_of(path)}")))
    code = "\n".join(text(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    for node in ast.parse(code).body:
        if isinstance(node, ast.Import | ast.ImportFrom) or getattr(node, "name", "") in wanted:
            exec(compile(ast.Module([node], []), path.name, "exec"), names)
    return SimpleNamespace(**{name: names[name] for name in wanted})
