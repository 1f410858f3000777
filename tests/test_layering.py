"Numbers are the order of dependency, and importing the package is cheap."

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from configparser import ConfigParser

import pytest

from notebooks import NOTEBOOKS, ROOT

NUMBER = {path.stem[3:]: int(path.stem[:2]) for path in NOTEBOOKS if path.stem[:2].isdigit()}
MODULES = sorted(path for path in (ROOT / "guidance_nb").glob("*.py") if not path.stem.startswith("_"))
HEAVY = {
    "PIL", "accelerate", "datasets", "diffusers", "faiss", "ipywidgets", "matplotlib", "pandas", "peft", "safetensors",
    "scipy", "seaborn", "sklearn", "torch_fidelity", "torchdiffeq", "torchvision", "transformers",
}  # fmt: skip
DISTRIBUTION = {"PIL": "pillow", "sklearn": "scikit-learn", "faiss": "faiss-cpu", "torch_fidelity": "torch-fidelity"}

each_module = pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)


def imports(tree: ast.AST) -> Iterator[ast.Import | ast.ImportFrom]:
    "Every import of a module, also those inside functions."
    return (node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def own_modules(node: ast.Import | ast.ImportFrom) -> set[str]:
    "The modules of this package that an import names."
    if isinstance(node, ast.Import):
        return {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("guidance_nb.")}
    module = (node.module or "") if node.level == 0 else f"guidance_nb.{node.module or ''}".rstrip(".")
    if module == "guidance_nb":
        return {alias.name for alias in node.names if alias.name in NUMBER}
    return {module.split(".")[1]} if module.startswith("guidance_nb.") else set()


def foreign_roots(node: ast.Import | ast.ImportFrom) -> set[str]:
    "The top-level packages of others that an import names."
    names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
    relative = isinstance(node, ast.ImportFrom) and node.level > 0
    return set() if relative else {name.split(".")[0] for name in names} - {"guidance_nb"}


def test_every_module_is_a_notebook():
    assert {path.stem for path in MODULES} <= set(NUMBER)


@each_module
def test_imports_point_down(path):
    "This leaves no room for cycles, nor for a foundation that knows a method."
    used = set().union(*map(own_modules, imports(ast.parse(path.read_text(encoding="utf-8")))))
    assert {name for name in used if NUMBER[name] >= NUMBER[path.stem]} == set()


@each_module
def test_no_star_imports(path):
    for node in imports(ast.parse(path.read_text(encoding="utf-8"))):
        assert "*" not in {alias.name for alias in node.names}, f"line {node.lineno}"


@each_module
def test_imports_are_requirements(path):
    "So no development tool, fastcore above all, is needed to use the package."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    settings = config["DEFAULT"]
    lines = " ".join(settings[f"{kind}requirements"] for kind in ("", "dinov2_", "sd_", "live_")).split()
    declared = {re.split(r"[<>=!~\[]", line)[0] for line in lines}
    used = set().union(*map(foreign_roots, imports(ast.parse(path.read_text(encoding="utf-8")))))
    assert {DISTRIBUTION.get(name, name) for name in used - sys.stdlib_module_names} <= declared


IMPORT_ALL = f"""
import sys, time
import torch
before, start = set(sys.modules), time.process_time()
import guidance_nb
{"".join(f"import guidance_nb.{path.stem}{chr(10)}" for path in MODULES)}
print(time.process_time() - start)
print(*sorted({{name.split(".")[0] for name in set(sys.modules) - before}}))
"""


def test_importing_everything_is_light():
    "Heavy libraries stay out, and all modules together cost less than a second beyond torch."
    seconds = []
    for _ in range(3):
        run = subprocess.run([sys.executable, "-c", IMPORT_ALL], cwd=ROOT, capture_output=True, text=True, check=True)
        took, roots = run.stdout.splitlines()
        assert set(roots.split()) & HEAVY == set()
        seconds.append(float(took))
    assert min(seconds) < 1, seconds
