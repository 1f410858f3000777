"""Execute notebooks and store their outputs: `python tools/refresh.py [--flagged] [--check] [nbs/NAME.ipynb ...]`.

`--check` stores nothing and names the outputs that are not those that are stored; tools/fresh.py says what that means.
Cells flagged `#| slow`, `#| cuda` or `#| eval: false` are not run and keep the outputs they have; `--flagged` runs the
first two kinds as well. A second run on the same machine changes no byte.
"""

import argparse
import base64
import io
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the same sums in the same order, whatever the machine does besides

from execnb.nbio import nb2dict, read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from PIL import Image

from apart import context
from fresh import stale
from notebooks import NOTEBOOKS, ROOT, cells, directives, is_skipped, text

FIGURES = """import matplotlib
from matplotlib_inline.backend_inline import set_matplotlib_formats
set_matplotlib_formats("retina", metadata={"Software": None}, pil_kwargs={"compress_level": 1})
matplotlib.rcParams["figure.dpi"] = 100"""  # shown at 100 dots an inch and stored at 200, for sharp screens
COLOURS = 128  # of a stored figure: a third of the bytes, and no difference to the eye


def merge_streams(outputs: list[dict]) -> list[dict]:
    "Join neighbouring pieces of one stream, which Jupyter stores as they happened to arrive."
    merged: list[dict] = []
    for out in outputs:
        if merged and out["output_type"] == "stream" and merged[-1].get("name") == out["name"]:
            merged[-1]["text"] = (text(merged[-1]["text"]) + text(out["text"])).splitlines(keepends=True)
        else:
            merged.append(out)
    return merged


def smaller(png: str, optimize: bool = True) -> str:
    "A figure with a palette of its own, in base64 as before."
    file = io.BytesIO()
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(file, "PNG", optimize=optimize)
    return base64.b64encode(file.getvalue()).decode()


def execute(path: Path, flagged: bool, check: bool = False) -> tuple[dict, str]:
    "Execute one notebook, to store or to check it; it with its outputs, and what went wrong, in words, or nothing."
    os.chdir(ROOT / "nbs")
    sys.path.insert(0, str(ROOT))
    notebook, shell = read_nb(path), CaptureShell(path, mpl_format="png")
    shell.run(FIGURES)

    def skip(cell) -> bool:
        if cell.cell_type != "code" or "nbdev_export(" in cell.source:
            return True
        if is_skipped(cell.source) and not (flagged and "eval" not in directives(cell.source)):
            return True
        cell.outputs = []
        return False

    try:
        shell.run_all(notebook, exc_stop=True, preproc=skip)
    except Exception:
        return {}, shell.prettytb(fname=os.path.relpath(path, ROOT))
    clean = nb2dict(notebook)
    clean_nb(clean)
    for number, cell in enumerate(clean["cells"], 1):
        if cell["cell_type"] == "code":
            cell["outputs"] = merge_streams(cell["outputs"])
            for data in (out["data"] for out in cell["outputs"] if "image/png" in out.get("data", {})):
                data["image/png"] = smaller(text(data["image/png"]), not check)
            errors = [text(o["text"]) for o in cell["outputs"] if o.get("name") == "stderr"]
            if errors:  # a warning carries paths of this machine, and the reader would stumble over it
                return clean, f"{os.path.relpath(path, ROOT)}: cell #{number} wrote to stderr:\n{errors[0]}"
    return clean, ""


def refresh(path: Path, flagged: bool, check: bool = False) -> str:
    "Execute one notebook and write it back, or compare; returns what went wrong, in words, or nothing."
    notebook, problem = execute(path, flagged, check)
    if problem:
        return problem
    if check:
        return "\n".join(f"{path.name}: {line}" for line in stale(cells(path), notebook["cells"], flagged))
    write_nb(notebook, path)
    return ""


def answer(to: Connection, path: Path, flagged: bool, check: bool, limit: int) -> None:
    "Refresh one notebook within a limit of processor time, in seconds, and send what went wrong."

    def stop(*_: object) -> None:
        raise TimeoutError(f"the notebook takes more than {limit} s of processor time")

    if limit:
        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, limit)
    to.send(refresh(path, flagged, check))


def refresh_apart(path: Path, flagged: bool = False, check: bool = False, limit: int = 0) -> str:
    "Refresh one notebook in a process of its own, so that none sees another's state."
    receiver, sender = context().Pipe(duplex=False)
    worker = context().Process(target=answer, args=(sender, path, flagged, check, limit))
    worker.start()
    sender.close()
    try:
        problem = receiver.recv()
    except EOFError:
        problem = f"{path.name}: its process ended without an answer"
    worker.join()
    return problem


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebooks", nargs="*", type=Path, help="default: all of nbs/")
    parser.add_argument("--flagged", action="store_true", help="run cells flagged slow or cuda too")
    parser.add_argument("--check", action="store_true", help="compare the outputs with those that are stored")
    args = parser.parse_args()
    paths = [path.resolve() for path in args.notebooks] or NOTEBOOKS

    def store(path: Path) -> bool:
        problem = (refresh if len(paths) == 1 else refresh_apart)(path, args.flagged, args.check)
        print(problem or f"{os.path.relpath(path, ROOT)}: done", file=sys.stderr if problem else sys.stdout)
        return bool(problem)

    with ThreadPoolExecutor(2) as pool:
        return int(any(list(pool.map(store, paths))))


if __name__ == "__main__":
    sys.exit(main())
