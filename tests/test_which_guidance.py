"The family side by side: the committed rows belong to this code, and the rule of the best scale restated by loops."

import functools
from pathlib import Path

import pandas as pd
import pytest
import torch
from page_code import page_code

from guidance_nb.comparison import load_problem, score_samples
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath

PAGE = page_code("26_which_guidance")
PAGE.load_problem = load_problem = functools.cache(load_problem)  # with its threshold; none of the tests changes it
TABLE = Path(__file__).parent.parent / "nbs" / "results" / "family.csv"


@pytest.fixture(scope="module")
def given():
    model, weak = (mlp_denoiser(2, FlowPath(), 2, width=8, depth=1, seed=seed) for seed in (0, 1))
    aware = mlp_denoiser(2, FlowPath(), 2, width=8, depth=1, scale_aware=True)
    names = ("model_guidance", "guidance_free_training", "distillation")
    return PAGE.Ingredients(model, weak, 0.9, dict.fromkeys(names, aware), lambda x0, c: x0.square().sum(1))


@pytest.mark.parametrize("name", PAGE.FAMILY)
def test_every_method_takes_all_steps_within_its_nfe(given, name):
    member, scale, budget = PAGE.FAMILY[name], PAGE.FAMILY[name].scales[-1], 20
    steps = PAGE._affordable_steps(member, given, scale, budget, 4)
    nfe_of = lambda steps: PAGE._sample_method(member, given, scale, steps, 4)[2]  # noqa: E731
    assert nfe_of(steps) <= budget or steps == 2
    assert nfe_of(steps + 1) > budget


@pytest.fixture(scope="module")
def exact():
    return PAGE._exact_ingredients(load_problem("fractal"), 1)


@pytest.mark.parametrize(
    ("name", "scale"), [("conditional", 1.0), ("projected", 3.0), ("interval", 2.0), ("clean classifier", 0.5)]
)
def test_committed_rows_are_of_this_code(exact, name, scale):
    table = pd.read_csv(TABLE).set_index(["model", "method", "scale", "seed"])
    row, problem = table.loc[("exact", name, scale, 1)], load_problem("fractal")
    x, c, rows = PAGE._sample_method(PAGE.FAMILY[name], exact, scale, int(row.steps), int(row.samples), 1)
    assert rows == row.nfe
    found = score_samples(x, c, problem)
    for key in ("outlier_rate", "coverage", "sliced_wasserstein"):
        assert found[key] == pytest.approx(row[key], abs=0.004)  # rounding moves a few samples in a thousand


def test_the_table_is_complete():
    table = pd.read_csv(TABLE)
    points = {(kind, *point, seed) for kind in PAGE._KINDS for point in PAGE._family_points(kind) for seed in range(3)}
    found = list(zip(table.model, table.method, table.scale, table.seed))
    assert set(found) == points and len(found) == len(points)
    assert (table.nfe[table.steps > 2] <= 65).all()


def test_best_scales_by_loops():
    table = pd.read_csv(TABLE)
    best = PAGE._best_scales(table).set_index(["model", "method"])

    def mean(kind, name, scale, key):
        part = table[(table.model == kind) & (table.method == name) & (table.scale == scale)]
        assert len(part) == 3
        return part[key].mean()

    for kind in PAGE._KINDS:
        least = 0.9 * mean(kind, "conditional", 1.0, "coverage")
        for name, member in PAGE.FAMILY.items():
            if kind == "exact" and member.trained:
                continue
            fine = [scale for scale in member.scales if mean(kind, name, scale, "coverage") >= least]
            assert ((kind, name) in best.index) == bool(fine)
            if fine:
                assert best.loc[(kind, name)].scale == min(fine, key=lambda s: mean(kind, name, s, "outlier_rate"))


def test_a_run_is_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr(PAGE, "_learned_ingredients", lambda *given: shortened)
    model = mlp_denoiser(2, FlowPath(), 2, width=8, depth=1)
    shortened = PAGE.Ingredients(model, model, 0.9, {}, lambda x0, c: x0.square().sum(1))
    few = {name: PAGE.FAMILY[name] for name in ("conditional", "projected")}
    monkeypatch.setattr(PAGE, "FAMILY", few)
    file, options = tmp_path / "family.csv", {"samples": 20, "budget": 6}
    PAGE.run_family(file, ("learned",), 2, **options)
    whole = pd.read_csv(file)
    assert len(whole) == 2 * (1 + len(PAGE._SCALES))
    whole.drop(index=[3, 7]).to_csv(file, index=False)
    PAGE.run_family(file, ("learned",), 2, **options)
    again = pd.read_csv(file).sort_values(["seed", "method", "scale"]).reset_index(drop=True)
    pd.testing.assert_frame_equal(again, whole.sort_values(["seed", "method", "scale"]).reset_index(drop=True))


def test_learned_ingredients_are_five_networks():
    tools = PAGE._learned_ingredients(load_problem("fractal"), steps=8)
    size = lambda model: sum(p.numel() for p in model.parameters())  # noqa: E731
    assert size(tools.weak) < size(tools.model) / 2
    assert all(net.scale_aware for net in tools.trained.values()) and len(tools.trained) == 3
    first = PAGE._learned_ingredients(load_problem("fractal"), steps=8)
    assert torch.equal(first.model.net.read.weight, tools.model.net.read.weight)


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match="kind = 'image'; allowed: 'exact', 'learned'"):
        PAGE._family_points("image")
