"What users install: a wheel with the package alone, a core without extras, one line where an extra is missing."

import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser

import pytest

import apart
import guidance_nb
from counts import PACKAGE, modules
from lint import CORE, EXTRAS
from notebooks import ROOT, settings

SETTINGS = settings()


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
    ours = [path for path in PACKAGE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert names == {path.relative_to(ROOT).as_posix() for path in ours}
    assert (metadata["Name"], metadata["Version"]) == (SETTINGS["lib_name"], SETTINGS["version"])
    assert metadata["Requires-Python"] == f">={SETTINGS['min_python']}"
    assert (metadata["License-Expression"] or metadata["License"]) == "Apache-2.0"
    assert "guidance-nb = guidance_nb.cli:_main" in entry_points
    assert set(metadata.get_all("Provides-Extra")) == set(SETTINGS["extras"].split())
    required = [line for line in metadata.get_all("Requires-Dist") if "extra ==" not in line]
    assert {line.split(">")[0] for line in required} == CORE


def test_versions_agree():
    version = SETTINGS["version"]
    assert guidance_nb.__version__ == version
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


def test_torch_and_torchvision_are_a_pair():
    "Builds from different places import alone but miss each other's operators."
    code = "import torch, torchvision; torchvision.ops.nms(torch.zeros(1, 4), torch.zeros(1), 0.5)"
    apart.run([sys.executable, "-c", code], check=True)


CORE_ALONE = f"""
import sys, time
from importlib.machinery import PathFinder
import torch

class Present(PathFinder):  # finds what an environment without any extra has
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in {set(EXTRAS)!r} else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Present
start = time.process_time()
"""


def alone(code: str) -> str:
    "What code prints where the core requirements alone are installed."
    run = subprocess.run([sys.executable, "-c", CORE_ALONE + code], cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return run.stdout


LIGHT = f"""
import importlib
import guidance_nb
wanting = 0
for name in {[*modules()]}:
    try:
        importlib.import_module(f"guidance_nb.{{name}}")
    except ImportError as error:
        assert "pip install 'guidance_nb[" in str(error) and "." in name, (name, error)
        wanting += 1
print(time.process_time() - start)
assert wanting < 20
for name in set(guidance_nb.__all__) - {{"from_diffusers", "load"}}:
    assert getattr(guidance_nb, name) is not None and name in dir(guidance_nb)
"""
MISSING = """
import guidance_nb as gnb
try:
    gnb.digits()
except ImportError as error:
    print(error)
"""
COMMAND = """
from guidance_nb.cli import _main
errors, sys.stderr = sys.stderr, sys.stdout
try:
    _main()
except SystemExit as error:
    assert error.code == 2
sys.stderr = errors
"""
TRAINED = """
import guidance_nb as gnb
tree = gnb.fractal()
x, c = tree.means.float(), tree.labels
model = gnb.mlp_denoiser(2, gnb.FlowPath(), num_classes=2)
model = gnb.train(model, gnb.DenoisingLoss(), (x, c), steps=2, batch_size=4, progress=False).ema
print(gnb.sample(gnb.ClassifierFreeGuidance(model, 2.0), c[:3], (2,), steps=2, progress=False).shape)
"""


@pytest.fixture(scope="module")
def core() -> list[str]:
    "What four programs print there, one after the other: an import of torch takes longer than they do."
    return alone("print('=====')".join((LIGHT, MISSING, COMMAND, TRAINED))).split("=====\n")


def test_what_is_taught_needs_the_core_alone_and_is_light(core):
    "Less than a second of processor time beyond torch; what wants an extra to be imported says so in its one line."
    assert float(core[0]) < 1 or any(float(alone(LIGHT)) < 1 for _ in range(2))


def test_the_core_trains_guides_and_samples(core):
    assert core[3] == "torch.Size([3, 2])\n"


def test_a_missing_extra_is_one_line_with_the_command(core):
    assert core[1].count("\n") == 1 and "pip install 'guidance_nb[images]'" in core[1]


def test_the_command_without_its_extra_is_one_line(core):
    assert core[2].count("\n") == 1 and "pip install 'guidance_nb[cli]'" in core[2]


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        guidance_nb.sampel  # noqa: B018


def fresh(code: str) -> str:
    "What code prints in a Python of its own."
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def test_help_imports_nothing_heavy():
    code = """
import sys
from guidance_nb.cli._app import main
sys.argv = ["guidance-nb", "--help"]
try:
    main()
finally:
    print({"torch", "numpy", "pydantic"} & set(sys.modules))
"""
    assert fresh(code).endswith("set()\n")


def test_a_transformer_imports_no_other_model_and_hides_none():
    code = """
import sys
from guidance_nb._extras import extra
with extra("diffusers"):
    from diffusers import DiTTransformer2DModel
print("diffusers.models.transformers.transformer_flux" in sys.modules)
import diffusers
import diffusers.models.transformers.transformer_flux as other
hidden = other.FluxTransformer2DModel is diffusers.FluxTransformer2DModel
print(diffusers.models.transformers.DiTTransformer2DModel is DiTTransformer2DModel, hidden)
print(diffusers.models.unets.UNet2DModel is diffusers.UNet2DModel)
"""
    assert fresh(code).split() == ["False", "True", "True", "True"]


def test_a_trained_model_draws_a_picture_without_heavy_imports(tmp_path):
    "Whatever takes seconds to import and is not needed for it: the names, since times depend on the machine."
    code = f"""
import sys
from guidance_nb.cli._app import main
sys.argv = "guidance-nb sample mnist-cfg --scale 3 --n 2 --steps 1 --no-progress --out {tmp_path / "x.png"}".split()
try:
    main()
finally:
    slow = "accelerate diffusers matplotlib pandas scipy sklearn sympy torchdiffeq torchvision transformers"
    print({{*slow.split(), "torch._dynamo"}} & set(sys.modules))
"""
    assert fresh(code).endswith("set()\n") and (tmp_path / "x.png").is_file()
