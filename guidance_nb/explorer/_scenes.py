"""Data sets to look at, the controls of each method, and what both give: the guided denoiser, its samples, numbers."""

import base64
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from guidance_nb._checks import check_choice, check_number, require
from guidance_nb._files import Json
from guidance_nb._random import keyed_noise
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.classifier_guidance import ClassifierGuidance
from guidance_nb.denoisers import Denoiser, Prediction, guide, record_nfe, to_prediction
from guidance_nb.metrics import nll, outlier_rate, outlier_threshold, sliced_wasserstein
from guidance_nb.mixtures import ExactClassifier, ExactDenoiser, Mixture, sample_mixture
from guidance_nb.paths import FlowPath
from guidance_nb.samplers import Trajectory, sample_trajectory

PROJECTIONS = 64  # directions of the sliced Wasserstein distance


class Control(NamedTuple):
    """A slider, or a checkbox if it only takes 0 and 1."""

    label: str  # What the reader sees
    low: float  # Smallest value
    high: float  # Largest value
    step: float  # Spacing
    value: float  # Where it stands at first

    @property
    def is_switch(self) -> bool:
        """Whether it only takes two values."""
        return self.high - self.low == self.step


CONTROLS = {
    "scale": Control("guidance scale γ", 0, 8, 0.25, 3),
    "sharpness": Control("classifier sharpness τ", 0.25, 4, 0.25, 1),
    "first": Control("guided from t =", 0, 1, 0.05, 0),
    "last": Control("guided up to t =", 0, 1, 0.05, 1),
    "sampling": Control("sampling scale s", 0, 8, 0.25, 6),
    "training": Control("training scale w", 0.5, 4, 0.25, 2),
    "anchored": Control("anchored unconditional output", 0, 1, 1, 1),
    "weight": Control("weight w", 0, 0.85, 0.05, 0.65),
    "neighbours": Control("neighbours k", 1, 20, 1, 5),
}

METHOD_CONTROLS = {
    "classifier_free_guidance": ("scale", "first", "last"),
    "classifier_guidance": ("scale", "sharpness"),
    "aligned_loss": ("sampling", "training", "anchored"),
    "model_guidance": ("weight",),
    "flow_postprocessing": ("scale", "neighbours"),
}

Settings = dict[str, float]
Solver = Literal["heun", "euler"]


def settings_of(method: str, **chosen: float) -> Settings:
    """All controls of a method, those not chosen where they stand at first.

    An interval that ends before it begins ends where it begins.
    """
    names = METHOD_CONTROLS[check_choice("method", method, METHOD_CONTROLS)]
    for name, value in chosen.items():
        control = CONTROLS[check_choice("control", name, names)]
        check_number(name, value, control.low, control.high)
    settings = {name: chosen.get(name, CONTROLS[name].value) for name in names}
    if "last" in settings:
        settings["last"] = max(settings["first"], settings["last"])
    return settings


def true_scale(method: str, settings: Settings) -> float:
    """The guidance scale that a method's own numbers amount to, gamma in e_u + gamma (e_c - e_u)."""
    if method == "aligned_loss":
        return settings["sampling"] / settings["training"]
    return 1 / (1 - settings["weight"]) if method == "model_guidance" else settings["scale"]


class OptimalDenoiser(Denoiser):
    """A network trained to its minimum: exact means with a scale built in, one NFE per prediction, eq. (4).

    `scale` is 1 / w for an aligned network and 1 / (1 - w) for Model-guidance. Without a condition it answers with
    the unconditional model, or with `drift` times the sum of all classes' velocities.
    """

    def __init__(self, model: Denoiser, scale: float = 1.0, drift: float | None = None):
        super().__init__(model.path, model.num_classes)
        self.model, self.scale, self.drift = model, scale, drift

    def null(self, x: Tensor, t: Tensor) -> Prediction:
        """What the network answers without a condition."""
        if self.drift is None:
            return self.model.predict(x, t, None)
        classes = [torch.full((len(x),), k) for k in range(self.num_classes)]
        total = torch.stack([self.model.velocity(x, t, k) for k in classes]).sum(0)
        return to_prediction(self.drift * total, x, t, self.path, "velocity")

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        """The trained answer at noisy data `x` `[batch, ...]`."""
        record_nfe(len(x))
        if c is None:
            return self.null(x, t)
        plain = self.model.predict(x, t, c)
        return plain if self.scale == 1 else guide(plain, self.null(x, t), self.scale)


class Tempered(nn.Module):
    """A classifier whose log-probabilities are multiplied by a sharpness tau, eq. (3); counts as a network."""

    def __init__(self, classifier: nn.Module, sharpness: float):
        super().__init__()
        self.classifier, self.sharpness, self.num_classes = classifier, sharpness, classifier.num_classes

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        """Logits `[batch, num_classes]`."""
        record_nfe(len(x))
        return self.sharpness * self.classifier(x, t)


class Scene:
    """A data set to look at: exact density in 1-D or 2-D, noise to start from, real points, and what those score."""

    def __init__(self, label: str, mixture: Mixture, extent: float, n: int = 256, seed: int = 0):
        require(mixture.dim in (1, 2), "dimension of the mixture", mixture.dim, "1 or 2, to be drawn")
        self.label, self.mixture, self.extent = label, mixture, extent
        c, generator = torch.arange(mixture.num_classes).repeat_interleave(n), torch.Generator().manual_seed(seed)
        real, other = (sample_mixture(mixture, c, generator)[0].split(n) for _ in range(2))
        self.real = list(real)  # by class, `[n, d]` each
        self.baseline = [sliced_wasserstein(x, y, projections=PROJECTIONS) for x, y in zip(real, other)]
        self.noise = keyed_noise(seed, 0, (n, mixture.dim))  # where the samples start
        self.threshold = outlier_threshold(mixture)  # log density of an outlier, by class

    def model(self, method: str, settings: Settings, model: Denoiser | None = None) -> Denoiser:
        """The guided denoiser of a method, eq. (4): of the exact model, or of a model of your own."""
        s, exact = settings_of(method, **settings), ExactDenoiser(self.mixture, FlowPath()) if model is None else model
        plain = OptimalDenoiser(exact) if model is None else model
        if method == "classifier_guidance":
            classifier = Tempered(ExactClassifier(self.mixture, exact.path), s["sharpness"])
            return ClassifierGuidance(plain, classifier, s["scale"])
        if method == "aligned_loss":
            w, classes = s["training"], self.mixture.num_classes
            drift = None if s["anchored"] else (1 - w) / (w**2 + classes * (1 - w) ** 2)
            return ClassifierFreeGuidance(OptimalDenoiser(exact, 1 / w, drift), s["sampling"])
        if method == "model_guidance":
            return OptimalDenoiser(exact, true_scale(method, s))
        return ClassifierFreeGuidance(plain, s["scale"], interval=(s.get("first", 0.0), s.get("last", 1.0)))

    def run(
        self,
        c: int,  # The class to sample
        method: str,  # Such as "model_guidance"
        settings: Settings,  # Its sliders by name, such as {"scale": 3}; those that are missing stand where they begin
        sampler: Solver = "heun",
        steps: int = 32,  # Number of steps
        model: Denoiser | None = None,  # A model of your own instead of the exact one
    ) -> Trajectory:  # Post-processing adds a last frame, at time 0 again
        """Samples of one class with their trajectories, from the noise of the scene, eq. (5)."""
        guided, labels = self.model(method, settings, model), torch.full((len(self.noise),), c)
        init = self.noise.double() * guided.path.sigma(torch.ones(())).item()
        dtype, shape = torch.float64 if model is None else torch.float32, tuple(self.noise.shape[1:])
        points, times, nfe = sample_trajectory(
            guided, labels, shape, sampler, steps, init=init, dtype=dtype, progress=False
        )
        points = points.double()
        if method == "flow_postprocessing":  # sample i goes to number i mod k of its k nearest real points
            own, i = self.real[c].double(), torch.arange(len(self.noise))
            distance = own.square().sum(1) - 2 * points[-1].float().double() @ own.T  # up to |x|^2
            nearest = distance.argsort(dim=1, stable=True)[i, i % int(settings_of(method, **settings)["neighbours"])]
            points, times = torch.cat([points, own[nearest][None]]), torch.cat([times, times[-1:]])
        return Trajectory(points, times, nfe)

    def numbers(self, x: Tensor, c: int) -> Json:
        """Numbers of finished samples `[n, d]` of a class: mean and std by axis, NLL in nats, outliers, distance."""
        labels = torch.full((len(x),), c)
        return {
            "mean": x.double().mean(0).tolist(),
            "std": x.double().std(0).tolist(),
            "nll": nll(x, labels, self.mixture),
            "outliers": outlier_rate(x, labels, self.mixture, self.threshold),
            "distance": sliced_wasserstein(x, self.real[c], projections=PROJECTIONS),
        }

    def pack(self) -> Json:
        """The scene as JSON: what eqs. (1) to (6) need, by component and by class."""
        mixture, d = self.mixture, self.mixture.dim
        order = torch.cat(mixture.members)
        axes = torch.eye(d).double().expand(len(order), d, d) if mixture.eigenvectors is None else mixture.eigenvectors
        theta = torch.randn(PROJECTIONS, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        arrays = {"means": mixture.means[order], "directions": axes[order, :, 0]}  # the second one is perpendicular
        arrays |= {"values": mixture.eigenvalues.reshape(len(order), -1).expand(-1, d)[order]}
        arrays |= {"logWeights": mixture.weights[order].log(), "logClass": mixture.class_weights.log()}
        starts = [0, *torch.tensor([len(m) for m in mixture.members]).cumsum(0).tolist()]
        mix = {"d": d, "size": len(order), "classes": mixture.num_classes, "starts": starts}
        return {
            "label": self.label,
            "n": len(self.noise),
            "mix": mix | {name: x.flatten().tolist() for name, x in arrays.items()},
            "directions": (theta / theta.norm(dim=1, keepdim=True)).flatten().tolist(),
            "noise": pack_points(self.noise),
            "real": [pack_points(x) for x in self.real],
            "threshold": self.threshold.tolist(),
            "baseline": self.baseline,
            "extent": self.extent,
        }


def pack_points(x: Tensor) -> str:
    """Points `[n, d]` as base64 of their float32 values, little-endian."""
    return base64.b64encode(x.detach().numpy().astype("<f4").tobytes()).decode()
