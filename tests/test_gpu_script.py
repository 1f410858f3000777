"tools/gpu.py: shares, limits, failures and resuming with small programs in place of the phases; one of them for real."

import pytest
import torch

import dit_speed
import gpu
from guidance_nb.engine._cost import network_cost

ROWS = "import sys; folder = __import__('pathlib').Path(sys.argv[sys.argv.index('--out') + 1]); folder.mkdir(); "


def phase(code: str) -> tuple[float, list[str]]:
    return 1.0, ["-c", code.replace("{", "{{").replace("}", "}}"), "{minutes}", "{first}"]


def run(capsys, *arguments: str) -> dict[str, list[str]]:
    "The words of each line of the table, by phase."
    gpu.main([*arguments])
    lines = capsys.readouterr().out.split("phase ")[-1].splitlines()[1:]
    return {line.split()[0]: line.split(maxsplit=3)[1:] for line in lines}


def test_a_phase_that_fails_or_hangs_stops_no_other(tmp_path, capsys, monkeypatch):
    "And rows are counted, leftovers pass on, what was done is not done again, what was not is."
    hang = "import time; print('missing: all of it', flush=True); time.sleep(60)"
    made = f"{ROWS} (folder / 'x.csv').write_text('a,b\\n1,2\\n3,4\\n'); print('missing: nothing')"
    phases = {"fails": phase("raise SystemExit('broken')"), "hangs": phase(hang), "works": phase(made)}
    monkeypatch.setattr(gpu, "PHASES", phases)
    table = run(capsys, "--out", str(tmp_path), "--budget", "0.1")  # six seconds: two, two, and what they leave
    assert [*table] == [*phases]
    assert table["fails"][1:] == ["0", "exit code 1; broken"]
    assert table["hangs"][1] == "0" and table["hangs"][2].endswith("s; all of it") and 2 <= int(table["hangs"][0]) <= 4
    assert table["works"][1:] == ["2", "nothing"]
    phases["hangs"] = phase("import sys; print('missing:', *sys.argv[1:3])")
    again = run(capsys, "--out", str(tmp_path), "--budget", "0.8")
    assert again["works"][2] == "done before: nothing" and again["fails"][2] == "exit code 1; broken"
    minutes, first = map(float, again["hangs"][2].split())
    assert 0.5 < minutes < 0.7 and first == 0.01  # a plan is for the minutes of the first call
    assert run(capsys, "--out", str(tmp_path), "--budget", "0.1", "--only", "works")["works"][0] == "0"


def test_a_phase_without_time_is_not_begun(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(gpu, "PHASES", {"first": (1e9, ["-c", "import time; time.sleep(9)"]), "last": phase("1/0")})
    table = run(capsys, "--out", str(tmp_path), "--budget", "0.02")
    assert table["last"][2] == "no time was left" and not (tmp_path / "last.log").exists()


@pytest.mark.parametrize("wrong", [["--budget", "0"], ["--only", "checks,nothing"]])
def test_bad_options_are_refused(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--out", str(tmp_path), *wrong])
    assert "; allowed: " in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_rehearsal_of_the_transformers(tmp_path, capsys, monkeypatch):
    "Everything but the graph, which a CPU does not have; what is made is not made again."
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    table = run(capsys, "--out", str(tmp_path), "--rehearse", "--only", "transformers", "--budget", "5")
    assert table["transformers"][1:] == ["4", "dit-s/4 compiled, CUDA graph"]
    file = tmp_path / "transformers" / "transformers.csv"
    assert dit_speed.measure(file, dit_speed.REHEARSAL, 0.0) == ["dit-s/4 compiled, CUDA graph"]
    lines = file.read_text().splitlines()
    assert lines[0].split(",") == dit_speed.COLUMNS and len(lines) == 5
    cost = network_cost("dit-s/4", (4, 8, 8), 1000, width=32, depth=2, heads=2)
    assert f"{(cost.forward + cost.backward) / 1e9:.6g}" in lines[1]
    assert f"{4 * cost.forward / 1e9:.6g}" in lines[4]  # two steps of two evaluations


def test_memory_halves_the_batch_until_it_fits():
    "And time that is up leaves the rest for the next call."
    tried = []

    def work(batch):
        tried.append(batch)
        if batch > 2:
            raise torch.OutOfMemoryError("full")
        yield {"batch": batch}

    assert dit_speed.in_memory(work, 16) == [{"batch": 2}] and tried == [16, 8, 4, 2]


def test_no_job_begins_that_would_not_end(tmp_path, monkeypatch):
    monkeypatch.setattr(dit_speed, "train", lambda name, engine, model, batch, size: iter([{}]))
    monkeypatch.setattr(dit_speed, "save", lambda file, made: dit_speed.time.sleep(0.5))
    monkeypatch.setattr(dit_speed, "build", lambda name, size: None)
    left = dit_speed.measure(tmp_path / "x.csv", dit_speed.REHEARSAL, dit_speed.time.monotonic() + 0.9)
    assert left == ["dit-s/4 compiled", "dit-s/4 compiled, CUDA graph", "dit-s/4 sampling"]
