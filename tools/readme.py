"""Write README.md from nbs/index.ipynb: `python tools/readme.py`. Needs no Quarto.

Prose and code are kept word for word. Cells flagged `#| hide` and directive lines are dropped, relative links are made
relative to the project root, and citations become links. A figure is shown from a markdown cell, as a committed file.
"""

import posixpath
import re

from notebooks import ROOT, cells, directives, text

SOURCE = ROOT / "nbs" / "index.ipynb"
TARGET = ROOT / "README.md"


def references() -> dict[str, tuple[str, str, str]]:
    "Citation key to (authors, year, url), for every entry of nbs/references.bib."
    entries = {}
    for entry in re.split(r"\n(?=@)", (ROOT / "nbs" / "references.bib").read_text(encoding="utf-8"))[1:]:
        key = re.match(r"@\w+\{([^,]+),", entry)[1]
        field = dict(re.findall(r"^\s*(\w+) = \{(.*)\},?$", entry, re.MULTILINE))
        names = [author.split(",")[0] for author in field["author"].split(" and ")]
        authors = " and ".join(names) if len(names) < 3 else f"{names[0]} et al."
        entries[key] = authors, field["year"], field["url"]
    return entries


def cite(markdown: str) -> str:
    "Turn `[@key; @key]` and `@key` into links, as the site does."
    known = references()
    key = f"@({'|'.join(known)})"

    def group(match: re.Match) -> str:
        return f"({re.sub(key, lambda m: '[{}, {}]({})'.format(*known[m[1]]), match[1])})"

    markdown = re.sub(rf"\[([^\[\]]*{key}[^\[\]]*)\]", group, markdown)
    return re.sub(key, lambda m: "[{} ({})]({})".format(*known[m[1]]), markdown)


def relink(markdown: str) -> str:
    "Make links that are relative to nbs/ relative to the project root."

    def move(match: re.Match) -> str:
        target = match[1]
        absolute = re.match(r"[a-z]+:|#", target)
        return match[0] if absolute else f"]({posixpath.normpath(posixpath.join('nbs', target))}"

    return re.sub(r"\]\(([^()\s]+)", move, markdown)


def code(cell: dict) -> list[str]:
    "A code cell as fenced blocks: its source, unless `#| echo: false`, and its text outputs."
    source = text(cell["source"])
    flags = directives(source)
    if "hide" in flags:
        return []
    blocks = []
    if flags.get("echo") != "false":
        blocks.append("```python\n" + re.sub(r"^#\|.*\n?", "", source, flags=re.MULTILINE).strip("\n") + "\n```")
    for out in cell["outputs"]:
        data = out.get("data", {})
        if any(kind.startswith("image/") for kind in data):
            raise SystemExit(f"{SOURCE.name}: cell {cell['id']} shows a figure: show a file of nbs/images instead.")
        if "text/markdown" in data:
            blocks.append(relink(cite(text(data["text/markdown"]).strip("\n"))))
        else:
            blocks.append("```\n" + text(out.get("text") or data["text/plain"]).strip("\n") + "\n```")
    return blocks


def readme() -> str:
    "The text of README.md."
    blocks = ["<!-- Written by tools/readme.py from nbs/index.ipynb: edit that. -->"]
    for cell in cells(SOURCE):
        blocks += [relink(cite(text(cell["source"])))] if cell["cell_type"] == "markdown" else code(cell)
    return "\n\n".join(blocks) + "\n"


if __name__ == "__main__":
    TARGET.write_text(readme(), encoding="utf-8")
