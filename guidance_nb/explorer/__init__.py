"""Guidance in your hands: exact samples of five methods over the exact density, moved by sliders.

`explorer_page` writes a page for a browser, whose program, form and style are the .js, .html and .css files beside this
module; `explore` shows the same in Jupyter, with a model of your own if you like.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from guidance_nb._checks import check_kind, require
from guidance_nb._files import Json
from guidance_nb.denoisers import Denoiser
from guidance_nb.explorer._assets import asset, embed, program
from guidance_nb.explorer._digits import digits_page
from guidance_nb.explorer._live import LiveView
from guidance_nb.explorer._scenes import CONTROLS, METHOD_CONTROLS, Scene, Solver, settings_of
from guidance_nb.mixtures import checkerboard, fractal, gaussian_pair
from guidance_nb.plots import COLOURS, METHOD_LABELS

__all__ = ["Scene", "digits_page", "explore"]

if TYPE_CHECKING:
    from ipywidgets import Box

_PROGRAM = ("parts", "mixture", "guidance", "sampling", "numbers", "picture", "report", "page")

_DARK_COLOURS = {
    "classifier_guidance": "#FF9454",
    "classifier_free_guidance": "#56B4F9",
    "aligned_loss": "#2FD3A5",
    "model_guidance": "#F0A3D0",
    "flow_postprocessing": "#F5C04A",
}

_FALLBACK = """Here stands a page to play with: sliders for the guidance of five methods, over exact densities. It needs
JavaScript; the figures and numbers further down show a part of it without."""

_CHECKED: list[tuple[str, Solver, int, dict[str, float]]] = [
    ("classifier_free_guidance", "heun", 32, {"scale": 3}),
    ("classifier_free_guidance", "euler", 16, {"scale": 5.5, "first": 0.2, "last": 0.6}),
    ("classifier_guidance", "heun", 16, {"scale": 2, "sharpness": 2.5}),
    ("aligned_loss", "heun", 16, {"sampling": 3, "training": 1.5}),
    ("aligned_loss", "euler", 32, {"sampling": 4, "training": 2, "anchored": 0}),
    ("model_guidance", "heun", 8, {"weight": 0.75}),
    ("flow_postprocessing", "heun", 16, {"scale": 4, "neighbours": 7}),
]


def example_scenes() -> dict[str, Scene]:
    """The three data sets of the page."""
    return {
        "pair": Scene("two Gaussians on a line", gaussian_pair(), 2.6),
        "fractal": Scene("fractal in the plane", fractal(depth=3), 1.8),
        "grid": Scene("two-class grid in the plane", checkerboard(), 2.4),
    }


def _checked_runs(scenes: Mapping[str, Scene]) -> list[Json]:
    "States of the page and where four samples end, for the browser to repeat: every method on every scene."
    runs = []
    for name, scene in scenes.items():
        for i, (method, sampler, steps, own) in enumerate(_CHECKED):
            settings, c = settings_of(method, **own), i % scene.mixture.num_classes
            state = {"scene": name, "c": c, "method": method, "sampler": sampler, "steps": steps, "settings": settings}
            end = scene.run(c, method, settings, sampler, steps).x[:4]
            runs.append({"state": state, "end": end.flatten().tolist()})
    return runs


def explorer_page(scenes: Mapping[str, Scene] | None = None) -> str:
    """The interactive page as HTML without outside parts, to be put into any page; on three example data sets."""
    scenes = scenes or example_scenes()
    page = {
        "scenes": {name: scene.pack() for name, scene in scenes.items()},
        "controls": CONTROLS,
        "methods": METHOD_CONTROLS,
        "labels": {name: METHOD_LABELS[name] for name in METHOD_CONTROLS},
        "colours": {name: [COLOURS[name], _DARK_COLOURS[name]] for name in METHOD_CONTROLS},
        "css": asset("page.css").decode(),
        "html": asset("page.html").decode(),
        "checks": _checked_runs(scenes),
    }
    return embed("explorer", _FALLBACK, page, program(*_PROGRAM))


def explore(scenes: Mapping[str, Scene] | None = None, model: Denoiser | None = None) -> "Box":
    """Live sliders, a box of ipywidgets to be the last line of a cell; `model` takes the place of the exact one."""
    scenes = scenes or example_scenes()
    for name, scene in scenes.items():
        classes = scene.mixture.num_classes
        fine = model is None or check_kind("model", model).num_classes == classes
        require(fine, "classes of model", model and model.num_classes, f"{classes}, as scene {name!r}")
    return LiveView(scenes, model).box
