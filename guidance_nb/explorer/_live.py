"""The same controls as live widgets in Jupyter, driven by the package's own denoisers and samplers."""

import io
from collections.abc import Mapping
from typing import TYPE_CHECKING

from guidance_nb._extras import extra
from guidance_nb.denoisers import Denoiser
from guidance_nb.explorer._scenes import CONTROLS, METHOD_CONTROLS, Scene, settings_of, true_scale
from guidance_nb.paths import FlowPath
from guidance_nb.plots import COLOURS, METHOD_LABELS, show_density, show_points, show_trajectories
from guidance_nb.samplers import Trajectory

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def draw_run(scene: Scene, c: int, method: str, run: Trajectory, frame: int = -1, ax: "Axes | None" = None) -> "Axes":
    """Samples and trajectories of `Scene.run` up to a frame, over the exact density of that moment."""
    points = run.points[: frame % len(run.points) + 1]
    shown = Trajectory(points, run.times[: len(points)], run.nfe)
    t, window = shown.times[-1].item(), (-scene.extent, scene.extent)
    ax = show_density(scene.mixture, c, ax, FlowPath(), t, scene.extent)
    if scene.mixture.dim == 2:
        show_trajectories(shown, ax, method, every=6)
        show_points(shown.x, None, ax, method, size=3)
        ax.set(ylim=window)
    else:
        ax.hist(shown.x[:, 0].numpy(), bins=52, range=window, density=True, color=COLOURS[method], alpha=0.5)
    ax.set(xlim=window, xlabel=f"t = {t:.2f}", yticks=[])
    return ax


def numbers_table(scene: Scene, c: int, run: Trajectory, scale: float) -> str:
    """The numbers of finished samples beside those of real points, as an HTML table."""
    real = scene.numbers(scene.real[c], c) | {"distance": scene.baseline[c]}

    def text(value: float | list[float]) -> str:
        return ", ".join(f"{v:.3f}" for v in (value if isinstance(value, list) else [value]))

    rows = [(key, text(value), text(real[key])) for key, value in scene.numbers(run.x, c).items()]
    rows += [("true scale", f"{scale:.2f}", ""), ("NFE per sample", f"{run.nfe:g}", "")]
    body = "".join(f"<tr><th>{key}</th><td>{ours}</td><td>{theirs}</td></tr>" for key, ours, theirs in rows)
    return f"<table><tr><th></th><th>samples</th><th>real points</th></tr>{body}</table>"


class LiveView:
    """Widgets by name, the current run, and what to do when a widget moves."""

    def __init__(self, scenes: Mapping[str, Scene], model: Denoiser | None = None):
        with extra("live"):
            import ipywidgets as widgets
        classes = range(next(iter(scenes.values())).mixture.num_classes)
        self.scenes, self.model = scenes, model
        self.menus = {
            "scene": widgets.Dropdown(description="data", options=[(s.label, name) for name, s in scenes.items()]),
            "c": widgets.Dropdown(description="class", options=classes, value=classes[-1]),
            "method": widgets.Dropdown(description="method", options=[(METHOD_LABELS[m], m) for m in METHOD_CONTROLS]),
            "sampler": widgets.Dropdown(description="sampler", options=("heun", "euler")),
            "steps": widgets.Dropdown(description="steps", options=(4, 8, 16, 32, 64), value=32),
        }
        self.controls = {}
        for name, (label, low, high, step, value) in CONTROLS.items():
            kind = widgets.IntSlider if step == 1 else widgets.FloatSlider
            slider = kind(value, min=low, max=high, step=step, description=label, continuous_update=False)
            slider.style.description_width = "initial"
            switch = widgets.Checkbox(value=bool(value), description=label)
            self.controls[name] = switch if CONTROLS[name].is_switch else slider
        self.frame, self.play = widgets.IntSlider(description="frame", max=32), widgets.Play(max=32, interval=150)
        self.link = widgets.jslink((self.play, "value"), (self.frame, "value"))
        self.picture, self.table, self.knobs = widgets.Image(format="png"), widgets.HTML(), widgets.VBox()
        for widget in [*self.menus.values(), *self.controls.values()]:
            widget.observe(self.solve, "value")
        self.frame.observe(self.draw, "value")
        self.solve()
        side = widgets.VBox([*self.menus.values(), self.knobs, self.table])
        self.box = widgets.HBox([widgets.VBox([self.picture, widgets.HBox([self.play, self.frame])]), side])

    def chosen(self) -> tuple[Scene, int, str]:
        """The data set, the class and the method that the menus say."""
        return self.scenes[self.menus["scene"].value], self.menus["c"].value, self.menus["method"].value

    def solve(self, change: object = None) -> None:
        """Sample anew with what the widgets say, and show the finished samples."""
        scene, c, method = self.chosen()
        classes = tuple(range(scene.mixture.num_classes))
        if self.menus["c"].options != classes:
            self.menus["c"].options = classes  # moves the value, which calls this again
            return
        self.knobs.children = [self.controls[name] for name in METHOD_CONTROLS[method]]
        settings = settings_of(method, **{n: float(self.controls[n].value) for n in METHOD_CONTROLS[method]})
        sampler, steps = self.menus["sampler"].value, self.menus["steps"].value
        self.run = scene.run(c, method, settings, sampler, steps, self.model)
        self.table.value = numbers_table(scene, c, self.run, true_scale(method, settings))
        last = len(self.run.points) - 1
        self.play.max = self.frame.max = last
        if self.frame.value == last:
            self.draw()
        self.frame.value = last

    def draw(self, change: object = None) -> None:
        """Show the moment that the frame slider says, on a figure that no other plot knows of."""
        with extra("plots"):
            from matplotlib.figure import Figure

        figure, file = Figure(figsize=(4, 4), layout="constrained"), io.BytesIO()
        draw_run(*self.chosen(), self.run, self.frame.value, figure.subplots())
        figure.savefig(file, format="png", dpi=100)
        self.picture.value = file.getvalue()
