// Sampling with the trained networks, off the page's own thread: messages in, steps and predictions out.

const NULL = 10, IMAGES = 9, NEVER_NOISE = 1000 / 1001, FLOW_STEPS = 8, nets = {};
let machine, latest = 0;

const blend = (a, b, scale) => b.map((v, i) => v + scale * (a[i] - v));
const pause = () => new Promise((resolve) => setTimeout(resolve));

// Outputs of one network with and without the digit, in one pass.
function bothOf(net, x, t, digit) {
  const twice = new Float32Array(2 * x.length);
  twice.set(x);
  twice.set(x, x.length);
  const y = net.run(twice, t, [[digit, 1], [NULL, 0]]);
  return [y.slice(0, x.length), y.slice(x.length)];
}

function guidedByBoth(net, x, t, digit, scale) {
  if (scale === 1 || scale === 0) return net.run(x, t, [[scale ? digit : NULL, scale]]);
  return blend(...bothOf(net, x, t, digit), scale);
}

const outputOf = {
  cfg: (x, t, {digit, scale}) => guidedByBoth(nets["mnist-cfg"], x, t, digit, scale),
  aligned: (x, t, {digit, scale}) => guidedByBoth(nets["mnist-aligned-anchored"], x, t, digit, scale),
  aware: (x, t, {digit, scale}) => nets["mnist-mg-aware"].run(x, t, [[digit, scale]]),
};
outputOf.post = outputOf.cfg;

// The gradient of log p(digit | x) as a change of the velocity at scale 1; the page of the method derives it.
function pushOf(x, t, digit) {
  const late = Math.min(t, NEVER_NOISE), share = -late / (1 - late);
  return nets["mnist-classifier"].gradient(x, late, digit).map((g) => share * g);
}

// The predicted image: what the path x = (1 - t) x0 + t eps makes of the velocity eps - x0.
function imageOf(x, t, task) {
  if (task.method !== "classifier") {
    const y = outputOf[task.method](x, t, task);
    return x.map((v, i) => v - t * y[i]);
  }
  const y = nets["mnist-cfg"].run(x, t, [[NULL, 0]]), late = Math.min(t, NEVER_NOISE);
  const push = task.scale ? pushOf(x, t, task.digit) : 0;
  return x.map((v, i) => v - t * y[i] - (push && late * task.scale * push[i]));
}

// The two predictions of the noise whose difference guidance enlarges.
function noisesOf(x, t, {method, digit}) {
  const name = {aware: "mnist-mg-aware", aligned: "mnist-aligned-anchored"}[method] ?? "mnist-cfg";
  let towards, away;
  if (method === "classifier") {
    away = nets[name].run(x, t, [[NULL, 0]]);
    const push = pushOf(x, t, digit);
    towards = away.map((v, i) => v + push[i]);
  } else [towards, away] = bothOf(nets[name], x, t, digit);
  return [towards, away].map((y) => y.map((v, i) => x[i] + (1 - t) * v));
}

// DPM-Solver++(2M) from t = 1 to 0 (the page on samplers, eq. 4); yields the samples after each step.
function* solve(task) {
  const {steps} = task, ratio = (t) => Math.log(t / (1 - t));
  let x = noise(task.seed, 784 * IMAGES), before;
  for (let i = 0; i < steps; i++) {
    const [t, s] = [1 - i / steps, 1 - (i + 1) / steps], x0 = imageOf(x, t, task), h = ratio(t) - ratio(s);
    const more = before && s > 0 ? h / (2 * before.h) : 0;
    const [keep, add] = [s / t, -(1 - s) * Math.expm1(-h)];
    x = x.map((v, k) => keep * v + add * (x0[k] + (more && more * (x0[k] - before.x0[k]))));
    before = {x0, h};
    yield x;
  }
  if (task.method !== "post") return;
  for (let i = 0; i < FLOW_STEPS; i++) {  // Heun's steps along the correction
    const at = (z, tau) => nets["mnist-post"].run(z, tau, [[task.digit, 1]]), h = 1 / FLOW_STEPS;
    const u = at(x, i * h), v = at(x.map((w, k) => w + h * u[k]), (i + 1) * h);
    x = x.map((w, k) => w + h * (u[k] + v[k]) / 2);
    yield x;
  }
}

const hex = (buffer) => [...new Uint8Array(buffer)].map((b) => b.toString(16).padStart(2, "0")).join("");

// The weights of a name, or an error in one line.
async function load({name, url, sha256}) {
  if (nets[name]) return;
  const answer = await fetch(url, {cache: "no-cache"}).catch(() => ({ok: false, status: "no answer"}));
  if (!answer.ok) throw new Error(`The weights of ${name} are missing (${answer.status}): ${url}`);
  const damaged = new Error(`The weights of ${name} are damaged: ${url}`);
  let data = await answer.arrayBuffer();
  try {
    if (new Uint8Array(data)[0] === 0x1F) {  // unless the server has unpacked them
      data = await new Response(new Blob([data]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
    }
    if (crypto.subtle && hex(await crypto.subtle.digest("SHA-256", data)) !== sha256) throw damaged;
    nets[name] = new (name === "mnist-classifier" ? Classifier : UNet)(machine, readTensors(data));
  } catch (error) { throw damaged; }
}

const handlers = {
  setup({kernels}) { machine = new Machine(new WebAssembly.Module(kernels[hasSimd() ? 0 : 1])); },
  load,
  async sample(task) {
    latest = task.id;
    let step = 0;
    await pause();
    if (latest !== task.id) return {stopped: true};
    for (const x of solve(task)) {
      postMessage({id: task.id, step: ++step, x});
      await pause();
      if (latest !== task.id) return {stopped: true};
    }
  },
  noises: ({x, t, task}) => ({pair: noisesOf(x, t, task)}),
  run({name, x, t, conditions}) { return {y: nets[name].run(x, t, conditions)}; },
  gradient({x, t, digit}) { return {y: nets["mnist-classifier"].gradient(x, t, digit)}; },
  noise: ({seed}) => ({x: noise(seed, 784 * IMAGES)}),
};

onmessage = async ({data}) => {
  try {
    postMessage({...await handlers[data.kind](data), id: data.id, done: true});
  } catch (error) { postMessage({id: data.id, error: error.message, done: true}); }
};
