"""Where a run takes place: device, precision, other processes and sharding, found and done by Accelerate."""

import os
import platform
import warnings
from collections.abc import Callable
from itertools import chain
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from guidance_nb._checks import check_choice, explained, require
from guidance_nb._conditions import Condition
from guidance_nb._extras import extra
from guidance_nb.training import LossContext

if TYPE_CHECKING:
    from accelerate import Accelerator

    from guidance_nb.engine._run import Engine

Precision = Literal["fp32", "bf16", "fp16", "auto"]


def choose_precision(precision: Precision, device: torch.device) -> Precision:
    """Resolve `auto`: bf16 on GPUs and CPUs with units for it (AMX), fp32 elsewhere; warn where bf16 is emulated."""
    if device.type == "cpu":
        require(precision != "fp16", "precision", precision, "'auto', 'fp32', 'bf16' on a CPU")
        kinds = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        units, avx = (getattr(torch.cpu, kind, lambda: False)() for kind in kinds)
        emulated = not (units or avx) and platform.machine() in ("x86_64", "AMD64")
    else:
        units = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        emulated = device.type == "cuda" and not units
    if precision == "bf16" and emulated:
        warnings.warn("precision = 'bf16' is emulated on this processor, so 'fp32' is faster here", stacklevel=2)
    return precision if precision != "auto" else "bf16" if units else "fp32"


def _outer_lists(model: nn.Module) -> list[list[nn.Module]]:
    """The lists of a network that are in no other list, such as that of its blocks; only parts with weights."""
    lists = {name: part for name, part in model.named_modules() if isinstance(part, nn.ModuleList)}
    outer = [part for name, part in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    return [[part for part in parts if part is not None and list(part.parameters())] for parts in outer]


def compile_network(net: nn.Module) -> None:
    """Compile in place: the blocks of a network of equal ones, the first of which serves all; others as a whole.

    Something tiny is compiled before, so that a missing compiler is found now, and not within a training.
    """
    with explained("compile = True", "False, for torch.compile does not work here", Exception):
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(2))

    def equal(blocks: list[nn.Module]) -> bool:
        kinds = {(type(block), *(p.shape for p in block.parameters())) for block in blocks}
        return len(kinds) == 1 < len(blocks) and any(blocks[0].children())

    lists = _outer_lists(net)
    for part in chain(*lists) if lists and all(map(equal, lists)) else [net]:
        part.compile()


def open_accelerator(engine: "Engine") -> "Accelerator":
    """Find the device, the precision and the other processes, and set up how they share the work."""
    with extra("engine"):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState, PartialState
        from accelerate.tracking import get_available_trackers
        from accelerate.utils import DistributedDataParallelKwargs, GradientAccumulationPlugin

    launched = int(os.environ.get("WORLD_SIZE", "1"))
    cpu = engine.cpu or (launched > 1 and not torch.accelerator.is_available())
    state = PartialState(cpu=cpu)
    if state.num_processes != launched or (cpu and state.device.type != "cpu"):
        found = f"{state.num_processes} of {launched} processes (WORLD_SIZE) on {state.device}"
        raise RuntimeError(f"Accelerate has {found}; allowed: all of them, with the engine before other uses of it")
    precision = choose_precision(engine.precision, state.device).replace("fp32", "no")
    if AcceleratorState._shared_state and AcceleratorState().mixed_precision != precision:
        AcceleratorState._reset_state()  # a run after another may use another precision
    check_choice("tracker", engine.tracker, [*sorted(map(str, get_available_trackers())), None])
    accelerator = Accelerator(
        mixed_precision=precision, cpu=cpu, log_with=engine.tracker, project_dir=engine.folder,
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1, sync_with_dataloader=False),
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=engine.find_unused_parameters)],
    )  # fmt: skip
    _prepare_sharding(accelerator, engine)
    return accelerator


def _prepare_sharding(accelerator: "Accelerator", engine: "Engine") -> None:
    """Set FSDP2 up where it is asked for, with an error for what does not work with it."""
    with extra("engine"):
        from accelerate.state import PartialState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
    from torch.distributed.fsdp import MixedPrecisionPolicy

    state = accelerator.state
    wanted = os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" and accelerator.num_processes > 1
    if wanted and getattr(state, "fsdp_plugin", None) is None:  # on CPUs, and after a run in another precision
        PartialState._shared_state["distributed_type"] = state.distributed_type = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin()
    kind = accelerator.distributed_type.value
    if kind in ("DEEPSPEED", "MEGATRON_LM", "XLA") or (kind == "FSDP" and not accelerator.is_fsdp2):
        found = f"{kind}{' with fsdp_version = 1' if kind == 'FSDP' else ''}"
        raise RuntimeError(f"distributed_type = {found}; allowed: data parallelism, or FSDP with fsdp_version = 2")
    if accelerator.is_fsdp2:
        allowed = {"precision": "'fp32', 'bf16'", "channels_last": "False", "compile": "False"}
        wrong = accelerator.mixed_precision == "fp16", engine.channels_last, engine.compile
        for name, bad in zip(allowed, wrong):
            require(not bad, name, getattr(engine, name), f"{allowed[name]} with FSDP2")
        plugin = state.fsdp_plugin
        plugin.mixed_precision_policy, plugin.cpu_ram_efficient_loading = MixedPrecisionPolicy(), False


def full_tensor(x: Tensor) -> Tensor:
    """All of a tensor of which each process may hold a part; every process must ask."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """The part of a whole tensor that belongs here, if `like` is such a part."""
    if not (hasattr(like, "device_mesh") and hasattr(like, "placements")):
        return x
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(x.to(like.device, like.dtype), like.device_mesh, like.placements)


class LossModule(nn.Module):
    """A model and its loss as one module, for Accelerate: `forward(x0, c, context)` gives losses `[batch]`."""

    def __init__(self, model: nn.Module, loss: Callable[..., Tensor]):
        super().__init__()
        self.model, self.rule = model, (loss,)  # a tuple, so that networks inside a loss are not taken for ours
        self._no_split_modules = sorted({type(part).__name__ for part in chain(*_outer_lists(model))})  # FSDP

    def forward(self, x0: Tensor, c: Condition | None, context: LossContext) -> Tensor:
        """Per-sample losses `[batch]`."""
        return context.weigh(self.rule[0](self.model, x0, c, context))
