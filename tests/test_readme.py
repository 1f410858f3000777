"README.md is what nbs/index.ipynb says."

import re

from notebooks import ROOT
from readme import SOURCE, TARGET, readme


def test_readme_is_up_to_date():
    assert TARGET.read_text(encoding="utf-8") == readme(), f"run make export after editing {SOURCE.name}"


def test_files_the_readme_shows_exist():
    targets = re.findall(r"\]\(([^()\s#]+)", TARGET.read_text(encoding="utf-8"))
    assert [name for name in targets if not re.match(r"[a-z]+:", name) and not (ROOT / name).exists()] == []
