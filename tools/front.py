"""Draw the figure of the front page, nbs/images/digits.png: `python tools/front.py`.

Ten digits by the model that comes with the package, at four guidance scales, from the same noise. The same picture on
every run; tests/test_readme.py compares.
"""

import io
import sys
from pathlib import Path

import torch

from notebooks import ROOT

TARGET = ROOT / "nbs" / "images" / "digits.png"
SCALES = (0.0, 1.0, 2.0, 4.0)


def samples(n: int = 10) -> dict[float, torch.Tensor]:
    "Images by guidance scale, the digits in turn."
    import guidance_nb as gnb

    model, digits, made = gnb.load("mnist-cfg"), torch.arange(n) % 10, {}
    for scale in SCALES:
        guided = gnb.ClassifierFreeGuidance(model, scale)
        made[scale] = gnb.sample(guided, digits, (1, 28, 28), "dpmpp_2m", 20, seed=1, progress=False)
    return made


def draw(file: Path = TARGET) -> None:
    "Write the figure."
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt
    from PIL import Image

    from guidance_nb.plots import show_digits

    show_digits({f"γ = {scale:g}": images for scale, images in samples().items()})
    whole = io.BytesIO()
    plt.savefig(whole, dpi=150, metadata={"Software": None})
    Image.open(whole).convert("RGB").quantize(32, dither=Image.Dither.NONE).save(file, optimize=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    draw()
