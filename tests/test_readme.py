"The picture and the citation of README.md are what the package gives."

import re
from configparser import ConfigParser

import matplotlib.image
import numpy as np
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


def test_front_figure_is_the_committed_one_and_shows_what_the_text_says(tmp_path, monkeypatch):
    "From 0 to 1 guidance buys the class; beyond, variety and accuracy fall and the price of a step doubles."
    panels = front.panels()
    none, one, two, four = (panels[scale] for scale in (0.0, 1.0, 2.0, 4.0))
    assert 0.45 < none.right < 0.55 and min(one.right, two.right, four.right) > 0.99
    assert one.coverage > two.coverage + 0.05 > four.coverage + 0.1
    assert one.outliers < two.outliers < four.outliers
    assert [panel.nfe for panel in (none, one, two, four)] == [1, 1, 2, 2]
    monkeypatch.setattr(front, "panels", lambda: panels)
    front.draw(tmp_path / "scales.png")
    fresh, ours = (matplotlib.image.imread(file)[..., :3] for file in (tmp_path / "scales.png", front.TARGET))
    assert fresh.shape == ours.shape
    assert np.abs(fresh - ours).mean() < 0.003  # another seed gives 0.006; letters may be drawn a little differently
    assert front.TARGET.stat().st_size < 60_000
