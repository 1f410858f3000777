// The sums of the small U-Net, four numbers at a time. Images lie as [image][row][column][channel].
// Built into kernels.wasm and, without SIMD, kernels_plain.wasm by tools/kernels.py.

typedef float v4 __attribute__((vector_size(16), aligned(4)));
typedef int i4 __attribute__((vector_size(16), aligned(4)));

static inline v4 all(float x) { return (v4){x, x, x, x}; }
static inline v4 load(const float *p) { return *(const v4 *)p; }
static inline void store(float *p, v4 x) { *(v4 *)p = x; }

// e^x to a rounding: x = n log 2 + r, and a polynomial of r.
static inline v4 exponential(v4 x) {
  i4 low = x < all(-87), high = x > all(87);
  x = (v4)(((i4)x & ~low & ~high) | ((i4)all(-87) & low) | ((i4)all(87) & high));
  v4 magic = all(12582912), shifted = x * all(1.44269504f) + magic, n = shifted - magic;
  i4 power = ((i4)shifted - (i4)magic + (i4){127, 127, 127, 127}) << 23;
  v4 r = x - n * all(0.693359375f) + n * all(2.12194440e-4f);
  v4 p = all(1.9875691500e-4f) * r + all(1.3981999507e-3f);
  p = p * r + all(8.3334519073e-3f);
  p = p * r + all(4.1665795894e-2f);
  p = p * r + all(1.6666665459e-1f);
  p = p * r + all(5.0000001201e-1f);
  return (p * r * r + r + all(1)) * (v4)power;
}

// y[p] = bias + add[p] + sum over taps and inputs of x[base[p] + tap] w; eight outputs of four pixels at once.
void convolve(const float *x, const float *w, const float *bias, const float *add, float *y, const int *base,
              int pixels, const int *taps, int count, int in, int out) {
  for (int o = 0; o < out; o += 8, w += count * in * 8) {
    for (int p = 0; p < pixels; p += 4) {
      const float *from[4];
      v4 sum[8];
      for (int k = 0; k < 4; k++) {
        int at = p + k < pixels ? p + k : pixels - 1;
        from[k] = x + base[at];
        sum[2 * k] = load(bias + o);
        sum[2 * k + 1] = load(bias + o + 4);
        if (add) {
          sum[2 * k] += load(add + at * out + o);
          sum[2 * k + 1] += load(add + at * out + o + 4);
        }
      }
      const float *weight = w;
      for (int tap = 0; tap < count; tap++) {
        const float *a = from[0] + taps[tap], *b = from[1] + taps[tap];
        const float *c = from[2] + taps[tap], *d = from[3] + taps[tap];
        for (int i = 0; i < in; i++, weight += 8) {
          v4 w0 = load(weight), w1 = load(weight + 4);
          sum[0] += all(a[i]) * w0;
          sum[1] += all(a[i]) * w1;
          sum[2] += all(b[i]) * w0;
          sum[3] += all(b[i]) * w1;
          sum[4] += all(c[i]) * w0;
          sum[5] += all(c[i]) * w1;
          sum[6] += all(d[i]) * w0;
          sum[7] += all(d[i]) * w1;
        }
      }
      for (int k = 0; k < 4 && p + k < pixels; k++) {
        store(y + (p + k) * out + o, sum[2 * k]);
        store(y + (p + k) * out + o + 4, sum[2 * k + 1]);
      }
    }
  }
}

// Mean of one group of channels of an image, and one over its standard deviation.
typedef struct { v4 mean, scale; } moments;
static inline float total(v4 x) { return x[0] + x[1] + x[2] + x[3]; }
static inline moments moments_of(const float *x, int pixels, int channels, int size) {
  v4 sum = all(0), square = all(0);
  for (int p = 0; p < pixels; p++)
    for (int c = 0; c < size; c += 4) sum += load(x + p * channels + c);
  v4 mean = all(total(sum) / (pixels * size));
  for (int p = 0; p < pixels; p++)
    for (int c = 0; c < size; c += 4) {
      v4 off = load(x + p * channels + c) - mean;
      square += off * off;
    }
  return (moments){mean, all(1 / __builtin_sqrtf(total(square) / (pixels * size) + 1e-5f))};
}

// What a channel of normalised numbers is multiplied by and what is added, with FiLM if there is one.
typedef struct { v4 times, plus; } affine;
static inline affine affine_of(const float *gamma, const float *beta, const float *film, int channels, int c) {
  affine a = {load(gamma + c), load(beta + c)};
  if (!film) return a;
  v4 more = load(film + c) + all(1);
  return (affine){a.times * more, a.plus * more + load(film + channels + c)};
}

// y = silu(norm(x) (1 + film scale) + film shift), inside a border of zeros; every `each` images share a film.
void normalise(const float *x, float *y, const float *gamma, const float *beta, const float *film, int images,
               int each, int height, int width, int channels, int groups) {
  int size = channels / groups, pixels = height * width;
  moments m;
  for (int n = 0; n < images; n++, x += pixels * channels)
    for (int c = 0; c < channels; c += 4) {
      if (c % size == 0) m = moments_of(x + c, pixels, channels, size);
      affine a = affine_of(gamma, beta, film ? film + n / each * 2 * channels : 0, channels, c);
      v4 times = m.scale * a.times, plus = a.plus - m.mean * times;
      for (int row = 0, p = 0; row < height; row++) {
        float *to = y + ((n * (height + 2) + row + 1) * (width + 2) + 1) * channels + c;
        for (int column = 0; column < width; column++, p++, to += channels) {
          v4 h = load(x + p * channels + c) * times + plus;
          store(to, h / (all(1) + exponential(-h)));
        }
      }
    }
}

// Backwards through `normalise`: dx = add + the gradient of its input where dy is that of its output, without borders.
void differentiate(const float *x, const float *dy, const float *add, float *dx, const float *gamma,
                   const float *beta, const float *film, int images, int pixels, int channels, int groups) {
  int size = channels / groups;
  for (int n = 0; n < images; n++, x += pixels * channels, dy += pixels * channels, dx += pixels * channels) {
    for (int g = 0; g < channels; g += size) {
      moments m = moments_of(x + g, pixels, channels, size);
      v4 sum = all(0), product = all(0);
      for (int c = g; c < g + size; c += 4) {
        affine a = affine_of(gamma, beta, film, channels, c);
        for (int p = c; p < pixels * channels; p += channels) {
          v4 z = (load(x + p) - m.mean) * m.scale, h = z * a.times + a.plus, s = all(1) / (all(1) + exponential(-h));
          v4 d = load(dy + p) * s * (all(1) + h * (all(1) - s)) * a.times;
          store(dx + p, d);
          sum += d;
          product += d * z;
        }
      }
      v4 mean = all(total(sum) / (pixels * size)), slope = all(total(product) / (pixels * size));
      for (int c = g; c < g + size; c += 4)
        for (int p = c; p < pixels * channels; p += channels) {
          v4 z = (load(x + p) - m.mean) * m.scale, d = (load(dx + p) - mean - z * slope) * m.scale;
          store(dx + p, add ? d + load(add + p) : d);
        }
    }
    if (add) add += pixels * channels;
  }
}

// y = x, each pixel `factor` times each way, inside a border of zeros.
void enlarge(const float *x, float *y, int images, int height, int width, int channels, int factor) {
  int rows = height * factor, columns = width * factor;
  for (int n = 0; n < images; n++)
    for (int row = 0; row < rows; row++)
      for (int column = 0; column < columns; column++) {
        const float *from = x + ((n * height + row / factor) * width + column / factor) * channels;
        float *to = y + ((n * (rows + 2) + row + 1) * (columns + 2) + column + 1) * channels;
        for (int c = 0; c < channels; c += 4) store(to + c, load(from + c));
      }
}

// y[p] = a[p] beside b[p].
void join(const float *a, const float *b, float *y, int pixels, int first, int second) {
  for (int p = 0; p < pixels; p++, y += first + second, a += first, b += second) {
    for (int c = 0; c < first; c += 4) store(y + c, load(a + c));
    for (int c = 0; c < second; c += 4) store(y + first + c, load(b + c));
  }
}
