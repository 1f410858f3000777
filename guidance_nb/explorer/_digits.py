"""The page of digits: trained networks of the package sample in the reader's browser."""

import gzip
import json
from base64 import b64encode
from importlib.abc import Traversable
from importlib.resources import files
from pathlib import Path

from guidance_nb._files import Json, write_file
from guidance_nb.explorer._assets import asset, embed, program
from guidance_nb.plots import METHOD_LABELS

_FALLBACK = """Here stands a page to play with: nine digits from a trained network, and sliders that guide it. It needs
JavaScript."""


def methods() -> dict[str, Json]:
    """The methods by their names on the page.

    Each has a label, its models, range and name of the scale, steps after sampling, what is shown, and lines in Python.
    """
    found: dict[str, Json] = json.loads(asset("digits.json"))
    return {name: method | {"label": METHOD_LABELS[method["label"]]} for name, method in found.items()}


def _model(name: str) -> Traversable:
    return files("guidance_nb") / "models" / name


def digits_page(folder: str | Path | None = None) -> str:
    """The page of digits as HTML, to be put into a page beside `digits/`; a `folder` gets the weights and the page.

    Serve the folder to open it alone: `python -m http.server --directory digits`.
    """
    names = sorted({name for method in methods().values() for name in method["models"]})
    cards = {name: json.loads((_model(name) / "checkpoint.json").read_text(encoding="utf-8")) for name in names}
    page = {
        "folder": "digits/",
        "models": {name: card["files"]["ema.safetensors"] for name, card in cards.items()},  # size and digest
        "methods": methods(),
        "css": (asset("page.css") + asset("digits.css")).decode(),
        "html": asset("digits.html").decode(),
        "still": b64encode(asset("digits.png")).decode(),
        "alt": "Nine handwritten threes, by classifier-free guidance at scale 3",
        "kernels": [b64encode(asset(f"{name}.wasm")).decode() for name in ("kernels", "kernels_plain")],
        "worker": program("network", "gradient", "noise", "digits_worker"),
    }
    script = program("parts", "digits")
    if folder is not None:
        for name in names:
            packed = gzip.compress((_model(name) / "ema.safetensors").read_bytes(), 9, mtime=0)
            write_file(Path(folder) / f"{name}.bin", packed)
        head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Digits in your browser</title>'
        view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        alone = embed("digits", _FALLBACK, page | {"folder": ""}, script)
        write_file(Path(folder) / "index.html", f"{head}{view}<body>{alone}")
    return embed("digits", _FALLBACK, page, script)
