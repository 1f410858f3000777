"""Any network or pipeline of diffusers as a denoiser, with its encoders and its decoder."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from guidance_nb._checks import explained, require
from guidance_nb._conditions import Condition, drop_rows, null_rows
from guidance_nb._extras import extra
from guidance_nb._files import Json
from guidance_nb.denoisers import EMBEDDINGS, NetworkDenoiser, check_inputs, record_nfe
from guidance_nb.images._data import Size, find_sides
from guidance_nb.images._latents import decode_floats
from guidance_nb.interop import _networks as networks
from guidance_nb.interop._networks import Network, Pipeline, Scheduler
from guidance_nb.interop._schedulers import SchedulerFacts, path_from_scheduler
from guidance_nb.paths import clamp_time

if TYPE_CHECKING:
    from diffusers import AutoencoderKL


@contextmanager
def _opening(name: str, source: str | Path) -> Iterator[None]:
    "Put into one line what another library says of something that it cannot open."
    kinds = OSError, ValueError, KeyError, RuntimeError, TypeError, AttributeError
    with explained(f"{name} = {str(source)!r} cannot be opened", "a folder or name", *kinds):
        yield


def _open_pipeline(source: Pipeline | str | Path) -> Pipeline:
    "A pipeline of `diffusers`; one that cannot be opened is a `ValueError`."
    if not isinstance(source, str | Path):
        return source
    with extra("diffusers"):
        from diffusers import DiffusionPipeline

    with _opening("pipeline", source):
        return DiffusionPipeline.from_pretrained(str(source))


def _has_encoder(pipeline: Pipeline) -> bool:
    "Whether a pipeline can encode prompts."
    return any(getattr(pipeline, name, None) is not None for name in ("text_encoder", "text_encoder_2"))


@dataclass(frozen=True)
class _PipelineParts:
    "What surrounds a network: encoders, decoder, sizes. Copies of a model share it."

    net: Network  # The network
    pipeline: Pipeline = None  # The pipeline it came with, if it did
    size: Size | None = None  # Side of the images in pixels, or height and width; None for the pipeline's own
    options: Json = field(default_factory=dict)  # Further arguments of the pipeline's `encode_prompt`

    def __deepcopy__(self, memo: dict[int, object]) -> "_PipelineParts":
        return self

    @property
    def vae(self) -> "AutoencoderKL | None":
        "The autoencoder, or None."
        return getattr(self.pipeline, "vae", None)

    @property
    def factor(self) -> int:
        "Pixels for one latent, along an edge."
        return 1 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def shape(self) -> tuple[int, int, int]:
        "Shape of one sample."
        own = self.net.config.get("sample_size") or getattr(self.pipeline, "default_sample_size", 128)
        if self.size is None:
            return networks.latent_channels(self.net), *find_sides(tuple(own) if isinstance(own, list) else own)
        height, width = find_sides(self.size)
        fine = not (height % self.factor or width % self.factor)
        require(fine, "size", self.size, f"multiples of {self.factor}, the pixels of one latent")
        return networks.latent_channels(self.net), height // self.factor, width // self.factor

    def encode(self, prompts: Sequence[str | int], blank: bool = False) -> Condition:
        "Conditions of prompts or classes; `blank` ones are zeros where the pipeline wants it so."
        if networks.takes_labels(self.net):
            return self._encode_classes(prompts)
        name = type(self.pipeline).__name__
        require(_has_encoder(self.pipeline), "text encoder", f"None in {name}", "conditions made elsewhere")
        found = dict(zip(networks.condition_names(self.net), self._encode_text([str(prompt) for prompt in prompts])))
        if blank and self.pipeline.config.get("force_zeros_for_empty_prompt"):
            found = {name: torch.zeros_like(c) for name, c in found.items()}
        if "time_ids" in networks.condition_names(self.net):
            height, width = (side * self.factor for side in self.shape[1:])
            sizes = torch.tensor([height, width, 0, 0, height, width], dtype=torch.float32)
            found["time_ids"] = sizes.to(found["text_embeds"].device).expand(len(prompts), -1)
        return found if len(found) > 1 else next(iter(found.values()))

    def _encode_classes(self, classes: Sequence[str | int]) -> Tensor:
        known = getattr(self.pipeline, "labels", {})
        indices = [known.get(name, -1) if isinstance(name, str) else int(name) for name in classes]
        wrong = next((name for name, index in zip(classes, indices) if index < 0), None)
        require(wrong is None, "class", wrong, f"an index, or one of {len(known)} names")
        return torch.tensor(indices)

    @torch.no_grad()
    def _encode_text(self, prompts: list[str]) -> tuple[Tensor, ...]:
        "Text, and pooled text where there is one, by `encode_prompt`, whose form differs from pipeline to pipeline."
        family, device = networks.network_family(self.net), next(self.net.parameters()).device
        encode = self.pipeline.encode_prompt
        if family == "FluxTransformer2DModel":
            return encode(prompts, None, device, **self.options)[:2]
        if family == "SD3Transformer2DModel":
            return encode(prompts, None, None, device, 1, False, **self.options)[::2]
        if "text_embeds" in networks.condition_names(self.net):  # SDXL
            return encode(prompts, None, device, 1, False, **self.options)[::2]
        return encode(prompts, device, 1, False, **self.options)[:1]


def _find_null(net: Network, null: int | Condition | None) -> tuple[int, Condition | None]:
    "How many classes a network has, and what stands for none of them."
    if not networks.takes_labels(net):
        for c in [] if null is None else [null] if isinstance(null, int | Tensor) else null.values():
            shape = tuple(c.shape) if isinstance(c, Tensor) else c
            fine = isinstance(c, Tensor) and c.is_floating_point() and len(c) == 1
            require(fine, "null", shape, "the condition [1, ...] of an empty prompt, or None")
        return EMBEDDINGS, null  # type: ignore[return-value]
    if networks.network_family(net) == "DiTTransformer2DModel":
        label = net.config.num_embeds_ada_norm
        for module in net.modules():
            if type(module).__name__ == "LabelEmbedding":
                module.dropout_prob = 0.0  # it would drop labels by itself in training, each block its own
        return label, torch.tensor([label])
    rows = net.config.num_class_embeds or 0
    require(null is None or null == rows - 1, "null", null, f"None, or the last of the network's {rows} labels")
    return (rows, None) if null is None else (rows - 1, torch.tensor([rows - 1]))


class DiffusersDenoiser(NetworkDenoiser):
    "A network of diffusers as a denoiser, for sampling, guidance and training; made by `from_diffusers`."

    def __init__(
        self,
        parts: _PipelineParts,
        facts: SchedulerFacts,
        null: int | Condition | None = None,  # What stands for no condition: a label, or a condition `[1, ...]`
        guidance: float | None = None,  # Fixed scale for a network that takes one; None makes it scale-aware
    ):
        classes, null = _find_null(parts.net, null)
        aware = networks.takes_scale(parts.net) and guidance is None
        super().__init__(parts.net, facts.path, classes, facts.prediction, facts.sigma_data, aware, null)
        self.parts, self.facts, self.guidance = parts, facts, guidance if networks.takes_scale(parts.net) else None

    @property
    def shape(self) -> tuple[int, int, int]:
        "Shape of one sample."
        return self.parts.shape

    def encode(self, prompts: Sequence[str | int]) -> Condition:
        "Conditions of prompts, or of classes by name or index."
        return self.parts.encode(prompts)

    def decode_latents(self, latents: Tensor) -> Tensor:
        "Images of samples, in [-1, 1] up to what the decoder exceeds."
        return latents if self.parts.vae is None else decode_floats(self.parts.vae, latents)

    def network_condition(self, c: Condition | None, drop: Tensor | None, x: Tensor) -> Condition:
        "The condition of every row, the null condition where there is none."
        if c is not None and (drop is None or (self.null is None and not drop.any())):
            return c
        blank = null_rows(self.null, len(x), x.device)
        return blank if c is None or drop is None else drop_rows(c, drop, self.null)

    def output(
        self, x: Tensor, t: Tensor | float, c: Condition | None = None,
        drop: Tensor | None = None, scale: float | Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        "Raw network output, shape of `x`; arguments as in `NetworkDenoiser.output`."
        t, clock = check_inputs(x, t, c, self.num_classes), self.facts.clock
        t = clamp_time(self.path, t) if self.prediction == "eps" else t
        named = networks.name_conditions(self.net, self.network_condition(c, drop, x)) if self.num_classes else {}
        wanted = (1.0 if scale is None else scale) if self.scale_aware else self.guidance
        asked = None if wanted is None else torch.as_tensor(wanted, dtype=torch.float32, device=x.device).expand(len(x))
        if asked is not None and self.scale_aware:
            dropped = torch.tensor(c is None, device=x.device) if c is None or drop is None else drop
            asked = asked.masked_fill(dropped, 0.0)
        data, time = self.network_inputs(x, t) if clock is None else (x, clock(t).to(x.device).expand(len(x)))
        record_nfe(len(x))
        return self.facts.sign * networks.call_network(self.net, data, time, named, asked).to(x.dtype)


def from_diffusers(
    source: Pipeline | Network | str | Path,  # A pipeline of any kind, its folder or name, or a network alone
    scheduler: Scheduler = None,  # Scheduler (or SchedulerFacts) of a network alone; of a pipeline None takes its own
    null: str | int | Condition | None = "",  # The null prompt, label or condition `[1, ...]`; None for none
    size: Size | None = None,  # Side of the images in pixels, or height and width; None for the pipeline's own
    guidance: float | None = None,  # Fixed scale, for networks that have the scale as an input
    **options: object,  # Further arguments of the pipeline's `encode_prompt`, such as `max_sequence_length`
) -> DiffusersDenoiser:  # With `shape`, `encode(prompts)`, `decode_latents(latents)`
    "A model of diffusers as a denoiser: with path, prediction and time of its scheduler, for any guidance."
    pipeline = None if isinstance(source, nn.Module) else _open_pipeline(source)
    net = getattr(pipeline, "unet", None) or getattr(pipeline, "transformer", source)
    parts = _PipelineParts(net, pipeline, size, options)
    scheduler = getattr(pipeline, "scheduler", None) if scheduler is None else scheduler
    facts = scheduler if isinstance(scheduler, SchedulerFacts) else path_from_scheduler(scheduler)
    if isinstance(null, str):
        null = parts.encode([null], blank=not null) if null or _has_encoder(pipeline) else None
    return DiffusersDenoiser(parts, facts, null, guidance)
