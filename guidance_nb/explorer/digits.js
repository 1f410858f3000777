// The page of digits: a still picture, then controls that sample with trained networks in a worker.

const STEPS = [5, 10, 20, 30, 50], PARTS = ["x_t", "e_c", "e_u", "e_c − e_u"];
const bytesOf = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));

// Nine images in a square of three by three; `colour` gives red, green and blue of a number.
function paint(canvas, x, colour) {
  const context = canvas.getContext("2d"), image = context.createImageData(84, 84);
  x.forEach((value, i) => {
    const n = Math.floor(i / 784), row = Math.floor(n / 3) * 28 + Math.floor(i % 784 / 28);
    image.data.set([...colour(value), 255], 4 * (row * 84 + n % 3 * 28 + i % 28));
  });
  context.putImageData(image, 0, 0);
}

const greys = (low, high) => (v) => Array(3).fill(255 * (v - low) / (high - low));
// White at 0, red above, blue below.
const signed = (most) => (v) => {
  const rest = 255 * (1 - Math.min(1, Math.abs(v) / most));
  return v > 0 ? [255, rest, rest] : [rest, rest, 255];
};

class Digits {
  constructor(host, page) {
    Object.assign(this, {host, page, root: host.attachShadow({mode: "open"}), calls: {}, id: 0, frames: []});
    this.root.innerHTML = `<style>${page.css}</style><div class="frame">${page.html}</div>`;
    this.state = {digit: 3, method: "cfg", steps: 20, seed: 0, scale: 3, level: 0.6};
    this.canvas = this.find(".result");
  }

  find(query) { return this.root.querySelector(query); }

  get method() { return this.page.methods[this.state.method]; }

  say(text, wrong = false) {
    const status = this.find("[role=status]");
    status.textContent = text;
    status.classList.toggle("wrong", wrong);
  }

  // Ask the worker; `onStep` hears of steps on the way.
  call(kind, data, onStep) {
    const id = ++this.id;
    this.worker.postMessage({...data, kind, id});
    return new Promise((resolve, reject) => { this.calls[id] = {resolve, reject, onStep}; });
  }

  listenToWorker() {
    this.worker = new Worker(URL.createObjectURL(new Blob([this.page.worker], {type: "text/javascript"})));
    this.worker.onmessage = ({data}) => {
      const {resolve, reject, onStep} = this.calls[data.id];
      if (!data.done) return onStep(data);
      delete this.calls[data.id];
      return data.error ? reject(new Error(data.error)) : resolve(data);
    };
    return this.call("setup", {kernels: this.page.kernels.map(bytesOf)});
  }

  get task() {
    const {digit, method, steps, seed, scale} = this.state;
    return {digit, method, steps, seed, scale};
  }

  // The weights that the method needs and that are not here yet.
  get missing() { return this.method.models.filter((name) => !this.host.dataset.loaded?.split(" ").includes(name)); }

  // Fetch what is missing, when asked.
  async load() {
    const names = this.missing;
    this.say(`Fetching ${names.join(" and ")}.`);
    try {
      this.ready ??= this.listenToWorker();
      await this.ready;
      for (const name of names) {
        const {sha256} = this.page.models[name], url = new URL(`${this.page.folder}${name}.bin`, document.baseURI).href;
        await this.call("load", {name, url, sha256});
        this.host.dataset.loaded = [this.host.dataset.loaded, name].filter(Boolean).join(" ");
      }
    } catch (error) { return this.say(error.message, true); }
    return this.sample();
  }

  // Sample anew with what the controls say, once the worker has finished its step; the last wish counts.
  async sample() {
    this.offer();
    if (this.missing.length) return;
    const {task} = this, began = performance.now(), frames = [];
    const wish = this.wish = {};
    const onStep = ({step, x}) => {
      frames.push(x);
      if (this.wish !== wish) return;
      paint(this.canvas, x, greys(-1, 1));
      this.say(`Step ${step} of ${task.steps + this.method.extra}.`);
    };
    try {
      const {stopped} = await this.call("sample", task, onStep);
      if (stopped || this.wish !== wish) return;
    } catch (error) { return this.say(error.message, true); }
    Object.assign(this, {frames, shownTask: task});
    const seconds = ((performance.now() - began) / 1000).toFixed(1), text = `Nine samples of the digit ${task.digit} ` +
      `by ${this.method.label}, scale ${task.scale}, ${this.nfe} NFE each, in ${seconds} s.`;
    this.say(text);
    this.canvas.setAttribute("aria-label", text);
    await this.look();
    this.host.dataset.finished = JSON.stringify(task);
  }

  // Network evaluations per sample.
  get nfe() {
    const {method, steps, scale} = this.state, one = method === "aware" || scale === 0;
    return steps * (one || (scale === 1 && method !== "classifier") ? 1 : 2) + 2 * this.method.extra;
  }

  // Show the predictions at the noise level that the slider says; one request at a time, the last wish counts.
  async look() {
    this.again = true;
    if (this.looking || !this.shownTask) return;
    this.looking = true;
    try {
      while (this.again) {
        this.again = false;
        await this.lookOnce();
      }
    } catch (error) { this.say(error.message, true); }
    this.looking = false;
  }

  async lookOnce() {
    const {frames, shownTask: task, state} = this, level = this.find("[name=level]"), shown = this.find(".level");
    const step = Math.min(task.steps - 1, Math.round((1 - state.level) * task.steps)), t = 1 - step / task.steps;
    Object.assign(level, {max: task.steps - 1, value: step});
    shown.textContent = `t = ${t.toFixed(2)}`;
    level.setAttribute("aria-valuetext", shown.textContent);
    const x = step ? frames[step - 1] : (await this.call("noise", {seed: task.seed})).x;
    const {pair: [towards, away]} = await this.call("noises", {x, t, task});
    const gap = towards.map((v, i) => v - away[i]), most = gap.reduce((m, v) => Math.max(m, Math.abs(v)), 1e-6);
    this.find(".way").hidden = false;
    [x, towards, away].forEach((part, i) => paint(this.parts[i], part, greys(...(i ? [-3, 3] : [-2, 2]))));
    paint(this.parts[3], gap, signed(most));
    this.pair = {step, x, towards, away};
    this.find(".check").textContent = `${this.method.pair} Largest difference at t = ${t.toFixed(2)}: ${most.toFixed(2)}.`;
  }

  // Labels, the button and the Python lines for the chosen method.
  offer() {
    const {state, missing, method, page} = this, button = this.find("[name=load]"), [low, high] = method.range;
    const range = this.find("[name=scale]");
    state.scale = Math.min(high, Math.max(low, state.scale));
    Object.assign(range, {min: low, max: high, value: state.scale});
    range.parentNode.querySelector("span").textContent = method.scale;
    this.find(".scale").textContent = state.scale.toFixed(2);
    const size = missing.reduce((sum, name) => sum + page.models[name].bytes, 0) / 1e6;
    button.hidden = missing.length === 0;
    button.textContent = `Load ${missing.join(" and ")} (${size.toFixed(1)} MB)`;
    this.find("code").textContent = method.python.replace(/\{(\w+)\}/g, (_, name) => state[name]);
    if (missing.length && !this.wish) this.say("A still picture. The network is fetched when you ask for it.");
    else if (missing.length) this.say(`This method needs ${missing.join(" and ")}.`);
  }

  menu(name, pairs) {
    const menu = this.find(`[name=${name}]`);
    menu.replaceChildren(...pairs.map(([value, text]) => make("option", {value}, String(text))));
    menu.value = this.state[name];
    menu.addEventListener("input", () => {
      this.state[name] = name === "method" ? menu.value : Number(menu.value);
      this.sample();
    });
  }

  theme() { this.host.dataset.theme = isDark() ? "dark" : "light"; }

  listen() {
    const {state, page} = this, [seed, scale, level] = ["seed", "scale", "level"].map((n) => this.find(`[name=${n}]`));
    this.menu("digit", Array.from({length: 10}, (_, k) => [k, k]));
    this.menu("method", Object.entries(page.methods).map(([name, {label}]) => [name, label]));
    this.menu("steps", STEPS.map((n) => [n, n]));
    seed.value = state.seed;
    seed.addEventListener("input", () => {
      if (!seed.checkValidity() || seed.value === "") return this.say("Seed: a whole number from 0 to 9999.", true);
      state.seed = Number(seed.value);
      return this.sample();
    });
    scale.addEventListener("input", () => { state.scale = Number(scale.value); this.sample(); });
    level.addEventListener("input", () => {
      state.level = 1 - Number(level.value) / (this.shownTask ?? state).steps;
      this.look();
    });
    this.find("[name=load]").addEventListener("click", () => this.load());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.theme());
    const watched = {attributes: true, attributeFilter: ["class", "data-jp-theme-light"]};
    new MutationObserver(() => this.theme()).observe(document.body, watched);
  }

  mount() {
    this.host.digits = this;
    this.parts = PARTS.map((name) => make("canvas", {width: 84, height: 84}));
    this.parts.forEach((canvas, i) => {
      canvas.setAttribute("role", "img");
      canvas.setAttribute("aria-label", `${PARTS[i]} of the nine samples`);
    });
    this.find(".parts").append(...this.parts.map((c, i) => make("figure", {}, c, make("figcaption", {}, PARTS[i]))));
    this.canvas.setAttribute("aria-label", this.page.alt);
    const still = new Image();
    still.onload = () => this.wish ?? this.canvas.getContext("2d").drawImage(still, 0, 0);
    still.src = `data:image/png;base64,${this.page.still}`;
    this.listen();
    this.theme();
    this.offer();
  }
}

for (const host of document.querySelectorAll(".guidance-digits")) {
  if (!host.shadowRoot) new Digits(host, PAGE).mount();
}
