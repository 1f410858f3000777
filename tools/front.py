"""Draw the figure of the front page, nbs/images/scales.png: `python tools/front.py`.

One class of the exact 2-D fractal at four scales, no network anywhere, and what each scale keeps and costs. The same
numbers and picture on every run; tests/test_readme.py compares.
"""

import io
import sys
from pathlib import Path
from typing import NamedTuple

import torch

from notebooks import ROOT

TARGET = ROOT / "nbs" / "images" / "scales.png"
SCALES = {0.0: "unconditional", 1.0: "conditional", 2.0: "guided", 4.0: "guided"}  # scale -> colour of its role
TITLES = {0.0: "γ = 0: no condition", 1.0: "γ = 1: no guidance", 2.0: "γ = 2", 4.0: "γ = 4"}


class Panel(NamedTuple):
    "The samples of one scale and what is written below them."

    x: torch.Tensor  # Samples, `[n, 2]`
    right: float  # Share of the class that was asked for
    coverage: float  # Share of real points with a sample nearby
    outliers: float  # Share of samples off the data
    nfe: int  # Network evaluations that a model costs at each time


def panels(n: int = 800) -> dict[float, Panel]:
    "Samples at every scale from the same noise, measured against the exact density."
    import guidance_nb as gnb
    from guidance_nb.metrics import class_accuracy, coverage, outlier_rate, outlier_threshold
    from guidance_nb.mixtures import log_posterior, sample_mixture

    tree, label, made = gnb.fractal(), torch.zeros(n, dtype=torch.long), {}
    model, bar = gnb.ExactDenoiser(tree, gnb.FlowPath()), outlier_threshold(tree)
    real, _ = sample_mixture(tree, label, torch.Generator().manual_seed(1))
    for scale in SCALES:
        guided = gnb.ClassifierFreeGuidance(model, scale)
        x = gnb.sample(guided, label, (2,), "heun", 32, progress=False)
        off = outlier_rate(x, log_posterior(tree, x).argmax(1), tree, bar)
        share = class_accuracy(x, label, tree)
        made[scale] = Panel(x, share, coverage(real, x, label, label), off, 1 if scale in (0, 1) else 2)
    return made


def draw(file: Path = TARGET) -> None:
    "Write the figure."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    from guidance_nb.mixtures import fractal
    from guidance_nb.plots import COLOURS, show_density

    fig, axes = plt.subplots(1, 4, figsize=(8.6, 3.1), layout="constrained")
    for ax, (scale, panel) in zip(axes, panels().items()):
        show_density(fractal(), ax=ax)
        ax.scatter(*panel.x.T, s=2.2, color=COLOURS[SCALES[scale]], linewidths=0)
        ax.set(xlim=(-1.95, 1.95), ylim=(-1.95, 1.95), aspect="equal")
        ax.axis("off")
        ax.set_title(TITLES[scale], fontsize=11)
        words = f"right class {panel.right:.0%}\nvariety {panel.coverage:.0%}\n"
        words += f"off the data {panel.outliers:.0%}\nNFE {panel.nfe} at each time"
        ax.text(0.5, -0.02, words, transform=ax.transAxes, ha="center", va="top", fontsize=9, linespacing=1.35)
    whole = io.BytesIO()
    fig.savefig(whole, dpi=100, metadata={"Software": None})
    Image.open(whole).convert("RGB").quantize(128, dither=Image.Dither.NONE).save(file, optimize=True)  # half the size


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    draw()
