"What survives: killed processes, damaged files, full disks, losses that are not finite, runs that are not the same."

import ast
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from engine_cases import BATCH, STEPS, case, finish, kept, start
from torch.testing import assert_close

import apart
from guidance_nb.engine import _run as engine_run
from guidance_nb.engine._checkpoints import _DamagedCheckpoint, _seal_record, checkpoints_in, read_checkpoint
from guidance_nb.engine._run import Engine
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import DenoisingLoss, fit, train

CASES = Path(__file__).with_name("engine_cases.py")
TENSORS = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


def child(*words: object, **options) -> subprocess.Popen:
    return apart.Popen([sys.executable, CASES, *map(str, words)], stdout=subprocess.PIPE, text=True, **options)


def content(folder: Path) -> dict:
    "Checksums of the tensors of a run's newest checkpoint: equal exactly if the tensors are, bit for bit."
    checkpoint = read_checkpoint(folder)
    return {"step": checkpoint.step} | {name: checkpoint.record["files"][name]["sha256"] for name in TENSORS}


def make_copy(folder: Path, name: str, tmp_path: Path) -> Path:
    return shutil.copytree(folder / name, tmp_path / name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[list[float], Path]:
    "An uninterrupted run with checkpoints at 4, 8 and 12."
    folder = tmp_path_factory.mktemp("whole")
    return finish(start("plain", folder))[0], folder


def test_checkpoints_change_nothing(whole):
    assert whole[0] == finish(start("plain"))[0]


def test_a_killed_process_goes_on_bit_for_bit(tmp_path):
    "SIGKILL from outside at whatever moment; losses, weights, average and moments are those of the unbroken run."
    names, steps, every = ("plain", "drop", "passes", "fetch", "teacher"), 100, 10
    process = child("in_turn", tmp_path / "killed", steps, every, *names)
    while not (tmp_path / "killed" / names[-1] / "step-00000020").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(random.random() / 10)
    process.kill()
    assert process.wait() == -9
    for name in names:
        losses, _ = finish(start(name, tmp_path / "whole", every, steps=steps))
        before = int(read_checkpoint(tmp_path / "killed" / name).path.name[5:])
        assert 20 <= before < steps
        torch.rand(3)  # what the caller draws in between does not matter
        assert finish(start(name, tmp_path / "killed", every, steps=steps))[0] == losses[before:], name
        assert content(tmp_path / "killed" / name) == content(tmp_path / "whole" / name), name
        assert not list((tmp_path / "killed" / name).glob(".step*"))


def test_killed_in_the_middle_of_a_checkpoint(tmp_path, whole):
    "At every file, before and after the renames: what is there is whole, what is half is gone at the next start."
    process = child("killed_while_writing", tmp_path)
    ends = [line.split() for line in process.communicate()[0].splitlines()]
    assert len(ends) == 10 and all(end[2] == "-9" for end in ends), ends
    remnants = steps = 0
    for call, number, _ in ends:
        folder = tmp_path / (call + number)
        remnants += len(list((folder / "plain").glob(".step*")))
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing is damaged
            before = int(read_checkpoint(folder / "plain").path.name[5:])
        steps += before == 8
        assert before in (4, 8)
        losses, _ = finish(start("plain", folder, keep=1))
        assert losses == whole[0][before:]
        assert content(folder / "plain") == content(whole[1] / "plain")
        assert [path.name for path in (folder / "plain").glob("*step*")] == ["step-00000012"]
    assert remnants >= 7 and steps >= 2  # the test did hit the middle, and both sides of the rename


def test_killed_many_times_in_a_row(tmp_path):
    "24 lives, or GUIDANCE_NB_KILLS of them: none loses what was written, and the end is that of the unbroken run."
    kills, seed = int(os.environ.get("GUIDANCE_NB_KILLS", "24")), random.randrange(10**6)
    steps = 25 * kills
    (tmp_path / "killed").mkdir()
    process = child("killed_in_a_row", tmp_path / "killed", kills, seed, steps)
    lives = [json.loads(line) for line in process.communicate()[0].splitlines()]
    assert len(lives) == kills and all(life["end"] == -9 for life in lives), (seed, lives)
    assert sum(life["how"] != "timer" for life in lives) == kills // 2
    for life, following in zip(lives, [*lives[1:], {"before": lives[-1]["after"]}]):
        kept = max([life["before"], *(step // 2 * 2 for step in (n - 1 for n in life["seen"]))])
        assert kept <= life["after"] == following["before"] < steps, (seed, life)  # a step is told before it is saved
        assert life["seen"] == list(range(life["before"] + 1, life["before"] + 1 + len(life["seen"]))), (seed, life)
    losses, _ = finish(start("drop", tmp_path / "whole", every=steps, steps=steps))
    told = [line.split() for line in (tmp_path / "killed" / "log").read_text().splitlines()]
    assert all(losses[int(step) - 1] == float(loss) for step, loss in told), seed
    assert finish(start("drop", tmp_path / "killed", every=steps, steps=steps))[0] == losses[lives[-1]["after"] :]
    assert content(tmp_path / "killed" / "drop") == content(tmp_path / "whole" / "drop"), seed
    assert not list((tmp_path / "killed" / "drop").glob(".step*"))


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("name", [*TENSORS, "checkpoint.json"])
@pytest.mark.parametrize(
    "damage", [flip, lambda p: p.write_bytes(p.read_bytes()[:-1]), Path.unlink, lambda p: p.write_text('{"a": 1}')]
)
def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path, whole, name, damage):
    folder = make_copy(whole[1], "plain", tmp_path)
    damage(folder / "step-00000012" / name)
    with pytest.warns(UserWarning, match=f"step-00000012: {name}"):
        assert read_checkpoint(folder).path.name == "step-00000008"
    with pytest.raises(_DamagedCheckpoint, match=f"step-00000012: {name}"):
        read_checkpoint(folder / "step-00000012")


def test_going_on_past_a_damaged_checkpoint(tmp_path, whole):
    folder = make_copy(whole[1], "plain", tmp_path)
    flip(folder / "step-00000012" / "ema.safetensors")
    with pytest.warns(UserWarning, match="damaged checkpoint skipped"):
        losses, _ = finish(start("plain", tmp_path))
    assert losses == whole[0][8:]
    assert content(folder) == content(whole[1] / "plain")  # the damaged one was replaced
    flip(folder / "step-00000012" / "ema.safetensors")
    with pytest.warns(UserWarning):
        run = start("plain", tmp_path, keep=2)
        assert next(run).loss == whole[0][8]
    run.close()
    assert [path.name for path in checkpoints_in(folder)] == ["step-00000009", "step-00000008"]  # nor is it counted


def test_no_intact_checkpoint_is_an_error_and_not_a_restart(tmp_path, whole):
    folder = make_copy(whole[1], "plain", tmp_path)
    for path in checkpoints_in(folder):
        flip(path / "model.safetensors")
    with pytest.warns(UserWarning), pytest.raises(_DamagedCheckpoint, match="no intact checkpoint is left"):
        finish(start("plain", tmp_path))
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        read_checkpoint(tmp_path / "elsewhere")


def test_a_full_disk(tmp_path, whole):
    "A limit on the size of files, set while the run goes on: the message says all, and nothing is lost."
    process = child("without_space", tmp_path)
    told = json.loads(process.communicate()[0])
    file = tmp_path / "plain" / "step-00000008" / "model.safetensors"
    reason = f"could not write {file}: {os.strerror(errno.EFBIG)}; the previous checkpoint (step-00000004) is intact"
    assert told["error"].endswith(reason) and told["left"] == ["step-00000004"]
    assert finish(start("plain", tmp_path))[0] == whole[0][4:]
    assert content(tmp_path / "plain") == content(whole[1] / "plain")


def test_a_disk_that_fills_at_the_last_moment(tmp_path, whole, monkeypatch):
    "The system may notice only when it flushes."
    run, flush = start("plain", tmp_path), os.fsync
    for _ in range(5):
        next(run)

    def full(handle):
        if os.readlink(f"/proc/self/fd/{handle}").endswith("checkpoint.json"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"checkpoint.json: No space left on device; .*\(step-00000004\)") as caught:
        finish(run)
    assert caught.value.errno == errno.ENOSPC and [path.name for path in (tmp_path / "plain").glob("*step*")] == [
        "step-00000004"
    ]
    monkeypatch.undo()
    assert finish(start("plain", tmp_path))[0] == whole[0][4:]


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(tmp_path):
    model, plain, data, options = case("plain")
    loss = lambda *args: plain(*args) * (float("inf") if args[3].step == 6 else 1)  # noqa: E731
    engine = kept(None, tmp_path, 5)
    with pytest.raises(FloatingPointError, match=f"at step 6; .*last good checkpoint: {tmp_path}/step-00000005"):
        train(model, loss, data, STEPS, **options, progress=False, engine=engine)
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-00000005"]


def test_leaving_and_interrupting_lose_nothing(tmp_path, whole):
    run = start("plain", tmp_path, every=100)
    seen = [next(run).loss for _ in range(3)]
    run.close()
    assert [path.name for path in checkpoints_in(tmp_path / "plain")] == ["step-00000003"]

    model, plain, data, options = case("plain")

    def interrupted(*args):
        if args[3].step == 7:
            raise KeyboardInterrupt
        return plain(*args)

    interrupted.__qualname__ = "DenoisingLoss"
    engine = kept(None, tmp_path / "plain", 100)
    with pytest.raises(ValueError, match=r"loss.dropout = 0.2, this run None"):
        train(model, interrupted, data, STEPS, **options, progress=False, engine=engine)
    interrupted.dropout = 0.2
    with pytest.raises(KeyboardInterrupt):
        for state in fit(model, interrupted, data, STEPS, **options, progress=False, engine=engine):
            seen.append(state.loss)
    assert [path.name for path in checkpoints_in(tmp_path / "plain")] == ["step-00000007", "step-00000003"]
    assert seen + finish(start("plain", tmp_path))[0] == whole[0]


def test_a_run_caught_between_weights_and_average_is_not_kept(tmp_path, monkeypatch):
    run = start("plain", tmp_path, every=100)
    next(run)

    def interrupt(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(engine_run, "update_ema", interrupt)
    with pytest.raises(KeyboardInterrupt):
        next(run)
    assert checkpoints_in(tmp_path / "plain") == []


def test_a_finished_run_gives_its_last_state(tmp_path, whole):
    folder = make_copy(whole[1], "plain", tmp_path)
    losses, state = finish(start("plain", tmp_path))
    assert losses == whole[0][-1:] and state.step == STEPS
    tensors = read_checkpoint(folder / "step-00000012")
    for module, stored in ((state.model, tensors.model), (state.ema, tensors.ema)):
        assert all(torch.equal(value, stored[name]) for name, value in module.state_dict().items())


def test_old_checkpoints_are_removed(tmp_path):
    finish(start("plain", tmp_path, every=3, keep=2))
    assert [path.name for path in checkpoints_in(tmp_path / "plain")] == ["step-00000012", "step-00000009"]


def test_a_constant_schedule_may_go_on_longer(tmp_path):
    longer = finish(start("teacher", steps=16))[0]
    assert finish(start("teacher", tmp_path))[0] == longer[:12]
    assert finish(start("teacher", tmp_path, steps=16))[0] == longer[12:]
    with pytest.raises(ValueError, match="has steps = 16, this run 8"):
        next(start("teacher", tmp_path, steps=8))


def test_a_constant_schedule_may_fall_in_the_end(tmp_path):
    "A run at a constant rate, continued with a cosine, is the run that was to be held and to fall from the start."
    falling = lambda hold, *folder: start(  # noqa: E731
        "plain", *folder, steps=16, schedule="cosine", engine=Engine(precision="fp32", cpu=True, hold=hold)
    )
    whole = finish(falling(12))[0]
    assert finish(start("plain", tmp_path, schedule="constant"))[0] == whole[:12]
    with pytest.raises(ValueError, match="has hold = 0, this run 10"):  # its twelfth step would have had a lower rate
        next(falling(10, tmp_path))
    assert finish(falling(12, tmp_path))[0] == whole[12:] != whole[:4]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 24}, "has steps = 12, this run 24; allowed: 12, another folder, or .steps. in may_change"),
        ({"lr": 0.02}, "has lr = 0.01, this run 0.02"),
        ({"seed": 3}, "has seed = 0, this run 3"),
        ({"batch_size": 10}, "has batch_size = 16, this run 10"),
        ({"ema": 0.5}, "has ema = 0.9, this run 0.5"),
        ({"schedule": "constant"}, "has schedule = 'cosine', this run 'constant'"),
        ({"engine": Engine(precision="fp32", cpu=True, weight_decay=0.1)}, "has weight_decay = 0.0, this run 0.1"),
    ],
)
def test_another_run_is_refused(tmp_path, whole, change, words):
    make_copy(whole[1], "plain", tmp_path)
    with pytest.raises(ValueError, match="step-00000012 " + words.replace("(", r"\(")):
        next(start("plain", tmp_path, **change))


def test_other_facts_networks_and_versions_are_refused(tmp_path, whole):
    folder = make_copy(whole[1], "plain", tmp_path)
    model, loss, data, options = case("plain")
    resume = lambda model=model, loss=loss, data=data, **k: next(  # noqa: E731
        fit(model, loss, data, STEPS, **options, progress=False, engine=kept(None, folder, **({"metadata": {}} | k)))
    )
    with pytest.raises(ValueError, match="has name = 'plain', this run None"):
        resume()
    with pytest.raises(ValueError, match=r"has net.width = None, this run 3"):
        resume(metadata={"name": "plain", "net": {"width": 3}})
    assert resume(metadata={"name": "plain", "net": {"width": 3}}, may_change=("net.width",)).step == STEPS
    with pytest.raises(ValueError, match=r"has loss\.dropout = 0\.2, this run 0\.3"):
        resume(loss=DenoisingLoss(0.3), metadata={"name": "plain"})
    with pytest.raises(ValueError, match=r"has data\.digest = "):
        resume(data=(data[0][:20], data[1][:20]), metadata={"name": "plain"})
    wide = mlp_denoiser(2, FlowPath(), 3, width=17, depth=1)
    with pytest.raises(ValueError, match=r"model.safetensors has shape \(16,\) for 'net.blocks.0.bias', this network"):
        resume(model=wide, metadata={"name": "plain"})
    with pytest.raises(ValueError, match=r"with step-00000012.; allowed: an empty folder with resume=False"):
        resume(metadata={"name": "plain"}, resume=False)
    record = {**read_checkpoint(folder / "step-00000012").record, "format": 99}
    (folder / "step-00000012" / "checkpoint.json").write_text(_seal_record(record))
    with pytest.raises(ValueError, match=r"step-00000012 has format 99 \(guidance_nb .*\); allowed: format 2"):
        resume(metadata={"name": "plain"})


SIGNALS = {"SIGINT": -2, "SIGTERM": 143, "SIGHUP": 129}


@pytest.mark.parametrize("name", SIGNALS)
@pytest.mark.parametrize("moment", ["in a step", "between steps"])
def test_signals_end_a_run_after_its_step_and_keep_it(tmp_path, whole, name, moment):
    "What schedulers and closing terminals send: no checkpoint was due, the step is finished and kept, and said so."
    process = child("signalled", tmp_path, name, moment, stderr=subprocess.PIPE)
    _, told = process.communicate(timeout=120)
    assert process.returncode % 256 in (SIGNALS[name] % 256, 130)
    step = 7 if moment == "in a step" else 6
    path = tmp_path / "plain" / f"step-{step:08d}"
    assert f"stopped by {name} after step {step}; checkpoint: {path}" in told
    assert finish(start("plain", tmp_path))[0] == whole[0][step:]


def test_ignored_signals_stay_ignored(tmp_path):
    "`nohup` means it."
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        steps = [(state.step, os.kill(os.getpid(), signal.SIGHUP)) for state in start("plain", tmp_path)]
        assert len(steps) == STEPS and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_handlers_come_back(tmp_path):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)]
    runs = [start("plain", tmp_path / str(number)) for number in range(2)]
    for run in runs:
        next(run)
    assert signal.getsignal(signal.SIGTERM) != before[1]
    for run in runs:  # the first to begin is the first to end
        run.close()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)] == before


def test_two_trainings_in_one_folder(tmp_path, whole):
    "The second is refused in one line, from this process or another; a killed owner leaves no lock behind."
    run = start("plain", tmp_path)
    seen = [next(run).loss for _ in range(5)]
    refused = r"plain \(.*\); allowed: another folder, for a run is at work in it$"
    with pytest.raises(ValueError, match=refused):
        next(start("plain", tmp_path))
    told = child("in_turn", tmp_path, STEPS, 4, "plain", stderr=subprocess.PIPE).communicate(timeout=120)[1]
    assert "a run is at work in it" in told
    run.close()
    assert seen + finish(start("plain", tmp_path))[0] == whole[0]
    process = child("in_turn", tmp_path / "killed", 100, 4, "plain")
    while not (tmp_path / "killed" / "plain" / "step-00000004").exists():
        time.sleep(0.01)
    process.kill()
    process.wait()
    next(start("plain", tmp_path / "killed", steps=100))


class Pictures:
    "Data on disk, as far as a resume is concerned."

    def __init__(self, identity: str):
        self.x, self.c = case("plain")[2]
        self.identity = identity

    def __len__(self):
        return len(self.x)

    def digest(self):
        return self.identity

    def fetch(self, indices, generator, rows):
        return self.x[indices[rows]], self.c[indices[rows]]


def test_other_data_is_refused_or_stated(tmp_path):
    "The same size, other content: tensors by their numbers, fetched data by what it says of itself."
    _model, loss, (x, c), options = case("plain")
    run = lambda data, folder, **k: fit(  # noqa: E731
        case("plain")[0], loss, data, STEPS, **options, progress=False, engine=kept(None, tmp_path / folder, **k)
    )
    next(run((x, c), "tensors"))
    for other in ((x + 1e-3, c), (x, c.flip(0))):
        with pytest.raises(ValueError, match=r"has data.digest = .*; allowed: .*, or 'data.digest' in may_change"):
            next(run(other, "tensors"))
    next(run(Pictures("a"), "pictures"))
    with pytest.raises(ValueError, match=r"has data.digest = 'a', this run 'b'"):
        next(run(Pictures("b"), "pictures"))
    next(run(Pictures("b"), "pictures", may_change=("data",)))
    changes = read_checkpoint(tmp_path / "pictures").record["changes"]
    assert changes == [{"step": 1, "key": "data.digest", "was": "a", "now": "b"}]


def test_stated_changes_are_made_and_recorded(tmp_path):
    "More steps, another learning rate, other metadata: when asked for, from here on, and written down for good."
    model, loss, data, options = case("teacher")
    engine = kept(None, tmp_path, metadata={"place": "here"})
    run = fit(model, loss, data, 20, **options, progress=False, engine=engine)
    for _ in range(8):
        next(run)
    run.close()
    change = options | {"lr": 0.02, "schedule": "cosine"}
    with pytest.raises(ValueError, match=r"has lr = 0\.01, this run 0\.02"):
        train(case("teacher")[0], loss, data, 24, **change, progress=False, engine=engine)
    engine = kept(engine, tmp_path, metadata={"place": "there"}, may_change=("lr", "steps", "schedule", "place"))
    state = train(case("teacher")[0], loss, data, 24, **change, progress=False, engine=engine)
    record = read_checkpoint(tmp_path).record
    keys = {entry["key"]: (entry["was"], entry["now"]) for entry in record["changes"]}
    assert keys == {
        "lr": (0.01, 0.02),
        "steps": (20, 24),
        "schedule": ("constant", "cosine"),
        "place": ("here", "there"),
    }
    assert state.step == 24 and record["settings"]["lr"] == 0.02
    engine = kept(None, tmp_path, metadata={"place": "there"}, may_change=("steps",))
    assert train(case("teacher")[0], loss, data, 26, **change, progress=False, engine=engine).step == 26
    again = {"step": 24, "key": "steps", "was": 24, "now": 26}
    assert read_checkpoint(tmp_path).record["changes"] == [*record["changes"], again]


def test_a_loss_with_a_memory_keeps_it(tmp_path):
    class Counting(DenoisingLoss):
        def __init__(self):
            super().__init__(0.2)
            self.seen = [0]

        def __call__(self, *args):
            self.seen[0] += 1
            return super().__call__(*args)

        def state_dict(self):
            return {"seen": self.seen[0]}

        def load_state_dict(self, state):
            self.seen = [state["seen"]]

    for steps in (3, 4):
        model, _, data, options = case("plain")
        run = fit(model, loss := Counting(), data, 7, **options, progress=False, engine=kept(None, tmp_path, 100))
        for _ in range(steps):
            next(run)
        run.close()
    assert loss.seen == [7]


def test_shared_weights(tmp_path):
    "Weights that two layers share are stored once and come back under both names."

    def tied():
        model = mlp_denoiser(2, FlowPath(), 3, width=16, depth=2)
        model.net.blocks[1].weight = model.net.blocks[0].weight
        return model

    options = {"steps": 6, "batch_size": BATCH, "progress": False}
    whole = [state.loss for state in fit(tied(), DenoisingLoss(), case("plain")[2], **options)]
    run = fit(tied(), DenoisingLoss(), case("plain")[2], **options, engine=kept(None, tmp_path))
    assert [next(run).loss, next(run).loss] == whole[:2]
    run.close()
    run = fit(model := tied(), DenoisingLoss(), case("plain")[2], **options, engine=kept(None, tmp_path))
    assert [state.loss for state in run] == whole[2:]
    assert model.net.blocks[1].weight is model.net.blocks[0].weight
    model.load_state_dict(read_checkpoint(tmp_path).ema)


def test_the_record_says_what_is_needed(whole):
    checkpoint = read_checkpoint(whole[1] / "plain" / "step-00000012")
    assert checkpoint.metadata == {"name": "plain"} and checkpoint.step == 12
    assert checkpoint.record["versions"]["torch"] == torch.__version__
    assert set(checkpoint.optimizer) == {
        f"{key}/{name}" for key in ("exp_avg", "exp_avg_sq", "step") for name in checkpoint.model
    }
    assert all(v == 12 for k, v in checkpoint.optimizer.items() if k.startswith("step/"))
    assert_close(checkpoint.record["loss"], whole[0][-1], rtol=0, atol=0)


def test_nothing_is_unpickled():
    "The engine names no loader that could run code from a file."
    files = Path(engine_run.__file__).parent.glob("*.py")
    nodes = [node for file in files for node in ast.walk(ast.parse(file.read_text()))]
    names = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    modules = {a.name for node in nodes if isinstance(node, ast.Import | ast.ImportFrom) for a in node.names}
    assert not {"pickle", "dill", "cloudpickle", "joblib"} & modules and "load" not in names


def test_facts_that_no_file_can_hold_end_a_run_before_it_begins(tmp_path):
    engine = Engine(folder=tmp_path / "run", metadata={"a": torch.ones(1)})
    with pytest.raises(TypeError, match="Tensor is not JSON serializable"):
        next(fit(*case("plain")[:3], 2, 4, progress=False, engine=engine))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: Engine(save_every=0), "save_every = 0; allowed: a whole number, 1 or more"),
        (lambda: Engine(keep=1.5), "keep = 1.5; allowed"),
        (lambda: read_checkpoint("/nowhere"), "/nowhere holds no checkpoint; allowed: a folder with step-"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)
