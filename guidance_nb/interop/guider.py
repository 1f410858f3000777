"""Guidance of this package inside modular pipelines of diffusers."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from guidance_nb._checks import require
from guidance_nb._conditions import Condition
from guidance_nb._extras import extra
from guidance_nb.denoisers import EMBEDDINGS, Denoiser, Prediction, target_coefficients, to_prediction
from guidance_nb.interop._networks import Scheduler
from guidance_nb.interop.schedulers import path_from_scheduler
from guidance_nb.paths import Path, expand_time

with extra("diffusers"):
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

__all__ = ["DiffusersGuider"]


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


class CachedPairDenoiser(Denoiser):
    "A pair of predictions at one point as a denoiser: answers there and nowhere else."

    def __init__(
        self,
        path: Path,  # The path of the model that made the pair
    ):
        super().__init__(path, EMBEDDINGS)

    def load(self, x: Tensor, t: Tensor, conditional: Prediction, unconditional: Prediction) -> Tensor:
        "Keep a pair at (x, t), and return the condition to ask with."
        self.point, self.cached = (x, t), (conditional, unconditional)
        self.condition = torch.zeros(len(x), 1, device=x.device)
        return self.condition

    def forward(self, x: Tensor, t: Tensor, c: Condition | None = None) -> Prediction:
        "One of the two, or a `ValueError`."
        here = _same(x, self.point[0]) and _same(torch.as_tensor(t), self.point[1])
        if not here or not (c is None or (isinstance(c, Tensor) and _same(c, self.condition))):
            what = "condition" if here else "point"
            raise ValueError(f"guidance asks for another {what}; allowed in a pipeline: methods that need one pair")
        return self.cached[0 if c is not None else 1]


class DiffusersGuider(BaseGuidance):
    "Guidance of this package as a guider of diffusers, for methods that need the pair at one point alone."

    _input_predictions: list[str] = ["pred_cond", "pred_uncond"]  # type: ignore[assignment]  # noqa: RUF012

    def __init__(
        self,
        method: Callable[[Denoiser], Denoiser],  # Such as `lambda model: ClassifierFreeGuidance(model, 3.0)`
        scheduler: Scheduler,  # The pipeline's scheduler
    ):
        super().__init__()
        self.register_to_config(start=0.0, stop=1.0, enabled=True)
        self.method, self.facts = method, path_from_scheduler(scheduler)
        require(self.facts.clock, "scheduler", type(scheduler).__name__, "any but those of EDM, in a guider")
        self.cache = CachedPairDenoiser(self.facts.path)
        self.guided: Denoiser | None = None

    def prepare_models(self, denoiser: nn.Module) -> None:
        "Watch what enters the network: methods that act on clean data need the noisy data."
        super().prepare_models(denoiser)

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Tensor]) -> None:
            self.seen = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]

        self.hook = denoiser.register_forward_pre_hook(look, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        "Stop watching."
        self.hook.remove()

    def prepare_inputs(self, data: dict[str, tuple[Tensor, Tensor]]) -> list[object]:
        "The inputs of each evaluation, conditional first; only that one if the guider is disabled."
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, i, name) for i, name in enumerate(names)]

    def prepare_inputs_from_block_state(
        self, data: Any, input_fields: dict[str, str | tuple[str, str]]
    ) -> list[object]:
        "The same from the state of a modular pipeline."
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in enumerate(names)]

    @property
    def num_conditions(self) -> int:
        "Number of evaluations of a step."
        return 2 if self._enabled else 1

    @property
    def is_conditional(self) -> bool:
        "Whether the evaluation being prepared is the conditional one."
        return self._count_prepared == 1

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        "Decode two raw outputs, guide, and encode again; guidance is made afresh at the first step of a run."
        guided = pred_cond if pred_uncond is None else self._guide(pred_cond, pred_uncond)
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

    def _guide(self, pred_cond: Tensor, pred_uncond: Tensor) -> Tensor:
        if self._step == 0 or self.guided is None:
            self.guided = self.method(self.cache)
        facts, x = self.facts, self.seen.float()
        assert facts.clock is not None
        t = facts.clock.time(torch.as_tensor(self._timestep)).clamp(0, 1).cpu().reshape(())
        pair = (to_prediction(y.float(), x, t, facts.path, facts.prediction) for y in (pred_cond, pred_uncond))
        x0, eps = self.guided(x, t, self.cache.load(x, t, *pair))
        a, b = target_coefficients(facts.prediction, facts.path, t)
        return (expand_time(a, x0) * x0 + expand_time(b, eps) * eps).to(pred_cond.dtype)
