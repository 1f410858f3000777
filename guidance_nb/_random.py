"""Keyed random numbers: every draw is a function of whole numbers, so nothing depends on batching, resume or order."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from guidance_nb._checks import check_whole


def keyed_generator(*key: int, device: str | torch.device = "cpu") -> torch.Generator:
    "A generator that is a function of whole numbers alone."
    state = 0
    for number in key:  # splitmix64, so that neighbouring keys give unrelated streams
        state = (state + int(number) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return torch.Generator(device).manual_seed(state % 2**63)


def keyed_noise(seed: int, start: int, shape: tuple[int, ...], step: int = 0) -> Tensor:
    "Noise keyed by sample index, so that batching never changes a sample."
    seed, start = check_whole("seed", seed, 0, 2**64 - 1), check_whole("start", start)
    n, rest, blocks = shape[0], shape[1:], []
    end = start + max(n, 1)
    for block in range(start // 256, (end - 1) // 256 + 1):
        generator = np.random.Generator(np.random.Philox(key=[seed, block << 32 | step]))
        rows = min(256, end - 256 * block)  # the rest of the last block is not needed
        blocks.append(torch.from_numpy(generator.standard_normal((rows, *rest), dtype=np.float32)))
    return torch.cat(blocks)[start % 256 :][:n]


class NoiseSource:
    "Keyed noise for samples `start`, `start + 1`, ...: the n-th call gives the noise of step n, from 0."

    def __init__(self, seed: int, start: int, shape: tuple[int, ...], device: torch.device, dtype: torch.dtype):
        self.seed, self.start, self.shape, self.place, self.step = seed, start, shape, (device, dtype), 0

    def __call__(self) -> Tensor:
        "The next draw."
        self.step += 1
        return keyed_noise(self.seed, self.start, self.shape, self.step - 1).to(*self.place)


def visiting_order(size: int, batch_size: int, seed: int, steps: int, start: int = 0) -> Iterator[Tensor]:
    "Indices of batches `start` to `steps`: consecutive pieces of one shuffled epoch after another."
    epoch, skip = divmod(start * batch_size, size)
    order = torch.randperm(size, generator=keyed_generator(seed, 2, epoch))[skip:]
    for _ in range(start, steps):
        while len(order) < batch_size:
            epoch += 1
            order = torch.cat([order, torch.randperm(size, generator=keyed_generator(seed, 2, epoch))])
        yield order[:batch_size]
        order = order[batch_size:]


@contextmanager
def keyed_global_rng(device: torch.device, *key: int) -> Iterator[None]:
    "Let PyTorch's global generators be functions of a key inside a `with` block, and leave them untouched."
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(keyed_generator(*key).initial_seed())
        yield


def has_dropout(model: nn.Module) -> bool:
    "Whether layers of a model draw from PyTorch's global generators when it trains."
    return any(isinstance(m, nn.modules.dropout._DropoutNd) and m.p > 0 for m in model.modules())
