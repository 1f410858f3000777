"""Processes that begin with everything imported: a server loads the libraries once, and each begins in a copy of it.

`Popen` and `run` are those of `subprocess`, for commands of this Python: a script, `-m MODULE` or `-c CODE`. What the
start of Python itself does (its options, PYTHONPATH, imports that fail) needs `subprocess`. Windows has no such server.
"""

import atexit
import functools
import inspect
import io
import multiprocessing as mp
import os
import runpy
import signal
import subprocess
import sys
import traceback
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from unittest.mock import patch

from notebooks import ROOT

FORKS = "forkserver" in mp.get_all_start_methods()
COMMON = """torch matplotlib.pyplot pandas seaborn scipy.stats scipy.optimize sklearn.neighbors torchvision torchdiffeq
execnb.shell nbdev.clean safetensors.torch accelerate transformers diffusers.models diffusers.loaders peft typer.testing
guidance_nb.cli._app guidance_nb.cli._recipe guidance_nb.cli._run guidance_nb.cli._tour guidance_nb.interop settle"""


@functools.cache
def context():
    "What makes processes; with a server, it is running and imports this copy of the project."
    if not FORKS:
        return mp.get_context("spawn")
    made = mp.get_context("forkserver")
    made.set_forkserver_preload(COMMON.split())
    ours = os.pathsep.join((str(ROOT), str(ROOT / "tools")))
    with patch.dict(os.environ, PYTHONPATH=ours, PYTHONSAFEPATH="1"):  # whatever folder the tests are started in
        forkserver._forkserver.ensure_running()
    return made


def _enter(ends: list[Connection], command: list[str], cwd: str, env: dict[str, str], session: bool) -> None:
    "Be the Python that runs a command."
    forkserver._forkserver.ensure_running = lambda: None  # a process that it makes comes from this server, too
    if session:
        os.setsid()
    for number, end in enumerate(ends):
        os.dup2(end.fileno(), number)
        end.close()
    sys.stdin = io.TextIOWrapper(io.FileIO(0, closefd=False), "utf-8")
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    kind, *rest = command
    sys.argv = ["-c", *rest[1:]] if kind == "-c" else rest if kind == "-m" else command
    sys.path[0:0] = ["" if kind in ("-c", "-m") else str(Path(kind).parent)]
    try:
        if kind == "-c":
            exec(compile(rest[0], "<string>", "exec"), {"__name__": "__main__"})
        elif kind == "-m":
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(kind, run_name="__main__")
    except KeyboardInterrupt:  # as Python itself ends
        traceback.print_exc()
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        atexit._run_exitfuncs()


class Popen(subprocess.Popen):
    "A command of this Python in a copy of the server, with what `subprocess.Popen` offers."

    def _execute_child(self, *args: object) -> None:
        given = inspect.signature(super()._execute_child).bind(*args).arguments
        command = [os.fspath(word) for word in given["args"]]
        assert command[0] == sys.executable and given["preexec_fn"] is None, command
        handles = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        ends = [Connection(os.dup(number if handle == -1 else handle)) for number, handle in enumerate(handles)]
        cwd, env = os.fspath(given["cwd"] or os.getcwd()), dict(given["env"] or os.environ)
        self.process = context().Process(target=_enter, args=(ends, command[1:], cwd, env, given["start_new_session"]))
        self.process.start()
        self.pid, self._child_created = self.process.pid, True
        for end in ends:
            end.close()
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))

    def _internal_poll(self, *_: object, **__: object) -> int | None:
        self.returncode = self.process.exitcode
        return self.returncode

    def _wait(self, timeout: float | None) -> int:
        self.process.join(timeout)
        if self._internal_poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode


def run(
    command: list, capture_output: bool = False, timeout: float | None = None, check: bool = False, **options: object
) -> subprocess.CompletedProcess:
    "As `subprocess.run`."
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with Popen(command, **options) as process:
        try:
            out, errors = process.communicate(timeout=timeout)
        except BaseException:
            process.kill()
            raise
    done = subprocess.CompletedProcess(command, process.returncode, out, errors)
    if check:
        done.check_returncode()
    return done


if not FORKS:
    from subprocess import Popen
