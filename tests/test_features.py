"Feature spaces: DINOv2 spelled out layer by layer, resized by Pillow; the pooled layer of a ResNet by a hook."

import os

import numpy as np
import pytest
import torch
from weights import stir

from guidance_nb.images._data import from_uint8
from guidance_nb.images._features import _dinov2_extractor, _load_dinov2, cifar_resnet, extract, feature_space


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    "A tiny DINOv2 with three registers and random weights, in a folder."
    transformers = pytest.importorskip("transformers")
    config = transformers.Dinov2WithRegistersConfig(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=3, image_size=42, patch_size=14, num_register_tokens=3
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Dinov2WithRegistersModel(config)
    stir(model, seed=0)
    folder = tmp_path_factory.mktemp("dinov2")
    model.save_pretrained(folder)
    return folder


def by_hand(x, size):
    "What the network should see, through PIL's resizing of floats, which is bicubic and antialiased."
    from PIL import Image

    x = x.numpy() / 255
    out = np.empty((len(x), 3, size, size), np.float32)
    for i in range(len(x)):
        for j in range(3):
            plane = Image.fromarray(x[i, j % x.shape[1]].astype(np.float32), mode="F")
            out[i, j] = np.asarray(plane.resize((size, size), Image.Resampling.BICUBIC))
    mean, deviation = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])
    return torch.tensor((out - mean[:, None, None]) / deviation[:, None, None], dtype=torch.float32)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_dinov2_features(weights):
    "Class token, and mean over patches alone: register by register the forward pass is spelled out here."
    transformers = pytest.importorskip("transformers")
    model = transformers.Dinov2WithRegistersModel.from_pretrained(weights).eval()
    images = torch.randint(0, 256, (5, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    x = from_uint8(images)
    with torch.no_grad():
        h = model.embeddings(by_hand(images, 28))
        assert h.shape == (5, 1 + 3 + 4, 24)  # class, registers, 2 x 2 patches
        for layer in model.encoder.layer:
            h = layer(h)
        tokens = model.layernorm(h)
    near = {"atol": 1e-4, "rtol": 0}
    found = extract(images, _dinov2_extractor(weights, 28, "cpu"), batch_size=2).rows
    torch.testing.assert_close(found["features"], tokens[:, 0], **near)
    torch.testing.assert_close(
        found["patches"], (tokens[:, 4] + tokens[:, 5] + tokens[:, 6] + tokens[:, 7]) / 4, **near
    )
    assert (found["patches"] - tokens[:, 1:].mean(1)).abs().max() > 1e-2
    for name, layer in (("dinov2", "features"), ("dinov2-patches", "patches")):
        torch.testing.assert_close(feature_space(name, weights, size=28)(x), found[layer], **near)


def test_dinov2_bad_input(weights, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="size = 30; allowed: a multiple of the patch size 14"):
        _dinov2_extractor(weights, 30)
    with pytest.raises(OSError, match="safetensors"):
        _load_dinov2(tmp_path)
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(ImportError, match=r"pip install 'guidance_nb\[dinov2\]'"):
        _load_dinov2(weights)


def test_dinov2_with_weights_missing(weights, tmp_path):
    from safetensors.torch import load_file, save_file

    kept = load_file(weights / "model.safetensors")
    del kept["embeddings.register_tokens"]
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((weights / "config.json").read_text())
    with pytest.raises(ValueError, match=r"missing weights in .*embeddings\.register_tokens"):
        _load_dinov2(tmp_path)


def test_spaces_by_name(tmp_path):
    assert feature_space("pixels") == "pixels"
    with pytest.raises(ValueError, match="space = 'vgg'; allowed: 'pixels', 'dinov2', 'dinov2-patches'"):
        feature_space("vgg")
    with pytest.raises(ValueError, match=r"path = None; allowed: a folder with config\.json"):
        feature_space("dinov2-patches")


@pytest.mark.skipif("GUIDANCE_NB_DATA" not in os.environ, reason="needs the CIFAR classifiers in GUIDANCE_NB_DATA")
def test_resnet_space_is_the_pooled_layer():
    "Features by a hook on the network's last layer, whose input they are."
    network, seen = cifar_resnet(depth=20), []
    network.linear.register_forward_hook(lambda layer, args, result: seen.append(args[0]))
    x = torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2.2 - 1.1  # some values are out of range
    network(((x.clamp(-1, 1) + 1) / 2 * 255).round().to(torch.uint8))
    found = feature_space("resnet20", batch_size=2)(x)
    torch.testing.assert_close(found, seen[0].cpu())
    assert found.shape == (5, 64) and not torch.equal(found, feature_space("resnet56")(x))
