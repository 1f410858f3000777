"Stages, methods and scores of the comparison."

import pytest
import torch
from torch.testing import assert_close

from guidance_nb.comparison import (
    _NETWORKS,
    DATA,
    METHODS,
    _baseline_rows,
    _budget_for,
    _guided_model,
    _load_stage,
    _make_network,
    _save_stage,
    _score_toy,
    _Stage,
    _training_stage,
    load_problem,
)
from guidance_nb.denoisers import count_nfe
from guidance_nb.mixtures import ExactDenoiser


@pytest.fixture(scope="module")
def fractal():
    return load_problem("fractal")


def networks_for(method, problem, budget):
    "Untrained networks, with last layers that are not zero."
    made = []
    for name in _NETWORKS[method]:
        if name != "post":
            made.append(_make_network(_training_stage("fractal", 0, name, (1.0, 3.0), budget), problem))
            torch.nn.init.normal_(made[-1].net.read.weight, std=0.1)
    return made


@pytest.mark.parametrize(("method", "rows"), [("none", 1), ("exact", 0), ("aligned_loss", 2), ("model_guidance", 1)])
def test_each_method_costs_what_its_notebook_says(method, rows, fractal):
    budget = _budget_for("fractal", quick=True)
    model = _guided_model(method, networks_for(method, fractal, budget), fractal, 3.0, budget)
    with count_nfe() as counted:
        model.predict(torch.randn(10, 2), torch.tensor(0.5), torch.arange(10) % 2)
    assert counted.total == 10 * rows


@pytest.mark.parametrize("method", ["exact", "classifier_guidance", "classifier_free_guidance", "aligned_loss"])
def test_scale_one_is_the_conditional_model_or_says_otherwise(method, fractal):
    budget = _budget_for("fractal", quick=True)
    networks = networks_for(method, fractal, budget)
    model = _guided_model(method, networks, fractal, 1.0, budget)
    x, t, c = torch.randn(6, 2), torch.tensor(0.4), torch.arange(6) % 2
    plain = ExactDenoiser(fractal.mixture, model.path) if method == "exact" else networks[0]
    same = torch.allclose(model.predict(x, t, c).x0, plain.predict(x, t, c).x0)
    assert same == (method != "classifier_guidance")  # a learned classifier is not the ratio of two learned densities


def test_stage_files_depend_on_what_decides_the_result_and_on_nothing_else():
    budget, other = _budget_for("digits"), _budget_for("digits", quick=True)
    one = _Stage("digits", 0, "sample", "exact", (1.0, 2.0), budget)
    assert one.file == _Stage("digits", 0, "sample", "exact", (1.0, 2.0), budget).file
    changed = [
        _Stage("digits", 1, "sample", "exact", (1.0, 2.0), budget),
        _Stage("digits", 0, "sample", "none", (1.0, 2.0), budget),
        _Stage("digits", 0, "sample", "exact", (1.0, 3.0), budget),
        _Stage("digits", 0, "sample", "exact", (1.0, 2.0), other),
    ]
    assert len({s.file for s in [one, *changed]}) == 5


def test_every_method_needs_only_networks_that_exist():
    assert set(_NETWORKS) == set(METHODS)
    for method in METHODS:
        for need in _Stage("fractal", 0, "sample", method, (2.0,), _budget_for("fractal")).needs:
            assert need.kind == "train" and all(n.name == "base" for n in need.needs)


def test_a_stage_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    _save_stage(path, {"x": torch.ones(2)}, {"n": 1})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        _save_stage(path, {"x": torch.zeros(2)}, {"n": 2})
    assert_close(_load_stage(path)[0]["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("damage", [lambda b: b[:10], lambda b: b[:-4], lambda b: b"", lambda b: b"\xff" * 64])
def test_damaged_stages_are_reported(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    _save_stage(path, {"x": torch.arange(10.0)}, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="is damaged; allowed: delete it and start again") as caught:
        _load_stage(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", DATA)
def test_real_samples_score_better_than_noise(data):
    problem = load_problem(data)
    floor = _baseline_rows(data, 300, problem, seeds=1)[0]
    c = torch.arange(300) % problem.mixture.num_classes
    noise = _score_toy(
        data, torch.randn(300, problem.x.shape[1], generator=torch.Generator().manual_seed(0)), c, problem
    )
    for metric, more_is_better in (
        ("outlier_rate", False),
        ("coverage", True),
        ("sliced_wasserstein", False),
        ("nll", False),
        ("class_accuracy", True),
        ("frechet", False),
        ("precision", True),
    ):
        if metric in noise:
            assert (floor[metric] > noise[metric]) == more_is_better, metric
