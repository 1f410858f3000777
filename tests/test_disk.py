"Full and read-only disks, at every file that the package writes: what was there stays, nothing half-written is left."

import ast
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from guidance_nb._files import clean_remnants, digest, write_file
from guidance_nb.cli._evaluation import finish_sweep
from guidance_nb.cli._run import _write_picture
from guidance_nb.cli._tour import save_stage
from guidance_nb.engine._checkpoints import _write_checkpoint
from guidance_nb.images._data import save_samples
from guidance_nb.images._latents import make_shards, write_shard
from guidance_nb.images._metrics import PROVENANCE, append_rows
from guidance_nb.interop._grids import _save_grid
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath

PACKAGE = Path(__file__).parents[1] / "guidance_nb"


def pictures(version: int, n: int = 6) -> torch.Tensor:
    "Noise, which no format makes small."
    draws = torch.Generator().manual_seed(version)
    return torch.randint(0, 256, (n, 3, 32, 32), generator=draws, dtype=torch.uint8)


def checkpoint(folder: Path, version: int) -> None:
    model = mlp_denoiser(2, FlowPath(), 3, width=16, depth=1)
    moments = {"exp_avg/net": torch.full((4000,), float(version))}
    _write_checkpoint(folder, {"step": version}, (model, model, moments))


def table(folder: Path, version: int) -> None:
    append_rows(folder / "rows.csv", [dict.fromkeys(PROVENANCE, version)])


def curves(folder: Path, version: int) -> None:
    "Of a sweep whose table is there already."
    if not (folder / "rows.csv").exists():
        facts = dict.fromkeys(PROVENANCE, "x") | {"method": "plain", "steps": 3, "fd_seen": 0.5}
        append_rows(folder / "rows.csv", [facts | {"scale": s} for s in (1.0, 2.0)])
    finish_sweep(folder, "fd_seen")


def latents(folder: Path, version: int) -> None:
    write_shard(folder / "shard", torch.full((9, 1, 2, 4, 8, 8), float(version)), torch.arange(9), {"version": version})


def index(folder: Path, version: int) -> None:
    facts = {"facts": [version] * 2000, "settings": {"shard_rows": 1}}
    make_shards(folder / "latents.json", "shard", facts, torch.empty(0), torch.device("cpu"), lambda rows: [])


def samples(name: str):
    "Writes an archive, or a folder of PNG files."
    return lambda folder, version: save_samples(folder / name, pictures(version), facts={"v": version}, overwrite=True)


WRITERS = {
    "checkpoint": checkpoint,
    "samples in an archive": samples("samples.npz"),
    "samples in a folder": samples("samples"),
    "picture": lambda folder, version: _write_picture(pictures(version).float() / 255, folder / "grid.png", 3),
    "table of metrics": table,
    "curves": curves,
    "latents": latents,
    "index": index,
    "stage of the tour": lambda folder, version: save_stage(folder / "stage", {"x": pictures(version)}, {}),
    "table or page of the tour": lambda folder, version: write_file(folder / "page.html", str(version) * 9000),
    "grid and its table": lambda folder, version: _save_grid(pictures(version)[None, None], [{"n": 1}], folder),
}


def content(folder: Path) -> dict[str, str]:
    "What lies in a folder, hidden names included."
    return {str(p.relative_to(folder)): "" if p.is_dir() else digest(p) for p in folder.rglob("*")}


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    "No file may grow beyond a size."
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def full(write, folder: Path, numbers: tuple[int, ...]) -> str:
    "What `write` says; that it changed nothing, and named what it could not write in one line."
    before = content(folder)
    with pytest.raises(OSError, match="could not write ") as caught:
        write(folder, 2)
    assert caught.value.errno in numbers and str(folder) in str(caught.value) and "\n" not in str(caught.value)
    after = content(folder)
    if write is WRITERS["grid and its table"]:  # the table is small, and may be written before the disk is full
        before, after = ({k: v for k, v in files.items() if k != "grid.csv"} for files in (before, after))
    assert after == before
    return str(caught.value)


@pytest.mark.parametrize("share", [0.0, 0.9])
@pytest.mark.parametrize("name", WRITERS)
def test_no_room_for_a_file(tmp_path, name, share):
    write, folder, elsewhere = WRITERS[name], tmp_path / "here", tmp_path / "elsewhere"
    for version in (1, 2):
        write(elsewhere, version)
    write(folder, 1)
    largest = max(path.stat().st_size for path in elsewhere.rglob("*") if path.is_file())
    if name == "curves":
        largest = (elsewhere / "curves.png").stat().st_size
    with file_limit(int(share * largest)):
        full(write, folder, (errno.EFBIG,))
    write(folder, 2)
    assert content(folder) == content(elsewhere)


def test_remnants_of_the_dead_are_removed_and_those_of_the_living_kept(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for owner in (os.getppid(), os.getpid(), dead.pid):
        (tmp_path / f".shard-1.{owner}.tmp").write_text("half")
    (tmp_path / ".shard-1.own.tmp").write_text("somebody's")
    clean_remnants(tmp_path, "shard-*")
    assert {path.name for path in tmp_path.iterdir()} == {f".shard-1.{os.getppid()}.tmp", ".shard-1.own.tmp"}


def test_a_real_disk_that_is_full_or_read_only(tmp_path):
    "A small file system of its own, filled to some share of what is needed, then made read-only."
    apart = ["unshare", "--map-root-user", "--mount"]
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(tmp_path)]
    if not shutil.which("unshare") or subprocess.run([*apart, *mount], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount a file system")
    script = f"{' '.join(mount)} && exec {sys.executable} {__file__} {tmp_path}"
    process = subprocess.run([*apart, "sh", "-c", script], capture_output=True, text=True, timeout=300)
    assert process.returncode == 0, process.stderr
    said = json.loads(process.stdout.splitlines()[-1])
    assert len(said) == 4 * len(WRITERS)
    assert sum("No space left on device" in each for each in said) == 3 * len(WRITERS)
    assert sum("Read-only file system" in each for each in said) == len(WRITERS)


def fill_and_write(disk: Path) -> None:
    "What the process on the small disk does."
    said = []
    for write in WRITERS.values():
        folder = disk / "run"
        free = lambda: os.statvfs(disk).f_bavail * os.statvfs(disk).f_frsize  # noqa: E731
        write(folder, 1)
        before = free()
        write(disk / "trial", 1)
        need = before - free()
        shutil.rmtree(disk / "trial")
        for share in (0.0, 0.3, 0.6):
            (disk / "filler").write_bytes(b"\0" * (free() - int(share * need)))
            said.append(full(write, folder, (errno.ENOSPC,)))
            (disk / "filler").unlink()
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        said.append(full(write, folder, (errno.EROFS,)))
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        shutil.rmtree(folder)
    print(json.dumps(said))


WRITING = {"write_text", "write_bytes", "save_file", "save_model", "savez", "save_image", "save_pretrained", "to_csv"}
WRITING |= {"save", "savefig", "replace"}


def written(node: ast.AST, held: bool, function: str = "") -> Iterator[tuple[str, str]]:
    "Calls that write a file outside `with write_aside(...)`: the function they are in, and their own name."
    if isinstance(node, ast.With):
        held = held or any("write_aside(" in ast.unparse(item.context_expr) for item in node.items)
    if isinstance(node, ast.FunctionDef):
        function = node.name
    if isinstance(node, ast.Call):
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        text = ast.unparse(node)
        system = (name == "replace" and not text.startswith("os.")) or text.startswith("run.save(")
        opened = name == "open" and any(f"'{mode}" in text for mode in ("w", "a", "x"))
        memory = name == "to_csv" and not node.args
        if not held and not system and not memory and (name in WRITING or opened):
            yield function, name
    for child in ast.iter_child_nodes(node):
        yield from written(child, held, function)


def test_every_file_is_written_aside():
    "Whoever writes a file does it by `write_aside` or `write_file`, which the tests above hold."
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.name != "_files.py":
            name, tree = path.relative_to(PACKAGE).as_posix(), ast.parse(path.read_text(encoding="utf-8"))
            found |= {(name, *each) for each in written(tree, False)}
    assert found == {
        ("cli/_tour.py", "embed", "savefig"),  # into memory
        ("explorer/_live.py", "draw", "savefig"),  # into memory
        ("images/_data.py", "_download_files", "replace"),  # of a file that was checked
        ("images/_data.py", "_write_folder", "write_text"),  # into the folder aside that it is given
        ("images/_data.py", "write", "save"),  # the same
    }


if __name__ == "__main__":
    fill_and_write(Path(sys.argv[1]))
