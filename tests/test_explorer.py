"The interactive page in a real browser: what it computes, shows and says is what the package does."

import base64
import io
import json
import re
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from guidance_nb._random import keyed_noise
from guidance_nb.classifier_guidance import class_gradient
from guidance_nb.explorer import _PROGRAM, Scene, _checked_runs, example_scenes, explore, explorer_page
from guidance_nb.explorer._assets import program as read_program
from guidance_nb.explorer._scenes import CONTROLS, METHOD_CONTROLS, Tempered, settings_of, true_scale
from guidance_nb.metrics import outlier_rate
from guidance_nb.mixtures import ExactClassifier, ExactDenoiser, Mixture, gaussian_pair, log_posterior, log_prob
from guidance_nb.paths import FlowPath, VPPath
from guidance_nb.plots import _density_image
from notebooks import ROOT, cells, text

HOST = "document.querySelector('.guidance-explorer')"
STORED = "".join(
    text(output["data"]["text/html"])
    for cell in cells(ROOT / "nbs" / "28_explorer.ipynb")
    for output in cell.get("outputs", [])
    if "guidance-explorer" in text(output.get("data", {}).get("text/html", ""))
)
SCENES = example_scenes()


@pytest.fixture
def open_page(chromium):
    "Opens the page that is stored in the notebook, refuses anything from outside, and fails on errors of its program."
    contexts, errors, requests = [], [], []

    def opened(html: str = STORED, body: str = "", width: int = 1000, **options):
        context = chromium.new_context(viewport={"width": width, "height": 800}, offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.set_content(f"<!doctype html><html lang=en><meta charset=utf-8><title>page</title><body {body}>{html}")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == [] and requests == []


@pytest.fixture(scope="module")
def program(chromium):
    """One page for all that only computes; `program(body, *arguments)` runs JavaScript with `e`, its program, at hand.

    Numbers travel as JSON, since the driver looks at each of its own many times.
    """
    page = chromium.new_page()
    page.set_content(f"<!doctype html><meta charset=utf-8><body>{STORED}")
    code = f"(words) => {{ const e = {HOST}.explorer, given = JSON.parse(words); return JSON.stringify((() => {{"
    yield lambda body, given: json.loads(page.evaluate(f"{code} {body} }})())}}", json.dumps(given)))
    page.close()


def settle(page) -> None:
    "Wait until what moved has been drawn."
    page.wait_for_function(f"{HOST}.explorer.pending === undefined")


def shown(page, name: str) -> str:
    "A cell of the table of numbers."
    return page.locator(f"td.{name}").inner_text().replace("−", "-")


def points(page) -> torch.Tensor:
    "All points of the run that the page shows, `[times, n * d]`."
    found = json.loads(page.evaluate(f"JSON.stringify({HOST}.explorer.result().run.points.map((x) => Array.from(x)))"))
    return torch.tensor(found, dtype=torch.float64)


def pixels(page) -> torch.Tensor:
    "The canvas, `[height, width, 3]`."
    url = page.evaluate(f"{HOST}.shadowRoot.querySelector('canvas').toDataURL()")
    image = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGB")
    return torch.tensor(np.asarray(image).astype(int))


def set_range(page, name: str, value: float) -> None:
    "Move a slider to a value, as the mouse would."
    page.locator(f"input[name={name}]").fill(str(value))
    settle(page)


def expect_numbers(page, scene, run, c: int) -> None:
    "The table says what the package computes."
    found = scene.numbers(run.x, c)
    for name in ("mean", "std"):
        assert shown(page, name) == ", ".join(f"{value:.3f}" for value in found[name])
    assert shown(page, "nll") == f"{found['nll']:.3f}"
    assert shown(page, "distance") == f"{found['distance']:.3f}"
    assert shown(page, "outliers") == f"{100 * found['outliers']:.1f} %"
    assert shown(page, "nfe") == f"{run.nfe:g}"


def test_stored_page_is_the_one_the_package_makes():
    "The program to the letter; its numbers may differ by the rounding of another machine."
    fresh = explorer_page(SCENES)
    number = r"-?\d+\.?\d*(?:e-?\d+)?"
    program = read_program(*_PROGRAM)
    assert STORED.count(program) == fresh.count(program) == 1
    one, two = (page.replace(program, "") for page in (STORED, fresh))
    data = r"\[" + f"(?:{number}, )*{number}" + r"\]|" + number
    assert re.sub(data, "#", one) == re.sub(data, "#", two)
    values = [
        torch.tensor([float(v) for v in re.findall(r"(?<=[ \[])" + number, page)]).double() for page in (one, two)
    ]
    assert_close(*values, rtol=1e-9, atol=1e-9)


def test_page_stands_alone_and_is_small():
    assert 10_000 < len(STORED.encode()) < 150_000
    assert not re.search(r"(src|href)\s*=|@import|url\(|import\(|fetch\(|XMLHttp", STORED)
    assert STORED.count("</script>") == 1


@pytest.mark.parametrize("name", SCENES)
def test_a_scene_starts_from_the_noise_of_the_samplers(name):
    scene, dim = SCENES[name], SCENES[name].mixture.dim
    assert scene.noise.shape == (256, dim)
    assert_close(scene.noise[100:110], keyed_noise(0, 100, (10, dim)))
    real = torch.cat(scene.real)
    assert outlier_rate(real, torch.arange(len(real)) // 256, scene.mixture, scene.threshold) < 0.01


def test_sliders_that_are_not_given_stand_where_they_begin():
    assert settings_of("classifier_free_guidance", first=0.4, last=0.2)["last"] == 0.4
    assert true_scale("aligned_loss", settings_of("aligned_loss", sampling=4, training=2)) == 2
    assert true_scale("model_guidance", settings_of("model_guidance", weight=0.5)) == 2
    scene = Scene("pair", gaussian_pair(), 2.6, n=16)
    for method in METHOD_CONTROLS:
        assert torch.equal(scene.run(1, method, {}).x, scene.run(1, method, settings_of(method)).x)


def test_one_velocity_at_one_true_scale():
    "Eq. (3) against autograd; eq. (4) at a true scale of 2, where four methods with numbers of their own agree."
    scene, c = SCENES["fractal"], torch.ones(256, dtype=torch.long)
    x, t = scene.noise.double(), torch.tensor(0.4, dtype=torch.float64)
    exact, classifier = ExactDenoiser(scene.mixture, FlowPath()), ExactClassifier(scene.mixture, FlowPath())
    s_0, s_1 = (exact.score(x, t, torch.full((256,), k)) for k in range(2))
    for tau in (0.5, 1.0, 3.0):
        p = (tau * log_posterior(scene.mixture, x, t=t)).softmax(1)
        ours = tau * (s_1 - p[:, :1] * s_0 - p[:, 1:] * s_1)
        assert_close(ours, class_gradient(Tempered(classifier, tau), x, t, c), rtol=1e-7, atol=1e-7)

    def velocity(method, **own):
        return scene.model(method, own).velocity(x, t, c)

    guided = velocity("classifier_free_guidance", scale=2)
    for method, own in {
        "classifier_guidance": {"scale": 2},
        "aligned_loss": {"sampling": 4, "training": 2},
        "model_guidance": {"weight": 0.5},
    }.items():
        assert_close(velocity(method, **own), guided, rtol=1e-7, atol=1e-7)
    assert (velocity("classifier_guidance", scale=2, sharpness=2) - guided).abs().max() > 0.1
    assert (velocity("aligned_loss", sampling=4, anchored=0) - guided).abs().max() > 0.1
    plain = velocity("aligned_loss", sampling=2, anchored=0)
    assert_close(plain, exact.velocity(x, t, c), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize(
    ("method", "own"),
    [
        ("classifier_free_guidance", {"scale": 4.25}),
        ("classifier_free_guidance", {"scale": 7, "first": 0.25, "last": 0.5}),
        ("classifier_free_guidance", {"scale": 1}),
        ("classifier_guidance", {"scale": 2.5, "sharpness": 1}),
        ("classifier_guidance", {"scale": 1.5, "sharpness": 3}),
        ("classifier_guidance", {"scale": 0}),
        ("aligned_loss", {"sampling": 5, "training": 2.5}),
        ("aligned_loss", {"sampling": 5, "training": 2, "anchored": 0}),
        ("aligned_loss", {"sampling": 1, "training": 0.5}),
        ("model_guidance", {"weight": 0.7}),
        ("flow_postprocessing", {"scale": 5, "neighbours": 12}),
    ],
)
def test_program_computes_what_the_package_does(program, name, method, own):
    "Trajectories of all samples, rows and numbers, with both samplers."
    settings, scene = settings_of(method, **own), SCENES[name]
    for c, sampler, steps in ((0, "heun", 16), (1, "euler", 32)):
        state = {"scene": name, "c": c, "method": method, "sampler": sampler, "steps": steps, "settings": settings}
        points, nfe, found = program(
            """const scene = e.page.scenes[given.scene], run = e.simulate(scene, given, scene.noise);
            return [run.points.map((x) => [...x]), run.nfe, e.numbersOf(scene, run.points.at(-1), given.c)];""",
            state,
        )
        run = scene.run(c, method, settings, sampler, steps)
        assert_close(torch.tensor(points, dtype=torch.float64), run.points.flatten(1), rtol=1e-9, atol=1e-9)
        assert nfe == run.nfe
        ours = scene.numbers(run.x, c)
        assert found.keys() == ours.keys()
        for key, value in ours.items():
            assert_close(torch.tensor(found[key]).double(), torch.tensor(value).double(), rtol=1e-9, atol=1e-9)


def test_page_checks_itself(open_page):
    "Where the browser deviates, the page must say so."
    difference = float(open_page().evaluate(f"{HOST}.dataset.difference"))
    assert difference < 1e-10
    wrong = re.sub(r'("end": \[)(-?\d)', r"\g<1>1\g<2>", STORED, count=1).replace("[1-", "[-1")
    page = open_page(wrong)
    assert float(page.evaluate(f"{HOST}.dataset.difference")) > 1
    assert page.evaluate(f"{HOST}.dataset.difference") in page.locator(".check").inner_text()


@pytest.mark.parametrize("t", [0.0, 0.02, 0.5])
def test_picture_is_the_exact_density(program, t):
    "In the plane, blurred as the package's pictures are; on the line, the film of all times."
    body, size = "return [...e.densityPixels(e.page.scenes[given[0]], 1, given[1], given[2])];", 160
    for name in ("fractal", "grid"):
        scene = SCENES[name]
        found = torch.tensor(program(body, [name, t, size]), dtype=torch.float64).reshape(size, size).flip(0)
        ours = _density_image(scene.mixture, 1, FlowPath(), t, scene.extent, size)
        assert_close(found, ours, rtol=1e-9, atol=1e-9 * ours.max().item())
    film = torch.tensor(program(body, ["pair", t, 64]), dtype=torch.float64).reshape(64, 64).flip(0)
    line = ((torch.arange(64).double() + 0.5) / 64 * 2 - 1)[:, None] * SCENES["pair"].extent
    for column in (0, 30, 63):
        time = torch.tensor(1 - column / 63, dtype=torch.float64)
        ours = log_prob(SCENES["pair"].mixture, line, torch.ones(64).long(), FlowPath(), time).exp()
        assert_close(film[:, column], ours, rtol=1e-9, atol=1e-12)


def test_slider_moves_numbers_and_picture(open_page):
    page = open_page()
    settle(page)
    before, words = pixels(page), page.locator("canvas").get_attribute("aria-label")
    set_range(page, "scale", 6.5)
    run = SCENES["pair"].run(1, "classifier_free_guidance", settings_of("classifier_free_guidance", scale=6.5))
    assert_close(points(page), run.points.flatten(1), rtol=1e-9, atol=1e-9)
    expect_numbers(page, SCENES["pair"], run, 1)
    after = pixels(page)
    assert (before != after).any(2).double().mean() > 0.01
    spoken = page.locator("canvas").get_attribute("aria-label").replace("−", "-")
    assert spoken != words and f"mean {run.x.mean():.3f}" in spoken and "true scale 6.50" in spoken
    assert page.locator("[role=status]").inner_text().replace("−", "-") in spoken


def test_samples_are_drawn_where_they_are(open_page):
    "Every sample in the window is a dot of the method's colour; where none is near, no such colour is."
    page = open_page()
    page.select_option("[name=scene]", "grid")
    page.select_option("[name=method]", "model_guidance")
    settle(page)
    scene = SCENES["grid"]
    run = scene.run(1, "model_guidance", settings_of("model_guidance"))
    picture, colour = pixels(page), torch.tensor([0xCC, 0x79, 0xA7])
    near = (picture - colour).abs().amax(2) <= 2
    height, width = near.shape
    at = (run.x / scene.extent + 1) / 2
    inside = ((at > 0.01) & (at < 0.99)).all(1)
    rows, columns = (1 - at[inside, 1]) * height, at[inside, 0] * width
    assert inside.sum() > 200
    assert near[rows.long(), columns.long()].double().mean() == 1
    y, x = near.nonzero().double().T
    distance = torch.cdist(torch.stack([y, x], 1), torch.stack([rows, columns], 1)).amin(1)
    assert distance.max() < 5


def test_methods_bring_their_own_controls(open_page):
    page = open_page()
    for method, names in METHOD_CONTROLS.items():
        page.select_option("[name=method]", method)
        settle(page)
        found = [node.get_attribute("name") for node in page.locator("fieldset input").all()]
        assert found == list(names)
        assert shown(page, "gamma") == f"{true_scale(method, settings_of(method)):.2f}"
    page.select_option("[name=method]", "aligned_loss")
    settle(page)
    page.locator("input[name=anchored]").uncheck()
    settle(page)
    run = SCENES["pair"].run(1, "aligned_loss", settings_of("aligned_loss", anchored=0))
    expect_numbers(page, SCENES["pair"], run, 1)


def test_menus_change_data_class_sampler_and_steps(open_page):
    page = open_page()
    for name, value in (("scene", "fractal"), ("c", "0"), ("sampler", "euler"), ("steps", "8")):
        page.select_option(f"[name={name}]", value)
    settle(page)
    run = SCENES["fractal"].run(0, "classifier_free_guidance", settings_of("classifier_free_guidance"), "euler", 8)
    assert_close(points(page), run.points.flatten(1), rtol=1e-9, atol=1e-9)
    expect_numbers(page, SCENES["fractal"], run, 0)


def test_keyboard_reaches_and_moves_everything(open_page):
    page = open_page()
    reached = []
    for _ in range(20):
        page.keyboard.press("Tab")
        name = page.evaluate(f"{HOST}.shadowRoot.activeElement?.name ?? ''")
        if name in reached:
            continue
        reached.append(name)
        if name == "scale":
            page.keyboard.press("ArrowRight")
            page.keyboard.press("ArrowRight")
            settle(page)
            assert shown(page, "gamma") == f"{CONTROLS['scale'].value + 0.5:.2f}"
            assert page.evaluate(f"{HOST}.shadowRoot.activeElement.name") == "scale", "the focus stays"
        if name == "frame":
            page.keyboard.press("ArrowLeft")
            settle(page)
            assert page.locator("[name=frame]").get_attribute("aria-valuetext") == f"t = {1 / 32:.2f}"
    needed = ["scene", "c", "method", "sampler", "steps", "play", "step", "frame", "scale", "first", "last"]
    assert [name for name in reached if name] == needed


def test_everything_has_a_name(open_page):
    "As a screen reader hears it."
    page = open_page()
    for node in page.locator("input, select").all():
        assert node.evaluate("(node) => node.labels.length === 1 && node.labels[0].textContent.trim() !== ''")
    for node in page.locator("button").all():
        assert node.inner_text().strip()
    assert len(page.locator("canvas[role=img]").get_attribute("aria-label")) > 80
    assert page.locator("th:not([scope])").count() == 0


def test_play_walks_from_noise_to_data(open_page):
    page = open_page()
    page.select_option("[name=steps]", "16")
    settle(page)
    page.locator("[name=play]").click()
    button = f"{HOST}.shadowRoot.querySelector('[name=play]')"
    page.wait_for_function(
        f"{HOST}.explorer.state.frame === 5 && ({button}.click(), 1)"
    )  # in one go, for we may be late
    settle(page)
    assert page.locator("[name=play]").inner_text() == "Play"
    assert page.locator("[name=frame]").get_attribute("aria-valuetext") == f"t = {1 - 5 / 16:.2f}"
    page.locator("[name=play]").click()
    assert page.locator("[name=play]").inner_text() == "Pause"
    page.wait_for_function(f"{HOST}.explorer.state.frame === 16")
    page.wait_for_function(f"{button}.textContent === 'Play'")
    page.locator("[name=step]").click()
    settle(page)
    assert page.evaluate(f"{HOST}.explorer.state.frame") == 0


def test_dragging_the_time_stops_the_animation(open_page):
    page = open_page()
    page.locator("[name=play]").click()
    set_range(page, "frame", 7)
    assert page.locator("[name=play]").inner_text() == "Play"
    assert page.evaluate(f"{HOST}.explorer.state.frame") == 7


def test_picture_at_a_time_shows_that_time(open_page):
    "Post-processing ends one frame after the samples, on real points."
    page = open_page()
    page.select_option("[name=method]", "flow_postprocessing")
    settle(page)
    end = pixels(page)
    assert page.locator("[name=frame]").get_attribute("aria-valuetext") == "moved to real points"
    set_range(page, "frame", 32)
    assert page.locator("[name=frame]").get_attribute("aria-valuetext") == "t = 0.00"
    before = pixels(page)
    set_range(page, "frame", 0)
    assert (end != before).any() and (before != pixels(page)).any(2).double().mean() > 0.01
    run = SCENES["pair"].run(1, "flow_postprocessing", settings_of("flow_postprocessing"))
    expect_numbers(page, SCENES["pair"], run, 1)  # the numbers are those of finished samples, whatever the time shown


def test_less_motion_means_no_animation(open_page):
    page = open_page(reduced_motion="reduce")
    set_range(page, "frame", 3)
    page.locator("[name=play]").click()
    settle(page)
    assert page.evaluate(f"{HOST}.explorer.state.frame") == 32
    assert page.locator("[name=play]").inner_text() == "Play"


def luminance(rgb) -> float:
    "Relative luminance of WCAG 2."
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in rgb)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, two) -> float:
    "Contrast of two colours, 1 to 21."
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def rgb(page, query: str, key: str) -> list[int]:
    "A computed colour."
    value = page.evaluate(f"getComputedStyle({HOST}.shadowRoot.querySelector('{query}')).{key}")
    return [int(v) for v in re.findall(r"\d+", value)[:3]]


@pytest.mark.parametrize(
    ("scheme", "body", "dark"),
    [
        ("light", "", False),
        ("dark", "", True),
        ("dark", "class=quarto-light", False),
        ("light", "class=quarto-dark", True),
        ("light", "data-jp-theme-light=false", True),
    ],
)
def test_page_is_readable_in_light_and_dark(open_page, scheme, body, dark):
    page = open_page(body=body, color_scheme=scheme)
    settle(page)
    paper = rgb(page, ".frame", "backgroundColor")
    assert (luminance(paper) < 0.1) == dark
    for query in (".frame", "tbody th", "td", "legend", "select", "button", "output"):
        assert contrast(rgb(page, query, "color"), paper) > 7, query
    for query in (".check", ".caption", "thead th"):
        assert contrast(rgb(page, query, "color"), paper) > 4.5, query
    colours = page.evaluate(f"Object.values({HOST}.explorer.page.colours)")
    dots = [[int(pair[dark][i : i + 2], 16) for i in (1, 3, 5)] for pair in colours]
    assert min(contrast(dot, paper) for dot in dots) > (3 if dark else 2)
    corner = pixels(page)[-3, 40].tolist()  # on the line, no density is there
    assert max(abs(a - b) for a, b in zip(corner, paper)) < 60


def test_theme_of_the_site_is_followed_while_it_changes(open_page):
    page = open_page(body="class=quarto-light")
    page.evaluate("document.body.className = 'quarto-dark'")
    page.wait_for_function(f"{HOST}.dataset.theme === 'dark'")
    settle(page)
    assert luminance(rgb(page, ".frame", "backgroundColor")) < 0.1


def test_page_fits_a_phone(open_page):
    page = open_page(width=360)
    for name in SCENES:
        page.select_option("[name=scene]", name)
        settle(page)
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        outside = page.evaluate(
            f"[...{HOST}.shadowRoot.querySelectorAll('input, select, button, canvas, td')]"
            ".filter((node) => node.getBoundingClientRect().right > 360).length"
        )
        assert outside == 0


def test_fallback_is_there_without_scripts(open_page):
    page = open_page(java_script_enabled=False)
    assert "needs JavaScript" in page.locator("body").inner_text().replace("\n", " ")


def test_style_of_the_site_stays_outside(open_page):
    "The page looks the same under a style sheet that wants everything otherwise."
    page = open_page("<style>* { color: red !important; font-size: 40px }</style>" + STORED)
    assert contrast(rgb(page, "td", "color"), rgb(page, ".frame", "backgroundColor")) > 7


def test_a_page_of_ones_own(open_page):
    "Three classes of unequal weight on a line, the last with two components."
    means = torch.tensor([[-1.0], [0.5], [0.0], [1.5]])
    weights = torch.tensor([0.5, 0.2, 0.2, 0.1])
    own = Mixture(means, torch.tensor([0.1, 0.05, 0.02, 0.1]), torch.tensor([0, 2, 1, 2]), weights)
    scenes = {"own": Scene("my own", own, 3.0, n=40)}
    page = open_page(explorer_page(scenes))
    assert shown(page, "nfe") == "126"
    assert float(page.evaluate(f"{HOST}.dataset.difference")) < 1e-10
    assert len(_checked_runs(scenes)) == 7
    page.select_option("[name=c]", "2")
    set_range(page, "scale", 2)
    run = scenes["own"].run(2, "classifier_free_guidance", settings_of("classifier_free_guidance", scale=2))
    expect_numbers(page, scenes["own"], run, 2)


@pytest.mark.parametrize("method", METHOD_CONTROLS)
def test_live_view_shows_what_the_package_computes(method):
    widgets = pytest.importorskip("ipywidgets", reason="ipywidgets is not installed, so no live view was made")
    scene = Scene("pair", gaussian_pair(), 2.6, n=16)
    box = explore({"pair": scene})
    everything = {}

    def collect(node):
        everything[getattr(node, "description", "") or type(node).__name__] = node
        for child in getattr(node, "children", ()):
            collect(child)

    collect(box)
    everything["method"].value = method
    collect(box)
    name = METHOD_CONTROLS[method][0]
    value = CONTROLS[name].low + 3 * CONTROLS[name].step
    before = everything["Image"].value
    everything[CONTROLS[name].label].value = value
    run = scene.run(1, method, settings_of(method, **{name: value}))
    assert f"<td>{run.x.mean():.3f}</td>" in everything["HTML"].value
    assert f"<td>{run.nfe:g}</td>" in everything["HTML"].value
    at_end = everything["Image"].value
    assert before != at_end
    everything["frame"].value = 4
    assert everything["Image"].value != at_end
    assert isinstance(box, widgets.HBox)


def test_live_view_takes_a_model_of_ones_own():
    "Here the exact one on another path, whose samples are the same up to the solver."
    scene = Scene("pair", gaussian_pair(), 2.6, n=64)
    settings = settings_of("classifier_free_guidance", scale=2)
    other = ExactDenoiser(scene.mixture, VPPath("cosine"))
    ours, theirs = (
        scene.run(1, "classifier_free_guidance", settings, steps=64, model=model).x for model in (None, other)
    )
    assert_close(theirs, ours, rtol=0, atol=5e-3)
    assert scene.model("classifier_free_guidance", settings, other).path == other.path


def test_bad_requests_are_one_line(monkeypatch):
    scene = Scene("pair", gaussian_pair(), 2.6, n=4)
    for call, words in (
        (lambda: settings_of("magic"), "method = 'magic'; allowed: 'classifier_free_guidance'"),
        (lambda: settings_of("model_guidance", weight=2), "weight = 2; allowed: 0 to 0.85"),
        (lambda: settings_of("model_guidance", weight=1.5), "weight = 1.5; allowed: 0 to 0.85"),
        (lambda: settings_of("model_guidance", scale=2), "control = 'scale'; allowed: 'weight'"),
        (lambda: scene.run(1, "model_guidance", {"scale": 2}), "control = 'scale'; allowed: 'weight'"),
        (lambda: scene.run(1, "model_guidance", {"weight": 0.5}, "dimd"), "sampler = 'dimd'; allowed: 'ddim'"),
        (lambda: scene.run(5, "model_guidance", {"weight": 0.5}), "c contains 5; allowed: 0 to 1"),
        (lambda: Scene("deep", gaussian_pair(dim=5), 1.0), "dimension of the mixture = 5; allowed: 1 or 2"),
        (lambda: Scene("box", gaussian_pair(dim=3), 2.0), "dimension of the mixture = 3; allowed: 1 or 2"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    with pytest.raises(
        ImportError, match=r"^ipywidgets is not installed, and this needs it: pip install 'guidance_nb\[live\]'$"
    ):
        explore()


def test_live_view_refuses_a_model_of_other_classes():
    pytest.importorskip("ipywidgets", reason="ipywidgets is not installed, so no live view was made")
    three = Mixture(torch.tensor([[-1.0], [0.0], [1.0]]), torch.full((3,), 0.1), torch.arange(3))
    with pytest.raises(ValueError, match="classes of model = 3; allowed: 2, as scene 'pair'"):
        explore({"pair": Scene("pair", gaussian_pair(), 2.6, n=4)}, ExactDenoiser(three, FlowPath()))
