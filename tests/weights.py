"Weights for networks that start at zero, whose outputs would hide what is tested."

import torch
from torch import nn


def stir(net: nn.Module, size: float = 0.1, seed: int = 1) -> nn.Module:
    "Add to every weight a random number of standard deviation `size`."
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in net.parameters():
            weight += size * torch.randn(weight.shape, generator=generator).to(weight)
    return net
