"The form of the project is sound, as `make lint` says, and the checks behind it see what they are for."

import ast
import json

import pytest

import lint
from colab import install
from counts import aliases, code_lines, public_names, unlisted_names, validation_lines
from mutants import MUTANTS


@pytest.mark.parametrize("name", lint.CHECKS)
def test_lint(name):
    assert list(lint.CHECKS[name]()) == []


def written(tmp_path, *sources: str) -> lint.Path:
    "A notebook of code cells, as nbdev stores one."
    cells = [
        {
            "cell_type": "code",
            "execution_count": None,
            "id": f"{n:08}",
            "metadata": {},
            "outputs": [],
            "source": [source],
        }
        for n, source in enumerate(sources)
    ]
    path = tmp_path / "00_x.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ('#| exports\ndef f(\n    x: int,  # pixels\n) -> int:\n    "Double."', None),
        ('#| exports\ndef f(\n    # pixels\n    x: int,\n) -> int:\n    "Double."', None),
        ('#| exports\ndef f(\n    y: int,  # pixels\n    x: int,\n) -> int:\n    "Double."', "what `x` is"),
        ('#| exports\ndef f(x: int) -> int:\n    "Double."', "what `x` is"),
        ('#| exports\n@checked\ndef f(x: int) -> int:\n    "Double."', "what `x` is"),
        ('#| exports\nclass A:\n    "A thing."\n    def __init__(self, x: int) -> None: ...', "what `x` is"),
        ("#| exports\nclass A:\n    pass", "no docstring"),
        ("def shown(x):\n    return x", None),
        ("import os\nprint(os.sep)", "something else besides"),
        (f"#| exports\nx = {'1' * 90}", None),
        (f"#| hide\nx = {'1' * 90}", "1 lines of shown code have more than 80"),
        (f"#| fig-cap: {'1' * 90}\nx = {'1' * 76}", None),
        (f"x = {'1' * 77}", "1 lines of shown code have more than 80"),
    ],
)
def test_unexplained_code_is_found(tmp_path, source, problem):
    found = list(lint.code_problems(written(tmp_path, source)))
    assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])


@pytest.mark.parametrize(
    ("sources", "problem"),
    [
        (["x = 1\n" * 120], None),
        (["x = 1\n" * 121], "121 lines of shown code before it goes deeper"),
        (["#| code-fold: true\n" + "x = 1\n" * 121], None),
        (["import os\n" * 121], None),
    ],
)
def test_pages_over_their_budget_are_found(tmp_path, monkeypatch, sources, problem):
    monkeypatch.setattr(lint, "TO_FIGURE", 200)
    found = list(lint.budget_problems(written(tmp_path, *sources)))
    assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])


def test_method_pages_of_another_shape_are_found(tmp_path):
    path = written(tmp_path)
    notebook = json.loads(path.read_text())
    cell = {"cell_type": "markdown", "id": "w", "metadata": {}}
    for last, good in (("## Going deeper {#going-deeper}\n\n## More", True), ("## More", False)):
        source = "\n\n".join(f"## {title}" for title in lint.SHAPE[:-1])
        notebook["cells"] = [cell | {"source": [f"{source}\n\n{last}"]}]
        path.write_text(json.dumps(notebook))
        assert (list(lint.shape_problems(path)) == []) == good


def test_the_words_of_a_page_and_the_code_to_its_figure_are_counted(tmp_path):
    path = written(tmp_path, "x = 1\n" * 26)
    notebook = json.loads(path.read_text())
    words = "word " * 1498 + r"$\frac a b$ [link](00_x.ipynb) $$a + b = c$$" + "\n\n## Going deeper\n\nMore."
    notebook["cells"].append({"cell_type": "markdown", "id": "w", "metadata": {}, "source": [words]})
    path.write_text(json.dumps(notebook))
    assert list(lint.budget_problems(path)) == ["26 lines of code to the first figure; at most 25"]
    notebook["cells"][1]["source"] = ["One " + words]
    path.write_text(json.dumps(notebook))
    assert "1,501 words before it goes deeper; at most 1,500" in list(lint.budget_problems(path))


def test_badly_stored_notebooks_are_found(tmp_path):
    path = written(tmp_path, "print('/home/me/x')", "x = '\t'", "#| slow\nprint(1)")
    found = " ".join(lint.stored_problems(path))
    assert all(words in found for words in ("somebody's machine", "#2 has a control character", "#3 is not run"))


@pytest.mark.parametrize(
    ("source", "places"),
    [
        ("from ..paths import Path", [("guidance_nb.paths", "top ")]),
        ("def f():\n    with extra('images'):\n        import sklearn", [("sklearn", "function images")]),
        ("if TYPE_CHECKING:\n    from . import cost", [("guidance_nb.engine", "types ")]),
    ],
)
def test_imports_are_found_where_they_stand(source, places):
    found = lint.imports(ast.parse(source), "engine._cost", False)
    assert [(target, where) for _, target, _, where in found] == places


@pytest.mark.parametrize(
    ("root", "extra", "good"),
    [("sklearn", "images", True), ("sklearn", "cli", True), ("sklearn", "plots", False), ("fastcore", "dev", False)],
)
def test_imports_of_others_want_their_extra(root, extra, good):
    assert (list(lint.foreign_problems("x.py:1", root, "function", extra)) == []) == good


def test_code_and_validation_are_counted():
    source = '''"""A module."""
def check_it(x):
    "Refuse."
    if x < 0:  # never
        raise ValueError

def double(x):
    require(x > 0, "x", x, "positive")

    if x > 9:
        raise ValueError(
            "large"
        )
    return 2 * x
'''
    tree = ast.parse(source)
    lines = code_lines(source, tree)
    assert lines == {2, 4, 5, 7, 8, 10, 11, 12, 13, 14}
    assert lines & validation_lines(tree) == lines - {7, 14}


def test_names_are_listed_by_all_or_by_a_stub(tmp_path):
    module, package = tmp_path / "module.py", tmp_path / "__init__.py"
    module.write_text("__all__ = ['f']\ndef f(): ...\ndef _g(): ...\nclass Loose: ...\n")
    assert public_names(module) == ["f"] and unlisted_names(module) == ["Loose"]
    package.write_text("def own(): ...\n")
    package.with_suffix(".pyi").write_text("from ._data import load as load\nfrom torch import Tensor\n")
    assert public_names(package) == ["load"] and unlisted_names(package) == ["own"]


def test_a_package_offers_what_its_stub_imports_and_nothing_else():
    import guidance_nb.images as images

    assert {"load_images", "image_scores"} <= {*images.__all__} & {*dir(images)}
    assert images.load_images.__module__ == "guidance_nb.images._data"
    with pytest.raises(AttributeError, match=r"^module 'guidance_nb.images' has no attribute 'load_pictures'$"):
        images.load_pictures  # noqa: B018


def test_names_made_of_any_are_counted():
    tree = ast.parse("A = dict[str, Any]\nB: TypeAlias = A\nC = int\nd = f(Any)")
    assert aliases(tree, {"Any"}) == {"A"} and aliases(tree, {"A"}) == {"B"}


def test_the_colab_cell_installs_there_and_nowhere_else():
    asked: list[str] = []

    class Shell:
        def __str__(self) -> str:
            return self.place

        def system(self, line: str) -> None:
            asked.append(line)

        def run_line_magic(self, name: str, line: str) -> None:
            asked.append(f"%{name} {line}")

    shell = Shell()
    for shell.place in ("<ipykernel.zmqshell.Shell>", "<google.colab._shell.Shell>"):
        exec(install(), {"get_ipython": lambda: shell})
    assert [line.split()[0] for line in asked] == ["git", "%pip", "%cd"] and '[all]"' in asked[1]


def test_every_break_stands_once_in_the_package():
    found = [(m.file, m.old) for m in MUTANTS if (lint.PACKAGE / m.file).read_text(encoding="utf-8").count(m.old) != 1]
    assert found == []
