"Two processes on one machine (gloo) do what one does."

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from engine_cases import STEPS, case, finish, start
from torch.testing import assert_close

from guidance_nb.samplers import sample
from guidance_nb.training import Engine, batches, checkpoints_in, sample_sharded

CASES = Path(__file__).with_name("engine_cases.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> tuple[dict, dict, Path]:
    "What each of two processes saw, see `engine_cases.one_of_two`."
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, CASES, "one_of_two", folder],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
    first, second = (json.loads((folder / f"{rank}.json").read_text()) for rank in range(2))
    return first, second, folder


@pytest.mark.parametrize("name", ["plain", "fetch", "draw", "teacher", "scales", "contrast", "buffers", "idle"])
def test_losses_and_averages(two, name):
    "Same data, same times, same noise, same dropped labels, same teacher: the same losses, to rounding."
    losses, state = finish(start(name))
    assert two[0][name] == two[1][name]  # both saw the mean over both, and hold the same average, to the bit
    assert_close(two[0][name]["losses"], losses, rtol=2e-5, atol=2e-6)
    assert_close(two[0][name]["ema"], [p.flatten().tolist() for p in state.ema.parameters()], rtol=1e-4, atol=1e-4)


def test_passes_and_resume_in_two_processes(two):
    "Two processes with two passes each, stopped after six steps and resumed, and one process with one pass."
    losses, _ = finish(start("passes", engine=Engine(precision="fp32", clip=0.5, warmup=3)))
    for seen in two[:2]:
        both = seen["passes"]["losses"] + seen["resumed"]["losses"]
        assert len(both) == STEPS
        assert_close(both, losses, rtol=2e-5, atol=2e-6)
    assert [int(path.name[5:]) for path in checkpoints_in(two[2] / "passes")] == [12, 8, 6]
    assert not list((two[2] / "passes").glob(".*"))


def test_two_processes_visit_the_rows_of_one():
    x, c = torch.arange(30.0)[:, None], torch.arange(30)
    whole = [b[1] for b in batches((x, c), 8, 0, 6)]
    shares = [[b[1] for b in batches((x, c), 8, 0, 6, rows=rows)] for rows in (slice(0, 4), slice(4, 8))]
    assert all(torch.equal(w, torch.cat([a, b])) for w, a, b in zip(whole, *shares))


def test_samples(two):
    "Bit for bit, in order, in both processes; also an uneven number, and with the points on the way."
    assert two[0]["samples"] == two[1]["samples"]
    model, _, _, _ = case("contrast")
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.shape for p in model.parameters()]
    flat = [torch.tensor(p).reshape(s) for p, s in zip(two[0]["contrast"]["ema"], sizes)]
    model.load_state_dict(dict(zip(names, flat)))
    c = torch.arange(7) % 3
    samples = sample(model, c, (7, 2), steps=3, sampler="ddpm", batch_size=1, progress=False)
    again = sample(model, None, (6, 2), steps=3, batch_size=1, trajectory=True, progress=False)
    assert two[0]["samples"] == [samples.tolist(), again.trajectory.tolist(), again.rows]


def test_one_process_needs_no_world():
    model = case("plain")[0]
    options = {"steps": 3, "progress": False, "start": 5}
    assert torch.equal(sample_sharded(model, None, (4, 2), **options), sample(model, None, (4, 2), **options))


def test_errors_reach_both_processes(two):
    for seen in two[:2]:
        assert seen["batch"] == "ValueError: batch_size = 15; allowed: a multiple of 2 processes x 1 passes"
        assert seen["main"].startswith("FileNotFoundError") and "missing" in seen["main"]
        assert seen["nan"].startswith("FloatingPointError: loss = ") and "lower lr = 1e+30" in seen["nan"]
        assert seen["full"].startswith("NotADirectoryError: ") and "could not write /dev/null/plain" in seen["full"]
        assert seen["nan samples"].startswith("FloatingPointError: samples are not finite")
