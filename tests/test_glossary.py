"The reference pages keep up with the book: names exist, nothing is missing, answers are short, exercises are folded."

import importlib
import re

import pytest

from notebooks import NOTEBOOKS, cells, directives, text

PAGES = {path.stem: path for path in NOTEBOOKS if path.stem[:2].isdigit()}
GLOSSARY, QUESTIONS = PAGES["90_glossary"], PAGES["91_questions"]
BOOK = [path for stem, path in PAGES.items() if int(stem[:2]) < 28]
METHODS = [path for stem, path in PAGES.items() if 10 <= int(stem[:2]) <= 14]
LOCAL: set[str] = set()  # names of recap tables that mean something on their own page alone


def prose(path) -> list[str]:
    return [text(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown"]


def rows(markdown: str) -> str:
    "The lines of tables."
    return "\n".join(line for line in markdown.splitlines() if line.startswith("|"))


def names(markdown: str) -> set[str]:
    "The identifiers in backticks, calls without their arguments; `a == b` and `guidance-nb tour` are none."
    quoted = [re.fullmatch(r"([A-Za-z_][\w.]*)(\([^()]*\))?", name) for name in re.findall(r"`([^`]+)`", markdown)]
    return {match[1] for match in quoted if match}


def sections() -> dict[str, set[str]]:
    "The identifiers that the glossary lists for each page."
    found = {}
    for cell in prose(GLOSSARY):
        page = re.match(r"### [^\n]+\n\nFrom \[[^\]]+\]\((\w+)\.ipynb\)\.\n", cell)
        if page:
            found[page[1]] = {name for row in rows(cell).splitlines() for name in names(row.split("|")[1])}
    return found


def exists(module, name: str) -> bool:
    "Whether a dotted name leads somewhere; fields of records count."
    for part in name.split("."):
        if not hasattr(module, part):
            return part in getattr(module, "__annotations__", {})
        module = getattr(module, part)
    return True


@pytest.mark.parametrize("page", sections())
def test_identifiers_exist(page):
    module = importlib.import_module(f"guidance_nb.{page[3:]}")
    assert {name for name in sections()[page] if not exists(module, name)} == set()


def test_functions_of_the_scale_table_exist():
    table = next(cell for cell in prose(GLOSSARY) if cell.startswith("## Scale conventions"))
    last = {name for row in rows(table).splitlines()[2:] for name in names(row.rsplit("|", 2)[1])}
    listed = set().union(*sections().values())
    assert len(last) > 8 and last <= listed


@pytest.mark.parametrize("path", BOOK, ids=lambda path: path.stem)
def test_recap_is_in_the_glossary(path):
    recap = [cell.split("## Recap")[1] for cell in prose(path) if "## Recap" in cell]
    assert len(recap) == 1
    missing = names(rows(recap[0])) - set().union(*sections().values()) - LOCAL
    assert missing == set(), f"say what they mean in {GLOSSARY.name}, or list them as local"


def test_every_page_of_the_package_is_in_the_glossary():
    silent = {"16_corrections", "22_mnist", "23_cifar10"}  # pages without exports
    assert {path.stem for path in BOOK} - silent == set(sections())


def test_answers_are_short_and_lead_on():
    answers = [cell for cell in prose(QUESTIONS) if cell.startswith("## ")]
    assert len(answers) >= 13
    for answer in answers:
        title, _, body = answer.partition("\n")
        assert title.endswith("?"), title
        assert len(body.split()) <= 120, (title, len(body.split()))
        assert re.search(r"\]\(\w+\.ipynb\)", body), f"{title}: no link to the page"


@pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)
def test_exercises_are_folded_and_run(path):
    "A question and its answer in words, folded, then the answer as a folded cell that asserts and prints nothing."
    found = cells(path)
    start = next(n for n, cell in enumerate(found) if text(cell["source"]).startswith("## Exercises"))
    rest = [(cell["cell_type"], text(cell["source"]), cell.get("outputs")) for cell in found[start:]]
    assert len(rest) in (6, 8), "three or four questions, a cell of code after each"
    kinds = set()
    for number, ((one, question, _), (two, answer, outputs)) in enumerate(zip(rest[::2], rest[1::2]), 1):
        assert (one, two) == ("markdown", "code")
        kinds.add(re.search(r"\*\*\d\. (By hand|In code|A misconception|A limit)\.\*\*", question)[1])
        assert f"**{number}. " in question
        assert re.search(r"\n\n<details>\n<summary>.+</summary>\n\n.+\n\n</details>$", question, re.DOTALL)
        flags = directives(answer)
        assert flags["code-fold"] == "true" and "code-summary" in flags
        assert "assert" in answer and not {"slow", "cuda", "eval"} & set(flags) and not outputs
    assert {"By hand", "In code", "A misconception"} <= kinds
