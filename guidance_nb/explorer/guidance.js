function softmax(z) {
  let top = -Infinity, total = 0;
  for (const v of z) top = Math.max(top, v);
  const p = z.map((v) => Math.exp(v - top));
  for (const v of p) total += v;
  return p.map((v) => v / total);
}

function average(p, f, d) {
  const mean = new Float64Array(d);
  for (let k = 0; k < p.length; k++) for (let j = 0; j < d; j++) mean[j] += p[k] * f[k * d + j];
  return mean;
}

const pushed = (from, to, scale) => from.map((v, j) => v + scale * (to[j] - v));

// The gradient g_tau of eq. (3); class scores from velocities.
function classifierGradient(mix, terms, x, o, c, sharpness) {
  const {d} = mix, {logp, u} = classFields(mix, terms, x, o);
  const s = u.map((v, i) => -(x[o + i % d] + terms.a * v) / terms.t);
  const mean = average(softmax(logp.map((v) => sharpness * v)), s, d);
  return mean.map((v, j) => sharpness * (s[c * d + j] - v));
}

// The guided velocity of eq. (4) at the point x[o...]; as in the package, classifiers see t of at most 1 / 1.001.
function guidedVelocity(mix, terms, x, o, c, method, s) {
  const at = classFields(mix, terms, x, o), {d, classes} = mix, t = terms.t;
  const class_ = at.u.subarray(c * d, (c + 1) * d), none = average(softmax(at.logp), at.u, d);
  if (method === "classifier_guidance") {
    const late = Math.min(t, 1 / (1 + 1e-3));
    const g = classifierGradient(mix, late < t ? termsAt(mix, late) : terms, x, o, c, s.sharpness);
    const push = s.scale * (late * late + late * (1 - t)) / (1 - late);
    return none.map((v, j) => v - push * g[j]);
  }
  if (method === "aligned_loss") {
    const share = (1 - s.training) / (s.training ** 2 + classes * (1 - s.training) ** 2);
    const null_ = s.anchored ? none : average(new Float64Array(classes).fill(share), at.u, d);
    return pushed(null_, class_, s.sampling / s.training);
  }
  if (method === "model_guidance") return pushed(none, class_, 1 / (1 - s.weight));
  const guided = s.first === undefined || (t >= s.first && t <= s.last);
  return guided ? pushed(none, class_, s.scale) : class_;
}
