"""Speed of the transformers of DiT and SiT on one GPU: images/s and MFU of training and sampling, on random latents.

    python tools/dit_speed.py --out runs/gpu --budget 5

It trains B/2 and XL/2 in bf16 as they are, compiled block by block, and recorded as a CUDA graph, too; then it samples
with one evaluation a step, as after Model-guidance, and with two, as classifier-free guidance does, by turns. FLOPs are
counted by PyTorch, a multiply-add as two; MFU is given of the peak that a large matrix product reaches here and of the
data sheet's. Rows are added to OUT/transformers.csv as they are made; those that are there are not made again. It
leaves within the budget, in minutes. `--rehearse` does the same with a tiny network, on a CPU, too.
"""

import argparse
import csv
import gc
import math
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import torch

from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.denoisers import NetworkDenoiser
from guidance_nb.engine._cost import LossNFE, find_chip, memory_per_gpu, mfu, network_cost, training_flops
from guidance_nb.engine._hardware import compile_network
from guidance_nb.engine._run import Engine
from guidance_nb.images._networks import image_denoiser
from guidance_nb.paths import FlowPath
from guidance_nb.samplers import sample
from guidance_nb.training import DenoisingLoss, fit

COLUMNS = ["network", "batch", "engine", "images_per_second", "slowest", "fastest", "gflops_per_image", "mfu",
           "mfu_datasheet", "warm_up", "gigabytes", "device", "torch"]  # fmt: skip
ENGINES: dict[str, dict[str, bool]] = {
    "eager": {},
    "compiled": {"compile": True},
    "compiled, CUDA graph": {"compile": True, "cuda_graphs": True},
}
SAMPLING = {1: "sampling, 1 evaluation a step", 2: "sampling, 2 evaluations a step"}
CUDA = torch.cuda.is_available()
DEVICE = torch.cuda.get_device_name() if CUDA else "CPU"


@dataclass(frozen=True)
class Size:
    "How large everything is."

    networks: dict[str, dict[str, int]] = field(default_factory=lambda: {"dit-b/2": {}, "dit-xl/2": {}})
    shape: tuple[int, int, int] = (4, 32, 32)
    batch: int = 256
    repeats: int = 5
    seconds: float = 1.0  # of a repeat, at least
    steps: int = 10  # of sampling


REHEARSAL = Size({"dit-s/4": {"width": 32, "depth": 2, "heads": 2}}, (4, 8, 8), 4, 2, 0.0, 2)


def now() -> float:
    "The time when all that was started is done."
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


@cache
def measured_peak() -> float:
    "FLOP/s of a large product of matrices in bf16."
    if not CUDA:
        return math.nan
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    for _ in range(6):
        start = now()
        for _ in range(10):
            a @ b
        rates.append(10 * 2 * 8192**3 / (now() - start))
    return median(rates[1:])


def build(name: str, size: Size) -> NetworkDenoiser:
    "A network whose weights that start at zero do not, for products with zeros may be faster than others."
    model = image_denoiser(name, size.shape, FlowPath(), 1000, **size.networks[name])
    for weight in model.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight, std=0.02)
    return model.to("cuda" if CUDA else "cpu")


def row(name: str, engine: str, batch: int, speeds: list[float], flops: float, warm: float) -> dict[str, Any]:
    "A row of the table."
    speed, peak = median(speeds), measured_peak()
    share = [mfu(speed, flops, each) if CUDA else math.nan for each in (peak, find_chip(DEVICE).peak if CUDA else 1.0)]
    values = [name, batch, engine, *(f"{s:.6g}" for s in (speed, min(speeds), max(speeds))), f"{flops / 1e9:.6g}"]
    values += [*(f"{s:.4f}" for s in share), f"{warm:.1f}"]
    memory = torch.cuda.max_memory_reserved() / 1e9 if CUDA else math.nan
    return dict(zip(COLUMNS, [*values, f"{memory:.1f}", DEVICE, torch.__version__]))


def train(name: str, engine: str, model: NetworkDenoiser, batch: int, size: Size) -> Iterator[dict[str, Any]]:
    "Images per second of training by one way of running it."
    settings = Engine(precision="bf16" if CUDA else "fp32", **ENGINES[engine])
    data = torch.randn(4 * batch, *size.shape), torch.arange(4 * batch) % 1000
    options: Any = {"batch_size": batch, "lr": 1e-4, "schedule": "constant", "progress": False}
    model.zero_grad()  # of the run before, which would hold the memory of its graph
    begin = now()
    run = fit(model, DenoisingLoss(0.1), data, 10**6, engine=settings, **options)
    for _ in range(5):  # a graph is recorded at the fourth
        next(run)
    start = now()
    next(run)
    steps, speeds = max(2, math.ceil(size.seconds / (now() - start))), []
    for _ in range(size.repeats):
        since = now()
        for _ in range(steps):
            next(run)
        speeds.append(batch * steps / (now() - since))
    run.close()
    flops = training_flops(network_cost(name, size.shape, 1000, **size.networks[name]), LossNFE(1, 0))
    yield row(name, engine, batch, speeds, flops, start - begin)


def draw(name: str, model: NetworkDenoiser, batch: int, size: Size) -> Iterator[dict[str, Any]]:
    "Images per second of sampling with one evaluation a step and with two, by turns."
    model.zero_grad()
    compile_network(model.net)
    ways: dict[int, Any] = {1: model, 2: ClassifierFreeGuidance(model, 2.0)}
    ask = partial(sample, c=torch.arange(batch) % 1000, shape=size.shape, sampler="euler", progress=False)
    speeds, warm = {way: list[float]() for way in ways}, {}
    with torch.autocast("cuda", torch.bfloat16, enabled=CUDA):
        for way, view in ways.items():
            start = now()
            ask(view, steps=1)
            warm[way] = now() - start
        for _ in range(size.repeats):
            for way, view in ways.items():
                start = now()
                ask(view, steps=size.steps)
                speeds[way].append(batch / (now() - start))
    forward = network_cost(name, size.shape, 1000, **size.networks[name]).forward
    for way in ways:
        yield row(name, SAMPLING[way], batch, speeds[way], way * size.steps * forward, warm[way])
    print(f"{name} one evaluation against two: {median(speeds[1]) / median(speeds[2]):.3f} times as fast", flush=True)


def in_memory(work: Callable[[int], Iterator[dict[str, Any]]], batch: int) -> list[dict[str, Any]]:
    "The rows of some work with the largest batch that fits, halved from `batch`."
    while True:
        gc.collect()
        if CUDA:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            return list(work(batch))
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2


def first_batch(name: str, size: Size) -> int:
    "The largest batch for training whose memory, as counted, leaves a tenth free."
    if not CUDA:
        return size.batch
    batch, cost = size.batch, network_cost(name, size.shape, 1000, **size.networks[name])
    total = torch.cuda.mem_get_info()[1]
    while batch > 1 and sum(memory_per_gpu(cost, batch).values()) > 0.9 * total:
        batch //= 2
    return batch


def is_made(file: Path, network: str, engine: str) -> bool:
    "Whether the table has this row, made on this device with this version of torch."
    wanted = {"network": network, "engine": engine, "device": DEVICE, "torch": torch.__version__}
    rows = list(csv.DictReader(file.read_text().splitlines())) if file.exists() else []
    return any(wanted.items() <= row.items() for row in rows)


def save(file: Path, made: dict[str, Any]) -> None:
    "Add a row to the table, and show it."
    with file.open("a", newline="") as out:
        writer = csv.DictWriter(out, COLUMNS, lineterminator="\n")
        if out.tell() == 0:
            writer.writeheader()
        writer.writerow(made)
    print(*(f"{key} {value}" for key, value in made.items() if key not in ("device", "torch")), sep=", ", flush=True)


def measure(file: Path, size: Size, deadline: float) -> list[str]:
    "Make the rows that are missing, until the deadline; what is still missing."
    models, missing, longest = cache(partial(build, size=size)), [], 0.0
    kinds = {engine: (engine,) for engine in ENGINES} | {"sampling": tuple(SAMPLING.values())}
    for name, (kind, engines) in product(size.networks, kinds.items()):
        if all(is_made(file, name, engine) for engine in engines):
            continue
        start, what = time.monotonic(), f"{name} {kind}"
        missing.append(what)
        if start + 1.5 * longest > deadline:
            continue
        way = partial(draw, name) if kind == "sampling" else partial(train, name, kind)
        try:
            batch = size.batch if kind == "sampling" else first_batch(name, size)
            for made in in_memory(partial(way, models(name), size=size), batch):
                save(file, made)
            missing.remove(what)
        except Exception as error:  # what one way of running cannot do, another may
            print(f"{what}: not possible here", "".join(traceback.format_exception_only(error)[-1:])[:2000], flush=True)
        longest = max(longest, time.monotonic() - start)
    return missing


def main(arguments: list[str] | None = None) -> None:
    "The command line."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of transformers.csv")
    parser.add_argument("--budget", type=float, default=5.0, help="minutes")
    parser.add_argument("--rehearse", action="store_true", help="a tiny network")
    asked = parser.parse_args(arguments)
    if not asked.budget > 0:
        parser.error(f"--budget {asked.budget:g}; allowed: a positive number of minutes")
    if not (CUDA or asked.rehearse):
        parser.error(f"device = {DEVICE}; allowed: a GPU, or --rehearse")
    asked.out.mkdir(parents=True, exist_ok=True)
    torch._dynamo.config.recompile_limit = 64  # two networks, each for training and in two batch sizes
    torch._dynamo.config.automatic_dynamic_shapes = False  # the second size is compiled as well as the first
    print(f"{DEVICE}, torch {torch.__version__}, {measured_peak() / 1e12:.0f} TFLOP/s of products in bf16", flush=True)
    deadline = time.monotonic() + 60 * asked.budget
    missing = measure(asked.out / "transformers.csv", REHEARSAL if asked.rehearse else Size(), deadline)
    print(f"missing: {', '.join(missing) or 'nothing'}")


if __name__ == "__main__":
    main()
