// A small U-Net of guidance_nb/images/networks.py in the browser: weights in half precision, sums in kernels.c.

const GROUPS = 8;

// Whether WebAssembly here has four numbers at a time.
const hasSimd = () => WebAssembly.validate(Uint8Array.of(
  0, 97, 115, 109, 1, 0, 0, 0, 1, 5, 1, 96, 0, 1, 123, 3, 2, 1, 0, 10, 10, 1, 8, 0, 65, 0, 253, 15, 253, 98, 11));

// The memory of the kernels, with places that are handed out once and kept.
class Machine {
  constructor(module) {
    const {memory, __heap_base: heap, ...kernels} = new WebAssembly.Instance(module).exports;
    Object.assign(this, {memory, kernels, end: heap.value + 15 & ~15, places: {}});
  }

  // Bytes that are zero.
  take(bytes) {
    const at = this.end;
    this.end += bytes + 15 & ~15;
    const missing = this.end - this.memory.buffer.byteLength;
    if (missing > 0) this.memory.grow(Math.ceil(missing / 65536) + 64);
    return at;
  }

  floats(at, count) { return new Float32Array(this.memory.buffer, at, count); }

  put(values) {
    const at = this.take(4 * values.length), kind = values instanceof Int32Array ? Int32Array : Float32Array;
    new kind(this.memory.buffer, at, values.length).set(values);
    return at;
  }

  // A place by name and size.
  place(name, count) { return this.places[`${name} ${count}`] ??= this.take(4 * count); }

  // Where the first pixel under a filter lies, for every output pixel, and where its taps are from there.
  geometry(images, height, width, channels, side, stride) {
    const key = `geometry ${[images, height, width, channels, side, stride]}`;
    return this.places[key] ??= (() => {
      const border = side - 1, [rows, columns] = [height, width].map((n) => Math.floor((n - 1) / stride) + 1);
      const row = (width + border) * channels, starts = new Int32Array(images * rows * columns);
      for (let n = 0, i = 0; n < images; n++) {
        for (let y = 0; y < rows; y++) {
          for (let x = 0; x < columns; x++) {
            starts[i++] = (n * (height + border) + y * stride) * row + x * stride * channels;
          }
        }
      }
      const taps = Int32Array.from({length: side * side}, (_, k) => Math.floor(k / side) * row + k % side * channels);
      return {starts: this.put(starts), taps: this.put(taps), pixels: starts.length, rows, columns};
    })();
  }
}

function halfToFloat(h) {
  const power = h >> 10 & 31, part = h & 1023, sign = h >> 15 ? -1 : 1;
  if (power === 31) return part ? NaN : sign * Infinity;
  return sign * (power ? 2 ** (power - 15) * (1 + part / 1024) : 2 ** -14 * (part / 1024));
}

// The tensors of a safetensors file in half precision, by name: their shapes and numbers.
function readTensors(buffer) {
  const length = Number(new DataView(buffer).getBigUint64(0, true)), tensors = {};
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(buffer, 8, length)));
  const halves = new Uint16Array(buffer.slice(8 + length));
  for (const [name, {dtype, shape, data_offsets: [start, end]}] of Object.entries(header)) {
    if (name === "__metadata__") continue;
    if (dtype !== "F16") throw new Error(`${name} is ${dtype}`);
    tensors[name] = {shape, values: Float32Array.from(halves.subarray(start / 2, end / 2), halfToFloat)};
  }
  return tensors;
}

const silu = (x) => x.map((v) => v / (1 + Math.exp(-v)));

// A linear layer on one vector.
function linear({weight, bias}, x) {
  return bias.map((b, row) => {
    let sum = b;
    for (let i = 0, at = row * x.length; i < x.length; i++) sum += weight[at + i] * x[i];
    return sum;
  });
}

const sines = (angles) => [...angles.map(Math.cos), ...angles.map(Math.sin)];

class UNet {
  constructor(machine, tensors) {
    Object.assign(this, {machine, tensors, layers: {}});
    this.spread = tensors.spread?.values[0] ?? 1;
    this.scaleAware = "net.ask.scale.0.weight" in tensors;
  }

  values(name) { return this.tensors[`net.${name}`].values; }

  dense(name) {
    return this.layers[name] ??= {weight: this.values(`${name}.weight`), bias: this.values(`${name}.bias`)};
  }

  // Weights of a convolution as the kernel reads them: eight outputs, then taps, then inputs.
  filters(name) {
    return this.layers[name] ??= (() => {
      const {shape: [out, input, side], values} = this.tensors[`net.net.${name}.weight`], taps = side * side;
      const full = out + 7 & ~7, packed = new Float32Array(full * input * taps), bias = new Float32Array(full);
      values.forEach((value, i) => {
        const o = Math.floor(i / (input * taps)), c = Math.floor(i / taps) % input, tap = i % taps;
        packed[(((o >> 3) * taps + tap) * input + c) * 8 + (o & 7)] = value;
      });
      bias.set(this.values(`net.${name}.bias`));
      return {weight: this.machine.put(packed), bias: this.machine.put(bias), input, side, out: full};
    })();
  }

  vector(name) { return this.layers[name] ??= this.machine.put(this.values(`net.${name}`)); }

  clock(time) {
    const steps = Array.from({length: 16}, (_, i) => 1000 * time * Math.exp(-Math.log(10000) * i / 16));
    const first = silu(linear(this.dense("net.time_embedding.linear_1"), sines(steps)));
    return linear(this.dense("net.time_embedding.linear_2"), first);
  }

  // What is asked of the network at one time, one vector for each [label, scale].
  ask(time, conditions) {
    const clock = this.clock(time), labels = this.values("ask.label.weight");
    return conditions.map(([label, scale]) => {
      const vector = clock.map((v, i) => v + labels[label * clock.length + i]);
      if (!this.scaleAware) return silu(vector);
      const waves = sines(Array.from({length: 8}, (_, i) => scale / 8 * Math.PI * 2 ** i));
      const more = linear(this.dense("ask.scale.2"), silu(linear(this.dense("ask.scale.0"), waves)));
      return silu(vector.map((v, i) => v + more[i]));
    });
  }

  // A convolution of what lies at `x`, inside a border where the filter has a side of 3.
  convolve(name, x, {height, width}, to, {stride = 1, add = 0} = {}) {
    const {weight, bias, input, side, out} = this.filters(name), {machine, images} = this;
    const {starts, taps, pixels, rows, columns} = machine.geometry(images, height, width, input, side, stride);
    const at = machine.place(to, pixels * out);
    machine.kernels.convolve(x, weight, bias, add, at, starts, pixels, taps, side * side, input, out);
    return {at, height: rows, width: columns, channels: out};
  }

  // A place with a border of zeros, which nobody writes to.
  border(height, width, channels) {
    const name = `border of ${[height, width, channels]}`;
    return this.machine.place(name, this.images * (height + 2) * (width + 2) * channels);
  }

  // Group norm, FiLM if there are numbers for it, and SiLU, into a border.
  normalise(name, {at, height, width, channels}, film = 0) {
    const {machine, images} = this, to = this.border(height, width, channels);
    const [gamma, beta] = ["weight", "bias"].map((part) => this.vector(`${name}.${part}`));
    const each = images / this.asked.length;
    machine.kernels.normalise(at, to, gamma, beta, film, images, each, height, width, channels, GROUPS);
    return to;
  }

  enlarge({at, height, width, channels}, factor = 1) {
    const {machine, images} = this, [rows, columns] = [height * factor, width * factor];
    const to = this.border(rows, columns, channels);
    machine.kernels.enlarge(at, to, images, height, width, channels, factor);
    return {at: to, height: rows, width: columns, channels};
  }

  // A residual block; `to` names where its result stays.
  block(name, x, to) {
    const film = this.asked.flatMap((vector) => [...linear(this.dense(`net.${name}.time_emb_proj`), vector)]);
    const place = this.machine.place(`film ${to}`, film.length);
    this.machine.floats(place, film.length).set(film);
    const inside = this.convolve(`${name}.conv1`, this.normalise(`${name}.norm1`, x), x, `inside ${to}`);
    const short = `net.net.${name}.conv_shortcut.weight` in this.tensors;
    const add = short ? this.convolve(`${name}.conv_shortcut`, x.at, x, "short").at : x.at;
    const out = this.convolve(`${name}.conv2`, this.normalise(`${name}.norm2`, inside, place), x, to, {add});
    return {...out, x, inside, film: place};
  }

  join(a, b) {
    const {machine, images} = this, pixels = images * a.height * a.width;
    const at = machine.place("joined", pixels * (a.channels + b.channels));
    machine.kernels.join(a.at, b.at, at, pixels, a.channels, b.channels);
    return {...a, at, channels: a.channels + b.channels};
  }

  // Pixels of images as channels of patches of 2 x 2, and where each pixel went.
  patches(x) {
    this.order ??= Int32Array.from({length: 784}, (_, i) => {
      const column = i % 28, row = Math.floor(i / 28);
      return ((row >> 1) * 14 + (column >> 1)) * 4 + (row & 1) * 2 + (column & 1);
    });
    const start = {at: this.machine.place("patches", x.length), height: 14, width: 14, channels: 4};
    const patches = this.machine.floats(start.at, x.length), {order} = this;
    for (let i = 0; i < x.length; i++) patches[i - i % 784 + order[i % 784]] = x[i];
    return start;
  }

  // Images again, from patches whose four channels are followed by four that are not used.
  pixels(at, count) {
    const found = this.machine.floats(at, 2 * count), {order} = this;
    return Float32Array.from({length: count}, (_, i) => {
      const place = order[i % 784], n = Math.floor(i / 784);
      return found[(n * 196 + (place >> 2)) * 8 + (place & 3)];
    });
  }

  // The output at images `[images, 28, 28]` and one time; each condition [label, scale] has an equal share of them.
  run(x, time, conditions) {
    Object.assign(this, {images: x.length / 784, asked: this.ask(time, conditions)});
    const start = this.patches(x);
    const kept = [this.convolve("conv_in", this.enlarge(start).at, start, "kept 0")];
    kept.push(this.block("down_blocks.0.resnets.0", kept[0], "kept 1"));
    kept.push(this.convolve("down_blocks.0.downsamplers.0.conv", this.enlarge(kept[1]).at, kept[1], "kept 2",
      {stride: 2}));
    kept.push(this.block("down_blocks.1.resnets.0", kept[2], "kept 3"));
    let h = this.block("mid_block.resnets.0", kept[3], "a");
    h = this.block("mid_block.resnets.1", h, "b");
    h = this.block("up_blocks.0.resnets.0", this.join(h, kept[3]), "a");
    h = this.block("up_blocks.0.resnets.1", this.join(h, kept[2]), "b");
    const large = this.enlarge(h, 2);
    h = this.convolve("up_blocks.0.upsamplers.0.conv", large.at, large, "a");
    h = this.block("up_blocks.1.resnets.0", this.join(h, kept[1]), "b");
    h = this.block("up_blocks.1.resnets.1", this.join(h, kept[0]), "a");
    const last = this.convolve("conv_out", this.normalise("conv_norm_out", h), h, "last");
    return this.pixels(last.at, x.length).map((v) => this.spread * v);
  }
}
