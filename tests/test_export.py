"The package is what the notebooks export, byte for byte, and the notebooks are stored clean."

import copy
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from execnb.nbio import nb2str
from nbdev.clean import clean_nb

from notebooks import NOTEBOOKS, ROOT


def files(package: Path) -> dict[str, bytes]:
    byhand = {"__pycache__", "recipe_files", "launch_files"}  # written by hand and shipped as they are
    paths = [path for path in package.rglob("*") if path.is_file() and not byhand & set(path.parts)]
    return {path.relative_to(package).as_posix(): path.read_bytes() for path in paths}


def test_package_is_the_export(tmp_path):
    shutil.copy(ROOT / "settings.ini", tmp_path)
    shutil.copytree(ROOT / "nbs", tmp_path / "nbs")
    # nbdev exports nothing, silently, where IN_TEST is set.
    env = {name: value for name, value in os.environ.items() if name != "IN_TEST"}
    command = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True)
    fresh, ours = files(tmp_path / "guidance_nb"), files(ROOT / "guidance_nb")
    assert sorted(ours) == sorted(fresh), "run make export, and delete modules that lost their notebook"
    assert [name for name in fresh if fresh[name] != ours[name]] == [], "run make export"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_clean(path):
    stored = path.read_text(encoding="utf-8")
    notebook = json.loads(stored)
    cleaned = copy.deepcopy(notebook)
    clean_nb(cleaned)
    assert nb2str(cleaned) == stored, "run nbdev_clean"

    cells = notebook["cells"]
    ids = [cell["id"] for cell in cells]
    assert len(set(ids)) == len(ids), "cell ids are part of the generated code, so they are unique"
    assert all(isinstance(cell["source"], list) for cell in cells), "sources are lists of lines"
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output["output_type"] == "error"], "an error is stored"
    assert not [output for output in outputs if output.get("name") == "stderr"], "a warning is stored"
    words = re.sub(r'"image/png": "[^"]*"', "", stored)
    assert not re.search(r"/(home|root|tmp|Users)/", words), "a path of somebody's machine is stored"
