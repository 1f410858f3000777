"Any number of channels, images that are not square, and signals go the whole way: train, guide, sample, score, store."

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

import guidance_nb as gnb
from guidance_nb.cli._app import app
from guidance_nb.cli._recipe import FineTuning, Recipe, override, read_recipe
from guidance_nb.cli._run import _read_generated, _write_picture
from guidance_nb.images._data import ImageData, _shrink, from_uint8, load_images, load_samples, save_samples, to_uint8
from guidance_nb.images._features import extract
from guidance_nb.images._metrics import feature_scores, image_scores, nearest_images
from guidance_nb.images._networks import ImageClassifier
from guidance_nb.metrics import frechet, precision_recall
from guidance_nb.plots import show_digits, show_images
from guidance_nb.training import DenoisingLoss

IMAGES = [(2, 8, 8), (4, 8, 8), (1, 12, 20), (4, 20, 12)]
QUIET = {"progress": False}


class Mixer(nn.Module):
    "A user's own network, of samples of any shape."

    def __init__(self, shape):
        super().__init__()
        size = torch.Size(shape).numel()
        self.label = nn.Embedding(3, 8)
        self.body = nn.Sequential(nn.Linear(size + 9, 16), nn.SiLU(), nn.Linear(16, size))

    def forward(self, x, time, labels):
        seen = torch.cat([x.flatten(1), time[:, None].to(x.dtype), self.label(labels)], 1)
        return self.body(seen).view(x.shape)


def samples_of(model, shape):
    "Trained for two steps on noise, guided, sampled, filled in and inverted."
    data = 0.3 * torch.randn(16, *shape).clamp(-1, 1), torch.arange(16) % 2
    model = gnb.train(model, DenoisingLoss(dropout=0.2), data, 2, 8, **QUIET).ema
    for method in (gnb.ClassifierFreeGuidance, gnb.AdaptiveProjectedGuidance, gnb.RescaledGuidance):
        x = gnb.sample(method(model, 2.0), data[1][:6], shape, steps=2, **QUIET)
        assert x.shape == (6, *shape)
    mask = torch.zeros(shape[-1], dtype=torch.bool).index_fill(0, torch.arange(3), True)
    filled = gnb.inpaint(model, data[1], data[0], mask, 2, steps=2, **QUIET)
    assert_close(filled[..., :3], data[0][..., :3])
    return data, x


@pytest.mark.parametrize("shape", IMAGES, ids=str)
@pytest.mark.parametrize("own", [False, True], ids=["unet", "own"])
def test_images_of_any_shape_go_the_whole_way(shape, own, tmp_path):
    net = gnb.NetworkDenoiser(Mixer(shape), gnb.FlowPath(), 2)
    model = net if own else gnb.image_denoiser("unet-tiny", shape, gnb.FlowPath(), 2)
    (real, labels), x = samples_of(model, shape)
    pixels = to_uint8(real)
    kept = load_samples(save_samples(tmp_path / "x.npz", x, labels[:6]), size=shape[1:], channels=shape[0])
    assert torch.equal(kept.x, to_uint8(x)) and torch.equal(kept.c, labels[:6])
    scores = image_scores(kept.x, pixels, "pixels", ["fd", "precision"])
    by_hand = [from_uint8(part).flatten(1) for part in (kept.x, pixels)]
    assert_close(scores["precision_pixels"], precision_recall(by_hand[1], by_hand[0], 3)[0])
    assert set(scores) == {"fd_pixels", "precision_pixels"} and nearest_images(kept.x, pixels)[0].shape == (6, 2)
    assert extract(kept.x, "pixels").rows["features"].shape == (6, torch.Size(shape).numel())
    again, c = _read_generated((str(tmp_path / "x.npz"),), shape, 2)
    assert_close(again, from_uint8(kept.x))
    assert torch.equal(c, labels[:6])
    drawn = show_images(x, 3).images[0].get_size()
    wide = shape[2] if shape[0] in (1, 3) else shape[0] * shape[2]
    assert drawn == (2 * (shape[1] + 1) + 1, 3 * (wide + 1) + 1)
    show_digits({"x": x})
    _write_picture(x, tmp_path / "x.png", 3)
    assert Image.open(tmp_path / "x.png").size == drawn[::-1]


@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_data_of_any_shape_are_fetched_flipped_shifted_and_packed(shape, tmp_path):
    pixels, labels = torch.randint(256, (8, *shape), dtype=torch.uint8), torch.arange(8) % 2
    data = ImageData(pixels, labels, ("a", "b"), shape, flip=True, shift=1)
    x, c = data.fetch(torch.arange(8), torch.Generator().manual_seed(0))
    assert x.shape == pixels.shape and torch.equal(c, labels)
    save_samples(tmp_path / "train.npz", pixels, labels, {"classes": ["a", "b"]})
    found = load_images(tmp_path)
    assert found.shape == shape and torch.equal(found.images(torch.arange(8)), pixels)
    half = (shape[1] // 2, shape[2] // 4)
    small = load_images(tmp_path, size=half)
    assert small.shape == (shape[0], *half)
    means = pixels.double().view(8, shape[0], half[0], 2, half[1], 4).mean((3, 5))
    assert (small.images(torch.arange(8)) - means).abs().max() <= 0.5
    logits = ImageClassifier("unet-tiny", shape, 2, gnb.FlowPath())(x, torch.tensor(0.5))
    assert logits.shape == (8, 2)


@pytest.mark.parametrize("shape", [(64,), (2, 64)], ids=str)
def test_signals_go_the_whole_way(shape, tmp_path):
    model = gnb.NetworkDenoiser(Mixer(shape), gnb.FlowPath(), 2)
    (real, labels), x = samples_of(model, shape)
    kept = load_samples(save_samples(tmp_path / "x.npz", x, labels[:6], {"rate": 8}))
    assert torch.equal(kept.x, x) and torch.equal(kept.c, labels[:6]) and kept.facts == {"rate": 8}
    assert frechet(x.flatten(1), real.flatten(1)) >= 0
    back = gnb.sample(model, labels[:6], shape, "ddim", times=torch.linspace(0, 1, 4), init=x, **QUIET)
    assert back.shape == x.shape


def test_the_small_network_of_points_takes_signals():
    (_, _), x = samples_of(gnb.mlp_denoiser(64, gnb.FlowPath(), 2, width=8, depth=1), (64,))
    assert x.isfinite().all()


@pytest.mark.parametrize("crop", ["adm", "torchvision"])
def test_image_files_come_to_any_size(crop, tmp_path):
    "A gradient from left to right stays one, without bars, and its middle stays in the middle."
    (tmp_path / "a").mkdir()
    ramp = np.tile(np.linspace(0, 255, 60).astype(np.uint8), (30, 1))
    Image.fromarray(ramp).save(tmp_path / "a" / "0.png")
    for size in ((12, 20), (20, 12), (12, 12)):
        x = load_images(tmp_path, size=size, channels=1, crop=crop).images(torch.tensor([0]))[0, 0].float()
        assert x.shape == size and (x.diff(dim=1) > 0).all() and abs(x.mean() - 127.5) < 4
        assert_close(x, x[:1].expand_as(x))
    same, side = (load_images(tmp_path, size=s, channels=1, crop=crop).images(torch.tensor([0])) for s in ((9, 9), 9))
    assert torch.equal(same, side)


def test_what_needs_three_channels_or_a_square_says_so_in_one_line(tmp_path):
    x = torch.zeros(4, 4, 8, 8, dtype=torch.uint8)
    for call, words in (
        (lambda: save_samples(tmp_path / "x", x), "with 1 or 3 channels for PNG files"),
        (lambda: save_samples(tmp_path / "x", torch.zeros(4, 64)), "signals [n, ...] for .npz"),
        (lambda: save_samples(tmp_path / "x.npz", torch.zeros(4, 64).int()), "torch.int32 (4, 64)'; allowed: [n, "),
        (lambda: gnb.image_denoiser("dit-s/2", (1, 12, 20), gnb.FlowPath(), 2), "and square, for a transformer"),
        (lambda: _shrink(x, (3, 8)), "size = (3, 8); allowed: 8 x 8, as stored, or sides that divide these"),
        (lambda: load_images("mnist", size=(1, 2, 3)), "size = (1, 2, 3); allowed: a whole number, 1 or more"),
        (lambda: load_samples(save_samples(tmp_path / "y.npz", x), size=(8, 9)), "allowed: (4, 8, 9), as asked for"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert words in str(caught.value) and "\n" not in str(caught.value)


def test_signals_are_stored_as_they_are_and_unsound_ones_are_found(tmp_path):
    np.savez(tmp_path / "bad.npz", arr_0=np.full((2, 3), np.nan, np.float32), facts=json.dumps({}))
    with pytest.raises(ValueError, match=r"arr_0 is float32"):
        load_samples(tmp_path / "bad.npz")
    features = extract(torch.zeros(9, 2, 4, 4, dtype=torch.uint8), "pixels")
    assert features.rows["features"].shape == (9, 32)
    assert feature_scores(features, features, ["fd"])["fd_pixels"] < 1e-9


def done(*words):
    result = CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "100", "TERM": "dumb"})
    assert result.exit_code == 0, (words, result.exception, result.output)


def test_the_command_line_on_four_channels_of_12_by_20(tmp_path):
    "Train, sample, correct, score: the shape comes from the data."
    pixels, labels = torch.randint(256, (16, 4, 12, 20), dtype=torch.uint8), torch.arange(16) % 2
    real = save_samples(tmp_path / "data" / "train.npz", pixels, labels, {"classes": ["a", "b"]})
    tiny = {"network": "unet-tiny", "precision": "fp32", "warmup": 0, "sampler_steps": 2, "batch_size": 8, "limit": 16}
    common = [word for key, value in tiny.items() for word in (f"--{key}", str(value))]
    common += ["--source", str(tmp_path / "data"), "--no-progress"]

    base, made, moved = tmp_path / "base", tmp_path / "base.npz", tmp_path / "moved.npz"
    done("train", "mnist-base", "--out", base, *common, "--steps", 2, "--grid_every", 2, "--save_every", 2)
    done("sample", base, "--n", 8, "--scale", 2, "--out", made, "--no-progress")
    assert load_samples(made).x.shape == (8, 4, 12, 20)
    post = ["--samples", made, "--neighbours", 2, "--steps", 2, "--grid_every", 0, "--save_every", 2]
    done("train", "mnist-post", "--out", tmp_path / "post", *common, *post)
    done("postprocess", tmp_path / "post", made, "--out", moved, "--steps", 2, "--no-progress")
    rows = ["--rows", tmp_path / "rows.csv", "--no-progress"]
    done("evaluate", moved, "--reference", real, "--features", "pixels", "--metrics", "fd", *rows)
    assert "fd_pixels" in (tmp_path / "rows.csv").read_text()


def test_a_recipe_brings_pictures_to_a_height_and_a_width(tmp_path):
    "Square photographs of two sizes become 8 x 12, from a file and from a flag; a run of another size does not go on."
    for i, side in enumerate((16, 24) * 4):
        (tmp_path / "photos" / "ab"[i // 4]).mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / "ab"[i // 4] / f"{i}.png")
    tables = f"""
    data = {{source = "{tmp_path / "photos"}", size = [8, 12]}}
    network = "unet-tiny"
    training = {{steps = 2, batch_size = 8, save_every = 2, precision = "fp32"}}
    sampling = {{sampler_steps = 2}}
    """
    recipe, base, made = tmp_path / "wide.toml", tmp_path / "base", tmp_path / "made.npz"
    recipe.write_text(tables)
    assert read_recipe(recipe) == read_recipe(recipe, {"size": "8,12"}) == read_recipe(recipe, {"size": [8, 12]})
    done("train", recipe, "--out", base, "--no-progress")
    done("train", recipe, "--out", base, "--size", "8,12", "--no-progress")
    done("sample", base, "--n", 8, "--out", made, "--no-progress")
    assert load_samples(made).x.shape == (8, 3, 8, 12)
    scoring = ["--reference", tmp_path / "photos", "--features", "pixels", "--metrics", "fd", "--no-progress"]
    done("evaluate", made, *scoring, "--rows", tmp_path / "rows.csv")
    assert "fd_pixels" in (tmp_path / "rows.csv").read_text()
    result = CliRunner().invoke(app, ["train", str(recipe), "--out", str(base), "--size", "8", "--no-progress"])
    assert isinstance(result.exception, ValueError) and "size = [8, 12], this run 8" in str(result.exception)


@pytest.mark.parametrize("size", [-1, [8, 0], [8], "8,12,16", "8,x", 1.5, True])
@pytest.mark.parametrize("kind", [Recipe, FineTuning])
def test_a_size_is_a_side_or_a_height_and_a_width(kind, size):
    with pytest.raises(
        ValueError, match=r"^data\.size = [^\n]+; allowed: a whole number, 0 or more, or a list of 2 numbers"
    ):
        override(kind(), {"size": size})
