"Recipes: what is read is what was written, what is refused, and what a checkpoint, a row and a sweep say."

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tomli
import torch
from hypothesis import given
from hypothesis import strategies as st

from guidance_nb.cli import recipes
from guidance_nb.cli.recipes import (
    Recipe,
    Request,
    baseline_size,
    choose_metrics,
    complete_request,
    describe_recipe,
    draw,
    find_feature_extractor,
    finish_sweep,
    is_done,
    key_meanings,
    load_real,
    load_trained,
    make_model,
    override,
    postprocess,
    prepared,
    read_recipe,
    recipe_from,
    recipe_keys,
    recipe_names,
    recipe_shape,
    score,
    sweep_points,
    take_images,
    train_recipe,
)
from guidance_nb.engine.checkpoints import read_checkpoint, seal_record
from guidance_nb.images.data import SampleFile, load_samples, save_samples
from guidance_nb.images.features import INCEPTION, Extractor, Features, read_reference
from guidance_nb.images.metrics import PROVENANCE, append_rows

TINY = {"network": "unet-tiny", "steps": 2, "batch_size": 8, "warmup": 0, "precision": "fp32", "grid_every": 0}
TINY |= {"sampler_steps": 2, "save_every": 2}


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    "A folder with images of two classes and a run of each kind."
    folder, draws = tmp_path_factory.mktemp("runs"), torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (40, 3, 8, 8), generator=draws, dtype=torch.uint8)
    save_samples(folder / "images", x, torch.arange(40) % 2)
    save_samples(folder / "samples.npz", x[:8], torch.arange(8) % 2)
    for name, changes in (
        ("base", {}),
        ("vp", {"path": "vp-linear", "prediction": "eps"}),
        ("classifier", {"method": "classifier"}),
        ("judge", {"method": "judge"}),
        ("correction", {"method": "flow_postprocessing", "samples": str(folder / "samples.npz"), "neighbours": 2}),
    ):
        recipe = override(Recipe(), TINY | {"data": str(folder / "images")} | changes)
        assert [state.step for state in train_recipe(recipe, folder / name, progress=False)] == [1, 2]
    return folder


text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x7f"), max_size=20)
numbers = st.floats(allow_nan=False, allow_infinity=False)


@given(
    title=text,
    lr=numbers,
    steps=st.integers(0, 2**40),
    flip=st.booleans(),
    interval=st.lists(numbers, max_size=3),
    samples=st.lists(text.filter(bool), max_size=3),
    settings=st.dictionaries(st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.booleans() | st.integers() | numbers),
)
def test_a_recipe_survives_toml_and_json(title, lr, steps, flip, interval, samples, settings):
    changes = {"title": title, "lr": lr, "steps": steps, "flip": flip, "interval": interval, "samples": samples}
    recipe = override(Recipe(), changes | {f"settings.{key}": value for key, value in settings.items()})
    assert (recipe.title, recipe.training.lr, recipe.method.samples) == (title, lr, tuple(samples))
    assert recipe_from(json.loads(json.dumps(asdict(recipe)))) == recipe
    assert recipe_from(tomli.loads(describe_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_says_what_it_is_and_builds(name):
    recipe = read_recipe(name)
    assert recipe.title and "\n" not in recipe.title and recipe.title[0].isupper()
    assert name.startswith(recipe.data.source) or recipe.data.source.startswith("latents:")
    written = tomli.loads((recipes.RECIPE_FOLDER / f"{name}.toml").read_text())
    assert {f"{table}.{key}" for table, part in written.items() if table != "title" for key in part} <= set(
        recipe_keys()
    )
    with torch.device("meta"):
        model = make_model(recipe, *recipe_shape(recipe))
    assert sum(p.numel() for p in model.parameters()) > 10_000


def test_every_key_has_a_meaning_and_only_one_home():
    assert set(key_meanings()) == set(recipe_keys())
    for key, meaning in key_meanings().items():
        assert f"{key.rpartition('.')[2]}" in describe_recipe(Recipe()) and meaning in describe_recipe(Recipe())


def test_a_part_of_a_data_set_is_the_same_part_every_time():
    data = recipes.ImageData(
        torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), torch.arange(50), ("a",) * 50, (1, 1, 1)
    )
    part = take_images(data, 10)
    assert len(part) == 10 and len(set(part.labels.tolist())) == 10
    assert torch.equal(part.images(torch.arange(10)).flatten().long(), part.labels)
    assert torch.equal(part.labels, take_images(data, 10).labels) and len(take_images(data, 99)) == 50


def edit(checkpoint: Path, change) -> None:
    "Change the record of a checkpoint as another version of the package might have written it."
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    change(record)
    (checkpoint / "checkpoint.json").write_text(seal_record(record))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(format=99), "has format 99 (guidance_nb "),
        (lambda r: r["metadata"].clear(), "holds no recipe; allowed: checkpoints of `guidance-nb train`"),
        (lambda r: r["metadata"]["recipe"]["data"].update(colour=1), "holds a recipe of another version ("),
        (lambda r: r["metadata"]["recipe"]["network"].update(name="unet-small"), "allowed: the network of the checkpoint"),
    ],
)
def test_a_foreign_checkpoint_is_refused(runs, tmp_path, change, words):
    good = read_checkpoint(runs / "base").path
    (tmp_path / good.name).mkdir()
    for file in good.iterdir():
        (tmp_path / good.name / file.name).write_bytes(file.read_bytes())
    edit(tmp_path / good.name, change)
    with pytest.raises(ValueError) as caught:
        load_trained(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_raw_weights_are_other_weights_and_the_facts_say_so(runs):
    raw, mean = load_trained(runs / "base", ema=False), load_trained(runs / "base")
    assert any(not torch.equal(a, b) for a, b in zip(raw.model.parameters(), mean.model.parameters()))
    assert draw(raw, Request(n=2), progress=False).facts["ema"] is False
    assert "ema" not in draw(mean, Request(n=2), progress=False).facts


def test_classifier_guidance_under_bf16(runs):
    base, guide = load_trained(runs / "base"), load_trained(runs / "classifier")
    exact = draw(base, Request(n=4, scale=3), guide, progress=False)
    low = draw(base, Request(n=4, scale=3, precision="bf16"), guide, progress=False)
    assert low.facts["arithmetic"] == "bf16" and exact.facts["arithmetic"] == "fp32"
    assert 0 < (low.x.int() - exact.x.int()).abs().max() <= 8
    with pytest.raises(ValueError, match="allowed: one path"):
        complete_request(load_trained(runs / "vp"), Request(n=4), guide)


def test_a_missing_compiler_is_bad_input(runs, monkeypatch):
    def fails() -> None:
        raise RuntimeError("compile = True, but torch.compile does not work here (no g++); allowed: False")

    monkeypatch.setattr(recipes, "check_compiler", fails)
    with (
        pytest.raises(ValueError, match="compile = True"),
        prepared(load_trained(runs / "base"), "fp32", True),
    ):
        pass
    with pytest.raises(ValueError, match="compile = True"):
        next(train_recipe(override(load_trained(runs / "base").recipe, {"compile": "true"}), runs / "base", False))


def test_eyes_are_named_after_what_they_were_trained_for(runs):
    file = load_samples(runs / "samples.npz")
    for name in ("judge", "classifier"):
        eyes = find_feature_extractor(str(runs / name))
        real = recipes.measure(load_samples(runs / "images").x, eyes)
        row = score(file, real, eyes)
        assert {f"fd_{name}", f"agreement_{name}"} <= set(row) and row["extractor"] == name
        assert "agreement" not in "".join(score(SampleFile(file.x, None, {}), real, eyes))
    with pytest.raises(ValueError, match="was trained by method 'plain'; allowed: 'judge', 'classifier'"):
        find_feature_extractor(str(runs / "base"))


def test_a_grey_judge_refuses_colours(runs, tmp_path, monkeypatch):
    judge = load_trained(runs / "judge")
    grey = replace(judge, shape=(1, 8, 8), model=make_model(judge.recipe, (1, 8, 8), 2).eval())
    monkeypatch.setattr(recipes, "load_trained", lambda source: grey)
    eyes = find_feature_extractor(str(runs / "judge"))
    x = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    assert recipes.extract(x, eyes).n == 4
    with pytest.raises(ValueError, match="images have colours; allowed: grey ones"):
        recipes.extract(x.repeat(1, 3, 1, 1) + torch.tensor([0, 1, 2], dtype=torch.uint8).view(3, 1, 1), eyes)


def test_an_adm_file_gives_the_metrics_it_can(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    real, _, name = load_real(str(tmp_path / "stats.npz"), "train", (3, 32, 32))
    eyes = Extractor(INCEPTION, lambda images: images)
    assert name == "stats.npz" and choose_metrics(real, eyes) == ("fd", "score")
    assert choose_metrics(real, eyes, None, "fid") == ("fd", "score")
    with pytest.raises(ValueError, match="best = 'kid'; allowed: 'fid', 'is'"):
        choose_metrics(real, eyes, None, "kid")
    with pytest.raises(ValueError, match="what inception-v3-compat saw"):
        recipes.measure(read_reference(tmp_path / "stats.npz"), Extractor("judge", lambda images: images), ["fd"])


def test_unlabelled_samples_meet_a_correction_with_classes(runs):
    file = load_samples(runs / "samples.npz")
    assert postprocess(load_trained(runs / "correction"), file, 2, progress=False).x.shape == file.x.shape
    with pytest.raises(ValueError, match="labels"):
        postprocess(load_trained(runs / "correction"), SampleFile(file.x, None, {}), 2, progress=False)


def row(**facts) -> dict:
    return dict.fromkeys(PROVENANCE, "") | {"method": "plain", "sampler": "heun", "steps": 4, "correction": ""} | facts


def test_a_point_is_found_again_whatever_its_numbers_look_like(tmp_path):
    file = tmp_path / "rows.csv"
    assert not is_done(file, {"scale": 2.0})
    append_rows(file, [row(scale=2.0, n=100, seed=0, checkpoint="a/b")])
    assert is_done(file, {"scale": 2, "n": 100, "steps": 4, "checkpoint": Path("a/b"), "classifier": ""})
    for other in ({"scale": 2.5}, {"n": 10}, {"checkpoint": "a/c"}, {"classifier": "c"}, {"correction": "d"}):
        assert not is_done(file, {"scale": 2.0} | other)


@pytest.mark.parametrize(("best", "scale"), [("fd_judge", 2.0), ("agreement_judge", 3.0), ("score_judge", 1.0)])
def test_the_best_point(tmp_path, best, scale):
    values = {1.0: (5.0, 0.2, 9.0), 2.0: (3.0, 0.5, 8.0), 3.0: (4.0, 0.9, "")}
    keys = ("fd_judge", "agreement_judge", "score_judge")
    append_rows(tmp_path / "rows.csv", [row(method="real", fd_judge=0.1)])
    append_rows(tmp_path / "rows.csv", [row(scale=s, checkpoint="a", **dict(zip(keys, v))) for s, v in values.items()])
    append_rows(
        tmp_path / "rows.csv", [row(scale=9.0, checkpoint="b", fd_judge=0.2, agreement_judge=1.0, score_judge=10)]
    )
    assert finish_sweep(tmp_path, best, {"checkpoint": "a"})["scale"] == scale
    assert finish_sweep(tmp_path, best)["scale"] == 9.0
    with pytest.raises(ValueError, match="no row of this sweep"):
        finish_sweep(tmp_path, best, {"checkpoint": "c"})


def test_the_floor_is_as_large_as_there_are_images():
    published = Features("judge", {"features": torch.zeros(60_000, 1)}, name="mnist train")
    assert baseline_size("mnist", published, 500) == ("test", 500)
    assert baseline_size("mnist", published, 50_000) == ("test", 10_000)
    assert baseline_size("mnist", replace(published, name="mnist test"), 500) == ("train", 500)
    assert baseline_size("folder", replace(published, rows={"features": torch.zeros(31, 1)}), 500) == ("", 15)
    assert baseline_size("stats.npz", Features(INCEPTION), 500) == ("", 0)


def test_points_of_a_sweep():
    points = sweep_points(Request(n=5, sampler="ddim"), (1.0, 2.0), (4, 8), ())
    assert [(p.scale, p.steps, p.sampler, p.n) for p in points] == [
        (1.0, 4, "ddim", 5), (2.0, 4, "ddim", 5), (1.0, 8, "ddim", 5), (2.0, 8, "ddim", 5)
    ]  # fmt: skip
