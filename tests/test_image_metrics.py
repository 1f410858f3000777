"Image metrics against torch-fidelity's own pipeline, SciPy, loops and closed forms. No weights are downloaded."

import csv
import math
import sys
import urllib.error
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch.utils.data import Dataset
from torch_fidelity.metric_kid import kid_features_to_metric

import apart
from guidance_nb.images import _features as fx
from guidance_nb.images import _metrics as im
from guidance_nb.metrics import frechet

INCEPTION = "inception-v3-compat"


def pictures(n, seed, size=32, channels=3):
    "Smooth random images, so that neighbours and moments are not those of white noise."
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, channels, 4, 4, generator=generator)
    return (255 * torch.nn.functional.interpolate(coarse, (size, size), mode="bilinear")).round().to(torch.uint8)


def cloud(n, d, seed, scale=1.0, shift=0.0):
    return torch.from_numpy(np.random.default_rng(seed).normal(shift, scale, (n, d)))


def plain(images):
    "A little extractor: mean and standard deviation of a channel in the four quarters."
    x = images.double() / 255
    quarters = [half for strip in x.chunk(2, 2) for half in strip.chunk(2, 3)]
    return torch.cat([f for q in quarters for f in (q.mean((2, 3)), q.std((2, 3)))], 1)


QUARTERS = fx.Extractor("quarters", plain)


@pytest.fixture(scope="session")
def weights(tmp_path_factory):
    "Inception with random weights that keep the signal alive, in a file: real shapes, other numbers."
    import torch_fidelity.feature_extractor_inceptionv3 as module

    class Blank(module.FeatureExtractorInceptionV3):
        def load_state_dict(self, state):
            return None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_state_dict_from_url", lambda *args, **options: {})
        network = Blank(INCEPTION, ["2048"])
    generator = torch.Generator().manual_seed(0)
    state = network.state_dict()
    for key, value in state.items():
        if key.endswith("conv.weight"):
            value.normal_(0, math.sqrt(2 / value[0].numel()), generator=generator)
        elif key.startswith("fc."):
            value.normal_(0, 0.3, generator=generator)
    path = tmp_path_factory.mktemp("inception") / fx._INCEPTION_FILE
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def inception(weights):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fx, "_INCEPTION_FILE", f"{fx.checksum(weights)[:8]}.pth")
        return replace(fx._inception(weights), name="inception_random")


@pytest.fixture(scope="session")
def seen(inception):
    "Two sets of images and their features, all layers."
    sets = pictures(10, 0), pictures(5, 1)
    return sets, tuple(fx.extract(x, inception, batch_size=5) for x in sets)


class Images(Dataset):
    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, i):
        return self.images[i]


def spatial_inception():
    "The name of Inception with sFID's layer in the place of FID's, registered with torch-fidelity."
    import torch_fidelity
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Spatial(FeatureExtractorInceptionV3):
        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list, **options)
            self.Mixed_6d.register_forward_hook(lambda module, args, out: setattr(self, "middle", out))

        def forward(self, x):
            wanted = self.features_list
            self.features_list = [layer for layer in wanted if layer != "mixed_6d_7"] or ["768"]
            found = dict(zip(self.features_list, super().forward(x)), mixed_6d_7=self.middle[:, :7].flatten(1))
            self.features_list = wanted
            return tuple(found[layer] for layer in wanted)

        @staticmethod
        def get_provided_features_list():
            return (*FeatureExtractorInceptionV3.get_provided_features_list(), "mixed_6d_7")

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            parent = FeatureExtractorInceptionV3.get_default_feature_layer_for_metric(metric)
            return "mixed_6d_7" if metric == "fid" else parent

    torch_fidelity.register_feature_extractor("inception-spatial", Spatial)
    return "inception-spatial"


def test_all_scores_are_torch_fidelitys(weights, seen):
    "Its own pipeline, over data sets, with generated images as input1."
    import torch_fidelity

    (fake, real), features = seen
    options = {
        "input1": Images(fake), "input2": Images(real), "cuda": False, "verbose": False, "cache": False,
        "batch_size": 5, "save_cpu_ram": True, "feature_extractor_weights_path": str(weights),
    }  # fmt: skip
    theirs = torch_fidelity.calculate_metrics(
        feature_extractor=spatial_inception(), isc=True, fid=True, prc=True, prc_neighborhood=2, **options
    )
    ours = im.feature_scores(*features, ["sfd", "score", "precision", "recall"], k=2)
    assert ours["sfd_inception_random"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-3)
    assert ours["score_inception_random"] == pytest.approx(theirs["inception_score_mean"], rel=1e-5)
    assert ours["precision_inception_random"] == pytest.approx(theirs["precision"])
    assert ours["recall_inception_random"] == pytest.approx(theirs["recall"])


def test_layers_are_those_of_the_plain_network(weights, seen):
    "The hook changes nothing; the layer of sFID is the rectified first branch of Mixed_6d, 7 of its channels."
    from torch_fidelity.utils import create_feature_extractor

    network = create_feature_extractor(
        INCEPTION, ["2048", "logits_unbiased"], cuda=False, feature_extractor_weights_path=str(weights), verbose=False
    )
    inside = {}
    network.Mixed_6d.branch1x1.register_forward_hook(lambda module, args, out: inside.update(out=out))
    (fake, _), (features, _) = seen
    with torch.no_grad():
        pooled, logits = network(fake[:4])
    layers = {"features": pooled, "logits": logits, "spatial": inside["out"][:, :7].reshape(4, 2023)}
    for layer, expected in layers.items():
        largest = expected.abs().max().item()
        torch.testing.assert_close(features.rows[layer][:4], expected, rtol=1e-4, atol=1e-4 * largest)
    assert features.rows["spatial"].std() > 0 and features.rows["features"].std(0).mean() > 0  # the test can see


def test_rows_keep_their_order_and_do_not_depend_on_the_batch(inception, seen):
    (fake, _), (features, _) = seen
    order = torch.tensor([3, 0, 2])
    few = fx.extract(fake[order], inception, batch_size=2)
    for layer, values in few.rows.items():
        expected = features.rows[layer][order]
        torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_grey_images_are_repeated(inception):
    grey = pictures(2, 3, 28, channels=1)
    one, three = fx.extract(grey, inception), fx.extract(grey.repeat(1, 3, 1, 1), inception)
    assert torch.equal(one.rows["features"], three.rows["features"])
    assert one.size == (28, 28) and one.n == 2 and one.checksum != three.checksum


def test_only_inceptions_weights_make_fid(weights, monkeypatch):
    "The file's checksum decides."
    with pytest.raises(ValueError, match=r"which are not FID's.*; allowed: weights-inception-2015-12-05-6726825d\.pth"):
        fx._inception(weights)
    stated = fx._INCEPTION_FILE.replace("6726825d", fx.checksum(weights)[:8])
    monkeypatch.setattr(fx, "_INCEPTION_FILE", stated)
    monkeypatch.setenv("GUIDANCE_NB_INCEPTION", str(weights))
    scores = im.image_scores(pictures(2, 0), pictures(2, 1), metrics="kid")
    assert list(scores) == ["kid"] and scores["kid"] != 0
    assert fx._inception(layers=["spatial"]).network(pictures(1, 0))["spatial"].shape == (1, 2023)


def test_columns_carry_the_extractor():
    assert [im.column(metric, INCEPTION) for metric in fx.LAYERS] == ["fid", "sfid", "is", "kid", "precision", "recall"]
    scores = im.image_scores(pictures(20, 0), pictures(20, 1), QUARTERS)
    assert list(scores) == ["fd_quarters", "kd_quarters", "precision_quarters", "recall_quarters"]
    with pytest.raises(ValueError, match="metric of quarters = 'fid'; allowed: 'fd', since 'fid' is Inception's"):
        im.image_scores(pictures(20, 0), pictures(20, 1), QUARTERS, metrics=["fid"])


def test_missing_weights_are_one_line(tmp_path, monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("no network")

    monkeypatch.delenv("GUIDANCE_NB_INCEPTION", raising=False)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", offline)
    with pytest.raises(ValueError, match=r"6726825d\.pth of torch-fidelity's release v0\.2\.0") as error:
        im.image_scores(pictures(2, 0), pictures(2, 1))
    text = str(error.value)
    assert "\n" not in text and "weights=" in text and "GUIDANCE_NB_INCEPTION" in text and "no network" in text
    monkeypatch.setenv("GUIDANCE_NB_INCEPTION", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"weights-inception.*6726825d\.pth"):
        fx._inception()


# Arithmetic


def moments(mean, cov):
    return torch.as_tensor(mean, dtype=torch.float64), torch.as_tensor(cov, dtype=torch.float64)


def test_frechet_closed_forms():
    "In one dimension; with commuting covariances; under a translation."
    assert frechet(moments([1.0], [[4.0]]), moments([3.0], [[9.0]])) == pytest.approx(4 + 1)
    a, b = moments(np.zeros(3), np.diag([1.0, 4.0, 9.0])), moments([1.0, 0, 2.0], np.diag([4.0, 4.0, 1.0]))
    assert frechet(a, b) == pytest.approx(5 + 1 + 0 + 4)


@pytest.mark.parametrize("n", [200, 6])
def test_frechet_by_scipy(n):
    "Also with fewer samples than dimensions, where the covariances are singular."
    x, y = cloud(n, 12, 0), cloud(n + 3, 12, 1, scale=0.5, shift=0.3) @ cloud(12, 12, 2)
    a, b = np.cov(x.numpy().T), np.cov(y.numpy().T)
    roots = scipy.linalg.sqrtm(a)
    middle = np.sqrt(np.clip(np.linalg.eigvalsh(roots.real @ b @ roots.real), 0, None)).sum()
    if n > 12:
        middle = scipy.linalg.sqrtm(a @ b).real.trace()
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum().item() + np.trace(a) + np.trace(b) - 2 * middle
    sets = (fx.Features("plain", {"features": rows.float()}) for rows in (x, y))
    assert im.feature_scores(*sets, ["fd"])["fd_plain"] == pytest.approx(expected, rel=1e-4)


def test_moments_are_numpys():
    rows = cloud(9000, 5, 0, shift=1e3).float()  # more than one part, and a mean that float32 sums would lose
    mean, cov = fx.Features("plain", {"features": rows}).moment("features")
    np.testing.assert_allclose(mean, rows.double().mean(0), rtol=1e-12)
    np.testing.assert_allclose(cov, np.cov(rows.double().numpy().T), rtol=1e-9, atol=1e-9)


def double_sum(x, y):
    def kernel(a, b):
        return (float(a @ b) / len(a) + 1) ** 3

    n, m = len(x), len(y)
    within = sum(kernel(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within += sum(kernel(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within - 2 * sum(kernel(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_is_the_double_sum():
    x, y = cloud(25, 6, 0), cloud(25, 6, 1, scale=1.5)
    assert im.kernel_distance(x, y) == pytest.approx(double_sum(x, y), rel=1e-9)


def test_kernel_distance_of_unequal_sets():
    "Subsets of the larger set; the mean over a hundred of them comes close to the double sum over all."
    x, y = cloud(40, 6, 0), cloud(80, 6, 1, scale=2.0)
    assert im.kernel_distance(x, y) == pytest.approx(double_sum(x, y), rel=0.05)


@pytest.mark.parametrize("sizes", [(40, 80), (300, 40), (4, 300)])  # the last by torch-fidelity itself
def test_kernel_distance_takes_the_subsets_of_torch_fidelity(sizes):
    x, y = cloud(sizes[0], 6, 0), cloud(sizes[1], 6, 1, scale=2.0)
    theirs = kid_features_to_metric(x, y, kid_subset_size=min(sizes), kid_subsets=100, verbose=False)
    assert im.kernel_distance(x, y) == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-9)


def test_kernel_distance_is_unbiased_where_frechet_is_not():
    "Features N(0, s^2 I): the true values are 3 (1 - s^2)^2 / d and d (1 - s)^2."
    d, s, n = 16, 1.3, 30
    pairs = [(cloud(n, d, 2 * i), cloud(n, d, 2 * i + 1, scale=s)) for i in range(300)]
    kernel = np.array([im.kernel_distance(x, y) for x, y in pairs])
    truth = 3 * (1 - s**2) ** 2 / d
    assert abs(kernel.mean() - truth) < 4 * kernel.std() / math.sqrt(len(kernel))
    pair = (fx.Features("plain", {"features": rows}) for rows in pairs[0])
    assert im.feature_scores(*pair, ["fd"])["fd_plain"] > 2 * d * (1 - s) ** 2


def loops(points, balls, k):
    radii = [sorted((a - b).norm() for b in balls)[k] for a in balls]
    return sum(any((p - b).norm() <= r for b, r in zip(balls, radii)) for p in points) / len(points)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_loops_in_the_right_order(k):
    fake, real = cloud(30, 4, 0, scale=0.7, shift=0.4).float(), cloud(45, 4, 1).float()
    expected = loops(fake, real, k), loops(real, fake, k)
    assert expected[0] != expected[1]
    assert im.precision_recall(real, fake, k) == pytest.approx(expected)


def test_bounds_of_the_class_score():
    "1 if all images get the same label distribution, the number of classes if all are sure and evenly spread."
    sure = 50 * torch.eye(5).repeat(200, 1)
    assert im.class_score(torch.randn(1, 5).repeat(50, 1)) == pytest.approx(1)
    assert im.class_score(sure[:1].repeat(50, 1)) == pytest.approx(1)
    assert im.class_score(sure) == pytest.approx(5, rel=0.05)  # ten shuffled splits are only nearly even
    p = torch.tensor([0.7, 0.2, 0.1])
    rolled = torch.stack([p.roll(i % 3) for i in range(30_000)]).log()
    assert im.class_score(rolled) == pytest.approx(math.exp((p * (3 * p).log()).sum()), rel=1e-3)
    over = fx.Features("plain", {"logits": 20 * sure[:1].repeat(50, 1)})  # underflow, of which torch-fidelity makes NaN
    with pytest.raises(ValueError, match="score_plain = nan"):
        im.feature_scores(over, over, ["score"])


# Reference files


def reference_file(path, images=6, **changes):
    rng = np.random.default_rng(0)
    arrays = {}
    for size, end in ((2048, ""), (2023, "_s")):
        arrays["mu" + end], arrays["sigma" + end] = rng.normal(size=size), np.eye(size) * 2.0
    arrays["arr_0"] = pictures(images, 5).permute(0, 2, 3, 1).numpy()
    arrays = {key: value for key, value in (arrays | changes).items() if value is not None}
    np.savez(path, **arrays)
    return path


def test_reference_file_is_read(tmp_path, inception, seen):
    "Moments from the file, neighbours from its images."
    reference = fx.read_reference(reference_file(tmp_path / "ref.npz"), n=50_000)
    assert reference.images.shape == (6, 3, 32, 32) and torch.equal(reference.images, pictures(6, 5))
    rows = torch.randn(30, 2048, generator=torch.Generator().manual_seed(0))
    samples = fx.Features(INCEPTION, {"features": rows})
    mean, cov = samples.moment("features")
    # with the reference's covariance 2 I the root is that of one matrix
    centred = (rows - rows.mean(0)).double().numpy()  # and the 30 rows have the eigenvalues of their covariance
    root = 2 * math.sqrt(2) * np.sqrt(np.clip(np.linalg.eigvalsh(centred @ centred.T / 29), 0, None)).sum()
    expected = ((mean - reference.moments["features"][0]) ** 2).sum().item() + cov.trace().item() + 2 * 2048 - root
    assert im.image_scores(samples, reference, metrics=["fid"])["fid"] == pytest.approx(expected, rel=1e-6)
    row = im.provenance(samples, reference, "heun", 32, 1.5, 0)
    assert row["reference"] == "ref.npz" and row["reference_n"] == 50_000 and len(row["reference_checksum"]) == 16


def test_reference_files_images_give_neighbours(tmp_path, weights, monkeypatch):
    monkeypatch.setattr(fx, "_INCEPTION_FILE", f"{fx.checksum(weights)[:8]}.pth")
    reference = fx.read_reference(reference_file(tmp_path / "ref.npz", images=4))
    samples = pictures(5, 5)[[0, 1, 2, 3]]  # nearly the images of the file, which were drawn six at a time
    scores = im.image_scores(samples, reference, metrics=["kid", "precision", "recall"], weights=weights, k=1)
    rows = [fx.extract(x, fx._inception(weights, ["features"])).rows["features"] for x in (samples, reference.images)]
    assert (scores["precision"], scores["recall"]) == pytest.approx(im.precision_recall(*rows[::-1], k=1))
    assert scores["kid"] == pytest.approx(im.kernel_distance(*rows), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arr_0": np.zeros((3, 8, 8, 3))}, "arr_0 of .* = .float64"),
        ({"arr_0": np.zeros((3, 3, 8, 8), dtype=np.uint8)}, "allowed: uint8"),
        ({"mu": None}, "ref.npz cannot be read .'mu'.; allowed: .* with mu and sigma"),
        (dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s")), "ref.npz cannot be read .'mu'."),
        ({"mu": np.zeros(64)}, r"mu, sigma of .* = \(\(64,\), \(2048, 2048\)\); allowed: \[2048\]"),
        ({"sigma_s": np.eye(5)}, r"mu_s, sigma_s of .* = \(\(2023,\), \(5, 5\)\); allowed: \[2023\]"),
        ({"mu": np.full(2048, np.nan)}, "allowed: .* finite"),
        ({"mu": np.array([{}], dtype=object)}, "cannot be read"),
    ],
)  # fmt: skip
def test_broken_reference_files(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as error:
        fx.read_reference(reference_file(tmp_path / "ref.npz", **changes))
    assert "\n" not in str(error.value)


def test_files_that_are_no_reference(tmp_path):
    path = tmp_path / "ref.npz"
    for content in (b"", b"not a zip", reference_file(tmp_path / "whole.npz").read_bytes()[:-300]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read .*; allowed: an \.npz file of numbers"):
            fx.read_reference(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(ValueError, match="cannot be read"):
        fx.read_reference(tmp_path / "array.npy")
    bare = fx.read_reference(reference_file(path, mu_s=None, sigma_s=None, arr_0=None))
    samples = fx.Features(INCEPTION, {"features": cloud(5, 2048, 0)})
    with pytest.raises(
        ValueError, match=r"ref\.npz has rows of no layer, moments of features; allowed: rows of spatial"
    ):
        im.image_scores(samples, bare, metrics=["sfid"])
    with pytest.raises(ValueError, match=r"ref.npz has .* moments of features; allowed: rows of features"):
        im.image_scores(samples, bare, metrics=["kid"])
    with pytest.raises(ValueError, match=r"reference = .seen by inception-v3-compat.; allowed: features of quarters"):
        im.image_scores(pictures(5, 0), bare, QUARTERS)


# Evaluation classifiers, copies, labels


def test_agreement_of_a_one_hot_classifier():
    labels = torch.tensor([0, 1, 2, 1, 0, 0])
    images = (labels * 50).to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4)

    def classifier(x):
        assert x.shape[1] == 3
        return torch.nn.functional.one_hot((x[:, 0, 0, 0] // 50).long(), 4).float()

    share, each = im.class_agreement(images, labels, classifier, batch_size=4)
    assert share == 1 and each[:3].tolist() == [1, 1, 1] and each[3].isnan()
    share, each = im.class_agreement(images, torch.tensor([0, 1, 2, 2, 0, 1]), classifier)
    assert share == pytest.approx(4 / 6) and each[:3].tolist() == [1, 0.5, 0.5]
    with pytest.raises(ValueError, match="labels contains 4; allowed: 0 to 3"):
        im.class_agreement(images, labels + 2, classifier)


@pytest.mark.parametrize(("depth", "parameters", "accuracy"), [(20, 269_722, 0.9173), (56, 853_018, 0.9339)])
def test_the_networks_are_those_whose_accuracy_was_measured(data, depth, parameters, accuracy):
    "On 400 test images; all 10,000 give 91.73 and 93.39 %."
    from torchvision.datasets import CIFAR10

    network = fx.cifar_resnet(data / "classifiers", depth, device="cpu")
    assert sum(p.numel() for p in network.parameters()) == parameters
    test = CIFAR10(data, train=False)
    images, labels = torch.from_numpy(test.data[:400]).permute(0, 3, 1, 2), torch.tensor(test.targets[:400])
    share, _ = im.class_agreement(images, labels, network)
    assert abs(share - accuracy) < 3 * math.sqrt(accuracy * (1 - accuracy) / 400)
    extractor = fx.resnet_extractor(network)
    features = fx.extract(images[:50], extractor)
    assert features.rows["features"].shape == (50, 64) and extractor.name == f"resnet{depth}"
    assert torch.equal(features.rows["logits"].argmax(1), network(images[:50]).argmax(1))
    assert list(im.image_baseline(features, metrics="fd")) == [f"fd_resnet{depth}_baseline"]


def test_damaged_classifier_files(data, tmp_path, monkeypatch):
    whole = next((data / "classifiers").glob("resnet20-*.th"))
    (tmp_path / whole.name).write_bytes(whole.read_bytes()[:-1])
    with pytest.raises(ValueError, match="is damaged: its name and its SHA-256 disagree"):
        fx.cifar_resnet(tmp_path, 20)
    (tmp_path / "mine.th").write_bytes(whole.read_bytes())
    with pytest.raises(ValueError, match=r"mine\.th cannot be read .*CifarResNet: Missing key"):
        fx.cifar_resnet(tmp_path / "mine.th", 56)
    with pytest.raises(ValueError, match=r"no such file.*; allowed: resnet56-\*\.th as published"):
        fx.cifar_resnet(tmp_path, 56)
    monkeypatch.delenv("GUIDANCE_NB_DATA")
    with pytest.raises(ValueError, match="or GUIDANCE_NB_DATA with it in classifiers/"):
        fx.cifar_resnet()


def test_nearest_images_by_loops():
    x, y = pictures(9, 0, 8), pictures(300, 1, 8)
    x[4] = y[17]
    distance, index = im.nearest_images(x, y, k=3)
    table = ((x[:, None].double() - y.double()) ** 2).mean((2, 3, 4)).sqrt()
    expected, order = table.sort(1)
    torch.testing.assert_close(distance, expected[:, :3])
    assert torch.equal(index, order[:, :3]) and distance[4, 0] == 0 and index[4, 0] == 17


def test_nearest_images_are_exact_among_frames_of_a_film():
    "Pictures that differ in a few grey levels, which a product in single precision cannot tell apart."
    g = torch.Generator().manual_seed(0)
    scene = torch.randint(0, 250, (1, 3, 32, 32), generator=g)
    changed = torch.rand(400, 3, 32, 32, generator=g) < 1e-3
    film = (scene + changed * torch.randint(1, 3, changed.shape, generator=g)).to(torch.uint8)
    shown, train = film[:40], film[40:]
    table = (shown[:, None].int() - train.int()).square().sum((2, 3, 4))
    expected, order = table.sort(dim=1, stable=True)
    distance, index = im.nearest_images(shown, train, k=5)
    assert torch.equal(index, order[:, :5])
    torch.testing.assert_close(distance, (expected[:, :5].double() / 3072).sqrt())


def test_share_of_copies_with_known_number():
    train = pictures(200, 0, 8)
    samples = torch.cat([train[:3], (train[3:5].int() + 1).clamp(max=255).to(torch.uint8), pictures(5, 9, 8)])
    share, mean = im.copy_share(samples, train)
    assert share == 0.5 and mean > 0
    with pytest.raises(ValueError, match="equal shapes"):
        im.copy_share(samples[:, :1], train)


# Rows


def row(**more):
    features = fx.Features("quarters", {"features": cloud(20, 3, 0)}, name="train", n=20, checksum="ab")
    return im.provenance(features, features, "heun", 32, 1.5, 7) | more


def test_provenance_is_complete():
    values = row()
    assert list(values) == list(im.PROVENANCE) and all(value not in (None, "") for value in values.values())
    assert values["labels"] == "balanced" and values["scale"] == 1.5 and values["torch"] == torch.__version__


def test_rows_are_appended_without_loss(tmp_path):
    path = tmp_path / "new" / "rows.csv"
    im.append_rows(path, [row(fd_quarters=0.1 + 0.2, note='with "quotes", and a comma\nand a line')])
    before = im.read_rows(path)[1][0]
    im.append_rows(path, [row(kd_quarters=-1e-30), row(fd_quarters=2.0, extra=None)])
    columns, rows = im.read_rows(path)
    assert columns == [*im.PROVENANCE, "fd_quarters", "note", "kd_quarters", "extra"]
    assert {key: rows[0][key] for key in before} == before and float(rows[0]["fd_quarters"]) == 0.1 + 0.2
    assert rows[1]["fd_quarters"] == "" and float(rows[1]["kd_quarters"]) == -1e-30
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


def test_a_crash_while_writing_keeps_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    im.append_rows(path, [row()])
    before = path.read_bytes()

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        im.append_rows(path, [row()])
    assert path.read_bytes() == before and [p.name for p in tmp_path.iterdir()] == ["rows.csv"]


def test_other_tables_are_refused(tmp_path):
    path = tmp_path / "rows.csv"
    with pytest.raises(ValueError, match=r"missing keys of a row = .hardware.; allowed: none"):
        im.append_rows(path, [{key: value for key, value in row().items() if key != "hardware"}])
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="is not a table of image metrics: it lacks n, reference"):
        im.append_rows(path, [row()])
    assert path.read_text() == "a,b\n1,2\n"
    path.unlink()
    im.append_rows(path, [row()])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())  # as a spreadsheet program saves it
    assert len(im.read_rows(path)[1]) == 1
    path.write_text(path.read_text("utf-8-sig") + "1,2\n")
    with pytest.raises(ValueError, match=r"metrics: line 3 has 2 values; allowed: .* 15 values in each line"):
        im.append_rows(path, [row()])


def test_processes_that_append_at_once_lose_nothing(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from guidance_nb.images import _metrics as im\n"
        "path, who = Path(sys.argv[1]), sys.argv[2]\n"
        "(path.parent / who).touch()\n"
        "while not all((path.parent / name).exists() for name in 'ab'): time.sleep(0.001)\n"  # start together
        "base = dict.fromkeys(im.PROVENANCE, 1)\n"
        "for i in range(40): im.append_rows(path, [base | {'who': who, 'i': i}])\n"
    )
    path = tmp_path / "rows.csv"
    running = [apart.Popen([sys.executable, "-c", code, str(path), who]) for who in "ab"]
    assert [process.wait(60) for process in running] == [0, 0]
    with open(path, newline="", encoding="utf-8") as file:
        found = sorted((line["who"], int(line["i"])) for line in csv.DictReader(file))
    assert found == [(who, i) for who in "ab" for i in range(40)]


# Baselines and bad input


def test_baseline_is_between_disjoint_halves():
    real = pictures(60, 0)
    features = fx.extract(real, QUARTERS)
    baseline = im.image_baseline(features, n=20, seed=3)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(3))
    expected = im.image_scores(real[order[:20]], real[order[20:40]], QUARTERS)
    assert baseline == pytest.approx({f"{key}_baseline": value for key, value in expected.items()}, rel=1e-4, abs=1e-9)
    assert list(im.image_baseline(real, extractor=QUARTERS)) == list(baseline)
    with pytest.raises(ValueError, match="n = 31; allowed: 1 to 30, for two disjoint sets of 60 images"):
        im.image_baseline(features, n=31)


def test_features_are_reused():
    calls = []
    counted = fx.Extractor("counted", lambda x: calls.append(len(x)) or plain(x))
    reference = fx.extract(pictures(10, 0), counted, name="train")
    for seed in (1, 2):
        im.image_scores(pictures(8, seed), reference, counted)
    assert sum(calls) == 10 + 8 + 8 and reference.name == "train"


GOOD = pictures(10, 0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: im.image_scores(GOOD.float(), GOOD, QUARTERS), "samples is torch.float32 .*; allowed: torch.uint8"),
        (lambda: im.image_scores(GOOD, GOOD.numpy(), QUARTERS), "reference is ndarray; allowed: torch.uint8"),
        (lambda: im.image_scores(GOOD[:, :2], GOOD, QUARTERS), "shapes of samples .*, and equal channels"),
        (lambda: im.image_scores(GOOD[0], GOOD, QUARTERS), r"samples is torch.uint8 \(3, 32, 32\)"),
        (lambda: im.image_scores(GOOD[:0], GOOD, QUARTERS), r"samples is torch.uint8 \(0, .*n >= 1 "),
        (lambda: im.image_scores(pictures(10, 0, 28), GOOD, QUARTERS), "shapes of samples .*; allowed: one size"),
        (lambda: im.image_scores(GOOD[:1], GOOD, QUARTERS, ["fd"]), "features has shape .1, 24.; allowed: .* n >= 2"),
        (lambda: im.image_scores(GOOD[:1], GOOD, QUARTERS, ["kd"]), "kd_quarters = nan"),
        (lambda: im.image_scores(GOOD, GOOD[:3], QUARTERS), "real has shape .3, 24.; allowed: .* n >= 4"),
        (lambda: im.image_scores(GOOD, GOOD, QUARTERS, ["score"]), "samples has rows of features, .*: rows of l"),
        (lambda: im.image_scores(GOOD, GOOD, QUARTERS, ["precison"]), "did you mean 'precision'"),
        (lambda: im.image_scores(GOOD, GOOD, "resnet65"), "extractor = 'resnet65'; .* did you mean 'resnet56'"),
        (lambda: im.image_scores(GOOD, fx.extract(GOOD, QUARTERS), "resnet56"), "features of resnet56"),
        (lambda: im.image_scores(GOOD, GOOD, fx.Extractor("bad", lambda x: plain(x) * math.nan)), "has 10 samples"),
        (lambda: fx.extract(GOOD, fx.Extractor("bad", lambda x: plain(x)[1:])), r"features of bad = \(9, 24\)"),
        (lambda: fx.extract(GOOD, fx.Extractor("bad", lambda x: x)), "features of bad ="),
        (lambda: im.nearest_images(GOOD, GOOD, k=11), r"train is torch.uint8 \(10, .*n >= 11 "),
        (lambda: im.copy_share(GOOD, GOOD, 2.0), "ratio = 2.0; allowed: 0 to 1"),
    ],
)  # fmt: skip
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_two_sets_of_features_are_of_one_extractor():
    halves = replace(QUARTERS, name="halves")  # as wide, and of something else
    with pytest.raises(ValueError, match="extractors = 'quarters and halves'; allowed: one for both sets"):
        im.feature_scores(fx.extract(GOOD, QUARTERS), fx.extract(GOOD, halves), ["fd"])
