"Steps recorded as CUDA graphs: what is refused everywhere, and on a GPU the same numbers as without."

from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from guidance_nb import model_guidance
from guidance_nb._random import keyed_generator
from guidance_nb.aligned_loss import AlignedLoss
from guidance_nb.cli.recipe import override, read_recipe
from guidance_nb.cli.run import make_engine
from guidance_nb.model_guidance import AutoWeight, ModelGuidanceLoss
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import Context, DenoisingLoss, Engine, check_graphs, fit, make_average, set_rate, update_ema


def ready(**changes):
    "A run that may be recorded, but for the changes."
    place = SimpleNamespace(device=torch.device("cuda"), num_processes=1, scaler=None)
    run = {"place": place, "engine": Engine(graphs=True), "model": nn.Linear(2, 2), "loss": DenoisingLoss()}
    parts = {key: value for key, value in changes.items() if key in ("device", "num_processes", "scaler")}
    return SimpleNamespace(**run | {k: v for k, v in changes.items() if k not in parts} | {
        "place": SimpleNamespace(**vars(place) | parts)
    })  # fmt: skip


REFUSED = {
    "on a CPU": {"device": torch.device("cpu")},
    "with several processes": {"num_processes": 2},
    "with accumulate above 1": {"engine": Engine(graphs=True, accumulate=2)},
    "with precision = 'fp16'": {"scaler": object()},
    "with dropout inside the network": {"model": nn.Dropout(0.1)},
    "with a loss that changes from step to step": {"loss": ModelGuidanceLoss(start_step=5)},
}


def test_a_run_that_can_be_recorded_passes():
    check_graphs(ready())


@pytest.mark.parametrize("where", REFUSED)
def test_what_cannot_be_recorded_is_refused(where):
    with pytest.raises(ValueError, match=f"^graphs = True; allowed {where}: False$"):
        check_graphs(ready(**REFUSED[where]))


def test_losses_say_whether_they_change():
    assert not ModelGuidanceLoss().changes and ModelGuidanceLoss(AutoWeight()).changes


def test_recipes_ask_for_graphs():
    assert make_engine(override(read_recipe("mnist-base"), {"cuda_graphs": True})).graphs
    assert not make_engine(read_recipe("mnist-base")).graphs


def test_a_recorded_rate_stays_where_the_graph_reads_it():
    kept = torch.tensor(1.0)
    groups = [{"lr": kept}, {"lr": 1.0}]
    set_rate(SimpleNamespace(optimizer=SimpleNamespace(param_groups=groups), rate=lambda step: 0.25 * step, step=2))
    assert groups[0]["lr"] is kept and kept.item() == groups[1]["lr"] == 0.5


class Normed(nn.Module):
    "Weights and a buffer, both of which the average follows."

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(OrderedDict(a=nn.Linear(3, 2), b=nn.BatchNorm1d(2)))


def test_the_average_moves_as_the_slow_way_does():
    "Listing the weights once changes no bit, buffers included."
    torch.manual_seed(0)
    model = Normed()
    ours, theirs = make_average(model, 0.9), make_average(model, 0.9)
    run = SimpleNamespace(average=ours, model=model, weights=[*model.parameters()], settings={"ema": 0.9})
    run.place = SimpleNamespace(is_fsdp2=False)
    for _ in range(4):
        for value in [*model.parameters(), *model.net.b.buffers()]:
            value.data += 1
        update_ema(run)
        theirs.update_parameters(model)
        for a, b in zip(ours.state_dict().values(), theirs.state_dict().values()):
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
    some = loss(model, x0, c, Context(keyed_generator(2), 1, 9, average))
    monkeypatch.setattr(model_guidance, "_guided_mask", lambda w: slice(None))
    assert_close(loss(model, x0, c, Context(keyed_generator(2), 1, 9, average)), some)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("loss", [DenoisingLoss(), AlignedLoss(), ModelGuidanceLoss(scale_range=(1.0, 3.0))])
def test_a_recorded_run_is_the_same_run(loss):
    "Losses, weights and average of twelve steps, nine of them replayed, under clipping and a falling rate."
    ends = []
    for graphs in (False, True):
        model = mlp_denoiser(2, FlowPath(), 2, scale_aware=isinstance(loss, ModelGuidanceLoss))
        data = torch.randn(64, 2, generator=keyed_generator(0)), torch.arange(64) % 2
        engine = Engine(precision="bf16", graphs=graphs, clip=1.0)
        states = [*fit(model, loss, data, 12, 16, lr=1e-2, ema=0.9, engine=engine, progress=False)]
        weights = [value.clone() for part in (model, states[-1].ema) for value in part.state_dict().values()]
        ends.append(([state.loss for state in states], weights))
    assert ends[0][0] == ends[1][0] and all(map(torch.equal, ends[0][1], ends[1][1]))
