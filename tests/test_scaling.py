"What a run costs: counts against sums by hand, memory and plans against their limits, and what is refused."

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from guidance_nb._processes import row_shares
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.engine._cost import (
    CHIPS,
    Chip,
    LossNFE,
    NetworkCost,
    _count_network,
    cost_sheet,
    count_loss_nfe,
    find_chip,
    launch_file,
    memory_per_gpu,
    mfu,
    network_cost,
    training_flops,
)
from guidance_nb.engine._sampling import extract_sharded
from guidance_nb.flow_postprocessing import FlowPostprocessor, PairLoss
from guidance_nb.images._features import CifarResNet, Extractor, extract, resnet_extractor
from guidance_nb.images._networks import build_network
from guidance_nb.model_guidance import ModelGuidanceLoss
from guidance_nb.networks import NoisyClassifier, mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import ClassifierLoss, DenoisingLoss

LARGE = NetworkCost(675_000_000, 237e9, 474e9, 333e6, 1.35e9)
PLAIN = LossNFE(1.0, 0.0)


def test_two_layers_by_hand():
    "6 -> 10 -> 4 with a ReLU: products 2 (6 10 + 10 4) forward; backward all twice but for the first layer's input."
    build = lambda: nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 4))  # noqa: E731
    cost = _count_network(build, lambda n: (torch.zeros(n, 6),), "fp32")
    assert (cost.weights, cost.forward) == (6 * 10 + 10 + 10 * 4 + 4, 2 * (60 + 40))
    assert cost.backward == 2 * (60 + 40 + 40)
    assert (cost.activations, cost.copies) == (4 * (6 + 10), 0)  # the input and the ReLU's result, which serves twice


def test_a_convolution_by_hand():
    "A 3x3 convolution from 5 to 7 channels on 8x8: nine products of 5 numbers for each of 7 x 64 results."
    cost = _count_network(lambda: nn.Conv2d(5, 7, 3, padding=1), lambda n: (torch.zeros(n, 5, 8, 8),), "fp32")
    assert cost.forward == 2 * 9 * 5 * 7 * 64
    assert cost.activations == 4 * 5 * 64


@pytest.mark.parametrize(("side", "width", "depth", "heads"), [(8, 24, 1, 2), (16, 32, 3, 4)])
def test_transformers_by_their_matrices(side, width, depth, heads):
    "All matrices of a block one by one, times the tokens they see, and the two products of attention."
    cost = network_cost("dit-s/2", (3, side, side), 10, width=width, depth=depth, heads=heads)
    tokens, patch = (side // 2) ** 2, 12
    block = tokens * sum(a * b for a, b in ((width, width),) * 4 + ((width, 4 * width), (4 * width, width)))
    block += 6 * width * width + 2 * tokens * tokens * width
    ends = tokens * patch * width * 2 + 2 * width * width
    assert cost.forward == 2 * (depth * block + ends + 256 * width + width * width)
    assert cost.forward < cost.backward < 2 * cost.forward  # nothing flows back to the image and the clock


@pytest.mark.parametrize(("name", "d", "depth"), [("dit-b/2", 768, 12), ("dit-xl/2", 1152, 28)])
def test_networks_of_the_papers_by_the_formula(name, d, depth):
    "Eq. (1) exactly; backward two products for each one, none for the very first layer."
    cost, n = network_cost(name, (4, 32, 32), 1000), 256
    blocks = depth * (12 * n * d**2 + 2 * n**2 * d + 6 * d**2)
    assert cost.forward == 2 * (blocks + 2 * n * 16 * d + 3 * d**2 + 256 * d)
    assert abs(cost.backward / cost.forward - 2) < 1e-3


def test_a_unet_by_the_shapes_its_layers_see():
    total = []

    def note(layer, args, y):
        total.append(2 * layer.weight[0].numel() * y.numel())

    with torch.device("meta"):
        net = build_network("unet-tiny", (3, 32, 32), 10)
        for layer in net.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                layer.register_forward_hook(note)
        net(torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert network_cost("unet-tiny", (3, 32, 32), 10).forward == sum(total)


def test_half_precision_and_gradient_checkpointing_need_less():
    whole, low = (network_cost("dit-b/2", precision=precision) for precision in ("fp32", "bf16"))
    thrifty = network_cost("dit-b/2", gradient_checkpointing=True)
    assert 0.45 < low.activations / whole.activations < 0.6
    assert thrifty.activations < 0.1 * low.activations
    assert whole.copies < 1e6 and abs(low.copies / (2 * low.weights) - 1) < 0.02
    assert_close(training_flops(thrifty, PLAIN) / training_flops(low, PLAIN), 4 / 3, atol=1e-3, rtol=0)
    assert training_flops(low, PLAIN) == low.forward + low.backward


def test_published_count_of_the_largest():
    "118.6 'Gflops' at 256 and 524.6 at 512 (arXiv 2212.09748) are multiply-adds."
    assert abs(network_cost("dit-xl/2", (4, 32, 32), 1000).forward / 2e9 / 118.6 - 1) < 1e-3
    assert abs(network_cost("dit-xl/2", (4, 64, 64), 1000).forward / 2e9 / 524.6 - 1) < 1e-3


def test_counting_allocates_nothing_and_draws_nothing():
    before = torch.get_rng_state()
    network_cost("dit-b/4", (4, 64, 64), 1000)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("loss", "trained", "asked"),
    [
        (DenoisingLoss(0.1), 1, 0),
        (AlignedLoss(2.0), 2, 0),
        (ModelGuidanceLoss(0.5, dropout=0.0, interval=(0.0, 1.0)), 1, 2),
        (ModelGuidanceLoss(0.5, dropout=0.2, interval=(0.0, 0.5)), 1, 2 * 0.8 * 0.5),
        (ModelGuidanceLoss(0.5, dropout=0.0, interval=(0.0, 1.0), target="online"), 1, 2),
        (ModelGuidanceLoss(0.5, dropout=0.0, interval=(0.0, 1.0), unconditional="uniform"), 1, 10),
        (ModelGuidanceLoss(0.5, dropout=0.0, interval=(0.0, 1.0), start_step=750), 1, 0.5),
    ],
)
def test_rows_of_losses(loss, trained, asked):
    rows = count_loss_nfe(loss, steps=1000)
    assert rows.trained == trained
    assert_close(rows.asked, float(asked), rtol=0, atol=0.02)


def test_rows_of_the_losses_of_the_page():
    for loss, asked in (
        (ModelGuidanceLoss(0.45), 1.35),
        (ModelGuidanceLoss(0.45, start_step=500), 0.675),
        (ModelGuidanceLoss(scale_range=(1.0, 4.0)), 0.675),
    ):
        found = count_loss_nfe(loss, steps=1000)
        assert found.trained == 1
        assert_close(found.asked, asked, atol=0.01, rtol=0)
    classifier = NoisyClassifier(2, 10, FlowPath(), width=4, depth=1)
    assert count_loss_nfe(ClassifierLoss(FlowPath()), classifier) == LossNFE(1, 0)


def test_rows_of_a_loss_on_its_own_model():
    model = FlowPostprocessor(2, 3, width=8, depth=1)
    pairs = torch.stack([torch.zeros(32, 2), torch.ones(32, 2)], 1)
    assert count_loss_nfe(PairLoss(), model, (pairs, torch.arange(32) % 3)) == LossNFE(1, 0)


def test_counting_rows_leaves_the_model_as_it_was():
    model = mlp_denoiser(2, FlowPath(), 10, width=4, depth=1)
    count_loss_nfe(ModelGuidanceLoss(0.5), model)
    assert not model.net._forward_hooks and all(p.grad is None for p in model.parameters())


def test_training_is_forward_and_backward_and_again():
    assert training_flops(LARGE, LossNFE(2.0, 1.5)) == 2 * (237e9 + 474e9) + 1.5 * 237e9
    assert (
        training_flops(replace(LARGE, gradient_checkpointing=True), LossNFE(2.0, 1.5))
        == 2 * (2 * 237e9 + 474e9) + 1.5 * 237e9
    )


def test_memory_by_hand():
    parts = memory_per_gpu(LARGE, 10)
    assert parts == {
        "weights": 2.7e9, "gradients": 2.7e9, "moments": 5.4e9, "average": 2.7e9,
        "copies": 1.35e9, "activations": 3.33e9,
    }  # fmt: skip
    eight = memory_per_gpu(LARGE, 10, 8, sharded=True)
    assert eight == parts | {"weights": 2.7e9 / 8, "gradients": 2.7e9 / 8, "moments": 5.4e9 / 8}


def test_the_estimate_of_memory_is_what_a_real_pass_keeps():
    "Bytes kept by real tensors on the CPU, for two numbers of rows, beside those counted on fakes."
    from guidance_nb.engine._cost import _kept_bytes

    settings = {"width": 32, "depth": 2, "heads": 2}
    cost = network_cost("dit-s/2", (4, 8, 8), 10, precision="fp32", **settings)
    net = build_network("dit-s/2", (4, 8, 8), 10, **settings)
    for n in (3, 5):
        args = torch.randn(n, 4, 8, 8), torch.rand(n), torch.zeros(n, dtype=torch.long)
        assert abs(_kept_bytes(net, lambda args=args: net(*args)) / (cost.copies + n * cost.activations) - 1) < 0.02


def test_a_sheet_by_hand():
    sheet = cost_sheet(LARGE, LossNFE(1.0, 1.35), 1000, 64, 2, (1, 4), chip="a100", share=0.4)
    needed = 711e9 + 1.35 * 237e9
    hours = 64_000 * needed / (0.4 * 312e12) / 3600
    assert sheet.gpus.tolist() == [1, 4] and sheet.samples_at_once.tolist() == [32, 8]
    assert_close(sheet.gpu_hours.tolist(), [hours, hours])
    assert_close(sheet.hours.tolist(), [hours, hours / 4])
    assert_close(sheet.memory_gb.tolist(), [(20 * 0.675 + 1.35 + 0.333 * n) for n in (32, 8)])
    tight = cost_sheet(LARGE, PLAIN, 1, 64, gpus=(1,), chip=Chip(1e12, 30e9, 1e12, 1e11))
    assert tight.fits.tolist() == [False]
    eight = cost_sheet(LARGE, PLAIN, 1000, 256, gpus=(1, 8), share=0.5)
    assert eight.fits.tolist() == [False, True] and eight.gpu_hours[0] == eight.gpu_hours[1]
    passes = cost_sheet(LARGE, PLAIN, 1000, 256, gradient_accumulation_steps=8, gpus=(1,))
    assert_close(passes.memory_gb[0], eight.memory_gb[1])  # a pass of an eighth, as on eight machines
    shared = cost_sheet(LARGE, PLAIN, 1000, 256, gpus=(8,), sharded=True)
    assert_close(eight.memory_gb[1] - shared.memory_gb[0], 16 * 0.675 * 7 / 8)


def test_a_sheet_of_a_name_and_a_loss():
    "What is counted by name, and what is given, make the same sheet; a chip may be four numbers."
    settings = {"shape": (3, 8, 8), "num_classes": 10, "precision": "fp32", "width": 32, "depth": 2, "heads": 2}
    loss, chip = AlignedLoss(2.0), (312e12, 80e9, 2.039e12, 300e9)
    ours = cost_sheet("dit-s/2", loss, 100, 8, chip=chip, **settings)
    cost, nfe = network_cost("dit-s/2", **settings), count_loss_nfe(loss, steps=100)
    assert ours.equals(cost_sheet(cost, nfe, 100, 8, chip="a100")) and nfe == (2, 0)
    wider = cost_sheet("dit-s/2", loss, 100, 8, **settings | {"width": 64})
    assert wider.tflop_per_sample[0] > 3 * ours.tflop_per_sample[0]


def test_mfu_of_a_chip_at_its_peak_is_one():
    chip = CHIPS["h100"]
    assert mfu(chip.peak / 711e9, 711e9, chip.peak) == pytest.approx(1.0)
    assert mfu(0, 711e9, chip.peak) == 0
    assert mfu(800, 711e9, chip.peak, gpus=8) == pytest.approx(mfu(100, 711e9, chip.peak))
    assert mfu(500, 711e9, chip.peak) == pytest.approx(500 * 711e9 / 989e12)
    assert find_chip("NVIDIA H100 80GB HBM3") == chip


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("n", [1, 7, 64, 65, 1000])
def test_shares_are_whole_batches(n, world):
    shares = row_shares(n, 64, world)
    ends = torch.tensor(shares).cumsum(0).tolist()
    assert len(shares) == world and ends[-1] == n and all(end % 64 == 0 or end == n for end in ends)
    assert max(shares) <= 64 * -(-n // (64 * world)) and min(shares) >= 0


@pytest.mark.parametrize(("n", "size", "world"), [(50_000, 256, 7), (5, 1, 5)])
def test_shares_of_other_batches(n, size, world):
    shares = row_shares(n, size, world)
    ends = torch.tensor(shares).cumsum(0).tolist()
    assert ends[-1] == n and all(end % size == 0 or end == n for end in ends)
    assert max(shares) <= size * -(-n // (size * world)) and min(shares) >= 0
    assert row_shares(10, 4, 2) == [4, 6]


def test_two_processes_extract_what_one_does():
    "Bit for bit, since they compute the batches that one would."
    look = resnet_extractor(CifarResNet(20).eval())
    seen = torch.randint(0, 256, (10, 3, 32, 32), dtype=torch.uint8)
    one, here = (find(seen, look, batch_size=4) for find in (extract, extract_sharded))
    parts = [extract(part, look, batch_size=4) for part in seen.split(row_shares(10, 4, 2))]
    for layer, rows in one.rows.items():
        assert torch.equal(rows, torch.cat([part.rows[layer] for part in parts]))
        assert torch.equal(rows, here.rows[layer])


def test_one_process_extracts_as_ever():
    look = Extractor("pixels", lambda images: images[:, 0].flatten(1) / 255)
    images = torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8)
    a, b = (find(images, look, "set", 4) for find in (extract, extract_sharded))
    assert torch.equal(a.rows["features"], b.rows["features"])
    assert (a.checksum, a.n, a.size) == (b.checksum, b.n, b.size)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda: network_cost("dit-q/2", (4, 32, 32), 10),
            "name = 'dit-q/2'; allowed: 'dit-s/2', ...; did you mean 'dit-s/2'?",
        ),
        (
            lambda: network_cost("dit-s/2", (4, 32, 32), 9, precision="fp8"),
            "precision = 'fp8'; allowed: 'fp32', 'bf16'",
        ),
        (lambda: find_chip("H100 PCIe"), "chip = 'H100 PCIe'; allowed: 'a100', 'h100', 'h200', or four numbers"),
        (lambda: mfu(-1, 1, 1), "mfu = -1.0; allowed: 0 to 1"),
        (lambda: mfu(2, 1, 1), "mfu = 2.0; allowed: 0 to 1, so the count, the time or the peak is wrong"),
        (lambda: mfu(float("nan"), 1e12, 1e15), "mfu = nan; allowed: 0 to 1"),
        (lambda: find_chip("abacus"), "chip = 'abacus'; allowed: 'a100', 'h100', 'h200'"),
        (lambda: cost_sheet(LARGE, PLAIN, 1, 256, gpus=(3,)), "a multiple of 3 GPUs x 1 passes"),
        (lambda: cost_sheet(LARGE, PLAIN, 1, 256, gpus=(0,)), "gpus = 0; allowed: "),
        (lambda: cost_sheet(LARGE, PLAIN, 1, 256, share=0), "share = 0; allowed: above 0, at most 1"),
        (lambda: cost_sheet(LARGE, PLAIN, 1, 8, share=1.5), "share = 1.5; allowed: above 0, at most 1"),
        (lambda: cost_sheet(LARGE, PLAIN, 1, 8, 2, (8,)), "batch_size = 8; allowed: a multiple of 8 GPUs x 2 passes"),
    ],
)
def test_bad_input(call, words):
    with pytest.raises(ValueError) as caught:
        call()
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_launch_file_that_is_not_there():
    with pytest.raises(FileNotFoundError, match=r"launch_files.*tpu\.yaml"):
        launch_file("tpu")
