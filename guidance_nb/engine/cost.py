"""What a run will cost before it starts, counted rather than guessed, and how one run becomes many processes."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from guidance_nb._processes import find_processes, gather_rows
from guidance_nb._random import keyed_generator
from guidance_nb.denoisers import Denoiser, count_nfe
from guidance_nb.images.features import Extractor, Features, check_images, checksum, extract
from guidance_nb.images.networks import build_network
from guidance_nb.networks import mlp_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.samplers import sample
from guidance_nb.training import Context, checkpoint_gradients


@dataclass(frozen=True)
class NetworkCost:
    "What one row, one sample passing through a network once, costs; a multiply-add counts as two FLOPs."

    weights: int  # Number of weights
    forward: float  # FLOPs of a row forward
    backward: float  # FLOPs of a row backward, both gradients, nothing computed twice
    activations: float  # Bytes that a row keeps for the backward pass
    copies: float = 0.0  # Bytes kept whatever the number of rows: weights cast to lower precision
    recompute: bool = False  # Whether the activations are those of gradient checkpointing


def kept_bytes(
    net: nn.Module,  # A network of fake tensors
    run: Callable[[], Tensor],  # Its forward pass
) -> int:  # Bytes of all tensors kept for the backward pass, the network's own weights aside
    "What a forward pass keeps, each storage counted once."
    own = {p.untyped_storage()._cdata for p in net.parameters()}
    found: dict[int, Tensor] = {}

    def note(x: Tensor) -> Tensor:
        if x.untyped_storage()._cdata not in own:
            found[x.untyped_storage()._cdata] = x  # kept alive, so that no storage takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        run()
    return sum(x.untyped_storage().nbytes() for x in found.values())


def count_network(
    build: Callable[[], nn.Module],  # Makes the network
    inputs: Callable[[int], tuple],  # Makes the arguments of its `forward` for n rows
    precision: str = "bf16",  # "fp32" or "bf16": what activations are kept in
    recompute: bool = False,  # Whether activations are forgotten (gradient checkpointing, diffusers' networks only)
) -> NetworkCost:
    "Count FLOPs and bytes of any network that answers with one tensor; nothing is computed or allocated."
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.utils.flop_counter import FlopCounterMode

    if precision not in ("fp32", "bf16"):
        raise ValueError(f"precision = {precision!r}; allowed: 'fp32', 'bf16'")
    with torch.device("meta"):
        net, args = build(), inputs(2)
        with FlopCounterMode(display=False) as forward:
            y = net(*args)
        with FlopCounterMode(display=False) as backward:
            y.sum().backward()
    with FakeTensorMode():
        net = build()
        if recompute:
            checkpoint_gradients(net)
        kept = []
        for n in (1, 2):
            with torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else nullcontext():
                kept.append(kept_bytes(net, lambda args=inputs(n): net(*args)))  # type: ignore[misc]
    there, back = (float(mode.get_total_flops()) / 2 for mode in (forward, backward))
    weights, row = sum(p.numel() for p in net.parameters()), kept[1] - kept[0]
    return NetworkCost(weights, there, back, float(row), float(max(0, kept[0] - row)), recompute)


@cache
def _count_named(name: str, shape: tuple[int, ...], classes: int, options: tuple, changes: tuple) -> NetworkCost:
    aware, precision, recompute = options
    build = lambda: build_network(name, shape, classes, aware, **dict(changes))  # noqa: E731

    def inputs(n: int) -> tuple:
        scales = (torch.ones(n),) if aware else ()
        return torch.zeros(n, *shape), torch.zeros(n), torch.zeros(n, dtype=torch.long), *scales

    return count_network(build, inputs, precision, recompute)


def network_cost(
    name: str,  # One of `IMAGE_NETWORKS`
    shape: Sequence[int],  # (channels, height, width) of an image or a latent
    num_classes: int,  # Number of classes
    scale_aware: bool = False,  # Whether the network takes a guidance scale
    precision: str = "bf16",  # "fp32" or "bf16"
    recompute: bool = False,  # Whether activations are forgotten (gradient checkpointing)
    **changes: Any,  # Settings that differ from those of the name
) -> NetworkCost:
    "Cost of a network by name, see `count_network`; counted once."
    plain = tuple((key, tuple(v) if isinstance(v, list) else v) for key, v in sorted(changes.items()))
    return _count_named(name, tuple(shape), num_classes, (scale_aware, precision, recompute), plain)


def dit_flops(
    width: int,  # Width d of the tokens
    depth: int,  # Number of blocks L
    tokens: int,  # Number of tokens n
    values: int,  # Numbers in a patch, p p C
) -> int:  # FLOPs of one row
    "FLOPs of a DiT forward, counted by hand, eq. (1)."
    d, n = width, tokens
    return 2 * (depth * (12 * n * d**2 + 2 * n**2 * d + 6 * d**2) + 2 * n * values * d + 3 * d**2 + 256 * d)


@dataclass(frozen=True)
class StepRows:
    "Network rows per training sample, the mean over a run."

    trained: float  # With a backward pass
    asked: float  # Without: teachers and the like


@torch.enable_grad()
def count_step_rows(
    loss: Callable,  # `loss(model, x0, c, context)`
    model: Any = None,  # A tiny model the loss accepts; None for a perceptron on two numbers with ten classes
    data: tuple[Tensor, Tensor | None] | None = None,  # Samples and labels for it; None for random ones
    steps: int = 1,  # Steps of the run, of which 64 are tried: some losses change in the course of it
) -> StepRows:
    "Count the rows that a loss takes by calling it on a tiny model."
    aware = getattr(loss, "scale_range", None) is not None
    model = mlp_denoiser(2, FlowPath(), 10, width=4, depth=1, scale_aware=aware) if model is None else model
    x, c = (torch.zeros(1024, 2), torch.arange(1024) % 10) if data is None else data
    average, trained, total = copy.deepcopy(model), 0, 0

    def note(net: nn.Module, args: tuple, y: Any) -> None:
        nonlocal trained
        trained += len(args[0]) * torch.is_grad_enabled()

    hook = getattr(model, "net", model).register_forward_hook(note)
    tried = sorted({int((i + 0.5) * steps / 64) for i in range(64)}) if steps > 1 else range(64)
    for step in tried:
        with count_nfe() as rows:
            loss(model, x, c, Context(keyed_generator(step), step, max(steps, 64), average))
        total += rows.total
    hook.remove()
    n = len(tried) * len(x)
    return StepRows(trained / n, (total - trained) / n)


def training_flops(
    cost: NetworkCost,  # A network
    rows: StepRows,  # What the loss does with it
) -> float:  # FLOPs of one training sample
    "FLOPs per training sample, eq. (2), what gradient checkpointing computes again included."
    again = cost.forward if cost.recompute else 0.0
    return rows.trained * (cost.forward + cost.backward + again) + rows.asked * cost.forward


def count_sample_rows(
    sampler: str,  # A key of `SAMPLERS`
    steps: int,  # Steps of the sampler
    guide: Callable[[Any], Denoiser] | None = None,  # What is put around the model, such as guidance
) -> float:  # Network rows per sample
    "Count the rows that a sample takes by drawing one from a toy."
    model = mlp_denoiser(2, FlowPath(), 10, width=4, depth=1)
    with count_nfe() as rows:
        sample(guide(model) if guide else model, torch.zeros(1).long(), (2,), sampler, steps, progress=False)
    return float(rows.total)


def sampling_flops(
    cost: NetworkCost,  # A network
    rows: float,  # Rows per sample, see count_sample_rows
) -> float:  # FLOPs of one sample
    "FLOPs per drawn sample: rows times a row forward."
    return rows * cost.forward


@dataclass(frozen=True)
class Chip:
    "What a data sheet says of an accelerator."

    peak: float  # FLOP/s of dense bf16 matrix products
    memory: float  # Bytes
    bandwidth: float  # Bytes/s between memory and chip
    link: float  # Bytes/s to the other chips of a machine, in one direction


CHIPS: dict[str, Chip] = {  # NVIDIA's data sheets of A100 80GB SXM, H100 SXM and H200 SXM, sparsity taken out
    "a100": Chip(312e12, 80e9, 2.039e12, 300e9),
    "h100": Chip(989e12, 80e9, 3.35e12, 450e9),
    "h200": Chip(989e12, 141e9, 4.8e12, 450e9),
}


def find_chip(
    name: str,  # A key of `CHIPS`, or what a GPU calls itself
) -> Chip:
    "A chip by name."
    found = [key for key in CHIPS if key in name.lower()]
    if len(found) != 1 or "pcie" in name.lower():
        raise ValueError(f"chip = {name!r}; allowed: {', '.join(map(repr, CHIPS))}, or a `Chip` of your own")
    return CHIPS[found[0]]


def mfu(
    images_per_second: float,  # Measured, over all GPUs
    flops_per_image: float,  # See training_flops, nothing computed twice; or sampling_flops
    peak: float,  # FLOP/s of a GPU, see `CHIPS`
    gpus: int = 1,  # Number of GPUs
) -> float:  # Between 0 and 1
    "Model FLOP utilisation, eq. (3); above 1 one of the numbers is wrong, which is refused."
    for name, value in {"images_per_second": images_per_second, "flops_per_image": flops_per_image}.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} = {value}; allowed: a finite number, 0 or more")
    if not (0 < peak < math.inf and gpus >= 1):
        raise ValueError(f"peak = {peak}, gpus = {gpus}; allowed: a positive number, and 1 or more")
    share = images_per_second * flops_per_image / (gpus * peak)
    if share > 1:
        raise ValueError(f"mfu = {share:.3g}; allowed: at most 1, so the count, the clock or the peak is wrong")
    return share


def memory_per_gpu(
    cost: NetworkCost,  # A network
    trained_rows: float,  # Rows with gradients in one pass of one GPU
    gpus: int = 1,  # Number of GPUs
    sharded: bool = False,  # Whether weights, gradients and moments are divided among them (FSDP2)
) -> dict[str, float]:  # Bytes by what they are for
    "Memory of training per GPU, eq. (4): an estimate from below."
    weights = 4.0 * cost.weights
    share = weights / gpus if sharded else weights
    parts = {"weights": share, "gradients": share, "moments": 2 * share, "average": weights}
    return parts | {"copies": cost.copies, "activations": trained_rows * cost.activations}


def cost_sheet(
    cost: NetworkCost,  # The network
    rows: StepRows,  # What the loss does with it
    steps: int,  # Optimiser steps
    batch_size: int,  # Samples per step, over all GPUs and passes
    accumulate: int = 1,  # Passes per step
    gpus: Sequence[int] = (1, 8),  # Numbers of GPUs, one row for each
    chip: str | Chip = "h100",  # A key of `CHIPS`, or your own
    share: float = 0.35,  # Assumed MFU
    sharded: bool = False,  # Whether FSDP2 divides the optimiser's state
) -> Any:  # A `pandas.DataFrame`
    "GPU-hours and memory of a training run, eqs. (2) to (4), at a stated MFU; communication is not in it."
    import pandas as pd

    if not 0 < share <= 1:
        raise ValueError(f"share = {share}; allowed: above 0, at most 1")
    found = find_chip(chip) if isinstance(chip, str) else chip
    needed = training_flops(cost, rows)
    hours = steps * batch_size * needed / (share * found.peak) / 3600
    table = []
    for n in gpus:
        if n < 1 or accumulate < 1:
            raise ValueError(f"gpus = {n}, accumulate = {accumulate}; allowed: 1 or more of each")
        if batch_size % (n * accumulate):
            raise ValueError(f"batch_size = {batch_size}; allowed: a multiple of {n} GPUs x {accumulate} passes")
        at_once = batch_size // (n * accumulate)
        memory = sum(memory_per_gpu(cost, rows.trained * at_once, n, sharded).values())
        row = {"gpus": n, "samples_at_once": at_once, "tflop_per_sample": needed / 1e12}
        row |= {"eflop": steps * batch_size * needed / 1e18, "gpu_hours": hours, "hours": hours / n}
        table.append(row | {"memory_gb": memory / 1e9, "fits": memory <= 0.9 * found.memory})
    return pd.DataFrame(table)


LAUNCH_FOLDER = Path(__file__).parent / "launch_files"


def launch_file(
    name: str,  # "ddp-1node", "ddp-multinode" or "fsdp2"
) -> Path:  # A file for `accelerate launch --config_file`
    "Where a configuration that comes with the package lies."
    names = sorted(path.stem for path in LAUNCH_FOLDER.glob("*.yaml"))
    if name not in names:
        raise ValueError(f"name = {name!r}; allowed: {', '.join(map(repr, names))}")
    return LAUNCH_FOLDER / f"{name}.yaml"


def batch_shares(
    n: int,  # Number of images
    batch_size: int,  # Images per call of the network
    world: int,  # Number of processes
) -> list[int]:  # Images of each process
    "Divide images among processes in whole batches, the last one aside."
    batches = -(-n // batch_size)
    ends = [min(n, batch_size * (batches * (rank + 1) // world)) for rank in range(world)]
    return [end - start for start, end in zip([0, *ends], ends)]


def extract_sharded(
    images: Tensor,  # uint8, `[n, 1 or 3, h, w]`, the same in every process
    extractor: Extractor,  # A network that looks at images
    name: str = "images",  # What the set is called in tables
    batch_size: int = 64,  # Images per call of the network
    progress: bool = False,  # Whether the main process shows a progress bar
) -> Features:  # Of all images, in every process; on the CPU
    "`extract`, divided among the processes of a launch; without them it is `extract`."
    device = torch.device(extractor.device)
    rank, world = find_processes(device)
    if world == 1:
        return extract(images, extractor, name, batch_size, progress)
    shares = batch_shares(len(check_images(name, images)), batch_size, world)
    own, result, error = images.split(shares)[rank], None, None
    try:
        if len(own):
            result = extract(own, extractor, name, batch_size, progress and rank == 0)
    except (ValueError, RuntimeError) as problem:
        error = problem
    told: list[Any] = [None] * world
    widths = {layer: rows.shape[1] for layer, rows in result.rows.items()} if result else None
    torch.distributed.all_gather_object(told, (error, widths))
    for failed, _ in told:
        if failed is not None:
            raise failed
    layers = next(found for _, found in told if found)
    rows = {layer: result.rows[layer] if result else torch.zeros(0, width) for layer, width in layers.items()}
    where = device if torch.distributed.get_backend() != "gloo" else torch.device("cpu")
    whole = {layer: gather_rows(part.to(where), shares).cpu() for layer, part in rows.items()}
    return Features(extractor.name, whole, {}, name, len(images), checksum(images), tuple(images.shape[2:]))


@dataclass(frozen=True)
class Cluster:
    "Assumptions about machines, for plans on paper: data sheets, and guesses to replace by what you measure."

    chip: Chip = CHIPS["h100"]  # The accelerator
    share: float = 0.35  # MFU while a GPU computes
    per_machine: int = 8  # GPUs of a machine
    network: float = 50e9  # Bytes/s of a GPU to other machines, in one direction (400 Gb/s)
    overlap: float = 0.5  # Share o of the computing time in which gradients travel unnoticed
    storage: float = 2e9  # Bytes/s that the storage gives to all machines together, and takes
    sample_bytes: float = 32768.0  # A latent's mean and deviation, 2 x 4 x 32 x 32 numbers of 4 bytes
    save_every: int = 5000  # Steps k between checkpoints
    price: float = 2.0  # Per GPU-hour, in any currency


def exchange_seconds(
    weights: int,  # Number of weights P
    gpus: int,  # Number of GPUs n
    cluster: Cluster = Cluster(),  # Assumptions about the machines
    sharded: bool = False,  # FSDP2: weights gathered twice, gradients scattered, and weights gathered for the average
) -> float:  # Seconds
    "Time that gradients travel in a ring, eq. (5); with FSDP2 four half rounds in place of two."
    alone, ways = gpus <= cluster.per_machine, cluster.per_machine * cluster.network  # a ring through each GPU's link
    bandwidth = cluster.chip.link if alone else min(cluster.chip.link, ways)
    return (4 if sharded else 2) * (gpus - 1) / gpus * 4 * weights / bandwidth


def step_seconds(
    cost: NetworkCost,  # The network
    rows: StepRows,  # What the loss does with it
    batch_size: int,  # Samples per step B
    gpus: int,  # Number of GPUs n
    cluster: Cluster = Cluster(),  # Assumptions about the machines
    sharded: bool = False,  # Whether FSDP2 divides weights, gradients and moments
) -> dict[str, float]:  # Seconds, by what they are spent on
    "A step on paper, eq. (6); few samples a GPU lower the MFU, which this model does not know."
    if gpus < 1 or batch_size % gpus:
        raise ValueError(f"batch_size = {batch_size}; allowed: a multiple of gpus = {gpus}")
    compute = batch_size * training_flops(cost, rows) / (gpus * cluster.share * cluster.chip.peak)
    exchange = max(0.0, exchange_seconds(cost.weights, gpus, cluster, sharded) - cluster.overlap * compute)
    update = (28 / (gpus if sharded else 1) + 12) * cost.weights / cluster.chip.bandwidth
    reading = batch_size * cluster.sample_bytes / cluster.storage
    wait = max(0.0, reading - compute - exchange - update)
    saving = 16 * cost.weights / cluster.storage / cluster.save_every
    parts = {"compute": compute, "exchange": exchange, "update": update, "wait": wait, "saving": saving}
    return parts | {"total": sum(parts.values())}


def scaling_efficiency(
    cost: NetworkCost,  # The network
    rows: StepRows,  # What the loss does with it
    batch_size: int,  # Samples per step over all GPUs; or of each GPU, if `grow`
    gpus: int,  # Number of GPUs n
    cluster: Cluster = Cluster(),  # Assumptions about the machines
    grow: bool = False,  # Whether the batch grows with the GPUs
) -> float:  # Above 0, at most 1
    "Samples per second and GPU, relative to one GPU, eq. (6); the papers' batch is fixed, so `grow` is another run."
    one = step_seconds(cost, rows, batch_size, 1, cluster)["total"] / batch_size
    many = batch_size * gpus if grow else batch_size
    return one / (gpus * step_seconds(cost, rows, many, gpus, cluster)["total"] / many)


def scaling_plan(
    cost: NetworkCost,  # The network
    rows: StepRows,  # What the loss does with it
    steps: int,  # Optimiser steps
    batch_size: int,  # Samples per step
    gpus: Sequence[int] = (1, 8, 32, 64, 128, 256),  # One row for each
    cluster: Cluster = Cluster(),  # Assumptions about the machines
    sharded: bool = False,  # Whether FSDP2 divides weights, gradients and moments
) -> Any:  # A `pandas.DataFrame`
    "Throughput, reading, storage and cost of a run on 1 to many GPUs, eq. (6): a model, not a measurement."
    import pandas as pd

    table: list[dict[str, Any]] = []
    alone = batch_size / step_seconds(cost, rows, batch_size, 1, cluster)["total"]
    for n in gpus:
        parts = step_seconds(cost, rows, batch_size, n, cluster, sharded)
        speed, hours = batch_size / parts["total"], steps * parts["total"] / 3600
        row: dict[str, Any] = {"gpus": n, "images_per_s": speed, "days": hours / 24, "gpu_hours": n * hours}
        row |= {"price": n * hours * cluster.price, "efficiency": speed / n / alone}
        slow = {name: parts[name] for name in ("exchange", "update", "wait", "saving")}
        row |= {"compute_share": parts["compute"] / parts["total"], "largest_other": max(slow, key=lambda k: slow[k])}
        row |= {"read_mb_per_s": speed * cluster.sample_bytes / 1e6, "checkpoint_gb": 16 * cost.weights / 1e9}
        table.append(row)
    return pd.DataFrame(table)
