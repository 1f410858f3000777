"Every notebook runs: one test each, in a process of its own, so that none sees another's state."

import subprocess
import sys

import pytest

from notebooks import NOTEBOOKS, ROOT

LIMIT = 60  # seconds of processor time, so that a busy machine fails nothing

RUN = """
import signal, sys
from pathlib import Path
from nbdev.test import test_nb as run_notebook

def stop(*_):
    raise TimeoutError(f"the notebook takes more than {limit} s of processor time")

path, root, limit = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
signal.signal(signal.SIGPROF, stop)
signal.setitimer(signal.ITIMER_PROF, limit)
passed, _ = run_notebook(path, skip_flags=["slow", "cuda"], basepath=root)
sys.exit(not passed)
"""


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path):
    command = [sys.executable, "-c", RUN, str(path), str(ROOT), str(LIMIT)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=10 * LIMIT)
    assert run.returncode == 0, run.stderr
