"Recipes: what is read is what was written, what is refused, and what a checkpoint, a row and a sweep say."

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tomli
import torch
from hypothesis import given
from hypothesis import strategies as st

from guidance_nb.cli import _evaluation as evaluation
from guidance_nb.cli import _run as run_module
from guidance_nb.cli._evaluation import (
    _baseline_size,
    _is_done,
    _match_labels,
    _MeasuredGuidanceLoss,
    choose_metrics,
    find_feature_extractor,
    finish_sweep,
    load_real,
    score,
    sweep_points,
)
from guidance_nb.cli._load import load, make_model
from guidance_nb.cli._recipe import (
    _FOLDERS,
    FineTuning,
    Recipe,
    describe_recipe,
    find_key,
    override,
    read_recipe,
    recipe_keys,
    recipe_names,
)
from guidance_nb.cli._run import (
    Request,
    _autocast_and_compile,
    _complete_request,
    _read_labels,
    _read_pairs,
    _take_images,
    build_guided,
    generate,
    load_trained,
    make_data,
    make_loss,
    postprocess,
    recipe_cost,
    recipe_shape,
    train_recipe,
)
from guidance_nb.denoisers import NetworkDenoiser, count_nfe
from guidance_nb.engine._checkpoints import _seal_record, read_checkpoint
from guidance_nb.images._data import ImageData, SampleFile, from_uint8, load_samples, save_samples
from guidance_nb.images._features import INCEPTION, Extractor, Features, extract, read_reference
from guidance_nb.images._metrics import PROVENANCE, append_rows
from guidance_nb.model_guidance import ModelGuidanceLoss
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import LossContext

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
        ("evaluation", {"method": "evaluation_classifier"}),
        ("correction", {"method": "flow_postprocessing", "samples": str(folder / "samples.npz"), "neighbours": 2}),
    ):
        recipe = override(Recipe(), TINY | {"data": str(folder / "images")} | changes)
        assert [state.step for state in train_recipe(recipe, folder / name, progress=False)] == [1, 2]
    return folder


text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\x7f"), max_size=20)
shares = st.floats(0, 1)


@given(
    title=text,
    lr=st.floats(1e-12, 1),
    steps=st.integers(1, 2**40),
    flip=st.booleans(),
    interval=st.lists(shares, min_size=2, max_size=2).map(sorted),
    samples=st.lists(text.filter(lambda name: name.strip() and "," not in name), max_size=3),
    settings=st.fixed_dictionaries(
        {}, optional={"dropout": shares, "film": st.booleans(), "widths": st.lists(st.integers(1, 999), max_size=3)}
    ),
)
def test_a_recipe_survives_toml_and_json(title, lr, steps, flip, interval, samples, settings):
    changes = {"title": title, "lr": lr, "steps": steps, "flip": flip, "interval": interval, "samples": samples}
    recipe = override(Recipe(), changes | {f"settings.{key}": value for key, value in settings.items()})
    assert (recipe.title, recipe.training.lr, recipe.method.samples) == (title, lr, tuple(samples))
    assert override(Recipe(), json.loads(json.dumps(recipe.model_dump(mode="json")))) == recipe
    assert override(Recipe(), tomli.loads(describe_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", recipe_names())
def test_a_shipped_recipe_says_what_it_is_and_builds(name):
    recipe = read_recipe(name)
    assert recipe.title and "\n" not in recipe.title and recipe.title[0].isupper()
    assert name.split("/")[-1].startswith(recipe.data.source) or recipe.data.source.startswith("latents:")
    with torch.device("meta"):
        model = make_model(recipe, *recipe_shape(recipe))
        assert callable(make_loss(recipe))
    least = 5_000 if recipe.network.name == "linear" else 10_000
    assert sum(p.numel() for p in model.parameters()) > least
    assert override(Recipe(), json.loads(json.dumps(recipe.model_dump()))) == recipe
    assert override(Recipe(), tomli.loads(describe_recipe(recipe))) == recipe


@pytest.mark.parametrize("name", recipe_names(FineTuning))
def test_a_fine_tuning_recipe_is_read_by_the_same_reader(name):
    recipe = read_recipe(name, {"lora-rank": "0", "gradient_checkpointing": "false"}, FineTuning)
    assert recipe.title and not recipe.training.gradient_checkpointing and recipe.grid.prompts
    assert override(FineTuning(), tomli.loads(describe_recipe(recipe))) == recipe


def test_a_table_given_in_part_keeps_the_other_defaults_of_its_recipe():
    table = FineTuning(training={"steps": 5, "ema_warmup": False}).training
    assert table == FineTuning().training.changed(steps=5, ema_warmup=False)
    assert table.lr == 1e-5 != Recipe().training.lr
    assert table.fit_options()["ema_warmup"] is False and table.engine().clip == 1.0
    assert Recipe().training.engine().clip is None and not Recipe().training.engine().cuda_graphs


@pytest.mark.parametrize("kind", [Recipe, FineTuning])
def test_every_key_has_a_meaning_that_is_printed(kind):
    written = describe_recipe(kind())
    for name, meaning in recipe_keys(kind).items():
        assert meaning and name.rpartition(".")[2] in written and meaning in written
    for path in _FOLDERS[kind].glob("*.toml"):
        tables = tomli.loads(path.read_text())
        keys = {f"{table}.{key}" for table, part in tables.items() if table != "title" for key in part}
        assert keys <= set(recipe_keys(kind))


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("training.lr", "training.lr"),
        ("batch-size", "training.batch_size"),
        ("data", "data.source"),
        ("network", "network.name"),
        ("method", "method.name"),
        ("settings.dropout", "network.settings.dropout"),
    ],
)
def test_a_key_is_found_by_its_last_part_and_a_table_is_its_first_key(name, key):
    assert find_key(name) == key


@pytest.mark.parametrize(
    ("name", "kind", "words"),
    [
        ("learning_rate", Recipe, "unknown key 'learning_rate'"),
        ("batchsize", Recipe, "did you mean training.batch_size?"),
        ("batchsize", FineTuning, "did you mean training.batch_size?"),
        ("data.lr", Recipe, "did you mean training.lr?"),
    ],
)
def test_an_unknown_key_is_told_the_nearest(name, kind, words):
    assert find_key("lora-rank", FineTuning) == "pipeline.lora_rank"
    with pytest.raises(ValueError) as caught:
        find_key(name, kind)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_values_come_to_the_type_of_their_key():
    "Text as of flags, whole numbers for others, and all that was not named stays."
    assert override(Recipe(), {"interval": "0,0.75"}).method.interval == (0.0, 0.75)
    for value, lr in (("1e-4", 1e-4), (1, 1.0), (0.5, 0.5)):
        assert override(Recipe(), {"lr": value}).training.lr == lr
    for value, flip in (("true", True), ("false", False), (True, True)):
        assert override(Recipe(), {"flip": value}).data.flip is flip
    flags = {"steps": "4000", "network": "unet-tiny", "settings.dropout": "0.2", "samples": "a.npz,b.npz"}
    changed = override(Recipe(), flags)
    assert (changed.training.steps, changed.network.name) == (4000, "unet-tiny")
    assert changed.network.settings == {"dropout": 0.2}
    assert (changed.method.samples, changed.data) == (("a.npz", "b.npz"), Recipe().data)
    assert override(Recipe(), tomli.loads(describe_recipe(changed))) == changed


def test_the_loss_and_the_cost_of_a_recipe():
    assert make_loss(read_recipe("mnist-aligned")).scale == 2.0
    for name, hours in (("sit-b2-mg", 15), ("sit-xl2-256-base", 1023), ("sit-xl2-256-mg", 1477)):
        assert round(recipe_cost(read_recipe(name)).iloc[-1].gpu_hours) == hours
    with pytest.raises(ValueError, match="allowed: a multiple of 3 GPUs"):
        recipe_cost(read_recipe("sit-b2-mg"), (3,))
    with pytest.raises(ValueError, match="allowed: 'plain', 'aligned_loss'"):
        recipe_cost(read_recipe("mnist-evaluation-classifier"))


BAD = {
    ("steps", 0): "training.steps = 0; allowed: a whole number, 1 or more",
    ("steps", True): "training.steps = True; allowed: a whole number",
    ("steps", 2.5): "training.steps = 2.5; allowed: a whole number, 1 or more",
    ("steps", "many"): "training.steps = 'many'; allowed: a whole number, 1 or more",
    ("limit", -1): "data.limit = -1; allowed: a whole number, 0 or more",
    ("data", 3): "data.source = 3; allowed: text",
    ("samples", 3): "method.samples = 3; allowed: a list of texts",
    ("dropout", 1.5): "dropout = 1.5; allowed: a number, 0 or more",
    ("precision", "fp8"): "precision = 'fp8'; allowed: 'fp32'",
    ("guided_channels", -1): "sampling.guided_channels = -1; allowed: a whole number, 0 or more",
    ("unconditional", "nul"): "method.unconditional = 'nul'; allowed: 'null'",
    ("lr", True): "training.lr = True; allowed: a number, above 0, at most 1",
    ("steps", "2.5"): "training.steps = '2.5'; allowed: a whole number",
    ("lr", "nan"): "training.lr = 'nan'; allowed: a number, above 0, at most 1",
    ("lr", "inf"): "training.lr = 'inf'; allowed",
    ("lr", -1): "training.lr = -1; allowed",
    ("lr", 0): "training.lr = 0; allowed",
    ("ema", 2): "training.ema = 2; allowed: a number, 0 or more, below 1",
    ("ema", "nan"): "training.ema = 'nan'; allowed",
    ("seed", 2**64): "training.seed = 18446744073709551616; allowed: a whole number, 0 or more",
    ("clip", "nan"): "training.clip = 'nan'; allowed",
    ("weight_decay", "inf"): "training.weight_decay = 'inf'; allowed",
    ("settings.dropout", "high"): "network.settings.dropout = 'high'; allowed: a number, 0 or more, at most 1",
    ("settings.attention", 16): "network.settings.attention = 16; allowed: a list of numbers",
    ("settings.attention", "a"): "network.settings.attention = 'a'; allowed: a list of numbers",
    ("settings.film", "perhaps"): "network.settings.film = 'perhaps'; allowed: true or false",
    ("settings.shape", 3): "unknown key 'settings.shape'; allowed: widths",
    ("settings.num_classes", 3): "unknown key 'settings.num_classes'; allowed: widths",
    ("settings.blocks", 10**9): "network.settings.blocks = 1000000000; allowed: a whole number, 1 or more, at most 64",
    ("settings", 3): "network.settings = 3; allowed: a table",
    ("interval", "0.5"): "method.interval = ['0.5']; allowed: a list of 2 numbers",
    ("method", "cfg"): "method.name = 'cfg'; allowed: 'plain', 'aligned_loss'",
    ("network", "unet"): "network.name = 'unet'; allowed: 'unet-",
    ("path", "straight"): "network.path = 'straight'; allowed: 'flow'",
    ("sampler", "heum"): "sampling.sampler = 'heum'; allowed: 'ddim'",
    ("title", 3): "title = 3; allowed: text",
    ("flip", "maybe"): "data.flip = 'maybe'; allowed: true or false",
    ("stepz", 1): "unknown key 'stepz'; did you mean training.steps?",
    ("auto_every", 5): "method.auto_every = 5; allowed: 0, except for model_guidance",
}


@pytest.mark.parametrize(("change", "words"), BAD.items(), ids=[f"{key} {value}" for key, value in BAD])
def test_a_value_out_of_range_is_one_line(change, words):
    with pytest.raises(ValueError) as caught:
        override(Recipe(), dict([change]))
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("change", [{"n": 0}, {"steps": 0}, {"seed": 2**64}, {"scale": "nan"}, {"batch_size": 0}])
def test_a_request_out_of_range_is_one_line(change):
    with pytest.raises(ValueError, match=r"^(n|steps|seed|scale|batch_size) = .+; allowed: a (whole )?number[^\n]*$"):
        Request(**change)


def test_contradictions_are_refused():
    late = {"method": "model_guidance", "steps": 10, "start_step": 10}
    with pytest.raises(ValueError, match=r"method.start_step = 10; allowed: below training.steps = 10"):
        override(Recipe(), late)
    with pytest.raises(ValueError, match=r"method.weight = 'p2'; allowed: '', except for losses that train a denoiser"):
        override(Recipe(), {"method": "evaluation_classifier", "weight": "p2"})
    with pytest.raises(ValueError, match="allowed: methods that need no clean pictures"):
        override(Recipe(), {"method": "evaluation_classifier", "data": "latents:x"})
    with pytest.raises(ValueError, match=r"name is in several tables; allowed: network.name, method.name"):
        find_key("name")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\xef\xbb\xbfsteps = 7", None),
        (b"steps = [", "allowed: a TOML file"),
        (b"\xff\xfe", "cannot be read"),
        (b"[training]\nsteps = 1.5", "training.steps = 1.5; allowed: a whole"),
        (b"[training]\nstep = 1", "did you mean training.steps?"),
        (b"[network]\nsettings = 3", "a table"),
        (b"title = " + b"[" * 500 + b"]" * 500, ""),
        (b"title = " + b"[" * 50_000, "allowed: a TOML file"),
    ],
)
def test_recipe_files_of_all_kinds(tmp_path, content, words):
    "A byte order mark is read; what is damaged, and lists without end, are one line."
    (tmp_path / "mine.toml").write_bytes(content)
    if words is None:
        assert read_recipe(tmp_path / "mine.toml").training.steps == 7
        return
    with pytest.raises(ValueError) as caught:
        read_recipe(tmp_path / "mine.toml")
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("classes", "labels", "expected"),
    [
        (("1", "2", "3"), "balanced", [0, 1, 2, 0, 1, 2]),
        (("1", "2", "3"), "1,3", [0, 2, 0, 2, 0, 2]),
        (("10", "9"), "balanced", [0, 1, 0, 1, 0, 1]),
        (("1", "cat"), "1,cat", [0, 1, 0, 1, 0, 1]),
        (("cat", "dog"), "1,cat", [1, 0, 1, 0, 1, 0]),
    ],
)
def test_classes_named_by_numbers_are_names(classes, labels, expected):
    assert _read_labels(labels, 6, classes).tolist() == expected


def test_an_index_that_may_be_a_name_is_refused():
    with pytest.raises(ValueError, match="labels = '0'; allowed: 'balanced', 1, 2, 3"):
        _read_labels("0,1", 6, ("1", "2", "3"))
    with pytest.raises(ValueError, match="labels = 'cat'; allowed: 'balanced', 0 to 1, or lying, standing"):
        _read_labels("cat", 6, ("lying", "standing"))


@pytest.mark.parametrize("names", [["cat", "truck"], ["truck"], ["cat", "dog", "truck"]])
def test_classes_are_matched_by_name(names):
    "A folder that holds some of the classes numbers them 0, 1, ...: as the extractor numbers them they are others."
    known = ("airplane", "cat", "dog", "truck")
    extractor = Extractor("known", lambda images: {}, classes=known)
    labels = torch.arange(len(names)).repeat(3)
    found = _match_labels(SampleFile(torch.zeros(len(labels)), labels, {"classes": names}), extractor)
    assert [known[i] for i in found.tolist()] == [names[i] for i in labels.tolist()]
    with pytest.raises(ValueError, match="class of the samples = 'zebra'; allowed: 'airplane', 'cat', 'dog', 'truck'"):
        _match_labels(SampleFile(torch.zeros(1), torch.zeros(1).long(), {"classes": ["zebra"]}), extractor)


def test_a_part_of_a_data_set_is_the_same_part_every_time():
    data = ImageData(torch.arange(50, dtype=torch.uint8).view(50, 1, 1, 1), torch.arange(50), ("a",) * 50, (1, 1, 1))
    part = _take_images(data, 10)
    assert len(part) == 10 and len(set(part.labels.tolist())) == 10
    assert torch.equal(part.images(torch.arange(10)).flatten().long(), part.labels)
    assert torch.equal(part.labels, _take_images(data, 10).labels)


def test_a_measured_weight_moves_once_in_an_update_however_many_passes_it_takes():
    "Also where it is resumed at that update."
    asked, model = [], mlp_denoiser(2, FlowPath(), 3, width=8, depth=1)
    make = lambda: _MeasuredGuidanceLoss(ModelGuidanceLoss(), lambda ema: asked.append(ema) or 1.0, 2)  # noqa: E731
    loss, x0, c = make(), torch.zeros(4, 2), torch.arange(4) % 3
    for step in range(5):
        for _ in range(2):
            loss(model, x0, c, LossContext(torch.Generator(), step, 9, model))
    assert len(asked) == 2 and loss.auto.value == pytest.approx(0.2)
    again = make()
    again.load_state_dict(json.loads(json.dumps(loss.state_dict())))
    again(model, x0, c, LossContext(torch.Generator(), 4, 9, model))
    assert len(asked) == 2 and again.loss.weight() == pytest.approx(0.2)


def edit(checkpoint: Path, change) -> None:
    "Change the record of a checkpoint as another version of the package might have written it."
    record = json.loads((checkpoint / "checkpoint.json").read_text())
    change(record)
    (checkpoint / "checkpoint.json").write_text(_seal_record(record))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda r: r.update(format=99), "has format 99 (guidance_nb "),
        (lambda r: r["metadata"].clear(), "holds no recipe; allowed: checkpoints of `guidance-nb train`"),
        (lambda r: r["metadata"]["recipe"]["data"].update(colour=1), "holds a recipe of another version, "),
        (
            lambda r: r["metadata"]["recipe"]["network"].update(name="unet-small"),
            "allowed: the network of the checkpoint",
        ),
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
    assert generate(raw, Request(n=2), progress=False).facts["ema"] is False
    assert "ema" not in generate(mean, Request(n=2), progress=False).facts


def test_classifier_guidance_under_bf16(runs):
    base, guide = load_trained(runs / "base"), load_trained(runs / "classifier")
    exact = generate(base, Request(n=4, scale=3), guide, progress=False)
    low = generate(base, Request(n=4, scale=3, precision="bf16"), guide, progress=False)
    assert low.facts["arithmetic"] == "bf16" and exact.facts["arithmetic"] == "fp32"
    assert 0 < (low.x.int() - exact.x.int()).abs().max() <= 8
    with pytest.raises(ValueError, match="is for other images, classes or noise than"):
        _complete_request(load_trained(runs / "vp"), Request(n=4), guide)


def test_a_missing_compiler_is_bad_input(runs, monkeypatch):
    def fails(*args):
        raise RuntimeError("no g++")

    monkeypatch.setattr(torch, "compile", fails)
    with (
        pytest.raises(ValueError, match=r"compile = True \(no g\+\+\); allowed: False"),
        _autocast_and_compile(load_trained(runs / "base"), "fp32", True),
    ):
        pass
    with pytest.raises(ValueError, match="cuda_graphs = True; allowed: False on a CPU"):
        generate(load_trained(runs / "base"), Request(n=2, cuda_graphs=True), progress=False)
    with pytest.raises(ValueError, match="compile = True"):
        next(train_recipe(override(load_trained(runs / "base").recipe, {"compile": "true"}), runs / "base", False))


def test_features_are_named_after_what_they_were_trained_for(runs):
    file = load_samples(runs / "samples.npz")
    for folder, name in (("evaluation", "evaluation_classifier"), ("classifier", "classifier")):
        extractor = find_feature_extractor(str(runs / folder))
        real = extract(load_samples(runs / "images").x, extractor)
        row = score(file, real, extractor)
        assert {f"fd_{name}", f"agreement_{name}"} <= set(row) and row["extractor"] == name
        assert "agreement" not in "".join(score(SampleFile(file.x, None, {}), real, extractor))
    with pytest.raises(ValueError, match=r"method of .* = 'plain'; allowed: 'evaluation_classifier', 'classifier'"):
        find_feature_extractor(str(runs / "base"))


def test_a_grey_classifier_refuses_colours(runs, tmp_path, monkeypatch):
    trained = load_trained(runs / "evaluation")
    grey = replace(trained, shape=(1, 8, 8), model=make_model(trained.recipe, (1, 8, 8), 2).eval())
    monkeypatch.setattr(evaluation, "load_trained", lambda source: grey)
    extractor = find_feature_extractor(str(runs / "evaluation"))
    x = torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8)
    assert extract(x, extractor).n == 4
    with pytest.raises(ValueError, match=r"image shape = \(3, 8, 8\); allowed: \(1, 8, 8\), which .*; grey images may"):
        extract(x.repeat(1, 3, 1, 1) + torch.tensor([0, 1, 2], dtype=torch.uint8).view(3, 1, 1), extractor)


def test_an_adm_file_gives_the_metrics_it_can(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    real, name = load_real(str(tmp_path / "stats.npz"), "train", (3, 32, 32))
    extractor = Extractor(INCEPTION, lambda images: images)
    assert name == "stats.npz" and choose_metrics(real, extractor) == ("fd", "score")
    assert choose_metrics(real, extractor, None, "fid") == ("fd", "score")
    with pytest.raises(ValueError, match="best = 'kid'; allowed: 'fid', 'is'"):
        choose_metrics(real, extractor, None, "kid")
    with pytest.raises(ValueError, match="inception-v3-compat"):
        extract(read_reference(tmp_path / "stats.npz"), Extractor("other", lambda images: images))


def test_unlabelled_samples_meet_a_correction_with_classes(runs):
    file = load_samples(runs / "samples.npz")
    assert postprocess(load_trained(runs / "correction"), file, 2, progress=False).x.shape == file.x.shape
    with pytest.raises(ValueError, match="labels"):
        postprocess(load_trained(runs / "correction"), SampleFile(file.x, None, {}), 2, progress=False)


def row(**facts) -> dict:
    return dict.fromkeys(PROVENANCE, "") | {"method": "plain", "sampler": "heun", "steps": 4, "correction": ""} | facts


def test_a_point_is_found_again_whatever_its_numbers_look_like(tmp_path):
    file = tmp_path / "rows.csv"
    assert not _is_done(file, {"scale": 2.0})
    append_rows(file, [row(scale=2.0, n=100, seed=0, checkpoint="a/b")])
    assert _is_done(file, {"scale": 2, "n": 100, "steps": 4, "checkpoint": Path("a/b"), "classifier": ""})
    for other in ({"scale": 2.5}, {"n": 10}, {"checkpoint": "a/c"}, {"classifier": "c"}, {"correction": "d"}):
        assert not _is_done(file, {"scale": 2.0} | other)


@pytest.mark.parametrize(("best", "scale"), [("fd_seen", 2.0), ("agreement_seen", 3.0), ("score_seen", 1.0)])
def test_the_best_point(tmp_path, best, scale):
    values = {1.0: (5.0, 0.2, 9.0), 2.0: (3.0, 0.5, 8.0), 3.0: (4.0, 0.9, "")}
    keys = ("fd_seen", "agreement_seen", "score_seen")
    append_rows(tmp_path / "rows.csv", [row(method="real", fd_seen=0.1)])
    append_rows(tmp_path / "rows.csv", [row(scale=s, checkpoint="a", **dict(zip(keys, v))) for s, v in values.items()])
    append_rows(
        tmp_path / "rows.csv",
        [row(scale=9.0, checkpoint="b", fd_seen=0.2, agreement_seen=1.0, score_seen=10)],
    )
    assert finish_sweep(tmp_path, best, {"checkpoint": "a"})["scale"] == scale
    assert finish_sweep(tmp_path, best)["scale"] == 9.0
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    with pytest.raises(ValueError, match="no row of this sweep"):
        finish_sweep(tmp_path, best, {"checkpoint": "c"})


def test_the_baseline_is_as_large_as_there_are_images():
    published = Features("seen", {"features": torch.zeros(60_000, 1)}, name="mnist train")
    assert _baseline_size("mnist", published, 500) == ("test", 500)
    assert _baseline_size("mnist", published, 50_000) == ("test", 10_000)
    assert _baseline_size("mnist", replace(published, name="mnist test"), 500) == ("train", 500)
    assert _baseline_size("folder", replace(published, rows={"features": torch.zeros(31, 1)}), 500) == ("", 15)
    assert _baseline_size("stats.npz", Features(INCEPTION), 500) == ("", 0)


def test_points_of_a_sweep():
    points = sweep_points(Request(n=5, sampler="ddim"), (1.0, 2.0), (4, 8), ())
    assert [(p.scale, p.steps, p.sampler, p.n) for p in points] == [
        (1.0, 4, "ddim", 5), (2.0, 4, "ddim", 5), (1.0, 8, "ddim", 5), (2.0, 8, "ddim", 5)
    ]  # fmt: skip
    assert [p.scale for p in sweep_points(Request(), (1.0, 1.0, 2.0))] == [1.0, 2.0]
    with pytest.raises(ValueError, match="steps = 0; allowed: a whole number, 1 or more"):
        sweep_points(Request(), (1.0,), (0,))


@pytest.fixture(scope="module")
def guided(runs) -> tuple:
    "A network with label dropout, one with its scale built in, a scale-aware one, and two classifiers."
    for name, changes in (("mg", {"scale": 2.0}), ("aware", {"scale_range": "1,3"})):
        recipe = override(load_trained(runs / "base").recipe, {"method": "model_guidance"} | changes)
        for _ in train_recipe(recipe, runs / name, progress=False):
            pass
    return tuple(load_trained(runs / name) for name in ("base", "mg", "aware", "classifier", "evaluation"))


def test_the_method_of_a_checkpoint_says_how_it_is_guided(guided):
    plain, mg, aware, classifier, _ = guided
    views = [(plain, 3, None), (mg, None, None), (aware, 3, None), (plain, 3, classifier)]
    kinds = [type(build_guided(*view)).__name__ for view in views]
    assert kinds == ["ClassifierFreeGuidance", "NetworkDenoiser", "FixedScale", "ClassifierGuidance"]
    draw = lambda model, scale, by: generate(model, Request(n=2, steps=4, scale=scale), by, False)  # noqa: E731
    assert [draw(*view).facts["nfe"] for view in views[:3]] == [14, 7, 7]


def test_guidance_that_a_network_was_not_trained_for_is_refused(guided, runs):
    plain, mg, aware, classifier, evaluation = guided
    foreign = replace(classifier, classes=("cat", "dog"))
    for call, words in (
        (partial(build_guided, evaluation), "= 'evaluation_classifier'; allowed: 'plain'"),
        (partial(build_guided, mg, 3.0), "scale = 3; allowed: 2, which"),
        (partial(build_guided, plain, 2.0, evaluation), "allowed: 'classifier'"),
        (partial(build_guided, plain, float("nan")), "scale = nan; allowed: a finite number"),
        (partial(build_guided, aware, 2.0, None, (0, 0.5)), "only classifier-free guidance can pause"),
        (partial(build_guided, plain, 2.0, foreign), "is for other images, classes"),
        (partial(load_trained, runs / "images"), "holds no checkpoint"),
    ):
        with pytest.raises((ValueError, FileNotFoundError)) as caught:
            call()
        assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"labels": "cat"}, "labels = 'cat'; allowed: 'balanced', 0000, 0001"),
        ({"sampler": "heum"}, "sampler = 'heum'; allowed: 'ddim'"),
        ({"steps": -1}, "steps = -1; allowed: a whole number, 1 or more"),
        ({"seed": 2**64}, "seed = 18446744073709551616; allowed: a whole number, 0 or more"),
        ({"precision": "fp16"}, "precision = 'fp16'; allowed: 'fp32'"),
        ({"interval": (0.5, 0.2)}, "interval = (0.5, 0.2); allowed: two times, 0 <= first"),
        ({"vae": "vae"}, "base/step-00000002 was trained on pictures"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(runs, change, words):
    with pytest.raises(ValueError) as caught:
        generate(load_trained(runs / "base"), Request(n=2).changed(**change), progress=False)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_sample_is_that_of_its_number_and_seed(runs):
    base, ask = load_trained(runs / "base"), Request(n=4, batch_size=3)
    x = generate(base, ask, progress=False).x
    assert torch.equal(x[:2], generate(base, ask.changed(n=2), progress=False).x)
    assert not torch.equal(x, generate(base, ask.changed(seed=1), progress=False).x)


def test_images_of_another_size_are_neither_scored_nor_corrected(runs, tmp_path):
    small = SampleFile(load_samples(runs / "samples.npz").x[:, :, :4, :4], None, {})
    extractor = find_feature_extractor(str(runs / "evaluation"))
    real = extract(load_samples(runs / "images").x, extractor)
    with pytest.raises(ValueError, match=r"\(\(4, 4\), \(8, 8\)\); allowed: one size"):
        score(small, real, extractor)
    with pytest.raises(ValueError, match=r"\(8, 3, 4, 4\); allowed: floating-point values \[n, \*\[3, 8, 8\]\]"):
        postprocess(load_trained(runs / "correction"), small)
    with pytest.raises(ValueError, match=r"method of .* = 'plain'; allowed: 'flow_postprocessing'"):
        postprocess(load_trained(runs / "base"), small)
    save_samples(tmp_path / "small.npz", small.x)
    with pytest.raises(ValueError, match="allowed: one size"):
        load_real(str(tmp_path / "small.npz"), "train", (3, 8, 10))
    np.savez(tmp_path / "bad.npz", mu=np.zeros(2048))
    with pytest.raises(ValueError, match="with mu and sigma"):
        load_real(str(tmp_path / "bad.npz"))


def test_load_gives_a_ready_denoiser(runs):
    model, trained = load(runs / "base"), load_trained(runs / "base")
    assert isinstance(model, NetworkDenoiser) and not model.training
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), trained.model.parameters()))
    x, t, c = torch.randn(2, 3, 8, 8), torch.tensor(0.5), torch.tensor([0, 1])
    assert torch.equal(model(x, t, c).x0, trained.model(x, t, c).x0)
    with pytest.raises((ValueError, OSError), match="nowhere"):
        load(runs / "nowhere")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"batch_size": 10**9}, r"training.batch_size = 1000000000; allowed: at most 40"),
        ({"limit": 41}, r"data.limit = 41; allowed: at most 40"),
        ({"settings.widths": [2**19]}, r"needs \d+ GB to be trained; allowed: at most \d+ GB"),
    ],
)
def test_more_than_there_is_is_refused_before_any_work(runs, tmp_path, changes, words):
    recipe = override(load_trained(runs / "base").recipe, changes)
    with pytest.raises(ValueError, match=words):
        next(train_recipe(recipe, tmp_path / "run", progress=False))
    assert not (tmp_path / "run").exists()


def test_neighbours_by_what_a_classifier_sees(runs, monkeypatch):
    "The features of a classifier in a folder say who is near, and are no evaluations of a sampler."
    recipe, seen = override(load_trained(runs / "correction").recipe, {"space": "classifier"}), []
    monkeypatch.setattr(run_module, "pair_data", lambda x, real, c, labels, k, space, device: seen.append(space(x)))
    with count_nfe() as count:
        _read_pairs(override(recipe, {"weights": str(runs / "evaluation")}), make_data(recipe))
    model, x = load_trained(runs / "evaluation").model, load_samples(runs / "samples.npz").x
    torch.testing.assert_close(model.head(seen[0]), model(from_uint8(x), 0.0))
    assert count.total == 0
    with pytest.raises(ValueError, match=r"method of .* = 'plain'; allowed: 'evaluation_classifier'"):
        _read_pairs(override(recipe, {"weights": str(runs / "base")}), make_data(recipe))


@pytest.mark.parametrize("name, shape", [("cifar10-base", (3, 32, 32)), ("cifar10-evaluation-classifier", (3, 16, 16))])
def test_the_shape_of_a_recipe_is_that_of_its_data(name, shape):
    assert recipe_shape(read_recipe(name)) == (shape, 10)


def test_the_test_split_of_images_is_there(runs):
    assert len(make_data(load_trained(runs / "base").recipe)) == 40


@pytest.mark.parametrize(
    "facts",
    [
        {"interval": 3, "nfe": "many", "seconds": [1], "steps": {"a": 1}},
        {"classes": 3, "labels": [1], "scale": "x"},
        {"classes": {}, "seed": None, "method": [[]]},
    ],
)
def test_foreign_facts_stop_neither_scoring_nor_correcting(runs, facts):
    "What others wrote about their samples is theirs."
    file = load_samples(runs / "samples.npz")._replace(facts=facts)
    extractor = find_feature_extractor(str(runs / "evaluation"))
    row = score(file, extract(load_samples(runs / "images").x, extractor), extractor)
    assert row["n"] == len(file.x)
    assert postprocess(load_trained(runs / "correction"), file, 2, progress=False).facts["nfe"] > 0


def test_an_empty_table_is_a_new_one(tmp_path):
    "A binary one is refused in one line that names it."
    file = tmp_path / "rows.csv"
    file.write_text("")
    assert not _is_done(file, {"scale": 2.0})
    append_rows(file, [row(scale=2.0)])
    assert _is_done(file, {"scale": 2.0})
    file.write_bytes(bytes(range(128, 256)))
    with pytest.raises(ValueError, match=r"rows\.csv [^\n]*; allowed: [^\n]*$"):
        _is_done(file, {"scale": 2.0})


def test_without_inception_the_alternatives_come_first(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.delenv("GUIDANCE_NB_INCEPTION", raising=False)

    def offline(*args, **options):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match="allowed: another extractor") as caught:
        find_feature_extractor(INCEPTION)
    assert str(caught.value).index("resnet56") < str(caught.value).index(".pth")


def test_a_resume_may_state_what_changes(runs, tmp_path):
    recipe = override(load_trained(runs / "base").recipe, {"save_every": 1, "schedule": "constant"})
    run = lambda changes, *stated: [  # noqa: E731
        state.step for state in train_recipe(override(recipe, changes), tmp_path, False, stated)
    ]
    assert run({"steps": 2}) == [1, 2] and run({"steps": 3}) == [3]
    with pytest.raises(ValueError, match=r"has lr = 0.001, this run 0.0001; allowed"):
        run({"steps": 4, "lr": 1e-4})
    assert run({"steps": 4, "lr": 1e-4}, "lr") == [4]
