"Latents: independent restatements, killed and divided encodings, damaged shards, and the chain from the command line."

import csv
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision import transforms
from typer.testing import CliRunner

import apart
from guidance_nb._processes import destroy_process_group
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance, dit_channel_scales
from guidance_nb.cli._app import app
from guidance_nb.cli._recipe import Recipe, override, read_recipe
from guidance_nb.cli._run import (
    Request,
    build_guided,
    generate,
    load_trained,
    make_data,
    make_loss,
    recipe_shape,
    train_recipe,
)
from guidance_nb.engine._checkpoints import checkpoints_in, read_checkpoint
from guidance_nb.images._data import _resize_crop, crop_image, load_images, load_samples
from guidance_nb.images._latents import (
    INDEX,
    decode,
    decode_all,
    decode_floats,
    describe_vae,
    draw_latents,
    encode,
    encode_folder,
    load_latents,
    load_vae,
    open_shard,
    read_index,
    shard_name,
    write_shard,
)
from guidance_nb.images._networks import image_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import DenoisingLoss, fit


def make_vae(channels: int = 3, **changes) -> AutoencoderKL:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    blocks |= {"block_out_channels": (8, 16), "norm_num_groups": 4, "mid_block_add_attention": False}
    torch.manual_seed(0)
    return AutoencoderKL(in_channels=channels, out_channels=channels, **blocks, **changes).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    "A folder with pictures of two classes and two sizes, an autoencoder, and latents of both."
    folder, rng = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    for i in range(37):
        file = folder / "pictures" / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        sides = (20, 17) if i % 3 else (40, 33)
        Image.fromarray(rng.integers(0, 256, (*sides, 3), dtype=np.uint8)).save(file)
    make_vae(scaling_factor=0.4, shift_factor=-0.2).save_pretrained(folder / "vae")
    encode_folder(folder / "pictures", folder / "whole", folder / "vae", 16, shard_rows=5, progress=False)
    return folder


def here(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100", "TERM": "dumb"})


def done(*words: object) -> str:
    result = here(*words)
    assert result.exit_code == 0, (words, result.exception, result.output)
    return result.output


def command(*words: object) -> list[str]:
    return [sys.executable, "-c", "from guidance_nb.cli._app import main; main()", *map(str, words)]


# The crop


def adm_crop(image: Image.Image, size: int) -> np.ndarray:
    "The crop of ADM's data loader, from its description: halve, resize, cut."
    while min(*image.size) >= 2 * size:
        image = image.resize((image.size[0] // 2, image.size[1] // 2), resample=Image.BOX)
    ratio = size / min(*image.size)
    image = image.resize((round(image.size[0] * ratio), round(image.size[1] * ratio)), resample=Image.BICUBIC)
    array = np.array(image)
    top, left = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[top : top + size, left : left + size]


@pytest.mark.parametrize("sides", [(16, 16), (31, 50), (64, 48), (17, 200), (33, 32), (129, 130)])
def test_crops_are_those_of_adm_and_torchvision(sides):
    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (*sides, 3), dtype=np.uint8))
    assert np.array_equal(np.array(crop_image(image, 16)), adm_crop(image, 16))
    stock = transforms.Compose([transforms.Resize(16), transforms.CenterCrop(16)])
    assert np.array_equal(np.array(_resize_crop(image, 16)), np.array(stock(image)))
    if min(sides) > 16:
        assert not np.array_equal(np.array(_resize_crop(image, 16)), adm_crop(image, 16))


# Posterior and shards


@pytest.mark.parametrize("crop", ["adm", "torchvision"])
def test_stored_numbers_are_the_posterior_of_the_cropped_picture(place, tmp_path, crop):
    encode_folder(
        place / "pictures", tmp_path, place / "vae", 16, shard_rows=9, batch_size=4, crop=crop, progress=False
    )
    vae, seen = AutoencoderKL.from_pretrained(place / "vae"), 0
    files = sorted((place / "pictures").glob("*/*.png"))
    cut = {"adm": adm_crop, "torchvision": lambda image, n: np.array(_resize_crop(image, n))}[crop]
    for shard in sorted(tmp_path.glob("shard-*.safetensors")):
        stored = load_file(shard)
        for moments, label in zip(stored["moments"], stored["labels"]):
            assert "ab"[int(label)] == files[seen].parent.name
            x = torch.from_numpy(cut(Image.open(files[seen]), 16) / 127.5 - 1).float().permute(2, 0, 1)[None]
            for view, picture in zip(moments, (x, x.flip(3))):
                with torch.no_grad():
                    posterior = vae.encode(picture).latent_dist
                assert_close(view[0], posterior.mean[0], rtol=1e-4, atol=1e-4)
                assert_close(view[1], posterior.std[0], rtol=1e-4, atol=1e-4)
            seen += 1
    assert seen == len(files) == 37


def test_draws_and_decoding_by_hand():
    mean, std, noise = (torch.randn(3, 4, 2, 2).abs() for _ in range(3))
    z = draw_latents(torch.stack([mean, std], 1), noise, 0.4, -0.2)
    assert_close(z, (mean + std * noise - -0.2) * 0.4)
    vae = make_vae(scaling_factor=0.4, shift_factor=-0.2)
    with torch.no_grad():
        x = vae.decode(z / 0.4 + -0.2).sample
    assert torch.equal(decode(vae, z), (x * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8))
    assert torch.equal(decode_all(vae, z, 2, progress=False), decode(vae, z, 2))


@pytest.mark.parametrize("constants", [{}, {"shift_factor": -0.2}, {"mean": True}, {"mean": True, "shift_factor": 3.0}])
def test_one_convention_of_scaling_everywhere(place, tmp_path, constants):
    "Stored latents, their decoding here and that of a pipeline, against the formula of diffusers' pipelines."
    mean, std = torch.tensor([0.1, -0.3, 0.5, 2.0]), torch.tensor([0.5, 1.0, 2.0, 3.0])
    settings = {key: value for key, value in constants.items() if key != "mean"}
    settings |= {"latents_mean": mean.tolist(), "latents_std": std.tolist()} if "mean" in constants else {}
    vae = make_vae(scaling_factor=0.4, **settings)
    encode_folder(place / "pictures", tmp_path, vae, 16, shard_rows=9, progress=False)
    data, rows = load_latents(tmp_path, posterior=False), torch.arange(6)
    z, _ = data.fetch(rows, torch.Generator())
    raw = data.moments(rows, torch.zeros(6, dtype=torch.long))[:, 0]
    if "mean" in constants:
        expected = (raw - mean[:, None, None]) * 0.4 / std[:, None, None]
    else:
        expected = (raw - constants.get("shift_factor", 0.0)) * 0.4
    assert_close(z, expected)
    with torch.no_grad():
        picture = vae.decode(raw).sample
    assert_close(decode_floats(vae, z), picture, rtol=1e-4, atol=1e-4)
    grey = (picture * 127.5 + 127.5).round().clamp(0, 255).to(torch.uint8)
    assert (decode(vae, z).int() - grey.int()).abs().max() <= 1  # on the border between two levels either is right


def test_half_precision_halves_the_files_and_rounds(place, tmp_path):
    index = encode_folder(place / "pictures", tmp_path, place / "vae", 16, dtype="float16", progress=False)
    one, two = (load_latents(folder) for folder in (place / "whole", tmp_path))
    rows, views = torch.arange(37), torch.ones(37, dtype=torch.long)
    assert_close(two.moments(rows, views), one.moments(rows, views), rtol=1e-3, atol=1e-3)
    assert index["shards"][0]["bytes"] < 37 * 2 * 2 * 4 * 8 * 8 * 2 + 2000


def test_numbers_that_do_not_fit_name_the_picture(place, tmp_path):
    vae = make_vae()
    with torch.no_grad():
        vae.quant_conv.bias += 1e5
    with pytest.raises(ValueError, match=r"a/00\.png are not finite in float16; allowed: a sound image, or 'float32'"):
        encode_folder(place / "pictures", tmp_path, vae, 16, dtype="float16", progress=False)
    assert not list(tmp_path.glob("shard-*"))


def test_a_killed_encoding_goes_on_and_ends_with_the_same_files(place, tmp_path):
    words = ("encode", place / "pictures", tmp_path / "out", "--vae", place / "vae", "--size", 16, "--shard-rows", 1)
    process = apart.Popen(command(*words, "--no-progress"), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    while len(list((tmp_path / "out").glob("shard-*"))) < 3 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    kept = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("shard-*")}
    assert 3 <= len(kept) < 37 and not (tmp_path / "out" / INDEX).exists()
    torn = tmp_path / "out" / f".{shard_name(30)}.1234.tmp"
    torn.write_bytes(b"half a shard")
    assert "37 pictures in 37 shards" in done(*words, "--no-progress") and not torn.exists()
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == stamp for name, stamp in kept.items())
    done("encode", place / "pictures", tmp_path / "again", *words[3:], "--no-progress")
    for path in (tmp_path / "again").iterdir():
        assert path.read_bytes() == (tmp_path / "out" / path.name).read_bytes()


def one_of_two(folder: Path) -> None:
    "What each of two processes does: encode, draw, and meet a picture that only the second one reads."
    encode_folder(folder / "pictures", folder / "two", folder / "vae", 16, shard_rows=5, progress=False)
    drawn = generate(load_trained(folder / "run"), Request(n=7, batch_size=2), progress=False)
    error = ""
    try:
        encode_folder(folder / "broken", folder / "half", folder / "vae", 16, shard_rows=2, progress=False)
    except ValueError as problem:
        error = str(problem)
    facts = {"x": drawn.x.tolist(), "error": error, "nfe": drawn.facts["nfe"]}
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(facts))
    destroy_process_group()


def test_two_processes_do_what_one_does(place):
    for i in range(4):
        file = place / "broken" / "a" / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(file)
    file.write_bytes(b"no picture")
    recipe = override(
        read_recipe("latents-tiny"), {"source": f"latents:{place / 'whole'}", "steps": 2, "grid_every": 0}
    )
    assert len(list(train_recipe(recipe, place / "run", progress=False))) == 2
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    code += f"; import test_latents as t; t.one_of_two(t.Path({str(place)!r}))"
    processes = [
        apart.Popen(
            [sys.executable, "-c", code],
            env=os.environ | world | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, told = process.communicate(timeout=300)
        assert process.returncode == 0, told
    for path in (place / "whole").iterdir():
        assert path.read_bytes() == (place / "two" / path.name).read_bytes()
    one = generate(load_trained(place / "run"), Request(n=7, batch_size=2), progress=False)
    first, second = (json.loads((place / f"{rank}.json").read_text()) for rank in range(2))
    assert first["x"] == one.x.tolist() and second["x"] == []  # pictures come together where they are written
    assert first["nfe"] == second["nfe"] == one.facts["nfe"]  # although one of them draws a sample more
    assert first["error"] == second["error"] and "a/3.png cannot be read" in first["error"]
    assert [path.name for path in (place / "half").iterdir()] == [shard_name(0)]


# Reading


def test_every_row_is_its_picture_whatever_the_order(place):
    data, vae = load_latents(place / "whole", posterior=False, verify=True), load_vae(place / "vae")
    pictures = load_images(place / "pictures", size=16)
    order = torch.randperm(37)
    x, c = data.fetch(order, torch.Generator().manual_seed(0))
    assert_close(x, draw_latents(encode(vae, pictures.images(order)), None, 0.4, -0.2), rtol=1e-4, atol=1e-4)
    assert torch.equal(c, pictures.labels[order])
    assert data.num_classes == 2 and data.classes == ("a", "b") and len(data) == 37


def test_views_and_noise_by_hand(place):
    data, plain = load_latents(place / "whole", flip=True), load_latents(place / "whole", posterior=False)
    batch, generator = torch.arange(12), torch.Generator().manual_seed(3)
    views = (torch.rand(12, generator=generator) < 0.5).long()
    noise = torch.randn(12, 4, 8, 8, generator=generator)
    expected = torch.stack(
        [
            0.4 * (m[0] + m[1] * e + 0.2)
            for i, v, e in zip(batch, views, noise)
            for m in [load_file(place / "whole" / shard_name(int(i) // 5))["moments"][int(i) % 5, v]]
        ]
    )
    x, _ = data.fetch(batch, torch.Generator().manual_seed(3))
    assert_close(x, expected)
    assert 0 < views.sum() < 12 and not torch.equal(x, plain.fetch(batch, torch.Generator())[0])
    for rows in (slice(0, 5), slice(5, 12)):
        assert torch.equal(data.fetch(batch, torch.Generator().manual_seed(3), rows)[0], x[rows])


def test_training_reads_them_and_is_the_same_in_two_passes(place):
    from guidance_nb.engine._run import Engine

    losses = []
    for accumulate in (1, 2):
        model = image_denoiser("dit-s/2", (4, 8, 8), FlowPath(), 2, width=16, depth=1, heads=2)
        engine = Engine(precision="fp32", gradient_accumulation_steps=accumulate, cpu=True)
        data = load_latents(place / "whole", flip=True)
        losses.append([s.loss for s in fit(model, DenoisingLoss(), data, 4, 8, lr=1e-3, engine=engine, progress=False)])
    assert_close(*losses, rtol=1e-4, atol=1e-5)


def test_mapping_takes_neither_memory_nor_open_files(tmp_path):
    def resident() -> int:
        "Bytes of this process that are no pages of files."
        return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])

    settings = {"pictures": 32 * 128, "shard_rows": 128, "flip": True, "image": [3, 256, 256]}
    moments, labels = torch.randn(128, 2, 2, 4, 32, 32, dtype=torch.float16), torch.zeros(128, dtype=torch.long)
    entries = [write_shard(tmp_path / shard_name(k), moments, labels, settings) for k in range(32)]  # 128 MiB
    vae = {"factor": 1.0, "shift": 0.0, "name": ""}
    index = {"format": "guidance_nb latents 1", "classes": ["a"], "settings": settings, "vae": vae, "shards": entries}
    (tmp_path / INDEX).write_text(json.dumps(index))
    files, before = len(os.listdir("/proc/self/fd")), resident()
    data = load_latents(tmp_path)
    data.fetch(torch.arange(0, 4096, 64), torch.Generator())
    assert len(os.listdir("/proc/self/fd")) == files
    assert resident() - before < 16 * 2**20


def test_any_flipped_byte_is_noticed_and_any_truncation_at_once(place, tmp_path):
    whole = (place / "whole" / shard_name(2)).read_bytes()
    file, draws = tmp_path / shard_name(2), np.random.default_rng(0)
    for at in draws.integers(0, len(whole), 40):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors (is .*damaged|holds no latents|belongs)"):
            tensors, settings, _ = open_shard(file, verify=True)
            wanted = json.loads((place / "whole" / INDEX).read_text())["settings"]
            if settings != wanted or len(tensors["labels"]) != 5:
                raise ValueError(f"{file} belongs to another encoding")
    for length in [0, 4, 100, *draws.integers(0, len(whole), 10).tolist()]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"shard-00002\.safetensors is missing or damaged \("):
            open_shard(file)


def test_a_shard_gives_back_what_was_written(tmp_path):
    file, moments = tmp_path / shard_name(0), torch.randn(6, 2, 2, 4, 8, 8)
    entry = write_shard(file, moments, torch.arange(6), {"size": 16})
    tensors, settings, promised = open_shard(file, verify=True)
    assert (settings, promised) == ({"size": 16}, entry["sha256"])
    assert torch.equal(tensors["moments"], moments) and tensors["labels"].tolist() == [*range(6)]
    whole = file.read_bytes()
    for damaged, words in ((whole[:-100], r"damaged \("), (whole[:-100] + bytes(100), "damaged: SHA-256")):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=rf"shard-00000\.safetensors is .*{words}"):
            open_shard(file, verify=True)
    with pytest.raises(ValueError, match=r"shard-00001\.safetensors is missing or damaged \(No such file"):
        open_shard(tmp_path / shard_name(1))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda file: file.unlink(), r"shard-00003\.safetensors is missing .*; allowed: start the encoding again"),
        (lambda file: file.write_bytes(file.read_bytes()[:5000]), r"shard-00003\.safetensors is missing or damaged \("),
        (lambda file: file.write_bytes(file.read_bytes()[:-9] + b"damaged!!"), "is damaged: SHA-256"),
        (
            lambda file: write_shard(file, torch.randn(6, 2, 2, 4, 8, 8), torch.arange(6), {}),
            "belongs to another encoding",
        ),
    ],
)
def test_a_shard_that_is_not_the_encodings_is_named(place, tmp_path, damage, words):
    for path in (place / "whole").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    damage(tmp_path / shard_name(3))
    with pytest.raises(ValueError, match=words):
        load_latents(tmp_path, verify=True)


def test_a_missing_shard_is_made_anew_and_an_index_comes_last(place, tmp_path):
    for path in (place / "whole").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / shard_name(3)).unlink()
    encode_folder(place / "pictures", tmp_path, place / "vae", 16, shard_rows=5, progress=False)
    assert read_index(tmp_path) == read_index(place / "whole")
    assert (tmp_path / shard_name(3)).read_bytes() == (place / "whole" / shard_name(3)).read_bytes()
    (tmp_path / INDEX).unlink()
    with pytest.raises(ValueError, match=r"latents\.json cannot be read .*no such file.*; start it again, which keeps"):
        load_latents(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="pipes")
@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in (INDEX, shard_name(1)) for k in ("empty", "foreign", "folder", "Latin-1", "order mark")]
    + [(INDEX, "pipe")],
)
def test_what_is_no_regular_file_or_no_text_is_named(place, tmp_path, name, kind):
    for path in (place / "whole").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    path, whole = tmp_path / name, (tmp_path / name).read_bytes()
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        content = {"empty": b"", "foreign": b"PK", "Latin-1": b'{"a": "\xe9"}', "order mark": b"\xef\xbb\xbf" + whole}
        path.write_bytes(content[kind])
    if kind == "order mark" and name == INDEX:
        assert len(load_latents(tmp_path)) == 37
        return
    with pytest.raises(ValueError, match=r"latents|shard-00001|encoding") as error:
        load_latents(tmp_path)
    assert "\n" not in str(error.value)


def test_damaged_and_foreign_indices(place, tmp_path):
    for path in (place / "whole").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    good = json.loads((tmp_path / INDEX).read_text())
    for change, words in (
        ({"format": "other"}, "latents.json cannot be read (format and images = ('other', 37);"),
        ({"shards": good["shards"][:-1]}, "latents.json cannot be read (format and images = ("),
        ({"classes": []}, "latents.json cannot be read"),
        ({"settings": good["settings"] | {"crop": "x"}}, "shard-00000.safetensors belongs to another encoding"),
    ):
        (tmp_path / INDEX).write_text(json.dumps(good | change))
        with pytest.raises(ValueError) as error:
            load_latents(tmp_path)
        assert words in str(error.value)
    (tmp_path / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"latents\.json cannot be read"):
        load_latents(tmp_path)


def test_wrong_pictures_and_autoencoders_are_refused(place, tmp_path):
    def fails(words, *arguments, kind=ValueError, **options):
        with pytest.raises(kind) as error:
            encode_folder(*arguments, progress=False, **options)
        assert words in str(error.value) and "\n" not in str(error.value)

    pictures, out = place / "pictures", tmp_path / "out"
    fails("allowed: images of one size, or give size", pictures, out, make_vae())
    fails("= (3, 15, 15); allowed: 3 channels, and sides that vae can divide by 2", pictures, out, make_vae(), size=15)
    fails("channels = 4; allowed: 1, 3", pictures, out, make_vae(4), size=16)
    fails("no file named config.json found", pictures, out, str(tmp_path), size=16, kind=OSError)
    fails("nowhere has 0 class folders; allowed: 'mnist', 'cifar10', or a folder", "nowhere", out, make_vae())
    assert not out.exists()


def test_the_digest_sees_every_weight(tmp_path):
    one, two = make_vae(), make_vae()
    assert describe_vae(one) == describe_vae(two)
    one.save_pretrained(tmp_path)
    assert describe_vae(load_vae(tmp_path)) == describe_vae(one)
    with torch.no_grad():
        two.decoder.conv_out.bias[0] += 1e-6
    assert describe_vae(one)["sha256"] != describe_vae(two)["sha256"]


# Guidance of some channels


def test_three_of_four_channels_as_in_the_code_of_dit():
    model = image_denoiser("dit-s/2", (4, 8, 8), FlowPath(), 3, width=16, depth=1, heads=2)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.1 * torch.randn_like(weight)
    x, t, c = torch.randn(5, 4, 8, 8), torch.rand(5) * 0.9 + 0.05, torch.tensor([0, 1, 2, 0, 1])
    both = model.output(torch.cat([x, x]), torch.cat([t, t]), torch.cat([c, c]), drop=torch.arange(10) >= 5)
    conditional, unconditional = both.split(5)  # velocities, as SiT's function gets them
    first = unconditional[:, :3] + 1.5 * (conditional[:, :3] - unconditional[:, :3])
    guided = ClassifierFreeGuidance(model, dit_channel_scales(1.5))
    velocity = guided.predict(x, t, c).velocity(model.path, t)
    assert_close(velocity, torch.cat([first, conditional[:, 3:]], 1), rtol=1e-4, atol=1e-4)


# Recipes


SETTINGS = ("sit-b2-mg", "sit-l2-mg", "sit-xl2-256-base", "sit-xl2-256-mg", "sit-xl2-512-mg", "dit-xl2-256-mg")


@pytest.mark.parametrize("name", SETTINGS)
def test_the_recipes_hold_the_settings_of_the_code(name):
    recipe = read_recipe(name)
    training, method = recipe.training, recipe.method
    assert (training.lr, training.batch_size, training.ema, training.schedule) == (1e-4, 256, 0.9999, "constant")
    assert (training.weight_decay, training.clip, training.warmup, method.dropout) == (0, 0, 0, 0.1)
    assert recipe.data.flip and recipe.sampling.sampler_steps == 250 and recipe.sampling.guided_channels == 0
    assert recipe_shape(recipe) == ((4, recipe.data.size // 8, recipe.data.size // 8), 1000)
    if method.name == "model_guidance":
        loss = make_loss(recipe)
        w = 0.5 if name in ("sit-b2-mg", "sit-l2-mg") else 0.45
        assert abs(loss.weight - w) < 1e-12 and loss.interval == (0, 0.75) and loss.start_step == 100_000
        assert recipe.sampling.guidance_scale == method.scale
    dit = name.startswith("dit")
    assert recipe.sampling.sampler == ("ddpm" if dit else "euler_maruyama")
    assert (recipe.network.path, recipe.network.prediction) == (("vp-linear", "eps") if dit else ("flow", "velocity"))


@pytest.mark.parametrize("name", SETTINGS)
def test_every_recipe_runs_from_encoded_folder_to_decoded_samples(name, place, tmp_path):
    small = ("--settings.width", 16, "--settings.depth", 1, "--settings.heads", 2, "--batch-size", 8, "--size", 0)
    words = ("--steps", 3, "--start-step", 1, "--grid-every", 0, "--sampler-steps", 3, "--no-progress")
    where = ("--source", f"latents:{place / 'whole'}", "--out", tmp_path / "run", *small, *words)
    told = done("train", name, *where)
    assert "3 steps done" in told and "gpu_hours" in told
    done("sample", tmp_path / "run", "--n", 4, "--out", tmp_path / "x.npz", "--no-progress")
    file = load_samples(tmp_path / "x.npz")
    assert file.x.shape == (4, 3, 16, 16) and file.c.tolist() == [0, 1, 0, 1]
    assert file.facts["sampler"] == read_recipe(name).sampling.sampler


def test_the_variants_are_flags(place, tmp_path):
    small = ("--settings.width", 16, "--settings.depth", 1, "--settings.heads", 2, "--batch-size", 8, "--size", 0)
    common = (*small, "--steps", 2, "--start-step", 0, "--grid-every", 0, "--sampler-steps", 2, "--no-progress")
    for number, flags in enumerate(
        (
            ("--scale-range", "1,2", "--guided-share", 0.2),
            ("--unconditional", "contrastive", "--dropout", 0, "--scale", 1.5),
            ("--method", "plain"),
        )
    ):
        run = tmp_path / str(number)
        done("train", "sit-b2-mg", "--source", f"latents:{place / 'whole'}", "--out", run, *common, *flags)
        loss = make_loss(load_trained(run).recipe)
        assert getattr(loss, "guided_share", 0.2) == (0.5 if number == 1 else 0.2)
    assert done("sample", run, "--channels", 3, "--n", 2, "--out", tmp_path / "3.npz", "--no-progress")
    assert load_samples(tmp_path / "3.npz").facts["channels"] == 3


def test_a_run_on_latents_draws_pictures_and_guides_the_channels_asked_for(place, tmp_path):
    small = {"settings.width": 16, "settings.depth": 1, "settings.heads": 2, "steps": 2, "batch_size": 8}
    small |= {"source": f"latents:{place / 'whole'}", "grid_every": 2, "sampler_steps": 2}
    for _ in train_recipe(override(read_recipe("latents-tiny"), small), tmp_path, progress=False):
        pass
    assert Image.open(tmp_path / "grid-00000002.png").size == (2 * 17 + 1, 4 * 17 + 1)
    seen, draws = load_trained(tmp_path), torch.Generator().manual_seed(0)
    point = torch.randn(2, 4, 8, 8, generator=draws), torch.tensor(0.5), torch.tensor([0, 1])
    asked = ((2.0, 0), (2.0, 3), (1.0, 0))
    four, three, none = (build_guided(seen, s, channels=n).predict(*point).x0 for s, n in asked)
    assert torch.equal(three[:, :3], four[:, :3]) and not torch.equal(three[:, 3], four[:, 3])
    assert torch.equal(three[:, 3], none[:, 3])


def test_what_does_not_fit_latents_is_refused(place, tmp_path):
    run, source = tmp_path / "run", f"latents:{place / 'whole'}"
    done("train", "latents-tiny", "--source", source, "--steps", 1, "--grid-every", 0, "--out", run, "--no-progress")
    make_vae(scaling_factor=0.3).save_pretrained(tmp_path / "other")
    for words, message in (
        (("train", "latents-tiny", "--source", "latents:nowhere"), "nowhere/latents.json cannot be read ("),
        (
            ("train", "latents-tiny", "--source", source, "--method", "evaluation_classifier"),
            "methods that need no clean",
        ),
        (("train", "latents-tiny", "--source", source, "--size", 32), "data.size = 32; allowed: [16, 16], of which"),
        (("sample", run, "--vae", tmp_path / "other"), "other has factor = 0.3; allowed: 0.4, as the latents were"),
        (("sample", run, "--vae", tmp_path / "none"), "none"),
        (("sample", run, "--channels", 9), "channels = 9; allowed: 0 to 4"),
    ):
        extra = ("--out", tmp_path / ("x" if words[0] == "train" else "x.npz"), "--no-progress")
        result = here(*words, *extra)
        assert isinstance(result.exception, ValueError | OSError), (words, result.exception)
        assert message in str(result.exception), (words, result.exception)
        assert not (tmp_path / "x.npz").exists()


def test_latents_of_pictures_that_are_not_square(place, tmp_path):
    out = tmp_path / "wide"
    done("encode", place / "pictures", out, "--vae", place / "vae", "--size", "16,32", "--no-progress")
    recipe = override(Recipe(), {"source": f"latents:{out}", "size": [16, 32]})
    assert make_data(recipe).shape == (4, 8, 16)
    with pytest.raises(ValueError, match=r"data.size = 16; allowed: \[16, 32\], of which"):
        make_data(override(recipe, {"size": 16}))
    assert recipe_shape(override(recipe, {"source": "latents:later", "size": "256,512"})) == ((4, 32, 64), 1000)


def test_mnist_encoded_trained_killed_resumed_sampled_decoded_scored(data, tmp_path):
    images = load_images("mnist", "train")
    for i in range(200):
        file = tmp_path / "digits" / str(int(images.labels[i])) / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(images.images(torch.tensor([i]))[0, 0].numpy()).save(file)
    make_vae(1).save_pretrained(tmp_path / "vae")
    done("encode", tmp_path / "digits", tmp_path / "latents", "--vae", tmp_path / "vae", "--no-progress", "--no-flip")
    assert '"pictures": 200' in done("info", tmp_path / "latents")
    words = ("latents-tiny", "--source", f"latents:{tmp_path / 'latents'}", "--flip", "false", "--steps", 30)
    words = ("train", *words, "--save-every", 5, "--grid-every", 0, "--no-progress", "--out")
    process = apart.Popen(command(*words, tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while not checkpoints_in(tmp_path / "run") and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode in (0, -signal.SIGKILL)  # it may have been quicker than we
    assert "30 steps done" in done(*words, tmp_path / "run")
    done(*words, tmp_path / "whole")
    one, two = (read_checkpoint(tmp_path / name) for name in ("run", "whole"))
    assert all(torch.equal(one.ema[key], two.ema[key]) for key in two.ema)
    small = ("--steps", 2, "--warmup", 0, "--batch-size", 32, "--network", "unet-tiny", "--limit", 64)
    done("train", "mnist-evaluation-classifier", *small, "--out", tmp_path / "eval", "--no-progress")
    done("sample", tmp_path / "run", "--n", 20, "--scale", 1.5, "--out", tmp_path / "x.npz", "--no-progress")
    assert load_samples(tmp_path / "x.npz").x.shape == (20, 1, 28, 28)
    told = done("info", tmp_path / "run")
    assert "images 1x28x28 from latents 4x14x14" in told
    done("evaluate", tmp_path / "x.npz", "--reference", tmp_path / "digits", "--features", tmp_path / "eval",
         "--rows", tmp_path / "rows.csv", "--no-progress")  # fmt: skip
    (row,) = csv.DictReader((tmp_path / "rows.csv").read_text().splitlines())
    assert float(row["fd_evaluation_classifier"]) > 0 and row["scale"] == "1.5" and row["n"] == "20"
    done("sweep", tmp_path / "run", "--scales", "1,2", "--n", 12, "--reference", tmp_path / "digits",
         "--features", tmp_path / "eval", "--out", tmp_path / "sweep", "--no-progress")  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "sweep" / "rows.csv").read_text().splitlines()))
    assert [row["scale"] for row in rows if row["method"] == "plain"] == ["1.0", "2.0"]
