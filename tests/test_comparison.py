"The tour of the methods: its stages, what each method costs, its scores, and how its progress is counted."

import io
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Event

import pytest
import torch
from torch.testing import assert_close
from tqdm import tqdm

from guidance_nb.cli._tables import METHODS, METRICS
from guidance_nb.cli._tour import (
    NETWORKS,
    SCALES,
    SCORING,
    SECONDS,
    Job,
    Stage,
    baseline_rows,
    budget_for,
    guided_model,
    load_stage,
    make_network,
    plan,
    run_jobs,
    sample_method,
    save_stage,
    training_stage,
)
from guidance_nb.comparison import load_problem, score_samples
from guidance_nb.denoisers import count_nfe
from guidance_nb.mixtures import ExactDenoiser

QUICK = budget_for("fractal", quick=True)


@pytest.fixture(scope="module")
def fractal():
    return load_problem("fractal")


def networks_for(method, problem):
    "Untrained networks, with last layers that are not zero."
    made = {}
    for name in NETWORKS[method]:
        if name != "post":
            made[name] = make_network(training_stage("fractal", 0, name, (1.0, 3.0), QUICK), problem)
            torch.nn.init.normal_(made[name].net.read.weight, std=0.1)
    return made


@pytest.mark.parametrize(("method", "nfe"), [("none", 1), ("exact", 0), ("aligned_loss", 2), ("model_guidance", 1)])
def test_each_method_costs_what_its_page_says(method, nfe, fractal):
    model = guided_model(method, networks_for(method, fractal), fractal, 3.0)
    with count_nfe() as counted:
        model.predict(torch.randn(10, 2), torch.tensor(0.5), torch.arange(10) % 2)
    assert counted.total == 10 * nfe


@pytest.mark.parametrize("method", ["exact", "classifier_guidance", "classifier_free_guidance", "aligned_loss"])
def test_scale_one_is_the_conditional_model_or_says_otherwise(method, fractal):
    networks = networks_for(method, fractal)
    model = guided_model(method, networks, fractal, 1.0)
    x, t, c = torch.randn(6, 2), torch.tensor(0.4), torch.arange(6) % 2
    plain = ExactDenoiser(fractal.mixture, model.path) if method == "exact" else networks[NETWORKS[method][0]]
    same = torch.allclose(model.predict(x, t, c).x0, plain.predict(x, t, c).x0)
    assert same == (method != "classifier_guidance")  # a learned classifier is not the ratio of two learned densities


def test_stage_files_depend_on_what_decides_the_result_and_on_nothing_else():
    one = Stage("digits", 0, "sample", "exact", (1.0, 2.0), budget_for("digits"))
    assert one.file == replace(one).file
    changes = [{"seed": 1}, {"name": "none"}, {"scales": (1.0, 3.0)}, {"budget": QUICK}]
    assert len({one.file, *(replace(one, **change).file for change in changes)}) == 5


def test_other_scales_train_nothing_again_but_the_network_that_takes_a_scale():
    files = {
        (name, top): training_stage("fractal", 0, name, (1.0, top), QUICK).file
        for name in ("base", "mg_aware")
        for top in (2.0, 3.0)
    }
    assert files["base", 2.0] == files["base", 3.0] and files["mg_aware", 2.0] != files["mg_aware", 3.0]


def test_every_method_needs_only_networks_that_exist():
    assert set(NETWORKS) == set(METHODS)
    for method in METHODS:
        stage = Stage("fractal", 0, "sample", method, (2.0,), QUICK)
        drawn = {replace(stage, name="classifier_free_guidance")} if method == "flow_postprocessing" else set()
        assert {need for need in stage.needs if need.kind == "sample"} == drawn
        for need in {*stage.needs} - drawn:
            assert need.kind == "train" and all(n.name == "base" for n in need.needs)
            assert need.name in SECONDS["fractal"] and need.name in SECONDS["digits"]


def test_postprocessing_moves_the_samples_of_guidance_and_counts_what_both_cost(tmp_path, fractal):
    stage = Stage("fractal", 0, "sample", "flow_postprocessing", (1.0, 2.0), QUICK)
    network, guidance = stage.needs
    post, c = make_network(network, fractal), stage.labels(fractal)
    torch.nn.init.normal_(post.net.read.weight, std=0.1)
    drawn = {f"{scale:g} {steps}": torch.randn(len(c), 2) for scale, steps in guidance.jobs}
    save_stage(tmp_path / network.file, post.state_dict(), {})
    facts = {which: [30.0, 1000.0] for which in drawn}
    save_stage(tmp_path / guidance.file, {f"x {which}": x for which, x in drawn.items()}, facts)
    tensors, info = sample_method(stage, fractal, tmp_path)
    with count_nfe() as counted:
        post(drawn["2 8"], c)
    for which, x in drawn.items():
        assert_close(tensors[f"x {which}"], post(x, c), rtol=0, atol=0)
        assert_close(tensors[f"paths {which}"], torch.stack([x[:60], post(x, c)[:60]]), rtol=0, atol=0)
        assert info[which][0] == 30 + counted.total / len(c) > 30 and 1000 < info[which][1] < 1100


def test_a_stage_is_written_completely_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    save_stage(path, {"x": torch.ones(2)}, {"n": [1]})
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_stage(path, {"x": torch.zeros(2)}, {"n": [2]})
    assert_close(load_stage(path)[0]["x"], torch.ones(2))
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("damage", [lambda b: b[:10], lambda b: b[:-4], lambda b: b"", lambda b: b"\xff" * 64])
def test_damaged_stages_are_reported(tmp_path, damage):
    path = tmp_path / "x.safetensors"
    save_stage(path, {"x": torch.arange(10.0)}, {})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"is damaged \(.+\); allowed: delete it and start again") as caught:
        load_stage(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", METRICS)
def test_real_samples_score_better_than_noise(data):
    problem = load_problem(data)
    real = baseline_rows(data, 300, seeds=1)[0]
    c = torch.arange(300) % problem.mixture.num_classes
    x = torch.randn(300, problem.x.shape[1], generator=torch.Generator().manual_seed(0))
    noise = score_samples(x, c, problem)
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
            assert (real[metric] > noise[metric]) == more_is_better, metric


class Bar(tqdm):
    "A bar that remembers what it showed."

    def update(self, n=1):
        super().update(n)
        self.seen = [*getattr(self, "seen", []), self.n]


def test_the_bar_counts_a_job_in_full_only_when_it_is_done():
    jobs = [Job(time.sleep, (1.2,), 0.2), Job(int, ("2",), 0.1)]
    with ThreadPoolExecutor(2) as pool, Bar(total=0.3, disable=False, file=io.StringIO()) as bar:
        assert run_jobs(jobs, pool, 2, bar) == [None, 2]
    assert all(0.1 <= n <= 0.1 + 0.95 * 0.2 + 1e-9 for n in bar.seen[:-1]) and len(bar.seen) > 2
    assert bar.seen == sorted(bar.seen) and bar.seen[-1] == pytest.approx(0.3)


def test_the_bar_expects_of_a_job_what_those_before_it_took():
    jobs = [Job(time.sleep, (0.5,), 10), Job(time.sleep, (1.7,), 10)]
    with ThreadPoolExecutor(1) as pool, Bar(total=20, disable=False, file=io.StringIO()) as bar:
        run_jobs(jobs, pool, 1, bar)
    assert max(bar.seen[:-1]) == pytest.approx(10 + 0.95 * 10) and bar.seen == sorted(bar.seen)


def test_a_job_begins_as_soon_as_a_worker_is_free_and_what_it_needs_is_there():
    order: list[str] = []
    first, slow = Event(), Event()
    calls = {
        "base": first.set,
        "slow": lambda: slow.wait(9),
        "post": lambda: first.is_set() and slow.set(),  # while the slow one still runs
        "last": lambda: order == ["base", "post", "slow"],
    }
    after = {"post": {0}, "last": {1, 2}}

    def call(name: str) -> object:
        found = calls[name]()
        order.append(name)
        return found

    jobs = [Job(call, (name,), 1, frozenset(after.get(name, ()))) for name in calls]
    with ThreadPoolExecutor(4) as pool, Bar(total=4, file=io.StringIO()) as bar:
        assert run_jobs(jobs, pool, 2, bar)[1:] == [True, None, True]


def test_the_plan_waits_for_networks_and_reuses_files(tmp_path):
    stages = [Stage(data, 0, "sample", method, SCALES, QUICK) for data in METRICS for method in METHODS]
    jobs = plan(stages, tmp_path)
    for number, job in enumerate(jobs):
        stage = job.arguments[0]
        assert all(n < number for n in job.after)
        assert {jobs[n].arguments[0] for n in job.after} == set(stage.needs)
    assert [job.arguments[0].name for job in jobs[:4]] == ["base", "base", "post", "post"]
    for job in jobs[: -len(stages)]:
        (tmp_path / job.arguments[0].file).touch()
    again = plan(stages, tmp_path)
    assert [job.arguments[0] for job in again] == stages
    for job in again:
        drawn = [need for need in job.arguments[0].needs if need.kind == "sample"]
        assert [again[n].arguments[0] for n in job.after] == drawn
    for stage in stages:
        (tmp_path / stage.file).touch()
    assert {job.seconds for job in plan(stages, tmp_path)} == {SCORING}


@pytest.mark.parametrize("data", METRICS)
def test_sampling_and_scoring_have_their_share_of_the_bar(data):
    stages = [Stage(data, 0, "sample", method, SCALES, budget_for(data)) for method in METHODS]
    training = {need: need.seconds for stage in stages for need in stage.needs if need.kind == "train"}
    last = sum(stage.seconds for stage in stages)
    assert 0.1 < last / (last + sum(training.values())) < 0.4
