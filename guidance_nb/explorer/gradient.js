// The classifier of noisy digits, and the gradient of its log-probability, for classifier guidance.

class Classifier extends UNet {
  constructor(machine, tensors) {
    const renamed = ([name, tensor]) => [name.replace("encoder.norm", "net.net.norm").replace("encoder", "net"), tensor];
    super(machine, Object.fromEntries(Object.entries(tensors).map(renamed)));
  }

  ask(time) { return [silu(this.clock(time))]; }

  // The filters of a convolution backwards: inputs and outputs exchanged, taps in reverse, no bias.
  backwards(name) {
    return this.layers[`${name} backwards`] ??= (() => {
      const {shape: [out, input, side], values} = this.tensors[`net.net.${name}.weight`], taps = side * side;
      const full = input + 7 & ~7, packed = new Float32Array(full * out * taps);
      values.forEach((value, i) => {
        const o = Math.floor(i / (input * taps)), c = Math.floor(i / taps) % input, tap = taps - 1 - i % taps;
        packed[(((c >> 3) * taps + tap) * out + o) * 8 + (c & 7)] = value;
      });
      const {machine} = this;
      return {weight: machine.put(packed), bias: machine.put(new Float32Array(full)), input: out, side, out: full};
    })();
  }

  // The gradient of a convolution's input, of the gradient `g` of its output; `add` is added.
  unconvolve(name, g, to, add = 0) {
    const {machine, images} = this, {weight, bias, input, side, out} = this.backwards(name);
    const from = side === 1 ? g.at : this.enlarge(g).at;
    const {starts, taps, pixels} = machine.geometry(images, g.height, g.width, input, side, 1);
    const at = machine.place(to, pixels * out);
    machine.kernels.convolve(from, weight, bias, add, at, starts, pixels, taps, side * side, input, out);
    return {...g, at, channels: out};
  }

  unnormalise(name, x, g, to, {film = 0, add = 0} = {}) {
    const {machine, images} = this, pixels = x.height * x.width, at = machine.place(to, images * pixels * x.channels);
    const [gamma, beta] = ["weight", "bias"].map((part) => this.vector(`${name}.${part}`));
    machine.kernels.differentiate(x.at, g.at, add, at, gamma, beta, film, images, pixels, x.channels, GROUPS);
    return {...x, at};
  }

  unblock(name, {x, inside, film}, g) {
    const short = `net.net.${name}.conv_shortcut.weight` in this.tensors;
    const add = short ? this.unconvolve(`${name}.conv_shortcut`, g, `d short ${name}`).at : g.at;
    let d = this.unconvolve(`${name}.conv2`, g, `d out ${name}`);
    d = this.unnormalise(`${name}.norm2`, inside, d, `d middle ${name}`, {film});
    d = this.unconvolve(`${name}.conv1`, d, `d in ${name}`);
    return this.unnormalise(`${name}.norm1`, x, d, `d ${name}`, {add});
  }

  // A map with every second pixel each way 0, as the gradient of a stride of 2 needs it.
  spaced({at, height, width, channels}) {
    const {machine, images} = this, to = machine.place("spaced", images * height * width * channels * 4);
    const [from, wide] = [machine.floats(at, images * height * width * channels),
      machine.floats(to, images * height * width * channels * 4)];
    for (let p = 0; p < images * height * width; p++) {
      const row = Math.floor(p / width), place = (row * 2 * width + p % width) * 2 * channels;
      wide.set(from.subarray(p * channels, (p + 1) * channels), place);
    }
    return {at: to, height: 2 * height, width: 2 * width, channels};
  }

  // Gradients of log p(digit | x) with respect to images at one time.
  gradient(x, time, digit) {
    Object.assign(this, {images: x.length / 784, asked: this.ask(time)});
    const scale = (1 - time) / ((1 - time) ** 2 + time ** 2), start = this.patches(x.map((v) => v * scale));
    const names = ["down_blocks.0.resnets.0", "down_blocks.1.resnets.0", "mid_block.resnets.0", "mid_block.resnets.1"];
    const first = this.block(names[0], this.convolve("conv_in", this.enlarge(start).at, start, "c in"), "c 0");
    const small = this.convolve("down_blocks.0.downsamplers.0.conv", this.enlarge(first).at, first, "c 1", {stride: 2});
    const kept = [this.block(names[1], small, "c 2")];
    for (const name of names.slice(2)) kept.push(this.block(name, kept.at(-1), `c ${name}`));
    let g = this.unnormalise("norm", kept[2], this.slopes(kept[2], digit), "d last");
    for (let i = 2; i >= 0; i--) g = this.unblock(names[i + 1], kept[i], g);
    g = this.unconvolve("down_blocks.0.downsamplers.0.conv", this.spaced(g), "d spaced");
    g = this.unconvolve("conv_in", this.unblock(names[0], first, g), "d first");
    return this.pixels(g.at, x.length).map((v) => scale * v);
  }

  // The gradient of log p(digit) with respect to the last maps, whose means the last layer sees.
  slopes(h, digit) {
    const {machine, images} = this, {height, width, channels} = h, weight = this.tensors["head.weight"].values;
    const wide = (height + 2) * (width + 2) * channels, area = height * width;
    const at = machine.place("slopes", images * area * channels);
    const maps = machine.floats(this.normalise("norm", h), images * wide);
    for (let n = 0; n < images; n++) {
      const means = new Float32Array(channels);
      for (let i = 0; i < wide; i++) means[i % channels] += maps[n * wide + i] / area;  // the border is 0
      const logits = linear({weight, bias: this.tensors["head.bias"].values}, means), top = Math.max(...logits);
      const odds = logits.map((v) => Math.exp(v - top)), sum = odds.reduce((a, b) => a + b);
      const slope = means.map((_, c) => odds.reduce((s, v, k) => s + (Number(k === digit) - v / sum) *
        weight[k * channels + c], 0) / area);
      for (let p = 0; p < area; p++) machine.floats(at + 4 * (n * area + p) * channels, channels).set(slope);
    }
    return {...h, at};
  }
}
