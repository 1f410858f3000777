"""An optimiser step as a CUDA graph: recorded once, replayed with new data and new randomness, nothing launched."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from guidance_nb._conditions import Condition, map_condition

if TYPE_CHECKING:
    from guidance_nb.engine.run import Run

__all__: list[str] = []


class StepGraph:
    """A step of a run, and the memory that it reads and writes; nothing is computed when it is made."""

    def __init__(self, run: "Run", x: Tensor, c: Condition | None):
        device = run.device
        self.x = torch.empty_like(x, device=device)
        self.c = map_condition(lambda part: torch.empty_like(part, device=device), c)
        self.graph, self.generator = torch.cuda.CUDAGraph(), torch.Generator(device)
        self.graph.register_generator_state(self.generator)
        for group in run.optimizer.param_groups:
            group |= {"capturable": True, "lr": torch.tensor(float(group["lr"]), device=device)}
        if run.settings["ema_warmup"]:
            run.decay = torch.tensor(run.decay, device=device)
        run.stepper.zero_grad(set_to_none=True)  # so that gradients get their place inside the graph
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.value = run.forward_backward(self.x, self.c, 0, self.generator)
            run.update()

    def replay(self, x: Tensor, c: Condition | None, generator: torch.Generator) -> Tensor:
        """Do the step with these data and this randomness; its loss."""
        for kept, new in zip(_tensors(self.x, self.c), _tensors(x, c)):
            kept.copy_(new.pin_memory() if new.device.type == "cpu" else new, non_blocking=True)
        self.generator.manual_seed(generator.initial_seed())
        self.graph.replay()
        return self.value


def _tensors(x: Tensor, c: Condition | None) -> list[Tensor]:
    return [x, *(c.values() if isinstance(c, Mapping) else [] if c is None else [c])]
