"""A checkpoint: a folder `step-00001000` of three safetensors files and a record with their checksums.

It is written whole or not at all, and nothing in it can run code when it is read.
"""

import json
import os
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from torch import Tensor, nn

from guidance_nb._checks import require_that
from guidance_nb._files import Json, differences, digest, parse_json, remove, write_aside
from guidance_nb.training import learning_rate

_FORMAT = 2  # Version of the layout of a checkpoint
_NAMES = ("model.safetensors", "ema.safetensors", "optimizer.safetensors")


class _DamagedCheckpoint(ValueError):
    """A checkpoint that is incomplete or whose content is not what was written."""


@dataclass
class Checkpoint:
    """A checkpoint that was checked; tensors are read when they are asked for."""

    path: Path  # Its folder
    record: Json  # What `checkpoint.json` holds

    @property
    def step(self) -> int:
        """Number of steps done."""
        return self.record["step"]

    @property
    def metadata(self) -> Json:
        """What the caller of `fit` wrote down, such as a recipe."""
        return self.record["metadata"]

    @cached_property
    def model(self) -> dict[str, Tensor]:
        """Weights of the model, for `load_state_dict`."""
        return _read_tensors(self.path / _NAMES[0])

    @cached_property
    def ema(self) -> dict[str, Tensor]:
        """Weights of the moving average, for `load_state_dict`; sample from these."""
        return _read_tensors(self.path / _NAMES[1])

    @cached_property
    def optimizer(self) -> dict[str, Tensor]:
        """Moments of AdamW, named `exp_avg/weight`, `exp_avg_sq/weight`, `step/weight`."""
        return _read_tensors(self.path / _NAMES[2])


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """Tensors by name, weights that are shared under each of their names."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        shared = file.metadata() or {}
    return tensors | {name: tensors[kept] for name, kept in shared.items() if kept in tensors}


def checkpoints_in(folder: str | os.PathLike) -> list[Path]:
    """The checkpoints of a run, intact or not, newest first."""
    found = [path for path in Path(folder).glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def _seal_record(record: Json) -> str:
    """The text of `checkpoint.json`: the record with a checksum of itself."""
    body = {key: value for key, value in record.items() if key != "checksum"}
    return json.dumps(body | {"checksum": digest(json.dumps(body, sort_keys=True))}, indent=1, sort_keys=True)


def _measure(path: Path) -> Json:
    """What the record says of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def _write_checkpoint(folder: Path, record: Json, parts: tuple[nn.Module | dict, nn.Module, dict]) -> Path:
    """Write model, average and moments whole or not at all; an `OSError` leaves older checkpoints as they are."""
    from safetensors.torch import save_file, save_model

    target, name = folder / f"step-{record['step']:08d}", ""
    older = next((path.name for path in checkpoints_in(folder) if path != target), "")
    files = {}
    try:
        with write_aside(target) as aside:
            aside.mkdir()
            for name, part in zip(_NAMES, parts):
                if isinstance(part, dict):
                    save_file(part, aside / name)
                else:  # weights that are shared are written once
                    save_model(part, str(aside / name))
                files[name] = _measure(aside / name)
            name = "checkpoint.json"
            (aside / name).write_text(_seal_record(record | {"format": _FORMAT, "files": files}), encoding="utf-8")
    except OSError as error:
        left = f"the previous checkpoint ({older}) is intact" if older else "there is no earlier checkpoint"
        told = str(error.strerror).replace(str(target), str(target / name), 1)
        raise OSError(error.errno, f"{told}; {left}") from None
    return target


def _prune_checkpoints(newest: Path, keep: int) -> None:
    """Remove all but the newest up to this one; later ones can only be damaged, or the run had gone on from them."""
    found = checkpoints_in(newest.parent)
    for path in set(found) - set(found[found.index(newest) :][:keep]):
        remove(path)


def _check(path: Path) -> Json:
    """The record of a checkpoint, compared with its checksums."""
    record, damaged = Json(), ["checkpoint.json"]
    with suppress(FileNotFoundError, ValueError, AttributeError):
        text = (path / "checkpoint.json").read_text(encoding="utf-8")
        if text == _seal_record(found := parse_json(text)):
            record, damaged = found, []
    for name, written in record.get("files", {}).items():
        if not (path / name).is_file() or _measure(path / name) != written:
            damaged.append(name)
    if damaged:
        told = "not what was written (wrong checksum)" if (path / damaged[0]).exists() else "missing"
        raise _DamagedCheckpoint(f"{path}: {damaged[0]} is {told}")
    by = record.get("versions", {}).get("guidance_nb", "unknown")
    told = f"{path} has format {record['format']} (guidance_nb {by})"
    require_that(record["format"] == _FORMAT, told, f"format {_FORMAT}")
    return record


def read_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Check and open a checkpoint, or the newest intact one of a run; warns about damaged ones passed over."""
    path = Path(path)
    if path.name.startswith("step-") or (path / "checkpoint.json").exists():
        return Checkpoint(path, _check(path))
    told = f"{path} holds no checkpoint; allowed: a folder with step-00001000 or the like"
    problem: Exception = FileNotFoundError(told)
    for candidate in checkpoints_in(path):
        try:
            return Checkpoint(candidate, _check(candidate))
        except _DamagedCheckpoint as error:
            problem = _DamagedCheckpoint(f"no intact checkpoint is left in {path} ({error}); allowed: another folder")
            warnings.warn(f"damaged checkpoint skipped: {error}", stacklevel=3)
    raise problem


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Load weights, or name the first that does not fit."""
    from guidance_nb.engine._hardware import shard_like

    state = module.state_dict()
    own, found = ({name: tuple(value.shape) for name, value in part.items()} for part in (state, tensors))
    for name in sorted({*own, *found}):
        a, b = (f"shape {shapes[name]}" if name in shapes else "nothing" for shapes in (found, own))
        require_that(a == b, f"{source} has {a} for {name!r}, this network {b}", "the network of the checkpoint")
    module.load_state_dict({name: shard_like(value, state[name]) for name, value in tensors.items()})


_RATE = ("steps", "schedule", "hold")  # A run may go on with others if these change no learning rate it had


def _rates_before(step: int, settings: dict) -> list[float]:
    """The learning rate of every step before `step`, as a part of the largest."""
    schedule, steps, warmup = (settings[name] for name in ("schedule", "steps", "warmup"))
    return [learning_rate(n, 1.0, schedule, steps, warmup, settings.get("hold", 0)) for n in range(step)]


def _find_changes(checkpoint: Checkpoint, settings: dict, metadata: dict, may_change: tuple[str, ...]) -> list[dict]:
    """How a run differs from its checkpoint, if all of that may change; else a `ValueError` that names the first."""
    record, changes = checkpoint.record, []
    rates = [_rates_before(checkpoint.step, each) for each in (record["settings"], settings)]
    free = _RATE if settings["steps"] >= checkpoint.step and rates[0] == rates[1] else ()
    for old, new in ((record["settings"], settings), (record["metadata"], metadata)):
        for key, was, now in differences(old, json.loads(json.dumps(new))):
            fine = key in free or any(f"{key}.".startswith(f"{name}.") for name in may_change)
            told = f"{checkpoint.path} has {key} = {was!r}, this run {now!r}"
            require_that(fine, told, f"{was!r}, another folder, or {key!r} in may_change")
            changes.append({"step": checkpoint.step, "key": key, "was": was, "now": now})
    return changes
