"""Begin the notebook of a new guidance method from the template: `make method NAME=my_idea NUMBER=40`.

Writes nbs/NUMBER_NAME.ipynb, lists the page in _quarto.yml, and says what remains. CONTRIBUTING.md explains the rest.
"""

import argparse
import re
import sys

from colab import with_colab
from notebooks import NOTEBOOKS, ROOT, store

TEMPLATE = ROOT / "tools" / "template" / "NN_my_method.ipynb"


def check(name: str, number: int) -> None:
    "Refuse a name or a number that cannot be a page."
    numbers = {path.stem[:2]: path.name for path in NOTEBOOKS}
    modules = {path.stem[3:] for path in NOTEBOOKS}
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or name in modules:
        raise SystemExit(f"NAME = {name!r}; allowed: lower-case words joined by _, not the name of a page")
    if not 16 <= number <= 89 or f"{number:02}" in numbers:
        taken = numbers.get(f"{number:02}", "")
        raise SystemExit(
            f"NUMBER = {number}; allowed: 16 to 89, above all pages it imports{taken and f', not {taken}'}"
        )


def begin(name: str, number: int) -> str:
    "Copy the template under its new name, list the page, and return what is left to do."
    check(name, number)
    title, class_name = name.replace("_", " "), "".join(word.capitalize() for word in name.split("_"))
    page = TEMPLATE.read_text(encoding="utf-8").replace("MyMethod", class_name).replace("my_method", name)
    page = page.replace("My method", title.capitalize()).replace("my method", title)
    target, site = ROOT / "nbs" / f"{number}_{name}.ipynb", ROOT / "_quarto.yml"
    target.write_text(page, encoding="utf-8")
    store(with_colab(target), target)
    last = "          - 19_trained_guidance.ipynb\n"  # the last page of the section on the family
    listed = site.read_text(encoding="utf-8").replace(last, f"{last}          - {target.name}\n")
    site.write_text(listed, encoding="utf-8")
    rules = ROOT / "pyproject.toml"  # where ruff is told which modules nbdev writes
    first = '    "guidance_nb/_modidx.py",\n'
    rules.write_text(rules.read_text(encoding="utf-8").replace(first, f'{first}    "guidance_nb/{name}.py",\n'))
    return f"""Wrote nbs/{target.name} and listed it in _quarto.yml and pyproject.toml. Now:
1. make lab, and replace what the page says and does; make export; make notebooks ARGS=nbs/{target.name}
2. two lines of tests/test_guidance_contract.py hold the method to the contract:
from guidance_nb.{name} import {class_name}
    "{title}": case({class_name}),
3. make test ARGS="-k '{name} or ({" and ".join(name.split("_"))})'", then make test"""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="of the module, such as my_idea")
    parser.add_argument("number", type=int, help="of the page, above all pages it imports")
    sys.stdout.write(begin(**vars(parser.parse_args())) + "\n")
