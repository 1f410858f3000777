"Steps recorded as CUDA graphs: what is refused everywhere, and on a GPU the same numbers as without."

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close
from weights import stir

import guidance_nb as gnb
from guidance_nb import model_guidance
from guidance_nb._random import keyed_generator
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.cli._recipe import override, read_recipe
from guidance_nb.engine import _graphs as graphs
from guidance_nb.engine._run import Engine, Run
from guidance_nb.model_guidance import AutoWeight, ModelGuidanceLoss
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import DenoisingLoss, LossContext, fit


def ready(**changes):
    "A run that may be recorded, but for the changes."
    run = {"device": torch.device("cuda"), "world": 1, "scaler": None, "dropout": False}
    run |= {"engine": Engine(cuda_graphs=True), "loss": DenoisingLoss()}
    return SimpleNamespace(**run | changes)


REFUSED = {
    "on a CPU": {"device": torch.device("cpu")},
    "with several processes": {"world": 2},
    "with gradient_accumulation_steps above 1": {"engine": Engine(cuda_graphs=True, gradient_accumulation_steps=2)},
    "with precision = 'fp16'": {"scaler": object()},
    "with dropout inside the network": {"dropout": True},
    "with a loss that changes from step to step": {"loss": ModelGuidanceLoss(start_step=5)},
}


@pytest.mark.parametrize("where", ["nowhere", *REFUSED])
def test_which_runs_can_be_recorded(where):
    assert Run.recordable.fget(ready(**REFUSED.get(where, {}))) == (where == "nowhere")


def test_what_cannot_be_recorded_is_refused():
    run = fit(mlp_denoiser(2, FlowPath(), 3), DenoisingLoss(), (torch.zeros(4, 2), None), 2, 2, progress=False,
              engine=Engine(precision="fp32", cpu=True, cuda_graphs=True))  # fmt: skip
    with pytest.raises(ValueError, match=r"^cuda_graphs = True; allowed: False on a CPU, or with several processes"):
        next(run)


def test_losses_say_whether_they_change():
    assert not ModelGuidanceLoss().changes and ModelGuidanceLoss(AutoWeight()).changes


def test_recipes_ask_for_graphs():
    assert override(read_recipe("mnist-base"), {"cuda_graphs": True}).training.engine().cuda_graphs
    assert not read_recipe("mnist-base").training.engine().cuda_graphs


def test_a_recorded_rate_stays_where_the_graph_reads_it():
    kept = torch.tensor(1.0)
    groups = [{"lr": kept}, {"lr": 1.0}]
    settings = {"lr": 1.0, "schedule": "cosine", "steps": 6, "ema": 0.9, "ema_warmup": True}
    run = SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups), settings=settings, engine=Engine(), step=3)
    run.decay = decay = torch.tensor(0.0)
    Run.set_rates(run)
    assert groups[0]["lr"] is kept and kept.item() == groups[1]["lr"] == pytest.approx(0.5)
    assert run.decay is decay and decay.item() == pytest.approx(4 / 13)


@pytest.mark.parametrize("engine", [None, Engine(precision="fp32", cpu=True)])
def test_the_average_follows_weights_and_buffers_as_pytorch_does(engine):
    "The same bits as `AveragedModel`, and a statistic is copied."

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))

    def loss(model, x0, c, context):
        return model.net(x0).square().mean(1)

    torch.manual_seed(0)
    model = Normed()
    theirs = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=False)
    for state in fit(model, loss, (torch.randn(8, 3), None), 4, 8, ema=0.9, progress=False, engine=engine):
        theirs.update_parameters(model)
        for a, b in zip(state.ema.state_dict().values(), theirs.module.state_dict().values()):
            assert torch.equal(a, b)


@pytest.mark.parametrize("options", [{}, {"scale_range": (1.0, 3.0)}, {"unconditional": "contrastive", "weight": 0.3}])
def test_asking_all_rows_gives_the_same_loss(options, monkeypatch):
    "What an accelerator computes: the rows that need no guidance get weight zero."
    aware = "scale_range" in options
    model, average = (mlp_denoiser(2, FlowPath(), 3, scale_aware=aware, seed=seed) for seed in (0, 1))
    for net in (model, average):
        nn.init.normal_(net.net.read.weight, std=0.3, generator=keyed_generator(0))
    x0, c = torch.randn(50, 2, generator=keyed_generator(1)), torch.arange(50) % 3
    loss = ModelGuidanceLoss(**options)
    some = loss(model, x0, c, LossContext(keyed_generator(2), 1, 9, average))
    monkeypatch.setattr(model_guidance, "_guided_mask", lambda w: slice(None))
    assert_close(loss(model, x0, c, LossContext(keyed_generator(2), 1, 9, average)), some)


class FakeGraph:
    "A graph as a CPU can play it: fixed memory for inputs and output, and the call again at every replay."

    made: list[tuple] = []  # noqa: RUF012

    def __init__(self, call, inputs):
        self.call, self.inputs = call, [part.clone() for part in inputs]
        self.made.append(tuple(part.shape for part in inputs))

    def replay(self, inputs):
        for kept, new in zip(self.inputs, inputs, strict=True):
            kept.copy_(new)
        return self.call(*self.inputs)


@pytest.fixture
def played(monkeypatch):
    "Recordings that a CPU can play, and which were made."
    monkeypatch.setattr(graphs, "_CallGraph", FakeGraph)
    monkeypatch.setattr(graphs, "require", lambda *rule: None)
    monkeypatch.setattr(FakeGraph, "made", [])
    return FakeGraph.made


def test_calls_are_recorded_once_for_each_shape_and_samples_are_the_same(played):
    "Five samples in batches of two and one, both predictions in one pass; without a condition half as many rows."
    model = stir(mlp_denoiser(2, FlowPath(), 3))
    guided, c = ClassifierFreeGuidance(model, 2.0, interval=(0.2, 0.8)), torch.arange(5) % 3
    options = {"steps": 6, "batch_size": 2, "progress": False}
    plain = gnb.sample(guided, c, (2,), **options)
    with graphs.recorded(guided):
        drawn = gnb.sample(guided, c, (2,), **options)
        rows = sorted(shapes[0][0] for shapes in played)
        x = torch.randn(2, 2, requires_grad=True)
        assert torch.autograd.grad(model(x, torch.tensor(0.5), c[:2]).x0.sum(), x)[0].any()
    assert torch.equal(drawn, plain) and rows == [1, 2, 4]  # outside the interval 2 or 1 rows, inside 4 or 2
    assert len(played) == 3 and "forward" not in vars(model.net)


def test_calls_are_recorded_on_a_gpu_alone():
    model = mlp_denoiser(2, FlowPath(), 3)
    with pytest.raises(ValueError, match=r"^cuda_graphs = True; allowed: False on a CPU, or "), graphs.recorded(model):
        pass
