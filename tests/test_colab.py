"Every notebook that can run on Colab says so below its title, and its first cell of code does nothing elsewhere."

import ast
import re
import sys

import pytest
from test_layering import DISTRIBUTION

from colab import LINK, NEEDS, WITHOUT, install, with_colab
from notebooks import NOTEBOOKS, cells, settings, text

GIVEN = {"IPython", "ipywidgets", "yaml"}  # Colab has them; yaml comes with diffusers, besides


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_opens_in_colab(path):
    if path.stem in WITHOUT:
        assert not any(text(cell["source"]).startswith(LINK) for cell in cells(path))
    else:
        assert with_colab(path)["cells"] == cells(path), "run python tools/colab.py"


def test_exceptions_are_notebooks():
    assert (WITHOUT | set(NEEDS)) - {path.stem for path in NOTEBOOKS} == set()


class Shell:
    "A notebook's shell that only notes what it is asked to run; Colab's is known by its module."

    def __init__(self, module: str) -> None:
        self.module, self.asked = module, []

    def __str__(self) -> str:
        return f"<{self.module}.Shell object>"

    def system(self, line: str) -> None:
        self.asked.append(line)

    def run_line_magic(self, name: str, line: str) -> None:
        self.asked.append(f"%{name} {line}")


def asked(module: str) -> list[str]:
    "What the install cell runs in such a shell."
    shell = Shell(module)
    exec(install(), {"get_ipython": lambda: shell})
    return shell.asked


def test_install_cell_fetches_installs_and_goes_there():
    url = settings()["git_url"]
    assert asked("google.colab._shell") == [
        f"git clone --quiet --depth 1 {url} /content/guidance_nb",
        '%pip install --quiet "/content/guidance_nb[sd]" fastcore',
        "%cd -q /content/guidance_nb/nbs",
    ]


def test_install_cell_does_nothing_elsewhere():
    assert asked("ipykernel.zmqshell") == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_imports_are_installed(path):
    "What a notebook imports comes with the package, its extra `sd`, fastcore, or Colab."
    lines = f"{settings()['requirements']} {settings()['sd_requirements']} fastcore".split()
    installed = {re.split(r"[<>=!~\[]", line)[0] for line in lines} | GIVEN | {"guidance_nb"}
    roots = set()
    for cell in cells(path):
        for node in ast.walk(ast.parse(text(cell["source"]))) if cell["cell_type"] == "code" else ():
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            roots |= {name.split(".")[0] for name in names}
    needed = roots - sys.stdlib_module_names
    assert {DISTRIBUTION.get(name, name) for name in needed} - installed == set()
