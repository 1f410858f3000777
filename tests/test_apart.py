"Commands in a copy of the server end, speak and heed signals as those of a Python of their own."

import os
import signal
import subprocess
import sys
from functools import partial

import pytest

import apart


@pytest.mark.skipif(not apart.FORKS, reason="there is no server, and the commands are those of subprocess")
@pytest.mark.parametrize(
    "code",
    [
        "import sys; print(1); print(2, file=sys.stderr); sys.exit(3)",
        "import os, sys; print(*sys.argv, os.getcwd(), os.environ['A'], 'HOME' in os.environ, __name__)",
        "import os; os.kill(os.getpid(), 9)",
        "import os; os.kill(os.getpid(), 2)",
        "raise SystemExit('one line')",
        "import atexit; atexit.register(print, 'end'); print('begin'); print(input())",
        "import os; print(os.getsid(0) == os.getpid()); raise ValueError",
    ],
)
def test_a_command_is_that_of_a_process_of_its_own(tmp_path, code):
    told = []
    for module in (apart, subprocess):
        words = [sys.executable, "-c", code, "word"]
        with open(os.devnull) as nothing, open(tmp_path / "typed", "w+") as typed:
            typed.write("typed")
            typed.seek(0)
            options = {"stdin": typed if "input" in code else nothing, "start_new_session": True}
            if module is subprocess:  # as in the foreground, whatever a shell told these tests to ignore
                options["preexec_fn"] = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            process = module.Popen(words, cwd=tmp_path, env={"A": "b"}, text=True, stdout=-1, stderr=-1, **options)
            out, errors = process.communicate(timeout=60)
        told.append((process.returncode, out, errors.splitlines()[-1:]))
    assert told[0] == told[1]


def test_a_script_a_module_and_a_limit(tmp_path):
    (tmp_path / "one.py").write_text("import sys, two; print(__name__, sys.argv[1:], two.x)")
    (tmp_path / "two.py").write_text("x = 1")
    run = apart.run([sys.executable, tmp_path / "one.py", "a"], capture_output=True, text=True, check=True)
    assert run.stdout == "__main__ ['a'] 1\n"
    module = [sys.executable, "-m", "json.tool", "--help"]
    assert apart.run(module, capture_output=True, text=True).stdout.startswith("usage: ")
    with pytest.raises(subprocess.TimeoutExpired):
        apart.run([sys.executable, "-c", "import time; time.sleep(60)"], timeout=0.2)
    with pytest.raises(subprocess.CalledProcessError):
        apart.run([sys.executable, "-c", "raise SystemExit(2)"], check=True)
    process = apart.Popen([sys.executable, "-c", "print(1, flush=True); import time; time.sleep(60)"], stdout=-1)
    assert process.stdout.readline() == b"1\n" and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait() == -signal.SIGTERM
