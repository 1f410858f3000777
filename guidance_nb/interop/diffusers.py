"""Any diffusers model, torchcfm network or plain function as a denoiser, our guidance inside diffusers pipelines, and models as folders for the Hub."""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from guidance_nb.denoisers import (
    EMBEDDINGS,
    Denoiser,
    NetworkDenoiser,
    Prediction,
    check_inputs,
    record_nfe,
    target_coefficients,
    to_prediction,
)
from guidance_nb.networks import build_network
from guidance_nb.paths import EDMPath, FlowPath, Path, VPPath, expand_time


@lru_cache(maxsize=32)
def _nodes(angles: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    heights = torch.tensor((0.0, *angles), dtype=dtype)
    rises = heights.diff()
    slopes = torch.cat([rises[:1], (rises[:-1] * rises[1:]).sqrt(), rises[-1:]])
    return heights.to(device), rises.to(device), slopes.to(device)


def _wide(t: Tensor) -> Tensor:
    return t.to(torch.float32 if t.device.type == "mps" else torch.float64)


def spline_angle(
    angles: tuple[float, ...],  # Angles at times 1 / N, 2 / N, ..., 1
    t: Tensor,  # Time, any shape
) -> tuple[Tensor, Tensor]:  # Angle and its time derivative, in double precision
    "The rational quadratic spline through the origin and a table of angles, eq. (2)."
    steps, position = len(angles), _wide(t) * len(angles)
    heights, rises, slopes = _nodes(angles, position.device, position.dtype)
    k = position.floor().clamp(0, steps - 1).long()
    xi, s, d, e = position - k, rises[k], slopes[k], slopes[k + 1]
    both = xi * (1 - xi)
    below = s + (d + e - 2 * s) * both
    value = heights[k] + s * (s * xi**2 + d * both) / below
    return value, steps * s**2 * (e * xi**2 + 2 * s * both + d * (1 - xi) ** 2) / below**2


def spline_time(
    angles: tuple[float, ...],  # Angles at times 1 / N, 2 / N, ..., 1
    angle: Tensor,  # Angles to look up, any shape, in double precision
) -> Tensor:  # Times; above 1 where an angle exceeds the table
    "The inverse of `spline_angle`: the root of a quadratic within a step, a line beyond the last."
    heights, rises, slopes = _nodes(angles, angle.device, angle.dtype)
    k = (torch.searchsorted(heights, angle, right=True) - 1).clamp(0, len(angles) - 1)
    rest, s, d, e = angle - heights[k], rises[k], slopes[k], slopes[k + 1]
    a, b, c = s * (s - d) + rest * (d + e - 2 * s), s * d - rest * (d + e - 2 * s), -s * rest
    within = 2 * c / (-b - (b**2 - 4 * a * c).clamp(min=0).sqrt())
    position = k + torch.where(angle > heights[-1], 1 + (angle - heights[-1]) / slopes[-1], within.clamp(max=1))
    time = position / len(angles)
    return torch.where(time < 1 + 1e-6, time.clamp(max=1), time)


@dataclass(frozen=True)
class TablePath(Path):
    "The variance-preserving path through the noise levels of a discrete schedule, eqs. (1) and (2)."

    angles: tuple[float, ...]  # arctan of the noise-to-signal ratio at times 1 / N, 2 / N, ..., 1

    def __post_init__(self) -> None:
        rising = all(a < b for a, b in zip((0.0, *self.angles), self.angles))
        if len(self.angles) < 2 or not rising or not self.angles[-1] <= math.pi / 2:
            raise ValueError(f"angles ({len(self.angles)} of them); allowed: rising, from above 0 to at most pi / 2")

    def __repr__(self) -> str:
        ends = f"{math.tan(self.angles[0]):.3g} to {math.tan(self.angles[-1]):.3g}"
        return f"TablePath({len(self.angles)} steps, noise-to-signal {ends})"

    def alpha(self, t: Tensor) -> Tensor:
        return spline_angle(self.angles, t)[0].cos().to(t.dtype)

    def sigma(self, t: Tensor) -> Tensor:
        return spline_angle(self.angles, t)[0].sin().to(t.dtype)

    def d_alpha(self, t: Tensor) -> Tensor:
        angle, slope = spline_angle(self.angles, t)
        return (-angle.sin() * slope).to(t.dtype)

    def d_sigma(self, t: Tensor) -> Tensor:
        angle, slope = spline_angle(self.angles, t)
        return (angle.cos() * slope).to(t.dtype)

    def time_at(self, noise_to_signal: Tensor) -> Tensor:
        return spline_time(self.angles, _wide(noise_to_signal).atan()).to(noise_to_signal.dtype)


@dataclass(frozen=True)
class Clock:
    "What a network is told of time: scale t - offset, not below 0."

    scale: float  # Number of training steps
    offset: float = 0.0  # 1 where timestep 0 is the first noisy level
    nearest: bool = False  # Whether to tell whole timesteps only

    def __call__(self, t: Tensor) -> Tensor:
        "Timesteps of times `t`, float32."
        told = (self.scale * _wide(t) - self.offset).clamp(min=0)
        return (told.round() if self.nearest else told).float()

    def time(self, timestep: Tensor) -> Tensor:
        "The inverse: times of timesteps, in double precision."
        return (_wide(timestep) + self.offset) / self.scale


class SchedulerFacts(NamedTuple):
    "What a scheduler's configuration says of the model it belongs to."

    path: Path  # The path the network was trained on
    prediction: str  # What the network predicts, one of `PREDICTIONS`
    clock: Clock | None  # What it is told of time; None for EDM's own
    sigma_data: float = 0.5  # Standard deviation of the data, used by `edm` alone
    sign: float = 1.0  # Sign of the output; -1 for EDM networks of type `v_prediction`


SCHEDULER_PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}


def path_from_scheduler(
    scheduler: Any,  # A scheduler of diffusers
    nearest: bool = False,  # Whether the network is told whole timesteps only
) -> SchedulerFacts:  # Path, prediction and clock
    "Read path, prediction and clock from a scheduler's configuration, eq. (1); raises `ValueError` for any other."
    name, config = type(scheduler).__name__, dict(getattr(scheduler, "config", {}))
    kind, steps = config.get("prediction_type"), config.get("num_train_timesteps", 1000)

    def known(*names: str) -> None:
        if kind not in names:
            allowed = ", ".join(map(repr, names))
            raise ValueError(f"prediction_type = {kind!r} of {name}; allowed: {allowed}")

    if name.startswith("EDM"):
        known("epsilon", "v_prediction")
        sign = 1.0 if kind == "epsilon" else -1.0
        return SchedulerFacts(EDMPath(config["sigma_max"]), "edm", None, config["sigma_data"], sign)
    if (name.startswith("FlowMatch") and not config.get("invert_sigmas")) or kind == "flow_prediction":
        return SchedulerFacts(FlowPath(), "velocity", Clock(steps, 0, nearest))
    table = getattr(scheduler, "alphas_cumprod", None)
    if table is None:
        allowed = "one with alphas_cumprod (DDPM, DDIM, PNDM, DPM-Solver, Euler, ...), FlowMatch... or EDM..."
        raise ValueError(f"scheduler is {name}; allowed: {allowed}")
    known(*SCHEDULER_PREDICTIONS)
    angles = torch.atan2((1 - table.double()).sqrt(), table.double().sqrt())
    clock = Clock(len(angles), 1, nearest)
    return SchedulerFacts(TablePath(tuple(angles.tolist())), SCHEDULER_PREDICTIONS[str(kind)], clock)


def scheduler_times(
    scheduler: Any,  # A scheduler of diffusers; left as it is
    steps: int,  # Number of steps
    **options: Any,  # Further arguments of its `set_timesteps`, such as `mu`
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


@dataclass(frozen=True)
class Packing:
    "Names and shapes of the tensors that make up one condition `[batch, length]`."

    parts: tuple[tuple[str, tuple[int, ...]], ...]  # Name, and shape without the batch, of each part

    def unpack(self, c: Tensor) -> dict[str, Tensor]:
        "The parts of packed conditions `[batch, length]`, by name."
        sizes = [math.prod(shape) for _, shape in self.parts]
        if c.ndim != 2 or c.shape[1] != sum(sizes):
            raise ValueError(f"c has shape {tuple(c.shape)}; allowed: packed conditions [batch, {sum(sizes)}]")
        return {name: part.unflatten(1, shape) for (name, shape), part in zip(self.parts, c.split(sizes, 1))}


def pack_conditions(
    **parts: Tensor,  # Tensors `[batch, ...]` by the name the network gives them
) -> tuple[Tensor, Packing]:  # One tensor `[batch, length]` in single precision, and how to unpack it
    "Put several conditions of a network into one tensor with the batch in front."
    lengths = {name: len(part) for name, part in parts.items()}
    if not parts or len(set(lengths.values())) > 1:
        raise ValueError(f"parts have lengths {lengths}; allowed: one or more parts of one length")
    shapes = tuple((name, tuple(part.shape[1:])) for name, part in parts.items())
    return torch.cat([part.flatten(1).float() for part in parts.values()], 1), Packing(shapes)


LABELLED = ("UNet2DModel", "DiTTransformer2DModel")  # conditions are class indices
TEXT_NETWORKS = {
    "UNet2DConditionModel": ("encoder_hidden_states",),
    "SD3Transformer2DModel": ("encoder_hidden_states", "pooled_projections"),
    "FluxTransformer2DModel": ("encoder_hidden_states", "pooled_projections"),
}


def network_family(
    net: Any,  # A network of diffusers, or one wrapped by peft
) -> str:  # A name in `LABELLED` or `TEXT_NETWORKS`
    "The class whose calling convention a network follows; a `ValueError` for any other."
    plain = net.get_base_model() if hasattr(net, "get_base_model") else net
    names = [kind.__name__ for kind in type(plain).__mro__]
    for family in (*LABELLED, *TEXT_NETWORKS):
        if family in names:
            return family
    raise ValueError(f"net is {names[0]}; allowed: {', '.join((*LABELLED, *TEXT_NETWORKS))}, or `from_callable`")


def condition_names(
    net: Any,  # A network of diffusers
) -> tuple[str, ...]:  # Names of its conditions; more than one must be packed
    "The tensors a network is conditioned on."
    family = network_family(net)
    if family in LABELLED:
        return ("class_labels",)
    sized = family == "UNet2DConditionModel" and net.config.addition_embed_type == "text_time"
    return (*TEXT_NETWORKS[family], *(("text_embeds", "time_ids") if sized else ()))


def check_packing(
    net: Any,  # A network of diffusers
    packing: Packing | None,  # How its conditions are packed
) -> None:
    "Refuse a packing that lacks, or adds to, what the network is conditioned on."
    names = condition_names(net)
    found = names[:1] if packing is None else tuple(name for name, _ in packing.parts)
    if set(found) != set(names):
        raise ValueError(f"packing of {', '.join(found)}; allowed: `pack_conditions` of {', '.join(names)}")


def latent_channels(
    net: Any,  # A network of diffusers
) -> int:  # Channels of the data
    "Channels of the noisy data a network takes."
    patch = 4 if network_family(net) == "FluxTransformer2DModel" else 1
    return net.config.in_channels // patch


def to_patches(
    x: Tensor,  # Latents, `[batch, channels, height, width]`
) -> tuple[Tensor, Tensor]:  # Tokens `[batch, patches, 4 channels]`, positions `[patches, 3]`
    "Latents as the row of 2 x 2 patches that Flux sees."
    b, channels, height, width = x.shape
    if height % 2 or width % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: even height and width, for patches of 2 x 2")
    tokens = x.reshape(b, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    rows, columns = torch.meshgrid(torch.arange(height // 2), torch.arange(width // 2), indexing="ij")
    positions = torch.stack([torch.zeros_like(rows), rows, columns], -1).flatten(0, 1).to(x)
    return tokens.reshape(b, -1, 4 * channels), positions


def from_patches(
    tokens: Tensor,  # `[batch, patches, 4 channels]`
    shape: torch.Size,  # Shape of the latents
) -> Tensor:  # Latents, `[batch, channels, height, width]`
    "The inverse of `to_patches`."
    b, channels, height, width = shape
    grid = tokens.reshape(b, height // 2, width // 2, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return grid.reshape(shape)


def call_network(
    net: Any,  # A network of diffusers
    x: Tensor,  # Noisy data as the network sees it, `[batch, channels, height, width]`
    time: Tensor,  # What it is told of time, `[batch]`
    parts: dict[str, Tensor],  # Conditions by name
    guidance: Tensor | None = None,  # Embedded guidance scale `[batch]`, for networks that take one
) -> Tensor:  # Prediction of the clean data, noise or velocity, shape of `x`
    "One evaluation of a diffusers network in the calling convention of its family."
    family, like, keep = network_family(net), next(net.parameters()), ("time_ids", "class_labels")
    given: dict[str, Any] = {k: part if k in keep else part.to(like.dtype) for k, part in parts.items()}
    data = x.to(like.dtype)
    if family == "FluxTransformer2DModel":
        data, positions = to_patches(data)
        text = positions.new_zeros(given["encoder_hidden_states"].shape[1], 3)
        more = {"img_ids": positions, "txt_ids": text, "guidance": guidance}
        y = net(data, timestep=time / 1000, **given, **more, return_dict=False)[0]
        return from_patches(y, x.shape).to(x.dtype)
    if family == "UNet2DConditionModel":
        added = {name: given.pop(name) for name in list(given) if name != "encoder_hidden_states"}
        given |= {"added_cond_kwargs": added} if added else {}
    y = net(data, timestep=time, **given, return_dict=False)[0]
    return y[:, : x.shape[1]].to(x.dtype)  # a learned variance, in further channels, is left alone


def find_null(
    net: Any,  # A network of diffusers
    null: int | Tensor | None,  # What the user gave
) -> tuple[int, Tensor | None]:  # Number of classes or `EMBEDDINGS`, and the null condition `[1, ...]`
    "How many classes a network has, and what stands for none of them."
    family = network_family(net)
    if family in TEXT_NETWORKS:
        if null is not None and not (isinstance(null, Tensor) and null.is_floating_point() and len(null) == 1):
            found = tuple(null.shape) if isinstance(null, Tensor) else null
            raise ValueError(f"null = {found}; allowed: the condition [1, ...] of an empty prompt, or None")
        return EMBEDDINGS, null
    if family == "DiTTransformer2DModel":
        label = net.config.num_embeds_ada_norm
        for module in net.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0
        return label, torch.tensor([label])
    rows = net.config.num_class_embeds or 0
    if null is not None and null != rows - 1:
        raise ValueError(f"null = {null}; allowed: None, or the last of the network's {rows} labels")
    return rows - (null is not None), None if null is None else torch.tensor([int(null)])


def fill_null(
    null: Tensor | None,  # The null condition, `[1, ...]`
    x: Tensor,  # Noisy data, `[batch, ...]`
    c: Tensor | None,  # Conditions `[batch, ...]`, or None
    drop: Tensor | None,  # Rows `[batch]` to evaluate without their condition
) -> Tensor:  # The condition of every row
    "Put the null condition where there is none."
    if c is not None and (drop is None or (null is None and not drop.any())):
        return c
    if null is None:
        raise ValueError("null is None; allowed: a null condition, given when the denoiser was made, to do without c")
    rows = null.to(x.device).expand(len(x), *null.shape[1:])
    if c is None or drop is None:
        return rows
    if c.shape[1:] != null.shape[1:]:
        allowed = f"[batch, ...] as the null condition {tuple(null.shape)}"
        raise ValueError(f"c has shape {tuple(c.shape)}; allowed: {allowed}")
    return torch.where(drop.reshape(-1, *[1] * (c.ndim - 1)), rows.to(c.dtype), c)


def evaluate(
    model: Any,  # A DiffusersDenoiser
    x: Tensor,  # Noisy data, `[batch, channels, height, width]`
    t: Tensor,  # Time, scalar or `[batch]`
    c: Tensor | None,  # The condition of every row
    guidance: float | Tensor | None,  # Embedded guidance scale, one for all or `[batch]`
) -> Tensor:  # Raw network output, shape of `x`
    "Tell the network what it needs to know, and count its rows."
    channels, clock = latent_channels(model.net), model.facts.clock
    if x.ndim != 4 or x.shape[1] != channels:
        raise ValueError(f"x has shape {tuple(x.shape)}; allowed: [batch, {channels}, height, width]")
    parts: dict[str, Tensor] = {}
    if c is not None:
        parts = {condition_names(model.net)[0]: c} if model.packing is None else model.packing.unpack(c)
    if clock is None:
        data, time = model.network_inputs(x, t)
    else:
        data, time = x, clock(t).to(x.device).expand(len(x))
    if guidance is not None:
        guidance = torch.as_tensor(guidance, dtype=torch.float32, device=x.device).expand(len(x))
    record_nfe(len(x))
    return model.facts.sign * call_network(model.net, data, time, parts, guidance)


class DiffusersDenoiser(NetworkDenoiser):
    "A network of diffusers with the facts of its scheduler as a denoiser, for sampling, guidance and training."

    def __init__(
        self,
        net: Any,  # UNet2DModel, UNet2DConditionModel, DiT, SD3 or Flux transformer; peft adapters welcome
        scheduler: Any,  # Its scheduler, or SchedulerFacts
        null: int | Tensor | None = None,  # What stands for no condition: a label, or a condition `[1, ...]`
        packing: Packing | None = None,  # How conditions are packed, for networks that take several
        guidance: float | None = None,  # Fixed scale for a network with an embedded one; None makes it scale-aware
    ):
        check_packing(net, packing)
        facts = scheduler if isinstance(scheduler, SchedulerFacts) else path_from_scheduler(scheduler)
        (classes, null), embedded = find_null(net, null), bool(net.config.get("guidance_embeds"))
        aware = embedded and guidance is None
        super().__init__(net, facts.path, classes, facts.prediction, facts.sigma_data, aware, null)
        self.facts, self.packing, self.guidance = facts, packing, guidance if embedded else None

    def output(
        self, x: Tensor, t: Tensor | float, c: Tensor | None = None,
        drop: Tensor | None = None, scale: float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        "Raw network output, shape of `x`; arguments as in `TrainableDenoiser.output`."
        t = check_inputs(x, t, c, self.num_classes)
        filled = fill_null(self.null, x, c, drop) if self.num_classes else None
        if not self.scale_aware:
            return evaluate(self, x, t, filled, self.guidance)
        plain = torch.full((len(x),), c is None, device=x.device) if c is None or drop is None else drop
        asked = torch.as_tensor(1.0 if scale is None else scale, dtype=torch.float32, device=x.device)
        return evaluate(self, x, t, filled, asked.expand(len(x)).masked_fill(plain, 0.0))


def own_network(
    pipeline: Any,  # A pipeline of diffusers
) -> Any:  # Its U-Net or transformer
    "The network a pipeline denoises with."
    net = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", None)
    if net is None:
        raise ValueError(f"{type(pipeline).__name__} has no unet and no transformer; allowed: a pipeline with one")
    return net


def has_encoder(
    pipeline: Any,  # A pipeline of diffusers
) -> bool:
    "Whether a pipeline can encode prompts."
    return any(getattr(pipeline, name, None) is not None for name in ("text_encoder", "text_encoder_2"))


@torch.no_grad()
def encode_text(
    pipeline: Any,  # A pipeline with text encoders
    prompts: list[str],  # Prompts
    options: dict[str, Any],  # Further arguments of its `encode_prompt`
) -> tuple[Tensor, ...]:  # Text, and pooled text where there is one
    "Embeddings of prompts by `encode_prompt`, whose form differs from pipeline to pipeline."
    net = own_network(pipeline)
    family, device = network_family(net), next(net.parameters()).device
    if family == "FluxTransformer2DModel":
        return pipeline.encode_prompt(prompts, None, device, **options)[:2]
    if family == "SD3Transformer2DModel":
        return pipeline.encode_prompt(prompts, None, None, device, 1, False, **options)[::2]
    if len(condition_names(net)) > 1:  # SDXL
        return pipeline.encode_prompt(prompts, None, device, 1, False, **options)[::2]
    return pipeline.encode_prompt(prompts, device, 1, False, **options)[:1]


@dataclass
class PromptEncoder:
    "Prompts to conditions `[n, ...]`, by the text encoders of a pipeline."

    pipeline: Any  # Stable Diffusion, SDXL, SD3 or Flux
    edge: int  # Edge of the images in pixels, which SDXL is told
    options: dict[str, Any]  # Further arguments of the pipeline's `encode_prompt`

    def __call__(self, prompts: Sequence[str]) -> Tensor:
        "One condition a prompt."
        return self.pack(prompts)[0]

    def pack(self, prompts: Sequence[str], blank: bool = False) -> tuple[Tensor, Packing | None]:
        "Conditions and their packing; `blank` conditions are zeros where the pipeline wants it so."
        if not has_encoder(self.pipeline):
            raise ValueError(f"{type(self.pipeline).__name__} has no text encoder; allowed: conditions made elsewhere")
        names = condition_names(own_network(self.pipeline))
        text = encode_text(self.pipeline, list(prompts), self.options)
        if "time_ids" in names:
            sizes = torch.tensor([self.edge, self.edge, 0, 0, self.edge, self.edge]).to(text[0])
            text = (*text, sizes.float().expand(len(prompts), -1))
            if blank and self.pipeline.config.get("force_zeros_for_empty_prompt"):
                text = (torch.zeros_like(text[0]), torch.zeros_like(text[1]), text[2])
        return (text[0], None) if len(names) == 1 else pack_conditions(**dict(zip(names, text)))


def decode_latents(
    vae: Any,  # An AutoencoderKL, or None where the data are the images
    latents: Tensor,  # Latents as the network sees them, `[n, channels, height, width]`
) -> Tensor:  # Images, in [-1, 1] up to what the decoder exceeds
    "Images of latents: undo the pipeline's scaling, then decode."
    if vae is None:
        return latents
    config, like = vae.config, next(vae.parameters())
    mean, std = config.get("latents_mean"), config.get("latents_std")
    x = latents.to(like) / config.scaling_factor
    if mean is not None and std is not None:
        column = lambda values: torch.tensor(values).to(like).view(1, -1, 1, 1)  # noqa: E731
        x = x * column(std) + column(mean)
    elif config.get("shift_factor"):
        x = x + config.shift_factor
    with torch.no_grad():
        return vae.decode(x, return_dict=False)[0]


class PipelineParts(NamedTuple):
    "What `from_pipeline` takes from a pipeline."

    model: DiffusersDenoiser  # The network, with its path and its null condition
    encode: Callable  # `encode(prompts)` gives conditions `[n, ...]`; class names or indices for DiT
    decode: Callable  # `decode(latents)` gives images in [-1, 1]
    shape: tuple[int, ...]  # Shape of one latent


def encode_classes(
    pipeline: Any,  # A DiTPipeline
    classes: Sequence[int | str],  # Indices or names
) -> Tensor:  # `[n]`
    "Class indices by number or by name."
    known = getattr(pipeline, "labels", {})
    for name in classes:
        if isinstance(name, str) and name not in known:
            raise ValueError(f"class {name!r}; allowed: a class index, or one of {len(known)} names")
    return torch.tensor([known[name] if isinstance(name, str) else int(name) for name in classes])


def from_pipeline(
    pipeline: Any,  # A pipeline: DDPM, DiT, Stable Diffusion, SDXL, SD3 or Flux
    null: str | int | None = "",  # The null prompt (or the null label of a U-Net with classes); None for none
    size: int | None = None,  # Edge of the images in pixels; None for the pipeline's own
    guidance: float | None = None,  # Fixed embedded scale, for networks that take one
    **options: Any,  # Further arguments of the pipeline's `encode_prompt`, such as `max_sequence_length`
) -> PipelineParts:  # Denoiser, encode, decode, shape
    "A pipeline's network as a denoiser, with its encoders and its decoder."
    net, vae = own_network(pipeline), getattr(pipeline, "vae", None)
    factor = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    latent = net.config.get("sample_size") or getattr(pipeline, "default_sample_size", 128)
    edge = latent if size is None else size // factor
    shape, decode = (latent_channels(net), edge, edge), lambda latents: decode_latents(vae, latents)
    if network_family(net) in LABELLED:
        model = DiffusersDenoiser(net, pipeline.scheduler, null if isinstance(null, int) else None)
        return PipelineParts(model, lambda classes: encode_classes(pipeline, classes), decode, shape)
    encode = PromptEncoder(pipeline, edge * factor, options)
    condition: Tensor | None = None
    packing: Packing | None = None
    if has_encoder(pipeline) or len(condition_names(net)) > 1:
        condition, packing = encode.pack([str(null or "")], blank=not null)
    model = DiffusersDenoiser(net, pipeline.scheduler, None if null is None else condition, packing, guidance)
    return PipelineParts(model, encode, decode, shape)


class TorchCFMNet(nn.Module):
    "A network of torchcfm in this package's convention, eq. (3): `net(x, time, labels)`."

    def __init__(
        self,
        net: nn.Module,  # `net(t, x)`, or `net(t, x, y)` if conditional; data at t = 1, velocity towards it
        conditional: bool = False,  # Whether it takes labels
    ):
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
    return NetworkDenoiser(TorchCFMNet(net, num_classes > 0), path, num_classes, "velocity")


class CallableDenoiser(NetworkDenoiser):
    "A function of `(x, t, c)` as a denoiser; made by `from_callable`."

    def output(
        self,
        x: Tensor,  # Noisy data, `[batch, ...]`
        t: Tensor | float,  # Time, scalar or `[batch]`
        c: Tensor | None = None,  # Labels `[batch]`, embeddings `[batch, ...]`, or None
        drop: Tensor | None = None,  # Rows `[batch]` to evaluate without their condition
        scale: float | Tensor | None = None,  # Not used
    ) -> Tensor:
        "What the function returns, shape of `x`."
        times = check_inputs(x, t, c, self.num_classes).to(x.device, x.dtype).expand(len(x))
        record_nfe(len(x))
        if c is None or drop is None or not drop.any():
            return self.net(x, times, c)
        if drop.all():
            return self.net(x, times, None)
        rows, rest = (~drop).nonzero().squeeze(1), drop.nonzero().squeeze(1)
        parts = self.net(x[rows], times[rows], c[rows]), self.net(x[rest], times[rest], None)
        return torch.cat(parts)[torch.cat([rows, rest]).argsort()]


def from_callable(
    fn: Callable,  # `fn(x, t, c)` with times `[batch]`; `c` is None where there is no condition
    path: Path,  # The path it lives on
    prediction: str,  # What it returns, one of `PREDICTIONS`
    num_classes: int = 0,  # Number of classes, or `EMBEDDINGS`
) -> CallableDenoiser:  # For sampling and guidance; for training, too, if `fn` is a module
    "A plain function, or a module with that signature, as a denoiser."
    return CallableDenoiser(fn, path, num_classes, prediction)  # type: ignore[arg-type]


class Replay(Denoiser):
    "A pair of predictions at one point as a denoiser: answers there and nowhere else."

    def __init__(
        self,
        path: Path,  # The path of the model that made the pair
    ):
        super().__init__(path, EMBEDDINGS)

    def load(self, x: Tensor, t: Tensor, conditional: Prediction, unconditional: Prediction) -> Tensor:
        "Remember a pair at (x, t), and return the condition to ask with."
        self.point, self.pair = (x, t), (conditional, unconditional)
        self.condition = torch.zeros(len(x), 1, device=x.device)
        return self.condition

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        "One of the two, or a `ValueError`."
        same = lambda a, b: a is b or (a.shape == b.shape and torch.equal(a, b))  # noqa: E731
        here = same(x, self.point[0]) and same(torch.as_tensor(t), self.point[1])
        if not here or not (c is None or same(c, self.condition)):
            what = "condition" if here else "point"
            raise ValueError(f"guidance asks for another {what}; allowed in a pipeline: methods that need one pair")
        return self.pair[0 if c is not None else 1]


class PairGuider:
    "The parts of a guider of diffusers that do the work; `diffusers_guider` adds the base class."

    _input_predictions: list[str] = ["pred_cond", "pred_uncond"]  # noqa: RUF012

    def prepare_models(self, denoiser: nn.Module) -> None:
        "Watch what enters the network."
        super().prepare_models(denoiser)  # type: ignore[misc]

        def look(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self.seen = args[0] if args else kwargs["hidden_states" if "hidden_states" in kwargs else "sample"]

        self.hook = denoiser.register_forward_pre_hook(look, with_kwargs=True)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        "Stop watching."
        self.hook.remove()

    def prepare_inputs(self, data: Any) -> list[Any]:
        "The inputs of each evaluation, conditional first; only that one if the guider is disabled."
        names = self._input_predictions[: self.num_conditions]
        return [self._prepare_batch(data, i, name) for i, name in enumerate(names)]  # type: ignore[attr-defined]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: Any) -> list[Any]:
        "The same from the state of a modular pipeline."
        make, names = self._prepare_batch_from_block_state, self._input_predictions  # type: ignore[attr-defined]
        return [make(input_fields, data, i, name) for i, name in enumerate(names[: self.num_conditions])]

    @property
    def num_conditions(self) -> int:
        "Number of evaluations of a step."
        return 2 if self._enabled else 1  # type: ignore[attr-defined]

    @property
    def is_conditional(self) -> bool:
        "Whether the evaluation being prepared is the conditional one."
        return self._count_prepared == 1  # type: ignore[attr-defined]


def guide_raw(
    guider: Any,  # The guider
    pred_cond: Tensor,  # Raw conditional output, `[batch, ...]`
    pred_uncond: Tensor,  # Raw unconditional output
) -> Tensor:  # Raw guided output
    "Decode two raw outputs, guide, and encode again."
    facts, replay = guider.facts, guider.replay
    if guider._step == 0 or guider.guided is None:
        guider.guided = guider.method(replay)
    t = facts.clock.time(torch.as_tensor(guider._timestep)).clamp(0, 1).cpu().reshape(())
    x, outputs = guider.seen.float(), (pred_cond.float(), pred_uncond.float())
    pair = (to_prediction(y, x, t, facts.path, facts.prediction) for y in outputs)
    x0, eps = guider.guided.predict(x, t, replay.load(x, t, *pair))
    a, b = target_coefficients(facts.prediction, facts.path, t)
    return (expand_time(a, x0) * x0 + expand_time(b, eps) * eps).to(pred_cond.dtype)


def diffusers_guider(
    method: Callable[[Denoiser], Denoiser],  # Such as `lambda model: ClassifierFreeGuidance(model, 3.0)`
    scheduler: Any,  # The pipeline's scheduler
) -> Any:  # A guider, for `update_components(guider=...)`
    "Guidance of this package as a guider of diffusers, for methods that need the pair at one point alone."
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput

    facts = path_from_scheduler(scheduler)
    if facts.clock is None:
        raise ValueError(f"scheduler is {type(scheduler).__name__}; allowed in a guider: any but those of EDM")

    def forward(self: Any, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> Any:
        guided = pred_cond if pred_uncond is None else guide_raw(self, pred_cond, pred_uncond)
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)

    guider = type("DiffusersGuider", (PairGuider, BaseGuidance), {"forward": forward})()
    guider.register_to_config(start=0.0, stop=1.0, enabled=True)
    guider.method, guider.facts, guider.replay, guider.guided = method, facts, Replay(facts.path), None
    return guider


@dataclass(frozen=True)
class TrainingFacts:
    "What a model card says of a training run."

    method: str  # Name of the loss, such as "plain" or "model_guidance"
    steps: int  # Optimiser steps
    rows: int  # Training rows: samples seen, steps times batch size
    data: str = ""  # What was learned
    scale: float = 1.0  # Guidance scale to sample with; 1 where none is needed or it is built in
    guidance: str = "model"  # Expression that makes the guided model of `model`
    imports: str = ""  # An import that `guidance` needs
    sampler: str = "heun"  # Sampler
    sampler_steps: int = 32  # Its steps


PATH_KINDS: dict[str, Callable[..., Path]] = {kind.__name__: kind for kind in (FlowPath, VPPath, EDMPath, TablePath)}


def path_to_json(
    path: Path,  # One of `PATH_KINDS`
) -> dict[str, Any]:  # Its kind and settings
    "A path as plain values."
    if type(path).__name__ not in PATH_KINDS:
        raise ValueError(f"path is {type(path).__name__}; allowed: {', '.join(PATH_KINDS)}")
    return {"kind": type(path).__name__, **asdict(path)}


def path_from_json(
    values: dict[str, Any],  # Kind and settings
) -> Path:
    "The inverse of `path_to_json`."
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    kind = settings.pop("kind", None)
    if kind not in PATH_KINDS:
        raise ValueError(f"path kind = {kind!r}; allowed: {', '.join(PATH_KINDS)}")
    return PATH_KINDS[kind](**settings)


CARD = """---
library_name: guidance_nb
tags: [diffusion, guidance]
---
# {network} on images of shape {shape}

Trained with guidance_nb by **{method}** for {steps:,} optimiser steps on {rows:,} rows (samples seen){data}.
The network predicts `{prediction}` on {path}, with {num_classes} classes{null}.

**Scale.** One convention: e = e_u + scale (e_c - e_u), where 0 is unconditional and 1 is the conditional model,
no guidance. This model is meant to be sampled at scale {scale:g}{built_in}.

```python
import torch
from guidance_nb.interop.diffusers import HubDenoiser
from guidance_nb.samplers import sample
{imports}
model = HubDenoiser.from_pretrained("FOLDER OR HUB NAME")
guided = {guidance}
images = sample(guided, torch.arange(4) % {classes}, model.shape, "{sampler}", {sampler_steps})
```
"""


class HubDenoiser(NetworkDenoiser, PyTorchModelHubMixin):
    "A `NetworkDenoiser` with a network by name, that `save_pretrained` writes and `from_pretrained` reads."

    def __init__(
        self,
        network: str,  # A key of `IMAGE_NETWORKS`
        shape: Sequence[int],  # (channels, height, width) of an image
        num_classes: int,  # Number of classes
        path: dict[str, Any],  # By path_to_json
        prediction: str = "velocity",  # What the network predicts
        scale_aware: bool = False,  # Whether it takes a guidance scale
        settings: dict[str, Any] | None = None,  # Settings that differ from those of the name
        facts: dict[str, Any] | None = None,  # TrainingFacts as a dictionary
        sigma_data: float = 0.5,  # Standard deviation of the data, used by `edm` alone
    ):
        net = build_network(network, tuple(shape), num_classes, scale_aware, **(settings or {}))
        super().__init__(net, path_from_json(path), num_classes, prediction, sigma_data, scale_aware)
        self.network, self.shape, self.facts = network, tuple(shape), TrainingFacts(**facts) if facts else None

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        "Read a folder or a repository of the Hub; missing or unexpected weights are an error."
        return super().from_pretrained(*args, **{"strict": True, **kwargs})

    def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
        "The card: method, scale convention, rows, and how to sample."
        from huggingface_hub import ModelCard

        return ModelCard(card_text(self))


def card_text(
    model: Any,  # A HubDenoiser
) -> str:  # Markdown with the Hub's header
    "The model card of a network."
    facts = model.facts or TrainingFacts("an unknown method", 0, 0)
    words = asdict(facts) | {
        "data": f" of {facts.data}" if facts.data else "",
        "built_in": ", which is an input of the network" if model.scale_aware else "",
        "null": f" and label {model.num_classes} for none of them" if model.num_classes else "",
        "imports": facts.imports + "\n" if facts.imports else "",
    }
    named = {"network": model.network, "prediction": model.prediction, "path": model.path}
    classes = {"num_classes": model.num_classes, "classes": max(model.num_classes, 1)}
    return CARD.format(**words, **named, **classes, shape=model.shape)


def to_hub(
    model: NetworkDenoiser,  # A trained model with one of the networks by name
    network: str,  # Its name, a key of `IMAGE_NETWORKS`
    shape: Sequence[int],  # (channels, height, width) of an image
    settings: dict[str, Any] | None = None,  # Settings that differ from those of the name
    facts: TrainingFacts | None = None,  # For the model card
) -> HubDenoiser:  # The same model, ready for `save_pretrained(folder)`
    "A trained network in the form that can be written to a folder."
    how = path_to_json(model.path), model.prediction, model.scale_aware, settings, asdict(facts) if facts else None
    hub = HubDenoiser(network, list(shape), model.num_classes, *how, model.sigma_data)
    hub.load_state_dict(model.state_dict())
    return hub.eval()
