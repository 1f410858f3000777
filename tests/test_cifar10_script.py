"tools/cifar10.py: the plan's arithmetic with measured times replaced by given ones, and the whole way at tiny size."

import json
import math
import os
import re
import time
from dataclasses import replace

import numpy as np
import pytest
import torch

import cifar10
from cifar10 import (
    PARTS,
    REHEARSAL,
    RUNS,
    RUNS_16,
    SCALES,
    STEPS,
    VP_RUNS,
    OutOfTime,
    Plan,
    Point,
    Size,
    Study,
    full_size,
    small_size,
)
from guidance_nb.cli._run import Request, generate, load_trained
from guidance_nb.denoisers import count_nfe
from guidance_nb.images._data import ImageData, SampleFile, save_samples
from guidance_nb.images._metrics import read_rows

needs_data = pytest.mark.skipif(
    "GUIDANCE_NB_DATA" not in os.environ, reason="needs CIFAR-10 and its classifiers in GUIDANCE_NB_DATA"
)


FULL = full_size(2, 1e-3)


def study(out, size=REHEARSAL, minutes=60.0, deadline=math.inf):
    return Study(out, size, minutes, deadline, False, None)


@pytest.mark.parametrize("minutes", [30.0, 120.0])
def test_the_plan_fits_the_budget(tmp_path, monkeypatch, minutes):
    "With a second of warming up and .05 seconds a step, doubled for twice the batch, all runs take 60 % of the budget."
    engine = {"precision": "bf16", "channels_last": True, "compile": False}
    monkeypatch.setattr(cifar10, "time_engines", lambda size, compiled: (engine, []))
    monkeypatch.setattr(cifar10, "time_training", lambda recipe, steps: (0.05 * recipe.training.batch_size / 256, 1.0))
    monkeypatch.setattr(cifar10, "time_sampling", lambda size, engine: {1.0: 1_000.0, 2.0: 500.0})
    plan = cifar10.make_plan(study(tmp_path, FULL, minutes))
    trained = sum(seconds for name, seconds in plan.seconds.items() if name != "sampling")
    longest = 0.05 * sum(run.length * (2 if name == "wide" else 1) for name, run in RUNS.items())
    rounded = 0.05 * len(RUNS)
    assert (
        PARTS["training"] * 60 * minutes - longest - rounded <= trained <= PARTS["training"] * 60 * minutes + len(RUNS)
    )
    assert plan.seconds["sampling"] <= PARTS["sampling"] * 60 * minutes
    assert plan.engine == engine and 20 <= plan.samples <= FULL.most


def test_a_budget_too_small_is_refused_with_the_least(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "time_engines", lambda size, compiled: ({}, []))
    monkeypatch.setattr(cifar10, "time_training", lambda recipe, steps: (1.0, 10.0))
    with pytest.raises(SystemExit, match=r"budget = 1 minutes; allowed: \d+ or more"):
        cifar10.make_plan(study(tmp_path, FULL, 1.0))


def test_equal_budgets_mean_what_they_say(tmp_path):
    "Equal images: one batch size and number of steps. Equal compute: twice the batch for one evaluation an image."
    plan = Plan(400, 256, {"precision": "fp32", "channels_last": False, "compile": False}, 100, 100, {})
    tables = {name: cifar10.run_recipe(name, FULL, plan).training for name in RUNS}
    same = [tables[name] for name in ("base", "aligned", "mg-1.5", "mg-2", "mg-aware")]
    assert len({(table.steps, table.batch_size, table.lr, table.ema, table.seed) for table in same}) == 1
    assert tables["wide"] == tables["base"].changed(batch_size=512, keep=2, save_every=400)
    assert tables["base"].keep * tables["base"].save_every == tables["base"].steps


@pytest.mark.parametrize("seconds, parts", [(20.0, 1), (100.0, 2), (200.0, 4), (900.0, 8)])
def test_a_long_run_can_go_on_from_a_minute_ago(seconds, parts):
    "And a run whose quarters are looked at keeps them, however often it writes."
    plan = Plan(400, 256, {}, 100, 100, {"aligned": seconds, "base": seconds})
    tables = {name: cifar10.run_recipe(name, FULL, plan).training for name in ("aligned", "base")}
    assert tables["aligned"].save_every == 400 // parts
    assert tables["base"].keep * tables["base"].save_every == 400 and 100 % tables["base"].save_every == 0


@needs_data
def test_points_cost_the_evaluations_that_are_planned(tmp_path):
    few = {"steps": 8, "save_every": 8}
    for name in ("base", "mg-1.5"):
        recipe = cifar10.override(cifar10.run_recipe(name, REHEARSAL), few)
        list(cifar10.train_recipe(recipe, tmp_path / name, progress=False))
        trained = load_trained(tmp_path / name)
        for scale in (1.0, 1.5) if name == "base" else (1.5,):
            with count_nfe() as count:
                generate(trained, Request(n=3, scale=scale, steps=4, sampler="euler"), progress=False)
            assert count.total == 3 * Point(name, scale, 4).nfe


@needs_data
def test_the_whole_way_and_on_from_where_it_stopped(tmp_path, monkeypatch, capsys):
    "Left three times: in training, before the pairs are drawn, between two points. What was made is not made again."
    left_out = ("post-pixels-40", "post-resnet-40", "wide", "mg-2", "mg-aware")
    size = replace(REHEARSAL, runs={name: run for name, run in RUNS.items() if name not in left_out})
    monkeypatch.setattr(Size, "points", lambda self, runs: POINTS)
    monkeypatch.setattr(cifar10, "STRICT", True)
    calls, made = [0], []
    leave_at = {2, 8, 13}

    def check_time(self):
        calls[0] += 1
        if calls[0] in leave_at:
            raise OutOfTime

    monkeypatch.setattr(Study, "check_time", check_time)
    train = cifar10.train_run
    monkeypatch.setattr(cifar10, "train_run", lambda *given: made.append(given[2]) or train(*given))
    for _ in range(3):
        with pytest.raises(OutOfTime):
            cifar10.carry_out(study(tmp_path, size))
    cifar10.carry_out(study(tmp_path, size))
    shown = capsys.readouterr().out
    assert shown.count("base: 8 steps of 16 images") == 2 and made.count("base") == 4  # left once, and then complete
    rows = read_rows(tmp_path / "cifar10.csv")[1]
    found = [(row["run"], row["guide"], row["flow"], row["portion"]) for row in rows if row["run"] != "real"]
    assert found == [
        ("base", "", "", "1.0"),
        ("base", "", "", "1.0"),
        ("base", "", "post-pixels-20", "1.0"),
        ("base", "", "post-resnet-20", "1.0"),
        ("mg-1.5", "", "", "0.5"),
        ("base", "classifier", "", "1.0"),
    ]
    assert [row["n"] for row in rows if row["run"] == "real"] == ["20", "40"]
    assert all(0 <= float(row["agreement_resnet56"]) <= 1 and float(row["fd_resnet56"]) > 0 for row in rows)
    assert not any(str(tmp_path) in str(row) for row in rows)
    assert max(file.stat().st_size for file in tmp_path.glob("weights/*/*.safetensors")) < 15e6
    assert {file.parent.name for file in tmp_path.glob("weights/*/recipe.json")} == set(size.runs)
    assert (tmp_path / "samples" / "base-1.npz").exists() and (tmp_path / "grids" / "base-self-2.png").exists()


POINTS = [
    Point("base", 1.0, 2, headline=True),
    Point("base", 2.0, 20, corrections=("post-pixels-20", "post-resnet-20")),
    Point("mg-1.5", 1.5, 2, portion=0.5),
    Point("base", 2.0, 2, classifier="classifier"),
    Point("base", 2.0, 2, classifier="classifier"),  # for another claim: it is not drawn again
]


@needs_data
def test_another_plan_needs_another_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cifar10, "make_plan", lambda study: Plan(8, 16, {}, 20, 40, {}))
    cifar10.read_plan(study(tmp_path))
    assert cifar10.read_plan(study(tmp_path)) == Plan(8, 16, {}, 20, 40, {})
    with pytest.raises(SystemExit, match="was made for other options"):
        cifar10.read_plan(study(tmp_path, minutes=5.0))
    assert json.loads((tmp_path / "plan.json").read_text())["plan"]["steps"] == 8


def test_without_an_evaluation_classifier_nothing_is_trained(tmp_path):
    with pytest.raises(SystemExit, match=r"no evaluation classifier: .*resnet20.*--classifiers FOLDER"):
        cifar10.carry_out(replace(study(tmp_path), classifiers=tmp_path))
    assert not list(tmp_path.iterdir())


def test_the_clock_leaves_in_time(tmp_path):
    study(tmp_path, deadline=time.monotonic() + 60).check_time()
    with pytest.raises(OutOfTime):
        study(tmp_path, deadline=time.monotonic() - 1).check_time()


def test_every_point_of_the_study_is_there():
    "The grid the study asks for, and each claim's points."
    points = Size({}).points([*RUNS, *VP_RUNS])
    assert len(set(points)) == len(points)
    for run in ("base", "wide", "aligned", "vp-wide", "vp-aligned"):
        assert {(p.scale, p.steps) for p in points if p.run == run and not p.headline} >= {
            (scale, steps) for scale in SCALES for steps in STEPS
        }
    assert {p.scale for p in points if p.corrections} == set(SCALES)


@pytest.mark.parametrize("given", [["--budget", "0"], ["--stop-after", "-1"], ["--budget", "nan"], ["--lr", "0"]])
def test_bad_times_are_refused(tmp_path, given, capsys):
    with pytest.raises(SystemExit):
        cifar10.main(["--out", str(tmp_path), *given])
    assert re.search(r"allowed: (positive numbers of minutes|a positive number)\n", capsys.readouterr().err)


@pytest.mark.parametrize("label", [0, 1])
def test_a_perfect_flow_ends_on_a_near_training_image_of_the_class(label):
    x = torch.tensor([0, 10, 100, 110], dtype=torch.uint8).reshape(4, 1, 1, 1)
    real = ImageData(x, torch.tensor([0, 1, 0, 1]), ("a", "b"), (1, 1, 1))
    drawn = SampleFile(torch.full((6, 1, 1, 1), 90, dtype=torch.uint8), torch.full((6,), label), {"nfe": 3})
    found = cifar10.nearest_images(drawn, real)
    assert set(found.x.flatten().tolist()) == {10 * label, 100 + 10 * label} and found.facts == {"nfe": 3}


POINTS_16 = [
    Point("base", 2.0, 2, corrections=("post-classifier-20",)),
    Point("base", 2.0, 2, precision="fp32", seed=1),
    Point("mg-2", 2.0, 2, portion=0.5),
    Point("few", 2.0, 2),
]


def test_the_study_of_small_images_from_a_folder_and_past_a_failure(tmp_path, monkeypatch, capsys):
    "With an evaluation classifier of its own; a run that fails costs its own points alone."
    x, c = torch.randint(0, 256, (240, 3, 16, 16), dtype=torch.uint8), torch.arange(240) % 10
    for split in ("train", "test"):
        save_samples(tmp_path / "data" / f"{split}.npz", x, c, {"classes": list("abcdefghij")})
    size = small_size(str(tmp_path / "data"), 1e-3, rehearse=True)
    wanted = ("evaluation", "base", "mg-2", "classifier", "post-classifier-20", "few")
    size = replace(size, runs={name: run for name, run in RUNS_16.items() if name in wanted})
    monkeypatch.setattr(Size, "points", lambda self, runs: POINTS_16)
    train = cifar10.train_run
    monkeypatch.setattr(cifar10, "train_run", lambda *given: 1 / 0 if given[2] == "few" else train(*given))
    cifar10.carry_out(study(tmp_path, size))
    shown = capsys.readouterr()
    assert "ZeroDivisionError" in shown.err and "few fd" not in shown.out
    rows = read_rows(tmp_path / "cifar10.csv")[1]
    found = [(row["run"], row["flow"], row["seed"], row["n"]) for row in rows]
    assert found == [
        *(("real", "", "0", n) for n in ("20", "40")),
        ("base", "", "0", "20"),
        ("base", "post-classifier-20", "0", "20"),
        ("base", "", "1", "20"),
        ("mg-2", "", "0", "20"),
    ]
    assert [float(row["nfe"]) for row in rows[2:]] == [4, 20, 4, 2]  # the evaluation's own are not among them
    assert {row["reference"] for row in rows} == {"cifar10 train at 16 x 16"}
    (weights,) = (tmp_path / "weights").glob("*/*.safetensors")
    assert weights.parent.name == "evaluation"
    pictures = np.load(tmp_path / "samples.npz")  # of the runs that there are
    assert list(pictures) == ["no guidance", "CFG 2", "CFG 4", "CFG 8", "MG 2"]
    assert all(each.shape == (10, 3, 16, 16) and each.dtype == np.uint8 for each in pictures.values())


def test_every_point_of_small_images_is_of_a_run_that_is_there():
    points = small_size("cifar10", 1e-3, False).points(list(RUNS_16))
    assert len(set(points)) == len(points) and {point.run for point in points} < set(RUNS_16)
    others = {name for point in points for name in (*point.corrections, point.classifier) if name}
    assert others - {cifar10.NEIGHBOURS} < set(RUNS_16) and cifar10.NEIGHBOURS in others
    fewer = small_size("cifar10", 1e-3, False).points(["base", "mg-2"])
    assert {(point.run, point.corrections) for point in fewer} == {("base", ()), ("mg-2", ())}


def test_a_call_may_train_some_runs_alone(tmp_path, monkeypatch, capsys):
    "Calls beside each other share a plan and divide its runs; nothing is drawn before all are trained."
    plan = cifar10.Plan(8, 16, {}, 20, 20, dict.fromkeys(RUNS_16, 1.0))
    trained = []
    monkeypatch.setattr(cifar10, "read_plan", lambda study: plan)
    monkeypatch.setattr(cifar10, "make_pairs", lambda study, plan, source: (f"samples of {source}",))
    monkeypatch.setattr(cifar10, "train_run", lambda study, plan, name, samples: trained.append((name, *samples)))
    words = ["--size", "16", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--train"]
    cifar10.main([*words, "mg-2,base,post-few"])
    assert trained == [("mg-2",), ("base",), ("post-few", "samples of few")]
    assert not (tmp_path / "out" / "cifar10.csv").exists()
    with pytest.raises(SystemExit):
        cifar10.main([*words, "posts"])
    assert "--train posts; allowed: of evaluation, base" in capsys.readouterr().err


def test_given_steps_are_taken_without_timing(tmp_path, monkeypatch, capsys):
    "As a plan that a later call finds again; the budget does not count."
    plans = []
    monkeypatch.setattr(cifar10, "time_engines", lambda *given: 1 / 0)
    monkeypatch.setattr(cifar10, "train_run", lambda study, plan, name, samples: plans.append(plan))
    words = ["--size", "16", "--data", str(tmp_path), "--out", str(tmp_path / "out"), "--train", "base", "--steps"]
    for _ in range(2):
        cifar10.main([*words, "80", "--budget", "1e-9", "--precision", "bf16"])
    first, again = plans[:2]
    assert first.engine["precision"] == "bf16" and first.engine["channels_last"]
    assert "base-half" not in first.seconds
    cifar10.main([*words, "80", "--anneal", "40", "--out", str(tmp_path / "falling")])
    assert plans[2].anneal == 40 and "base-half" in plans[2].seconds
    assert first == again and (first.steps, first.samples) == (80, 5_000) and {*first.seconds} > {*RUNS_16}
    assert cifar10.run_recipe("base", small_size("cifar10", 1e-3, False), first).training.save_every == 10
    for arguments, told in ((("7",), "--steps 7; allowed: 8 or more"), (("80", "--anneal", "-8"), "--anneal -8; ")):
        with pytest.raises(SystemExit):
            cifar10.main([*words, *arguments])
        assert told in capsys.readouterr().err


def test_further_steps_let_the_learning_rate_fall():
    "After as many at the full rate; a classifier, and a flow on samples of the whole, do without."
    size = small_size("cifar10", 1e-3, False)
    plan = cifar10.given_plan(replace(size, steps=80, anneal=48), False)
    base = cifar10.run_recipe("base", size, plan).training
    assert (base.steps, base.schedule, base.warmup, base.hold) == (128, "cosine", 4, 76)
    assert (base.save_every, base.keep) == (16, 8)
    few = cifar10.run_recipe("few", size, plan).training
    assert (few.steps, few.warmup + few.hold) == (64, 40)
    for name in ("evaluation", "classifier", "post-pixels-20", "post-few"):
        flat = cifar10.run_recipe(name, size, replace(plan, anneal=0)).training
        assert cifar10.run_recipe(name, size, plan).training == flat, name


def test_a_short_budget_leaves_out_what_is_needed_least(tmp_path, monkeypatch, capsys):
    "So that the base sees sixteen epochs."
    monkeypatch.setattr(cifar10, "time_engines", lambda size, compiled: ({"precision": "bf16", "compile": False}, []))
    monkeypatch.setattr(cifar10, "time_training", lambda recipe, steps: (0.02, 1.0))
    monkeypatch.setattr(cifar10, "time_sampling", lambda size, engine: {1.0: 5_000.0, 2.0: 2_500.0})
    size = small_size("cifar10", 1e-3, False)
    plan = cifar10.make_plan(study(tmp_path, size, 4.0))
    missing = set(RUNS_16) - set(plan.seconds)
    assert missing and missing <= {"mg-2-1", "mg-aware", "few", "post-few"} and plan.samples == 5_000
    assert plan.steps * 512 >= 800_000 or len(missing) == 4
    assert cifar10.run_recipe("evaluation", size, plan).network.settings["widths"] == (32, 64, 96)
    assert cifar10.run_recipe("base", size, plan).network.settings["widths"] == (96, 128)
    assert cifar10.run_recipe("few", size, plan).data.limit == 5_000
    slow = small_size("cifar10", 1e-3, False, gpu=False)
    assert cifar10.run_recipe("base", slow, plan).network.settings["widths"] == (48, 72)
    assert cifar10.run_recipe("evaluation", slow, plan).network.settings["widths"] == (32, 64, 96)
