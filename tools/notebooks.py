"What every tool and test needs to know about the notebooks: where they are, and how to read one without changing it."

import json
import re
from configparser import ConfigParser
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


def settings() -> dict[str, str]:
    "The entries of settings.ini."
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(config["DEFAULT"])


def cells(path: Path) -> list[dict]:
    "The cells of a notebook, as stored."
    return json.loads(path.read_text(encoding="utf-8"))["cells"]


def text(value: str | list[str]) -> str:
    "A source or an output, which notebooks store as lists of lines."
    return value if isinstance(value, str) else "".join(value)


def directives(source: str) -> dict[str, str]:
    "The `#| name: value` lines of a cell; the value is empty for `#| name`."
    found = re.findall(r"^#\|[ \t]*(\w[\w-]*):?[ \t]*(.*)$", source, re.MULTILINE)
    return {name: value.strip() for name, value in found}


def module_of(path: Path) -> str:
    "The module that a notebook exports, or nothing."
    sources = (text(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code")
    return next((directives(source)["default_exp"] for source in sources if "default_exp" in directives(source)), "")


def store(notebook: dict, path: Path) -> None:
    "Write a notebook as nbdev does."
    path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def is_skipped(source: str) -> bool:
    "Whether neither the tests nor a refresh run this cell; the flags are `tst_flags` of settings.ini."
    flags = directives(source)
    return bool({"slow", "cuda"} & set(flags)) or flags.get("eval", "").lower() == "false"
