"""Sets of points: which are invalid, and the one exact search for nearest neighbours, toy and image."""

from collections.abc import Iterator

import torch
from torch import Tensor

from guidance_nb._checks import require_that

from .denoisers import check_labels

Features = Tensor | tuple[Tensor, Tensor]  # or their mean and covariance
SPARE = 8  # candidates beyond k; more are taken where these do not decide
MEMORY = 2**28  # bytes that one table of distances may take
CACHE = 2**23  # bytes of a table that a processor has near at hand


def as_points(name: str, x: Tensor, dim: int | None = None, at_least: int = 1) -> Tensor:
    "Samples `[n, ...]` as points `[n, d]`, float64, on the CPU, or a `ValueError` that names the argument."
    if not isinstance(x, Tensor) or x.ndim < 2 or len(x) < at_least or not x[0].numel():
        found = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} has shape {found}; allowed: a tensor [n, ...] with n >= {at_least}")
    points = x.detach().cpu().double().flatten(1)
    bad, width = int((~torch.isfinite(points)).any(1).sum()), points.shape[1]
    require_that(not bad, f"{name} has {bad} samples that are not finite", "finite values")
    require_that(dim in (None, width), f"{name} has {width} values per sample", f"{dim}, as in the other set")
    return points


def as_labels(name: str, c: Tensor, n: int, num_classes: int | None = None) -> Tensor:
    "n labels as int64 on the CPU; a wrong type, length or range is a `ValueError` that names the argument."
    return check_labels(c, 2**31 if num_classes is None else num_classes, n, name).cpu().long()


def moments(name: str, x: Features, dim: int | None = None) -> tuple[Tensor, Tensor]:
    "Mean `[d]` and unbiased covariance `[d, d]` of points, float64; moments pass as they are."
    if isinstance(x, tuple):
        return x[0].double(), x[1].double()
    points = as_points(name, x, dim, at_least=2)
    mean = points.mean(0)
    points = points - mean
    return mean, points.T @ points / (len(points) - 1)


def _squares(x: Tensor, y: Tensor, rows: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    "Points of x, squared distances to all of y by a matrix product, and a bound of the rounding error `[b, 1]`."
    centre = y.mean(0)  # a common offset would drown small distances
    b = y - centre
    norms = b.square().sum(1)
    unit = (y.shape[1] + 8) * torch.finfo(torch.float64).eps
    for part in x.split(max(1, min(rows, max(256, CACHE // (8 * len(y)))))):
        part = part.to(y)
        a = part - centre
        own = a.square().sum(1, keepdim=True)
        yield part, torch.addmm(norms, a, b.T, alpha=-2).add_(own), unit * (own.sqrt() + norms.max().sqrt()) ** 2


def search(
    x: Tensor, y: Tensor, k: int, device: str | torch.device | None = None, spare: int = SPARE
) -> tuple[Tensor, Tensor]:
    """The k points of y nearest to each of x, exactly; of equal distances the lower index comes first.

    Squared distances, ascending, and indices, `[n, k]` each, on the CPU; found on `device`, or where x is.
    A matrix product proposes candidates; its rounding can hide small differences of distance. So candidates are
    compared by sums of squared differences, and a row takes more of them if a point left out might be as near.
    """
    y = y.to(x.device if device is None else device, torch.float64)
    size, found = min(k + spare, len(y)), []
    for part, squares, slack in _squares(x, y, MEMORY // (8 * max(len(y), size * y.shape[1]))):
        near = squares.topk(size, largest=False)
        index = near.indices.sort(1).values
        exact, order = (part[:, None] - y[index]).square().sum(2).sort(dim=1, stable=True)
        exact, index = exact[:, :k].cpu(), index.gather(1, order)[:, :k].cpu()
        unsure = (exact[:, -1] >= (near.values[:, -1] - slack[:, 0]).cpu()).nonzero()[:, 0]
        if size < len(y) and len(unsure):
            exact[unsure], index[unsure] = search(part[unsure.to(y.device)], y, k, spare=16 * spare)
        found.append((exact, index))
    distances, indices = zip(*found)
    return torch.cat(distances), torch.cat(indices)


def inside(x: Tensor, y: Tensor, squares: Tensor, device: str | torch.device | None = None) -> Tensor:
    "Whether each point of x lies in any of the closed balls around y, with squared radii in float64, exactly."
    y = y.to(x.device if device is None else device, torch.float64)
    reach, found = squares.to(y.device), []
    for part, near, slack in _squares(x, y, MEMORY // (8 * len(y))):
        least = near.sub_(reach).amin(1, keepdim=True)
        hit = (least < -slack)[:, 0]
        rows = ((least <= slack)[:, 0] & ~hit).nonzero()[:, 0]  # decided by differences
        at, ball = (near[rows] <= slack[rows]).nonzero(as_tuple=True)
        for i, j in zip(*(each.split(max(1, MEMORY // (8 * y.shape[1]))) for each in (rows[at], ball))):
            hit[i[(part[i] - y[j]).square().sum(1) <= reach[j]]] = True
        found.append(hit.cpu())
    return torch.cat(found)
