"""The loop of `fit` for long runs: kept, resumed bit for bit, on any device, in any precision, by many processes."""

import copy
import json
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from guidance_nb._checks import AtLeastZero, Count, Positive, Whole, checked, explained, require
from guidance_nb._conditions import Condition, map_condition, take_rows
from guidance_nb._files import Json, clean_remnants, digest, locked
from guidance_nb._processes import on_main
from guidance_nb._random import has_dropout, keyed_generator, keyed_global_rng
from guidance_nb.engine import _checkpoints as checkpoints
from guidance_nb.engine import _hardware as hardware
from guidance_nb.engine._graphs import _StepGraph, _tensors_of
from guidance_nb.engine._interrupts import stop_signals, stopped_by, uninterrupted
from guidance_nb.training import Data, FetchData, LossContext, State, batches, ema_decay, learning_rate, update_ema


@checked
@dataclass(frozen=True, kw_only=True)
class Engine:
    """Where a run is kept and how it is run: `fit(..., engine=Engine(folder="run"))`. Accelerate does the work.

    `metadata` is JSON-able, such as a recipe. What makes a run what it is (settings of `fit`, the loss, the data,
    metadata) must be the same when it is resumed; `may_change` names the keys that may differ, "a.b" for b inside a.
    """

    folder: str | os.PathLike | None = None  # Holds a folder `step-00001000` for each checkpoint; None keeps nothing
    save_every: Count = 1000  # Steps between two checkpoints; one is also written at the end
    keep: Count = 3  # Number of checkpoints to keep
    resume: bool = True  # Whether to go on from the newest; if not, the folder must hold none
    metadata: Json = field(default_factory=dict)  # Whatever describes the run
    may_change: tuple[str, ...] = ()  # Keys that may differ at a resume; the checkpoints record what did
    precision: hardware.Precision = "auto"  # "auto" is bf16 where the hardware multiplies it, else fp32
    gradient_accumulation_steps: Count = 1  # Passes per optimiser step; each sees an equal share of the batch
    compile: bool = False  # Whether to compile the network, or each of its equal blocks (`torch.compile`, in place)
    channels_last: bool = False  # Whether images and convolutions are kept channels last, as tensor cores prefer
    gradient_checkpointing: bool = False  # Whether blocks compute activations again (diffusers' alone)
    cuda_graphs: bool = False  # Whether a step is recorded once as a CUDA graph and replayed
    clip: Positive | None = None  # Largest norm of the gradient; None for no clipping
    warmup: Whole = 0  # Steps of linear warm-up of the learning rate
    hold: Whole = 0  # Steps at the full learning rate after it, before a cosine falls
    weight_decay: AtLeastZero = 0.0  # Decoupled weight decay
    tracker: str | None = None  # An Accelerate tracker, such as "tensorboard", that logs into the folder
    log_every: Count = 50  # Steps between two logs
    cpu: bool = False  # Whether to stay on the CPU although there is an accelerator
    find_unused_parameters: bool = False  # Whether some weights take no part in the loss; for several processes

    def __call__(
        self, model: nn.Module, loss: Callable, data: Data, settings: dict, progress: bool, description: str
    ) -> Generator[State, None, None]:
        """The loop of `fit`; `settings` are its other arguments."""
        with ExitStack() as held:
            run = Run(self, model, loss, data, settings, held)
            if run.step >= settings["steps"]:  # nothing is left to do
                yield run.state()
                return
            show = progress and run.accelerator.is_main_process
            bar = tqdm(total=settings["steps"], initial=run.step, desc=description, unit=" steps", disable=not show)
            with bar, closing(run.batches(data)) as source, stop_signals(), _save_on_interrupt(run), _memory_hint(run):
                for x, c in source:
                    with uninterrupted():
                        run.train_step(x, c)
                    bar.set_postfix_str(f"loss {run.shown:.4g}", refresh=False)
                    bar.update(1)
                    yield run.state()
                    with uninterrupted():
                        run.log()
                        if run.step % self.save_every == 0 or run.step == settings["steps"]:
                            run.save()


class _DeferredLoss:
    """The loss of a step; a GPU sends it on its way, and it is waited for when somebody asks."""

    def __init__(self, value: Tensor, step: int):
        self.value, self.step, self.sent = value.detach().to("cpu", non_blocking=value.is_cuda), step, None
        if value.is_cuda:
            self.sent = torch.cuda.Event()
            self.sent.record()

    def __float__(self) -> float:
        if self.sent is not None:
            self.sent.synchronize()
        return self.value.item()


class Run:
    """What a run holds between two steps, and what it can do."""

    def __init__(self, engine: Engine, model: nn.Module, loss: Callable, data: Data, settings: dict, held: ExitStack):
        self.engine, self.model, self.loss = engine, model, loss
        self.folder = None if engine.folder is None else Path(engine.folder)
        self.accelerator = hardware.open_accelerator(engine)
        self.device, self.world = self.accelerator.device, self.accelerator.num_processes
        self.sharded, self.scaler = self.accelerator.is_fsdp2, self.accelerator.scaler
        passes, size, steps = engine.gradient_accumulation_steps, settings["batch_size"], settings["steps"]
        shares = f"a multiple of {self.world} processes x {passes} passes"
        require(size % (self.world * passes) == 0, "batch_size", size, shares)
        rise = engine.warmup + engine.hold
        require(rise < steps, "warmup + hold", rise, f"below steps = {steps}")
        extra = {name: getattr(engine, name) for name in ("clip", "warmup", "hold", "weight_decay")}
        self.law = settings.get("times")
        settings = settings | ({"times": repr(self.law)} if self.law else {})
        self.settings = settings | extra | {"loss": _describe_loss(loss), "data": _describe_data(data, self.folder)}
        self.dropout = has_dropout(model)
        parts = [part for part in getattr(loss, "__dict__", {}).values() if isinstance(part, nn.Module)]
        for part in (model, *parts):
            part.to(self.device)
        if engine.channels_last:
            model.to(memory_format=torch.channels_last)
        if engine.gradient_checkpointing:
            _checkpoint_gradients(model)
        self.average = copy.deepcopy(model).requires_grad_(False).eval()
        lr, decay = settings["lr"], engine.weight_decay
        self.optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay, fused=True)
        self.module, self.stepper = self.accelerator.prepare(hardware.LossModule(model, loss), self.optimizer)
        self.weights: list[Tensor] = [*model.parameters()]
        self.kept: list[Tensor] = [*self.average.parameters()]
        self.step, self.saved = 0, 0  # steps done, and step of the newest checkpoint
        self.path: Path | None = None  # the newest checkpoint
        self.changes: list[dict] = []  # what differed at resumes
        self.whole = True  # False while weights, moments and average are not of one step
        self.value: _DeferredLoss | None = None  # loss of the last step
        self.shown = math.nan  # the newest loss that is known without waiting
        self.eager = 0  # steps in this call that were not replayed
        self.graph: _StepGraph | None = None
        self.decay: float | Tensor = 0.0  # of the average, at the coming step
        told = "False on a CPU, or with several processes, accumulated gradients, fp16, dropout, or a loss that changes"
        require(not engine.cuda_graphs or self.recordable, "cuda_graphs", True, told)
        if self.folder is not None:
            self.resume(held)
        if engine.compile:  # in place: names of weights and copies of the model stay plain
            for part in (model, self.average):  # the average, too, for some losses ask it at every step
                hardware.compile_network(getattr(part, "net", part))
        if engine.tracker is not None:
            self.accelerator.init_trackers("log")
        self.clock = (self.step, time.perf_counter())

    @property
    def recordable(self) -> bool:
        """Whether a step is the same work each time, in one pass of one GPU, and asks nothing of the CPU."""
        alone = self.world == self.engine.gradient_accumulation_steps == 1 and self.scaler is None
        return alone and self.device.type == "cuda" and not (self.dropout or getattr(self.loss, "changes", False))

    def state(self) -> State:
        """What the caller gets."""
        return State(self.step, self.value or math.nan, self.model, self.average)

    def batches(self, data: Data) -> Generator[tuple[Tensor, Condition | None], None, None]:
        """This process's share of the batches that are left."""
        size, share = self.settings["batch_size"], self.settings["batch_size"] // self.world
        first = self.accelerator.process_index * share
        rows = slice(first, first + share) if share < size else None
        return batches(data, size, self.settings["seed"], self.settings["steps"], self.step, rows)

    def to_device(self, x: Tensor) -> Tensor:
        """Data where the run takes place, images channels last if the engine says so."""
        if self.device.type == "cuda" and x.device.type == "cpu":
            x = x.pin_memory()  # from other memory the copy waits for the step before it, and the loop with it
        x = x.to(self.device, non_blocking=True)
        return x.to(memory_format=torch.channels_last) if self.engine.channels_last and x.ndim == 4 else x

    def train_step(self, x: Tensor, c: Condition | None) -> None:
        """One optimiser step: passes, clipping, AdamW, average."""
        if not self.model.training:
            self.model.train()
        self.set_rates()
        if self.engine.cuda_graphs and self.eager >= 3:
            value = self.replay(x, c)
        else:
            self.stepper.zero_grad(set_to_none=True)
            values = [self.forward_backward(x, c, n) for n in range(self.engine.gradient_accumulation_steps)]
            value = self.accelerator.reduce(torch.stack(values).mean(), reduction="mean")
        loss, last = _DeferredLoss(value, self.step), self.step + 1 == self.settings["steps"]
        self.shown = self.check(self.value if loss.sent is not None and not last else loss)  # a GPU one step late
        if not self.engine.cuda_graphs or self.eager < 3:
            self.whole = False
            self.update()
            self.eager += 1
        self.step, self.value, self.whole = self.step + 1, loss, True

    def set_rates(self) -> None:
        """Set learning rate and decay of the coming step; a recorded step reads them from the device."""
        s = self.settings
        rate = learning_rate(self.step, s["lr"], s["schedule"], s["steps"], self.engine.warmup, self.engine.hold)
        for group in self.optimizer.param_groups:
            group["lr"] = group["lr"].fill_(rate) if isinstance(group["lr"], Tensor) else rate
        decay = ema_decay(self.step, s["ema"], s["ema_warmup"])
        self.decay = self.decay.fill_(decay) if isinstance(self.decay, Tensor) else decay

    def forward_backward(
        self, x: Tensor, c: Condition | None, number: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Forward and backward for one pass's part of the batch; processes exchange gradients in the last pass."""
        passes, seed = self.engine.gradient_accumulation_steps, self.settings["seed"]
        process = self.accelerator.process_index
        size, rows, total = len(x) // passes, None, None
        if passes * self.world > 1:
            first = process * len(x) + number * size
            rows, total = slice(first, first + size), self.settings["batch_size"]
            own = slice(number * size, (number + 1) * size)
            x, c = x[own], take_rows(c, own)
        if generator is None:
            place = self.device if self.device.type == "cuda" else "cpu"
            generator = keyed_generator(seed, 0, self.step, device=place)
        step, steps = self.step, self.settings["steps"]
        context = LossContext(generator, step, steps, self.average, rows, total, self.model, self.law)
        alone = self.accelerator.no_sync(self.module) if number + 1 < passes else nullcontext()
        drawn = keyed_global_rng(self.device, seed, 4, self.step, process, number) if self.dropout else nullcontext()
        with alone, drawn:
            with self.accelerator.autocast() if self.sharded else nullcontext():  # else it has wrapped the module
                value = self.module(self.to_device(x), map_condition(self.to_device, c), context).mean()
            self.accelerator.backward(value if passes == 1 else value / passes)
        return value.detach()

    def update(self) -> None:
        """Clip the gradient, step, move the average; Accelerate clips where it has to scale or gather first."""
        if self.engine.clip is not None:
            asks = self.sharded or self.scaler is not None
            clip = self.accelerator.clip_grad_norm_ if asks else nn.utils.clip_grad_norm_
            clip(self.weights, self.engine.clip)
        self.stepper.step()
        weights = [hardware.full_tensor(p.detach()) for p in self.weights] if self.sharded else self.weights
        if isinstance(self.decay, Tensor):  # as a graph reads it
            with torch.no_grad():  # a few kernels for all weights together
                ahead = torch._foreach_sub(weights, self.kept)
                torch._foreach_mul_(ahead, 1 - self.decay)
                torch._foreach_add_(self.kept, ahead)
        else:
            update_ema(self.kept, weights, self.decay)
        for kept, new in zip(self.average.buffers(), self.model.buffers()):
            kept.copy_(new)

    def replay(self, x: Tensor, c: Condition | None) -> Tensor:
        """The step as a CUDA graph, recorded if it is the first."""
        self.graph = self.graph or _StepGraph(self, x, c)
        self.whole = False
        return self.graph.replay(x, c, keyed_generator(self.settings["seed"], 0, self.step))

    def check(self, loss: _DeferredLoss | None) -> float:
        """The loss; an error if it is not finite."""
        if loss is None:
            return math.nan
        if not math.isfinite(value := float(loss)):
            good = f"; last good checkpoint: {self.path}" if self.path else ""
            hint = f"lower lr = {self.settings['lr']} or check the data{good}"
            raise FloatingPointError(f"loss = {value} at step {loss.step}; {hint}")
        return value

    def log(self) -> None:
        """Tell the tracker, if it is time."""
        if self.engine.tracker is not None and self.step % self.engine.log_every == 0:
            (since, then), now = self.clock, time.perf_counter()
            speed = (self.step - since) * self.settings["batch_size"] / (now - then)
            rate = self.optimizer.param_groups[0]["lr"]
            values = {"loss": float(self.value or math.nan), "lr": float(rate), "samples per second": speed}
            self.accelerator.log(values, step=self.step)
            self.clock = (self.step, now)

    def save(self, together: bool = True) -> None:
        """Write a checkpoint of this step and remove old ones; `together` all processes share the writer's errors."""
        if self.folder is None or self.step == self.saved or (self.sharded and not together):
            return  # what is divided can only be gathered together
        import guidance_nb

        loss, folder, main = self.check(self.value), self.folder, self.accelerator.is_main_process
        record = {
            "step": self.step, "loss": loss, "settings": self.settings, "metadata": self.engine.metadata,
            "changes": self.changes, "loss_state": _loss_state(self.loss),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "versions": {"guidance_nb": guidance_nb.__version__, "torch": torch.__version__,
                         "python": platform.python_version()},
            "hardware": {"device": str(self.device), "processes": self.world, "precision": self.engine.precision},
        }  # fmt: skip
        named = {name: self.optimizer.state.get(p, {}) for name, p in self.model.named_parameters()}
        moments = {f"{key}/{name}": value.contiguous() for name, state in named.items() for key, value in state.items()}
        model: nn.Module | dict = self.model
        if self.sharded:  # all processes give, the main one keeps
            whole = [
                {k: hardware.full_tensor(v) for k, v in part.items()} for part in (self.model.state_dict(), moments)
            ]
            model, moments = ({k: v.cpu().clone() for k, v in part.items()} if main else {} for part in whole)

        def write() -> Path:
            path = checkpoints._write_checkpoint(folder, record, (model, self.average, moments))
            checkpoints._prune_checkpoints(path, self.engine.keep)
            return path

        if together:
            self.path = on_main(write, self.accelerator.process_index, self.world)
        elif main:
            self.path = write()
        self.saved = self.step

    def resume(self, held: ExitStack) -> None:
        """Take the folder, and put the run where its newest intact checkpoint left it, if there is one."""
        folder, engine = Path(self.engine.folder or ""), self.engine

        def find() -> checkpoints.Checkpoint | None:
            json.dumps([engine.metadata, _loss_state(self.loss)])  # what is no JSON fails now, not at a checkpoint
            folder.mkdir(parents=True, exist_ok=True)
            with explained(f"folder = {folder}", "another folder, for a run is at work in it", BlockingIOError):
                held.enter_context(locked(folder / ".lock", wait=False))
            clean_remnants(folder, "step-*")
            if not (paths := checkpoints.checkpoints_in(folder)):
                return None
            require(engine.resume, "folder", f"{folder} with {paths[0].name}", "an empty folder with resume=False")
            return checkpoints.read_checkpoint(folder)

        found = on_main(find, self.accelerator.process_index, self.world)
        if found is None:
            return
        changes = checkpoints._find_changes(found, self.settings, engine.metadata, engine.may_change)
        self.changes = found.record["changes"] + changes
        checkpoints.load_weights(self.model, found.model, f"{found.path}/model.safetensors")
        checkpoints.load_weights(self.average, found.ema, f"{found.path}/ema.safetensors")
        weights = dict(self.model.named_parameters())
        for key, value in found.optimizer.items():  # laid out in memory as the weights are
            kind, name = key.split("/", 1)
            p = weights[name]
            fresh = torch.zeros((), device=p.device) if kind == "step" else torch.zeros_like(p)
            self.optimizer.state[p][kind] = fresh.detach().copy_(hardware.shard_like(value, fresh))
        if hasattr(self.loss, "load_state_dict"):
            self.loss.load_state_dict(found.record["loss_state"])
        if self.scaler is not None and found.record["scaler"]:
            self.scaler.load_state_dict(found.record["scaler"])
        self.step, self.saved, self.path = found.step, found.step, found.path
        self.value = _DeferredLoss(torch.tensor(found.record["loss"], dtype=torch.float64), found.step - 1)


def _loss_state(loss: Callable) -> object:
    """What a loss keeps between steps, if it has a `state_dict`."""
    return loss.state_dict() if hasattr(loss, "state_dict") else None


def _describe_loss(loss: Callable) -> Json:
    """Name and plain settings of a loss, for the comparison at a resume."""
    plain = {k: v for k, v in getattr(loss, "__dict__", {}).items() if isinstance(v, bool | int | float | str | tuple)}
    name = getattr(loss, "__qualname__", type(loss).__qualname__)
    return json.loads(json.dumps({"name": name, **plain}, default=repr))


def _describe_data(data: Data, folder: Path | None) -> Json:
    """Size and digest of data, for the comparison at a resume; fetched data gives its own, if it has a `digest()`."""
    if isinstance(data, FetchData):
        identity = data.digest() if folder is not None and hasattr(data, "digest") else None
        return {"size": len(data), "digest": identity}
    if callable(data):
        return {"size": None, "digest": None}
    return {"size": [*data[0].shape], "digest": None if folder is None else digest(*_tensors_of(*data))[:16]}


def _checkpoint_gradients(model: nn.Module) -> None:
    """Let blocks keep their inputs alone and compute the rest again in the backward pass."""
    known = [getattr(part, "enable_gradient_checkpointing", None) for part in model.modules()]
    require(any(known), "gradient_checkpointing", True, "False for this network, which is none of diffusers")
    for enable in filter(None, known):
        enable()


@contextmanager
def _save_on_interrupt(run: Run) -> Iterator[None]:
    """Keep what is done when the caller stops or a signal comes, unless weights and average were caught apart."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        if run.whole:
            run.save(together=False)
            if run.path and (signal := stopped_by()) and run.accelerator.is_main_process:
                tqdm.write(f"stopped by {signal} after step {run.step}; checkpoint: {run.path}", file=sys.stderr)
        raise
    finally:
        for tracker in getattr(run.accelerator, "trackers", []):
            tracker.finish()


@contextmanager
def _memory_hint(run: Run) -> Iterator[None]:
    """Say in one line which options to change when memory runs out; still a `torch.OutOfMemoryError`."""
    try:
        yield
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in reason:
            raise
        engine, batch = run.engine, run.settings["batch_size"]
        precision, passes = hardware.choose_precision(engine.precision, run.device), engine.gradient_accumulation_steps
        knobs = [f"a smaller batch_size than {batch}", f"gradient_accumulation_steps = {2 * passes}"]
        knobs += ["precision = 'bf16'"] if precision == "fp32" else []
        knobs += [] if engine.gradient_checkpointing else ["gradient_checkpointing = True"]
        told = f"out of memory at step {run.step} with {batch // (run.world * passes)} samples at once in {precision}"
        knobs = [*knobs, "or more processes"]
        raise torch.OutOfMemoryError(f"{told} ({reason.rstrip('.')}); allowed: {', '.join(knobs)}") from None
