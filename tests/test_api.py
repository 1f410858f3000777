"The API page lists every public name, and a name in backticks leads to the page that defines it."

import importlib
import inspect
import re

import pytest
from nbdev.doclinks import NbdevLookup

from notebooks import NOTEBOOKS, ROOT, cells, settings, text

PAGE = next(path for path in NOTEBOOKS if path.stem == "92_api")
STEMS = [path.stem for path in NOTEBOOKS if (ROOT / "guidance_nb" / f"{path.stem[3:]}.py").exists()]
each_module = pytest.mark.parametrize("stem", STEMS)


def sections() -> dict[str, list[str]]:
    "The names that the page shows for each module, as it shows them."
    outputs = [output for cell in cells(PAGE) for output in cell.get("outputs", [])]
    (shown,) = [text(output["data"]["text/markdown"]) for output in outputs]
    parts = re.split(r"^## (\w+)\n", shown, flags=re.MULTILINE)[1:]
    return {name: re.findall(r"^- \[?`([^`]+)`", body, re.MULTILINE) for name, body in zip(parts[::2], parts[1::2])}


def test_every_module_has_a_section():
    assert list(sections()) == [stem[3:] for stem in STEMS]


@each_module
def test_every_public_name_is_listed(stem):
    module = importlib.import_module(f"guidance_nb.{stem[3:]}")
    assert [name.rpartition(".")[2] for name in sections()[stem[3:]]] == module.__all__, "run make notebooks"


@each_module
def test_names_lead_to_their_own_page(stem):
    "Also where two modules have the name, which the page then writes in full."
    module = importlib.import_module(f"guidance_nb.{stem[3:]}")
    lookup, site = NbdevLookup(), settings()["doc_host"] + settings()["doc_baseurl"]
    for shown in sections()[stem[3:]]:
        name = shown.rpartition(".")[2]
        value = getattr(module, name)
        if (inspect.isclass(value) or inspect.isroutine(value)) and value.__module__ == module.__name__:
            assert lookup.doc(shown) == f"{site}/{stem[3:]}.html#{name.lower()}"


@each_module
def test_every_line_says_something(stem):
    "A name whose docstring is missing would show its type or nothing."
    outputs = [output for cell in cells(PAGE) for output in cell.get("outputs", [])]
    body = text(outputs[0]["data"]["text/markdown"]).split(f"## {stem[3:]}\n")[1].split("\n## ")[0]
    lines = [line for line in body.splitlines() if line.startswith("- ")]
    assert [line for line in lines if not re.search(r"`\]?(\([^)]*\))?: \S", line)] == []


@each_module
def test_prose_means_the_names_of_its_own_page(stem):
    "A page that defines a name and speaks of it must not send its reader to another page that has the name, too."
    module = importlib.import_module(f"guidance_nb.{stem[3:]}")
    lookup, path = NbdevLookup(), ROOT / "nbs" / f"{stem}.ipynb"
    prose = " ".join(text(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")
    spoken = set(re.findall(r"`(\w+)(?:\(\))?`", prose)) & set(module.__all__)
    assert {
        name: lookup.doc(name)
        for name in spoken
        if f"/{stem[3:]}.html#" not in (lookup.doc(name) or f"/{stem[3:]}.html#")
    } == {}
