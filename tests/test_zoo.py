"""The trained models that come with the package: each is whole, known by name, and does what its card says."""

import json
import shutil
import sys

import pytest
import torch
from torch.testing import assert_close

import apart
import guidance_nb as gnb
import zoo
from guidance_nb.cli._load import MODELS, _model_names, load
from guidance_nb.cli._recipe import override, read_recipe
from guidance_nb.cli._run import load_trained
from guidance_nb.engine._checkpoints import _DamagedCheckpoint
from guidance_nb.images._data import from_uint8, load_images
from guidance_nb.interop._hub import HubDenoiser

NAMES = {
    "mnist-aligned", "mnist-aligned-anchored", "mnist-cfg", "mnist-classifier", "mnist-classifier-linear",
    "mnist-evaluation", "mnist-mg", "mnist-mg-aware", "mnist-post",
}  # fmt: skip
DENOISERS = sorted(name for name in NAMES if load_trained(name).recipe.method.name in
                   ("plain", "aligned_loss", "model_guidance"))  # fmt: skip
SAMPLE = [sys.executable, "-c", "from guidance_nb.cli._app import main; main()"]


def test_all_models_are_there_and_small():
    assert set(_model_names()) == NAMES
    assert sum(file.stat().st_size for file in MODELS.rglob("*.*")) <= 15e6
    assert {file.name for file in MODELS.rglob("*.*") if file.is_file()} == {
        "README.md", "checkpoint.json", "ema.safetensors",
    }  # fmt: skip


@pytest.mark.parametrize("name", sorted(NAMES))
def test_a_model_comes_from_the_recipe_of_its_name_and_its_card_tells_it(name):
    trained, card = load_trained(name), (MODELS / name / "README.md").read_text()
    recipe, free = read_recipe(f"models/{name}"), {"method.samples": (), "cuda_graphs": False}
    assert override(trained.recipe, free) == override(recipe, {"method.samples": ()})
    assert trained.step == recipe.training.steps
    assert f"{trained.step * recipe.training.batch_size:,} images seen" in card and "CC BY-SA 3.0" in card
    model = load(name)
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("name", DENOISERS)
def test_a_digit_is_recognised_in_what_is_drawn(name):
    "At the scale that a model is for; with weights that were never trained one in ten digits is."
    classifier, c = load("mnist-evaluation"), torch.arange(30) % 10
    trained = load_trained(name)
    scale = None if trained.recipe.method.name == "plain" else trained.scale
    model = gnb.ClassifierFreeGuidance(trained.model, 2.0) if scale is None else gnb.load(name)
    if trained.model.scale_aware:
        model = gnb.FixedScale(model, scale)
    elif "aligned" in name:
        model = gnb.ClassifierFreeGuidance(model, scale)
    x = gnb.sample(model, c, (1, 28, 28), steps=8, seed=0, progress=False)
    seen = classifier(x, torch.zeros(())).argmax(1)
    assert (seen == c).double().mean() >= 0.8


def test_the_evaluation_classifier_knows_test_images(data):
    images = load_images("mnist", "test")
    x = from_uint8(images.images(torch.arange(0, 10_000, 20)))
    right = load("mnist-evaluation")(x, torch.zeros(())).argmax(1) == images.labels[::20]
    assert right.double().mean() >= 0.97


def test_a_digit_on_the_command_line(tmp_path):
    words = ["sample", "mnist-cfg", "--scale", "3", "--n", "10", "--steps", "4", "--out", str(tmp_path / "d.png")]
    done = apart.run([*SAMPLE, *words, "--no-progress"], capture_output=True, text=True, check=True)
    assert "10 samples, NFE 8" in done.stdout and (tmp_path / "d.png").stat().st_size > 1000
    listed = apart.run([*SAMPLE, "models"], capture_output=True, text=True, check=True).stdout
    assert all(name in listed for name in NAMES)


def test_bad_models_are_one_line(tmp_path):
    for wrong, words in {"mnist-cgf": "model = 'mnist-cgf'; allowed: a folder that is there, or mnist-cfg"}.items():
        with pytest.raises(ValueError, match=words):
            load(wrong)
    shutil.copytree(MODELS / "mnist-evaluation", tmp_path / "damaged")
    weights = tmp_path / "damaged" / "ema.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(_DamagedCheckpoint, match=r"ema.safetensors is not what was written"):
        load(tmp_path / "damaged")
    record = json.loads((MODELS / "mnist-evaluation" / "checkpoint.json").read_text())
    (tmp_path / "damaged" / "checkpoint.json").write_text(json.dumps(record | {"format": 1}))
    with pytest.raises(_DamagedCheckpoint, match=r"checkpoint.json is not what was written"):
        load(tmp_path / "damaged")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"^model = .*foreign' cannot be opened") as error:
        load(tmp_path / "foreign")
    assert "\n" not in str(error.value)


def test_a_hub_folder_is_loaded_as_it_was(tmp_path):
    trained = load_trained("mnist-cfg")
    HubDenoiser.from_denoiser(trained.model, "unet-small", (1, 28, 28)).save_pretrained(tmp_path / "hub")
    x, c = torch.randn(2, 1, 28, 28), torch.tensor([3, 4])
    assert_close(load(tmp_path / "hub")(x, 0.5, c).x0, trained.model(x, 0.5, c).x0)


def test_models_are_trained_followed_and_shipped(data, tmp_path, capsys):
    "In miniature; what is written down draws like what was trained, to half precision."
    changes = {"network": "unet-tiny", "limit": 200, "steps": 16, "batch_size": 16, "warmup": 2, "save_every": 2}
    for name in ("mnist-evaluation", "mnist-cfg"):
        zoo.train_one(tmp_path, name, changes, 1e9)
    rows = list(zoo.follow(tmp_path, 40, (4, 8), "test"))
    assert [(row["run"], row.get("step")) for row in rows] == [
        ("real", None), ("mnist-cfg", 8), ("mnist-cfg", 8), ("mnist-cfg", 16), ("mnist-cfg", 16),
    ]  # fmt: skip
    assert list(zoo.follow(tmp_path, 40, (4, 8), "test")) == []  # finished points are kept
    zoo.ship(tmp_path, tmp_path / "models")
    told = capsys.readouterr().out
    assert "mnist-cfg: 0.1" in told and "mnist-mg: not trained" in told
    card = (tmp_path / "models" / "mnist-cfg" / "README.md").read_text()
    assert "256 images seen, 16 optimiser steps of 16" in card and "At scale 2" in card
    x, c = torch.randn(2, 1, 28, 28), torch.tensor([3, 4])
    shipped, trained = load(tmp_path / "models" / "mnist-cfg"), load(tmp_path / "mnist-cfg")
    assert_close(shipped(x, 0.5, c).x0, trained(x, 0.5, c).x0, atol=5e-3, rtol=5e-3)


def test_a_long_training_falls_to_zero_and_is_followed_by_the_shipped_classifier(data, tmp_path):
    changes = {"network": "unet-tiny", "limit": 200, "warmup": 2, "compile": False, "precision": "fp32"}
    zoo.train_one(tmp_path, "mnist-cfg", zoo.lengthened(16) | changes, 1e9)
    table = load_trained(tmp_path / "mnist-cfg").recipe.training
    assert (table.batch_size, table.steps, table.hold, table.schedule) == (128, 16, 8, "cosine")
    rows = list(zoo.follow(tmp_path, 40, (8,), "test"))
    assert [(row["run"], row.get("images_seen")) for row in rows] == [
        ("real", None), ("mnist-cfg", 2048), ("mnist-cfg", 2048),
    ]  # fmt: skip
