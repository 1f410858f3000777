"""Make nbs/results/toy_samples.npz, which method pages draw: `python tools/toy.py FOLDER`.

Samples of the fractal at a few scales, with the noise of `guidance-nb tour`, seed 0, and its networks, trained longer.
Those that FOLDER does not hold are trained into it, in some minutes. Coordinates are stored as whole numbers of 1/8192.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from notebooks import ROOT

TARGET = ROOT / "nbs" / "results" / "toy_samples.npz"
SCALES = (1.0, 2.0, 4.0)
STORED = {  # method -> scales
    "exact": (0.5, *SCALES),  # the exact solution of the aligned loss is CFG at half the scale
    "classifier_guidance": SCALES,
    "classifier_free_guidance": SCALES,
    "aligned_loss": SCALES,
    "model_guidance": SCALES,
}


def main() -> None:
    from guidance_nb.cli._tour import Stage, budget_for, run_stage, sample_method
    from guidance_nb.comparison import load_problem

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for the networks")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    budget = replace(budget_for("fractal"), train_steps=4000, batch=1024, lr=3e-3, ema=0.998)
    problem, saved = load_problem("fractal"), {}
    for method, scales in STORED.items():
        stage = Stage("fractal", 0, "sample", method, scales, budget)
        for need in stage.needs:
            if not (folder / need.file).exists():
                run_stage(need, folder)
        tensors = sample_method(stage, problem, folder)[0]
        for scale in scales:
            x = tensors[f"x {scale:g} {budget.steps}"]
            saved[f"{method} {scale:g}"] = (x * 8192).round().short().numpy()
    np.savez_compressed(TARGET, **saved)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
