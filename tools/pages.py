"""Check that the site's pages are well formed: `python tools/pages.py`.

nbdev processes the notebooks into _proc, as it does for the site; pandoc then has to read every formula and find every
citation, and every link, anchor and image has to lead somewhere. Links to other sites are only looked at. Quarto is not
run: that the site builds is for `make docs` to say. The settings of the site, words for figures and sizes, which are
also here, are checked by `make lint`.
"""

import base64
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlsplit

import yaml

from notebooks import NOTEBOOKS, ROOT, cells, directives, settings, text

MAX_NOTEBOOK, MAX_FIGURE, MAX_PAGE = 900_000, 150_000, 2_000_000  # bytes; a page is a notebook and the files it shows
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[(`[^`\n]+`)\]\([^)\s]*\)")
REGISTRIES = ("pypi.org", "anaconda.org", "npmjs.com", "conda-forge.org")  # name a package instead


class Page(HTMLParser):
    "The anchors, links and images of one page."

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.twice: set[str] = set()  # anchors that lead to the first of several places
        self.links: list[str] = []
        self.images: list[dict] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        anchor = {found["id"]} if "id" in found else set()
        self.twice |= anchor & self.ids
        self.ids |= anchor
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        self.images += [found] if tag == "img" else []


def process() -> Path:
    "Let nbdev write the processed notebooks; returns their folder."
    from nbdev.serve import proc_nbs

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    return proc_nbs(n_workers=0, force=True)  # imports in each worker would take longer than the work


def markdown(shown: list[dict]) -> tuple[dict, str]:
    "Processed cells as front matter and markdown. They are no valid notebook any more, so no library reads them."
    front: dict = {}
    blocks: list[str] = []
    for cell in shown:
        source = text(cell["source"])
        if cell["cell_type"] == "raw":
            front |= yaml.safe_load(source.strip().strip("-")) or {}
        elif cell["cell_type"] == "markdown":
            blocks.append(source)
        else:
            if directives(source).get("echo") != "false":
                blocks.append(f"````\n{source}\n````")  # of no language, whose colours would take time and say nothing
            outputs = [out.get("data", {}).get("text/markdown") for out in cell["outputs"]]
            blocks += [text(output) for output in outputs if output]
    return front, "\n\n".join(blocks)


def render(source: str) -> tuple[Page, str]:
    "A page as pandoc sees it, and what pandoc says about it."
    import pypandoc

    command = [pypandoc.get_pandoc_path(), "--from=markdown", "--to=html5", "--mathml"]
    command += ["--citeproc", f"--bibliography={ROOT / 'nbs' / 'references.bib'}"]
    run = subprocess.run(command, input=source, capture_output=True, text=True, encoding="utf-8")
    return Page(run.stdout), run.stderr.strip()


def size_problems(name: str, size: int, shown: list[dict], images: dict[str, int]) -> list[str]:
    "What is larger than it may be: a notebook of `size` bytes, its stored figures, files by name, all together."
    pairs = [("the notebook", size, MAX_NOTEBOOK), ("the page", size + sum(images.values()), MAX_PAGE)]
    pairs += [(f"the image {image}", found, MAX_FIGURE) for image, found in images.items()]
    for number, cell in enumerate(shown, 1):
        for out in cell.get("outputs", []):
            pngs = [text(data) for kind, data in out.get("data", {}).items() if kind == "image/png"]
            pairs += [(f"the figure of cell #{number}", len(base64.b64decode(png)), MAX_FIGURE) for png in pngs]
    return [f"{name}: {what} has {found:,} bytes, more than {most:,}" for what, found, most in pairs if found > most]


def figure_problems(name: str, shown: list[dict], needed: tuple[str, ...] = ("fig-alt", "fig-cap")) -> list[str]:
    "Figures without words: of a stored figure Quarto takes them from `#| fig-alt` and `#| fig-cap` of its cell."
    found = []
    for number, cell in enumerate(shown, 1):
        kinds = [kind for out in cell.get("outputs", []) for kind in out.get("data", {})]
        for option in needed if any(kind.startswith("image/") for kind in kinds) else ():
            try:
                words = yaml.safe_load(directives(text(cell["source"])).get(option, ""))
            except yaml.YAMLError:
                words = None
            if not isinstance(words, str) or len(words.split()) < (8 if option == "fig-alt" else 4):
                found.append(f"{name}: the figure of cell #{number} needs #| {option}: and a sentence, in quotes")
    return found


def markup_problems(name: str, source: str) -> list[str]:
    "What Quarto would not render, or not lead anywhere from this page."
    found = []
    for label in re.findall(r"@(sec-[\w-]+)", source):
        found += [] if f"{{#{label}}}" in source else [f"{name}: @{label} is no section of this page"]
    for code in FENCE.findall(source):
        found += [f"{name}: a link in code, {link[0]}" for link in LINK.finditer(code)]
    found += [f"{name}: a link in a link, {link}" for link in re.findall(rf"\[{LINK.pattern}\]\([^)\s]*\)", source)]
    for url in re.findall(r"\]\((https?:[^)\s]*)", source):
        host = urlsplit(url).hostname or ""
        if not re.fullmatch(r"([\w-]+\.)+[a-z]{2,}", host):
            found.append(f"{name}: {url} is no address")
        elif host.removeprefix("www.") in REGISTRIES:
            found.append(f"{name}: {url} leads to a package registry")
    return found


def config_problems(names: dict, quarto: dict) -> list[str]:
    "Where _quarto.yml disagrees with settings.ini or with the notebooks."
    site = quarto["website"]
    tools = [tool.get("href") for tool in site["sidebar"].get("tools", [])]
    sidebar = {page for section in site["sidebar"]["contents"] for page in section["contents"]}
    pages = {path.name for path in NOTEBOOKS}
    pairs = {
        "pages of the sidebar without a notebook": (sidebar - pages, set()),
        "notebooks outside the sidebar": (pages - sidebar, set()),
        "output-dir": (quarto["project"]["output-dir"], names["doc_path"]),
        "title": (site["title"], names["title"]),
        "description": (site["description"], names["description"]),
        "site-url": (site["site-url"], names["doc_host"] + names["doc_baseurl"]),
        "repo-url": (site["repo-url"], names["git_url"]),
        "search": (site["search"], True),
        "page-navigation": (site.get("page-navigation"), True),
        "themes": (set(quarto["format"]["html"]["theme"]), {"light", "dark"}),
        "repository among the sidebar's tools": (site["repo-url"] in map(str, tools), True),
        "page-footer": ("page-footer" in site, True),
        "html without keep-md beside commonmark": (
            "commonmark" in quarto["format"] and not quarto["format"]["html"].get("keep-md"),
            False,
        ),
        "nbs/_quarto.yml": ((ROOT / "nbs" / "_quarto.yml").resolve(), ROOT / "_quarto.yml"),
    }
    found = [f"_quarto.yml: {name}: {ours} is not {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    files = [quarto["bibliography"], quarto["format"]["html"]["css"], site["favicon"], site["open-graph"]["image"]]
    return found + [f"_quarto.yml: nbs/{name} is missing" for name in files if not (ROOT / "nbs" / name).exists()]


def link_problems(name: str, pages: dict[str, Page], names: dict) -> list[str]:
    "Links, anchors and images of page `name` that lead nowhere."
    site = names["doc_host"] + names["doc_baseurl"] + "/"
    repository = f"{names['git_url']}/(?:blob|tree)/{names['branch']}/"
    repository += f"|https://colab.research.google.com/github/{names['user']}/{names['repo']}/blob/{names['branch']}/"
    found = [f"{name}: the anchor {anchor} is there twice" for anchor in sorted(pages[name].twice)]
    for link in pages[name].links:
        if re.match(repository, link):
            missing = not (ROOT / re.sub(repository, "", link).split("#")[0]).exists()
        elif re.match(r"[a-z]+:", link) and not link.startswith(site):
            continue
        else:
            target, _, anchor = link.removeprefix(site).partition("#")
            page = pages.get(target or name)
            missing = page is None or (anchor != "" and anchor not in page.ids)
        found += [f"{name}: the link {link} leads nowhere"] if missing else []
    for image in pages[name].images:
        if not image["src"].startswith("data:") and not (ROOT / "nbs" / image["src"]).exists():
            found.append(f"{name}: the image {image['src']} is missing")
        if not image.get("alt"):
            found.append(f"{name}: the image {image['src']} has no alternative text")
    return found


def problems() -> list[str]:
    "Everything wrong with the pages, a line each."
    names = settings()
    found: list[str] = []
    processed = process()
    pages: dict[str, Page] = {}
    for notebook in NOTEBOOKS:
        name, shown = notebook.name, cells(processed / notebook.name)
        front, source = markdown(shown)
        found += [f"{name}: no {key} on the page" for key in ("title", "description") if not front.get(key)]
        page, warnings = render(source)
        found += [f"{name}: {warnings}"] if warnings else []
        found += markup_problems(name, source)
        pages[front.get("output-file", name)] = pages[name] = page
    for notebook in NOTEBOOKS:
        found += link_problems(notebook.name, pages, names)
    return found


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or f"{len(NOTEBOOKS)} pages are well formed.")
    sys.exit(1 if found else 0)
