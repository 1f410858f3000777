"The template of a method's notebook passes every check as it is, in a copy of the project."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import apart
from notebooks import ROOT, cells, text

NAME, NUMBER = "halfway_guidance", 40
PAGE = f"nbs/{NUMBER}_{NAME}.ipynb"
FOLDERS = ("nbs", "tools", "tests", "guidance_nb")
FILES = ("settings.ini", "pyproject.toml", "_quarto.yml", "setup.py", "README.md", "CONTRIBUTING.md", "LICENSE")


def run(clone: Path, *command: str) -> subprocess.CompletedProcess:
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | {"PYTHONPATH": str(clone)}
    return subprocess.run([sys.executable, *command], cwd=clone, env=env, capture_output=True, text=True)


# Another copy of the project, in a process that began with this one's modules.
MOVE = """
import runpy, sys
root, clone, *sys.argv = sys.argv[1:]
for name, module in list(sys.modules.items()):
    if any(str(getattr(module, "__file__", "")).startswith(f"{root}/{part}/") for part in ("guidance_nb", "tools")):
        del sys.modules[name]
ours = ("", root, f"{root}/tools", f"{root}/tests")
sys.path[:] = [f"{clone}/tools", clone, *(place for place in sys.path if place not in ours)]
run = runpy.run_path if sys.argv[0].endswith(".py") else runpy.run_module
run(sys.argv[0], run_name="__main__")
"""


def run_warm(clone: Path, *command: str) -> subprocess.CompletedProcess:
    "A script or a module, without the time for its imports."
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"} | {"PYTHONPATH": str(clone)}
    words = [sys.executable, "-c", MOVE, str(ROOT), str(clone), *command]
    return apart.run(words, cwd=clone, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    "A copy of the project with a method begun from the template, exported and under contract."
    place = tmp_path_factory.mktemp("clone")
    for folder in FOLDERS:
        ignored = shutil.ignore_patterns("__pycache__", "_proc")
        shutil.copytree(ROOT / folder, place / folder, symlinks=True, ignore=ignored)
    for name in FILES:
        shutil.copy(ROOT / name, place)
    begun = run(place, "tools/method.py", NAME, str(NUMBER))
    assert begun.returncode == 0, begun.stderr
    exported = run(place, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()")
    assert exported.returncode == 0, exported.stderr
    shown = run_warm(place, "tools/refresh.py", PAGE)
    assert shown.returncode == 0, shown.stderr
    imported, listed = re.search(r"^(from .*)\n(    \".*)$", begun.stdout, re.MULTILINE).groups()
    contract = place / "tests" / "test_guidance_contract.py"
    source = contract.read_text(encoding="utf-8").replace(
        "from guidance_nb.mixtures", f"{imported}\nfrom guidance_nb.mixtures", 1
    )
    start = "CASES: dict[str, Case] = {\n"
    contract.write_text(source.replace(start, f"{start}{listed}\n", 1), encoding="utf-8")
    return place


def test_template_passes_the_house_checks(clone):
    "Form, by what checks the others; the notebook itself and the contract, by the tests that hold the others."
    checks = ("style", "export", "notebooks", "rhythm", "links", "layers")
    said = run_warm(clone, "tools/lint.py", *checks).stdout
    assert [line for line in said.splitlines() if NAME in line] == [] and all(f"{name} " in said for name in checks)
    shown = run_warm(clone, "tools/refresh.py", "--check", PAGE)
    assert (shown.returncode, shown.stdout) == (0, f"{PAGE}: done\n"), shown.stderr
    files = (f"tests/test_{name}.py" for name in ("notebooks", "guidance_contract"))
    tests = run_warm(clone, "pytest", "-n0", "-q", "-k", "halfway and not fresh", *files)
    assert tests.returncode == 0, tests.stdout
    passed = int(re.search(r"(\d+) passed", tests.stdout)[1])
    assert passed >= 30, f"only {passed} tests were found for the new page"


def test_template_is_typed(clone):
    "Against the types of the package; those of the largest libraries are left out, for they take most of the time."
    skipped = "mypy-torch.*,diffusers.*,transformers.*,peft.*"
    rules = "[mypy]\nfollow_imports = silent\ndisallow_untyped_defs = True\nignore_missing_imports = True\n"
    (clone / "mypy.ini").write_text(f"{rules}[{skipped}]\nfollow_imports = skip\n", encoding="utf-8")
    checked = run(clone, "-m", "mypy", "--config-file=mypy.ini", f"guidance_nb/{NAME}.py")
    assert checked.returncode == 0, checked.stdout


def test_template_makes_a_page(clone):
    "It is listed, has a title and a claim, and pandoc reads its formulas and finds its citation."
    pytest.importorskip("pypandoc", reason="pypandoc_binary is not installed, so the page was not checked")
    script = f"""
import pages, yaml
from notebooks import ROOT, cells, settings
shown = cells(ROOT / "nbs" / "{NUMBER}_{NAME}.ipynb")
page, said = pages.render(pages.markdown(shown)[1])
found = pages.config_problems(settings(), yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8")))
print(*found, *pages.figure_problems("page", shown), said, sep="\\n")
assert {{"derivation", "result", "recap"}} <= page.ids, page.ids
"""
    said = run(clone, "-c", f"import sys; sys.path.insert(0, 'tools')\n{script}")
    assert (said.returncode, said.stdout.strip()) == (0, ""), said.stdout + said.stderr


def test_no_word_of_the_template_is_left(clone):
    page = (clone / "nbs" / f"{NUMBER}_{NAME}.ipynb").read_text(encoding="utf-8")
    assert not re.search(r"my.?method", page, re.IGNORECASE)
    assert len({cell["id"] for cell in json.loads(page)["cells"]}) == len(json.loads(page)["cells"])


@pytest.mark.parametrize("name, number", [("Halfway", 40), ("paths", 40), ("mine", 5), ("mine", 20)])
def test_names_and_numbers_that_cannot_be_are_refused_in_one_line(name, number):
    refused = run(ROOT, "tools/method.py", name, str(number))
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1
    assert re.match(r"(NAME|NUMBER) = .*; allowed: ", refused.stderr)


def test_template_keeps_the_rhythm():
    "Derivation, code, result, when to use it, recap, in this order."
    sections = [
        text(cell["source"]).split("\n")[0] for cell in cells(ROOT / "tools" / "template" / "NN_my_method.ipynb")
    ]
    titles = [line for line in sections if line.startswith("## ")]
    shape = ["The idea", "Derivation", "The code", "One check", "Result", "When to use it, and when not", "Recap"]
    assert titles == [f"## {title}" for title in shape]


CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_contributing_names_what_exists():
    "Files, make targets and tests."
    own = {"nbs/40_my_idea.ipynb", "nbs/NAME.ipynb"}  # examples
    quoted = re.findall(r"[`=(]((?:nbs|tools|tests|guidance_nb)/[\w/.]*)", CONTRIBUTING)
    assert len(quoted) > 10 and [name for name in quoted if name not in own and not (ROOT / name).exists()] == []
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    assert set(re.findall(r"`?make ([a-z]+)", CONTRIBUTING.replace("make one", ""))) <= targets


def test_contributing_says_what_the_claims_are():
    from guidance_nb.guidance import Claims

    for claim in [*re.findall(r"claim `(\w+)=", CONTRIBUTING), "nfe", "space"]:
        assert claim in Claims.__dataclass_fields__
