// The exact mixture: packed data, log densities and velocities. Equations are numbered as in nbs/28_explorer.ipynb.

// base64 to numbers: all browsers we know are little-endian, as the text is.
const unpack = (text) => new Float32Array(Uint8Array.from(atob(text), (v) => v.charCodeAt(0)).buffer);

// A scene as `Scene.pack` writes it, made ready to compute with.
function unpackScene(scene) {
  const {mix} = scene, {d, size} = mix, vectors = [];
  for (const name of ["means", "values", "logWeights", "logClass"]) mix[name] = Float64Array.from(mix[name]);
  for (let k = 0; k < size; k++) {
    const [a, b] = mix.directions.slice(k * d, (k + 1) * d);
    vectors.push(...(d === 1 ? [a] : [a, b, -b, a]));  // the first direction, and the same turned by a right angle
  }
  mix.vectors = Float64Array.from(vectors);
  Object.assign(mix, {y: new Float64Array(size * d), joint: new Float64Array(size)});
  scene.noise = unpack(scene.noise);
  scene.real = scene.real.map(unpack);
}

// What depends on time alone in eqs. (1) and (2): 1 / v, (t - alpha lambda) / v, and the constants of l_k.
function termsAt(mix, t) {
  const {d, size} = mix, a = 1 - t;
  const [precision, gain, norm] = [size * d, size * d, size].map((n) => new Float64Array(n));
  for (let k = 0; k < size; k++) {
    norm[k] = mix.logWeights[k] - 0.5 * d * Math.log(2 * Math.PI);
    for (let j = k * d; j < (k + 1) * d; j++) {
      const v = a * a * mix.values[j] + t * t;
      precision[j] = 1 / v;
      gain[j] = (t - a * mix.values[j]) / v;
      norm[k] -= 0.5 * Math.log(v);
    }
  }
  return {t, a, precision, gain, norm};
}

// y_k of every component of class c at the point x[o...], into mix.y, and l_k into mix.joint; the largest l_k.
function project(mix, terms, x, o, c) {
  const {d, means, vectors, y, joint} = mix, {a, precision, norm} = terms, end = mix.starts[c + 1];
  let top = -Infinity;
  for (let k = mix.starts[c]; k < end; k++) {
    let square = 0;
    for (let i = k * d; i < (k + 1) * d; i++) {
      let along = 0;
      for (let j = 0; j < d; j++) along += vectors[i * d + j] * (x[o + j] - a * means[k * d + j]);
      y[i] = along;
      square += along * along * precision[i];
    }
    const l = norm[k] - 0.5 * square;
    joint[k] = l;
    if (l > top) top = l;
  }
  return top;
}

// Log density (class weight included) and velocity u_c of every class at the point x[o...], eqs. (1) and (2).
function classFields(mix, terms, x, o) {
  const {d, classes, means, vectors, y, joint} = mix, {gain} = terms;
  const logp = new Float64Array(classes), u = new Float64Array(classes * d);
  for (let c = 0; c < classes; c++) {
    const top = project(mix, terms, x, o, c), end = mix.starts[c + 1];
    let total = 0, u0 = 0, u1 = 0;
    for (let k = mix.starts[c]; k < end; k++) {
      if (joint[k] < top - 40) continue;  // below the rounding of the sum
      const r = Math.exp(joint[k] - top);
      total += r;
      u0 -= r * means[k * d];
      if (d === 2) u1 -= r * means[k * d + 1];
      for (let i = k * d; i < (k + 1) * d; i++) {
        const along = r * gain[i] * y[i];
        u0 += along * vectors[i * d];
        if (d === 2) u1 += along * vectors[i * d + 1];
      }
    }
    u[c * d] = u0 / total;
    if (d === 2) u[c * d + 1] = u1 / total;
    logp[c] = top + Math.log(total);
  }
  return {logp, u};
}

// log p_t(x | c) at one point.
function logDensity(mix, terms, x, o, c) {
  const top = project(mix, terms, x, o, c);
  let total = 0;
  for (let k = mix.starts[c]; k < mix.starts[c + 1]; k++) total += Math.exp(mix.joint[k] - top);
  return top + Math.log(total) - mix.logClass[c];
}
