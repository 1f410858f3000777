"Two processes on one machine (gloo) do what one does."

import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from engine_cases import SHARDED, STEPS, assert_same_weights, case, finish, start
from torch.testing import assert_close
from typer.testing import CliRunner

import apart
from guidance_nb.cli._app import app
from guidance_nb.cli._recipe import Recipe, describe_recipe, override
from guidance_nb.cli._run import train_recipe
from guidance_nb.engine._checkpoints import checkpoints_in, read_checkpoint
from guidance_nb.engine._cost import launch_file
from guidance_nb.engine._run import Engine
from guidance_nb.engine._sampling import sample_sharded
from guidance_nb.images._data import save_samples
from guidance_nb.images._metrics import read_rows
from guidance_nb.samplers import sample
from guidance_nb.training import batches

MAIN = "from guidance_nb.cli import _main; _main()"
CASES = Path(__file__).with_name("engine_cases.py")


def start_two(*words: object, **variables: str) -> None:
    "Give two processes of one world the same command, and wait for both."
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        apart.Popen(
            [sys.executable, *map(str, words)],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"} | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        told = process.communicate(timeout=300)
        assert process.returncode == 0, told


def run_two(job: str, folder: Path, **variables: str) -> tuple[dict, dict, Path]:
    "Do a job of `engine_cases` in two processes; what each of them saw, and the folder."
    start_two(CASES, job, folder, **variables)
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return first, second, folder


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[dict, dict, Path]:
    "What each of two processes saw, see `engine_cases.one_of_two`."
    return run_two("one_of_two", tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> tuple[dict, dict, Path]:
    "The same with FSDP2, see `engine_cases.one_of_two_sharded`."
    folder = tmp_path_factory.mktemp("sharded")
    run = start("passes", folder / "made_alone")
    for _ in range(5):
        next(run)
    run.close()
    fsdp = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    return run_two("one_of_two_sharded", folder, **fsdp)


@pytest.mark.parametrize("name", ["plain", "fetch", "draw", "teacher", "scales", "contrast", "buffers", "idle"])
def test_losses_and_averages(two, name):
    "Same data, same times, same noise, same dropped labels, same teacher: the same losses, to rounding."
    losses, state = finish(start(name))
    assert two[0][name] == two[1][name]  # both saw the mean over both, and hold the same average, to the bit
    assert_close(two[0][name]["losses"], losses, rtol=2e-5, atol=2e-6)
    assert_same_weights(two[0][name]["ema"], state.ema.parameters())


def test_passes_and_resume_in_two_processes(two):
    "Two processes with two passes each, stopped after six steps and resumed, and one process with one pass."
    losses, _ = finish(start("passes", engine=Engine(precision="fp32", clip=0.5, warmup=3)))
    for seen in two[:2]:
        both = seen["passes"]["losses"] + seen["resumed"]["losses"]
        assert len(both) == STEPS
        assert_close(both, losses, rtol=2e-5, atol=2e-6)
    assert [int(path.name[5:]) for path in checkpoints_in(two[2] / "passes")] == [12, 8, 6]
    assert not list((two[2] / "passes").glob(".step*"))


def test_two_processes_visit_the_rows_of_one():
    x, c = torch.arange(30.0)[:, None], torch.arange(30)
    whole = [b[1] for b in batches((x, c), 8, 0, 6)]
    shares = [[b[1] for b in batches((x, c), 8, 0, 6, rows=rows)] for rows in (slice(0, 4), slice(4, 8))]
    assert all(torch.equal(w, torch.cat([a, b])) for w, a, b in zip(whole, *shares))


def test_samples(two):
    "Bit for bit, in order, in both processes; also an uneven number."
    assert two[0]["samples"] == two[1]["samples"]
    model, _, _, _ = case("contrast")
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.shape for p in model.parameters()]
    flat = [torch.tensor(p).reshape(s) for p, s in zip(two[0]["contrast"]["ema"], sizes)]
    model.load_state_dict(dict(zip(names, flat)))
    c = torch.arange(7) % 3
    samples = sample(model, c, (2,), steps=3, sampler="ddpm", batch_size=1, progress=False)
    again = sample(model, 6, (2,), steps=3, batch_size=1, progress=False)
    assert two[0]["samples"] == [samples.tolist(), again.tolist()]


def test_one_process_needs_no_world():
    model = case("plain")[0]
    options = {"steps": 3, "progress": False, "start": 5}
    assert torch.equal(sample_sharded(model, 4, (2,), **options), sample(model, 4, (2,), **options))


def test_errors_reach_both_processes(two):
    for seen in two[:2]:
        assert seen["batch"] == "ValueError: batch_size = 15; allowed: a multiple of 2 processes x 1 passes"
        assert seen["main"].startswith("FileNotFoundError") and "missing" in seen["main"]
        assert seen["nan"].startswith("FloatingPointError: loss = ") and "lower lr = 1e+30" in seen["nan"]
        assert seen["full"].startswith("NotADirectoryError: ")
        assert seen["nan samples"].startswith("FloatingPointError: samples are not finite")


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_losses_and_averages(sharded, two, name):
    "Weights and moments in halves: the losses and the average of one process, or of two with whole weights."
    a, b = (seen[name] for seen in sharded[:2])
    assert a["losses"] == b["losses"] and a["ema"] == b["ema"] and abs(a["held"] + b["held"] - 1) < 1e-9
    assert 0.4 < a["held"] < 0.75  # a matrix of three rows does not halve
    if name == "drop":  # masks depend on the number of processes
        assert all(math.isfinite(loss) for loss in a["losses"])
        return
    losses, state = finish(start(name, steps=6 if name in ("dit", "unet") else STEPS))
    assert_close(a["losses"], losses, rtol=2e-5, atol=2e-6)
    assert_same_weights(a["ema"], state.ema.parameters())
    if name == "unet":
        saved = read_checkpoint(checkpoints_in(sharded[2] / "unet")[0])
        assert_same_weights(saved.model.values(), [state.model.state_dict()[name] for name in saved.model])
        assert saved.model.keys() == state.model.state_dict().keys()
    if name in two[0]:
        assert_close(a["losses"], two[0][name]["losses"], rtol=2e-5, atol=2e-6)


def test_a_sharded_run_goes_on_anywhere(sharded):
    "Its checkpoint is an ordinary one: continued in two processes, in one without sharding, and the other way round."
    losses, state = finish(start("passes", engine=Engine(precision="fp32", clip=0.5, warmup=3)))
    seen, folder = sharded[0], sharded[2]
    assert_close(seen["passes"]["losses"] + seen["resumed"]["losses"], losses, rtol=2e-5, atol=2e-6)
    assert_same_weights(seen["resumed"]["ema"], state.ema.parameters())
    late, other = finish(start("passes", folder / "alone"))
    assert_close(late, losses[8:], rtol=2e-5, atol=2e-6)
    assert_same_weights(other.ema.parameters(), state.ema.parameters())
    assert_close(seen["taken over"]["losses"], losses[5:], rtol=2e-5, atol=2e-6)
    assert {path.name for path in checkpoints_in(folder / "left" / "passes")} == {"step-00000004", "step-00000008"}


def test_sharding_in_half_precision_and_what_it_refuses(sharded):
    whole = finish(start("dit", steps=4))[0]
    assert_close(sharded[0]["bf16"]["losses"], whole, rtol=0.02, atol=0.02)
    assert sharded[0]["bf16"]["losses"] != whole
    for name in ("channels_last", "compile"):
        assert sharded[0][name] == f"{name} = True; allowed: False with FSDP2"


def launch(folder: Path, *words: object) -> tuple[subprocess.CompletedProcess, float]:
    "Two processes by torchrun, and how long it took."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", CASES, *words]
    began = time.monotonic()
    done = apart.run(
        [str(word) for word in command], env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    return done, time.monotonic() - began


def test_a_killed_worker_ends_the_launch_and_the_run_goes_on(two, tmp_path):
    "Killed after step 6 of 12, with a checkpoint of step 4: a clear error soon, and the uninterrupted weights later."
    done, seconds = launch(tmp_path, "killed_at_step", tmp_path, "plain", 1, 6)
    assert done.returncode == 1 and seconds < 60
    assert "Signal 9 (SIGKILL)" in done.stderr and not (tmp_path / "done.json").exists()
    assert [path.name for path in checkpoints_in(tmp_path / "plain")] == ["step-00000004"]
    start_two(CASES, "killed_at_step", tmp_path, "plain", 1, 0)
    found = json.loads((tmp_path / "done.json").read_text())
    assert found == {"step": STEPS, "ema": two[0]["plain"]["ema"]}  # to the bit


def guidance_nb(launcher: list, *words: object) -> str:
    "Two processes of the command line, started as a user would; what they printed."
    program = [Path(sys.executable).with_name("guidance-nb"), *words]
    done = apart.run(
        [str(word) for word in (sys.executable, "-m", *launcher, *program)], capture_output=True, text=True,
        timeout=200, check=False, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_recipe_trained_by_a_launcher_and_swept_by_two(tmp_path):
    "The shipped FSDP2 configuration trains what one process trains; a sweep of two writes the rows of a sweep of one."
    images = torch.randint(0, 256, (80, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_samples(tmp_path / "images", images, torch.arange(80) % 2)
    tiny = {"data": str(tmp_path / "images"), "network": "unet-tiny", "steps": 4, "batch_size": 8, "ema": 0.5}
    tiny |= {"precision": "fp32", "save_every": 2, "sampler_steps": 2, "sampler": "heun"}
    for name, changes in (("one", {}), ("eval", {"method": "evaluation_classifier"})):
        for _ in train_recipe(override(Recipe(), tiny | changes), tmp_path / name, progress=False):
            pass
    (tmp_path / "tiny.toml").write_text(describe_recipe(override(Recipe(), tiny)), encoding="utf-8")
    sharded = ["accelerate.commands.launch", "--config_file", launch_file("fsdp2"), "--num_processes", 2, "--no_python"]
    told = guidance_nb(sharded, "train", tmp_path / "tiny.toml", "--out", tmp_path / "two", "--no-progress")
    assert told.count("4 steps done") == 1
    one, two = (read_checkpoint(tmp_path / name / "step-00000004") for name in ("one", "two"))
    assert two.ema.keys() == one.ema.keys()
    assert_same_weights(two.ema.values(), [one.ema[name] for name in two.ema])
    options = ["--scales", "1,2", "--n", 300, "--batch-size", 100, "--reference", tmp_path / "images", "--no-progress"]
    options += ["--features", tmp_path / "eval"]
    start_two("-c", MAIN, "sweep", tmp_path / "one", "--out", tmp_path / "by two", *options)
    words = ("sweep", tmp_path / "one", "--out", tmp_path / "by one", *options)
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    rows = [read_rows(tmp_path / name / "rows.csv")[1] for name in ("by one", "by two")]
    assert len(rows[0]) == 3  # real images and two scales
    for alone, shared in zip(*rows, strict=True):
        assert {**alone, "seconds": 0, "command": ""} == {**shared, "seconds": 0, "command": ""}
