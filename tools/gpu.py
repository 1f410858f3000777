"""All that wants a GPU, in the minutes for which one is lent: `python tools/gpu.py --budget 15`.

In this order: the tests of what only a GPU can show (`pytest -m gpu`), speed and MFU of transformers, the claims on
MNIST with the shipped models, and the claims on CIFAR-10 at 16 x 16. Each phase is a program of its own with a share of
what is left of the budget, in minutes; what one leaves over passes on to the next, and one that fails stops no other.
Logs and tables are kept under --out. Started again with the same --out it goes on with what is missing. `--rehearse`
does everything in miniature, on a CPU, too.
"""

import argparse
import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from notebooks import ROOT

TIMED = ["--budget", "{minutes}"]
# Name -> share of the budget, and the program. A plan that is made once is made for the minutes of the first call.
PHASES: dict[str, tuple[float, list[str]]] = {
    "checks": (2.0, ["-m", "pytest", "-o", "addopts=", "-v", "-m", "gpu", "tests/test_gpu.py"]),
    "transformers": (4.5, ["tools/dit_speed.py", *TIMED]),
    "claims": (3.0, ["tools/claims.py", *TIMED]),
    "cifar16": (6.0, ["tools/cifar10.py", "--size", "16", "--budget", "{first}", "--stop-after", "{minutes}"]),
}
SPARE = 10.0  # seconds a program has to end by itself before it is ended


def count_rows(folder: Path) -> int:
    "Rows of all tables in a folder."
    return sum(len(list(csv.DictReader(file.open(newline="")))) for file in folder.rglob("*.csv"))


def end_group(process: subprocess.Popen) -> None:
    "End a program and all that it started, in two steps."
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            os.killpg(process.pid, number)
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                continue


def run_phase(command: list[str], log: Path, seconds: float) -> tuple[bool, str]:
    "Run a program, at most so long; whether it did everything, and what it or we say is missing."
    environment = os.environ | {"PYTHONUNBUFFERED": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, *command], stdout=out, stderr=out, cwd=ROOT, env=environment, start_new_session=True
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end_group(process)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no output"]
    told = [line.removeprefix("missing: ") for line in lines if line.startswith("missing: ")][-1:]
    if code == 0:
        note = (told or lines[-1:])[0]
        return not told or note == "nothing", note
    how = f"stopped after {seconds:.0f} s" if code is None else f"exit code {code}"
    return False, f"{how}; {(told or lines[-1:])[0]}"


def run_all(names: list[str], out: Path, minutes: float, rehearse: bool) -> list[tuple[str, float, int, str]]:
    "All phases: name, seconds, rows made, what is missing."
    file, begin, table = out / "phases.json", time.monotonic(), list[tuple[str, float, int, str]]()
    state = json.loads(file.read_text()) if file.exists() else {"done": {}, "first": {}}
    todo = [name for name in names if name not in state["done"]]
    table += [(name, 0.0, 0, f"done before: {state['done'][name]}") for name in names if name not in todo]
    while todo:
        name, start, rows = todo[0], time.monotonic(), count_rows(out)
        left = 60 * minutes - (start - begin)
        seconds = left * PHASES[name][0] / sum(PHASES[each][0] for each in todo)
        own = f"{max(0.01, (seconds - SPARE) / 60):.3f}"
        first = state["first"].setdefault(name, own)
        command = [part.format(minutes=own, first=first) for part in PHASES[name][1]]
        if "pytest" not in command:
            command += ["--out", str(out / name), *["--rehearse"] * rehearse]
        print(f"{name}: at most {seconds:.0f} s, log in {out / name}.log", flush=True)
        whole, note = run_phase(command, out / f"{name}.log", seconds) if left > 0 else (False, "no time was left")
        table.append((name, time.monotonic() - start, count_rows(out) - rows, note))
        state["done"] |= {name: note} if whole else {}
        file.write_text(json.dumps(state, indent=1) + "\n")
        todo.remove(name)
    return table


def main(arguments: list[str] | None = None) -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of logs and tables")
    parser.add_argument("--budget", type=float, default=15.0, help="minutes for everything")
    parser.add_argument("--only", default=",".join(PHASES), help="phases, separated by commas")
    parser.add_argument("--rehearse", action="store_true", help="in miniature")
    asked = parser.parse_args(arguments)
    names, out = asked.only.split(","), asked.out.resolve()
    if not asked.budget > 0:
        parser.error(f"--budget {asked.budget:g}; allowed: a positive number of minutes")
    if wrong := [name for name in names if name not in PHASES]:
        parser.error(f"--only {wrong[0]}; allowed: {', '.join(PHASES)}")
    out.mkdir(parents=True, exist_ok=True)
    table = run_all(names, out, asked.budget, asked.rehearse)
    print(f"\n{'phase':14}{'seconds':>8}{'rows':>6}  missing")
    for name, seconds, rows, note in table:
        print(f"{name:14}{seconds:8.0f}{rows:6}  {note}")


if __name__ == "__main__":
    main()
