"The site's pages are well formed; tools/pages.py says what that means."

import subprocess
import sys

import pytest

from notebooks import ROOT


def test_pages_are_well_formed():
    pytest.importorskip("pypandoc", reason="pypandoc_binary is not installed, so no page was checked")
    run = subprocess.run([sys.executable, "tools/pages.py"], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
