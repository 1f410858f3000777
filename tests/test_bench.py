"The machinery of tools/bench.py, by a clock of our own and at tiny sizes; no timing is asserted."

import csv
from dataclasses import replace

import pytest
import torch

import bench
from bench import QUICK, Pair, Timing, check_same, count_units, describe, main, measure, store
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.model_guidance import ModelGuidanceLoss
from guidance_nb.training import DenoisingLoss


@pytest.fixture
def turns(monkeypatch):
    "A clock that stands still except where a side moves it, and the order in which the sides were called."
    now, calls = [0.0], []
    monkeypatch.setattr(bench.time, "perf_counter", lambda: now[0])

    def side(name, seconds):
        def work():
            calls.append(name)
            now[0] += seconds

        return work

    return side, calls


def test_sides_are_warmed_up_and_timed_in_both_orders(turns):
    side, calls = turns
    timing = measure(Pair("a/b", side("a", 3.0), side("b", 2.0)), replace(QUICK, seconds=25.0, rounds=(6, 6)))
    assert "".join(calls) == "ab" + "ab" + "abbaabbaabba"  # warm-up, one turn to plan the rounds, six rounds
    assert timing.ours == [3.0] * 6 and timing.other == [2.0] * 6


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 4), (40.0, 8), (1e6, 10)])
def test_rounds_fill_the_time_within_bounds(turns, seconds, rounds):
    side, _ = turns
    timing = measure(Pair("a/b", side("a", 3.0), side("b", 2.0)), replace(QUICK, seconds=seconds, rounds=(4, 10)))
    assert len(timing.ours) == rounds


def test_a_row_is_the_median_of_paired_ratios():
    "The machine slows down tenfold in one round: both sides do, and the ratio stays."
    timing = Timing([1.0, 2.2, 10.0, 1.4, 1.2], [1.0, 2.0, 10.0, 1.0, 1.0])
    row = describe(Pair("a/b", print, print, 1.1, note=lambda timing: f"{len(timing.ours)} rounds"), timing)
    assert [row[key] for key in ("ratio", "low_quartile", "high_quartile")] == ["1.1000", "1.0000", "1.2000"]
    assert (row["ours_first"], row["other_first"]) == ("1.0000", "1.2500")
    assert (row["rounds"], row["note"], row["goal"]) == (5, "5 rounds", "<= 1.1")
    half = describe(Pair("a/b", print, print, expected=0.5), timing)
    assert half["ratio"] == "2.2000" and half["goal"] == ""


@pytest.mark.parametrize(
    ("goal", "at_least", "verdict"),
    [(1.3, 0, "met"), (1.2, 0, "MISSED"), (0.8, 1, "met"), (0.81, 1, "MISSED"), (None, 0, "reported")],
)
def test_verdicts(goal, at_least, verdict):
    "Ours takes 1.25 times as long, so its speed is 0.8."
    assert (
        describe(Pair("a/b", print, print, goal, bool(at_least)), Timing([1.25] * 2, [1.0] * 2))["verdict"] == verdict
    )


def test_results_that_differ_are_refused():
    a = torch.tensor([1.0, -2.0])
    assert check_same(a, a) == "results equal" and "2e-05" in check_same(a * (1 + 2e-5), a)
    for other in (a + 0.01, a * float("nan")):
        with pytest.raises(RuntimeError, match="differ"):
            check_same(other, a)


def test_floors_count_rows_forward_and_backward():
    "Guided are nine rows of ten, in three quarters of the time: 3 + 2 * 0.675 units, over 3."
    sizes = replace(QUICK, batch=256)
    plain = count_units(DenoisingLoss(0.1), sizes, 1)
    assert plain == 3 * 256
    assert count_units(AlignedLoss(2.0), sizes, 1) == 2 * plain
    assert count_units(ModelGuidanceLoss(0.5), sizes, 3) / plain == pytest.approx(4.35 / 3, abs=0.04)


def test_tables_take_new_rows_for_old_ones_and_never_mix_columns(tmp_path):
    "What another processor or number of threads gave stays."
    path = tmp_path / "new" / "bench.csv"

    def row(name, ratio, hardware="this", threads=1):
        return {"benchmark": name, "ratio": ratio, "hardware": hardware, "threads": threads}

    old = [row("a/b", 1, "other"), row("a/b", 2), row("a/b", 3, threads=2), row("c/d", 4)]
    store(path, old)
    store(path, [row("a/b", 5)])
    with open(path, newline="") as file:
        assert [(row["benchmark"], row["ratio"]) for row in csv.DictReader(file)] == [
            ("a/b", "1"), ("a/b", "3"), ("c/d", "4"), ("a/b", "5"),
        ]  # fmt: skip
    text = path.read_text()
    with pytest.raises(SystemExit, match="columns"):
        store(path, [{"benchmark": "a/b"}])
    assert path.read_text() == text


def test_a_missing_peer_is_skipped_by_name(monkeypatch, capsys):
    def absent(sizes):
        "Needs a peer."
        raise ModuleNotFoundError(name="torchcfm")
        yield

    monkeypatch.setitem(bench.BENCHMARKS, "throughput", absent)
    assert bench.run_all(["throughput"], QUICK) == []
    assert "torchcfm is not installed" in capsys.readouterr().out


def test_unknown_names_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "sampler"])
    assert "choose from" in capsys.readouterr().err


def test_every_benchmark_runs_prints_and_saves(tmp_path, capsys):
    "Which also runs the checks that both sides compute the same thing."
    path = tmp_path / "bench.csv"
    main(["--quick", "--device", "cpu", "--threads", "1", "--out", str(path)])
    printed = capsys.readouterr().out
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        assert float(row["ratio"]) > 0 and float(row["low_quartile"]) <= float(row["high_quartile"])
        assert row["verdict"] == "reported" if not row["goal"] else row["verdict"] in ("met", "MISSED")
        assert (
            row["note"]
            and row["threads"] == "1"
            and row["hardware"]
            and row["processor"]
            and f"torch {torch.__version__}" in row["versions"]
        )
        assert any(line.startswith(row["benchmark"]) and row["verdict"] in line for line in printed.splitlines())
    goals = {row["benchmark"]: row["goal"] for row in rows if row["goal"]}
    speed = goals.pop("fit/torchcfm loop, speed", None)
    assert speed == ">= 1.1" or "torchcfm is not installed" in printed
    assert goals == {
        **{f"sampling/{name} {n}": "<= 1.02" for name in ("unet", "dit", "mlp") for n in (1, 2)},
        "model guidance/cfg": "<= 0.52",
        "cfg interval/share": "<= 1.03",
        "cfg interval/its calls": "<= 1.02",
        "ddim loop/diffusers 1": "<= 0.97",
        "ddim loop/diffusers 4": "<= 0.97",
        "euler loop/torchdiffeq": "<= 1",
        "aligned/plain step": "<= 1.9",
        "model guidance/plain step": "<= 1.48",
        "scoring all 64/features": "<= 1.1",
    }
    missed = [row["benchmark"] for row in rows if row["verdict"] == "MISSED"]
    assert f"{len(missed)} MISSED" in printed and all(name in printed.splitlines()[-1] for name in missed)
