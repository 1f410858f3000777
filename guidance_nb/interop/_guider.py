"""Guidance of this package inside modular pipelines of diffusers."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor, nn

from guidance_nb._checks import require, require_that
from guidance_nb._conditions import Condition
from guidance_nb._extras import extra
from guidance_nb._modes import swapped
from guidance_nb.denoisers import EMBEDDINGS, Denoiser, Prediction, record_nfe, target_coefficients, to_prediction
from guidance_nb.interop._networks import Network, Pipeline, Scheduler
from guidance_nb.interop._schedulers import path_from_scheduler
from guidance_nb.paths import Path, expand_time

with extra("diffusers"):
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
    from diffusers.modular_pipelines.modular_pipeline import BlockState

_Layers: TypeAlias = dict[nn.Module, Callable[..., object]]  # Layers that compute something else, and what
_Request: TypeAlias = tuple[bool, frozenset[nn.Module]]  # Whether with the condition, and which layers are changed


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


class PipelineDenoiser(Denoiser):
    "What a pipeline has predicted at one point, as a denoiser: first it notes what guidance asks, then it answers."

    def __init__(self, path: Path, net: nn.Module | None = None):  # `net` for guidance that changes layers
        super().__init__(path, EMBEDDINGS)
        self.net, self.asked = net, dict[_Request, _Layers]()

    def load(self, x: Tensor, t: Tensor, known: Mapping[_Request, Prediction] | None = None) -> Tensor:
        "Go to (x, t), where `known` was predicted, None for nothing yet; returns the condition to ask with."
        self.point, self.known, self.asked, self.usual = (x, t), known, {}, self._layers({})
        self.condition = torch.zeros(len(x), 1, device=x.device)
        return self.condition

    def _layers(self, usual: _Layers) -> _Layers:
        own = {} if self.net is None else {m: vars(m)["forward"] for m in self.net.modules() if "forward" in vars(m)}
        return {module: forward for module, forward in own.items() if usual.get(module) is not forward}

    def forward(self, x: Tensor, t: Tensor, c: Condition | None = None) -> Prediction:
        "A note and zeros, or a prediction; a `ValueError` for what was not predicted."
        layers = self._layers(self.usual)
        request = c is not None, frozenset(layers)
        point = _same(x, self.point[0]) and _same(torch.as_tensor(t), self.point[1])
        condition = c is None or (isinstance(c, Tensor) and _same(c, self.condition))
        fine = {"point": point, "condition": condition, "pass": request in (self.known or [request])}
        other = next((what for what in fine if not fine[what]), None)
        require_that(not other, f"guidance asks for another {other}", "in a pipeline: methods that need one point")
        if self.known is not None:
            return self.known[request]
        self.asked[request] = layers
        return Prediction(torch.zeros_like(x), torch.zeros_like(x))


class _WeakNetwork(Denoiser):
    "The same model with another network in the place of its own."

    def __init__(self, model: Denoiser, net: nn.Module, weak: nn.Module):
        super().__init__(model.path, model.num_classes)
        self.model, self.forwards = model, {net: weak.forward}

    def forward(self, x: Tensor, t: Tensor, c: Condition | None = None) -> Prediction:
        "What the other network predicts."
        with swapped(self.forwards):
            return self.model(x, t, c)


class DiffusersGuider(BaseGuidance):
    "Guidance of this package as a guider of diffusers, for methods that evaluate the network at one point a step."

    _input_predictions: list[str] = ["pred_cond", "pred_uncond"]  # noqa: RUF012

    def __init__(
        self,
        method: Callable[..., Denoiser],  # A guidance class, or a function of a denoiser
        source: Pipeline | Scheduler,  # The modular pipeline, or its scheduler if no layers are changed
        **settings: object,  # Of the class: `scale`, `interval`, ...; `weak` may be a network of diffusers
    ):
        super().__init__()
        self.register_to_config(start=0.0, stop=1.0, enabled=True)
        scheduler = getattr(source, "scheduler", source)
        self.facts = path_from_scheduler(scheduler, numbered=True)
        net: Network = getattr(source, "unet", None) or getattr(source, "transformer", None)
        self.model = PipelineDenoiser(self.facts.path, net)
        weak = settings.get("weak")
        if isinstance(weak, nn.Module) and not isinstance(weak, Denoiser):
            require(net is not None, "source", type(source).__name__, "a pipeline, beside a weak network")
            settings["weak"] = _WeakNetwork(self.model, net, weak)
        self.method = partial(method, **settings)
        self.guided = self.method(self.model)  # a wrong setting raises its error here
        one = "one whose pair a network could predict; CFG++ is ClassifierFreeGuidance with cfgpp_scales"
        require(self.guided.consistent, "method", type(self.guided).__name__, one)
        self.plan, self.shape, self.active = dict[_Request, _Layers](), torch.Size((4, 64, 64)), ExitStack()

    def prepare_inputs(self, data: Mapping[str, Tensor | tuple[Tensor | None, ...] | None]) -> list[BlockState]:
        "The inputs of each evaluation that the method asks for at this step, and no others."
        pairs = [value for value in data.values() if isinstance(value, tuple)]
        parts = [part for value in data.values() for part in (value if isinstance(value, tuple) else (value,))]
        x = next(part for part in parts if isinstance(part, Tensor))
        self.plan, t = {(True, frozenset()): {}}, self._time()
        if self._enabled:
            probe = torch.zeros(len(x), *self.shape, device=x.device)
            self.method(self.model)(probe, t, self.model.load(probe, t))
            self.plan = self.model.asked or self.plan
        alone = all(conditional for conditional, _ in self.plan)
        given = any(value[1] is not None for value in pairs)
        require(alone or given, "negative prompt", None, "a text, for these blocks do not make the empty one")
        names = {(True, frozenset[nn.Module]()): "pred_cond", (False, frozenset[nn.Module]()): "pred_uncond"}
        return [
            self._prepare_batch(data, 1 - request[0], names.get(request, f"pred_{i}"))
            for i, request in enumerate(self.plan)
        ]

    def prepare_inputs_from_block_state(
        self, data: BlockState, input_fields: Mapping[str, str | tuple[str, ...]]
    ) -> list[BlockState]:
        "The same from the state of a modular pipeline."
        state, found = data.as_dict(), dict[str, Tensor | tuple[Tensor | None, ...] | None]()
        for key, names in input_fields.items():
            found[key] = state.get(names) if isinstance(names, str) else tuple(state.get(name) for name in names)
        return self.prepare_inputs(found)

    def prepare_models(self, denoiser: nn.Module) -> None:
        "Change layers where this evaluation wants it, and see what enters the network."
        super().prepare_models(denoiser)
        known = self.model.net is None or denoiser is self.model.net
        require(known, "network", type(denoiser).__name__, "the one of the guider's pipeline")
        layers = list(self.plan.values())[self._count_prepared - 1]

        def look(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
            self.seen = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]
            record_nfe(len(self.seen))

        changed, self.active = ExitStack(), ExitStack()
        changed.enter_context(swapped(layers))
        self.active.callback(denoiser.register_forward_pre_hook(look, with_kwargs=True).remove)
        end = denoiser.register_forward_hook(lambda *_: changed.close(), always_call=True)  # even if it fails
        self.active.callback(end.remove)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        "Stop watching."
        self.active.close()

    @property
    def num_conditions(self) -> int:
        "Number of conditions that a pipeline has to prepare."
        return 2 if self._enabled else 1

    @property
    def is_conditional(self) -> bool:
        "Whether the evaluation being prepared is a conditional one."
        return list(self.plan)[self._count_prepared - 1][0]

    def __call__(self, data: list[BlockState]) -> GuiderOutput:
        "Decode raw outputs, guide, and encode again; guidance is made afresh at the first step of a run."
        raw: list[Tensor] = [batch.as_dict()["noise_pred"] for batch in data]
        named = {getattr(batch, self._identifier_key): y for batch, y in zip(data, raw)}
        pred = self._guide(raw) if self._enabled else raw[0]
        return GuiderOutput(pred=pred, pred_cond=named.get("pred_cond", raw[0]), pred_uncond=named.get("pred_uncond"))

    def _guide(self, raw: list[Tensor]) -> Tensor:
        if self._step == 0:
            self.guided = self.method(self.model)
        facts, t, x = self.facts, self._time(), self.seen[:, : raw[0].shape[1]].float()  # without images to edit
        self.shape = x.shape[1:]
        pairs = (to_prediction(y.float(), x, t, facts.path, facts.prediction) for y in raw)
        x0, eps = self.guided(x, t, self.model.load(x, t, dict(zip(self.plan, pairs))))
        a, b = target_coefficients(facts.prediction, facts.path, t)
        return (expand_time(a, x0) * x0 + expand_time(b, eps) * eps).to(raw[0].dtype)

    def _time(self) -> Tensor:
        assert self.facts.clock is not None
        return self.facts.clock.time(torch.as_tensor(self._timestep)).clamp(0, 1).cpu().reshape(())
