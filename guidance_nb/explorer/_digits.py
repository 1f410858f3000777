"""The page of digits: trained networks of the package sample in the reader's browser."""

import base64
import gzip
import json
from importlib.abc import Traversable
from importlib.resources import files
from pathlib import Path

from guidance_nb._files import write_file
from guidance_nb.plots import METHOD_LABELS

_PROGRAM = ("parts", "digits")  # of the page; that of its worker follows
_WORKER = ("network", "gradient", "noise", "digits_worker")
_CFG, _ALIGNED, _AWARE, _POST = "mnist-cfg", "mnist-aligned-anchored", "mnist-mg-aware", "mnist-post"
_CLASSIFIER = "mnist-classifier"
_SAMPLE = """import torch, guidance_nb as gnb
c = torch.full((9,), {digit})
%s
x = gnb.sample(model, c, (1, 28, 28), "dpmpp_2m", {steps}, seed={seed})"""
_GUIDED = 'model = gnb.ClassifierFreeGuidance(gnb.load("%s"), {scale})'
_FALLBACK = """Here stands a page to play with: nine digits from a trained network, and sliders that guide it. It needs
JavaScript."""
_PAIR = "e_c and e_u are the noise that the network predicts with and without the digit."

# name on the page -> label, models, range and name of the scale, steps after sampling, what is shown, lines in Python
_METHODS: dict[str, tuple[str, list[str], tuple[float, float], str, int, str, str]] = {
    "cfg": ("classifier_free_guidance", [_CFG], (0, 8), "guidance scale", 0, _PAIR, _SAMPLE % (_GUIDED % _CFG)),
    "classifier": (
        "classifier_guidance",
        [_CFG, _CLASSIFIER],
        (0, 8),
        "guidance scale",
        0,
        "e_u is the noise that the network predicts without the digit; e_c adds the gradient of the classifier.",
        _SAMPLE % f'model = gnb.ClassifierGuidance(gnb.load("{_CFG}"), gnb.load("{_CLASSIFIER}"), {{scale}})',
    ),
    "aware": (
        "model_guidance",
        [_AWARE],
        (1, 4),
        "guidance scale, an input of the network",
        0,
        f"{_PAIR} Here e_c is that of scale 1.",
        _SAMPLE % f'model = gnb.FixedScale(gnb.load("{_AWARE}"), {{scale}})',
    ),
    "aligned": (
        "aligned_loss",
        [_ALIGNED],
        (0, 8),
        "sampling scale s; trained with 2, so the true scale is s / 2",
        0,
        _PAIR,
        _SAMPLE % (_GUIDED % _ALIGNED),
    ),
    "post": (
        "flow_postprocessing",
        [_CFG, _POST],
        (0, 8),
        "guidance scale before the correction, which knows 1, 2 and 3",
        8,
        f"{_PAIR} The correction follows at t = 0.",
        _SAMPLE % (_GUIDED % _CFG) + f'\nx = gnb.load("{_POST}")(x, c, steps=8)',
    ),
}


def _asset(name: str) -> bytes:
    "A file beside this module."
    return (files(__package__) / name).read_bytes()


def _texts(*names: str) -> str:
    return "\n".join(_asset(f"{name}.js").decode() for name in names)


def _weights(name: str) -> Traversable:
    return files("guidance_nb") / "models" / name


def _models() -> dict[str, dict[str, int | str]]:
    "Size and digest of the weights of every model of the page."
    names = sorted({name for method in _METHODS.values() for name in method[1]})
    cards = {name: json.loads((_weights(name) / "checkpoint.json").read_text(encoding="utf-8")) for name in names}
    return {name: card["files"]["ema.safetensors"] for name, card in cards.items()}


def digits_page(folder: str | Path | None = None) -> str:
    """The page of digits as HTML, to be put into a page beside `digits/`; a `folder` gets the weights and the page.

    Serve the folder to open it alone: `python -m http.server --directory digits`.
    """
    models = _models()
    keys = ("label", "models", "range", "scale", "extra", "pair", "python")
    page = {
        "folder": "digits/",
        "models": models,
        "methods": {name: dict(zip(keys, (METHOD_LABELS[label], *rest))) for name, (label, *rest) in _METHODS.items()},
        "css": _asset("page.css").decode() + _asset("digits.css").decode(),
        "html": _asset("digits.html").decode(),
        "still": base64.b64encode(_asset("digits.png")).decode(),
        "alt": "Nine handwritten threes, by classifier-free guidance at scale 3",
        "kernels": [base64.b64encode(_asset(f"{name}.wasm")).decode() for name in ("kernels", "kernels_plain")],
        "worker": _texts(*_WORKER),
    }

    def written(**changes: str) -> str:
        data = json.dumps(page | changes, ensure_ascii=False).replace("</", "<\\/")
        host = f'<div class="guidance-digits"><p>{_FALLBACK}</p></div>'
        return f"{host}\n<script>\n(() => {{\nconst PAGE = {data};\n{_texts(*_PROGRAM)}}})();\n</script>"

    if folder is not None:
        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        for name in models:
            packed = gzip.compress((_weights(name) / "ema.safetensors").read_bytes(), 9, mtime=0)
            write_file(place / f"{name}.bin", packed)
        head = '<!doctype html><html lang="en"><meta charset="utf-8"><title>Digits in your browser</title>'
        view = '<meta name="viewport" content="width=device-width, initial-scale=1">'
        write_file(place / "index.html", f"{head}{view}<body>{written(folder='')}")
    return written()
