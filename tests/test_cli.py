"The command line as a user meets it: a process, its exit code, its two streams and its files."

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from guidance_nb.comparison import DATA, METHODS

SCALES = ["--scales", "1,2"]


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from guidance_nb.cli import main; main()", *arguments]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    "One tour in miniature, shared by the tests below."
    out = tmp_path_factory.mktemp("tour") / "deeper" / "tour"
    return out, run("tour", "--quick", *SCALES, "--out", str(out))


def test_the_tour_writes_all_it_promises(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    expected = {(d, m, s) for d in DATA for m in METHODS for s in (("1.0",) if m == "none" else ("1.0", "2.0"))}
    assert {(r["data"], r["method"], str(float(r["scale"]))) for r in rows} == expected and len(rows) == len(expected)
    facts, metrics = (
        {"sampler", "steps", "rows_per_sample", "seconds", "seed"},
        {"class_accuracy", "outlier_rate", "recall"},
    )
    assert facts | metrics <= set(rows[0])
    for row in rows:
        metrics = ("outlier_rate", "coverage", "nll") if row["data"] == "fractal" else ("frechet", "precision")
        assert all(float(row[m]) == float(row[m]) for m in metrics)
    assert "classifier-free guidance" in process.stdout and "real samples" in process.stdout
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 7 and 'src="http' not in page
    assert not list(out.rglob("*.tmp"))


def test_a_second_tour_reuses_every_stage_and_changes_no_row(finished):
    out, _ = finished
    before = {p.name: p.stat().st_mtime_ns for p in (out / "stages").iterdir()}
    table = (out / "comparison.csv").read_bytes()
    assert run("tour", "--quick", *SCALES, "--out", str(out), "--data", "fractal,digits").returncode == 0
    assert {p.name: p.stat().st_mtime_ns for p in (out / "stages").iterdir()} == before
    assert (out / "comparison.csv").read_bytes() == table


def test_a_damaged_stage_is_named_and_nothing_is_lost(finished):
    out, _ = finished
    victim = sorted((out / "stages").glob("digits-0-sample-exact-*"))[0]
    whole, table = victim.read_bytes(), (out / "comparison.csv").read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    process = run("tour", "--quick", *SCALES, "--out", str(out))
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert victim.name in process.stderr and "delete it and start again" in process.stderr
    assert (out / "comparison.csv").read_bytes() == table
    victim.write_bytes(whole)


def test_a_killed_tour_starts_again_where_it_stopped(tmp_path):
    arguments = ("tour", "--quick", "--data", "fractal", "--scales", "2", "--out", str(tmp_path))
    process = subprocess.Popen(command(*arguments), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while len(done := list((tmp_path / "stages").glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert len(done) >= 2 and not (tmp_path / "comparison.csv").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in done}
    assert run(*arguments).returncode == 0
    assert all((tmp_path / "stages" / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    assert (tmp_path / "comparison.csv").exists() and (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scales", "1,two"), "scales = '1,two'; allowed: numbers separated by commas"),
        (("--scales", "nan"), "scales contains nan; allowed"),
        (("--scales", "-1"), "scales contains -1.0; allowed"),
        (("--data", "cifar"), "data = 'cifar'; allowed: 'fractal', 'digits'"),
        (("--seeds", "0"), "seeds = 0; allowed: 1 or more"),
        (("--out", "/proc/nowhere"), "out = '/proc/nowhere' cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path):
    process = run("tour", "--quick", "--out", str(tmp_path / "out"), *arguments)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert words in process.stderr and process.stderr.startswith("guidance-nb: ")


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "tour").write_text("mine")
    process = run("tour", "--quick", "--out", str(tmp_path / "tour"))
    assert process.returncode == 2 and "cannot be written" in process.stderr and process.stderr.count("\n") == 1
    assert (tmp_path / "tour").read_text() == "mine"


def test_help_and_version():
    assert run("--version").stdout.startswith("guidance-nb ")
    text = run("tour", "--help").stdout
    assert all(option in text for option in ("--data", "--seeds", "--out", "--scales", "--quick"))
    assert run("toor").returncode == 2


def test_an_interruption_says_what_to_do_and_leaves_no_process(tmp_path):
    arguments = ("tour", "--quick", "--data", "fractal", "--scales", "2", "--out", str(tmp_path))
    process = subprocess.Popen(command(*arguments), stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "stages").glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends on Ctrl-C: to the workers, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted; finished stages are kept, start again to continue" in errors
    assert "leaked" not in errors
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process of the tour outlives it")
