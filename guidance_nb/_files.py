"""Files that are written whole or not at all, the digests that identify them, and the lock of a folder."""

import csv
import errno
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

from guidance_nb._checks import explained, require_that

Json = dict[str, Any]  # Values by name, as JSON holds them


def digest(*parts: "str | bytes | Path | Tensor | np.ndarray") -> str:
    "SHA-256 of all parts, one after another."
    import numpy as np
    import torch

    found = hashlib.sha256()
    for part in parts:
        if isinstance(part, Path):
            with open(part, "rb") as file:
                while block := file.read(2**22):
                    found.update(block)
        elif isinstance(part, torch.Tensor):
            for piece in part.detach().reshape(-1).split(2**24):
                found.update(piece.cpu().view(torch.uint8).numpy())
        elif isinstance(part, np.ndarray):
            found.update(np.ascontiguousarray(part).data)
        else:
            found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def weights_digest(state: "Mapping[str, Tensor]") -> str:
    "SHA-256 of weights by name: names, types, shapes and numbers."
    named = sorted(state.items())
    return digest(*(p for key, x in named for p in (f"{key} {x.dtype} {tuple(x.shape)}", x)))


def force_to_disk(path: Path) -> None:
    "Wait until the disk has it."
    if path.is_dir() and os.name == "nt":
        return  # Windows has no such call for folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove(path: Path) -> None:
    "Remove what is there; a folder disappears under its name at once, then its files go."
    if path.is_dir() and not path.is_symlink():
        hidden = path if path.name.startswith(".") else path.with_name(f".{path.name}.{os.getpid()}.old")
        if hidden != path:
            os.replace(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    elif os.path.lexists(path):  # a read-only disk also minds the removal of what is not there
        path.unlink(missing_ok=True)


@contextmanager
def opened(path: Path, allowed: str) -> Iterator[BinaryIO]:
    """A regular file, open to be read; a pipe is none, for its reader would wait.

    Whatever goes wrong with it is a `ValueError` that names it, for decoders raise errors of many kinds.
    """
    with explained(f"{path} cannot be read", allowed, Exception):
        require_that(path.is_file(), "there is no such file", "a regular one")
        with open(path, "rb") as file:
            yield file


def read_text(path: Path) -> str:
    "Text in UTF-8, with or without a byte order mark."
    with opened(path, "text in UTF-8") as file:
        return file.read().decode("utf-8-sig")


def check_folder(name: str, folder: Path) -> Path:
    "Make a `folder`; one that cannot be written to is an error that calls it `name`, before work is done."
    with explained(f"{name} = {str(folder)!r} cannot be written", "a writable folder", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    return folder


def parse_json(text: str) -> Any:
    "What a text in JSON says; lists in lists without end are a `JSONDecodeError`, too."
    try:
        return json.loads(text)
    except RecursionError:
        raise json.JSONDecodeError("nested too deep", text[:20], 0) from None


def differences(old: object, new: object, key: str = "") -> Iterator[tuple[str, object, object]]:
    "Where two JSON-able values differ: `a.b` for b inside a, and both values."
    if isinstance(old, dict | None) and isinstance(new, dict | None):
        old, new = old or {}, new or {}
        for name in sorted({*old, *new}):
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif json.dumps(old) != json.dumps(new):
        yield key, old, new


def read_csv(path: Path) -> list[list[str]]:
    "The values of a table, line by line."
    return list(csv.reader(io.StringIO(read_text(path), newline="")))


@contextmanager
def write_aside(path: Path) -> Iterator[Path]:
    "Write under a temporary name, wait for the disk, and rename; a failure leaves what was there, and names the file."
    from safetensors import SafetensorError

    aside, old = (path.parent / f".{path.name}.{os.getpid()}.{end}" for end in ("tmp", "old"))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove(aside)
        yield aside
        for part in [*aside.rglob("*"), aside]:
            force_to_disk(part)
        if not aside.is_dir() and path.is_file():
            os.chmod(aside, path.stat().st_mode)
        if aside.is_dir() and path.exists():
            os.rename(path, old)
        try:
            os.replace(aside, path)
        except OSError:
            if old.exists():
                os.rename(old, path)
            raise
        force_to_disk(path.parent)
        remove(old)
    except (OSError, SafetensorError) as error:
        told = re.search(r"os error (\d+)", str(error))  # what safetensors says of the system's errors
        number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
        reason = os.strerror(number) if number else " ".join(str(error).split())
        raise OSError(number or errno.EIO, f"could not write {path}: {reason}") from None
    finally:
        remove(aside)


def write_file(path: Path, content: str | bytes) -> None:
    "Write a small file whole or not at all."
    with write_aside(path) as aside:
        aside.write_bytes(content.encode() if isinstance(content, str) else content)


def clean_remnants(folder: Path, pattern: str = "*") -> None:
    "Remove what killed processes left half-written; a process that lives keeps its own."
    for path in folder.glob(f".{pattern}.*"):
        owner = re.search(r"\.(\d+)\.(tmp|old)$", path.name)
        if owner and not _lives(int(owner[1])):
            remove(path)


def _lives(process: int) -> bool:
    "Whether another process of this number is at work; on Windows none is, for there is no way to ask."
    if os.name == "nt" or process == os.getpid():
        return False
    try:
        os.kill(process, 0)  # signal 0 only asks
    except (OSError, OverflowError) as error:
        return isinstance(error, PermissionError)
    return True


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    "Let one owner at a time work, where the system has such locks; a killed owner leaves none behind."
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(handle)
