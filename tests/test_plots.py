"What is drawn, read back from the artists, and the Agg backend alone."

import math
import os
import subprocess
import sys

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from matplotlib.colors import to_rgb

from guidance_nb import plots
from guidance_nb.mixtures import ExactDenoiser, Mixture, checkerboard, gaussian_pair, sample_mixture
from guidance_nb.paths import EDMPath, FlowPath, VPPath
from guidance_nb.samplers import Trajectory, sample_trajectory


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def test_every_method_has_its_own_colour_and_a_label():
    assert list(plots.COLOURS) == ["data", "conditional", "unconditional", "guided", *plots.METHOD_LABELS]
    assert len({to_rgb(colour) for colour in plots.COLOURS.values()}) == 4 + 7


def test_pixels_are_indexed_y_x():
    grid = plots._pixel_centres(1.0, 4).reshape(4, 4, 2)
    np.testing.assert_allclose(grid[0, :, 0], [-0.75, -0.25, 0.25, 0.75])
    np.testing.assert_allclose(grid[:, 0, 1], [-0.75, -0.25, 0.25, 0.75])


@pytest.mark.parametrize("path", [FlowPath(), VPPath(), VPPath("cosine"), EDMPath(3.0)], ids=repr)
@pytest.mark.parametrize("t", [0.0, 0.003, 0.1])
def test_density_image_is_the_convolution(path, t):
    "A Gaussian blurred by half a pixel, or by the path's own noise if that is more, through SciPy."
    covariance = np.array([[0.02, 0.015], [0.015, 0.02]])
    mixture = Mixture(torch.tensor([[0.2, -0.3]]), torch.tensor(covariance)[None], torch.tensor([0]))
    time = torch.tensor(t, dtype=torch.float64)
    alpha, sigma = path.alpha(time).item(), path.sigma(time).item()
    blurred = alpha**2 * covariance + max(sigma, 2.0 / 80) ** 2 * np.eye(2)
    image = plots._density_image(mixture, None, path, t, extent=2.0, size=80)
    axis = np.arange(80) / 80 * 4 - 2 + 0.025
    points = np.stack(np.meshgrid(axis, axis), -1)  # [y, x, 2]
    expected = scipy.stats.multivariate_normal(alpha * np.array([0.2, -0.3]), blurred).pdf(points)
    np.testing.assert_allclose(image, expected, rtol=1e-6, atol=1e-9)


def test_class_density_is_conditional():
    board = checkerboard()
    halves = [plots._density_image(board, c, extent=2.5, size=60) for c in (0, 1)]
    whole = plots._density_image(board, extent=2.5, size=60)
    np.testing.assert_allclose((halves[0] + halves[1]) / 2, whole, atol=1e-12)


def test_density_is_drawn_the_right_way_up():
    one = Mixture(torch.tensor([[1.0, -0.5]]), torch.tensor([0.01]), torch.tensor([0]))
    ax = plots.show_density(one, size=80)
    image = ax.images[0]
    y, x = np.unravel_index(image.get_array().argmax(), (80, 80))
    assert image.origin == "lower" and list(image.get_extent()) == [-2, 2, -2, 2]
    assert (x + 0.5) / 20 - 2 == pytest.approx(1.0, abs=0.05) and (y + 0.5) / 20 - 2 == pytest.approx(-0.5, abs=0.05)


def test_density_in_one_dimension_is_the_density():
    ax = plots.show_density(gaussian_pair(1.0, 0.05), c=1)
    outline = ax.collections[0].get_paths()[0].vertices
    assert outline[:, 1].max() == pytest.approx(1 / math.sqrt(2 * math.pi * 0.05), rel=1e-3)
    assert outline[outline[:, 1].argmax(), 0] == pytest.approx(1.0, abs=0.01)


def test_points_have_the_colour_of_their_role_or_class():
    x, c = sample_mixture(checkerboard(), 50, torch.Generator().manual_seed(0))
    ax = plots.show_points(x, role="unconditional")
    (dots,) = ax.collections
    np.testing.assert_allclose(dots.get_offsets(), x, rtol=1e-6)
    assert to_rgb(dots.get_facecolor()[0][:3]) == to_rgb("tab:blue")
    ax = plots.show_points(x, torch.zeros_like(c))  # one class is a class, not a role
    assert to_rgb(ax.collections[0].get_facecolor()[0][:3]) == to_rgb("tab:orange")
    ax = plots.show_points(x, c)
    for k, dots in enumerate(ax.collections):
        np.testing.assert_allclose(dots.get_offsets(), x[c == k], rtol=1e-6)


def test_histogram_has_area_one():
    x, c = sample_mixture(gaussian_pair(), 500, torch.Generator().manual_seed(0))
    for labels in (None, c):
        ax = plots.show_points(x, labels)
        assert sum(bar.get_height() * bar.get_width() for bar in ax.patches) == pytest.approx(1, rel=1e-4)
    plots.show_points(torch.ones(5, 1))  # no spread at all


@pytest.mark.parametrize("every", [1, 4])
def test_trajectories(every):
    model = ExactDenoiser(checkerboard(), FlowPath())
    samples = sample_trajectory(model, 10, (2,), steps=5, progress=False)
    ax = plots.show_trajectories(samples, every=every)
    curves = [line.get_xydata() for line in ax.lines]
    np.testing.assert_allclose(np.stack(curves), samples.points[:, ::every].transpose(0, 1), rtol=1e-6)
    model = ExactDenoiser(gaussian_pair(), FlowPath())
    samples = sample_trajectory(model, 10, (1,), steps=5, progress=False)
    ax = plots.show_trajectories(samples)
    curve = ax.lines[2].get_xydata()
    np.testing.assert_allclose(curve[:, 0], samples.times)
    np.testing.assert_allclose(curve[:, 1], samples.points[:, 2, 0], rtol=1e-6)
    assert ax.get_xlim() == (1.0, 0.0)


def test_field_keeps_directions_and_scales_the_longest_to_one_cell():
    ax = plots.show_field(lambda x: torch.stack([-x[:, 1], x[:, 0]], 1), extent=1.5, size=9)
    quiver = ax.collections[0]
    lengths = np.hypot(quiver.U, quiver.V)
    assert lengths.max() == pytest.approx(2 * 1.5 / 9)
    np.testing.assert_allclose(quiver.U * quiver.X + quiver.V * quiver.Y, 0, atol=1e-6)
    plots.show_field(torch.zeros_like)


def test_images():
    x = torch.linspace(-2, 2, 12).reshape(12, 1).expand(12, 4)
    ax = plots.show_images(x, columns=4, shape=(2, 2))
    grid = ax.images[0].get_array()
    assert grid.shape == (3 * 3 + 1, 4 * 3 + 1, 3)
    np.testing.assert_allclose(grid[1::3, 1::3, 0].ravel(), ((np.linspace(-2, 2, 12) + 1) / 2).clip(0, 1), atol=1e-6)


def test_curves_are_means_with_one_standard_deviation():
    names = ["aligned_loss"] * 3 + ["mine"] * 2
    table = pd.DataFrame({"method": names, "scale": [1, 1, 2, 1, 2], "fid": [1.0, 3.0, 5.0, 0.0, 0.0]})
    ax = plots.show_curves(table, "scale", "fid")
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["aligned loss", "mine"]
    drawn = [line for line in ax.lines if len(line.get_xdata()) and line.get_linestyle() == "-"]
    assert list(drawn[0].get_ydata()) == [2, 5] and drawn[0].get_color() == plots.COLOURS["aligned_loss"]
    low, high = ax.containers[0].lines[2][0].get_segments()[0]
    assert high[1] - low[1] == pytest.approx(2 * math.sqrt(2))
    assert list(table["method"].unique()) == ["aligned_loss", "mine"]  # the caller's table is left alone
    assert plots.show_curves(table, "scale", "fid", hue=None).get_legend() is None


def test_functions_draw_where_they_are_told():
    _, (left, right) = plt.subplots(1, 2)
    assert plots.show_density(checkerboard(), ax=right, size=20) is right
    assert plots.show_points(torch.zeros(3, 2), ax=right) is right
    assert plots.show_field(lambda x: x, right) is right
    assert not left.has_data()


def test_plots_need_no_display_and_no_global_style():
    code = """
import matplotlib
before = dict(matplotlib.rcParams)
import torch
from guidance_nb.plots import show_images, show_points
show_points(torch.randn(9, 2))
show_images(torch.zeros(3, 64)).figure.savefig("/dev/null", format="png")
assert dict(matplotlib.rcParams) == {**before, "backend": matplotlib.rcParams["backend"]}
"""
    environment = os.environ | {"MPLBACKEND": "Agg"}
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True, env=environment)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: plots.show_density(checkerboard(), c=5), "allowed: "),
        (lambda: plots.show_density(checkerboard(), t=2.0), "t = 2"),
        (lambda: plots.show_images(torch.zeros(4, 784)), "shape of x = (4, 784); allowed: [n, 64]"),
        (
            lambda: plots.show_trajectories(Trajectory(torch.zeros(5, 3, 64), torch.ones(5), 1.0)),
            "shape of points = (5",
        ),
        (lambda: plots.show_points(torch.zeros(3, 3)), "shape of x = (3, 3); allowed: [n, 1] or [n, 2]"),
        (lambda: plots.show_points(torch.zeros(3, 2), role="green"), "role = 'green'"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value) and "\n" not in str(error.value)


def test_the_toy_figure_counts_outliers_and_coverage():
    "Half of the samples are moved away, so half are outliers; each label stands where it belongs."
    mixture, c = gaussian_pair(1.0, 0.01, dim=2), torch.arange(400) % 2
    x, _ = sample_mixture(mixture, c, torch.Generator().manual_seed(5))
    moved = x + torch.tensor([0.0, 1.0]) * (torch.arange(400) < 200)[:, None]
    fig = plots.show_toy({"exact": {1.0: x, 2.0: moved}, "learned": {1.0: moved, 2.0: x}}, c, mixture)
    outliers = [ax.get_xlabel().split("%")[0] for ax in fig.axes]
    assert outliers == ["outliers 0", "outliers 50", "outliers 50", "outliers 0"]
    assert [ax.get_title() for ax in fig.axes] == ["scale 1", "scale 2", "", ""]
    assert [ax.get_ylabel() for ax in fig.axes] == ["exact", "", "learned", ""]
    colours = {to_rgb(points.get_facecolor()[0][:3]) for points in fig.axes[0].collections}
    assert colours == {to_rgb("tab:orange"), to_rgb("tab:blue")}


def test_the_digits_figure_has_a_labelled_row_for_each_scale():
    rows = {f"scale {k}": torch.full((3, 1, 4, 4), k / 2 - 1) for k in (1, 2, 4)}
    ax = plots.show_digits(rows)
    assert [text.get_text() for text in ax.get_yticklabels()] == list(rows)
    grey = ax.images[0].get_array()
    assert grey.shape[:2] == (3 * 5 + 1, 3 * 5 + 1)
    for place, k in zip(ax.get_yticks(), (1, 2, 4)):
        assert grey[int(place), 3, 0] == pytest.approx(min(k / 4, 1))
