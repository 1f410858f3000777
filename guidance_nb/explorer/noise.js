// The noise that `sample` draws for samples 0, 1, ... of a seed: numpy's Philox4x64-10 and its ziggurat for float32.

function* philox(seed) {
  const mask = (1n << 64n) - 1n;
  for (let counter = 1n; ; counter++) {
    let [a, b, c, d] = [counter, 0n, 0n, 0n], [k, l] = [BigInt(seed), 0n];
    for (let round = 0; round < 10; round++) {
      const p = a * 0xD2E7470EE14C6C93n, q = c * 0xCA5A826395121157n;
      [a, b, c, d] = [q >> 64n ^ b ^ k, q & mask, p >> 64n ^ d ^ l, p & mask];
      [k, l] = [k + 0x9E3779B97F4A7C15n & mask, l + 0xBB67AE8584CAA73Bn & mask];
    }
    for (const word of [a, b, c, d]) yield* [Number(word & 0xFFFFFFFFn), Number(word >> 32n)];
  }
}

// The 256 layers of the ziggurat, each of area `area`; the lowest begins at `edge`.
const ziggurat = (() => {
  const edge = 3.6541528853610088, area = 0.00492867323399141, scale = 2 ** 23;
  const height = (x) => Math.exp(-0.5 * x * x), base = area / height(edge);
  const [inside, width, heights] = [new Uint32Array(256), new Float32Array(256), new Float32Array(256)];
  inside[0] = edge / base * scale;
  [width[0], width[255], heights[0], heights[255]] = [base / scale, edge / scale, 1, height(edge)];
  for (let i = 254, x = edge; i > 0; i--) {
    const next = Math.sqrt(-2 * Math.log(area / x + height(x)));
    inside[i + 1] = next / x * scale;
    [width[i], heights[i], x] = [next / scale, height(next), next];
  }
  return {edge, inside, width, heights};
})();

function noise(seed, count) {
  const {edge, inside, width, heights} = ziggurat, words = philox(seed), f = Math.fround;
  const word = () => words.next().value, uniform = () => f((word() >>> 8) / 2 ** 24);
  const tail = (high) => {
    for (;;) {
      const x = f(-Math.log1p(-uniform()) / edge), y = f(-Math.log1p(-uniform()));
      if (2 * y > x * x) return high & 256 ? -(edge + x) : edge + x;
    }
  };
  const draw = () => {
    for (;;) {
      const r = word(), layer = r & 255, high = r >>> 9, x = f(high * width[layer]) * (r & 256 ? -1 : 1);
      if (high < inside[layer]) return x;
      if (layer === 0) return tail(high);
      if ((heights[layer - 1] - heights[layer]) * uniform() + heights[layer] < Math.exp(-0.5 * x * x)) return x;
    }
  };
  return Float32Array.from({length: count}, draw);
}
