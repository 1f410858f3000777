"The picture and the citation of README.md are what the package gives."

import re
from configparser import ConfigParser

import matplotlib.image
import numpy as np
import torch
import yaml

import front
from notebooks import ROOT
from readme import TARGET


def test_links_in_tables_that_cells_print_lead_from_the_root():
    row = next(
        line for line in TARGET.read_text(encoding="utf-8").splitlines() if line.startswith("| [Model-guidance]")
    )
    assert "](nbs/13_model_guidance.ipynb)" in row


def test_citations_agree_on_the_version():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    bibtex = dict(re.findall(r"^  (\w+) += \{(.*)\},?$", TARGET.read_text(encoding="utf-8"), re.MULTILINE))
    assert str(citation["version"]) == bibtex["version"] == config["DEFAULT"]["version"]
    assert citation["repository-code"] == bibtex["url"] == config["DEFAULT"]["git_url"]


def test_front_figure_is_the_committed_one(tmp_path):
    front.draw(tmp_path / "digits.png")
    fresh, ours = (matplotlib.image.imread(file)[..., :3] for file in (tmp_path / "digits.png", front.TARGET))
    assert fresh.shape == ours.shape
    assert np.abs(fresh - ours).mean() < 0.01  # another seed gives 0.1
    assert front.TARGET.stat().st_size < 60_000


def test_front_figure_shows_what_the_text_says():
    "At scale 0 the class is ignored, and guidance raises class agreement and lowers diversity."
    import guidance_nb as gnb

    digits, reader, made = torch.arange(100) % 10, gnb.load("mnist-evaluation"), front.samples(100)
    right = {scale: (reader(x, 0.0).argmax(1) == digits).float().mean().item() for scale, x in made.items()}
    spread = {scale: torch.stack([x[digits == k].std(0).mean() for k in range(10)]).mean() for scale, x in made.items()}
    assert right[0.0] < 0.3 and right[1.0] <= right[2.0] and right[2.0] > 0.95
    assert spread[1.0] > spread[2.0] > spread[4.0]
