"The site's pages are well formed; tools/pages.py says what that means, and here each of its checks is seen to fail."

import base64
import copy
import json
import sys

import pytest
import yaml

import apart
from notebooks import ROOT, settings
from pages import (
    MAX_FIGURE,
    MAX_NOTEBOOK,
    MAX_PAGE,
    Page,
    config_problems,
    figure_problems,
    link_problems,
    markdown,
    markup_problems,
    render,
    size_problems,
)


@pytest.fixture(scope="module")
def pandoc():
    pytest.importorskip("pypandoc", reason="pypandoc_binary is not installed, so no page was checked")


def test_pages_are_well_formed(pandoc):
    run = apart.run([sys.executable, "tools/pages.py"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def config() -> dict:
    return yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda c: c["website"]["sidebar"]["contents"][1]["contents"].pop(), "notebooks outside the sidebar"),
        (lambda c: c["website"]["sidebar"]["contents"][1]["contents"].append("99_x.ipynb"), "without a notebook"),
        (lambda c: c["website"].update(title="another"), "title"),
        (lambda c: c["website"].update({"site-url": "https://example.org"}), "site-url"),
        (lambda c: c["website"].update(search=False), "search"),
        (lambda c: c["format"].update(commonmark="default"), "keep-md"),
        (lambda c: c["project"].update({"output-dir": "_site"}), "output-dir"),
        (lambda c: c.update(bibliography="missing.bib"), "missing.bib"),
        (lambda c: c["website"].update(favicon="images/gone.svg"), "gone.svg"),
        (lambda c: c["website"]["open-graph"].update(image="images/gone.png"), "gone.png"),
        (lambda c: c["website"].pop("page-navigation"), "page-navigation"),
        (lambda c: c["website"].pop("page-footer"), "page-footer"),
        (lambda c: c["website"]["sidebar"].pop("tools"), "repository"),
        (lambda c: c["format"]["html"]["theme"].pop("dark"), "themes"),
    ],
)
def test_inconsistent_config_is_found(change, problem):
    broken = copy.deepcopy(config())
    change(broken)
    (found,) = config_problems(settings(), broken)
    assert problem in found


@pytest.mark.parametrize(
    ("source", "warns"),
    [
        (r"$\frac{a}{b}$ and [@ho2022classifier]", False),
        (r"$$\frac{a}{b$$", True),  # an open brace
        (r"$\unknownmacro x$", True),
        ("as [@nobody2099nothing] shows", True),
    ],
)
def test_broken_formulas_and_citations_are_found(pandoc, source, warns):
    assert bool(render(source)[1]) == warns


@pytest.mark.parametrize(
    ("html", "problem"),
    [
        ('<h2 id="here">x</h2><a href="#here">x</a><a href="b.ipynb#there">x</a>', None),
        ('<a href="#nowhere">x</a>', "#nowhere leads nowhere"),
        ('<a href="c.ipynb">x</a>', "c.ipynb leads nowhere"),
        ('<a href="b.ipynb#gone">x</a>', "b.ipynb#gone leads nowhere"),
        ('<a href="SITE/b.html#there">x</a>', None),
        ('<a href="SITE/b.html#there.method">x</a>', "leads nowhere"),
        ('<a href="SITE/b.html#_there">x</a>', "leads nowhere"),
        ('<h2 id="here">x</h2><span id="here"></span>', "is there twice"),
        ('<a href="GIT/blob/main/tools/pages.py">x</a>', None),
        ('<a href="GIT/blob/main/tools/gone.py">x</a>', "leads nowhere"),
        ('<a href="COLAB/nbs/00_paths.ipynb">x</a>', None),
        ('<a href="COLAB/nbs/99_gone.ipynb">x</a>', "leads nowhere"),
        ('<a href="https://example.org/anything">x</a>', None),
        ('<img src="images/five_methods.png" alt="words">', None),
        ('<img src="images/five_methods.png">', "no alternative text"),
        ('<img src="images/gone.png" alt="words">', "is missing"),
    ],
)
def test_broken_links_and_images_are_found(html, problem):
    names = settings()
    colab = f"https://colab.research.google.com/github/{names['user']}/{names['repo']}/blob/{names['branch']}"
    places = {"SITE": names["doc_host"] + names["doc_baseurl"], "GIT": names["git_url"], "COLAB": colab}
    for short, url in places.items():
        html = html.replace(short, url)
    other = Page('<h2 id="there">x</h2>')
    found = link_problems("a.ipynb", {"a.ipynb": Page(html), "b.ipynb": other, "b.html": other}, names)
    assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])


def cell(source: str = "plt.show()", size: int = 100) -> dict:
    "A processed cell that shows a figure of so many bytes."
    data = {"image/png": base64.b64encode(bytes(size)).decode()}
    return {"cell_type": "code", "source": source, "outputs": [{"output_type": "display_data", "data": data}]}


GOOD_ALT = '#| fig-alt: "Two curves that rise with the scale: one fast, one slowly."'


@pytest.mark.parametrize(
    ("line", "good"),
    [
        (GOOD_ALT, True),
        ("", False),
        ('#| fig-alt: ""', False),
        ('#| fig-alt: "A figure."', False),  # what is to be seen takes more words than that
        ("#| fig-alt: Two curves that rise with the scale: one fast, one slowly.", False),  # the colon needs quotes
    ],
)
def test_figures_without_words_are_found(line, good):
    caption = '#| fig-cap: "The scale over the steps."'
    assert (figure_problems("a.ipynb", [cell(f"{line}\n{caption}\nplt.show()")]) == []) == good
    (found,) = figure_problems("a.ipynb", [cell(f"{GOOD_ALT}\nplt.show()")])
    assert "fig-cap" in found


@pytest.mark.parametrize(
    ("size", "figure", "image", "problem"),
    [
        (MAX_NOTEBOOK, MAX_FIGURE, MAX_FIGURE, None),
        (MAX_NOTEBOOK + 1, 1, 1, "the notebook"),
        (1, MAX_FIGURE + 1, 1, "the figure of cell #1"),
        (1, 1, MAX_FIGURE + 1, "the image a.png"),
    ],
)
def test_what_is_too_large_is_found(size, figure, image, problem):
    found = size_problems("a.ipynb", size, [cell(size=figure)], {"a.png": image})
    assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])


def test_heavy_pages_are_found():
    "Many files, each of them small enough."
    images = {f"{i}.png": MAX_FIGURE for i in range(MAX_PAGE // MAX_FIGURE)}
    rest = MAX_PAGE % MAX_FIGURE
    assert size_problems("a.ipynb", rest, [], images) == []
    (found,) = size_problems("a.ipynb", rest + 1, [], images)
    assert "the page" in found


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("See [elsewhere](https://arxiv.org/abs/2207.12598).", None),
        ("## Here {#sec-here}\n\nas in @sec-here", None),
        ("as in @sec-elsewhere", "no section of this page"),
        ("[broken](https://arxiv/abs)", "no address"),
        ("[broken](https:///abs)", "no address"),
        ("[a package](https://pypi.org/project/torch)", "registry"),
        ("by [`fit`](https://arxiv.org/fit) ([training](05_training.ipynb))", None),
        ("by [[`fit`](https://arxiv.org/fit)](05_training.ipynb)", "a link in a link"),
        ("```python\nx: int  # see `fit`\n```\n\nand [`fit`](https://arxiv.org/fit)", None),
        ("```python\nx: int  # see [`fit`](https://arxiv.org/fit)\n```", "a link in code"),
    ],
)
def test_markup_that_leads_nowhere_is_found(source, problem):
    found = markup_problems("a.ipynb", source)
    assert (found == []) if problem is None else (len(found) == 1 and problem in found[0])


def test_markdown_shows_what_the_site_shows():
    "Prose, code that is not hidden, and outputs that are markdown."
    shown = [
        {"cell_type": "raw", "source": "---\ntitle: A\n---"},
        {"cell_type": "markdown", "source": "prose"},
        {"cell_type": "code", "source": "#| echo: false\nhidden", "outputs": [{"data": {"text/markdown": "output"}}]},
        {"cell_type": "code", "source": "shown", "outputs": []},
    ]
    front, source = markdown(shown)
    assert front == {"title": "A"}
    assert all(word in source for word in ("prose", "output", "shown")) and "hidden" not in source


EXPORTED = """from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from os import PathLike
else:
    PathLike = object


class Ring:
    "A ring."

    def turn(self): ...


def roll(ring): ...
"""


def test_source_is_shown_once_with_anchors_and_folded_imports(tmp_path):
    "As nbdev runs it: no box, an anchor for each name and method, imports folded, equations beside their numbers."
    from execnb.nbio import read_nb
    from nbdev.processors import FilterDefaults

    def code(source: str) -> dict:
        return {"cell_type": "code", "source": source, "metadata": {}, "outputs": [], "execution_count": None}

    first = {"cell_type": "markdown", "metadata": {}, "source": "# Rings\n\n> Round."}
    prose = {"cell_type": "markdown", "metadata": {}, "source": "So\n$$a=b.\\tag{1}$$\nfollows."}
    imports, _, rest = EXPORTED.partition("\n\n\n")
    cells = [first, prose, code(f"#| exports\n{imports}"), code(f"#| exports\n{rest}"), code("#| slow\nroll(1)")]
    path = tmp_path / "00_rings.ipynb"
    path.write_text(json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    nb = read_nb(path)
    FilterDefaults()(nb)
    _, source = markdown(nb.cells)
    assert "show_doc" not in source and source.count("class Ring") == 1
    assert all(f"[]{{#{name}}}" in source for name in ("ring", "ring.turn", "roll"))
    folded, _, shown, slow = nb.cells[-4:]
    assert "#| code-fold: true" in folded.source and "code-fold" not in shown.source
    assert '#| classes: "slow"' in slow.source and '"slow"' not in shown.source
    assert "$$a=b.$$" in source and "[(1)]{.number}" in source and "\\tag" not in source
