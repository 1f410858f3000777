"What users install: a wheel with the package alone and run-time requirements alone."

import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from email.parser import Parser

from notebooks import ROOT

config = ConfigParser(delimiters=["="])
config.read(ROOT / "settings.ini", encoding="utf-8")
SETTINGS = config["DEFAULT"]


def test_wheel_is_the_package_alone(tmp_path):
    "Built from an sdist of a clean copy, so the sdist holds all it needs."
    copy = tmp_path / "copy"
    built = shutil.ignore_patterns(".*", "__pycache__", "_proc", "_docs", "build", "dist", "*.egg-info")
    shutil.copytree(ROOT, copy, ignore=built)
    command = [sys.executable, "-m", "build", "--no-isolation"]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    with zipfile.ZipFile(next((copy / "dist").glob("*.whl"))) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
        info = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = Parser().parsestr(wheel.read(info).decode())
        entry_points = wheel.read(info.replace("METADATA", "entry_points.txt")).decode()
    kinds = ("*.py", "recipe_files/*.toml", "recipe_files/finetune/*.toml", "launch_files/*.yaml")
    ours = [path for kind in kinds for path in (ROOT / "guidance_nb").glob(kind)]
    assert names == {path.relative_to(ROOT).as_posix() for path in ours}
    assert (metadata["Name"], metadata["Version"]) == (SETTINGS["lib_name"], SETTINGS["version"])
    assert metadata["Requires-Python"] == f">={SETTINGS['min_python']}"
    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"
    assert "guidance-nb = guidance_nb.cli.app:main" in entry_points
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert len(required) == len(SETTINGS["requirements"].split())
    assert [line for line in required if re.match("nbdev|fastcore|execnb", line)] == []


def test_versions_agree():
    version = SETTINGS["version"]
    assert f'__version__ = "{version}"' in (ROOT / "guidance_nb" / "__init__.py").read_text()
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_and_torchvision_are_a_pair():
    "Builds from different places import alone but miss each other's operators."
    code = "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    subprocess.run([sys.executable, "-c", code], check=True)
