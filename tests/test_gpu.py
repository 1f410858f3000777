"What only a GPU can show: `pytest -m gpu`, a minute on one; everything here is skipped without."

import copy

import pytest
import torch
from test_guidance_contract import CASES, each_case, setting
from torch.testing import assert_close
from weights import stir

from guidance_nb._random import NoiseSource, keyed_generator
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.engine._checkpoints import read_checkpoint
from guidance_nb.engine._graphs import recorded
from guidance_nb.engine._hardware import compile_network
from guidance_nb.engine._run import Engine
from guidance_nb.flow_postprocessing import FlowPostprocessor, _neighbours
from guidance_nb.images._networks import image_denoiser
from guidance_nb.metrics import nearest_neighbours, precision_recall
from guidance_nb.model_guidance import ModelGuidanceLoss
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.samplers import sample
from guidance_nb.training import DenoisingLoss, fit

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

SMALL = {
    "dit-s/2": {"width": 64, "depth": 3, "heads": 2},
    "unet-tiny": {"widths": (32, 64), "patch": 1},
}


@pytest.fixture(autouse=True)
def exact_products():
    "Products of fp32 in fp32, so that the two devices differ by rounding alone."
    kept = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = kept


def image_model(name: str):
    "A denoiser of 3 x 16 x 16 images whose weights are not zero, and inputs."
    model = image_denoiser(name, (3, 16, 16), FlowPath(), 5, **SMALL[name])
    generator = keyed_generator(3)
    x, t = torch.randn(8, 3, 16, 16, generator=generator), torch.rand(8, generator=generator)
    return stir(model, 0.05), x, t, torch.arange(8) % 5


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    "Relative distance, in float64 on the CPU; NaN counts as far."
    a, b = a.double().cpu(), b.double().cpu()
    distance = ((a - b).norm() / b.norm()).item()
    return distance if distance == distance else float("inf")


@pytest.mark.parametrize("loss", [DenoisingLoss(), AlignedLoss(), ModelGuidanceLoss(scale_range=(1.0, 3.0))])
def test_a_recorded_run_is_the_same_run(loss):
    "Losses, weights and average of twelve steps, nine of them replayed, under clipping and a falling rate."
    ends = []
    for graphs in (False, True):
        model = mlp_denoiser(2, FlowPath(), 2, scale_aware=isinstance(loss, ModelGuidanceLoss))
        data = torch.randn(64, 2, generator=keyed_generator(0)), torch.arange(64) % 2
        engine = Engine(precision="bf16", cuda_graphs=graphs, clip=1.0)
        states = [*fit(model, loss, data, 12, 16, lr=1e-2, ema=0.9, engine=engine, progress=False)]
        weights = [value.clone() for part in (model, states[-1].ema) for value in part.state_dict().values()]
        ends.append(([state.loss for state in states], weights))
    assert ends[0][0] == ends[1][0] and all(map(torch.equal, ends[0][1], ends[1][1]))


@pytest.mark.parametrize("name", SMALL)
def test_samples_by_recorded_calls_are_the_same(name):
    "Batches of two sizes, inside an interval and outside, so that graphs of three shapes take turns."
    model, _, _, c = image_model(name)
    guided = ClassifierFreeGuidance(model.cuda(), 2.0, (0.2, 0.8))
    options = {"steps": 8, "batch_size": 5, "progress": False}
    plain = sample(guided, c, (3, 16, 16), **options)
    with recorded(guided):
        draws = [sample(guided, c, (3, 16, 16), **options) for _ in range(2)]
    assert torch.equal(*draws) and far(draws[0], plain) < 1e-6


@pytest.mark.parametrize("name", SMALL)
def test_samples_in_bf16_are_near_those_in_fp32(name):
    model, _, _, c = image_model(name)
    guided = ClassifierFreeGuidance(model.cuda(), 2.0)
    draws = []
    for low in (False, True):
        with torch.autocast("cuda", torch.bfloat16, enabled=low):
            draws.append(sample(guided, c, (3, 16, 16), "heun", 8, progress=False))
    assert draws[1].dtype == torch.float32 and 1e-6 < far(draws[1], draws[0]) < 0.05
    alone = sample(ClassifierFreeGuidance(model.cpu(), 2.0), c, (3, 16, 16), "heun", 8, progress=False)
    assert far(draws[0], alone) < 1e-3


@pytest.mark.parametrize("k", [1, 5])
def test_neighbours_are_those_of_the_cpu(k):
    generator = keyed_generator(6)
    x, y = torch.randn(700, 32, generator=generator), torch.randn(3_000, 32, generator=generator)
    a, b = torch.arange(700) % 3, torch.arange(3_000) % 3
    for labels in ((), (a, b)):
        here, there = (nearest_neighbours(x, y, k, *labels, device=device) for device in (None, "cuda"))
        assert torch.equal(here[1], there[1])
        assert_close(there[0].cpu(), here[0], rtol=1e-6, atol=1e-6)
    assert precision_recall(y[:900], x, device="cuda") == precision_recall(y[:900], x)


def test_search_and_correction_on_a_gpu():
    generator = keyed_generator(0)
    x, y = torch.randn(150, 4, generator=generator), torch.randn(260, 4, generator=generator)
    c, d = torch.arange(150) % 3, torch.arange(260) % 3
    distance = torch.cdist(x.double(), y.double()).masked_fill(c[:, None] != d, torch.inf)
    expected = distance.argsort(dim=1, stable=True)[:, :5]
    assert torch.equal(_neighbours(x, y, 5, c, d, device="cuda"), expected)
    assert torch.equal(_neighbours(x.cuda(), y.cuda(), 5, c.cuda(), d.cuda()), expected)
    model = stir(FlowPostprocessor(4, 3))
    there = model(x, c)
    assert_close(model.cuda()(x, c, batch_size=40), there, atol=1e-4, rtol=1e-4)


def test_noise_is_a_function_of_seed_and_index():
    "The same on both devices to the last bit, and in batches of any size."
    sources = [NoiseSource(7, 0, (300, 3, 4), torch.device(device), torch.float32) for device in ("cpu", "cuda")]
    for _ in range(3):
        here, there = (source() for source in sources)
        assert there.is_cuda and torch.equal(there.cpu(), here)
    part = NoiseSource(7, 250, (50, 3, 4), torch.device("cuda"), torch.float32)
    assert torch.equal(part(), NoiseSource(7, 0, (300, 3, 4), torch.device("cuda"), torch.float32)()[250:])
    model = stir(mlp_denoiser(4, FlowPath(), 3)).cuda()
    draws = [
        sample(model, torch.arange(20) % 3, (4,), "euler_maruyama", 6, seed=3, batch_size=size, progress=False)
        for size in (None, 1, 7)
    ]
    for other in draws[1:]:
        assert_close(other, draws[0], rtol=0, atol=1e-4)


@each_case
def test_guidance_is_that_of_the_cpu(name):
    "In float64: the same pair, on the device of what comes in."
    if CASES[name].exact:
        pytest.skip("mixtures stay on the CPU")
    model, x, t, c = setting(CASES[name])
    expected = CASES[name].make(model, 2.5)(x, t, c)
    guided = CASES[name].make(copy.deepcopy(model), 2.5).cuda()
    pair = guided(x.cuda(), t.cuda(), c.cuda())
    assert pair.x0.is_cuda and pair.x0.dtype == torch.float64
    for one, other in zip(pair, expected):
        assert_close(one.detach().cpu(), other.detach(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("sampler", ["dopri5", "ddpm", "heun", "dpmpp_2m"])
def test_samples_are_those_of_the_cpu(sampler):
    model, c = stir(mlp_denoiser(2, FlowPath(), 3)), torch.arange(12) % 3
    here, there = (
        sample(ClassifierFreeGuidance(model.to(device), 2.0), c, (2,), sampler, 8, progress=False, dtype=torch.float64)
        for device in ("cpu", "cuda")
    )
    assert there.is_cuda and here.std() > 0.1
    assert_close(there.cpu(), here, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("graphs", [False, True])
def test_a_checkpoint_of_a_gpu_is_read_on_the_cpu(tmp_path, graphs):
    "Weights, average and moments; and the run goes on there."
    engine = Engine(precision="fp32", folder=tmp_path / "run", save_every=4, cuda_graphs=graphs)
    data = torch.randn(64, 2, generator=keyed_generator(0)), torch.arange(64) % 2
    options = {"batch_size": 16, "lr": 1e-2, "ema": 0.9, "schedule": "constant", "progress": False}
    model = mlp_denoiser(2, FlowPath(), 2)
    *_, state = fit(model, DenoisingLoss(), data, 8, engine=engine, **options)
    saved = read_checkpoint(tmp_path / "run")
    for part, kept in ((model, saved.model), (state.ema, saved.ema)):
        for name, value in part.state_dict().items():
            assert kept[name].device.type == "cpu" and torch.equal(kept[name], value.cpu())
    assert {value.device.type for value in saved.optimizer.values()} == {"cpu"}
    fresh = mlp_denoiser(2, FlowPath(), 2)
    fresh.load_state_dict(saved.model)
    x, t, c = torch.randn(5, 2), torch.rand(5), torch.zeros(5).long()
    assert_close(model(x.cuda(), t.cuda(), c.cuda()).x0.cpu(), fresh(x, t, c).x0, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("loss", [DenoisingLoss(0.1), ModelGuidanceLoss(0.5)])
def test_a_step_does_not_wait_for_the_gpu(loss):
    "PyTorch raises an error where it would, but for the event that says that the loss of the step before is there."
    model, _, _, _ = image_model("dit-s/2")
    data = torch.randn(32, 3, 16, 16, generator=keyed_generator(0)), torch.arange(32) % 5
    run = fit(model, loss, data, 9, 16, engine=Engine(precision="bf16"), progress=False)
    for _ in range(3):
        next(run)
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            next(run)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        run.close()


@pytest.mark.parametrize(("name", "compiled"), [("unet-tiny", False), ("dit-s/2", False), ("dit-s/2", True)])
def test_a_recorded_run_of_images_is_near_the_plain_run(name, compiled):
    "In fp32, from the same weights; compiling a U-Net takes too long for a test."
    losses = []
    for engine in (Engine(precision="fp32"), Engine(precision="fp32", cuda_graphs=True, compile=compiled)):
        model, _, _, _ = image_model(name)
        data = torch.randn(32, 3, 16, 16, generator=keyed_generator(0)), torch.arange(32) % 5
        states = [*fit(model, DenoisingLoss(), data, 8, 16, lr=1e-4, ema=0.9, engine=engine, progress=False)]
        losses.append([float(state.loss) for state in states])
    assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-5), ("bf16", 1e-2)])
def test_a_compiled_network_is_the_network(precision, tolerance):
    "Outputs and gradients; and it is as far from float64 on the CPU as the network is that is not compiled."
    model, x, t, c = image_model("dit-s/2")
    exact = copy.deepcopy(model).double()
    eager = copy.deepcopy(model).cuda()
    compiled = copy.deepcopy(eager)
    compile_network(compiled.net)
    expected, found = exact.output(x.double(), t.double(), c), []
    for each in (eager, compiled):
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "bf16"):
            y = each.output(x.cuda(), t.cuda(), c.cuda())
        y.float().square().sum().backward()
        found.append((y.detach(), next(iter(each.net.parameters())).grad))
    assert far(found[1][0], found[0][0]) < tolerance and far(found[1][1], found[0][1]) < 3 * tolerance
    errors = [far(y, expected) for y, _ in found]
    assert errors[1] < max(2 * errors[0], 1e-6) and errors[0] < 3 * tolerance
