"""Networks of torchcfm and plain functions as denoisers."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from guidance_nb._conditions import Condition, take_rows
from guidance_nb.denoisers import NetworkDenoiser, check_inputs, record_nfe
from guidance_nb.paths import FlowPath, Path


class _TorchCFMNet(nn.Module):
    "A network of torchcfm in this package's convention, eq. (3): `net(x, time, labels)`."

    def __init__(self, net: nn.Module, conditional: bool = False):
        super().__init__()
        self.net, self.conditional = net, conditional

    def forward(self, x: Tensor, time: Tensor, labels: Tensor) -> Tensor:
        "Velocity towards noise, shape of `x`."
        return -self.net(1 - time, x, labels) if self.conditional else -self.net(1 - time, x)


def from_torchcfm(
    net: nn.Module,  # `net(t, x)`, or `net(t, x, y)` if there are classes
    num_classes: int = 0,  # Number of classes; label `num_classes` is the null label, if it was trained
    path: Path = FlowPath(),  # FlowPath() for straight paths, VPPath("cosine") for trigonometric ones
) -> NetworkDenoiser:  # For sampling, guidance and training
    "A model of torchcfm as a denoiser, eq. (3)."
    return NetworkDenoiser(_TorchCFMNet(net, num_classes > 0), path, num_classes, "velocity")


class _CallableDenoiser(NetworkDenoiser):
    "A function of `(x, t, c)` as a denoiser; made by `from_callable`."

    def output(
        self, x: Tensor, t: Tensor | float, c: Condition | None = None,
        drop: Tensor | None = None, scale: float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        "What the function returns, shape of `x`; arguments as in `NetworkDenoiser.output`, `scale` is not used."
        times = check_inputs(x, t, c, self.num_classes).to(x.device, x.dtype).expand(len(x))
        record_nfe(len(x))
        if c is None or drop is None or not drop.any():
            return self.net(x, times, c)
        if drop.all():
            return self.net(x, times, None)
        kept, rest = (~drop).nonzero().squeeze(1), drop.nonzero().squeeze(1)
        parts = self.net(x[kept], times[kept], take_rows(c, kept)), self.net(x[rest], times[rest], None)
        return torch.cat(parts)[torch.cat([kept, rest]).argsort()]


def from_callable(
    fn: Callable[..., Tensor],  # `fn(x, t, c)` with times `[batch]`; `c` is None where there is no condition
    path: Path,  # The path it lives on
    prediction: str,  # What it returns, one of `Parametrisation`
    num_classes: int = 0,  # Number of classes, or `EMBEDDINGS`
) -> NetworkDenoiser:  # For sampling and guidance; for training, too, if `fn` is a module
    "A plain function, or a module with that signature, as a denoiser."
    return _CallableDenoiser(fn, path, num_classes, prediction)  # type: ignore[arg-type]
