"""What executing a notebook gave, against what is stored: the same text to the printed precision, the same figures.

Another machine rounds other sums, and a training run carries that on. So numbers may differ by a unit of their last
printed place and a little more, and figures by what little that moves. Whole numbers, words and layout may not.
"""

import base64
import io
import re

import numpy as np
from PIL import Image

from notebooks import is_skipped, text

BLOB = r"[A-Za-z0-9+/]{64,}={0,2}"  # an interactive page carries its numbers as float32 in base64
NUMBER = r"(?<![\w.])[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]?\d+)?(?!\w)"
DRIFT = 0.01  # the share of a number by which another machine may move it
ROUNDING = 1e-5  # numbers below, with an exponent, are rounding errors: as small, or not
SQUARE = 8  # figures are compared in squares of so many pixels
SHADE, SHARE = 8, 0.015  # this share of the squares may differ by more than so many grey levels of 255


def last_place(number: str) -> float:
    "A unit of the last printed place; nothing for whole numbers."
    mantissa, _, exponent = number.partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 10.0 ** (int(exponent or 0) - decimals) if decimals or exponent else 0.0


def same_number(stored: str, fresh: str) -> bool:
    "Whether two printed numbers may be the same one, of two machines."
    one, two = (float(number.replace(",", "")) for number in (stored, fresh))
    if "e-" in stored and "e-" in fresh and max(abs(one), abs(two)) < ROUNDING:
        return True
    unit = max(last_place(stored), last_place(fresh))
    return abs(one - two) <= (1.001 * unit + DRIFT * max(abs(one), abs(two)) if unit else 0.0)


def same_blob(stored: str, fresh: str) -> bool:
    "Whether two runs of base64 hold the same float32 values, to what another machine may move."
    try:
        one, two = (np.frombuffer(base64.b64decode(blob), "<f4") for blob in (stored, fresh))
    except ValueError:
        return stored == fresh
    return stored == fresh or (one.shape == two.shape and np.allclose(one, two, DRIFT, ROUNDING))


def text_difference(stored: str, fresh: str) -> str:
    "The first line in which two texts differ beyond that, or nothing. Numbers change widths, so blanks do not count."
    blobs = [re.findall(BLOB, whole) for whole in (stored, fresh)]
    if len(blobs[0]) != len(blobs[1]) or not all(map(same_blob, *blobs)):
        return "the numbers of the page are others now"
    stored, fresh = (re.sub(BLOB, "~", whole) for whole in (stored, fresh))
    pairs = [(line.split(), other.split()) for line, other in zip(stored.splitlines(), fresh.splitlines())]
    for line, other in pairs:
        line, other = " ".join(line), " ".join(other)
        same = re.sub(NUMBER, "#", line) == re.sub(NUMBER, "#", other)
        if not same or not all(map(same_number, re.findall(NUMBER, line), re.findall(NUMBER, other))):
            return f"{line!r} is now {other!r}"
    if len(stored.splitlines()) != len(fresh.splitlines()):
        return f"{len(stored.splitlines())} lines are now {len(fresh.splitlines())}"
    return ""


def squares(png: str) -> np.ndarray:
    "A figure as the mean grey levels of its squares, `[rows, columns, 3]`."
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    size = [max(1, round(edge / SQUARE)) for edge in image.size]
    return np.asarray(image.resize((size[0], size[1]), Image.Resampling.BOX), dtype=float)


def figure_difference(stored: str, fresh: str) -> str:
    "How two figures differ, or nothing. One with half the dots to the inch waits for its next refresh."
    one, two = squares(stored), squares(fresh)
    if one.shape[1] < 0.6 * two.shape[1] and abs(one.shape[0] / one.shape[1] - two.shape[0] / two.shape[1]) < 0.05:
        return ""
    if max(abs(a - b) for a, b in zip(one.shape, two.shape)) > 1:
        return f"the figure has another shape, {one.shape} then and {two.shape} now"
    rows, columns = min(len(one), len(two)), min(one.shape[1], two.shape[1])
    gap = np.abs(one[:rows, :columns] - two[:rows, :columns]).mean(2)
    share = (gap > SHADE).mean()
    return f"{share:.1%} of the figure is not what it was" if share > SHARE else ""


def output_difference(stored: dict, fresh: dict) -> str:
    "How two outputs of a cell differ, or nothing."
    one, two = ({"text": out["text"]} if "text" in out else out["data"] for out in (stored, fresh))
    if set(one) != set(two):
        return f"the kinds of the output, {sorted(one)}, are now {sorted(two)}"
    found = []
    for kind in one:
        compare = figure_difference if kind == "image/png" else text_difference
        found.append(compare(text(one[kind]), text(two[kind])))
    return next(filter(None, found), "")


def stale(stored: list[dict], fresh: list[dict], flagged: bool = False) -> list[str]:
    "Where the outputs of executed cells are not those that are stored, a line each."
    found = []
    for number, (cell, now) in enumerate(zip(stored, fresh), 1):
        if cell["cell_type"] != "code" or (is_skipped(text(cell["source"])) and not flagged):
            continue
        if len(cell["outputs"]) != len(now["outputs"]):
            found.append(f"cell #{number}: {len(cell['outputs'])} outputs are now {len(now['outputs'])}")
            continue
        pairs = zip(cell["outputs"], now["outputs"])
        difference = next(filter(None, (output_difference(*pair) for pair in pairs)), "")
        found += [f"cell #{number}: {difference}"] if difference else []
    return found
