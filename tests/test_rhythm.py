"The pages keep the rhythm that readers come to rely on, and refer only to what is there."

import re

import pytest
import yaml

import pages
from colab import LINK
from notebooks import NOTEBOOKS, ROOT, cells, directives, text
from readme import references

PAGES = {path.stem: path for path in NOTEBOOKS}
BOOK = [path for stem, path in PAGES.items() if stem[:2].isdigit() and int(stem[:2]) < 28]
METHODS = [path for path in BOOK if 10 <= int(path.stem[:2]) <= 14]

each_page = pytest.mark.parametrize("path", BOOK, ids=lambda path: path.stem)
each_method = pytest.mark.parametrize("path", METHODS, ids=lambda path: path.stem)


def own_cells(path) -> list[dict]:
    "The cells of a page without the two that open it in Colab."
    ours = {LINK, "google.colab"}
    return [cell for cell in cells(path) if not any(mark in text(cell["source"]) for mark in ours)]


def prose(path) -> str:
    return "\n\n".join(text(cell["source"]) for cell in cells(path) if cell["cell_type"] == "markdown")


def tags(path) -> list[int]:
    "Numbers of the page's equations, in order."
    return [int(number) for number in re.findall(r"\\tag\{(\d+)\}", prose(path))]


@each_page
def test_equations_are_numbered_in_order(path):
    assert tags(path) == list(range(1, len(tags(path)) + 1))


@each_page
def test_code_refers_to_equations_of_its_page(path):
    "What follows an arXiv number is an equation of that paper, and says so in the same bracket."
    source = "\n".join(text(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    named = re.findall(r"(?:\beqs?\.|[Ee]quations?) \((\d+)\)(?:(?:-|, | and )\((\d+)\))*", source)
    assert {int(number) for group in named for number in group if number} <= set(tags(path))


@each_page
def test_question_is_short_and_where_it_breaks_comes_before_the_recap(path):
    question = text(own_cells(path)[1]["source"])
    assert len(question.split()) <= 125, len(question.split())
    titles = re.findall(r"^## (.+)$", prose(path), re.MULTILINE)
    breaks = [n for n, title in enumerate(titles) if title.startswith("Where it breaks")]
    assert breaks and breaks[-1] < titles.index("Recap")


@each_method
def test_method_pages_cite_check_and_lead_on(path):
    "The question names its source; each piece of code is checked soon; the recap ends on the next page."
    found = own_cells(path)
    assert re.search(r"\[@\w+", text(found[1]["source"]))
    checks = [
        n for n, cell in enumerate(found)
        if re.search(r"^\s*(assert\b|assert_close|test_eq|test_fail)", text(cell["source"]), re.MULTILINE)
        and not {"exports", "export"} & set(directives(text(cell["source"])))
    ]  # fmt: skip
    for n, cell in enumerate(found):
        source = text(cell["source"])
        if "exports" in directives(source) and re.search(r"^(class|def) ", source, re.MULTILINE):
            assert any(n < check <= n + 7 for check in checks), f"cell {cell['id']} is not checked within seven cells"
    recap = prose(path).split("## Recap")[1].split("## Exercises")[0]
    following = re.search(r"Next: .*\]\((\w+)\.ipynb\)\.\s*$", recap, re.DOTALL)
    assert "| symbol | identifier | equation |" in recap and following and following[1] in PAGES


def test_pages_lead_on_in_the_order_of_the_sidebar():
    "Whoever reads the site in order meets every page once: the next page of the text is none that came before."
    site = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]
    order = [page.removesuffix(".ipynb") for section in site for page in section["contents"]]
    following = {page: re.search(r"\bNext: [^[]*\[[^]]+\]\((\w+)\.ipynb\)", prose(PAGES[page])) for page in order}
    back = {page: link[1] for page, link in following.items() if link and order.index(link[1]) <= order.index(page)}
    assert back == {}
    first, last = (order.index(stem) for stem in ("00_paths", "37_scaling"))
    assert [page for page in order[first : last + 1] if not following[page] and page[:2] < "28"] == []
    assert all(following[path.stem][1] == order[order.index(path.stem) + 1] for path in METHODS)


def test_every_reference_has_a_link_and_is_cited():
    "Rendered as the site renders it: the link of each entry is in the list of references."
    known = references()
    assert all(re.match(r"https://\S+$", url) for _, _, url in known.values())
    everything = "\n".join(prose(path) for path in NOTEBOOKS)
    assert [key for key in known if not re.search(rf"@{key}\b", everything)] == []


def test_references_are_rendered_with_their_links():
    pytest.importorskip("pypandoc", reason="pypandoc_binary is not installed, so no reference was rendered")
    known = references()
    page, said = pages.render(" ".join(f"[@{key}]" for key in known))
    assert said == "" and {url for _, _, url in known.values()} <= set(page.links)
    assert {f"ref-{key}" for key in known} <= page.ids


def test_bibliography_has_no_key_twice():
    keys = re.findall(r"^@\w+\{([^,]+),", (ROOT / "nbs" / "references.bib").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(keys) == len(set(keys)) > 40
