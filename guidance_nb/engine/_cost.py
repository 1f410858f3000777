"""What a run will cost before it starts: FLOPs, memory, hours and money, counted rather than guessed."""

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor, nn

from guidance_nb._checks import Count, PositiveShare, check_whole, checked, require
from guidance_nb._extras import extra
from guidance_nb._random import keyed_generator
from guidance_nb.denoisers import count_nfe
from guidance_nb.engine._run import _checkpoint_gradients
from guidance_nb.images._networks import build_network
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.training import LossContext

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class NetworkCost:
    """What one sample passing through a network once costs; a multiply-add counts as two FLOPs."""

    weights: int  # Number of weights
    forward: float  # FLOPs of a sample forward
    backward: float  # FLOPs of a sample backward, both gradients, nothing computed twice
    activations: float  # Bytes that a sample keeps for the backward pass
    copies: float = 0.0  # Bytes kept whatever the number of samples: weights cast to lower precision
    gradient_checkpointing: bool = False  # Whether the activations are those of gradient checkpointing


def _kept_bytes(net: nn.Module, run: Callable[[], Tensor]) -> int:
    """Bytes of all tensors that a forward pass keeps, each storage counted once, the network's own weights aside."""
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    found: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            found[x.untyped_storage()._cdata] = x  # kept alive, so that no storage takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in found.values())


def _count_network(
    build: Callable[[], nn.Module], inputs: Callable[[int], tuple], precision: str, gradient_checkpointing: bool = False
) -> NetworkCost:
    """Count FLOPs and bytes of any network that answers with one tensor; nothing is computed or allocated.

    `inputs(n)` makes the arguments of its `forward` for n samples; activations are kept in `precision`.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    with torch.device("meta"):
        net, args = build(), inputs(2)
        with FlopCounterMode(display=False) as forward:
            y = net(*args)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
    with FakeTensorMode():
        net = build()
        if gradient_checkpointing:
            _checkpoint_gradients(net)
        kept = []
        for n in (1, 2):
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                kept.append(_kept_bytes(net, lambda args=inputs(n): net(*args)))  # type: ignore[misc]
    there, back = (float(mode.get_total_flops()) / 2 for mode in (forward, backward))
    weights, each = sum(p.numel() for p in net.parameters()), kept[1] - kept[0]
    return NetworkCost(weights, there, back, float(each), float(max(0, kept[0] - each)), gradient_checkpointing)


@checked
def network_cost(
    name: str, shape: Sequence[int] = (4, 32, 32), num_classes: int = 1000, scale_aware: bool = False,
    precision: Literal["fp32", "bf16"] = "bf16", gradient_checkpointing: bool = False, **changes: object,
) -> NetworkCost:  # fmt: skip
    """Cost of one of `IMAGE_NETWORKS` by name, for images or latents of `shape`."""

    def inputs(n: int) -> tuple:
        scales = (torch.ones(n),) if scale_aware else ()
        return torch.zeros(n, *shape), torch.zeros(n), torch.zeros(n, dtype=torch.long), *scales

    build = partial(build_network, name, tuple(shape), num_classes, scale_aware, **changes)  # type: ignore[arg-type]
    return _count_network(build, inputs, precision, gradient_checkpointing)


class LossNFE(NamedTuple):
    """Network function evaluations per training sample, the mean over a run."""

    trained: float  # With a backward pass
    asked: float  # Without: teachers and the like


@torch.enable_grad()
def count_loss_nfe(
    loss: Callable[..., Tensor], model: nn.Module | None = None, data: tuple[Tensor, ...] | None = None, steps: int = 1
) -> LossNFE:  # fmt: skip
    """Count the evaluations that a loss takes by calling it on a tiny model, at 64 of the steps of a run.

    `model` and `data` default to a perceptron and random points with ten classes.
    """
    if model is None:
        aware = getattr(loss, "scale_range", None) is not None
        model = mlp_denoiser(2, FlowPath(), 10, width=4, depth=1, scale_aware=aware)
    x, c = (torch.zeros(1024, 2), torch.arange(1024) % 10) if data is None else data
    average, trained, total = copy.deepcopy(model), 0, 0

    def note(net: nn.Module, args: tuple, y: object) -> None:
        nonlocal trained
        trained += len(args[0]) * torch.is_grad_enabled()

    hook = getattr(model, "net", model).register_forward_hook(note)
    tried = sorted({int((i + 0.5) * steps / 64) for i in range(64)}) if steps > 1 else range(64)
    for step in tried:
        with count_nfe() as evaluations:
            loss(model, x, c, LossContext(keyed_generator(step), step, max(steps, 64), average))
        total += evaluations.total
    hook.remove()
    n = len(tried) * len(x)
    return LossNFE(trained / n, (total - trained) / n)


def training_flops(cost: NetworkCost, nfe: LossNFE) -> float:
    """FLOPs per training sample, eq. (2), what gradient checkpointing computes again included."""
    again = cost.forward if cost.gradient_checkpointing else 0.0
    return nfe.trained * (cost.forward + cost.backward + again) + nfe.asked * cost.forward


class Chip(NamedTuple):
    """What a data sheet says of an accelerator."""

    peak: float  # FLOP/s of dense bf16 matrix products
    memory: float  # Bytes
    bandwidth: float  # Bytes/s between memory and chip
    link: float  # Bytes/s to the other chips of a machine, in one direction


CHIPS = {  # NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, sparsity taken out
    "a100": Chip(312e12, 80e9, 2.039e12, 300e9),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9),
}


def find_chip(name: str) -> Chip:
    """One of `CHIPS`, also by what a GPU calls itself."""
    found = [key for key in CHIPS if key in name.lower() and "pcie" not in name.lower()]
    require(len(found) == 1, "chip", name, f"{', '.join(map(repr, CHIPS))}, or four numbers of a data sheet")
    return CHIPS[found[0]]


def mfu(images_per_second: float, flops_per_image: float, peak: float, gpus: int = 1) -> float:
    """Model FLOP utilisation, eq. (3), of a speed measured over all GPUs; above 1 one of the numbers is wrong."""
    share = images_per_second * flops_per_image / (gpus * peak)
    require(0 <= share <= 1, "mfu", float(f"{share:.3g}"), "0 to 1, so the count, the time or the peak is wrong")
    return share


def memory_per_gpu(cost: NetworkCost, trained: float, gpus: int = 1, sharded: bool = False) -> dict[str, float]:
    """Bytes of training per GPU by what they are for, eq. (4), for `trained` samples with gradients in one pass."""
    weights = 4.0 * cost.weights
    share = weights / gpus if sharded else weights
    parts = {"weights": share, "gradients": share, "moments": 2 * share, "average": weights}
    return parts | {"copies": cost.copies, "activations": trained * cost.activations}


@checked
def cost_sheet(
    network: str | NetworkCost, loss: Callable[..., Tensor] | LossNFE, steps: int, batch_size: int,
    gradient_accumulation_steps: Count = 1, gpus: Sequence[int] = (1, 8), chip: str | Sequence[float] = "h100",
    share: PositiveShare = 0.35, sharded: bool = False, **settings: object,
) -> "pd.DataFrame":  # fmt: skip
    """GPU-hours and memory of a training run, eqs. (2) to (4), at an assumed MFU `share`, one row a number of GPUs.

    `network` is a name of `IMAGE_NETWORKS`, and `settings` are `shape` of a sample, (4, 32, 32) unless given,
    `num_classes`, 1000, `scale_aware`, `precision`, "bf16" or "fp32", `gradient_checkpointing`, and what differs from
    the network of that name, such as `width`. `loss` is one that `fit` takes. A step has `batch_size` samples, divided
    among `gpus` and passes. `chip` is "a100", "h100" or "h200", or four numbers of a data sheet: FLOP/s of dense bf16
    products, bytes of memory, bytes/s between it and the chip, bytes/s to the machine's other chips. If `sharded`,
    FSDP2 divides weights, gradients and moments.

    Columns: `gpus`; `samples_at_once`, of a GPU in a pass; `tflop_per_sample`, 10^12 FLOPs; `eflop`, 10^18 FLOPs of the
    run; `gpu_hours`; `hours`; `memory_gb`, 10^9 bytes of a GPU; `fits`, at most 90 % of the chip's memory. A network or
    chip that is not known, a `share` above 1, and a batch that GPUs and passes do not divide raise `ValueError`.
    """
    with extra("plots"):
        import pandas as pd

    found = find_chip(chip) if isinstance(chip, str) else Chip(*chip)
    cost = network_cost(network, **settings) if isinstance(network, str) else network  # type: ignore[arg-type]
    nfe = loss if isinstance(loss, LossNFE) else count_loss_nfe(loss, steps=steps)
    needed = training_flops(cost, nfe)
    hours = steps * batch_size * needed / (share * found.peak) / 3600
    table = []
    for n in gpus:
        at_once, rest = divmod(batch_size, check_whole("gpus", n, 1) * gradient_accumulation_steps)
        require(rest == 0, "batch_size", batch_size, f"a multiple of {n} GPUs x {gradient_accumulation_steps} passes")
        memory = sum(memory_per_gpu(cost, nfe.trained * at_once, n, sharded).values())
        row = {"gpus": n, "samples_at_once": at_once, "tflop_per_sample": needed / 1e12}
        row |= {"eflop": steps * batch_size * needed / 1e18, "gpu_hours": hours, "hours": hours / n}
        table.append(row | {"memory_gb": memory / 1e9, "fits": memory <= 0.9 * found.memory})
    return pd.DataFrame(table)


def launch_file(name: Literal["ddp-1node", "ddp-multinode", "fsdp2"]) -> Path:
    """A configuration that comes with the package, for `accelerate launch --config_file`."""
    return (Path(__file__).parent / "launch_files" / f"{name}.yaml").resolve(strict=True)
