"""Check that the site's pages are well formed: `python tools/pages.py`.

nbdev processes the notebooks into _proc, as it does for the site; pandoc then has to read every formula and find every
citation, and every link, anchor and image has to lead somewhere. Quarto is not run: that the site builds is for
`make docs` to say.
"""

import os
import re
import subprocess
import sys
from configparser import ConfigParser
from html.parser import HTMLParser
from pathlib import Path

import yaml

from notebooks import NOTEBOOKS, ROOT, cells, directives, text

MAX_BYTES = 300_000


class Page(HTMLParser):
    "The anchors, links and images of one page."

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.images: list[dict] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list) -> None:
        found = dict(attrs)
        self.ids |= {found["id"]} if "id" in found else set()
        self.links += [found["href"]] if tag == "a" and "href" in found else []
        self.images += [found] if tag == "img" else []


def process() -> Path:
    "Let nbdev write the processed notebooks; returns their folder."
    from nbdev.serve import proc_nbs

    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    return proc_nbs(n_workers=2, force=True)


def markdown(notebook: Path) -> tuple[dict, str]:
    "A processed notebook as front matter and markdown. It is no valid notebook any more, so no library reads it."
    front: dict = {}
    blocks: list[str] = []
    for cell in cells(notebook):
        source = text(cell["source"])
        if cell["cell_type"] == "raw":
            front |= yaml.safe_load(source.strip().strip("-")) or {}
        elif cell["cell_type"] == "markdown":
            blocks.append(source)
        else:
            if directives(source).get("echo") != "false":
                blocks.append(f"````python\n{source}\n````")
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


def config_problems(settings: dict) -> list[str]:
    "Where _quarto.yml disagrees with settings.ini or with the notebooks."
    quarto = yaml.safe_load((ROOT / "_quarto.yml").read_text(encoding="utf-8"))
    site = quarto["website"]
    sidebar = {page for section in site["sidebar"]["contents"] for page in section["contents"]}
    names = {path.name for path in NOTEBOOKS}
    pairs = {
        "pages of the sidebar without a notebook": (sidebar - names, set()),
        "notebooks outside the sidebar": (names - sidebar, set()),
        "output-dir": (quarto["project"]["output-dir"], settings["doc_path"]),
        "title": (site["title"], settings["title"]),
        "description": (site["description"], settings["description"]),
        "site-url": (site["site-url"], settings["doc_host"] + settings["doc_baseurl"]),
        "repo-url": (site["repo-url"], settings["git_url"]),
        "nbs/_quarto.yml": ((ROOT / "nbs" / "_quarto.yml").resolve(), ROOT / "_quarto.yml"),
    }
    found = [f"_quarto.yml: {name}: {ours} is not {theirs}" for name, (ours, theirs) in pairs.items() if ours != theirs]
    files = [quarto["bibliography"], quarto["format"]["html"]["css"]]
    return found + [f"_quarto.yml: nbs/{name} is missing" for name in files if not (ROOT / "nbs" / name).exists()]


def link_problems(name: str, pages: dict[str, Page], settings: dict) -> list[str]:
    "Links, anchors and images of page `name` that lead nowhere."
    site = settings["doc_host"] + settings["doc_baseurl"] + "/"
    repository = f"{settings['git_url']}/(?:blob|tree)/{settings['branch']}/"
    found = []
    for link in pages[name].links:
        if re.match(repository, link):
            missing = not (ROOT / re.sub(repository, "", link).split("#")[0]).exists()
        elif re.match(r"[a-z]+:", link) and not link.startswith(site):
            continue
        else:
            target, _, anchor = link.removeprefix(site).partition("#")
            page = pages.get(target or name)
            # nbdev links `Class.method` to an anchor of its own but shows the class as a whole.
            shown = {anchor, anchor.partition(".")[0]} if link.startswith(site) else {anchor}
            missing = page is None or (anchor != "" and not shown & page.ids)
        found += [f"{name}: the link {link} leads nowhere"] if missing else []
    for image in pages[name].images:
        if not image["src"].startswith("data:") and not (ROOT / "nbs" / image["src"]).exists():
            found.append(f"{name}: the image {image['src']} is missing")
        if not image.get("alt"):
            found.append(f"{name}: the image {image['src']} has no alternative text")
    return found


def problems() -> list[str]:
    "Everything wrong with the pages, a line each."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    settings = dict(config["DEFAULT"])
    found = config_problems(settings)
    processed = process()
    pages: dict[str, Page] = {}
    for notebook in NOTEBOOKS:
        if notebook.stat().st_size > MAX_BYTES:
            found.append(f"{notebook.name}: {notebook.stat().st_size:,} bytes, more than {MAX_BYTES:,}")
        front, source = markdown(processed / notebook.name)
        found += [f"{notebook.name}: no {key} on the page" for key in ("title", "description") if not front.get(key)]
        page, warnings = render(source)
        found += [f"{notebook.name}: {warnings}"] if warnings else []
        pages[front.get("output-file", notebook.name)] = pages[notebook.name] = page
    for notebook in NOTEBOOKS:
        found += link_problems(notebook.name, pages, settings)
    return found


if __name__ == "__main__":
    found = problems()
    print("\n".join(found) or f"{len(NOTEBOOKS)} pages are well formed.")
    sys.exit(1 if found else 0)
