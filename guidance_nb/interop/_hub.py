"""Trained networks as folders for the Hub, with a page that says what they are."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from guidance_nb._checks import check_choice
from guidance_nb._extras import extra
from guidance_nb._files import Json
from guidance_nb.denoisers import Denoiser, NetworkDenoiser, Parametrisation
from guidance_nb.images._networks import build_network
from guidance_nb.interop._schedulers import TablePath
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.paths import Path as GaussianPath

with extra("diffusers"):
    from huggingface_hub import ModelCard, PyTorchModelHubMixin

_PATHS: dict[str, type[GaussianPath]] = {kind.__name__: kind for kind in (FlowPath, VPPath, EDMPath, TablePath)}


@dataclass(frozen=True)
class TrainingFacts:
    "What a model card says of a training run."

    method: str = "an unknown method"  # Name of the loss, such as "plain" or "model_guidance"
    steps: int = 0  # Optimiser steps
    samples: int = 0  # Samples seen, steps times batch size
    data: str = ""  # What was learned
    scale: float = 1.0  # Guidance scale to sample with; 1 where none is needed or it is built in
    guidance: str = "model"  # Expression that makes the guided model of `model`
    imports: str = ""  # An import that `guidance` needs
    sampler: str = "heun"  # Sampler
    sampler_steps: int = 32  # Its steps


def path_to_json(path: GaussianPath) -> Json:
    "A path as plain values."
    return {"kind": check_choice("path", type(path).__name__, _PATHS), **asdict(path)}


def path_from_json(values: Json) -> GaussianPath:
    "The inverse of `path_to_json`."
    settings = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    return _PATHS[check_choice("path kind", str(settings.pop("kind", None)), _PATHS)](**settings)


_CARD = (Path(__file__).parent / "cards" / "network.txt").read_text(encoding="utf-8")


class HubDenoiser(NetworkDenoiser, PyTorchModelHubMixin):
    "A `NetworkDenoiser` with a network by name, that `save_pretrained` writes and `from_pretrained` reads."

    def __init__(
        self,
        network: str,  # A key of `IMAGE_NETWORKS`
        shape: Sequence[int],  # (channels, height, width) of an image
        num_classes: int,  # Number of classes
        path: Json,  # By path_to_json
        prediction: Parametrisation = "velocity",  # What the network predicts
        scale_aware: bool = False,  # Whether it takes a guidance scale
        settings: Json | None = None,  # Settings that differ from those of the name
        facts: Json | None = None,  # TrainingFacts as a dictionary
        sigma_data: float = 0.5,  # Standard deviation of the data, used by `edm` alone
    ):
        net = build_network(network, tuple(shape), num_classes, scale_aware, **(settings or {}))
        super().__init__(net, path_from_json(path), num_classes, prediction, sigma_data, scale_aware)
        self.network, self.shape, self.facts = network, tuple(shape), TrainingFacts(**(facts or {}))

    @classmethod
    def from_denoiser(
        cls, model: NetworkDenoiser, network: str, shape: Sequence[int], settings: Json | None = None,
        facts: TrainingFacts | Json = TrainingFacts(),
    ) -> "HubDenoiser":  # fmt: skip
        """A trained network of that name, shape and settings, ready for `save_pretrained(folder)` with a card of facts.

        `facts` are by name: method, steps, samples, data, scale, guidance, imports, sampler, sampler_steps.
        """
        new = cls(
            network, list(shape), model.num_classes, path_to_json(model.path), model.prediction, model.scale_aware,
            settings, facts if isinstance(facts, dict) else asdict(facts), model.sigma_data,
        )  # fmt: skip
        new.load_state_dict(model.state_dict())
        return new.eval()

    @classmethod
    def from_pretrained(cls, source: str | Path, **options: Any) -> "HubDenoiser":
        "Read a folder or a repository of the Hub; missing or unexpected weights are an error."
        return super().from_pretrained(source, **{"strict": True, **options})

    def generate_model_card(self, *_: object, **__: object) -> ModelCard:
        "The card: method, scale convention, samples seen, and how to sample."
        words = {
            "data": f" of {self.facts.data}" if self.facts.data else "",
            "built_in": ", which is an input of the network" if self.scale_aware else "",
            "null": f" and label {self.num_classes} for none of them" if self.num_classes else "",
            "imports": self.facts.imports + "\n" if self.facts.imports else "",
        }
        return ModelCard(_CARD.format(model=self, facts=self.facts, classes=max(self.num_classes, 1), **words))


def open_pretrained(source: str) -> Denoiser:
    "A network that `HubDenoiser` wrote, or else a pipeline of diffusers; what is neither is a `ValueError`."
    with extra("diffusers"):
        from huggingface_hub.errors import EntryNotFoundError

    from guidance_nb.interop._diffusers import _opening, from_diffusers

    with _opening("model", source):
        try:
            return HubDenoiser.from_pretrained(source)
        except (OSError, TypeError, EntryNotFoundError):  # nothing of that name, or another kind of model
            return from_diffusers(source)
