"""Write the page of all public names, nbs/92_api.ipynb, from the package: `python tools/api.py`.

Names at the top of the package come first, then the rest by part and module, each with its docstring's first paragraph.
The page is the list that `make lint` holds the package to.
"""

import ast
import hashlib
import importlib
import inspect
import json
import os
import re
from pathlib import Path
from types import ModuleType

from counts import is_private, modules, stub_names
from notebooks import NOTEBOOKS, ROOT, module_of, settings, store, text

TARGET = ROOT / "nbs" / "92_api.ipynb"
HOW_TO = {  # machinery -> the pages that show how to use it
    "engine": ("38_engine", "37_scaling"),
    "images": ("32_image_data", "33_image_metrics", "34_latents"),
    "interop": ("35_diffusers_interop", "36_stable_diffusion"),
    "cli": ("30_cli", "31_recipes"),
    "explorer": ("28_explorer",),
}
PARTS = {
    "Foundations": range(0, 8), "Guidance": range(8, 15), "Family": (*range(15, 20), 21, 25, 27, 39),
    "Evidence": range(20, 30),
}  # fmt: skip
STEMS = [path.stem for path in NOTEBOOKS]
TAUGHT = {module: path.stem for path in NOTEBOOKS if (module := module_of(path))}


def pages_of(module: str) -> list[str]:
    "The pages of a module, taught or shown, that are there."
    stems = (TAUGHT[module],) if module in TAUGHT else HOW_TO.get(module, ())
    return [stem for stem in stems if stem in STEMS]


def home(module: ModuleType, name: str) -> str:
    "The module that holds a public name: of a package one of its private modules."
    short, file = module.__name__.partition(".")[2], Path(module.__file__ or "")
    return f"{short}.{stub_names(file)[name]}" if file.with_suffix(".pyi").exists() else short


def top_names() -> dict[str, str]:
    "The names at the top, and the public modules they are listed in."
    homes = stub_names(ROOT / "guidance_nb" / "__init__.py")
    return {name: module.partition("._")[0] for name, module in homes.items()}


def part_of(module: str) -> str:
    if module not in TAUGHT:
        return "Machinery"
    return next(part for part, numbers in PARTS.items() if int(TAUGHT[module][:2]) in numbers)


def public_modules() -> dict[str, ModuleType]:
    "Those with public names, taught ones in the order of their pages."
    names = [name for name in modules() if not is_private(name)]
    names.sort(key=lambda name: (TAUGHT.get(name, "zz"), name))
    found = {name: importlib.import_module(f"guidance_nb.{name}") for name in names}
    return {name: module for name, module in found.items() if getattr(module, "__all__", None)}


def comments(module: ModuleType) -> dict[str, str]:
    "The comments beside the constants of a module."
    lines, found = inspect.getsource(module).splitlines(), {}
    for node in ast.parse("\n".join(lines)).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        comment = re.search(r"  # (?!fmt:|type:)(.*)", lines[node.lineno - 1])
        if isinstance(target, ast.Name) and comment:
            found[target.id] = comment[1]
    return found


def value_in_words(value: object) -> str:
    "What a constant is, without a word that depends on the machine."
    if isinstance(value, os.PathLike):
        return "a path"
    if isinstance(value, int | float | str) and "\n" not in str(value):
        return f"`{value!r}`"
    if isinstance(value, tuple | list | set | frozenset | dict):
        entries = ", ".join(f"`{entry!r}`" for entry in value)
        return entries if entries and len(entries) < 200 else f"{len(value)} entries"
    return "a type" if hasattr(value, "__args__") else f"an object of type `{type(value).__name__}`"


def is_own(module: ModuleType, name: str) -> bool:
    "Whether a name is made where it is public, and not a constant or another's."
    return getattr(getattr(module, name), "__module__", None) == f"guidance_nb.{home(module, name)}"


def meaning(module: ModuleType, name: str) -> str:
    "The first paragraph of a docstring; of a constant the comment beside it, or its value."
    value = getattr(module, name)
    if is_own(module, name) and value.__doc__:
        return " ".join(inspect.cleandoc(value.__doc__).split("\n\n")[0].split())
    return comments(module).get(name) or value_in_words(value)


def escaped(words: str) -> str:
    "Words as markdown shows them; what stands in backticks already is."
    parts = words.split("`")
    parts[::2] = [re.sub(r"([*_<>$@\[\]\\|~^#])", r"\\\1", part) for part in parts[::2]]
    return "`".join(parts)


def linked(module: ModuleType, name: str) -> str:
    "A name that leads to its place: nbdev links what a page defines, the rest leads to a page or to the source."
    short = module.__name__.partition(".")[2]
    if short in TAUGHT:
        return f"`{name}`" if is_own(module, name) else f"[`{name}`]({TAUGHT[short]}.ipynb)"
    where = settings()
    file = modules()[home(module, name)].relative_to(ROOT).as_posix()
    return f"[`{name}`]({where['git_url']}/blob/{where['branch']}/{file})"


def entry(module: ModuleType, name: str) -> str:
    return f"- {linked(module, name)}: {escaped(meaning(module, name))}"


def top_section(found: dict[str, ModuleType], top: dict[str, str]) -> str:
    "The names that `import guidance_nb as gnb` offers, by part."
    blocks = ["## At the top\n\n`import guidance_nb as gnb` offers these, and imports each when it is first asked for."]
    for part in [*PARTS, "Machinery"]:
        lines = [entry(found[module], name) for name, module in top.items() if part_of(module) == part]
        blocks += [f"### {part} at the top\n\n" + "\n".join(lines)] if lines else []
    return "\n\n".join(blocks)


def module_section(name: str, module: ModuleType, top: dict[str, str]) -> str:
    "A module: its claim, its page, and those of its names that are not at the top."
    words = escaped(" ".join(inspect.cleandoc(module.__doc__ or "").split("\n\n")[0].split()))
    pages = ", ".join(f"[{page[3:]}]({page}.ipynb)" for page in pages_of(name))
    told = f"{words} Page{'s' if ', ' in pages else ''}: {pages}." if pages else words
    blocks = [f"### `guidance_nb.{name}`", told]
    above = ", ".join(f"`{public}`" for public in module.__all__ if top.get(public) == name)
    blocks += [f"At the top: {above}."] if above else []
    blocks += ["\n".join(entry(module, public) for public in module.__all__ if top.get(public) != name)]
    return "\n\n".join(filter(None, blocks))


def sections() -> list[str]:
    "The page's cells between its introduction and its recap."
    found, top = public_modules(), top_names()
    blocks = [top_section(found, top)]
    for part in [*PARTS, "Machinery"]:
        parts = [module_section(name, module, top) for name, module in found.items() if part_of(name) == part]
        blocks += [f"## {part}\n\n" + "\n\n".join(parts)] if parts else []
    return blocks


def fresh() -> dict:
    "The page as it should be."
    page = json.loads(TARGET.read_text(encoding="utf-8"))
    first, second, last = page["cells"][0], page["cells"][1], page["cells"][-1]
    made = []
    for source in sections():
        name = hashlib.sha256(source.splitlines()[0].encode()).hexdigest()[:8]
        made.append({"cell_type": "markdown", "id": name, "metadata": {}, "source": source.splitlines(keepends=True)})
    return page | {"cells": [first, second, *made, last]}


def listed() -> list[str]:
    "The lines of the page as stored."
    page = json.loads(TARGET.read_text(encoding="utf-8"))
    return [line for cell in page["cells"][2:-1] for line in text(cell["source"]).splitlines()]


if __name__ == "__main__":
    import sys

    sys.path.insert(0, str(ROOT))
    store(fresh(), TARGET)
