const fixed = (v) => (Array.isArray(v) ? v : [v]).map((w) => w.toFixed(3).replace("-", "−")).join(", ");
const percent = (v) => (100 * v).toFixed(1) + " %";

// Colours of the picture: of the page, of samples, and what density 0 and 1 look like.
function coloursOf(host, page, method) {
  const dark = host.dataset.theme === "dark", style = getComputedStyle(host.shadowRoot.querySelector(".frame"));
  const css = {page: style.backgroundColor, text: style.color, dot: page.colours[method][dark ? 1 : 0]};
  return {css, paper: dark ? [22, 25, 29] : [255, 255, 255], ink: dark ? [255, 255, 255] : [0, 0, 0]};
}

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

// The table of numbers beside those of real points, and one sentence for those who do not see the picture.
function report({page, state, found, run: {nfe}, canvas, root}, real) {
  const table = root.querySelector(".numbers"), status = root.querySelector("[role=status]");
  const lines = [["mean", "mean", fixed], ["standard deviation", "std", fixed], ["NLL in nats", "nll", fixed]];
  lines.push(["outliers", "outliers", percent], ["distance", "distance", fixed]);
  const head = ["at t = 0", "samples", "real points"].map((text) => make("th", {scope: "col"}, text));
  const line = (label, key, ours, theirs) => make("tr", {},
    make("th", {scope: "row"}, label), make("td", {className: key}, ours), make("td", {}, theirs));
  const body = lines.map(([label, key, show]) => line(label, key, show(found[key]), show(real[key])));
  const scale = trueScale(state.method, state.settings).toFixed(2);
  body.push(line("true scale γ", "gamma", scale, ""), line("NFE per sample", "nfe", String(nfe), ""));
  table.replaceChildren(make("table", {}, make("thead", {}, make("tr", {}, ...head)), make("tbody", {}, ...body)));
  const name = page.labels[state.method], {n, label} = page.scenes[state.scene];
  const text = `${n} samples by ${name} at true scale ${scale}: mean ${fixed(found.mean)}, ` +
    `standard deviation ${fixed(found.std)}, ${percent(found.outliers)} outliers, ` +
    `distance ${fixed(found.distance)}, ${nfe} NFE each.`;
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
