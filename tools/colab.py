"""Put "Open in Colab" below the title of every notebook that can run there: `python tools/colab.py`.

A link that says what the notebook needs, and a cell that on Colab alone fetches the project and installs the package;
the paths in a notebook then lead where they lead here. A second run changes nothing.
"""

import hashlib
import json
from pathlib import Path

from notebooks import NOTEBOOKS, cells, is_skipped, settings, store, text

LINK = "[Open in Colab]("
WITHOUT = {"index", "92_api"}  # the README, and a list: there is nothing to run

SLOW = "No GPU is needed; cells marked `slow` take a while."
NEEDS = {
    "33_image_metrics": (
        "The two cells marked `slow` read CIFAR-10 and the weights of two classifiers from the folder "
        "`GUIDANCE_NB_DATA`, which Colab does not have: skip them there."
    ),
    "32_image_data": "No GPU is needed; the cell marked `slow` downloads MNIST and CIFAR-10.",
    "21_editing": "No GPU is needed; cells marked `slow` download MNIST.",
    "39_inversion": "No GPU is needed; cells marked `slow` download MNIST.",
    "22_mnist": "It plots committed rows, so neither data nor a GPU is needed.",
    "23_cifar10": "It plots committed rows, so neither data nor a GPU is needed.",
    "34_latents": "No GPU is needed; the later cells marked `slow` download MNIST and train on it.",
    "36_stable_diffusion": "Its pipeline is tiny and random: no weights are downloaded. Cells marked `slow` train it.",
    "26_which_guidance": "The cell marked `slow` finds its rows committed, so neither data nor a GPU is needed.",
}

INSTALL = """#| hide
if "google.colab" in str(get_ipython()):  # there alone: project and package
    url = "{git_url}"
    folder = "{folder}"
    shell = get_ipython()
    shell.system(f"git clone --quiet --depth 1 {{url}} {{folder}}")
    shell.run_line_magic("pip", f'install --quiet "{{folder}}[all]" fastcore')
    shell.run_line_magic("cd", f"-q {{folder}}/nbs")"""


def link(path: Path) -> str:
    "The line below the title."
    where = settings()
    site = f"https://colab.research.google.com/github/{where['user']}/{where['repo']}/blob/{where['branch']}"
    flagged = any(is_skipped(text(cell["source"])) for cell in cells(path) if cell["cell_type"] == "code")
    needs = NEEDS.get(path.stem, SLOW if flagged else "")
    return f"{LINK}{site}/nbs/{path.name})" + (f". {needs}" if needs else "")


def install() -> str:
    "The cell that installs the package on Colab, the same in every notebook."
    where = settings()
    return INSTALL.format(git_url=where["git_url"], folder=f"/content/{where['repo']}")


def with_colab(path: Path) -> dict:
    "A notebook with the two cells in second and third place."
    notebook = json.loads(path.read_text(encoding="utf-8"))
    rest, ids = notebook["cells"][1:], {}
    while rest and (text(rest[0]["source"]).startswith(LINK) or "google.colab" in text(rest[0]["source"])):
        ids[rest[0]["cell_type"]] = rest[0]["id"]
        rest = rest[1:]
    for kind, source in (("code", install()), ("markdown", link(path))):
        cell = {"cell_type": kind, "metadata": {}, "source": source.splitlines(keepends=True)}
        cell["id"] = ids.get(kind) or hashlib.sha256(f"{path.stem} {kind} Colab".encode()).hexdigest()[:8]
        cell |= {"execution_count": None, "outputs": []} if kind == "code" else {}
        rest = [cell, *rest]
    return notebook | {"cells": [notebook["cells"][0], *rest]}


if __name__ == "__main__":
    for path in NOTEBOOKS:
        if path.stem not in WITHOUT:
            store(with_colab(path), path)
