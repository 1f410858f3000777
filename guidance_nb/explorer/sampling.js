// Solve eq. (5) from `noise` [n, d]: all points, the times, and network function evaluations (NFE) per sample.
function simulate(scene, state, noise) {
  const {mix} = scene, {d} = mix, n = noise.length / d, {steps, method, c, settings} = state;
  const times = Array.from({length: steps + 1}, (_, i) => 1 - i / steps), terms = times.map((t) => termsAt(mix, t));
  const points = [Float64Array.from(noise)], velocity = new Float64Array(n * d), probe = new Float64Array(d);
  let nfe = 0;
  for (let i = 0; i < steps; i++) {
    const x = points[i], next = new Float64Array(n * d), h = times[i] - times[i + 1];
    const heun = state.sampler === "heun" && i + 1 < steps;
    for (let o = 0; o < n * d; o += d) {
      const u = guidedVelocity(mix, terms[i], x, o, c, method, settings);
      for (let j = 0; j < d; j++) next[o + j] = x[o + j] - h * u[j];
      if (!heun) continue;
      const v = guidedVelocity(mix, terms[i + 1], next, o, c, method, settings);
      for (let j = 0; j < d; j++) next[o + j] = x[o + j] - h * (u[j] + v[j]) / 2;
    }
    nfe += nfeAt(times[i], method, settings) + (heun ? nfeAt(times[i + 1], method, settings) : 0);
    points.push(next);
  }
  if (method === "flow_postprocessing") {
    points.push(neighbours(scene, points[steps], c, settings.neighbours));
    times.push(0);
  }
  return {points, times, nfe};
}

// NFE of one guided prediction at time t.
function nfeAt(t, method, s) {
  if (method === "model_guidance") return 1;
  if (method === "classifier_guidance") return s.scale === 0 ? 1 : 2;
  const scale = method === "aligned_loss" ? s.sampling : s.scale;
  return scale === 0 || scale === 1 || (s.first !== undefined && !(t >= s.first && t <= s.last)) ? 1 : 2;
}

// Each sample's real point: of its k nearest of class c (in float32, as the package searches), number i mod k.
function neighbours(scene, x, c, k) {
  const {d} = scene.mix, real = scene.real[c], m = real.length / d, found = new Float64Array(x.length);
  const distance = new Float64Array(m), order = Array.from({length: m}, (_, i) => i);
  for (let o = 0; o < x.length; o += d) {
    for (let i = 0; i < m; i++) {
      distance[i] = 0;
      for (let j = 0; j < d; j++) distance[i] += real[i * d + j] ** 2 - 2 * Math.fround(x[o + j]) * real[i * d + j];
    }
    const nearest = [...order].sort((a, b) => distance[a] - distance[b])[(o / d) % k];
    for (let j = 0; j < d; j++) found[o + j] = real[nearest * d + j];
  }
  return found;
}
