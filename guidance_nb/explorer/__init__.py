"""Guidance in your hands: move a scale and watch exact samples of five methods move over the exact density, in the browser or in Jupyter."""

import base64
import json
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from guidance_nb._checks import check_choice
from guidance_nb._random import keyed_noise
from guidance_nb.aligned_loss import scale_from_aligned
from guidance_nb.classifier_free_guidance import ClassifierFreeGuidance
from guidance_nb.classifier_guidance import ClassifierGuidance
from guidance_nb.denoisers import Denoiser, Prediction, guide, record_nfe, to_prediction
from guidance_nb.flow_postprocessing import nearest_neighbours
from guidance_nb.metrics import nll, outlier_rate, outlier_threshold, sliced_wasserstein
from guidance_nb.mixtures import (
    ExactClassifier,
    ExactDenoiser,
    Mixture,
    checkerboard,
    fractal,
    gaussian_pair,
    sample_mixture,
)
from guidance_nb.model_guidance import scale_from_mg_weight
from guidance_nb.paths import FlowPath
from guidance_nb.plots import (
    COLOURS,
    METHOD_LABELS,
    show_density,
    show_points,
    show_trajectories,
)
from guidance_nb.samplers import Trajectory, sample_trajectory


class Scene(NamedTuple):
    "A data set to look at: exact density, noise to start from, real points, and what real points would score."

    label: str  # Name for a menu
    mixture: Mixture  # The exact distribution, 1-D or 2-D
    noise: Tensor  # Where the samples start, `[n, d]`
    real: Tensor  # Real points, `[classes * n, d]`
    real_c: Tensor  # Their classes
    threshold: Tensor  # Log density of an outlier by class, see `outlier_threshold`
    floor: list[float]  # Distance between two sets of n real points, by class
    extent: float  # Half the side of the window


PROJECTIONS = 64


def build_scene(
    label: str,  # Name for a menu
    mixture: Mixture,  # The exact distribution, 1-D or 2-D
    extent: float,  # Half the side of the window
    n: int = 256,  # Number of samples, and of real points of each class
    seed: int = 0,  # Seed of the noise and of the real points
) -> Scene:
    "Everything that a page or a live view needs to know about a mixture."
    if mixture.dim > 2:
        raise ValueError(f"mixture has dimension {mixture.dim}; allowed: 1 or 2, to be drawn")
    classes, generator = mixture.num_classes, torch.Generator().manual_seed(seed)
    c = torch.arange(classes).repeat_interleave(n)
    (real, _), (other, _) = (sample_mixture(mixture, c, generator) for _ in range(2))
    pairs = zip(real.split(n), other.split(n))
    floor = [sliced_wasserstein(x, y, PROJECTIONS) for x, y in pairs]
    noise = keyed_noise(seed, 0, (n, mixture.dim))
    return Scene(label, mixture, noise, real, c, outlier_threshold(mixture), floor, extent)


def explorer_scenes() -> dict[str, Scene]:
    "The three data sets of the page."
    return {
        "pair": build_scene("two Gaussians on a line", gaussian_pair(), 2.6),
        "fractal": build_scene("fractal in the plane", fractal(depth=3), 1.8),
        "grid": build_scene("two-class grid in the plane", checkerboard(), 2.4),
    }


class Control(NamedTuple):
    "A slider, or a checkbox if it only takes 0 and 1."

    label: str  # What the reader sees
    low: float  # Smallest value
    high: float  # Largest value
    step: float  # Spacing
    value: float  # Where it stands at first


CONTROLS = {
    "scale": Control("guidance scale γ", 0, 8, 0.25, 3),
    "sharpness": Control("classifier sharpness τ", 0.25, 4, 0.25, 1),
    "first": Control("guided from t =", 0, 1, 0.05, 0),
    "last": Control("guided up to t =", 0, 1, 0.05, 1),
    "sampling": Control("sampling scale s", 0, 8, 0.25, 6),
    "training": Control("training scale w", 0.5, 4, 0.25, 2),
    "anchored": Control("anchored null branch", 0, 1, 1, 1),
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


def settings_of(
    method: str,  # A key of `METHOD_CONTROLS`
    **chosen: float,  # Values of controls; the others stay where they stand at first
) -> dict[str, float]:  # All controls of the method
    "The settings of a method; an interval that ends before it begins ends where it begins."
    check_choice("method", method, METHOD_CONTROLS)
    for name, value in chosen.items():
        check_choice("control", name, METHOD_CONTROLS[method])
        low, high = CONTROLS[name].low, CONTROLS[name].high
        if not low <= value <= high:
            raise ValueError(f"{name} = {value}; allowed: {low} to {high}")
    settings = {name: chosen.get(name, CONTROLS[name].value) for name in METHOD_CONTROLS[method]}
    if "last" in settings:
        settings["last"] = max(settings["first"], settings["last"])
    return settings


def true_scale(
    method: str,  # A key of `METHOD_CONTROLS`
    settings: dict[str, float],  # From settings_of
) -> float:  # gamma in e_u + gamma (e_c - e_u)
    "The guidance scale that a method's own numbers amount to."
    if method == "aligned_loss":
        return scale_from_aligned(settings["sampling"], settings["training"])
    return scale_from_mg_weight(settings["weight"]) if method == "model_guidance" else settings["scale"]


MIXTURE_JS = r"""
// What depends on time alone in eqs. (1) and (2): 1 / v, (t - alpha lambda) / v, and the constants of l_k.
function termsAt(mix, t) {
  const {d, size} = mix, a = 1 - t;
  const [precision, gain, norm] = [size * d, size * d, size].map((n) => new Float64Array(n));
  for (let k = 0; k < size; k++) {
    norm[k] = mix.logWeights[k] - 0.5 * d * Math.log(2 * Math.PI);
    for (let j = k * d; j < (k + 1) * d; j++) {
      const v = a * a * mix.values[j] + t * t;
      precision[j] = 1 / v;
      gain[j] = (t - a * mix.values[j]) / v;
      norm[k] -= 0.5 * Math.log(v);
    }
  }
  return {t, a, precision, gain, norm};
}

// y_k of every component of class c at the point x[o...], into mix.y, and l_k into mix.joint; the largest l_k.
function project(mix, terms, x, o, c) {
  const {d, means, vectors, y, joint} = mix, {a, precision, norm} = terms, end = mix.starts[c + 1];
  let top = -Infinity;
  for (let k = mix.starts[c]; k < end; k++) {
    let square = 0;
    for (let i = k * d; i < (k + 1) * d; i++) {
      let along = 0;
      for (let j = 0; j < d; j++) along += vectors[i * d + j] * (x[o + j] - a * means[k * d + j]);
      y[i] = along;
      square += along * along * precision[i];
    }
    const l = norm[k] - 0.5 * square;
    joint[k] = l;
    if (l > top) top = l;
  }
  return top;
}
"""


FIELD_JS = r"""
// Log density (class weight included) and velocity u_c of every class at the point x[o...], eqs. (1) and (2).
function classFields(mix, terms, x, o) {
  const {d, classes, means, vectors, y, joint} = mix, {gain} = terms;
  const logp = new Float64Array(classes), u = new Float64Array(classes * d);
  for (let c = 0; c < classes; c++) {
    const top = project(mix, terms, x, o, c), end = mix.starts[c + 1];
    let total = 0, u0 = 0, u1 = 0;
    for (let k = mix.starts[c]; k < end; k++) {
      if (joint[k] < top - 40) continue;  // below the rounding of the sum
      const r = Math.exp(joint[k] - top);
      total += r;
      u0 -= r * means[k * d];
      if (d === 2) u1 -= r * means[k * d + 1];
      for (let i = k * d; i < (k + 1) * d; i++) {
        const along = r * gain[i] * y[i];
        u0 += along * vectors[i * d];
        if (d === 2) u1 += along * vectors[i * d + 1];
      }
    }
    u[c * d] = u0 / total;
    if (d === 2) u[c * d + 1] = u1 / total;
    logp[c] = top + Math.log(total);
  }
  return {logp, u};
}

// log p_t(x | c) at one point.
function logDensity(mix, terms, x, o, c) {
  const top = project(mix, terms, x, o, c);
  let total = 0;
  for (let k = mix.starts[c]; k < mix.starts[c + 1]; k++) total += Math.exp(mix.joint[k] - top);
  return top + Math.log(total) - mix.logClass[c];
}
"""


CLASSES_JS = r"""
function softmax(z) {
  let top = -Infinity, total = 0;
  for (const v of z) top = Math.max(top, v);
  const p = z.map((v) => Math.exp(v - top));
  for (const v of p) total += v;
  return p.map((v) => v / total);
}

function average(p, f, d) {
  const mean = new Float64Array(d);
  for (let k = 0; k < p.length; k++) for (let j = 0; j < d; j++) mean[j] += p[k] * f[k * d + j];
  return mean;
}

const pushed = (from, to, scale) => from.map((v, j) => v + scale * (to[j] - v));

// The gradient g_tau of eq. (3); class scores from velocities.
function classifierGradient(mix, terms, x, o, c, sharpness) {
  const {d} = mix, {logp, u} = classFields(mix, terms, x, o);
  const s = u.map((v, i) => -(x[o + i % d] + terms.a * v) / terms.t);
  const mean = average(softmax(logp.map((v) => sharpness * v)), s, d);
  return mean.map((v, j) => sharpness * (s[c * d + j] - v));
}

"""


GUIDANCE_JS = r"""
// The guided velocity of eq. (4) at the point x[o...]; as in the package, classifiers see t of at most 1 / 1.001.
function guidedVelocity(mix, terms, x, o, c, method, s) {
  const at = classFields(mix, terms, x, o), {d, classes} = mix, t = terms.t;
  const class_ = at.u.subarray(c * d, (c + 1) * d), none = average(softmax(at.logp), at.u, d);
  if (method === "classifier_guidance") {
    const late = Math.min(t, 1 / (1 + 1e-3));
    const g = classifierGradient(mix, late < t ? termsAt(mix, late) : terms, x, o, c, s.sharpness);
    const push = s.scale * (late * late + late * (1 - t)) / (1 - late);
    return none.map((v, j) => v - push * g[j]);
  }
  if (method === "aligned_loss") {
    const share = (1 - s.training) / (s.training ** 2 + classes * (1 - s.training) ** 2);
    const away = s.anchored ? none : average(new Float64Array(classes).fill(share), at.u, d);
    return pushed(away, class_, s.sampling / s.training);
  }
  if (method === "model_guidance") return pushed(none, class_, 1 / (1 - s.weight));
  const guided = s.first === undefined || (t >= s.first && t <= s.last);
  return guided ? pushed(none, class_, s.scale) : class_;
}
"""


class OptimalDenoiser(Denoiser):
    "A network trained to its minimum: exact means with a scale built in, one row per prediction, eq. (4)."

    def __init__(
        self,
        model: Denoiser,  # Exact denoiser, or any model to treat as one
        scale: float = 1.0,  # Scale built in: 1 / w for an aligned network, 1 / (1 - w) for Model-guidance
        drift: float | None = None,  # Null branch: this multiple of the summed class velocities; None: unconditional
    ):
        super().__init__(model.path, model.num_classes)
        self.model, self.scale, self.drift = model, scale, drift

    def null(self, x: Tensor, t: Tensor) -> Prediction:
        "What the network answers without a condition."
        if self.drift is None:
            return self.model.predict(x, t, None)
        classes = [torch.full((len(x),), k) for k in range(self.num_classes)]
        total = torch.stack([self.model.velocity(x, t, k) for k in classes]).sum(0)
        return to_prediction(self.drift * total, x, t, self.path, "velocity")

    def forward(self, x: Tensor, t: Tensor, c: Tensor | None = None) -> Prediction:
        "The trained answer at noisy data `x` `[batch, ...]`."
        record_nfe(len(x))
        if c is None:
            return self.null(x, t)
        plain = self.model.predict(x, t, c)
        return plain if self.scale == 1 else guide(plain, self.null(x, t), self.scale)


class Tempered(nn.Module):
    "A classifier whose log-probabilities are multiplied by a sharpness; reports one row per answer."

    def __init__(
        self,
        classifier: nn.Module,  # `classifier(x, t)` gives log-probabilities `[batch, num_classes]`
        sharpness: float,  # tau of eq. (3); 1 leaves it exact
    ):
        super().__init__()
        self.classifier, self.sharpness, self.num_classes = classifier, sharpness, classifier.num_classes

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        "Logits `[batch, num_classes]`."
        record_nfe(len(x))
        return self.sharpness * self.classifier(x, t)


def explorer_model(
    scene: Scene,  # The data
    method: str,  # A key of `METHOD_CONTROLS`
    settings: dict[str, float],  # From settings_of
    model: Denoiser | None = None,  # A model of your own on the path of its choice; None: the exact one
) -> Denoiser:  # What the sampler walks along
    "The guided denoiser of a method, eq. (4)."
    check_choice("method", method, METHOD_CONTROLS)
    s, exact = settings, ExactDenoiser(scene.mixture, FlowPath()) if model is None else model
    plain = OptimalDenoiser(exact) if model is None else model
    if method == "classifier_guidance":
        judge = Tempered(ExactClassifier(scene.mixture, exact.path), s["sharpness"])
        return ClassifierGuidance(plain, judge, s["scale"])
    if method == "aligned_loss":
        w, classes = s["training"], scene.mixture.num_classes
        drift = None if s["anchored"] else (1 - w) / (w**2 + classes * (1 - w) ** 2)
        return ClassifierFreeGuidance(OptimalDenoiser(exact, 1 / w, drift), s["sampling"])
    if method == "model_guidance":
        return OptimalDenoiser(exact, scale_from_mg_weight(s["weight"]))
    return ClassifierFreeGuidance(plain, s["scale"], (s.get("first", 0.0), s.get("last", 1.0)))


SOLVE_JS = r"""
// Walk eq. (5) from `noise` [n, d]: all points, the times, and network rows per sample.
function simulate(scene, state, noise) {
  const {mix} = scene, {d} = mix, n = noise.length / d, {steps, method, c, settings} = state;
  const times = Array.from({length: steps + 1}, (_, i) => 1 - i / steps), terms = times.map((t) => termsAt(mix, t));
  const points = [Float64Array.from(noise)], velocity = new Float64Array(n * d), probe = new Float64Array(d);
  let rows = 0;
  for (let i = 0; i < steps; i++) {
    const x = points[i], next = new Float64Array(n * d), h = times[i] - times[i + 1];
    const heun = state.sampler === "heun" && i + 1 < steps;
    for (let o = 0; o < n * d; o += d) {
      const u = guidedVelocity(mix, terms[i], x, o, c, method, settings);
      for (let j = 0; j < d; j++) next[o + j] = x[o + j] - h * u[j];
      if (!heun) continue;
      const v = guidedVelocity(mix, terms[i + 1], next, o, c, method, settings);
      for (let j = 0; j < d; j++) next[o + j] = x[o + j] - h * (u[j] + v[j]) / 2;
    }
    rows += rowsAt(times[i], method, settings) + (heun ? rowsAt(times[i + 1], method, settings) : 0);
    points.push(next);
  }
  if (method === "flow_postprocessing") {
    points.push(neighbours(scene, points[steps], c, settings.neighbours));
    times.push(0);
  }
  return {points, times, rows};
}

// Network rows of one evaluation at time t.
function rowsAt(t, method, s) {
  if (method === "model_guidance") return 1;
  if (method === "classifier_guidance") return s.scale === 0 ? 1 : 2;
  const scale = method === "aligned_loss" ? s.sampling : s.scale;
  return scale === 0 || scale === 1 || (s.first !== undefined && !(t >= s.first && t <= s.last)) ? 1 : 2;
}
"""


NEIGHBOURS_JS = r"""
// Each sample's real point: of its k nearest of class c (in float32, as the package searches), number i mod k.
function neighbours(scene, x, c, k) {
  const {d} = scene.mix, real = scene.real[c], m = real.length / d, found = new Float64Array(x.length);
  const distance = new Float64Array(m), order = Array.from({length: m}, (_, i) => i);
  for (let o = 0; o < x.length; o += d) {
    for (let i = 0; i < m; i++) {
      distance[i] = 0;
      for (let j = 0; j < d; j++) distance[i] += real[i * d + j] ** 2 - 2 * Math.fround(x[o + j]) * real[i * d + j];
    }
    const nearest = [...order].sort((a, b) => distance[a] - distance[b])[(o / d) % k];
    for (let j = 0; j < d; j++) found[o + j] = real[nearest * d + j];
  }
  return found;
}
"""


def run_scene(
    scene: Scene,  # The data
    c: int,  # The class to sample
    method: str,  # A key of `METHOD_CONTROLS`
    settings: dict[str, float],  # From settings_of
    sampler: str = "heun",  # "heun" or "euler"
    steps: int = 32,  # Number of steps
    model: Denoiser | None = None,  # A model of your own instead of the exact one
) -> Trajectory:  # Post-processing adds a last frame, at time 0 again
    "Samples of one class with their trajectories, from the noise of the scene, eq. (5)."
    check_choice("sampler", sampler, ("heun", "euler"))
    guided = explorer_model(scene, method, settings, model)
    dtype = torch.float64 if model is None else torch.float32
    labels = torch.full((len(scene.noise),), c)
    init = scene.noise.double() * guided.path.sigma(torch.ones(())).item()
    options: dict[str, Any] = {"sampler": sampler, "steps": steps, "init": init, "dtype": dtype}
    run = sample_trajectory(guided, labels, tuple(scene.noise.shape[1:]), progress=False, **options)
    x, points, times = run.x.double(), run.points.double(), run.times
    if method == "flow_postprocessing":
        own, k = scene.real[scene.real_c == c], int(settings["neighbours"])
        found = nearest_neighbours(x, own, k)
        x = own[found[torch.arange(len(x)), torch.arange(len(x)) % k]].double()
        points, times = torch.cat([points, x[None]]), torch.cat([times, times[-1:]])
    return Trajectory(points, times, run.nfe)


NUMBERS_JS = r"""
// The numbers of finished points [n, d]; distance by eq. (6).
function numbersOf(scene, x, c) {
  const {mix, directions} = scene, {d} = mix, n = x.length / d, terms = termsAt(mix, 0);
  const column = (y, j) => Array.from({length: n}, (_, i) => y[i * d + j]);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = Array.from({length: d}, (_, j) => sum(column(x, j)) / n);
  const std = mean.map((m, j) => Math.sqrt(sum(column(x, j).map((v) => (v - m) ** 2)) / (n - 1)));
  const logp = Array.from({length: n}, (_, i) => logDensity(mix, terms, x, i * d, c));
  const sorted = (y, l) => {
    const along = new Float64Array(n);
    for (let i = 0; i < n; i++) for (let j = 0; j < d; j++) along[i] += directions[l * d + j] * y[i * d + j];
    return along.sort();
  };
  let square = 0;
  for (let l = 0; l < directions.length / d; l++) {
    const a = sorted(x, l), b = sorted(scene.real[c], l);
    for (let i = 0; i < n; i++) square += (a[i] - b[i]) ** 2;
  }
  const distance = Math.sqrt(square / (n * directions.length / d));
  const outliers = logp.filter((v) => v < scene.threshold[c]).length / n;
  return {mean, std, nll: -sum(logp) / n, outliers, distance};
}
"""


def scene_numbers(
    scene: Scene,  # The data
    x: Tensor,  # Finished samples, `[n, d]`
    c: int,  # Their class
) -> dict[str, Any]:  # mean and std, lists of d; nll in nats; outliers, 0 to 1; distance in the unit of the data
    "The numbers beneath the picture, of finished samples of one class."
    labels, own = torch.full((len(x),), c), scene.real[scene.real_c == c]
    return {
        "mean": x.double().mean(0).tolist(),
        "std": x.double().std(0).tolist(),
        "nll": nll(x, labels, scene.mixture),
        "outliers": outlier_rate(x, labels, scene.mixture, scene.threshold),
        "distance": sliced_wasserstein(x, own, PROJECTIONS),
    }


def draw_run(
    scene: Scene,  # The data
    c: int,  # The class
    method: str,  # A key of `METHOD_CONTROLS`, for the colour
    run: Trajectory,  # From run_scene
    frame: int = -1,  # Index of the moment to show
    ax: Any = None,  # Axes, a new one by default
) -> Any:  # The Axes
    "Samples and trajectories up to a moment, over the exact density of that moment."
    upto = run.points[: frame % len(run.points) + 1]
    shown = Trajectory(upto, run.times[: len(upto)], run.nfe)
    t = shown.times[-1].item()
    ax = show_density(scene.mixture, c, ax, FlowPath(), t, scene.extent)
    if scene.mixture.dim == 2:
        show_trajectories(shown, ax, method, every=6)
        show_points(shown.x, None, ax, method, size=3)
    else:
        look = {"range": (-scene.extent, scene.extent), "density": True, "color": COLOURS[method]}
        ax.hist(shown.x[:, 0].numpy(), bins=52, alpha=0.5, **look)
    ax.set(xlim=(-scene.extent, scene.extent), xlabel=f"t = {t:.2f}", yticks=[])
    if scene.mixture.dim == 2:
        ax.set(ylim=(-scene.extent, scene.extent))
    return ax


DENSITY_JS = r"""
// Density of class c on size x size pixels, the first row on top: the plane at time t, eq. (7), or the film of a line.
function densityPixels(scene, c, t, size) {
  const {mix, extent} = scene, {d} = mix, p = new Float64Array(size * size), x = new Float64Array(d);
  const centre = (i) => ((i + 0.5) / size * 2 - 1) * extent, half = extent / size;
  const later = d === 2 && t < half ? 1 / (1 + (1 - t) / half) : t, kappa = later > t ? (1 - later) / (1 - t) : 1;
  let terms = termsAt(mix, later);
  for (let column = 0; column < size; column++) {
    if (d === 1) terms = termsAt(mix, 1 - column / (size - 1));
    for (let row = 0; row < size; row++) {
      const up = kappa * centre(size - 1 - row);
      if (d === 1) x[0] = up;
      else { x[0] = kappa * centre(column); x[1] = up; }
      p[row * size + column] = kappa ** d * Math.exp(logDensity(mix, terms, x, 0, c));
    }
  }
  return p;
}

// Shades from 0 to 1 / 1.6: log(1 + 300 p / max p) in the plane; on a line p / max p, each column by its own peak.
function shades(p, size, byColumn) {
  const peaks = new Float64Array(size);
  for (let i = 0; i < p.length; i++) peaks[i % size] = Math.max(peaks[i % size], p[i]);
  const top = peaks.reduce((a, b) => Math.max(a, b));
  return p.map((v, i) => (byColumn ? v / peaks[i % size] : Math.log1p(300 * v / top) / Math.log1p(300)) / 1.6);
}
"""


DRAW_JS = r"""
const FILM = 0.78;  // share of the width that the film of a line takes

// Canvas position of sample i at a frame; width and height in CSS pixels.
function place(scene, run, frame, i, width, height) {
  const {d} = scene.mix, x = run.points[frame], unit = (v) => (v / scene.extent + 1) / 2;
  if (d === 2) return [unit(x[i * d]) * width, (1 - unit(x[i * d + 1])) * height];
  return [(1 - run.times[frame]) * FILM * width, (1 - unit(x[i])) * height];
}

// The shaded density as a small canvas, to be stretched over the picture.
function densityCanvas(scene, c, t, colours) {
  const size = scene.mix.d === 1 ? 128 : t > 0.1 ? 64 : 160;  // noise leaves nothing finer
  const v = shades(densityPixels(scene, c, t, size), size, scene.mix.d === 1);
  const canvas = Object.assign(document.createElement("canvas"), {width: size, height: size});
  const image = new ImageData(size, size);
  v.forEach((shade, i) => {
    for (let j = 0; j < 3; j++) image.data[4 * i + j] = colours.paper[j] + shade * (colours.ink[j] - colours.paper[j]);
    image.data[4 * i + 3] = 255;
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}
"""


MARGIN_JS = r"""
// Final density p(x | c) of a line and a histogram of the samples, lying on their side.
function drawMargin(g, scene, c, x, left, width, height, css) {
  const bins = 52, counts = new Float64Array(bins), terms = termsAt(scene.mix, 0), e = scene.extent;
  x.forEach((v) => { const b = Math.floor((v / e + 1) / 2 * bins); if (b >= 0 && b < bins) counts[b] += 1; });
  const bars = counts.map((n) => n / x.length / (2 * e / bins));
  const density = (v) => Math.exp(logDensity(scene.mix, terms, [v], 0, c));
  const curve = Array.from({length: 201}, (_, i) => density((1 - i / 100) * e)), top = Math.max(...bars, ...curve);
  g.fillStyle = css.dot;
  g.globalAlpha = 0.6;
  bars.forEach((v, b) => g.fillRect(left, height * (1 - (b + 1) / bins), v / top * width, height / bins - 0.5));
  g.globalAlpha = 1;
  g.strokeStyle = css.text;
  g.beginPath();
  curve.forEach((v, i) => g.lineTo(left + v / top * width, i / 200 * height));
  g.stroke();
}
"""


PAINT_JS = r"""
// The whole picture at one frame: density, trajectories up to it, samples at it.
function paint(canvas, scene, state, run, background, css) {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = window.devicePixelRatio || 1, {d} = scene.mix;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d"), at = (frame, i) => place(scene, run, frame, i, width, height);
  g.scale(ratio, ratio);
  g.fillStyle = css.page;
  g.fillRect(0, 0, width, height);
  const film = d === 1 ? FILM * width : width;
  g.drawImage(background, 0, 0, film, height);
  const n = run.points[0].length / d;
  g.save();
  g.beginPath();
  g.rect(0, 0, film + 4, height);
  g.clip();
  g.strokeStyle = css.dot;
  g.globalAlpha = 0.45;
  for (let i = 0; i < n; i += d === 1 ? 4 : 6) {
    g.beginPath();
    for (let frame = 0; frame <= state.frame; frame++) g.lineTo(...at(frame, i));
    g.stroke();
  }
  g.globalAlpha = 1;
  g.fillStyle = css.dot;
  for (let i = 0; i < n; i++) {
    const [left, top] = at(state.frame, i);
    g.fillRect(left - 1.5, top - 1.5, 3, 3);
  }
  g.restore();
  if (d === 1) drawMargin(g, scene, state.c, run.points[state.frame], film + 6, width - film - 10, height, css);
}
"""


SHELL_HTML = """
<div class="top">
<label>Data <select name="scene"></select></label>
<label>Class <select name="c"></select></label>
<label>Method <select name="method"></select></label>
<label>Sampler <select name="sampler"><option value="heun">Heun</option><option value="euler">Euler</option></select>
</label>
<label>Steps <select name="steps"></select></label>
</div>
<div class="body">
<div class="picture"><canvas role="img"></canvas>
<div class="time"><button type="button" name="play">Play</button>
<button type="button" name="step">Step</button>
<label>Time <input type="range" name="frame" min="0" step="1"><output></output></label></div>
<p class="caption"></p></div>
<div class="side"><fieldset><legend>Guidance</legend></fieldset><div class="numbers"></div>
<p class="hidden" role="status" aria-live="polite"></p><p class="check"></p></div>
</div>
"""


SHELL_CSS = """
:host { display: block; --page: #fff; --text: #1c2024; --faint: #5c646c; --line: #c9ced4; --accent: #0b5cad;
  color-scheme: light; }
:host([data-theme="dark"]) { --page: #16191d; --text: #e8eaed; --faint: #a9b1ba; --line: #444b54; --accent: #7db8f5;
  color-scheme: dark; }
.frame { background: var(--page); color: var(--text); border: 1px solid var(--line); border-radius: 8px; padding: 12px;
  font: 15px/1.45 system-ui, sans-serif; max-width: 900px; }
.top { display: flex; flex-wrap: wrap; gap: 6px 14px; margin-bottom: 10px; }
.body { display: flex; flex-wrap: wrap; gap: 14px; }
.picture { flex: 1 1 340px; min-width: 0; max-width: 480px; }
.side { flex: 1 1 250px; min-width: 0; }
canvas { display: block; width: 100%; aspect-ratio: 1; border: 1px solid var(--line); border-radius: 4px; }
.time, .time label { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; margin-top: 6px; }
.time label { flex: 1 1 200px; margin: 0; }
input[type="range"] { flex: 1 1 90px; min-width: 60px; accent-color: var(--accent); }
select, button { font: inherit; color: var(--text); background: var(--page); border: 1px solid var(--line);
  border-radius: 4px; padding: 3px 8px; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
fieldset { border: 1px solid var(--line); border-radius: 4px; margin: 0 0 8px; padding: 4px 10px 8px; }
fieldset label { display: flex; flex-wrap: wrap; gap: 2px 8px; } fieldset label span { flex: 1 0 100%; }
output { min-width: 3.2em; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: normal; } td, thead th + th { text-align: right; padding-left: 8px; }
tr + tr, tbody { border-top: 1px solid var(--line); }
p { margin: 8px 0 0; } .check, .caption, thead th { color: var(--faint); } .check, .caption { font-size: 13px; }
.hidden { position: absolute; width: 1px; height: 1px; margin: 0; overflow: hidden; clip-path: inset(50%); }
"""


WIDGET_JS = r"""
const make = (tag, props = {}, ...kids) => {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...kids);
  return node;
};
const fixed = (v) => (Array.isArray(v) ? v : [v]).map((w) => w.toFixed(3).replace("-", "−")).join(", ");
const percent = (v) => (100 * v).toFixed(1) + " %";

// Dark or light: what the page around says (Quarto, Jupyter), else what the system says.
function isDark() {
  const {classList, dataset} = document.body;
  if (classList.contains("quarto-dark") || dataset.jpThemeLight === "false") return true;
  if (classList.contains("quarto-light") || dataset.jpThemeLight === "true") return false;
  return matchMedia("(prefers-color-scheme: dark)").matches;
}

// Colours of the picture: of the page, of samples, and what density 0 and 1 look like.
function coloursOf(host, page, method) {
  const dark = host.dataset.theme === "dark", style = getComputedStyle(host.shadowRoot.querySelector(".frame"));
  const css = {page: style.backgroundColor, text: style.color, dot: page.colours[method][dark ? 1 : 0]};
  return {css, paper: dark ? [22, 25, 29] : [255, 255, 255], ink: dark ? [255, 255, 255] : [0, 0, 0]};
}
"""


CONTROL_JS = r"""
// A labelled range, or a checkbox for a control that is only 0 or 1.
function makeControl(name, control, value, onInput) {
  const [label, low, high, step] = control, shown = make("output", {}, step < 1 ? value.toFixed(2) : String(value));
  if (high - low === step) {
    const box = make("input", {type: "checkbox", name, checked: value === 1});
    box.addEventListener("input", () => onInput(box.checked ? 1 : 0));
    return make("label", {}, make("span", {}, box, " " + label));
  }
  const range = make("input", {type: "range", name, min: low, max: high, step});
  range.value = value;
  range.addEventListener("input", () => {
    shown.textContent = step < 1 ? Number(range.value).toFixed(2) : range.value;
    onInput(Number(range.value));
  });
  return make("label", {}, make("span", {}, label), range, shown);
}

// The scale that a method's own numbers amount to, as `true_scale` has it.
function trueScale(method, s) {
  if (method === "aligned_loss") return s.sampling / s.training;
  return method === "model_guidance" ? 1 / (1 - s.weight) : s.scale;
}
"""


REPORT_JS = r"""
// The table of numbers, and one sentence for those who do not see the picture.
function report(table, status, canvas, page, state, found, real, rows) {
  const lines = [["mean", "mean", fixed], ["standard deviation", "std", fixed], ["NLL in nats", "nll", fixed]];
  lines.push(["outliers", "outliers", percent], ["distance", "distance", fixed]);
  const head = ["at t = 0", "samples", "real points"].map((text) => make("th", {scope: "col"}, text));
  const line = (label, key, ours, theirs) => make("tr", {},
    make("th", {scope: "row"}, label), make("td", {className: key}, ours), make("td", {}, theirs));
  const body = lines.map(([label, key, show]) => line(label, key, show(found[key]), show(real[key])));
  const scale = trueScale(state.method, state.settings);
  body.push(line("true scale γ", "gamma", scale.toFixed(2), ""));
  body.push(line("network rows a sample", "rows", String(rows), ""));
  table.replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
  const name = page.labels[state.method], {n, label} = page.scenes[state.scene];
  const text = `${n} samples by ${name} at true scale ${scale.toFixed(2)}: mean ${fixed(found.mean)}, ` +
    `standard deviation ${fixed(found.std)}, ${percent(found.outliers)} outliers, ` +
    `distance ${fixed(found.distance)}, ${rows} rows each.`;
  if (status.textContent !== text) status.textContent = text;
  canvas.setAttribute("aria-label", `Exact density of class ${state.c} (${label}), with ${text}`);
}

// Largest distance between end points of the package and this browser's, over all stored runs.
function largestDifference(page) {
  let worst = 0;
  for (const {state, end} of page.checks) {
    const scene = page.scenes[state.scene], noise = scene.noise.subarray(0, end.length);
    simulate(scene, state, noise).points.at(-1).forEach((v, i) => { worst = Math.max(worst, Math.abs(v - end[i])); });
  }
  return worst;
}
"""


MOUNT_JS = r"""
const CAPTIONS = [
  "From noise, t = 1, on the left to data. Grey: the exact density at each time. Right: p(x | c), and the samples.",
  "Grey: the exact density at this time. Colour: samples, and the way of some of them.",
];

function mount(host, page) {
  const root = host.attachShadow({mode: "open"}), find = (query) => root.querySelector(query);
  root.innerHTML = `<style>${page.css}</style><div class="frame">${page.html}</div>`;
  const canvas = find("canvas"), [time, play] = [find("[name=frame]"), find("[name=play]")], kept = {};
  const [first, {real}] = Object.entries(page.scenes)[0], method = "classifier_free_guidance";
  const state = {scene: first, c: real.length - 1, method, sampler: "heun", steps: 32, frame: 32};
  const values = Object.fromEntries(Object.entries(page.controls).map(([name, control]) => [name, control[4]]));
  let run, found, background, wanted = false, timer = 0;

  const settings = () => {
    const s = Object.fromEntries(page.methods[state.method].map((name) => [name, values[name]]));
    return s.last === undefined ? s : {...s, last: Math.max(s.first, s.last)};
  };
  const solve = () => {
    const scene = page.scenes[state.scene], atEnd = !run || state.frame >= run.points.length - 1;
    run = simulate(scene, {...state, settings: state.settings = settings()}, scene.noise);
    state.frame = atEnd ? run.points.length - 1 : Math.min(state.frame, run.points.length - 1);
    found = numbersOf(scene, run.points.at(-1), state.c);
    const key = state.scene + state.c, real = kept[key] ??= numbersOf(scene, scene.real[state.c], state.c);
    const beside = {...real, distance: scene.floor[state.c]};
    report(find(".numbers"), find("[role=status]"), canvas, page, state, found, beside, run.rows);
  };
  const draw = () => {
    const scene = page.scenes[state.scene], t = run.times[state.frame], look = coloursOf(host, page, state.method);
    const key = [state.scene, state.c, scene.mix.d === 1 || t, host.dataset.theme].join();
    find(".caption").textContent = CAPTIONS[scene.mix.d - 1];
    paint(canvas, scene, state, run, kept["p" + key] ??= densityCanvas(scene, state.c, t, look), look.css);
    Object.assign(time, {max: run.points.length - 1, value: state.frame});
    const moved = state.frame > state.steps ? "moved to real points" : `t = ${t.toFixed(2)}`;
    time.setAttribute("aria-valuetext", find(".time output").textContent = moved);
  };
"""


EVENTS_JS = r"""
  const show = (again) => {
    wanted ||= again;
    host.explorer.pending ??= requestAnimationFrame(() => {
      host.explorer.pending = undefined;
      if (wanted) solve();
      wanted = false;
      draw();
    });
  };
  const knob = (name) => makeControl(name, page.controls[name], values[name], (v) => { values[name] = v; show(true); });
  const knobs = () =>
    find("fieldset").replaceChildren(make("legend", {}, "Guidance"), ...page.methods[state.method].map(knob));
  const fill = (name, pairs, onInput) => {
    const menu = find(`[name=${name}]`);
    if (pairs) menu.replaceChildren(...pairs.map(([value, text]) => make("option", {value}, text)));
    menu.value = state[name];
    menu.addEventListener("input", () => { onInput(menu.value); show(true); });
  };
  const classes = () => {
    const menu = find("[name=c]"), {real} = page.scenes[state.scene];
    menu.replaceChildren(...real.map((_, k) => make("option", {value: k}, String(k))));
    menu.value = state.c;
  };
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  const step = () => { state.frame = state.frame >= run.points.length - 1 ? 0 : state.frame + 1; show(false); };
  const start = () => {
    const last = () => run.points.length - 1, calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (calm) { state.frame = last(); return show(false); }
    if (state.frame >= last()) state.frame = 0;
    play.textContent = "Pause";
    timer = setInterval(() => { if (state.frame >= last()) stop(); else step(); }, 2400 / state.steps);
  };
  const theme = () => { host.dataset.theme = isDark() ? "dark" : "light"; if (run) show(false); };
"""


FIRST_JS = r"""
  host.explorer = {state, simulate, numbersOf, densityPixels, place, page, result: () => ({run, found})};
  classes();
  const labels = Object.entries(page.scenes).map(([name, {label}]) => [name, label]);
  fill("scene", labels, (v) => {
    state.scene = v;
    state.c = Math.min(state.c, page.scenes[v].real.length - 1);
    classes();
  });
  const methods = Object.keys(page.methods).map((name) => [name, page.labels[name]]);
  fill("method", methods, (v) => { state.method = v; knobs(); });
  fill("steps", [4, 8, 16, 32, 64].map((n) => [n, String(n)]), (v) => { state.steps = Number(v); });
  fill("c", null, (v) => { state.c = Number(v); });
  fill("sampler", null, (v) => { state.sampler = v; });
  time.addEventListener("input", () => { stop(); state.frame = Number(time.value); show(false); });
  play.addEventListener("click", () => (timer ? stop() : start()));
  find("[name=step]").addEventListener("click", () => { stop(); step(); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", theme);
  const watched = {attributes: true, attributeFilter: ["class", "data-jp-theme-light"]};
  new MutationObserver(theme).observe(document.body, watched);
  new ResizeObserver(() => run && show(false)).observe(canvas);
  theme();
  knobs();
  solve();
  draw();
  host.dataset.difference = largestDifference(page).toExponential(0);
  find(".check").textContent = `Checked now: in ${page.checks.length} runs, this browser's end points and those of ` +
    `guidance_nb differ by at most ${host.dataset.difference}.`;
}
"""


def pack_points(
    x: Tensor,  # Points, `[n, d]`
) -> str:  # base64 of their float32 values, little-endian
    "Points as text."
    return base64.b64encode(x.detach().numpy().astype("<f4").tobytes()).decode()


def pack_scene(
    scene: Scene,  # The data
) -> dict[str, Any]:
    "A scene as JSON: what eqs. (1) to (6) need, by component and by class."
    mixture, d = scene.mixture, scene.mixture.dim
    order = torch.cat(mixture.members)
    values = mixture.eigenvalues.reshape(len(order), -1).expand(-1, d)
    first = torch.eye(d, dtype=torch.float64)[0].expand(len(order), d)  # the second direction is perpendicular
    first = first if mixture.eigenvectors is None else mixture.eigenvectors[:, :, 0]
    theta = torch.randn(PROJECTIONS, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    arrays = {"means": mixture.means[order], "values": values[order], "directions": first[order]}
    arrays |= {"logWeights": mixture.weights[order].log(), "logClass": mixture.class_weights.log()}
    starts = [0, *torch.tensor([len(m) for m in mixture.members]).cumsum(0).tolist()]
    mix = {"d": d, "size": len(order), "classes": mixture.num_classes, "starts": starts}
    return {
        "label": scene.label,
        "n": len(scene.noise),
        "mix": mix | {name: x.flatten().tolist() for name, x in arrays.items()},
        "directions": (theta / theta.norm(dim=1, keepdim=True)).flatten().tolist(),
        "noise": pack_points(scene.noise),
        "real": [pack_points(scene.real[scene.real_c == k]) for k in range(mixture.num_classes)],
        "threshold": scene.threshold.tolist(),
        "floor": scene.floor,
        "extent": scene.extent,
    }


def check_runs(
    scenes: dict[str, Scene],  # The data sets of a page
    n: int = 4,  # Samples of each run
) -> list[dict[str, Any]]:  # For each, the state of the page and where the samples end
    "Runs for the browser to repeat: every method on every scene, with more than default settings."
    chosen: list[tuple[str, str, int, dict[str, float]]] = [
        ("classifier_free_guidance", "heun", 32, {"scale": 3}),
        ("classifier_free_guidance", "euler", 16, {"scale": 5.5, "first": 0.2, "last": 0.6}),
        ("classifier_guidance", "heun", 16, {"scale": 2, "sharpness": 2.5}),
        ("aligned_loss", "heun", 16, {"sampling": 3, "training": 1.5}),
        ("aligned_loss", "euler", 32, {"sampling": 4, "training": 2, "anchored": 0}),
        ("model_guidance", "heun", 8, {"weight": 0.75}),
        ("flow_postprocessing", "heun", 16, {"scale": 4, "neighbours": 7}),
    ]
    rows = []
    for name, scene in scenes.items():
        few = scene._replace(noise=scene.noise[:n])
        for i, (method, sampler, steps, own) in enumerate(chosen):
            settings, c = settings_of(method, **own), i % scene.mixture.num_classes
            end = run_scene(few, c, method, settings, sampler, steps).x.flatten().tolist()
            state = {"scene": name, "c": c, "method": method, "sampler": sampler, "steps": steps, "settings": settings}
            rows.append({"state": state, "end": end})
    return rows


START_JS = r"""
// base64 to numbers: all browsers we know are little-endian, as the text is.
const unpack = (text) => new Float32Array(Uint8Array.from(atob(text), (v) => v.charCodeAt(0)).buffer);

for (const scene of Object.values(PAGE.scenes)) {
  const {mix} = scene, {d, size} = mix, vectors = [];
  for (const name of ["means", "values", "logWeights", "logClass"]) mix[name] = Float64Array.from(mix[name]);
  for (let k = 0; k < size; k++) {
    const [a, b] = mix.directions.slice(k * d, (k + 1) * d);
    vectors.push(...(d === 1 ? [a] : [a, b, -b, a]));  // the first direction, and the same turned by a right angle
  }
  mix.vectors = Float64Array.from(vectors);
  Object.assign(mix, {y: new Float64Array(size * d), joint: new Float64Array(size)});
  scene.noise = unpack(scene.noise);
  scene.real = scene.real.map(unpack);
}
for (const host of document.querySelectorAll(".guidance-explorer")) if (!host.shadowRoot) mount(host, PAGE);
"""


SCRIPT = [MIXTURE_JS, FIELD_JS, CLASSES_JS, GUIDANCE_JS, SOLVE_JS, NEIGHBOURS_JS, NUMBERS_JS]
SCRIPT += [DENSITY_JS, DRAW_JS, MARGIN_JS, PAINT_JS, WIDGET_JS, CONTROL_JS, REPORT_JS, MOUNT_JS, EVENTS_JS, FIRST_JS]
SCRIPT += [START_JS]

DARK_COLOURS = {
    "classifier_guidance": "#FF9454",
    "classifier_free_guidance": "#56B4F9",
    "aligned_loss": "#2FD3A5",
    "model_guidance": "#F0A3D0",
    "flow_postprocessing": "#F5C04A",
}

FALLBACK = """Here stands a page to play with: sliders for the guidance of five methods, over exact densities. It needs
JavaScript; the figures and numbers further down show a part of it without."""


def explorer_page(
    scenes: dict[str, Scene] | None = None,  # Data sets by name, explorer_scenes() by default
) -> str:  # HTML without outside parts, to be put into any page
    "The interactive page: data, code and a place to stand in."
    scenes = explorer_scenes() if scenes is None else scenes
    if not scenes:
        raise ValueError("scenes = {}; allowed: one or more, see `build_scene`")
    page = {
        "scenes": {name: pack_scene(scene) for name, scene in scenes.items()},
        "controls": CONTROLS,
        "methods": METHOD_CONTROLS,
        "labels": {name: METHOD_LABELS[name] for name in METHOD_CONTROLS},
        "colours": {name: [COLOURS[name], DARK_COLOURS[name]] for name in METHOD_CONTROLS},
        "css": SHELL_CSS,
        "html": SHELL_HTML,
        "checks": check_runs(scenes),
    }
    data = json.dumps(page, ensure_ascii=False).replace("</", "<\\/")  # so that no text of ours ends the script
    code = "".join(SCRIPT)
    host = f'<div class="guidance-explorer"><p>{FALLBACK}</p></div>'
    return f"{host}\n<script>\n(() => {{\nconst PAGE = {data};\n{code}}})();\n</script>"


def render_run(
    scene: Scene,  # The data
    c: int,  # The class
    method: str,  # A key of `METHOD_CONTROLS`
    run: Trajectory,  # From run_scene
    frame: int,  # Index of the moment to show
) -> bytes:  # A PNG
    "The picture of `draw_run` as a file, on a figure that no other plot knows of."
    import io

    from matplotlib.figure import Figure

    figure, file = Figure(figsize=(4, 4), layout="constrained"), io.BytesIO()
    draw_run(scene, c, method, run, frame, figure.subplots())
    figure.savefig(file, format="png", dpi=100)
    return file.getvalue()


def numbers_table(
    scene: Scene,  # The data
    x: Tensor,  # Finished samples, `[n, d]`
    c: int,  # Their class
    scale: float,  # True scale
    nfe: float,  # Network function evaluations per sample
) -> str:  # An HTML table
    "The numbers of samples beside those of real points."
    real = scene_numbers(scene, scene.real[scene.real_c == c], c) | {"distance": scene.floor[c]}
    show = lambda v: ", ".join(f"{w:.3f}" for w in (v if isinstance(v, list) else [v]))  # noqa: E731
    found = {key: (show(v), show(real[key])) for key, v in scene_numbers(scene, x, c).items()}
    found |= {"true scale": (f"{scale:.2f}", ""), "NFE": (f"{nfe:g}", "")}
    body = "".join(f"<tr><th>{key}</th><td>{ours}</td><td>{theirs}</td></tr>" for key, (ours, theirs) in found.items())
    return f"<table><tr><th></th><th>samples</th><th>real points</th></tr>{body}</table>"


def import_widgets() -> Any:
    "The module `ipywidgets`, or a `ModuleNotFoundError` that says how to get it."
    try:
        import ipywidgets
    except ImportError as error:
        needs = "pip install 'ipywidgets>=8' (the extra 'live' of guidance_nb)"
        raise ModuleNotFoundError(f"explore needs ipywidgets, which is not installed: {needs}") from error
    return ipywidgets


def control_widget(
    name: str,  # A key of `CONTROLS`
) -> Any:  # A checkbox or a slider of ipywidgets
    "A control as a live widget; a slider reports when it is let go."
    widgets, control = import_widgets(), CONTROLS[name]
    if control.high - control.low == control.step:
        return widgets.Checkbox(value=bool(control.value), description=control.label)
    options: dict[str, Any] = {"style": {"description_width": "initial"}, "continuous_update": False}
    kind = widgets.IntSlider if control.step == 1 else widgets.FloatSlider
    size = {"min": control.low, "max": control.high, "step": control.step, "value": control.value}
    return kind(description=control.label, **size, **options)


def view_menus(
    scenes: dict[str, Scene],  # Data sets by name
) -> dict[str, Any]:  # Dropdowns of ipywidgets by name
    "The menus of the live view."
    widgets, first = import_widgets(), next(iter(scenes))
    classes = tuple(range(scenes[first].mixture.num_classes))
    menus: dict[str, tuple[Any, Any]] = {
        "scene": ({scene.label: name for name, scene in scenes.items()}, first),
        "c": (classes, classes[-1]),
        "method": ({METHOD_LABELS[m]: m for m in METHOD_CONTROLS}, "classifier_free_guidance"),
        "sampler": (("heun", "euler"), "heun"),
        "steps": ((4, 8, 16, 32, 64), 32),
    }
    named = {"scene": "data", "c": "class"}
    return {
        name: widgets.Dropdown(description=named.get(name, name), options=options, value=value)
        for name, (options, value) in menus.items()
    }


class LiveView:
    "The state behind `explore`: widgets by name, the current run, and what to do when a widget moves."

    def __init__(
        self,
        scenes: dict[str, Scene],  # Data sets by name
        model: Denoiser | None = None,  # A model of your own, or None
    ):
        widgets = import_widgets()
        self.scenes, self.model = scenes, model
        self.run: Trajectory
        self.menus = view_menus(scenes)
        self.controls = {name: control_widget(name) for name in CONTROLS}
        self.frame, self.play = widgets.IntSlider(description="frame", max=32), widgets.Play(max=32, interval=150)
        self.link = widgets.jslink((self.play, "value"), (self.frame, "value"))
        self.picture, self.table, self.knobs = widgets.Image(format="png"), widgets.HTML(), widgets.VBox()
        for widget in [*self.menus.values(), *self.controls.values()]:
            widget.observe(self.solve, "value")
        self.frame.observe(self.draw, "value")
        self.solve()
        side = widgets.VBox([*self.menus.values(), self.knobs, self.table])
        below = widgets.HBox([self.play, self.frame])
        self.box = widgets.HBox([widgets.VBox([self.picture, below]), side])

    def solve(self, change: Any = None) -> None:
        "Sample anew with what the widgets say, and show the finished samples."
        solve_view(self)

    def draw(self, change: Any = None) -> None:
        "Show the moment that the frame slider says."
        v = {name: widget.value for name, widget in self.menus.items()}
        scene = self.scenes[v["scene"]]
        self.picture.value = render_run(scene, v["c"], v["method"], self.run, self.frame.value)


def solve_view(
    view: LiveView,  # The view to bring up to date
) -> None:
    "Read the widgets, sample, and hand the run to the view."
    v: dict[str, Any] = {name: widget.value for name, widget in view.menus.items()}
    scene, method = view.scenes[v["scene"]], v["method"]
    classes = tuple(range(scene.mixture.num_classes))
    if view.menus["c"].options != classes:
        view.menus["c"].options = classes  # moves the value, which calls this again
        return
    view.knobs.children = [view.controls[name] for name in METHOD_CONTROLS[method]]
    settings = settings_of(method, **{name: float(view.controls[name].value) for name in METHOD_CONTROLS[method]})
    view.run = run_scene(scene, v["c"], method, settings, v["sampler"], v["steps"], view.model)
    scale, last = true_scale(method, settings), len(view.run.points) - 1
    view.table.value = numbers_table(scene, view.run.x, v["c"], scale, view.run.nfe)
    view.play.max = view.frame.max = last
    if view.frame.value == last:
        view.draw()
    view.frame.value = last


def explore(
    scenes: dict[str, Scene] | None = None,  # Data sets by name, explorer_scenes() by default
    model: Denoiser | None = None,  # A model of your own instead of the exact one, on data of every scene given
) -> Any:  # A box of ipywidgets, to be the last line of a cell
    "Live sliders in Jupyter; `ModuleNotFoundError` without ipywidgets, `ValueError` if the model does not fit."
    import_widgets()
    scenes = explorer_scenes() if scenes is None else scenes
    for name, scene in scenes.items():
        if model is not None and model.num_classes != scene.mixture.num_classes:
            allowed = f"{scene.mixture.num_classes}, as scene {name!r}"
            raise ValueError(f"model has {model.num_classes} classes; allowed: {allowed}")
    return LiveView(scenes, model).box
