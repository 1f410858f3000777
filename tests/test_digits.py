"The page of digits in a real browser: what its networks compute is what the package computes."

import base64
import functools
import http.server
import io
import json
import os
import re
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

import guidance_nb as gnb
import kernels
from guidance_nb._random import keyed_noise
from guidance_nb.classifier_guidance import class_gradient
from guidance_nb.denoisers import count_nfe
from guidance_nb.explorer import digits_page
from guidance_nb.explorer._digits import methods
from notebooks import ROOT, cells, text

HOST = "document.querySelector('.guidance-digits')"


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    "The page and the weights, served as a site would."
    folder = tmp_path_factory.mktemp("site")
    inside = digits_page(folder / "digits")
    (folder / "book.html").write_text(f"<!doctype html><html lang=en><meta charset=utf-8><body>{inside}")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def open_page(chromium, site):
    "Opens the page, and fails on errors of its program and on requests elsewhere."
    contexts, errors, requests = [], [], []

    def opened(where: str = "/digits/index.html", width: int = 1000, **options):
        context = chromium.new_context(viewport={"width": width, "height": 900}, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        context.on("request", lambda request: requests.append(request.url))
        page.goto(site[1] + where)
        page.requests = requests
        return page

    yield opened
    for context in contexts:
        context.close()
    assert errors == [] and all(url.startswith((site[1], "blob:", "data:")) for url in requests)


def finished(page, **task) -> dict:
    "Wait until the samples of a task are there."
    wanted = json.dumps(task)
    page.wait_for_function(
        f"(() => {{ const done = JSON.parse({HOST}.dataset.finished ?? 'null'), wanted = {wanted};"
        "return done && Object.keys(wanted).every((k) => done[k] === wanted[k]); })()",
        timeout=120_000,
    )
    return json.loads(page.evaluate(f"{HOST}.dataset.finished"))


def load(page):
    page.locator("[name=load]").click()


@pytest.fixture(scope="module")
def ready(chromium, site):
    "One page for many tests, with all networks loaded."
    page = chromium.new_page()
    page.goto(f"{site[1]}/digits/index.html")
    page.select_option("[name=steps]", "5")
    for method in methods():
        page.select_option("[name=method]", method)
        if page.locator("[name=load]").is_visible():
            load(page)
        finished(page, method=method)
    yield page
    page.close()


def call(page, kind: str, **given) -> dict:
    "What the worker of the page answers; arrays come as lists."
    for name, value in given.items():
        given[name] = value.flatten().tolist() if isinstance(value, torch.Tensor) else value
    code = f"""async (words) => {{
      const [kind, given] = JSON.parse(words);
      if (given.x) given.x = Float32Array.from(given.x);
      const answer = await {HOST}.digits.call(kind, given);
      return JSON.stringify(Object.fromEntries(Object.entries(answer).map(([k, v]) => [k, v.length ? [...v] : v])));
    }}"""
    return json.loads(page.evaluate(code, json.dumps([kind, given])))


def numbers(page, expression: str) -> list:
    "What JavaScript gives, as JSON: the driver looks at each number of its own many times."
    return json.loads(page.evaluate(f"JSON.stringify({expression})"))


def as_images(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 28, 28)


def test_still_picture_is_what_the_first_samples_are():
    "A committed file, drawn by the package; nothing else is shown before the network is asked for."
    still = Image.open(io.BytesIO(base64.b64decode(re.search(r'"still": "([^"]+)"', digits_page())[1])))
    model = gnb.ClassifierFreeGuidance(gnb.load("mnist-cfg"), 3.0)
    x = gnb.sample(model, torch.full((9,), 3), (1, 28, 28), "dpmpp_2m", 20, seed=0, progress=False)
    ours = ((x.clamp(-1, 1) + 1) * 127.5).reshape(3, 3, 28, 28).transpose(1, 2).reshape(84, 84)
    assert_close(torch.tensor(np.asarray(still)).float(), ours, rtol=0, atol=1.0)


def test_page_is_small_and_fetches_nothing_before_it_is_asked(open_page, site):
    assert sum(file.stat().st_size for file in (site[0] / "digits").iterdir()) <= 6e6
    page = open_page("/book.html")
    page.wait_for_function(f"{HOST}.digits.canvas.getContext('2d').getImageData(20, 10, 1, 1).data[3] === 255")
    assert [url for url in page.requests if not url.startswith(("data:", "blob:"))] == [f"{site[1]}/book.html"]
    assert page.locator("[name=load]").inner_text() == "Load mnist-cfg (1.4 MB)"
    load(page)
    finished(page, digit=3)
    assert sum(url.endswith(".bin") for url in page.requests) == 1


def test_noise_is_that_of_the_package(ready):
    for seed in (0, 1, 9999):
        ours = keyed_noise(seed, 0, (9, 1, 28, 28))
        assert_close(as_images(call(ready, "noise", seed=seed)["x"]), ours, rtol=0, atol=1e-6)


@pytest.mark.parametrize("t", [1.0, 0.55, 0.0])
@pytest.mark.parametrize("name", ["mnist-cfg", "mnist-aligned-anchored", "mnist-mg-aware", "mnist-post"])
def test_networks_compute_what_torch_computes(ready, name, t):
    "With and without a digit in one pass, and for the scale-aware one at a scale."
    x, labels, scales = keyed_noise(5, 0, (4, 1, 28, 28)), torch.tensor([7, 7, 10, 10]), torch.tensor([2.5, 2.5, 0, 0])
    found = call(ready, "run", name=name, x=x, t=t, conditions=[[7, 2.5], [10, 0]])["y"]
    model, given = gnb.load(name), (x, torch.full((4,), t), labels)
    with torch.no_grad():
        ours = model.net(*given, scales) if name == "mnist-mg-aware" else model.net(*given)
    ours = ours * getattr(model, "spread", 1)
    assert_close(as_images(found), ours, rtol=0, atol=1e-4)
    assert ours.abs().max() > 0.1


@pytest.mark.parametrize("t", [0.999, 0.6, 0.05])
def test_gradient_of_the_classifier_is_that_of_autograd(ready, t):
    x = keyed_noise(6, 0, (5, 1, 28, 28))
    ours = class_gradient(gnb.load("mnist-classifier"), x, t, torch.full((5,), 4))
    found = as_images(call(ready, "gradient", x=x, t=t, digit=4)["y"])
    assert_close(found, ours, rtol=0, atol=1e-4 * ours.abs().max().item())


@pytest.mark.parametrize(("method", "scale"), [*((name, 2.5) for name in methods()), ("cfg", 1), ("classifier", 1)])
def test_samples_are_those_of_the_lines_in_python(ready, method, scale):
    "All steps, by the very lines that the page shows; at every step within 1e-3."
    page = ready
    page.select_option("[name=method]", method)
    page.select_option("[name=steps]", "5")
    page.locator("[name=seed]").fill("7")
    page.locator("[name=scale]").fill(str(scale))
    page.select_option("[name=digit]", "8")
    finished(page, method=method, scale=scale, digit=8, steps=5, seed=7)
    frames = [as_images(x) for x in numbers(page, f"{HOST}.digits.frames.map((x) => [...x])")]
    code, steps = page.locator("pre").inner_text(), []
    silent = "progress=False, callback=lambda step, t, x: steps.append(x))"
    with count_nfe() as count:
        exec(code.replace("seed=7)", f"seed=7, {silent}"), names := {"steps": steps})
    for ours, found in zip(steps[1:], frames[:5], strict=True):
        assert_close(found, ours, rtol=0, atol=1e-3)
    assert_close(frames[-1], names["x"], rtol=0, atol=1e-3)
    assert f" {count.total // 9} NFE each" in page.locator("[role=status]").inner_text()
    assert len(frames) == 5 + 8 * (method == "post")
    step = page.evaluate(f"{HOST}.digits.pair.step")
    towards, away = numbers(page, f"[{HOST}.digits.pair.towards, {HOST}.digits.pair.away].map((x) => [...x])")
    x, t, c = steps[step], torch.tensor(1 - step / 5), names["c"]
    model = getattr(names["model"], "model", names["model"])
    e_u = model(x, t, None).eps
    e_c = (
        gnb.ClassifierGuidance(model, names["model"].classifier, 1.0)(x, t, c).eps
        if method == "classifier"
        else (model(x, t, c).eps)
    )
    assert_close(as_images(towards), e_c, rtol=0, atol=1e-3)
    assert_close(as_images(away), e_u, rtol=0, atol=1e-3)


def test_digits_are_quick_and_input_is_never_blocked(ready, chromium):
    "Nine digits in 20 steps take 8 s of a processor at most; meanwhile the page's own thread has no task of 100 ms."
    page, system = ready, chromium.new_browser_cdp_session()

    def seconds() -> float:
        found = system.send("SystemInfo.getProcessInfo")["processInfo"]
        return sum(process["cpuTime"] for process in found if process["type"] == "renderer")

    page.evaluate("""() => { window.waits = []; let last = performance.now();
      window.beat = setInterval(() => { const now = performance.now(); waits.push(now - last); last = now; }, 10); }""")
    for name, value in (("method", "cfg"), ("steps", "20")):
        page.select_option(f"[name={name}]", value)
    page.locator("[name=scale]").fill("3")
    before = seconds()
    page.locator("[name=seed]").fill("2")
    finished(page, seed=2, scale=3, method="cfg", steps=20)
    assert 0.1 < seconds() - before <= 8
    waits = page.evaluate("clearInterval(beat), waits")
    held = sum(wait for wait in waits if wait > 100)  # a busy machine may hold the thread up by itself now and then
    assert len(waits) > 20 and held < 0.25 * sum(waits)


def test_only_the_last_wish_is_finished(ready):
    page = ready
    page.select_option("[name=method]", "cfg")
    page.select_option("[name=steps]", "20")
    for scale in range(0, 8):
        page.locator("[name=scale]").fill(str(scale))
    finished(page, scale=7)
    assert page.evaluate(f"Object.keys({HOST}.digits.calls).length") == 0
    assert "scale 7" in page.locator("canvas.result").get_attribute("aria-label")


def test_noise_level_moves_the_predictions(ready):
    page = ready
    page.select_option("[name=steps]", "5")
    page.select_option("[name=digit]", "2")
    finished(page, steps=5, digit=2)
    level = page.locator("[name=level]")
    for step in (0, 4):
        level.fill(str(step))
        page.wait_for_function(f"{HOST}.digits.pair.step === {step} && !{HOST}.digits.looking")
        assert page.locator("output.level").inner_text() == f"t = {1 - step / 5:.2f}"
        x = as_images(numbers(page, f"[...{HOST}.digits.pair.x]"))
        if step == 0:
            assert_close(x, keyed_noise(page.evaluate(f"{HOST}.digits.state.seed"), 0, x.shape), rtol=0, atol=1e-6)
    assert f"t = {1 / 5:.2f}" in page.locator(".check").inner_text()


def test_missing_and_damaged_weights_are_one_line(open_page, site):
    folder = site[0] / "bad"
    shutil.copytree(site[0] / "digits", folder)
    (folder / "mnist-cfg.bin").unlink()
    page = open_page("/bad/index.html")
    for content in (None, b"", b"\x1f\x8b not packed", (site[0] / "digits" / "mnist-post.bin").read_bytes()):
        if content is not None:
            (folder / "mnist-cfg.bin").write_bytes(content)
            os.utime(folder / "mnist-cfg.bin", (len(content),) * 2)
        load(page)
        word = "missing (404)" if content is None else "damaged"
        page.wait_for_function(f"{HOST}.shadowRoot.querySelector('[role=status]').textContent.includes('{word}')")
        said = page.locator("[role=status].wrong").inner_text()
        assert said == f"The weights of mnist-cfg are {word}: {site[1]}/bad/mnist-cfg.bin"
    shutil.copy(site[0] / "digits" / "mnist-cfg.bin", folder)
    load(page)
    finished(page, digit=3)
    page.locator("[name=seed]").fill("-1")
    assert page.locator("[role=status].wrong").inner_text() == "Seed: a whole number from 0 to 9999."


def test_browser_without_simd_gets_the_plain_kernels(site, open_page):
    page = open_page()
    page.evaluate(f"{HOST}.digits.page.worker = {HOST}.digits.page.worker.replace('hasSimd() ?', 'false ?')")
    page.select_option("[name=steps]", "5")
    load(page)
    finished(page, steps=5)
    model = gnb.ClassifierFreeGuidance(gnb.load("mnist-cfg"), 3.0)
    x = gnb.sample(model, torch.full((9,), 3), (1, 28, 28), "dpmpp_2m", 5, seed=0, progress=False)
    assert_close(as_images(numbers(page, f"[...{HOST}.digits.frames.at(-1)]")), x, rtol=0, atol=1e-3)


def test_keyboard_and_names(open_page):
    "Everything is reached by the tab key and has a name, and Enter loads the network."
    page, reached = open_page(), []
    page.select_option("[name=steps]", "5")
    for _ in range(12):
        page.keyboard.press("Tab")
        name = page.evaluate(f"{HOST}.shadowRoot.activeElement?.name ?? ''")
        reached.append(name)
        if name == "load":
            page.keyboard.press("Enter")
            finished(page, digit=3)
            page.locator("[name=seed]").focus()
        if name == "scale":
            page.keyboard.press("ArrowRight")
    assert {"digit", "method", "steps", "seed", "load", "scale", "level"} <= set(reached)
    finished(page, scale=3.25)
    for node in page.locator("input, select").all():
        assert node.evaluate("(node) => node.labels.length === 1 && node.labels[0].textContent.trim() !== ''")
    assert page.locator("canvas:not([aria-label])").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_page_fits_a_phone_and_is_readable(open_page, scheme):
    page = open_page(width=390, color_scheme=scheme, has_touch=True, is_mobile=True)
    page.select_option("[name=steps]", "5")
    page.locator("[name=load]").tap()
    finished(page, digit=3)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    outside = page.evaluate(
        f"[...{HOST}.shadowRoot.querySelectorAll('input, select, button, canvas, pre')]"
        ".filter((node) => node.getBoundingClientRect().right > 390).length"
    )
    assert outside == 0
    for node in page.locator("select:visible, button:visible, input:visible").all():
        assert node.bounding_box()["height"] >= 44  # a finger's width
    slider = page.locator("[name=scale]").bounding_box()
    assert slider["y"] + slider["height"] <= 844  # below the picture, on one screen with it
    paper = page.evaluate(f"getComputedStyle({HOST}.shadowRoot.querySelector('.frame')).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", paper)[:3])) < 200) == (scheme == "dark")


def test_stored_page_is_the_one_the_package_makes():
    stored = [
        text(output["data"]["text/html"])
        for cell in cells(ROOT / "nbs" / "29_digits.ipynb")
        for output in cell.get("outputs", [])
        if "guidance-digits" in text(output.get("data", {}).get("text/html", ""))
    ]
    assert stored == [digits_page()]


def test_kernels_are_built_from_their_source(tmp_path):
    "The committed files have the functions of the source; where clang is, they are rebuilt and compute the same."
    source = (ROOT / "guidance_nb" / "explorer" / "kernels.c").read_text()
    for name in kernels.NAMES:
        assert f"void {name}(" in source
        for file in kernels.BUILDS:
            assert name.encode() in (kernels.FOLDER / file).read_bytes()
    if shutil.which("clang") is None or shutil.which("wasm-ld") is None:
        pytest.skip("no clang with wasm-ld on this machine, so the kernels were not built again")
    kernels.build(tmp_path)
    assert all((tmp_path / file).stat().st_size > 1000 for file in kernels.BUILDS)
