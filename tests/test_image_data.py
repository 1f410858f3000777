"Images in, samples out: independent restatements, real files, damaged files."

import gzip
import hashlib
import io
import json
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST, ImageFolder

import apart
from guidance_nb._random import keyed_generator
from guidance_nb.images import _data as image_data
from guidance_nb.images._data import (
    FILES,
    ImageData,
    crop_image,
    from_uint8,
    load_images,
    load_samples,
    read_image,
    save_samples,
    to_uint8,
)
from guidance_nb.training import batches


def picture(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# Grey levels


@given(st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=50).filter(lambda v: min(v) < 0))
def test_rounding_is_to_the_nearest_level(values):
    x = np.array(values, dtype=np.float32)
    expected = np.clip(np.rint(x * np.float32(127.5) + np.float32(127.5)), 0, 255)
    assert to_uint8(torch.from_numpy(x)).tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_level_survives(dtype):
    levels = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(levels)
    assert (x[0], x[255]) == (-1, 1)
    torch.testing.assert_close(x, -x.flip(0), rtol=0, atol=1e-7)  # black and white at equal distance from zero
    assert torch.equal(to_uint8(x.to(dtype)), levels)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (
            torch.tensor([0.0, 200.0]),
            r"x is torch.float32 in \[0, 200\]; allowed: finite, .* in \[-1, 1\]",
        ),
        (torch.tensor([0.0, float("inf")]), r"x is torch.float32 in \[0, inf\]; allowed: finite"),
        (torch.tensor([1, 2]), r"x is torch.int64 in \[1, 2\]; allowed: finite, floating-point"),
    ],
)
def test_what_is_no_image_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        to_uint8(x)


# Batches


@given(st.integers(0, 2**40), st.sampled_from([1, 2, 3, 4]), st.booleans())
def test_batches_do_not_depend_on_the_number_of_processes(key, world, flip):
    x = picture(24, 3, 4, 4)
    data = ImageData(x, torch.arange(24) % 5, tuple("abcde"), (3, 4, 4), flip)
    indices = torch.randperm(24, generator=torch.Generator().manual_seed(key % 1000))[:12]
    fetch = lambda rows: data.fetch(indices, keyed_generator(key), rows)  # noqa: E731
    images, labels = fetch(slice(None))
    parts = [fetch(slice(12 * k // world, 12 * (k + 1) // world)) for k in range(world)]
    assert torch.equal(torch.cat([p[0] for p in parts]), images)
    assert torch.equal(torch.cat([p[1] for p in parts]), labels) and torch.equal(labels, indices % 5)
    for image, i in zip(images, indices):
        original = x[i].float() / 127.5 - 1
        assert torch.equal(image, original) or (flip and torch.equal(image, original.flip(2)))


def test_fit_sees_every_image_once_per_epoch_whatever_the_processes():
    x = (torch.arange(12)[:, None] * 20 + torch.arange(4)).to(torch.uint8)[:, None, None]
    data = ImageData(x, torch.arange(12), tuple("abcdefghijkl"), (1, 1, 4), flip=True)
    one = list(batches(data, 4, seed=5, steps=6))
    for epoch in (one[:3], one[3:]):
        assert torch.cat([c for _, c in epoch]).sort().values.tolist() == [*range(12)]
    for images, labels in one:
        assert torch.equal(to_uint8(images).amin((1, 2, 3)).long(), labels * 20)
    two = [list(batches(data, 4, seed=5, steps=6, rows=rows)) for rows in (slice(0, 2), slice(2, 4))]
    for (images, labels), first, second in zip(one, *two):
        assert torch.equal(torch.cat([first[0], second[0]]), images)
        assert torch.equal(torch.cat([first[1], second[1]]), labels)
    assert any(a[1].tolist() != b[1].tolist() for a, b in zip(one, batches(data, 4, seed=6, steps=6)))


def test_half_of_the_images_are_mirrored_and_each_in_its_own_way():
    data = ImageData(picture(1000, 1, 1, 8), torch.zeros(1000, dtype=torch.long), ("a",), (1, 1, 8), flip=True)
    flips = []
    for step in range(3):
        x, _ = data.fetch(torch.arange(1000), keyed_generator(0, step))
        flips.append((to_uint8(x) != data.pixels).flatten(1).any(1))
    assert all(430 < f.sum() < 570 for f in flips)
    assert all(400 < (a != b).sum() < 600 for a, b in [flips[:2], flips[1:]])


def test_wrong_pixels_are_refused():
    data = ImageData(torch.zeros(2, 1, 4, 4), torch.zeros(2), ("a",), (1, 4, 4))
    with pytest.raises(ValueError, match=r"type of x = torch.float32; allowed: torch.uint8"):
        data.fetch(torch.arange(2), keyed_generator(0))


# Published files


def test_the_table_of_files_is_torchvisions():
    table = {name.split("/")[1]: md5 for name, md5 in FILES["cifar10"].items()}
    listed = CIFAR10.train_list + CIFAR10.test_list + [[CIFAR10.meta["filename"], CIFAR10.meta["md5"]]]
    assert table == dict(map(tuple, listed))
    assert {f"{name.split('/')[2]}.gz" for name in FILES["mnist"]} == {name for name, _ in MNIST.resources}


@pytest.mark.parametrize(("split", "stem", "count"), [("train", "train", 60_000), ("test", "t10k", 10_000)])
def test_mnist_is_what_its_files_say(data, split, stem, count):
    images = load_images("mnist", split)
    blob = (data / "MNIST" / "raw" / f"{stem}-images-idx3-ubyte").read_bytes()
    assert struct.unpack(">4i", blob[:16]) == (2051, count, 28, 28) and len(images) == count
    assert images.images(torch.tensor([7])).numpy().tobytes() == blob[16 + 7 * 784 : 16 + 8 * 784]
    assert images.pixels.numpy().tobytes() == blob[16:]
    labels = (data / "MNIST" / "raw" / f"{stem}-labels-idx1-ubyte").read_bytes()[8:]
    assert images.labels.tolist() == list(labels)
    assert images.shape == (1, 28, 28) and images.classes == tuple("0123456789")


def test_cifar_is_what_its_files_say(data):
    images = load_images("cifar10", "test")
    with open(data / "cifar-10-batches-py" / "test_batch", "rb") as file:
        batch = pickle.load(file, encoding="bytes")
    assert images.pixels.flatten(1).numpy().tobytes() == batch[b"data"].tobytes()
    assert images.labels.tolist() == batch[b"labels"] and images.classes[3] == "cat"
    assert images.shape == (3, 32, 32) and images.num_classes == 10
    with pytest.raises(ValueError, match="size = 64; allowed: 32 x 32, as stored, or sides that divide these"):
        load_images("cifar10", "test", size=64)
    with pytest.raises(ValueError, match="channels = 1; allowed: 3, as stored"):
        load_images("cifar10", "test", channels=1)
    for name in FILES:
        with pytest.raises(ValueError, match="split = 'val'; allowed: 'train', 'test'"):
            load_images(name, "val")


@pytest.mark.parametrize("size", [14, 4, 28])
def test_a_smaller_image_is_the_mean_of_blocks_halves_rounded_up(data, size):
    found, full = load_images("mnist", "test", size=size), load_images("mnist", "test")
    edge = 28 // size
    for image, small in zip(full.pixels[:50, 0].tolist(), found.pixels[:50, 0].tolist()):
        for y in range(size):
            for x in range(size):
                block = [v for row in image[edge * y : edge * (y + 1)] for v in row[edge * x : edge * (x + 1)]]
                assert small[y][x] == int(sum(block) / edge**2 + 0.5)
    assert found.shape == (1, size, size) and torch.equal(found.labels, full.labels)


def test_moves_go_every_way_and_leave_black_behind():
    "As many pixels as asked for at most; drawn for the whole batch, so that two halves are the batch."
    x = torch.randint(1, 256, (1, 2, 5, 4), dtype=torch.uint8)
    images = ImageData(x, torch.zeros(1, dtype=torch.long), ("one",), (2, 5, 4), shift=2)
    batch = torch.zeros(400, dtype=torch.long)
    whole = to_uint8(images.fetch(batch, torch.Generator().manual_seed(0))[0])
    wide = torch.nn.functional.pad(x, [2] * 4)[0]
    moved = {tuple(wide[:, i : i + 5, j : j + 4].flatten().tolist()) for i in range(5) for j in range(5)}
    assert {tuple(each.flatten().tolist()) for each in whole} == moved
    halves = [images.fetch(batch, torch.Generator().manual_seed(0), rows)[0] for rows in (slice(150), slice(150, 400))]
    assert torch.equal(to_uint8(torch.cat(halves)), whole)


def test_a_folder_of_packed_images(tmp_path):
    x, c = torch.randint(0, 256, (6, 3, 4, 4), dtype=torch.uint8), torch.tensor([0, 1, 0, 1, 1, 0])
    save_samples(tmp_path / "train.npz", x, c, {"classes": ["cat", "dog"]})
    found = load_images(tmp_path, flip=True)
    assert torch.equal(found.pixels, x) and torch.equal(found.labels, c) and found.flip
    assert found.classes == ("cat", "dog") and load_images(tmp_path, size=2).shape == (3, 2, 2)
    save_samples(tmp_path / "test.npz", x, c)
    with pytest.raises(ValueError, match=r"labels and classes of .*test\.npz = None; allowed: images in arr_0"):
        load_images(tmp_path, "test")


def damaged_copy(data, folder, name, damage):
    "Links to all files of a data set, but a damaged copy of one."
    for other in [*FILES["mnist"], *FILES["cifar10"]]:
        (folder / other).parent.mkdir(parents=True, exist_ok=True)
        if other != name:
            (folder / other).symlink_to(data / other)
    blob = bytearray((data / name).read_bytes())
    if damage == "truncated":
        blob = blob[: len(blob) // 2]
    if damage == "altered":
        blob[len(blob) // 2] ^= 1
    if damage != "missing":
        (folder / name).write_bytes(blob)


@pytest.mark.parametrize("damage", ["truncated", "altered", "missing"])
@pytest.mark.parametrize("name", ["MNIST/raw/t10k-labels-idx1-ubyte", "cifar-10-batches-py/batches.meta"])
def test_damaged_files_are_named(data, tmp_path, monkeypatch, name, damage):
    source = "mnist" if "MNIST" in name else "cifar10"
    damaged_copy(data, tmp_path, name, damage)
    words = "is missing" if damage == "missing" else "is damaged: its md5 is not "
    with pytest.raises(ValueError, match=f"{name}.*{words}") as caught:
        load_images(source, root=tmp_path, download=False)
    assert "\n" not in str(caught.value) and ("delete it" in str(caught.value)) == (damage != "missing")
    monkeypatch.setenv("GUIDANCE_NB_DATA", str(tmp_path))
    with pytest.raises(ValueError, match=f"{name}.*{words}.*GUIDANCE_NB_DATA"):
        load_images(source)


def test_the_named_folder_is_never_written_to(tmp_path, monkeypatch):
    monkeypatch.setenv("GUIDANCE_NB_DATA", str(tmp_path))
    monkeypatch.setattr(image_data, "_download_files", lambda *_: pytest.fail("a download was tried"))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte is missing; allowed: set GUIDANCE_NB_DATA"):
        load_images("mnist")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def mirror(tmp_path, monkeypatch):
    "A small MNIST to download from this machine."
    site, table, resources = tmp_path / "site", {}, []
    site.mkdir()
    for name in FILES["mnist"]:
        count = 5 if "train" in name else 3
        shape = (2051, count, 28, 28) if "images" in name else (2049, count)
        blob = struct.pack(f">{len(shape)}i", *shape) + bytes([1]) * (count * (784 if "images" in name else 1))
        table[name] = hashlib.md5(blob).hexdigest()
        packed, stem = gzip.compress(blob), name.split("/")[2]
        (site / f"{stem}.gz").write_bytes(packed)
        resources.append((f"{stem}.gz", hashlib.md5(packed).hexdigest()))
    monkeypatch.setitem(FILES, "mnist", table)
    monkeypatch.setattr(MNIST, "resources", resources)
    monkeypatch.delenv("GUIDANCE_NB_DATA", raising=False)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(SimpleHTTPRequestHandler, "log_message", lambda *_: None)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=site)) as server:
        monkeypatch.setattr(MNIST, "mirrors", [f"http://127.0.0.1:{server.server_port}/"])
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield site
        server.shutdown()


def test_a_download_is_checked_and_moved_into_place(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    images = load_images("mnist")
    assert len(images) == 5 and images.labels.tolist() == [1] * 5
    root = tmp_path / "cache" / "guidance_nb"
    assert {p.relative_to(root).as_posix() for p in root.rglob("*") if p.is_file()} == set(FILES["mnist"])
    shutil.rmtree(mirror)
    assert len(load_images("mnist", "test")) == 3  # not downloaded again


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_bad_download_leaves_nothing(mirror, tmp_path, damage):
    packed = mirror / "t10k-images-idx3-ubyte.gz"
    packed.write_bytes(packed.read_bytes()[:-1]) if damage == "truncated" else packed.unlink()
    with pytest.raises(ValueError, match=r"mnist could not be downloaded to .*; allowed: try again, or set") as caught:
        load_images("mnist", root=tmp_path / "root")
    assert "\n" not in str(caught.value) and list((tmp_path / "root").rglob("*")) == []


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="permissions do not bind this user")
def test_a_folder_that_cannot_be_written_is_said(mirror, tmp_path):
    (tmp_path / "root").mkdir(mode=0o500)
    with pytest.raises(ValueError, match=r"could not be downloaded to .*Permission denied"):
        load_images("mnist", root=tmp_path / "root")


# Folders


@pytest.fixture
def folder(tmp_path):
    "Three classes of four pictures of one size."
    for k, name in enumerate(["b", "a", "c 1"]):
        (tmp_path / name).mkdir()
        for i in range(4):
            image = Image.fromarray(picture(12, 10, 3, seed=10 * k + i).numpy())
            image.save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_a_folder_is_imagefolder(folder, monkeypatch):
    expected = ImageFolder(folder)
    for limit in (2**28, 0):
        monkeypatch.setattr(image_data, "_CACHE_BYTES", limit)
        data = load_images(folder)
        assert (data.pixels.cache is None) == (limit == 0)
        assert data.classes == tuple(expected.classes) and data.labels.tolist() == expected.targets
        assert data.shape == (3, 12, 10)
        for indices in ([5, 0, 5, 11], [*range(12)]):  # twice the same, then all: the memory hands out the right ones
            images = data.images(torch.tensor(indices))
            for i, image in zip(indices, images):
                assert image.permute(1, 2, 0).tolist() == np.array(expected[i][0]).tolist()


def test_splits_of_a_folder(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("splits")
    shutil.copytree(folder, root / "train")
    shutil.copytree(folder / "a", root / "val" / "a")
    assert len(load_images(root)) == 12 and len(load_images(root, "val")) == 4
    with pytest.raises(ValueError, match=r"test has 0 class folders; allowed: .* a sub-folder of images per class"):
        load_images(root, "test")


def test_the_crop_is_adms():
    "Halving by boxes is the mean of four pixels; a picture of the right size is only cut."
    wide = picture(64, 100, 3)
    half = torch.nn.functional.avg_pool2d(wide.permute(2, 0, 1).float(), 2)[:, :, 9:41]
    found = np.array(crop_image(Image.fromarray(wide.numpy()), 32))
    assert np.abs(found - half.permute(1, 2, 0).numpy()).max() <= 1  # rounded after each of two passes
    assert (np.array(crop_image(Image.fromarray(wide.numpy()), 64)) == wide.numpy()[:, 18:82]).all()


def test_resizing_is_antialiased():
    "Against torch's own antialiased bicubic, from 48 to 32 pixels, where no halving by boxes takes part."
    image = picture(48, 48, 3, seed=3)
    options = {"size": (32, 32), "mode": "bicubic", "antialias": True}
    expected = torch.nn.functional.interpolate(image.permute(2, 0, 1)[None].float(), **options)[0]
    found = torch.from_numpy(np.array(crop_image(Image.fromarray(image.numpy()), 32))).permute(2, 0, 1)
    # Bounds, not noise: Pillow rounds to whole levels after each of its two passes.
    assert (found - expected.clamp(0, 255)).abs().mean() < 1


def test_modes(tmp_path):
    grey = picture(6, 6, seed=1)
    Image.fromarray(grey.numpy()).save(tmp_path / "grey.png")
    assert torch.equal(read_image(tmp_path / "grey.png", 3), grey.expand(3, 6, 6))
    assert torch.equal(read_image(tmp_path / "grey.png", 1)[0], grey)
    rgba = picture(6, 6, 4, seed=2)
    Image.fromarray(rgba.numpy()).save(tmp_path / "rgba.png")
    weight = rgba[:, :, 3:].double() / 255  # composited on white: hidden colours stay hidden
    expected = weight * rgba[:, :, :3] + (1 - weight) * 255
    assert (read_image(tmp_path / "rgba.png", 3).permute(1, 2, 0) - expected).abs().max() <= 1
    Image.fromarray(np.arange(36, dtype=np.uint16).reshape(6, 6) * 1000).save(tmp_path / "deep.png")
    with pytest.raises(ValueError, match=r"deep.png cannot be read \(mode = 'I;16'; allowed: 8 bits"):
        read_image(tmp_path / "deep.png", 1)


def test_bad_folders(folder):
    Image.new("RGB", (9, 9)).save(folder / "c 1" / "9.jpg")
    with pytest.raises(ValueError, match=r"a/0.png is 10x12 and .*c 1/9.jpg is 9x9; allowed: images of one size"):
        load_images(folder)
    data = load_images(folder, size=8)
    assert data.images(torch.arange(13)).shape == (13, 3, 8, 8)
    (folder / "a" / "2.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a/2.png cannot be read"):
        load_images(folder, size=8).fetch(torch.arange(13), keyed_generator(0))
    with pytest.raises(ValueError, match=r"a/2.png cannot be read"):
        load_images(folder)
    for size in (0, 1.5):
        with pytest.raises(ValueError, match=f"size = {size}; allowed: a whole number"):
            load_images(folder, size=size)
    with pytest.raises(ValueError, match="channels = 4; allowed: 1, 3"):
        load_images(folder, size=8, channels=4)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_images_are_upright_as_viewers_show_them(tmp_path, orientation):
    "The sensor's rows and columns, turned and mirrored as EXIF says; sizes are those of what is shown."
    shown = picture(4, 6, 3, seed=5).numpy()
    undo = {1: shown, 2: shown[:, ::-1], 3: shown[::-1, ::-1], 4: shown[::-1], 5: shown.transpose(1, 0, 2)}
    undo |= {6: np.rot90(shown), 7: shown[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(shown, -1)}
    exif = Image.Exif()
    exif[0x0112] = orientation
    for kind in ("png", "webp"):
        path = tmp_path / "a" / f"0.{kind}"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(np.ascontiguousarray(undo[orientation])).save(path, exif=exif, lossless=True)
        assert read_image(path, 3).permute(1, 2, 0).tolist() == shown.tolist()
        assert image_data.common_size([path]) == (4, 6)
        assert load_images(tmp_path).shape == (3, 4, 6)
        assert load_samples(path.parent).x.shape == (1, 3, 4, 6)
        path.unlink()


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", "png"), ("LA", "png"), ("P", "png"), ("RGBA", "tif")])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_transparent_is_white(tmp_path, mode, suffix, channels):
    colours = np.full((4, 4, 4), 40, np.uint8)
    colours[:2, :, 3], colours[2:, :, 3] = 0, 255
    image, options = Image.fromarray(colours), {}
    if mode == "P":  # a palette of which one colour is transparent
        image, options = image.convert("RGB").convert("P"), {"transparency": 7}
        image.putdata([7] * 8 + [9] * 8)
        image.putpalette([40] * 768)
    path = tmp_path / f"a.{suffix}"
    (image if mode == "P" else image.convert(mode)).save(path, **options)
    found = read_image(path, channels)
    assert found[:, :2].unique().tolist() == [255] and found[:, 2:].unique().tolist() == [40]


@pytest.mark.parametrize("name", [".DS_Store", "._0.png", ".ipynb_checkpoints/0.png", ".git/a.png", ".hidden.jpg"])
def test_hidden_names_are_no_data(folder, name):
    "At every depth, for training data and for samples."
    before = load_images(folder)
    for place in (folder, folder / "a", folder / "b"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"no picture")
    after, samples = load_images(folder), load_samples(folder)
    assert after.classes == before.classes and after.labels.tolist() == before.labels.tolist()
    assert after.pixels.paths == before.pixels.paths
    assert samples.facts == {"classes": ["a", "b", "c 1"]} and len(samples.x) == 12


def test_folders_may_be_links(folder, tmp_path_factory):
    root = tmp_path_factory.mktemp("links")
    for name in ("a", "b"):
        (root / name).symlink_to(folder / name)
    assert load_images(root).labels.tolist() == [0] * 4 + [1] * 4


def whole_png():
    file = io.BytesIO()
    Image.fromarray(picture(12, 10, 3).numpy()).save(file, "png")
    return file.getvalue()


def huge_png():
    "A picture of a billion pixels by its header."
    blob = bytearray(whole_png())
    blob[16:24] = struct.pack(">2I", 40_000, 40_000)
    blob[29:33] = struct.pack(">I", __import__("zlib").crc32(bytes(blob[12:29])))
    return bytes(blob)


def spoil(path, kind):
    "Put something that is no good in the place of a file."
    path.unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "forbidden":
        path.write_bytes(whole_png())
        path.chmod(0)
    elif kind == "link to nothing":
        path.symlink_to("nowhere")
    else:
        blob = {"empty": b"", "truncated": whole_png()[:60], "foreign": b"PK\x03\x04 or not", "huge": huge_png()}[kind]
        path.write_bytes(blob)


KINDS = ["empty", "truncated", "foreign", "huge", "pipe", "folder", "link to nothing"]
KINDS += [] if os.geteuid() == 0 else ["forbidden"]


@pytest.mark.skipif(os.name == "nt", reason="pipes and permissions")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", ["image", "header", "training", "samples", "npz", "reference", "rows", "text"])
def test_every_reader_names_what_it_cannot_read(folder, kind, reader):
    "In one line, at once, and never by waiting for a pipe."
    from guidance_nb._files import read_text
    from guidance_nb.images._features import read_reference
    from guidance_nb.images._metrics import read_rows

    path = folder / "a" / {"npz": "1.npz", "reference": "1.npz", "rows": "1.csv", "text": "1.txt"}.get(reader, "1.png")
    spoil(path, kind)
    read = {
        "image": lambda: read_image(path, 3),
        "header": lambda: image_data.common_size([path, path]),
        "training": lambda: load_images(folder, size=8).images(torch.arange(12)),
        "samples": lambda: load_samples(folder, size=8),
        "npz": lambda: load_samples(path),
        "reference": lambda: read_reference(path),
        "rows": lambda: read_rows(path),
        "text": lambda: read_text(path),
    }[reader]
    if (reader, kind) in {
        ("header", "truncated"),
        ("text", "empty"),
        ("text", "foreign"),
        ("header", "forbidden"),
        ("rows", "empty"),
    }:
        return  # the header is whole; empty text is text, and an empty table has no rows yet
    if kind == "folder" and reader in ("training", "samples"):
        assert len(load_images(folder)) == 11  # a folder by the name of an image is no image
        return
    if kind == "folder" and reader == "npz":
        path = path / "none"
    with pytest.raises((ValueError, PermissionError)) as caught:
        read()
    assert "\n" not in str(caught.value) and path.name in str(caught.value)


@pytest.mark.parametrize("facts", ["[1]", "3", "{", '"a"'])
def test_facts_that_are_no_table(tmp_path, facts):
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8), facts=np.array(facts))
    with pytest.raises(ValueError, match=r"a\.npz cannot be read .*; allowed: .* a table in JSON as facts"):
        load_samples(tmp_path / "a.npz")
    save_samples(tmp_path / "a", picture(2, 3, 4, 4))
    record = json.loads((tmp_path / "a" / "facts.json").read_text())
    for change in ({"facts": [1]}, {"shape": 3}, {"sha256": None}):
        (tmp_path / "a" / "facts.json").write_text(json.dumps(record | change))
        with pytest.raises(ValueError, match=r"damaged|not those that were written"):
            load_samples(tmp_path / "a")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_cut_images_are_named(tmp_path, suffix):
    path = tmp_path / f"cut.{suffix}"
    Image.fromarray(picture(32, 32, 3).numpy()).save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole) * 3 // 4, len(whole) // 13):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=rf"cut.{suffix} cannot be read \(.*\); allowed: an image file") as caught:
            read_image(path, 3)
        assert "\n" not in str(caught.value)


# Sample files


@pytest.mark.parametrize("name", ["a.npz", "A.NPZ", "a", "scale-1.5"])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("labels", [None, [3, 0, 12000, 3, 0]])
def test_samples_round_trip(tmp_path, name, channels, labels):
    x, c = picture(5, channels, 7, 9), None if labels is None else torch.tensor(labels)
    facts = {"seed": 3, "scale": 1.5, "name": "π", "nested": {"a": [1, None]}}
    for _ in range(2):  # what this function wrote, it may replace
        path = save_samples(tmp_path / name, x, c, facts)
    found = load_samples(path)
    assert path.is_file() == name.lower().endswith(".npz")
    assert torch.equal(found.x, x) and found.facts == facts and found.x.is_contiguous()
    assert found.c is None if c is None else torch.equal(found.c, c)
    assert [p.name for p in tmp_path.iterdir()] == [name]  # nothing temporary stays
    with pytest.raises(
        ValueError, match=rf"shape of the images of .* = \({channels}, 7, 9\); allowed: .*, 7, 7\), as asked"
    ):
        load_samples(path, size=7)
    with pytest.raises(
        ValueError, match=rf"shape of the images of .* = .*; allowed: \({4 - channels}, 7, 9\), as asked for"
    ):
        load_samples(path, channels=4 - channels)


def test_npz_is_adms_layout(tmp_path):
    x = torch.rand(4, 3, 5, 5) * 2 - 1
    with np.load(save_samples(tmp_path / "a.npz", x, torch.arange(4), {"seed": 0}), allow_pickle=False) as file:
        assert file["arr_0"].dtype == np.uint8 and file["arr_0"].shape == (4, 5, 5, 3)
        assert file["arr_0"].tolist() == to_uint8(x).permute(0, 2, 3, 1).tolist()
        assert file["arr_1"].tolist() == [0, 1, 2, 3] and str(file["facts"]) == '{"seed": 0}'


def test_samples_made_elsewhere(tmp_path):
    x = picture(6, 8, 8, 3)
    np.savez_compressed(tmp_path / "reference.npz", arr_0=x, arr_1=np.arange(6, dtype=np.int32), mu=np.zeros(3))
    found = load_samples(tmp_path / "reference.npz", size=8, channels=3)
    assert torch.equal(found.x, x.permute(0, 3, 1, 2)) and found.c.tolist() == [*range(6)] and found.facts == {}
    for i, suffix in enumerate(["png", "webp", "jpg"]):
        path = tmp_path / "flat" / f"{i}.{suffix}"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (6 + i, 6), 100).save(path)
    with pytest.raises(ValueError, match=r"flat/0.png is 6x6 and .*flat/1.webp is 7x6"):
        load_samples(tmp_path / "flat")
    found = load_samples(tmp_path / "flat", size=4)
    assert found.c is None and found.x.shape[2:] == (4, 4) and (found.x.int() - 100).abs().max() <= 2
    shutil.copytree(tmp_path / "flat", tmp_path / "classes" / "dog")
    shutil.copytree(tmp_path / "flat", tmp_path / "classes" / "cat")
    found = load_samples(tmp_path / "classes", size=4, channels=1)
    assert found.c.tolist() == [0] * 3 + [1] * 3 and found.facts == {"classes": ["cat", "dog"]}
    shutil.copy(tmp_path / "flat" / "0.png", tmp_path / "classes" / "0.png")
    with pytest.raises(ValueError, match=r"classes = .images at several depths.; allowed"):
        load_samples(tmp_path / "classes", size=4)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": np.zeros((2, 4, 4, 3), np.uint8)}, "cannot be read .'arr_0'.; allowed: .* with arr_0"),
        ({"arr_0": np.zeros((2, 4, 4, 3))}, r"arr_0 is float64 in \[0, 0\] of shape .*; allowed: uint8"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.int64)}, "arr_0 is int64"),
        ({"arr_0": np.zeros((2, 3, 4, 4), np.uint8)}, r"\(2, 3, 4, 4\), channels first"),
        ({"arr_0": np.zeros((2, 4, 4), np.uint8)}, r"\(2, 4, 4\); allowed: uint8 \[n, height, width, channels\]"),
        ({"arr_0": np.zeros((2, 4, 4, 4), np.uint8)}, r"= \(4, 4, 4\); allowed: \(3, 4, 4\), as asked for"),
        ({"arr_0": np.zeros((0, 4, 4, 3), np.uint8)}, "not empty"),
        (
            {"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(3, int)},
            "arr_1 of .*int64 .*; allowed: 2 w",
        ),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.zeros(2)}, "arr_1 of .* = 'float64"),
        ({"arr_0": np.zeros((2, 4, 4, 3), np.uint8), "arr_1": np.array([-1, 0])}, "0 or more"),
        ({"arr_0": np.array([None, {}], dtype=object)}, "cannot be read"),
        ({"arr_0": np.zeros((2, 8, 8, 3), np.uint8)}, r"= \(3, 8, 8\); allowed: \(3, 4, 4\)"),
        ({"arr_0": np.zeros((2, 4, 4, 1), np.uint8)}, r"= \(1, 4, 4\); allowed: \(3, 4, 4\), as asked"),
    ],
)
def test_bad_sample_files(tmp_path, arrays, message):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(ValueError, match=message) as caught:
        load_samples(tmp_path / "a.npz", size=4, channels=3)
    assert "\n" not in str(caught.value) and "a.npz" in str(caught.value)


@pytest.mark.parametrize(
    ("x", "c", "facts", "message"),
    [
        (torch.zeros(2, 4, 4, 4, 4), None, None, r"shape of x = 'torch.float32 \(2, 4, 4, 4, 4\)"),
        (torch.zeros(0, 3, 4, 4), None, None, "not empty"),
        (torch.full((2, 3, 4, 4), 200.0), None, None, r"x is torch.float32 in \[200, 200\]"),
        (torch.full((2, 3, 4, 4), float("nan")), None, None, "allowed: finite"),
        (picture(2, 3, 4, 4), torch.zeros(3, dtype=torch.long), None, "allowed: 2 whole numbers"),
        (picture(2, 3, 4, 4), torch.zeros(2), None, "c = 'float32 "),
        (picture(2, 3, 4, 4), torch.tensor([0, -1]), None, "0 or more"),
        (picture(2, 3, 4, 4), None, {"x": torch.zeros(1)}, "Object of type Tensor is not JSON serializable"),
    ],
)
@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_bad_samples_are_not_written(tmp_path, name, x, c, facts, message):
    with pytest.raises((ValueError, TypeError), match=message):
        save_samples(tmp_path / name, x, c, facts)
    assert list(tmp_path.iterdir()) == []


def test_damaged_archives_never_give_other_samples(tmp_path):
    x = picture(3, 3, 4, 4)
    whole = save_samples(tmp_path / "a.npz", x, torch.arange(3), {"a": 1}).read_bytes()
    path = tmp_path / "b.npz"
    for size in range(0, len(whole), 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"b.npz cannot be read"):
            load_samples(path)
    damaged = 0
    for position in range(0, len(whole), 7):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 255]) + whole[position + 1 :])
        try:
            assert torch.equal(load_samples(path).x, x)  # a date, a flag nobody reads
        except ValueError as error:
            damaged += "\n" not in str(error)
    assert damaged > 50


def test_damaged_folders_are_refused(tmp_path):
    path = save_samples(tmp_path / "a", picture(4, 3, 4, 4), torch.tensor([0, 1, 0, 1]))
    one = path / "0001" / "000001.png"
    before = one.read_bytes()
    Image.fromarray(picture(4, 4, 3, seed=9).numpy()).save(one)
    with pytest.raises(ValueError, match=r"a holds 4 images, which are not those that were written"):
        load_samples(path)
    one.unlink()
    with pytest.raises(ValueError, match=r"a holds 3 images, which are not .*; allowed: all 4 of them"):
        load_samples(path)
    for name in ("0000/000001.png", "0001/one.png", "one/000001.png"):  # in another class, or not by number
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_bytes(before)
        with pytest.raises(ValueError, match=r"a holds 4 images, which are not those that were written"):
            load_samples(path)
        (path / name).unlink()


def test_nothing_else_is_overwritten(tmp_path):
    x = picture(2, 3, 4, 4)
    for name, blob in [("notes.npz", b"not an archive"), ("file", b"a file where a folder should be")]:
        (tmp_path / name).write_bytes(blob)
        with pytest.raises(ValueError, match="exists and save_samples did not write all of it"):
            save_samples(tmp_path / name, x)
        assert (tmp_path / name).read_bytes() == blob
    np.savez(tmp_path / "foreign.npz", arr_0=np.ones((1, 4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="or overwrite=True if these are samples"):
        save_samples(tmp_path / "foreign.npz", x)
    assert torch.equal(load_samples(save_samples(tmp_path / "foreign.npz", x, overwrite=True)).x, x)
    folder = save_samples(tmp_path / "samples", x)
    (folder / "thesis.txt").write_text("irreplaceable")
    for overwrite in (False, True):
        with pytest.raises(ValueError, match="allowed: another name"):
            save_samples(folder, x, overwrite=overwrite)
    assert (folder / "thesis.txt").read_text() == "irreplaceable"
    with pytest.raises(ValueError, match=r"path = .*a.png'; allowed: a name that ends in .npz, or a folder"):
        save_samples(tmp_path / "a.png", x)


@pytest.mark.parametrize("name", ["a.npz", "a"])
@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_samples(tmp_path, monkeypatch, name, failing):
    old = picture(3, 3, 4, 4)
    path = save_samples(tmp_path / name, old)

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        save_samples(path, picture(5, 3, 4, 4, seed=1))
    monkeypatch.undo()
    assert torch.equal(load_samples(path).x, old) and [p.name for p in tmp_path.iterdir()] == [name]


WRITER = """
import sys, torch
from guidance_nb.images._data import save_samples
for i in range(10**6):
    save_samples(sys.argv[1], torch.full((40, 1, 4, 4), i % 256, dtype=torch.uint8), None, {"i": i})
    print(i, flush=True)
"""


@pytest.mark.skipif(os.name == "nt", reason="kill -9")
@pytest.mark.parametrize("name", ["a.npz", "a"])
def test_killed_while_writing(tmp_path, name):
    "Whenever the process dies, whole samples are there: under their name, or for a moment under the old one's."
    with apart.Popen([sys.executable, "-c", WRITER, str(tmp_path / name)], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        time.sleep(0.2)
        process.send_signal(signal.SIGKILL)
    path = tmp_path / name
    if not path.exists():
        (path,) = tmp_path.glob(".*.old")
    found = load_samples(path)
    assert (found.x == found.facts["i"] % 256).all() and len(found.x) == 40


def test_pictures_that_were_replaced_renamed_or_moved_are_other_data(tmp_path):
    "What a resumed run compares: the same folder is the same data, also elsewhere; any other list of files is not."
    folder = tmp_path / "images"
    images = torch.randint(0, 256, (6, 1, 8, 8), dtype=torch.uint8)
    save_samples(folder, images, torch.arange(6) % 2)

    def identity(path):
        return load_images(path).digest()

    was = identity(folder)
    assert identity(folder) == was
    assert identity(folder.rename(tmp_path / "elsewhere")) == was
    (tmp_path / "elsewhere").rename(folder)
    one, two = sorted(folder.glob("*/*.png"))[0], sorted(folder.glob("*/*.png"))[-1]
    for change in (
        lambda: one.write_bytes(two.read_bytes()),
        lambda: one.rename(one.with_name("renamed.png")),
        lambda: two.rename(folder / "0000" / two.name),
    ):
        change()
        assert identity(folder) != was
        was = identity(folder)
