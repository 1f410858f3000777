// Density of class c on size x size pixels, the first row on top: the plane at time t, eq. (7), or the film of a line.
function densityPixels(scene, c, t, size) {
  const {mix, extent} = scene, {d} = mix, p = new Float64Array(size * size), x = new Float64Array(d);
  const centre = (i) => ((i + 0.5) / size * 2 - 1) * extent, half = extent / size;
  const later = d === 2 && t < half ? 1 / (1 + (1 - t) / half) : t, kappa = later > t ? (1 - later) / (1 - t) : 1;
  let terms = termsAt(mix, later);
  for (let column = 0; column < size; column++) {
    if (d === 1) terms = termsAt(mix, 1 - column / (size - 1));
    for (let row = 0; row < size; row++) {
      const up = kappa * centre(size - 1 - row);
      if (d === 1) x[0] = up;
      else { x[0] = kappa * centre(column); x[1] = up; }
      p[row * size + column] = kappa ** d * Math.exp(logDensity(mix, terms, x, 0, c));
    }
  }
  return p;
}

// Shades from 0 to 1 / 1.6: log(1 + 300 p / max p) in the plane; on a line p / max p, each column by its own peak.
function shades(p, size, byColumn) {
  const peaks = new Float64Array(size);
  for (let i = 0; i < p.length; i++) peaks[i % size] = Math.max(peaks[i % size], p[i]);
  const top = peaks.reduce((a, b) => Math.max(a, b));
  return p.map((v, i) => (byColumn ? v / peaks[i % size] : Math.log1p(300 * v / top) / Math.log1p(300)) / 1.6);
}

const FILM = 0.78;  // share of the width that the film of a line takes

// Canvas position of sample i at a frame; width and height in CSS pixels.
function place(scene, run, frame, i, width, height) {
  const {d} = scene.mix, x = run.points[frame], unit = (v) => (v / scene.extent + 1) / 2;
  if (d === 2) return [unit(x[i * d]) * width, (1 - unit(x[i * d + 1])) * height];
  return [(1 - run.times[frame]) * FILM * width, (1 - unit(x[i])) * height];
}

// The shaded density as a small canvas, to be stretched over the picture.
function densityCanvas(scene, c, t, colours) {
  const size = scene.mix.d === 1 ? 128 : t > 0.1 ? 64 : 160;  // noise leaves nothing finer
  const v = shades(densityPixels(scene, c, t, size), size, scene.mix.d === 1);
  const canvas = Object.assign(document.createElement("canvas"), {width: size, height: size});
  const image = new ImageData(size, size);
  v.forEach((shade, i) => {
    for (let j = 0; j < 3; j++) image.data[4 * i + j] = colours.paper[j] + shade * (colours.ink[j] - colours.paper[j]);
    image.data[4 * i + 3] = 255;
  });
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

// Final density p(x | c) of a line and a histogram of the samples, lying on their side.
function drawMargin(g, scene, c, x, left, width, height, css) {
  const bins = 52, counts = new Float64Array(bins), terms = termsAt(scene.mix, 0), e = scene.extent;
  x.forEach((v) => { const b = Math.floor((v / e + 1) / 2 * bins); if (b >= 0 && b < bins) counts[b] += 1; });
  const bars = counts.map((n) => n / x.length / (2 * e / bins));
  const density = (v) => Math.exp(logDensity(scene.mix, terms, [v], 0, c));
  const curve = Array.from({length: 201}, (_, i) => density((1 - i / 100) * e)), top = Math.max(...bars, ...curve);
  g.fillStyle = css.dot;
  g.globalAlpha = 0.6;
  bars.forEach((v, b) => g.fillRect(left, height * (1 - (b + 1) / bins), v / top * width, height / bins - 0.5));
  g.globalAlpha = 1;
  g.strokeStyle = css.text;
  g.beginPath();
  curve.forEach((v, i) => g.lineTo(left + v / top * width, i / 200 * height));
  g.stroke();
}

// The whole picture at one frame: density, trajectories up to it, samples at it.
function paint(canvas, scene, state, run, background, css) {
  const width = canvas.clientWidth, height = canvas.clientHeight, ratio = window.devicePixelRatio || 1, {d} = scene.mix;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  const g = canvas.getContext("2d"), at = (frame, i) => place(scene, run, frame, i, width, height);
  g.scale(ratio, ratio);
  g.fillStyle = css.page;
  g.fillRect(0, 0, width, height);
  const film = d === 1 ? FILM * width : width;
  g.drawImage(background, 0, 0, film, height);
  const n = run.points[0].length / d;
  g.save();
  g.beginPath();
  g.rect(0, 0, film + 4, height);
  g.clip();
  g.strokeStyle = css.dot;
  g.globalAlpha = 0.45;
  for (let i = 0; i < n; i += d === 1 ? 4 : 6) {
    g.beginPath();
    for (let frame = 0; frame <= state.frame; frame++) g.lineTo(...at(frame, i));
    g.stroke();
  }
  g.globalAlpha = 1;
  g.fillStyle = css.dot;
  for (let i = 0; i < n; i++) {
    const [left, top] = at(state.frame, i);
    g.fillRect(left - 1.5, top - 1.5, 3, 3);
  }
  g.restore();
  if (d === 1) drawMargin(g, scene, state.c, run.points[state.frame], film + 6, width - film - 10, height, css);
}
