// The numbers of finished points [n, d]; distance by eq. (6).
function numbersOf(scene, x, c) {
  const {mix, directions} = scene, {d} = mix, n = x.length / d, terms = termsAt(mix, 0);
  const column = (y, j) => Array.from({length: n}, (_, i) => y[i * d + j]);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const mean = Array.from({length: d}, (_, j) => sum(column(x, j)) / n);
  const std = mean.map((m, j) => Math.sqrt(sum(column(x, j).map((v) => (v - m) ** 2)) / (n - 1)));
  const logp = Array.from({length: n}, (_, i) => logDensity(mix, terms, x, i * d, c));
  const sorted = (y, l) => {
    const along = new Float64Array(n);
    for (let i = 0; i < n; i++) for (let j = 0; j < d; j++) along[i] += directions[l * d + j] * y[i * d + j];
    return along.sort();
  };
  let square = 0;
  for (let l = 0; l < directions.length / d; l++) {
    const a = sorted(x, l), b = sorted(scene.real[c], l);
    for (let i = 0; i < n; i++) square += (a[i] - b[i]) ** 2;
  }
  const distance = Math.sqrt(square / (n * directions.length / d));
  const outliers = logp.filter((v) => v < scene.threshold[c]).length / n;
  return {mean, std, nll: -sum(logp) / n, outliers, distance};
}
