"The house rules a machine can check."

import ast
import re
import subprocess
import sys

import pytest

from notebooks import NOTEBOOKS, ROOT, cells, directives, text

EXPORTS = {"export", "exports", "exporti"}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path) -> list[tuple[int, str]]:
    "Numbers, as nbdev counts them, and sources."
    return [(n, text(c["source"])) for n, c in enumerate(cells(path), 1) if c["cell_type"] == "code"]


def exported(path) -> list[tuple[int, str]]:
    return [(number, source) for number, source in code_cells(path) if EXPORTS & set(directives(source))]


@each_notebook
def test_first_cell_is_title_and_claim(path):
    "nbdev makes the page's title and the module's docstring of it and drops whatever else it holds."
    first = cells(path)[0]
    assert first["cell_type"] == "markdown"
    assert re.fullmatch(r"# [^\n]+\n\n> [^\n]+", text(first["source"]).strip())


@each_notebook
def test_text_has_no_control_characters(path):
    "A script that writes a formula may turn \\text into a tab and the rest of the word."
    assert [n for n, c in enumerate(cells(path), 1) if re.search(r"[\x00-\x09\x0b-\x1f]", text(c["source"]))] == []


@each_notebook
def test_exported_cells_are_short(path):
    assert [f"cell #{number}" for number, source in exported(path) if len(source.splitlines()) > 40] == []


@each_notebook
def test_imports_have_cells_of_their_own(path):
    "Building the site runs every cell that imports, whole."
    mixed = []
    for number, source in code_cells(path):
        kinds = {isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(source).body}
        mixed += [f"cell #{number}"] if kinds == {True, False} and "TYPE_CHECKING" not in source else []
    assert mixed == []


@each_notebook
def test_public_names_are_documented(path):
    missing = []
    for _, source in exported(path):
        for node in ast.parse(source).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            missing += [] if ast.get_docstring(node) else [f"{node.name}: docstring"]
            if isinstance(node, ast.FunctionDef):
                args = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                missing += [f"{node.name}: type of {arg.arg}" for arg in args if arg.annotation is None]
                missing += [] if node.returns else [f"{node.name}: type of the result"]
    assert missing == []


def unexplained(function: ast.FunctionDef, docstring: str, lines: list[str]) -> list[str]:
    "Arguments with no comment beside them that the docstring does not name."
    if "ame arguments as `" in docstring or function.decorator_list:  # a command explains its own in its help
        return []
    args = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
    silent = [arg.arg for arg in args if arg.arg != "self" and "# " not in lines[arg.end_lineno - 1]]
    return [f"{function.name}: {name}" for name in silent if not re.search(rf"\b{name}\b", docstring)]


@each_notebook
def test_arguments_are_explained(path):
    "Shape, unit and default stand beside an argument, or the docstring says what it is."
    missing = []
    for _, source in exported(path):
        lines = source.splitlines()
        for node in ast.parse(source).body:
            docstring = (ast.get_docstring(node) or "") if isinstance(node, ast.FunctionDef | ast.ClassDef) else ""
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                missing += unexplained(node, docstring, lines)
            elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                made = [part for part in node.body if isinstance(part, ast.FunctionDef) and part.name == "__init__"]
                missing += [f"{node.name}.{what}" for part in made for what in unexplained(part, docstring, lines)]
    assert missing == []


def tool(*command: str) -> None:
    run = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_ruff_check():
    tool("ruff", "check", "nbs", "tools", "tests", "setup.py")


def test_ruff_format():
    tool("ruff", "format", "--check", "nbs", "tools", "tests", "setup.py")


def test_no_notebook_global_leaks_into_the_package():
    tool("ruff", "check", "--isolated", "--select", "F821", "guidance_nb")


def test_mypy():
    tool("mypy")
