"""A training step, or a call of a network, as a CUDA graph: recorded once, replayed with new data, nothing launched."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from guidance_nb._checks import require
from guidance_nb._conditions import Condition, map_condition
from guidance_nb._modes import swapped
from guidance_nb.denoisers import NetworkDenoiser

if TYPE_CHECKING:
    from guidance_nb.engine._run import Run


class _StepGraph:
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
        for kept, new in zip(_tensors_of(self.x, self.c), _tensors_of(x, c)):
            kept.copy_(new.pin_memory() if new.device.type == "cpu" else new, non_blocking=True)
        self.generator.manual_seed(generator.initial_seed())
        self.graph.replay()
        return self.value


def _tensors_of(x: Tensor, c: Condition | None) -> list[Tensor]:
    """All tensors of a batch."""
    return [x, *(c.values() if isinstance(c, Mapping) else [] if c is None else [c])]


class _CallGraph:
    """A call of a network without gradients, and the memory that it reads and writes."""

    def __init__(self, call: Callable[..., Tensor], inputs: tuple[Tensor, ...]):
        self.inputs, self.graph = [part.clone() for part in inputs], torch.cuda.CUDAGraph()
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # libraries choose their kernels and take their memory
                call(*self.inputs)
        torch.cuda.current_stream().wait_stream(aside)
        with torch.cuda.graph(self.graph):
            self.y = call(*self.inputs)

    def replay(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """The answer to these inputs."""
        for kept, new in zip(self.inputs, inputs):
            kept.copy_(new)
        self.graph.replay()
        return self.y.clone()


class _Recorded:
    """Calls of a network, recorded once for each shape of their inputs; those with gradients are made as ever."""

    def __init__(self, call: Callable[..., Tensor]):
        self.call, self.graphs = call, dict[tuple, _CallGraph]()

    def __call__(self, *inputs: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            return self.call(*inputs)
        key = (torch.is_autocast_enabled("cuda"), *((part.shape, part.dtype) for part in inputs))
        if key not in self.graphs:
            self.graphs[key] = _CallGraph(self.call, inputs)
        return self.graphs[key].replay(inputs)


@contextmanager
def recorded(model: nn.Module) -> Iterator[None]:
    """Let the networks of a model, in evaluation mode, replay CUDA graphs of themselves inside a `with` block."""
    nets = {part.net for part in model.modules() if isinstance(part, NetworkDenoiser)}
    there = all(p.is_cuda for p in model.parameters()) and not any(net._compiled_call_impl for net in nets)
    require(there, "cuda_graphs", True, "False on a CPU, or for a network compiled whole")
    with swapped({net: _Recorded(net.forward) for net in nets}):
        yield
