"Small runs that the tests of the engine share, and what child processes do: `python engine_cases.py JOB FOLDER`."

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guidance_nb._processes import destroy_process_group, on_main
from guidance_nb._random import keyed_generator
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.engine._checkpoints import checkpoints_in, read_checkpoint
from guidance_nb.engine._hardware import open_accelerator
from guidance_nb.engine._run import Engine
from guidance_nb.engine._sampling import sample_sharded
from guidance_nb.flow_postprocessing import FlowPostprocessor, PairDraws, PairLoss
from guidance_nb.images._networks import image_denoiser
from guidance_nb.mixtures import checkerboard, sample_mixture
from guidance_nb.model_guidance import ModelGuidanceLoss
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import DenoisingLoss, fit

STEPS, BATCH = 12, 16


class DropNet(nn.Module):
    "A network whose training draws from PyTorch's global generator."

    def __init__(self, width: int = 16):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.lift, self.label = nn.Linear(3, width), nn.Embedding(4, width)
            self.drop, self.read = nn.Dropout(0.3), nn.Linear(width, 2)

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        return self.read(self.drop(torch.tanh(self.lift(torch.cat([x, time[:, None]], 1)) + self.label(labels))))


class Shelf:
    "Data that is fetched, with a random shift of each row that depends on its place in the batch alone."

    def __init__(self, x: Tensor, c: Tensor):
        self.x, self.c, self.asked = x, c, []

    def __len__(self) -> int:
        return len(self.x)

    def fetch(self, indices: Tensor, generator: torch.Generator, rows: slice) -> tuple[Tensor, Tensor]:
        self.asked.append((len(indices), rows))
        shift = 0.1 * torch.randn(len(indices), 1, generator=generator)
        return self.x[indices[rows]] + shift[rows], self.c[indices[rows]]


def points() -> tuple[Tensor, Tensor]:
    generator = keyed_generator(5)
    c = torch.randint(3, (50,), generator=generator)
    return torch.randn(50, 2, generator=generator) + c[:, None], c


def case(name: str) -> tuple:
    "Model, loss, data and options of a run."
    mlp = lambda **k: mlp_denoiser(2, FlowPath(), 3, width=16, depth=1, **k)  # noqa: E731
    passes = Engine(precision="fp32", gradient_accumulation_steps=2, clip=0.5, warmup=3)
    plain, fast = DenoisingLoss(0.2), {"lr": 0.01, "ema": 0.9, "batch_size": BATCH}
    if name == "drop":
        model = mlp()
        model.net = DropNet()
        return model, plain, points(), fast
    if name == "idle":  # a weight without a task
        model = mlp()
        model.net.idle = nn.Parameter(torch.ones(3))
        return model, plain, points(), fast
    if name == "buffers":
        model = FlowPostprocessor(2, 3, width=16, depth=1, dropout=0.3)
        model.spread.fill_(1.7)
        x, c = points()
        return model, PairLoss(), PairDraws(x, x + 1, torch.arange(100).reshape(50, 2) // 2, c), fast
    if name in ("dit", "unet"):
        settings = {"width": 16, "depth": 2, "heads": 2} if name == "dit" else {"widths": (8, 16), "patch": 1}
        model = image_denoiser({"dit": "dit-s/2", "unet": "unet-tiny"}[name], (1, 8, 8), FlowPath(), 3, **settings)
        x, c = points()
        return model, plain, (x.repeat(1, 32).view(-1, 1, 8, 8), c), fast
    cases = {
        "plain": (mlp(), plain, points(), fast),
        "passes": (mlp(), plain, points(), fast | {"engine": passes}),
        "fetch": (mlp(), plain, Shelf(*points()), fast | {"seed": 7}),
        "draw": (mlp(), plain, lambda n, g: sample_mixture(checkerboard(), n, g), fast),
        "teacher": (mlp(), ModelGuidanceLoss(0.5, interval=(0.0, 1.0)), points(), fast | {"schedule": "constant"}),
        "online": (mlp(), ModelGuidanceLoss(0.5, target="online"), points(), fast),
        "aligned": (mlp(), AlignedLoss(2.0, 0.5), points(), fast),
        "scales": (mlp(scale_aware=True), ModelGuidanceLoss(scale_range=(1.0, 3.0)), points(), fast),
        "contrast": (mlp(), ModelGuidanceLoss(0.3, unconditional="contrastive"), points(), fast),
    }  # fmt: skip
    return cases[name]


def kept(engine: Engine | None, folder: Path, every: int = 4, keep: int = 3, **more) -> Engine:
    "An engine that keeps checkpoints, and changes no number of a run without one."
    return replace(
        engine or Engine(precision="fp32", cpu=True),
        folder=folder, save_every=every, keep=keep, **({"metadata": {"name": folder.name}} | more),
    )  # fmt: skip


def start(name: str, folder: Path | None = None, every: int = 4, keep: int = 3, steps: int = STEPS, **more):
    "A run, kept in a folder of its own if there is one."
    model, loss, data, options = case(name)
    options = options | {"progress": False} | more
    if folder is not None:
        options["engine"] = kept(options.get("engine"), folder / name, every, keep)
    return fit(model, loss, data, steps, **options)


def finish(run) -> tuple[list[float], object]:
    "Losses to the end, and the last state."
    losses = []
    for state in run:
        losses.append(state.loss)
    return losses, state


def assert_same_weights(found, expected, lr: float = 0.01) -> None:
    """Weights of two runs that add the same numbers in different orders.

    AdamW divides by the root of the second moment, so a weight whose gradient is all rounding moves by up to `lr` a
    step, in a direction that the rounding decides. No bound on each weight holds on every processor. Losses depend on
    all weights and are compared tightly beside this. Here all but one weight in a hundred
    agree, and none is a step away.
    """
    flat = [
        torch.cat([torch.as_tensor(part, dtype=torch.float64).flatten() for part in parts])
        for parts in (found, expected)
    ]
    assert flat[0].shape == flat[1].shape
    gap = (flat[0] - flat[1]).abs() - 1e-4 * flat[1].abs()
    assert (gap > 1e-4).double().mean() <= 0.01, f"{(gap > 1e-4).double().mean():.1%} of the weights differ"
    assert gap.max() <= lr, f"a weight differs by {gap.max():.2g}"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_turn(folder: Path, steps: str, every: str, *names: str) -> None:
    "Several runs, a step of each in turn, until somebody kills this process; on no machine do they reach their end."
    runs = [start(name, folder, int(every), steps=int(steps)) for name in names]
    for _ in range(int(steps) - 1):
        for run in runs:
            next(run)
    signal.pause()


def signalled(folder: Path, name: str, moment: str) -> None:
    "A run that gets a signal in step 7, or after step 6."
    model, _loss, data, options = case("plain")

    class Signalled(DenoisingLoss):
        def __call__(self, *args):
            if args[3].step == 6 and moment == "in a step":
                os.kill(os.getpid(), getattr(signal, name))
            return super().__call__(*args)

    Signalled.__qualname__ = "DenoisingLoss"
    engine = kept(None, folder / "plain", 100)
    for state in fit(model, Signalled(0.2), data, STEPS, **options, progress=False, engine=engine):
        if state.step == 6 and moment == "between steps":
            os.kill(os.getpid(), getattr(signal, name))


def die_at(module: Any, call: str, number: int) -> None:
    "Let this process die at its so-many-th call of a function, counted from 1."
    original, calls = getattr(module, call), itertools.count(1)

    def deadly(*args, **more):
        if next(calls) == number:
            if call == "save_file":
                Path(args[1]).write_bytes(b"half of it")
            die()
        return original(*args, **more)

    setattr(module, call, deadly)


def killed_while_writing(folder: Path) -> None:
    "A process for each moment of the second checkpoint: it dies there. Prints the signal that ended each."
    import safetensors.torch

    torch.optim.AdamW([torch.zeros(1)], fused=True)  # imports much; better once, before the forks
    moments = [("fsync", n) for n in range(7, 14)] + [("replace", 2), ("replace", 3), ("save_file", 4)]
    for call, number in moments:
        if pid := os.fork():
            print(call, number, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
            continue
        die_at(safetensors.torch if call == "save_file" else os, call, number)
        finish(start("plain", folder / f"{call}{number}", keep=1))
        os._exit(0)


def killed_in_a_row(folder: Path, kills: str, seed: str, steps: str) -> None:
    """A run that is killed and started again, so many times, and what was kept before and after each of its lives.

    Every other life ends inside the writing of a checkpoint, at a call of the system chosen at random; the others some
    time after a number of steps. No life makes more than 25, so that the run isn't finished however fast a machine is.
    """
    import safetensors.torch

    torch.optim.AdamW([torch.zeros(1)], fused=True)  # imports much; better once, before the forks
    chance, run, log = random.Random(int(seed)), folder / "drop", folder / "log"
    calls = [(os, "fsync", 16), (os, "replace", 3), (safetensors.torch, "save_file", 3)]
    newest = lambda: read_checkpoint(run).step if checkpoints_in(run) else 0  # noqa: E731
    for life in range(int(kills)):
        before, length = newest(), log.stat().st_size if log.exists() else 0
        first, delay = chance.randint(1, 15), chance.uniform(0.0, 0.04)
        module, call, most = chance.choice(calls)
        number = chance.randint(1, most) if life % 2 else 0  # 0: never
        if not (pid := os.fork()):
            die_at(module, call, number)
            with open(log, "ab", buffering=0) as told:
                for state in start("drop", folder, every=2, steps=int(steps)):
                    told.write(f"{state.step} {state.loss!r}\n".encode())
                    if state.step == before + 25:
                        signal.pause()
            os._exit(0)
        while not number and (not log.exists() or log.read_bytes()[length:].count(b"\n") < first):
            time.sleep(0.002)
        if not number:
            time.sleep(delay)
            os.kill(pid, signal.SIGKILL)
        end = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        seen = [int(line.split()[0]) for line in log.read_text()[length:].splitlines()] if log.exists() else []
        told = {"how": f"{call} {number}" if number else "timer", "before": before, "after": newest(), "end": end}
        print(json.dumps(told | {"seen": seen}), flush=True)


def without_space(folder: Path) -> None:
    "No file may grow beyond what the second checkpoint needs, as on a full disk."
    import resource

    run = start("plain", folder)
    for _ in range(5):
        next(run)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
    try:
        finish(run)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(
            json.dumps({"error": str(error), "left": sorted(path.name for path in (folder / "plain").glob("*step*"))})
        )


def one_of_two(folder: Path) -> None:
    "What each of two processes does; everything it saw goes into a file of its own."
    place = open_accelerator(Engine(precision="fp32", cpu=True))
    rank, seen = place.process_index, {}
    assert place.num_processes == 2
    for name in ("plain", "fetch", "draw", "teacher", "scales", "buffers", "idle", "contrast"):
        losses, state = finish(
            start(name, engine=Engine(precision="fp32", cpu=True, find_unused_parameters=name == "idle"))
        )
        seen[name] = {"losses": losses, "ema": [p.flatten().tolist() for p in state.ema.parameters()]}
    run = start("passes", folder)
    seen["passes"] = {"losses": [next(run).loss for _ in range(6)]}
    run.close()
    seen["resumed"] = {"losses": finish(start("passes", folder))[0]}
    c = torch.arange(7) % 3
    samples = sample_sharded(state.ema, c, (2,), steps=3, sampler="ddpm", batch_size=1, progress=False)
    again = sample_sharded(state.ema, 6, (2,), steps=3, batch_size=1, progress=False)
    bad = torch.tensor([[0.0, 0.0]] * 3 + [[1e6, 0.0]])  # one of them alone becomes infinite
    spoiled = lambda model, x, t, s, c, extra: x / (x.abs().amax(1, True) < 1e5)  # noqa: E731
    seen["samples"] = [samples.tolist(), again.tolist()]
    for key, action in (
        ("batch", lambda: next(start("plain", engine=Engine(precision="fp32", cpu=True), batch_size=15))),
        ("main", lambda: on_main((folder / "missing").read_text, rank, 2)),
        ("nan", lambda: finish(start("plain", engine=Engine(precision="fp32", cpu=True), lr=1e30))),
        ("full", lambda: finish(start("plain", Path(os.devnull), engine=Engine(precision="fp32", cpu=True)))),
        ("nan samples", lambda: sample_sharded(state.ema, 4, (2,), sampler=spoiled, init=bad, progress=False)),
    ):
        try:
            action()
        except (ValueError, OSError, FloatingPointError) as error:
            seen[key] = f"{type(error).__name__}: {error}"
    (folder / f"{rank}.json").write_text(json.dumps(seen))


SHARDED = ("plain", "teacher", "online", "aligned", "scales", "buffers", "drop", "idle", "dit", "unet")


def one_of_two_sharded(folder: Path) -> None:
    "The same with weights and moments divided between the two (FSDP2)."
    engine = Engine(precision="fp32", cpu=True)
    place = open_accelerator(engine)
    rank, seen = place.process_index, {}
    assert place.num_processes == 2 and place.is_fsdp2
    for name in SHARDED:
        kept = folder if name == "unet" else None  # it has weights that two processes cannot halve
        losses, state = finish(start(name, kept, engine=engine, steps=6 if name in ("dit", "unet") else STEPS))
        held = sum(p.to_local().numel() for p in state.model.parameters())
        total = sum(p.numel() for p in state.ema.parameters())
        seen[name] = {"losses": losses, "ema": [p.flatten().tolist() for p in state.ema.parameters()]}
        seen[name]["held"] = held / total
    run = start("passes", folder)
    seen["passes"] = {"losses": [next(run).loss for _ in range(9)][:8]}
    run.close()  # nothing is kept: step 8 is the newest
    if rank == 0:
        for name in ("alone", "left"):
            shutil.copytree(folder / "passes", folder / name / "passes")
    place.wait_for_everyone()
    losses, state = finish(start("passes", folder))
    seen["resumed"] = {"losses": losses, "ema": [p.flatten().tolist() for p in state.ema.parameters()]}
    if (folder / "made_alone").exists():
        seen["taken over"] = {"losses": finish(start("passes", folder / "made_alone"))[0]}
    half = Engine(precision="bf16", cpu=True, clip=1.0)
    seen["bf16"] = {"losses": finish(start("dit", engine=half, steps=4))[0]}
    for key, more in (("channels_last", {"channels_last": True}), ("compile", {"compile": True})):
        try:
            next(start("plain", engine=Engine(precision="fp32", cpu=True, **more)))
        except ValueError as error:
            seen[key] = str(error)
    (folder / f"{rank}.json").write_text(json.dumps(seen))


def killed_at_step(folder: Path, name: str, rank: str, step: str) -> None:
    "A run kept in a folder, in which one process is killed after a step (never, at step 0)."
    place = open_accelerator(Engine(precision="fp32", cpu=True))
    for state in start(name, folder, engine=Engine(precision="fp32", cpu=True)):
        if place.process_index == int(rank) and state.step == int(step):
            die()
    if place.is_main_process:
        ema = [p.flatten().tolist() for p in state.ema.parameters()]
        (folder / "done.json").write_text(json.dumps({"step": state.step, "ema": ema}))


if __name__ == "__main__":
    job, folder, *rest = sys.argv[1:]
    jobs = (in_turn, signalled, killed_while_writing, killed_in_a_row, without_space)
    jobs += (one_of_two, one_of_two_sharded, killed_at_step)
    {job.__name__: job for job in jobs}[job](Path(folder), *rest)
    destroy_process_group()
