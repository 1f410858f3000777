"tools/claims.py: what is drawn, in which order and of which models, and the whole way with tiny ones."

import os
import re

import pytest
import torch

import claims
from claims import Grid, Models, all_points
from guidance_nb.cli._recipe import override, read_recipe
from guidance_nb.cli._run import _take_images, generate, train_recipe
from guidance_nb.denoisers import count_nfe
from guidance_nb.images._data import load_images, save_samples
from guidance_nb.images._metrics import read_rows

needs_data = pytest.mark.skipif("GUIDANCE_NB_DATA" not in os.environ, reason="needs MNIST in GUIDANCE_NB_DATA")
RECIPES = {
    "cfg": "mnist-base",
    "aligned": "mnist-aligned",
    "mg": "mnist-mg",
    "mg-aware": "mnist-mg-aware",
    "classifier": "mnist-classifier",
    "evaluation": "mnist-evaluation-classifier",
    "post": "mnist-post",
}


@pytest.fixture(autouse=True)
def nothing_ships(monkeypatch, tmp_path):
    "These tests train their own models."
    monkeypatch.setattr(claims, "MODELS", tmp_path)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    "Every model of the study but a second seed, an anchor and a linear classifier, after four steps."
    folder = tmp_path_factory.mktemp("models")
    few = {"network": "unet-tiny", "steps": 4, "batch_size": 8, "warmup": 0, "grid_every": 0, "source": str(folder)}
    data = _take_images(load_images("mnist"), 200)
    save_samples(folder / "train.npz", data.images(torch.arange(200)), data.labels, {"classes": list(data.classes)})
    for name, recipe in RECIPES.items():
        own = {"save_every": 1, "keep": 4} if name in ("cfg", "aligned") else {}
        if name == "post":
            trained = Models([folder]).find("cfg")
            file = folder / "pairs.npz"
            drawn = generate(
                trained, claims.Drawing(None, "fp32", 40).request(claims.Point("cfg", 2.0, 2), 20), None, False
            )
            save_samples(file, drawn.x, drawn.c, drawn.facts)
            own = {"samples": str(file), "neighbours": 2}
        list(train_recipe(override(read_recipe(recipe), few | own), folder / f"mnist-{name}", progress=False))
    return folder


@needs_data
def test_the_whole_way_and_no_point_twice(models, tmp_path, capsys):
    arguments = ["--out", str(tmp_path), "--models", str(models), "--rehearse"]
    claims.main(arguments)
    shown = capsys.readouterr().out
    rows = read_rows(tmp_path / "claims_mnist.csv")[1]
    assert {row["run"] for row in rows} == {"real", "cfg", "aligned", "mg", "mg-aware"}
    assert {row["flow"] for row in rows} == {"", "post", "neighbours"} and {row["guide"] for row in rows} == {
        "",
        "classifier",
    }
    assert {row["seed"] for row in rows if row["run"] == "cfg"} == {"0", "1", "2"}
    assert {float(row["portion"]) for row in rows if row["run"] == "aligned"} == {0.25, 0.5, 0.75, 1.0}
    assert [row["n"] for row in rows if row["run"] == "real"] == ["20", "200"]
    assert all(0 <= float(row["agreement_evaluation_classifier"]) <= 1 for row in rows)
    assert not any(str(models) in str(row) for row in rows)
    assert (tmp_path / "left_out.txt").read_text() == "" and "; 0 s are left" not in shown
    claims.main(arguments)
    assert read_rows(tmp_path / "claims_mnist.csv")[1] == rows


@needs_data
def test_what_does_not_fit_is_listed(models, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "weight", lambda point: 1e9 if point.seed else 1.0)
    claims.main(["--out", str(tmp_path), "--models", str(models), "--rehearse", "--budget", "5"])
    rows = read_rows(tmp_path / "claims_mnist.csv")[1]
    assert {row["seed"] for row in rows} == {"0"}
    left = (tmp_path / "left_out.txt").read_text().splitlines()
    assert left and all("seed=1" in line or "seed=2" in line for line in left)


@needs_data
def test_a_point_costs_the_evaluations_that_are_planned(models):
    for point in (claims.Point("cfg", 1.0, 3), claims.Point("cfg", 2.0, 3), claims.Point("mg", 2.0, 3)):
        found = Models([models])
        drawing = claims.Drawing(found.find, "fp32", 40)
        with count_nfe() as count:
            list(drawing.draw(point, 5, []))
        assert count.total == 5 * claims.weight(point)


def test_what_the_claims_need_comes_first(monkeypatch):
    "Of the first seed everything; no point twice; nothing of models that are not there."
    monkeypatch.setattr(Models, "has", lambda self, run: run != "cfg-1")
    monkeypatch.setattr(Models, "checkpoints", lambda self, run: [])
    points = all_points(Models([]), Grid())
    assert len(set(points)) == len(points) and not any(point.run == "cfg-1" for point in points)
    seeds = [point.seed for point in points]
    assert seeds.index(1) == seeds.count(0) and points[0] == claims.Point(
        "cfg", 1.0, 20, corrections=("post", "neighbours"), sampler="dpmpp_2m"
    )
    grid = {(p.run, p.scale, p.steps) for p in points if p.sampler == "euler" and not p.seed}
    assert grid >= {(run, s, n) for run in ("cfg", "aligned") for s in claims.SCALES for n in claims.STEPS}


def test_bad_input_is_one_line(tmp_path, capsys):
    for given, words in (
        (["--budget", "0"], "a positive number of minutes"),
        (["--samples", "3"], "allowed: 4 or more"),
        ([], "no model mnist-cfg in .*--models FOLDER"),
    ):
        with pytest.raises(SystemExit):
            claims.main(["--out", str(tmp_path), "--models", str(tmp_path), *given])
        assert re.search(words, capsys.readouterr().err.splitlines()[-1])
