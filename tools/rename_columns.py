"""Give the columns of committed results their new names: `python tools/rename_columns.py`; twice is once.

Names and words change, numbers do not: what is written is read again, and every cell that is a number must be the same
text as before, in the same place.
"""

import csv
from pathlib import Path

COLUMNS = {"rows_per_sample": "nfe"}
PARTS = {"_judge": "_evaluation_classifier"}  # ends of names
WORDS = {"--eyes": "--features", "mnist-judge": "mnist-evaluation-classifier", "judge": "evaluation_classifier"}


def new_name(name: str) -> str:
    "The new name of a column."
    name = COLUMNS.get(name, name)
    for old, new in PARTS.items():
        name = name.removesuffix(old) + new if name.endswith(old) else name
    return name


def new_text(cell: str) -> str:
    "The new text of a cell; numbers stay."
    try:
        float(cell)
    except ValueError:
        for old, new in WORDS.items():
            cell = cell.replace(old, new)
    return cell


def read(file: Path) -> list[list[str]]:
    "All lines of a table."
    with file.open(newline="", encoding="utf-8") as stream:
        return list(csv.reader(stream))


def numbers(table: list[list[str]]) -> dict[tuple[int, int], str]:
    "The cells that are numbers, by place."
    found = {}
    for i, row in enumerate(table[1:]):
        for j, cell in enumerate(row):
            try:
                float(cell)
            except ValueError:
                continue
            found[i, j] = cell
    return found


def rename(file: Path) -> bool:
    "Rewrite one table; whether anything was renamed."
    old = read(file)
    new = [[new_name(name) for name in old[0]], *([new_text(cell) for cell in row] for row in old[1:])]
    if new == old:
        return False
    end = "\r\n" if b"\r\n" in file.read_bytes() else "\n"
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, lineterminator=end).writerows(new)
    again = read(file)
    assert again == new and numbers(again) == numbers(old), f"{file}: a number changed"
    assert len(again) == len(old) and all(len(a) == len(b) for a, b in zip(again, old))
    return True


if __name__ == "__main__":
    for file in sorted((Path(__file__).parent.parent / "nbs" / "results").glob("*.csv")):
        print(f"{file.name}: {'renamed, every number as it was' if rename(file) else 'as it should be'}")
