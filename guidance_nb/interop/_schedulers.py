"""What a scheduler of diffusers says: the path a network was trained on, what it predicts, what it is told of time."""

import copy
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from guidance_nb._checks import check_choice, require
from guidance_nb.denoisers import Parametrisation
from guidance_nb.interop._networks import Scheduler
from guidance_nb.paths import EDMPath, FlowPath, Path

_SCHEDULER_PREDICTIONS: dict[str, Parametrisation] = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


@lru_cache(maxsize=32)
def _nodes(angles: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heights = torch.tensor((0.0, *angles), dtype=dtype)
    rises = heights.diff()
    slopes = torch.cat([rises[:1], (rises[:-1] * rises[1:]).sqrt(), rises[-1:]])
    return heights.to(device), rises.to(device), slopes.to(device)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


@dataclass(frozen=True)
class TablePath(Path):
    "The variance-preserving path through the noise levels of a discrete schedule, eqs. (1) and (2)."

    angles: tuple[float, ...]  # arctan of the noise-to-signal ratio at times 1 / N, 2 / N, ..., 1

    def __post_init__(self) -> None:
        rising = len(self.angles) > 1 and all(a < b for a, b in zip((0.0, *self.angles), self.angles))
        allowed = "rising, from above 0 to at most pi / 2"
        require(rising and self.angles[-1] <= math.pi / 2, "angles", f"{len(self.angles)} numbers", allowed)

    def __repr__(self) -> str:
        ends = f"{math.tan(self.angles[0]):.3g} to {math.tan(self.angles[-1]):.3g}"
        return f"TablePath({len(self.angles)} steps, noise-to-signal {ends})"

    def _angle(self, t: Tensor) -> tuple[Tensor, Tensor]:
        "The rational quadratic spline of eq. (2) through the angles, and its derivative, in double precision."
        steps, position = len(self.angles), _wide(t) * len(self.angles)
        heights, rises, slopes = _nodes(self.angles, position.device, position.dtype)
        k = position.floor().clamp(0, steps - 1).long()
        xi, s, d, e = position - k, rises[k], slopes[k], slopes[k + 1]
        both = xi * (1 - xi)
        below = s + (d + e - 2 * s) * both
        value = heights[k] + s * (s * xi**2 + d * both) / below
        return value, steps * s**2 * (e * xi**2 + 2 * s * both + d * (1 - xi) ** 2) / below**2

    def alpha(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].cos().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return self._angle(t)[0].sin().to(t.dtype)

    def d_alpha(self, t: Tensor) -> Tensor:
        angle, slope = self._angle(t)
        return (-angle.sin() * slope).to(t.dtype)

    def d_sigma(self, t: Tensor) -> Tensor:
        angle, slope = self._angle(t)
        return (angle.cos() * slope).to(t.dtype)

    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        "The root of a quadratic within a step, a line beyond the last; above 1 where the table is exceeded."
        angle = _wide(noise_to_signal).atan()
        heights, rises, slopes = _nodes(self.angles, angle.device, angle.dtype)
        k = (torch.searchsorted(heights, angle, right=True) - 1).clamp(0, len(rises) - 1)
        rest, s, d, e = angle - heights[k], rises[k], slopes[k], slopes[k + 1]
        a, b, c = s * (s - d) + rest * (d + e - 2 * s), s * d - rest * (d + e - 2 * s), -s * rest
        within = 2 * c / (-b - (b**2 - 4 * a * c).clamp(min=0).sqrt())
        beyond = 1 + (angle - heights[-1]) / slopes[-1]
        time = (k + torch.where(angle > heights[-1], beyond, within.clamp(max=1))) / len(rises)
        return torch.where(time < 1 + 1e-6, time.clamp(max=1), time).to(noise_to_signal.dtype)


@dataclass(frozen=True)
class _Clock:
    "What a network is told of time: scale t - offset, not below 0."

    scale: float  # Number of training steps
    offset: float = 0.0  # 1 where timestep 0 is the first noisy level

    def __call__(self, t: Tensor) -> Tensor:
        "Timesteps of times `t`, float32."
        return (self.scale * _wide(t) - self.offset).clamp(min=0).float()

    def time(self, timestep: Tensor) -> Tensor:
        "The inverse: times of timesteps, in double precision."
        return (_wide(timestep) + self.offset) / self.scale


class SchedulerFacts(NamedTuple):
    "What a scheduler's configuration says of the model it belongs to."

    path: Path  # The path the network was trained on
    prediction: Parametrisation  # What the network predicts
    clock: _Clock | None  # What it is told of time; None for EDM's own
    sigma_data: float = 0.5  # Standard deviation of the data, used by `edm` alone
    sign: float = 1.0  # Sign of the output; -1 for EDM networks of type `v_prediction`


def path_from_scheduler(scheduler: Scheduler, numbered: bool = False) -> SchedulerFacts:
    """Read path, prediction and time from a scheduler's configuration, eq. (1); raises `ValueError` for any other.

    Where timesteps must be `numbered`, EDM's are an error.
    """
    name, config = type(scheduler).__name__, dict(getattr(scheduler, "config", {}))
    kind, steps = config.get("prediction_type"), config.get("num_train_timesteps", 1000)
    told = f"prediction_type of {name}"
    if name.startswith("EDM"):
        require(not numbered, "scheduler", name, "any but those of EDM")
        sign = 1.0 if check_choice(told, kind, ("epsilon", "v_prediction")) == "epsilon" else -1.0
        return SchedulerFacts(EDMPath(config["sigma_max"]), "edm", None, config["sigma_data"], sign)
    if (name.startswith("FlowMatch") and not config.get("invert_sigmas")) or kind == "flow_prediction":
        return SchedulerFacts(FlowPath(), "velocity", _Clock(steps))
    table: Tensor = getattr(scheduler, "alphas_cumprod", None)  # type: ignore[assignment]
    known = "one with alphas_cumprod (DDPM, DDIM, PNDM, DPM-Solver, Euler, ...), FlowMatch... or EDM..., loaded"
    require(table is not None, "scheduler", name, known)
    way_out = "'v_prediction', 'sample', or rescale_betas_zero_snr=False: without signal, noise says nothing"
    signal = table[-1] > 0 and not config.get("rescale_betas_zero_snr")  # some leave 2^-24 of it even so
    require(signal or kind != "epsilon", f"{told} with zero terminal SNR", kind, way_out)
    angles = torch.atan2((1 - table.double()).sqrt(), table.double().sqrt())
    path, clock = TablePath(tuple(angles.tolist())), _Clock(len(angles), 1)
    return SchedulerFacts(path, _SCHEDULER_PREDICTIONS[str(check_choice(told, kind, _SCHEDULER_PREDICTIONS))], clock)


def scheduler_times(
    scheduler: Scheduler,  # A scheduler of diffusers; left as it is
    steps: int,  # Number of steps
    **options: object,  # Further arguments of its `set_timesteps`, such as `mu`
) -> Tensor:  # Falling times, for `sample(times=...)`
    "The times at which a scheduler would evaluate the network, and where it ends."
    facts, own = path_from_scheduler(scheduler), copy.deepcopy(scheduler)
    own.set_timesteps(steps, **options)
    levels = getattr(own, "sigmas", None)
    if levels is not None and len(levels) > len(own.timesteps):
        levels = levels.double()
        times = levels if isinstance(facts.path, FlowPath) else facts.path.time_at(levels)
    else:
        assert facts.clock is not None  # schedulers without noise levels have timesteps
        final = float(getattr(own, "final_alpha_cumprod", 1.0))
        last = torch.tensor([0.0 if final == 1 else 1 / facts.clock.scale], dtype=torch.float64)
        times = torch.cat([facts.clock.time(own.timesteps), last])
    return torch.unique_consecutive(times.cpu())
