"""Inputs that nobody wrote by hand: a command ends well, or says in one line what is wrong; never a traceback.

GUIDANCE_NB_FUZZ=2000 tries that many cases of each kind instead of a few, and others on every call.
"""

import io
import json
import os
import signal
import sys
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, Literal, get_args, get_origin
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save

from guidance_nb.cli._app import main
from guidance_nb.cli._recipe import FineTuning, Recipe, _fields, _Settings, override, read_recipe
from guidance_nb.cli._run import Request, train_recipe
from guidance_nb.cli._tour import load_stage
from guidance_nb.images._data import _read_header, load_samples, read_image, save_samples
from guidance_nb.images._features import read_reference
from guidance_nb.images._latents import open_shard, write_shard

MANY = int(os.environ.get("GUIDANCE_NB_FUZZ", "0"))
TINY = {
    "network": "unet-tiny",
    "network.settings.widths": "8,16",
    "steps": 1,
    "warmup": 0,
    "batch_size": 4,
    "sampler_steps": 1,
}
PLAIN = [f"--{key}={value}" for key, value in TINY.items()]


def examples(few: int) -> settings:
    return settings(
        max_examples=MANY or few, derandomize=not MANY, deadline=None, suppress_health_check=list(HealthCheck)
    )


class Late(BaseException):
    "What nothing catches on the way."


@contextmanager
def in_time(work: float = 20, wait: float = 200) -> Iterator[None]:
    "Nothing may hang: neither compute for 20 s nor wait for 200 s; a busy machine does neither."

    def late(number: int, frame: object) -> None:
        raise Late(f"computed for {work} s" if number == signal.SIGPROF else f"waited for {wait} s")

    clocks = {signal.SIGPROF: (signal.ITIMER_PROF, work), signal.SIGALRM: (signal.ITIMER_REAL, wait)}
    before = {number: signal.signal(number, late) for number in clocks}
    for clock, seconds in clocks.values():
        signal.setitimer(clock, seconds)
    try:
        yield
    finally:
        for number, (clock, _) in clocks.items():
            signal.setitimer(clock, 0)
            signal.signal(number, before[number])


def test_a_hang_is_noticed():
    with pytest.raises(Late, match="computed"), in_time(work=0.1):
        while True:
            pass
    with pytest.raises(Late, match="waited"), in_time(wait=0.1):
        time.sleep(300)


def one_line(action) -> Any:
    "What an action gives, or None where it says in one line what is wrong."
    try:
        with in_time():
            return action()
    except ValueError as error:
        assert str(error) and len(str(error).splitlines()) == 1, repr(error)
    return None


ODD = ("", " ", "nan", "inf", "-inf", "-1", "0", "1e400", "9" * 40, "1.5", "true", "null", "[]", "{}", "a,b", ",", "=",
       "--", "-", "é\u200b", "\\n", "../..", "/dev/null", "%s", "0x10", "'", "x" * 3000)  # fmt: skip
PATHS = ("pictures", "run", "classifier", "samples.npz", "empty", "note.txt", "pipe", "broken.npz", "missing", "link")


def values(field: Any) -> st.SearchStrategy[str]:
    "Texts for a key: mostly what it may be, and small enough to be carried out, else anything."
    hint = field.annotation
    parts = get_args(hint) if type(None) in get_args(hint) else (hint,)
    hint = parts[0]
    if get_origin(hint) is Literal:
        good = st.sampled_from([str(choice) for choice in get_args(hint)])
    elif hint is bool:
        good = st.sampled_from(["true", "false"])
    elif hint is int:
        good = st.integers(0, 3).map(str)
    elif hint is float:
        good = st.floats(0, 1).map(repr)
    elif get_origin(hint) is tuple:
        good = st.lists(st.sampled_from(["0", "0.5", "1", "2", "samples.npz"]), max_size=3).map(",".join)
    else:
        good = st.sampled_from(PATHS)
    return st.one_of(good, good, st.sampled_from(ODD))


def keys(kind: Any, without: tuple[str, ...] = ()) -> dict[str, st.SearchStrategy[str]]:
    "Texts for each key of a schema, but for those that would ask a server or a compiler."
    found = {name: values(field) for name, field in _fields(kind) if name not in without}
    if kind is Recipe:
        inner = _Settings.model_fields
        found |= {f"network.settings.{name}": values(field) for name, field in inner.items()}
        del found["network.settings"]
        found["training.steps"] = st.sampled_from(["1", "2", *ODD]).filter(
            lambda text: len(text) != 40
        )  # it would begin
        found["network.name"] = st.sampled_from(["unet-tiny", "linear", "dit-s/2", *ODD])
    return found


OUTSIDE = ("data.vae", "vae", "training.compile", "compile", "training.tracker", "method.auto_features")
OUTSIDE += ("method.space", "method.weights", "pipeline.name", "grid.clip_model", "method.auto_every", "n")
FLAGS = {"train": keys(Recipe, OUTSIDE), "sample": keys(Request, OUTSIDE), "sweep": keys(Request, OUTSIDE)}
FLAGS |= {"cost": keys(Recipe, OUTSIDE), "finetune": keys(FineTuning, OUTSIDE)}
PLACES = st.sampled_from([*PATHS, *ODD])
OWN: dict[str, dict[str, st.SearchStrategy[str]]] = {
    "train": {"out": st.sampled_from(["new", "run", "note.txt", "/proc/new", *ODD]), "may-change": PLACES},
    "sample": {"out": st.sampled_from(["x.npz", "x.png", "x", "note.txt", "samples.npz"]), "classifier": PLACES},
    "sweep": {"scales": st.sampled_from(["1", "1,2", *ODD]), "samplers": st.sampled_from(["heun", *ODD])},
    "evaluate": {"metrics": st.sampled_from(["fd", "fid", *ODD]), "rows": PLACES, "reference": PLACES},
    "postprocess": {"steps": st.sampled_from(["1", *ODD]), "scale": st.sampled_from(["1", *ODD])},
    "cost": {"gpus": st.sampled_from(["1", *ODD]), "chip": st.sampled_from(["a100", *ODD])},
    "finetune": {}, "info": {}, "tour": {"seeds": st.sampled_from([*ODD, "x"]), "scales": st.sampled_from(["", "a"])},
    "encode": {"size": st.sampled_from(["8", *ODD]), "dtype": st.sampled_from(["float16", *ODD])},
}  # fmt: skip


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    "A command, its places, and some flags, which may be missing, doubled or unknown."
    command = draw(st.sampled_from(list(OWN)))
    known, words = FLAGS.get(command, {}) | OWN[command], [command]
    if command in ("train", "cost", "finetune"):
        words.append(draw(st.sampled_from(["mnist-base", "sd15-aligned", *PATHS])))
    elif command != "tour":
        words += draw(st.lists(st.sampled_from(["run", *PATHS]), min_size=1, max_size=2))
    if command == "encode":
        words += ["--vae", "empty"]
    if command in ("evaluate", "sweep"):
        words += ["--features", draw(st.sampled_from(["classifier", "run", "missing"]))]
    if command == "sweep":
        words += ["--reference", draw(st.sampled_from(["samples.npz", "pictures", "missing"])), "--n", "4"]
    if command == "sample":
        words += ["--n", "4"]
    if command == "train":
        words += ["--data.source", "pictures", *PLAIN]
    if command == "tour":
        words += ["--data", draw(st.sampled_from([word for word in ODD if word] + ["missing"]))]
    for name in draw(st.lists(st.sampled_from(list(known)), max_size=4, unique=True)) if known else ():
        words = [word for word in words if word.split("=")[0] != f"--{name.split('.')[-1]}"]
        words += [f"--{name}={draw(known[name])}"] if draw(st.booleans()) else [f"--{name}", draw(known[name])]
    words += draw(st.sampled_from([[], [], [], ["--unknown", "1"], ["--lr"], ["--help"], ["--no-flip"], ["é"]]))
    return words if command in ("info", "cost", "tour") else [*words, "--no-progress"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    "A folder with small things of all kinds, in which the commands run; no data set is in reach."
    folder, draws, before = tmp_path_factory.mktemp("fuzz"), torch.Generator().manual_seed(0), Path.cwd()
    x = torch.randint(0, 256, (12, 3, 8, 8), generator=draws, dtype=torch.uint8)
    save_samples(folder / "pictures", x, torch.arange(12) % 2)
    save_samples(folder / "samples.npz", x, torch.arange(12) % 2)
    for name, method in (("run", "plain"), ("classifier", "evaluation_classifier")):
        recipe = override(Recipe(), TINY | {"data": str(folder / "pictures"), "method": method})
        assert [state.step for state in train_recipe(recipe, folder / name, progress=False)] == [1]
    (folder / "empty").mkdir()
    (folder / "note.txt").write_text("nothing of interest")
    (folder / "broken.npz").write_bytes((folder / "samples.npz").read_bytes()[:-30])
    (folder / "link").symlink_to("nowhere")
    os.mkfifo(folder / "pipe")
    os.chdir(folder)
    with patch.dict(os.environ, {"GUIDANCE_NB_DATA": str(folder / "empty"), "HF_HUB_OFFLINE": "1"}):
        yield folder
    os.chdir(before)


def run(words: list[str]) -> tuple[int, str]:
    "Exit code of a command in this process, and what it says on the error stream."
    told = io.StringIO()
    with patch.object(sys, "argv", ["guidance-nb", *words]), redirect_stdout(io.StringIO()), redirect_stderr(told):
        try:
            main()
        except SystemExit as end:
            return int(end.code or 0), told.getvalue()
    return 0, told.getvalue()


@pytest.mark.parametrize(
    "words",
    [
        ["train", "mnist-base", "--data.source=pictures", *PLAIN, "--out=plain"],
        ["sample", "run", "--n=4", "--steps=1", "--out=plain.npz"],
        ["sample", "run", "--n=4", "--steps=1", "--out=PLAIN.PNG"],
        ["evaluate", "samples.npz", "--features=classifier", "--reference=pictures"],
    ],
    ids=lambda words: words[0],
)
def test_the_lines_that_are_varied_end_well(place, words):
    "Or all that is tried below would be refused for one and the same reason."
    assert run([*words, "--no-progress"]) == (0, "")


@examples(25)
@given(words=command_lines())
@pytest.mark.filterwarnings("ignore")
def test_a_command_line_ends_well_or_says_why_in_one_line(place, words):
    with in_time():
        code, told = run(words)
    lines = told.strip().splitlines()
    assert code == 0 or (code == 2 and len(lines) == 1 and lines[0].startswith("guidance-nb: ")), (code, told)


leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from(ODD),
    st.sampled_from(PATHS),
)
trees = st.recursive(
    leaves, lambda part: st.lists(part, max_size=3) | st.dictionaries(st.text(max_size=5), part), max_leaves=5
)


@examples(60)
@given(
    changes=st.dictionaries(
        st.sampled_from([*keys(Recipe), "title", "network.settings", "training", ""]), trees, max_size=4
    ),
    kind=st.sampled_from([Recipe, FineTuning]),
)
def test_a_recipe_is_read_or_refused_in_one_line(changes, kind):
    one_line(lambda: override(kind(), changes))


def damaged(whole: bytes) -> st.SearchStrategy[bytes]:
    "A file with bytes that were changed, cut out, doubled or added, or of random bytes."
    spot = st.integers(0, len(whole))
    flips = st.lists(st.tuples(spot, st.integers(0, 255)), min_size=1, max_size=6)

    def change(pairs: list[tuple[int, int]]) -> bytes:
        content = bytearray(whole)
        for i, byte in pairs:
            content[min(i, len(content) - 1)] = byte
        return bytes(content)

    cuts = st.tuples(spot, spot, st.binary(max_size=8)).map(lambda cut: whole[: cut[0]] + cut[2] + whole[cut[1] :])
    return st.one_of(flips.map(change), flips.map(change), cuts, st.binary(max_size=64), st.just(whole))


def picture(kind: str, mode: str = "RGB") -> bytes:
    "A picture of 8 x 6 pixels, as a file."
    draws, file = np.random.default_rng(0), io.BytesIO()
    Image.fromarray(draws.integers(0, 256, (6, 8, 3), dtype=np.uint8)).convert(mode).save(file, kind)
    return file.getvalue()


PICTURES = [picture(kind) for kind in ("PNG", "JPEG", "BMP", "WEBP", "PPM", "TIFF")] + [picture("PNG", "P")]


@examples(100)
@given(
    content=st.sampled_from(PICTURES).flatmap(damaged),
    size=st.sampled_from([None, 4]),
    channels=st.sampled_from([1, 3]),
)
@pytest.mark.filterwarnings("ignore")
def test_an_image_file_is_read_or_refused_in_one_line(place, content, size, channels):
    (place / "image").write_bytes(content)
    image = one_line(lambda: read_image(place / "image", channels, size))
    assert image is None or (image.dtype == torch.uint8 and len(image) == channels and image.numel())
    one_line(lambda: _read_header(place / "image"))


def archive(**arrays: Any) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)
    return file.getvalue()


def header(shape: object, kind: object, fortran: object = False) -> bytes:
    "An array of numpy that says of itself what it likes."
    text = f"{{'descr': {kind!r}, 'fortran_order': {fortran!r}, 'shape': {shape!r}, }}".encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + b"\0" * 192


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    "Samples or statistics, damaged as a whole, or with arrays of strange headers and facts."
    images = np.zeros((2, 8, 8, 3), np.uint8)
    whole = archive(arr_0=images, arr_1=np.arange(2), facts=np.array(json.dumps({"a": 1})))
    if draw(st.booleans()):
        return draw(damaged(whole))
    file, shapes = io.BytesIO(), st.one_of(st.lists(st.integers(-1, 2**40), max_size=4).map(tuple), leaves)
    kinds = st.sampled_from(["|u1", "<f4", "<f8", "|O", "<U9", "<c16", "<M8[s]", "|b1", [("a", "<i4")], "x", ""])
    with zipfile.ZipFile(file, "w") as target:
        for name in draw(
            st.lists(st.sampled_from(["arr_0", "arr_1", "facts", "mu", "sigma", "x"]), min_size=1, unique=True)
        ):
            content = st.one_of(st.builds(header, shapes, kinds, st.booleans()), st.binary(max_size=32))
            facts = st.sampled_from(["[" * 100_000, "[]", "3", '{"classes": 3}', "{"])
            known = {"facts": facts.map(lambda text: archive(facts=np.array(text)))}
            part = draw(known.get(name, content) | content)
            target.writestr(
                f"{name}.npy", zipfile.ZipFile(io.BytesIO(part)).read("facts.npy") if part[:2] == b"PK" else part
            )
    return file.getvalue()


@examples(100)
@given(content=archives())
@pytest.mark.filterwarnings("ignore")
def test_an_archive_is_read_or_refused_in_one_line(place, content):
    (place / "x.npz").write_bytes(content)
    found = one_line(lambda: load_samples(place / "x.npz"))
    assert found is None or (found.x.dtype == torch.uint8 and isinstance(found.facts, dict))
    one_line(lambda: read_reference(place / "x.npz"))


@st.composite
def shards(draw: st.DrawFn, whole: bytes) -> bytes:
    "A safetensors file that is damaged, or whose header says of itself what it likes."
    if draw(st.booleans()):
        return draw(damaged(whole))
    size = int.from_bytes(whole[:8], "little")
    facts = json.loads(whole[8 : 8 + size])
    inner = json.loads(facts["__metadata__"]["guidance_nb"]) if "guidance_nb" in facts["__metadata__"] else {}
    inner |= draw(st.dictionaries(st.sampled_from(["format", "settings", "sha256", "x"]), trees, max_size=2))
    strange = st.sampled_from(["[" * 100_000, "[]", "3", "null", "{", json.dumps(inner)])
    facts["__metadata__"] = {draw(st.sampled_from(["guidance_nb", "info"])): draw(strange)}
    ends = st.lists(st.integers(0, 2**40), min_size=2, max_size=2)
    for name in draw(st.lists(st.sampled_from(["moments", "labels", "x"]), max_size=2)):
        shape = draw(st.lists(st.integers(0, 2**40), max_size=4))
        kind = draw(st.sampled_from(["F32", "F8_E5M2", "I64", "BOOL", "NO"]))
        facts[name] = {"dtype": kind, "shape": shape, "data_offsets": draw(ends)}
    text = json.dumps(facts).encode()
    return len(text).to_bytes(8, "little") + text + whole[8 + size :]


@pytest.fixture(scope="module")
def shard(place) -> bytes:
    write_shard(place / "shard", torch.zeros(2, 1, 2, 4, 2, 2), torch.arange(2), {"pictures": 2})
    return (place / "shard").read_bytes()


@examples(100)
@given(data=st.data())
def test_a_shard_is_read_or_refused_in_one_line(place, shard, data):
    (place / "x.safetensors").write_bytes(data.draw(shards(shard)))
    one_line(lambda: open_shard(place / "x.safetensors", verify=True))


@examples(60)
@given(data=st.data())
def test_a_stage_of_the_tour_is_read_or_refused_in_one_line(place, data):
    whole = save({"x": torch.zeros(3)}, {"info": json.dumps({"seconds": 1})})
    (place / "stage").write_bytes(data.draw(shards(whole)))
    one_line(lambda: load_stage(place / "stage"))


@examples(60)
@given(content=damaged(b"\xef\xbb\xbftitle = 'a'\n[training]\nsteps = 3\n[network.settings]\nwidths = [8, 16]\n"))
def test_a_recipe_file_is_read_or_refused_in_one_line(place, content):
    (place / "recipe.toml").write_bytes(content)
    one_line(lambda: read_recipe(place / "recipe.toml"))
