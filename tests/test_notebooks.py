"Every notebook runs and gives the outputs that are stored: one test each, in a process of its own."

import base64
import io
import json
import re

import numpy as np
import pytest
from PIL import Image, ImageDraw

from fresh import stale
from notebooks import NOTEBOOKS, cells, is_skipped, text
from refresh import refresh_apart

LIMIT = 60  # seconds of processor time, so that a busy machine fails nothing


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_is_fresh(path):
    "The outputs on the site are the stored ones; make notebooks stores them anew. Nothing is executed twice."
    assert refresh_apart(path, check=True, limit=LIMIT) == ""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_that_are_not_run_keep_their_outputs(path):
    "A slow cell that shows or prints something was run once, and what it gave is stored."
    silent = []
    for number, cell in enumerate(cells(path), 1):
        source = text(cell["source"])
        speaks = re.search(r"^(    )*(print\(|plt\.show\()", source, re.MULTILINE)
        if cell["cell_type"] == "code" and is_skipped(source) and speaks and not cell["outputs"]:
            silent.append(f"cell #{number}")
    assert silent == [], "run make notebooks with --flagged"


def printed(words: str, source: str = "") -> list[dict]:
    "A notebook of one cell that printed a text."
    output = {"output_type": "stream", "name": "stdout", "text": words.splitlines(keepends=True)}
    return [{"cell_type": "code", "source": [source], "outputs": [output]}]


@pytest.mark.parametrize(
    ("stored", "fresh", "same"),
    [
        ("loss 0.497, 1,200 steps", "loss 0.498, 1,200 steps", True),  # a unit of the last place
        ("loss 0.497", "loss 0.529", False),
        ("a   0.5\nb  10.5", "a  0.5\nb 10.5", True),  # columns as wide as their numbers
        ("69,250 weights", "69,251 weights", False),  # what was counted is exact
        ("differ by 3.1e-07", "differ by 4.8e-08", True),  # rounding errors
        ("differ by 3.1e-07", "differ by 3.1e-03", False),
        ("-0.0000", "0.0000", True),
        ("shift 0.10", "shift -0.10", False),
        ("one", "two", False),
        ("one", "one\ntwo", False),
    ],
)
def test_stale_text_is_found(stored, fresh, same):
    assert (stale(printed(stored), printed(fresh)) == []) == same


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("assert 1 + 1 == 3", "AssertionError"),
        ("import os\nos._exit(3)", "ended without an answer"),
        ("while True: pass", "more than 1 s of processor time"),
        ("import warnings\nwarnings.warn('careful')", "wrote to stderr"),
        ("1 + 1", "0 outputs are now 1"),
        ("x = 1", ""),
    ],
)
def test_pages_that_fail_are_found(tmp_path, source, problem):
    cell = {"cell_type": "code", "execution_count": None, "id": "a", "metadata": {}, "outputs": [], "source": [source]}
    path = tmp_path / "page.ipynb"
    path.write_text(json.dumps({"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    found = refresh_apart(path, check=True, limit=1)
    assert problem in found and bool(problem) == bool(found)


def test_stale_numbers_of_interactive_pages_are_found():
    "They are float32 in base64, whose letters say nothing about how far apart two numbers are."
    values = np.linspace(0, 1, 60, dtype="<f4")
    page, near, far = (
        printed(f"<script>const numbers = '{base64.b64encode(part.astype('<f4').tobytes()).decode()}'</script>")
        for part in (values, values * (1 + 1e-6), values * 1.1)
    )
    assert page != near and stale(page, near) == []
    assert len(stale(page, far)) == len(stale(page, printed("<script></script>"))) == 1


def drawn(
    height: int = 60, colour: str = "green", size: tuple[int, int] = (500, 280), sharpness: int = 1
) -> list[dict]:
    "A notebook of one cell that drew a curve in a frame."
    image = Image.new("RGB", size, "white")
    draw, file = ImageDraw.Draw(image), io.BytesIO()
    draw.rectangle((40, 10, 480, 240), outline="black")
    draw.line((40, 240, 200, 240 - height, 480, 240 - height), fill=colour, width=2)
    image.resize((size[0] * sharpness, size[1] * sharpness)).save(file, "PNG")
    output = {"output_type": "display_data", "data": {"image/png": base64.b64encode(file.getvalue()).decode()}}
    return [{"cell_type": "code", "source": ["plt.show()"], "outputs": [output]}]


def test_stale_figures_are_found():
    "A curve may neither change its height or colour nor disappear; other edges of its pixels are no matter."
    assert stale(drawn(), drawn(colour="#108810")) == []
    assert stale(drawn(), drawn(sharpness=2)) == []
    for other in (drawn(100), drawn(colour="red"), drawn(colour="white"), drawn(size=(500, 320)), printed("none")):
        assert len(stale(drawn(), other)) == 1


def test_cells_that_are_not_run_are_not_compared():
    assert stale(printed("0.1", "#| slow"), printed("0.2", "#| slow")) == []
    assert len(stale(printed("0.12"), printed("0.15"))) == 1


def test_number_of_outputs_is_compared():
    "An output that went away is stale, too."
    path = next(path for path in NOTEBOOKS if path.stem == "00_paths")
    stored = cells(path)
    emptied = [cell | {"outputs": []} if "outputs" in cell else cell for cell in stored]
    assert stale(stored, stored) == []
    assert len(stale(stored, emptied)) == sum(bool(cell.get("outputs")) for cell in stored) > 0
