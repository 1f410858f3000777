"The command line as a user meets it: a process, its exit code, its two streams and its files."

import csv
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.main import get_command
from typer.testing import CliRunner

import apart
from guidance_nb.cli._app import app, main, parse_keys
from guidance_nb.cli._recipe import FineTuning, Recipe, find_key, override, read_recipe, recipe_names
from guidance_nb.cli._run import Request, _take_images, train_recipe
from guidance_nb.cli._tables import METHODS, METRICS
from guidance_nb.engine._checkpoints import checkpoints_in, read_checkpoint
from guidance_nb.images._data import load_images, load_samples, save_samples
from notebooks import ROOT, cells, text

SCALES = ["--scales", "1,2"]
EVALUATION, SEEN = "mnist-evaluation-classifier", "evaluation_classifier"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from guidance_nb.cli._app import main; main()", *arguments]


def run(*arguments: str, **options) -> subprocess.CompletedProcess:
    return apart.run(command(*arguments), capture_output=True, text=True, timeout=1800, **options)


def run_tour(*arguments: str) -> subprocess.CompletedProcess:
    "With workers that begin with their imports, too; how the tour makes its own is held where it is stopped."
    code = "import multiprocessing, apart; made = apart.context(); multiprocessing.get_context = lambda kind: made; "
    tour = [sys.executable, "-c", code + "from guidance_nb.cli._app import main; main()", "tour", "--quick"]
    return apart.run([*tour, *arguments], capture_output=True, text=True, timeout=1800)


def run_anew(*arguments: str, **options) -> subprocess.CompletedProcess:
    "With imports of its own."
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=1800, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    "One tour in miniature, shared by the tests below."
    out = tmp_path_factory.mktemp("tour") / "deeper" / "tour"
    return out, run_tour(*SCALES, "--out", str(out))


def test_the_tour_writes_all_it_promises(finished):
    out, process = finished
    assert process.returncode == 0, process.stderr
    rows = list(csv.DictReader((out / "comparison.csv").read_text().splitlines()))
    expected = {(d, m, s) for d in METRICS for m in METHODS for s in (("1.0",) if m == "none" else ("1.0", "2.0"))}
    assert {(r["data"], r["method"], str(float(r["scale"]))) for r in rows} == expected and len(rows) == len(expected)
    facts, metrics = (
        {"sampler", "steps", "nfe", "seconds", "seed"},
        {"class_accuracy", "outlier_rate", "recall"},
    )
    assert facts | metrics <= set(rows[0])
    for row in rows:
        metrics = ("outlier_rate", "coverage", "nll") if row["data"] == "fractal" else ("frechet", "precision")
        assert all(float(row[m]) == float(row[m]) for m in metrics)
    nfe = {(row["method"], float(row["scale"])): float(row["nfe"]) for row in rows if row["data"] == "fractal"}
    assert nfe["classifier_free_guidance", 2] == 2 * nfe["model_guidance", 2] == 30  # 8 Heun steps: 15 evaluations
    assert "classifier-free guidance" in process.stdout and "real samples" in process.stdout
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == 7 and 'src="http' not in page
    assert not list(out.rglob("*.tmp"))


@pytest.fixture
def warm(monkeypatch):
    "Workers of a tour in this process begin with their imports."
    made = apart.context()
    monkeypatch.setattr("guidance_nb.cli._tour.multiprocessing.get_context", lambda kind: made)


@pytest.fixture
def no_page(monkeypatch, warm):
    "The first tour's page is looked at; drawing it again would be most of the time of the tours after it."
    monkeypatch.setattr("guidance_nb.cli._tour.write_page", lambda *_: None)


def test_a_second_tour_reuses_every_stage_and_changes_no_row(finished, no_page):
    out, _ = finished
    before = {p.name: p.stat().st_mtime_ns for p in (out / "stages").iterdir()}
    table = (out / "comparison.csv").read_bytes()
    done("tour", "--quick", *SCALES, "--out", str(out), "--data", "fractal,digits")
    assert {p.name: p.stat().st_mtime_ns for p in (out / "stages").iterdir()} == before
    assert (out / "comparison.csv").read_bytes() == table


def test_a_damaged_stage_is_named_and_nothing_is_lost(finished):
    out, _ = finished
    victim = sorted((out / "stages").glob("digits-0-sample-exact-*"))[0]
    whole, table = victim.read_bytes(), (out / "comparison.csv").read_bytes()
    victim.write_bytes(whole[: len(whole) // 2])
    process = run_tour(*SCALES, "--out", str(out))
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert victim.name in process.stderr and "delete it and start again" in process.stderr
    assert (out / "comparison.csv").read_bytes() == table
    victim.write_bytes(whole)


def no_process_of(process: subprocess.Popen, deadline: float) -> None:
    "Wait until a session of processes has ended."
    while time.monotonic() < deadline:
        try:
            os.killpg(process.pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    raise AssertionError("a process of the tour outlives it")


def test_a_killed_tour_starts_again_where_it_stopped(tmp_path, warm):
    arguments = ("tour", "--quick", "--data", "fractal", "--scales", "2", "--out", str(tmp_path))
    process = apart.Popen(command(*arguments), stderr=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 200
    while len(stages := list((tmp_path / "stages").glob("*.safetensors"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()  # the main process alone; its workers have to notice
    process.wait()
    no_process_of(process, deadline)
    assert len(stages) >= 2 and not (tmp_path / "comparison.csv").exists()
    kept = {p.name: p.stat().st_mtime_ns for p in stages}
    done(*arguments)
    assert all((tmp_path / "stages" / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    assert (tmp_path / "comparison.csv").exists() and (tmp_path / "index.html").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--scales", "1,two"), "scales = '1,two'; allowed: numbers separated by commas"),
        (("--scales", "nan"), "scales = (nan,); allowed"),
        (("--scales", "-1"), "scales = (-1.0,); allowed"),
        (("--data", "cifar"), "data = 'cifar'; allowed: 'fractal', 'digits'"),
        (("--seeds", "0"), "Invalid value for '--seeds': "),
        (("--out", "/proc/nowhere"), "out = '/proc/nowhere' cannot be written"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, words, tmp_path):
    out = () if "--out" in arguments else ("--out", str(tmp_path / "out"))
    process = run("tour", "--quick", *out, *arguments)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert words in process.stderr and process.stderr.startswith("guidance-nb: ")


def test_out_may_not_be_a_file(tmp_path):
    (tmp_path / "tour").write_text("mine")
    process = run("tour", "--quick", "--out", str(tmp_path / "tour"))
    assert process.returncode == 2 and "cannot be written" in process.stderr and process.stderr.count("\n") == 1
    assert (tmp_path / "tour").read_text() == "mine"


def test_help_and_version():
    assert run_anew("--version").stdout.startswith("guidance-nb ")
    text = run("tour", "--help").stdout
    assert all(option in text for option in ("--data", "--seeds", "--out", "--scales", "--quick"))
    assert run("toor").returncode == 2


def test_an_interruption_says_what_to_do_and_leaves_no_process(tmp_path):
    arguments = ("tour", "--quick", "--data", "fractal", "--scales", "2", "--out", str(tmp_path))
    process = apart.Popen(command(*arguments), stderr=subprocess.PIPE, start_new_session=True, text=True)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "stages").glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)  # what a terminal sends on Ctrl-C: to the workers, too
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    assert "interrupted; what is finished is kept, start again to go on" in errors
    assert "leaked" not in errors
    no_process_of(process, deadline)


TINY = {
    "network": "unet-tiny",
    "precision": "fp32",
    "warmup": "0",
    "grid_every": "0",
    "sampler_steps": "2",
    "ema": "0.8",
}


def flags(**changes) -> list[str]:
    return [word for key, value in (TINY | changes).items() for word in (f"--{key}", str(value))]


def here(*words: str):
    "A command in this process, which saves the start; what it raises is what `main` turns into one line."
    return CliRunner().invoke(app, [*words], env={"COLUMNS": "100", "TERM": "dumb"})


def done(*words: str) -> str:
    result = here(*words)
    assert result.exit_code == 0, (words, result.exception, result.output)
    return result.output


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    "Images of two classes."
    folder, draws = tmp_path_factory.mktemp("pictures") / "images", torch.Generator().manual_seed(0)
    save_samples(folder, torch.randint(0, 256, (24, 3, 8, 8), generator=draws, dtype=torch.uint8), torch.arange(24) % 2)
    return folder


@pytest.fixture(scope="module")
def life(data, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    "From recipe to corrected and scored digits on the real MNIST, as a new user types it; what each command printed."
    root, said = tmp_path_factory.mktemp("life"), {}
    part = _take_images(load_images("mnist"), 60)
    save_samples(root / "real.npz", part.images(torch.arange(60)), part.labels)
    run = lambda name: str(root / "runs" / name)  # noqa: E731
    common = flags(limit=1000, batch_size=32, save_every=10)
    for name, steps in ((EVALUATION, 20), ("mnist-base", 10)):
        said[name] = done("train", name, "--out", run(name), "--no-progress", *common, "--steps", str(steps))
    scored = ["--features", run(EVALUATION), "--reference", str(root / "real.npz"), "--no-progress"]
    rows = ["--rows", str(root / "rows.csv")]
    base, corrected = str(root / "base.npz"), str(root / "corrected.npz")
    said["sample"] = done("sample", run("mnist-base"), "--n", "20", "--out", base, "--no-progress")
    said["evaluate"] = done("evaluate", base, *scored, *rows)
    post = ["--samples", base, "--neighbours", "3", "--steps", "5"]
    said["post"] = done("train", "mnist-post", "--out", run("mnist-post"), "--no-progress", *common, *post)
    done("postprocess", run("mnist-post"), base, "--out", corrected, "--steps", "2", "--no-progress")
    done("evaluate", corrected, *scored, *rows)
    where = ["--out", str(root / "sweep"), "--n", "20", "--scales", "1,2", *scored]
    said["sweep"] = done("sweep", run("mnist-base"), *where, "--correction", run("mnist-post"))
    return root, said


def test_the_whole_life_on_mnist(life):
    root, said = life
    assert said["mnist-base"].startswith("10 steps done, loss ")
    assert "20 samples, NFE 4, " in said["sample"]
    assert load_samples(root / "base.npz").c.tolist() == [*range(10)] * 2
    before, after = csv.DictReader((root / "rows.csv").read_text().splitlines())
    assert (before["n"], before["reference_n"], before["scale"], before["extractor"]) == (
        "20",
        "60",
        "2.0",
        "evaluation_classifier",
    )
    assert before["correction"] == "" and after["correction"].endswith("mnist-post/step-00000005")
    assert float(after["nfe"]) == float(before["nfe"]) + 4
    assert "fd_evaluation_classifier" in said["evaluate"] and "method real" in said["evaluate"]
    assert "MNIST with label dropout" in done("info", str(root / "runs" / "mnist-base"))
    assert '"sampler_steps"' not in done("info", str(root / "base.npz")) and "20 samples" in done(
        "info", str(root / "base.npz")
    )


def test_a_picture_of_samples_is_a_grid(life, tmp_path):
    "A column for each class, ten rows unless asked otherwise; it is replaced only when told so."
    root, _ = life
    words = ["sample", str(root / "runs" / "mnist-base"), "--steps", "1", "--no-progress", "--out"]
    file = str(tmp_path / "digits.png")
    assert "100 samples, NFE" in done(*words, file)
    assert Image.open(file).size == (10 * 29 + 1, 10 * 29 + 1)
    assert isinstance(here(*words, file).exception, ValueError)
    assert "20 samples, NFE" in done(*words, file, "--n", "20", "--overwrite")
    assert Image.open(file).size == (10 * 29 + 1, 2 * 29 + 1)


def test_memory_that_ends_is_one_line():
    "Also while a library is imported."
    limit = "import resource; resource.setrlimit(resource.RLIMIT_AS, (600 * 2**20, 600 * 2**20))"
    code = f"{limit}; from guidance_nb.cli import _main; _main()"
    process = subprocess.run([sys.executable, "-c", code, "info", "mnist-base"], capture_output=True, text=True)
    assert process.returncode == 2 and "Traceback" not in process.stderr
    assert process.stderr.splitlines()[-1].startswith("guidance-nb: ")


def test_a_sweep_goes_on_at_the_first_missing_point(life):
    root, said = life
    table = (root / "sweep" / "rows.csv").read_text().splitlines()
    assert [row["method"] for row in csv.DictReader(table)] == ["real"] + ["plain"] * 4
    assert (
        said["sweep"].count("fd_evaluation_classifier") == 7
        and "best point by fd_evaluation_classifier" in said["sweep"]
    )
    (root / "sweep" / "rows.csv").write_text("\n".join([*table[:3], *table[4:]]) + "\n")
    stamp = (root / "sweep" / "curves.png").stat().st_mtime_ns
    scored = [
        "--features",
        str(root / "runs" / EVALUATION),
        "--reference",
        str(root / "real.npz"),
        "--no-progress",
    ]
    where = ["--out", str(root / "sweep"), "--n", "20", "--scales", "1,2", *scored]
    again = done("sweep", str(root / "runs" / "mnist-base"), *where, "--correction", str(root / "runs" / "mnist-post"))
    assert again.count("fd_evaluation_classifier") == 3  # the row that was missing, the headline and the best
    now = (root / "sweep" / "rows.csv").read_text().splitlines()
    drop = lambda line: line.split(",")[15:]  # noqa: E731
    assert len(now) == len(table) and len(drop(now[-1])) == len(drop(table[3]))
    assert (root / "sweep" / "curves.png").stat().st_mtime_ns > stamp


def test_bad_input_on_real_models(life, tmp_path):
    root, _ = life
    base, evaluation, real = (str(root / name) for name in ("runs/mnist-base", f"runs/{EVALUATION}", "real.npz"))
    np.savez(tmp_path / "floats.npz", arr_0=np.zeros((4, 28, 28, 1)))
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((4, 20, 20, 1), np.uint8))
    np.savez(tmp_path / "few.npz", arr_0=np.zeros((3, 28, 28, 1), np.uint8))
    np.savez(tmp_path / "keys.npz", mean=np.zeros(3))
    (tmp_path / "empty").mkdir()
    scored = ["--features", evaluation, "--no-progress"]
    for words, message in (
        (
            [
                "train",
                "mnist-base",
                "--out",
                base,
                *flags(limit=1000, batch_size=32, steps=10, network="unet-small"),
            ],
            "has recipe.network.name",
        ),
        (
            ["sample", evaluation, "--out", str(tmp_path / "x.npz")],
            "= 'evaluation_classifier'; allowed: 'plain'",
        ),
        (["sample", str(tmp_path / "empty"), "--out", str(tmp_path / "x.npz")], "holds no checkpoint"),
        (["sample", base, "--n", "0", "--out", str(tmp_path / "x.npz")], "n = '0'; allowed"),
        (["sample", base, "--steps", "-3", "--out", str(tmp_path / "x.npz")], "steps = '-3'; allowed"),
        (["sample", base, "--out", real], "allowed: a new .npz, .png or folder, or --overwrite"),
        (["sample", base, "--out", str(root), "--overwrite"], "or --overwrite, for samples alone"),
        (["sample", base, "--classifier", evaluation, "--out", str(tmp_path / "x.npz")], "allowed: 'classifier'"),
        (["evaluate", str(tmp_path / "floats.npz"), "--reference", real, *scored], "arr_0 is float64"),
        (
            ["evaluate", str(tmp_path / "small.npz"), "--reference", real, *scored],
            "reference = ((20, 20), (28, 28)); allowed: one size",
        ),
        (
            ["evaluate", real, "--reference", str(tmp_path / "few.npz"), *scored],
            "[n, ...] with n >= 4",
        ),
        (
            ["evaluate", real, "--reference", str(tmp_path / "keys.npz"), *scored],
            "with mu and sigma",
        ),
        (["evaluate", real, "--reference", real, "--metrics", "fid", *scored], "since 'fid' is Inception's"),
        (["postprocess", base, real, "--out", str(tmp_path / "x.npz")], "allowed: 'flow_postprocessing'"),
        (
            ["sweep", base, "--reference", real, "--best", "fid", "--out", str(tmp_path / "s"), *scored],
            "best = 'fid'; allowed: 'fd_evaluation_classifier'",
        ),
    ):
        result = here(*words)
        assert isinstance(result.exception, ValueError | OSError), (words, result.exception, result.output)
        assert message in str(result.exception), (words, result.exception)
        assert not (tmp_path / "x.npz").exists() and not (tmp_path / "s" / "rows.csv").exists()


@pytest.mark.parametrize("words, code", [(["--help"], 0), (["sample", "nothing-there"], 2)])
def test_a_command_parts_from_the_other_processes(words, code, tmp_path, monkeypatch):
    "Else a thread of the process group may still run when Python ends, and abort a command that has done its work."
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    monkeypatch.setattr(sys, "argv", ["guidance-nb", *words])
    try:
        with pytest.raises(SystemExit) as end:
            main()
        assert (end.value.code or 0) == code and not torch.distributed.is_initialized()
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def test_two_processes_draw_what_one_draws(life, tmp_path):
    root, _ = life
    words = command(
        "sample", str(root / "runs" / "mnist-base"), "--n", "20", "--no-progress", "--out", str(tmp_path / "two.npz")
    )
    start = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python", "--"]
    launch = [sys.executable, "-m", *start]
    process = apart.run([*launch, *words], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    one, two = load_samples(root / "base.npz"), load_samples(tmp_path / "two.npz")
    assert torch.equal(one.x, two.x) and torch.equal(one.c, two.c)
    assert one.facts["nfe"] == two.facts["nfe"] and process.stdout.count("20 samples") == 1


def test_interrupted_killed_and_resumed_equals_uninterrupted(pictures, tmp_path):
    changes = {"data": str(pictures), "steps": "40", "batch_size": "8", "save_every": "2", "keep": "3"}
    arguments = ("train", "mnist-base", "--out", str(tmp_path / "run"), "--no-progress", *flags(**changes))
    for sent, code in ((signal.SIGINT, 130), (signal.SIGKILL, -signal.SIGKILL)):
        start = len(checkpoints_in(tmp_path / "run")) and int(checkpoints_in(tmp_path / "run")[0].name[5:])
        process = apart.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not any(int(p.name[5:]) > start for p in checkpoints_in(tmp_path / "run")) and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(sent)
        _, errors = process.communicate(timeout=100)
        if process.returncode:  # it may have been quicker than we
            assert process.returncode == code and "Traceback" not in errors
            last = errors.splitlines()[-1] if errors else ""
            assert sent == signal.SIGKILL or last.startswith("guidance-nb: interrupted; what is finished is kept")
    assert done(*arguments).startswith("40 steps done")
    recipe = override(read_recipe("mnist-base"), TINY | changes)
    assert [state.step for state in train_recipe(recipe, tmp_path / "whole", progress=False)][-1] == 40
    ends = [read_checkpoint(tmp_path / name) for name in ("run", "whole")]
    for part in ("model", "ema", "optimizer"):
        a, b = (getattr(end, part) for end in ends)
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train mnist-bsae", "a TOML file such as `guidance-nb info` shows, or a name such as mnist-base"),
        ("train mnist-base --out out --stepz 3", "unknown key 'stepz'; did you mean training.steps?"),
        ("train mnist-base --out out --lr", "--lr has no value; allowed: --lr value"),
        ("train mnist-base --out out --lr --flip", "--lr has no value; allowed: --lr value"),
        ("train mnist-base --out out --steps 3 --training.steps 4", "once, and '3' was given before"),
        ("train mnist-base --out out --out other", "--out = "),
        ("train mnist-base --out=", "--out = ''; allowed: a value"),
        ("train --out out --lr 1e-3", "names = []; allowed: one, besides --key value"),
        ("train mnist-base mnist-mg", "names = ['mnist-base', 'mnist-mg']; allowed: one, besides"),
        ("sample nowhere --n 3 --n 4", "--n = '4'; allowed: once, and '3' was given before"),
        ("sample nowhere --seed 18446744073709551616", "seed = '18446744073709551616'; allowed: a whole number"),
        ("sample nowhere --steps 0", "steps = '0'; allowed: a whole number, 1 or more"),
        ("sample nowhere --out x.jpg", "out = 'x.jpg'; allowed: a new .npz, .png or folder"),
        ("sweep nowhere --steps 0", "steps = 0; allowed: a whole number, 1 or more"),
        ("evaluate nowhere.npz --metrics=", "--metrics = ''; allowed: a value"),
        ("train --lr 2 mnist-base", "training.lr = '2'; allowed: a number, above 0, at most 1"),
        ("train mnist-base --steps many", "training.steps = 'many'; allowed: a whole number"),
        ("train sit-b2-mg --source latents:nowhere", "nowhere/latents.json cannot be read"),
        ("tour --scales 1,nan", "scales = (1.0, nan); allowed"),
        ("sample nowhere", "model = 'nowhere'; allowed: a folder that is there, or"),
        ("sample nowhere --interval 0", "interval = ['0']; allowed: a list of 2 numbers"),
        ("sweep nowhere --samplers heum", "sampler = 'heum'; allowed: 'ddim'"),
        ("evaluate nowhere.npz", "nowhere.npz cannot be read (there is no such file"),
        ("encode nowhere out --vae nowhere", "config.json"),
        ("cost mnist-evaluation-classifier", "method.name = 'evaluation_classifier'; allowed: 'plain', 'aligned"),
        ("cost sit-b2-mg --gpus some", "gpus = 'some'; allowed: whole numbers separated by commas"),
        ("info mnist-bsae", "or a name such as mnist-base"),
        ("sweep nowhere --steps 1.5", "steps = '1.5'; allowed: whole numbers separated by commas"),
    ],
)
def test_mistakes_cost_nothing(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = here(*words.split())
    assert isinstance(result.exception, ValueError | OSError) and message in str(result.exception)
    assert not list(tmp_path.iterdir())


def test_bad_input_to_a_process_is_one_line(tmp_path):
    process = run_anew("info", "mnist-bsae", cwd=tmp_path)
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert process.stderr.startswith("guidance-nb: recipe = 'mnist-bsae' cannot be read") and not process.stdout


def test_the_session_of_the_page_is_made_of_words_that_exist():
    page = "\n".join(text(cell["source"]) for cell in cells(ROOT / "nbs" / "30_cli.ipynb"))
    lines = re.findall(r"^ *(?:Example: )?(guidance-nb .+)$", page.replace("\\\n", " "), re.MULTILINE)
    commands, seen = get_command(app).commands, set()
    kinds = {"train": Recipe, "cost": Recipe, "finetune": FineTuning, "sample": Request, "sweep": Request}
    names = {"train": recipe_names(), "cost": recipe_names(), "finetune": recipe_names(FineTuning)}
    for line in lines:
        _, name, *words = shlex.split(line, comments=True)
        known = {option for p in commands[name].params for option in (*p.opts, *p.secondary_opts)}
        for word in (word for word in words if word.startswith("--")):
            assert word in known or find_key(word[2:], kinds[name]), line
        assert name not in names or words[0] in names[name]
        seen.add(name)
    assert seen >= {"train", "info", "sample", "evaluate", "postprocess", "sweep"} and len(lines) >= 12


def test_a_correction_without_samples_is_refused(data, tmp_path):
    result = here("train", "mnist-post", "--out", str(tmp_path / "run"))
    assert isinstance(result.exception, ValueError)
    assert "method.samples = (); allowed: sample files" in str(result.exception)


def test_flags_are_read_by_key():
    "In full or by the last part, with = or without; a switch is on, or with no- off."
    read = lambda *words: parse_keys(["mnist-base", *words], Recipe)[1]  # noqa: E731
    assert read("--steps", "10", "--method.scale=1.5") == {"training.steps": "10", "method.scale": "1.5"}
    assert read("--flip", "--no-compile") == {"data.flip": "true", "training.compile": "false"}
    for words, message in (
        (("--lr", "--flip"), "--lr has no value; allowed: --lr value"),
        (("--lr", "1", "--training.lr", "2"), "allowed: once, and '1' was given before"),
        (("--stepz", "10"), "unknown key 'stepz'; did you mean training.steps?"),
    ):
        with pytest.raises(ValueError) as caught:
            read(*words)
        assert message in str(caught.value)


@pytest.mark.parametrize("name", sorted(get_command(app).commands))
def test_the_help_of_a_command_names_every_option_and_an_example(name):
    told = done(name, "--help")
    known = {word for p in get_command(app).commands[name].params for word in (*p.opts, *p.secondary_opts)}
    assert all(word in told for word in known if word.startswith("--"))
    assert name == "tour" or f"Example: guidance-nb {name} " in told


def test_help_says_what_is_drawn_by_default():
    told = " ".join(done("sample", "--help").split())
    assert "ten of each class for a .png. Default: 1000." in told and "Sampler. Default: the recipe's." in told
    assert "Default: ." not in told and "Default: None" not in told


def test_help_lists_the_recipes():
    told = done("train", "--help")
    assert all(name in told for name in recipe_names()) and "MNIST with label dropout" in told
