// The page itself: controls, what happens when they move, and the first picture.

const CAPTIONS = [
  "From noise, t = 1, on the left to data. Grey: the exact density at each time. Right: p(x | c), and the samples.",
  "Grey: the exact density at this time. Colour: samples, and the way of some of them.",
];
const STEPS = [4, 8, 16, 32, 64];

class Explorer {
  constructor(host, page) {
    Object.assign(this, {host, page, root: host.attachShadow({mode: "open"}), kept: {}, timer: 0, unsolved: true});
    this.root.innerHTML = `<style>${page.css}</style><div class="frame">${page.html}</div>`;
    this.canvas = this.find("canvas");
    [this.time, this.play] = [this.find("[name=frame]"), this.find("[name=play]")];
    const [first, {real}] = Object.entries(page.scenes)[0], method = "classifier_free_guidance";
    this.state = {scene: first, c: real.length - 1, method, sampler: "heun", steps: 32, frame: 32};
    this.values = Object.fromEntries(Object.entries(page.controls).map(([name, control]) => [name, control[4]]));
  }

  find(query) { return this.root.querySelector(query); }

  get scene() { return this.page.scenes[this.state.scene]; }

  get lastFrame() { return this.run.points.length - 1; }

  // For the curious, and the tests, in the browser's console.
  result() { return {run: this.run, found: this.found}; }

  settings() {
    const s = Object.fromEntries(this.page.methods[this.state.method].map((name) => [name, this.values[name]]));
    return s.last === undefined ? s : {...s, last: Math.max(s.first, s.last)};
  }

  // Sample anew, and say the numbers of the finished samples.
  solve() {
    const {state, scene} = this, atEnd = !this.run || state.frame >= this.lastFrame;
    state.settings = this.settings();
    this.run = simulate(scene, state, scene.noise);
    state.frame = atEnd ? this.lastFrame : Math.min(state.frame, this.lastFrame);
    this.found = numbersOf(scene, this.run.points.at(-1), state.c);
    const real = this.kept[state.scene + state.c] ??= numbersOf(scene, scene.real[state.c], state.c);
    report(this, {...real, distance: scene.baseline[state.c]});
  }

  // Show the moment that the time slider says.
  draw() {
    const {state, scene, run, host, kept} = this, t = run.times[state.frame];
    const look = coloursOf(host, this.page, state.method);
    const key = ["p", state.scene, state.c, scene.mix.d === 1 || t, host.dataset.theme].join();
    this.find(".caption").textContent = CAPTIONS[scene.mix.d - 1];
    paint(this.canvas, scene, state, run, kept[key] ??= densityCanvas(scene, state.c, t, look), look.css);
    Object.assign(this.time, {max: this.lastFrame, value: state.frame});
    const moved = state.frame > state.steps ? "moved to real points" : `t = ${t.toFixed(2)}`;
    this.time.setAttribute("aria-valuetext", this.find(".time output").textContent = moved);
  }

  // Draw at the next refresh of the screen, after solving anew if a control asked for that.
  show(again) {
    this.unsolved ||= again;
    this.pending ??= requestAnimationFrame(() => {
      this.pending = undefined;
      if (this.unsolved) this.solve();
      this.unsolved = false;
      this.draw();
    });
  }

  stop() {
    clearInterval(this.timer);
    this.timer = 0;
    this.play.textContent = "Play";
  }

  step() {
    this.state.frame = this.state.frame >= this.lastFrame ? 0 : this.state.frame + 1;
    this.show(false);
  }

  // Play from noise to data; whoever asked for less motion gets the end at once.
  start() {
    const {state} = this, calm = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (calm) { state.frame = this.lastFrame; return this.show(false); }
    if (state.frame >= this.lastFrame) state.frame = 0;
    this.play.textContent = "Pause";
    this.timer = setInterval(() => (state.frame >= this.lastFrame ? this.stop() : this.step()), 2400 / state.steps);
  }

  theme() {
    this.host.dataset.theme = isDark() ? "dark" : "light";
    if (this.run) this.show(false);
  }

  // A menu that writes the state; `pairs` of values and texts replace its options.
  menu(name, pairs, onInput) {
    const menu = this.find(`[name=${name}]`);
    if (pairs) menu.replaceChildren(...pairs.map(([value, text]) => make("option", {value}, text)));
    menu.value = this.state[name];
    menu.addEventListener("input", () => { onInput(menu.value); this.show(true); });
  }

  classMenu() {
    const menu = this.find("[name=c]");
    this.state.c = Math.min(this.state.c, this.scene.real.length - 1);
    menu.replaceChildren(...this.scene.real.map((_, k) => make("option", {value: k}, String(k))));
    menu.value = this.state.c;
  }

  // The controls of the method.
  knobs() {
    const {page, values} = this;
    const knob = (name) =>
      makeControl(name, page.controls[name], values[name], (v) => { values[name] = v; this.show(true); });
    this.find("fieldset").replaceChildren(make("legend", {}, "Guidance"), ...page.methods[this.state.method].map(knob));
  }

  listen() {
    const {page, state} = this, labels = Object.entries(page.scenes).map(([name, {label}]) => [name, label]);
    const methods = Object.keys(page.methods).map((name) => [name, page.labels[name]]);
    this.classMenu();
    this.menu("scene", labels, (v) => { state.scene = v; this.classMenu(); });
    this.menu("method", methods, (v) => { state.method = v; this.knobs(); });
    this.menu("steps", STEPS.map((n) => [n, String(n)]), (v) => { state.steps = Number(v); });
    this.menu("c", null, (v) => { state.c = Number(v); });
    this.menu("sampler", null, (v) => { state.sampler = v; });
    this.time.addEventListener("input", () => { this.stop(); state.frame = Number(this.time.value); this.show(false); });
    this.play.addEventListener("click", () => (this.timer ? this.stop() : this.start()));
    this.find("[name=step]").addEventListener("click", () => { this.stop(); this.step(); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.theme());
    const watched = {attributes: true, attributeFilter: ["class", "data-jp-theme-light"]};
    new MutationObserver(() => this.theme()).observe(document.body, watched);
    new ResizeObserver(() => this.run && this.show(false)).observe(this.canvas);
  }

  mount() {
    this.host.explorer = Object.assign(this, {simulate, numbersOf, densityPixels});
    this.listen();
    this.theme();
    this.knobs();
    this.solve();
    this.unsolved = false;
    this.draw();
    this.host.dataset.difference = largestDifference(this.page).toExponential(0);
    this.find(".check").textContent = `Checked now: in ${this.page.checks.length} runs, this browser's end points and ` +
      `those of guidance_nb differ by at most ${this.host.dataset.difference}.`;
  }
}

Object.values(PAGE.scenes).forEach(unpackScene);
for (const host of document.querySelectorAll(".guidance-explorer")) {
  if (!host.shadowRoot) new Explorer(host, PAGE).mount();
}
