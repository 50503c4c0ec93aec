// The kernels for one instruction set. The including file sets LANES, OUT_BLOCK, PIXEL_BLOCK and the compiler's target.
#include <algorithm>

#include "kernels.hpp"

namespace der_fast::lanes {
namespace {

#define ALWAYS_INLINE inline __attribute__((always_inline))

using Vector = float __attribute__((vector_size(LANES * 4)));

ALWAYS_INLINE Vector load(const float* p) { return *reinterpret_cast<const Vector*>(p); }
ALWAYS_INLINE void store(float* p, Vector v) { *reinterpret_cast<Vector*>(p) = v; }
ALWAYS_INLINE Vector broadcast(float v) { return v - Vector{}; }
// NaN stays NaN, as in PyTorch.
ALWAYS_INLINE Vector rectified(Vector v) { return Vector{} > v ? Vector{} : v; }

// acc[o][j] += Σ_c weight[o][c] · input[j][c] for the pixels FIRST ≤ j < LAST.
template <int OUT, int PIXELS, int FIRST, int LAST>
ALWAYS_INLINE void accumulate(Vector (&acc)[OUT][PIXELS], const float* input, long pixel_step, const float* weight, long row,
                              long channels) {
  for (long c = 0; c < channels; ++c) {
    Vector x[PIXELS];
    for (int j = FIRST; j < LAST; ++j) x[j] = load(input + j * pixel_step + c * LANES);
    for (int o = 0; o < OUT; ++o) {
      const Vector w = broadcast(weight[o * row + c]);
      for (int j = FIRST; j < LAST; ++j) acc[o][j] += w * x[j];
    }
  }
}

// Output pixels (y, x … x + PIXELS) of the channels k … k + OUT.
template <int OUT, int PIXELS>
void tile(const Conv& a, long y, long x, long k) {
  const long pad = a.kernel / 2, channels = a.in.channels;
  const long row = a.kernel * a.kernel * channels;
  const long step = a.stride * channels * LANES;
  Vector acc[OUT][PIXELS];
  for (int o = 0; o < OUT; ++o)
    for (int j = 0; j < PIXELS; ++j) acc[o][j] = broadcast(a.bias ? a.bias[k + o] : 0.0f);
  for (long r = 0; r < a.kernel; ++r) {
    const long iy = y * a.stride - pad + r;
    if (iy < 0 || iy >= a.in.height) continue;
    for (long s = 0; s < a.kernel; ++s) {
      const long ix = x * a.stride - pad + s;
      const float* input = a.input + (iy * a.in.width + ix) * channels * LANES;
      const float* weight = a.weight + k * row + (r * a.kernel + s) * channels;
      const bool begins = ix >= 0, ends = ix + (PIXELS - 1) * a.stride < a.in.width;
      if (begins && ends) {
        accumulate<OUT, PIXELS, 0, PIXELS>(acc, input, step, weight, row, channels);
      } else if (PIXELS > 1 && ends && ix + a.stride >= 0) {
        accumulate<OUT, PIXELS, 1, PIXELS>(acc, input, step, weight, row, channels);
      } else if (PIXELS > 1 && begins && ix + (PIXELS - 2) * a.stride < a.in.width) {
        accumulate<OUT, PIXELS, 0, PIXELS - 1>(acc, input, step, weight, row, channels);
      } else {
        for (int j = 0; j < PIXELS; ++j) {
          if (ix + j * a.stride < 0 || ix + j * a.stride >= a.in.width) continue;
          for (long c = 0; c < channels; ++c)
            for (int o = 0; o < OUT; ++o) acc[o][j] += broadcast(weight[o * row + c]) * load(input + j * step + c * LANES);
        }
      }
    }
  }
  const long at = ((y * a.out.width + x) * a.out.channels + k) * LANES, across = a.out.channels * LANES;
  for (int j = 0; j < PIXELS; ++j)
    for (int o = 0; o < OUT; ++o) {
      const long where = at + j * across + o * LANES;
      Vector v = acc[o][j];
      if (a.residual) v += load(a.residual + where);
      store(a.output + where, a.relu ? rectified(v) : v);
    }
}

template <int PIXELS>
void column(const Conv& a, long y, long x) {
  long k = 0;
  for (; k + OUT_BLOCK <= a.out.channels; k += OUT_BLOCK) tile<OUT_BLOCK, PIXELS>(a, y, x, k);
  switch (a.out.channels - k) {
    case 5: tile<5, PIXELS>(a, y, x, k); break;
    case 4: tile<4, PIXELS>(a, y, x, k); break;
    case 3: tile<3, PIXELS>(a, y, x, k); break;
    case 2: tile<2, PIXELS>(a, y, x, k); break;
    case 1: tile<1, PIXELS>(a, y, x, k); break;
    default: break;
  }
}

void conv(const Conv& a) {
  for (long y = 0; y < a.out.height; ++y) {
    long x = 0;
    for (; x + PIXEL_BLOCK <= a.out.width; x += PIXEL_BLOCK) column<PIXEL_BLOCK>(a, y, x);
    switch (a.out.width - x) {
      case 3: column<3>(a, y, x); break;
      case 2: column<2>(a, y, x); break;
      case 1: column<1>(a, y, x); break;
      default: break;
    }
  }
}

void affine(const float* input, float* output, const Shape& shape, const float* scale, const float* shift, bool relu) {
  for (long pixel = 0; pixel < shape.height * shape.width; ++pixel)
    for (long c = 0; c < shape.channels; ++c) {
      const long at = (pixel * shape.channels + c) * LANES;
      const Vector x = load(input + at);
      const Vector y = (scale ? x * broadcast(scale[c]) : x) + broadcast(shift[c]);
      store(output + at, relu ? rectified(y) : y);
    }
}

void pool(const float* input, const Shape& in, float* output, const Shape& out) {
  for (long y = 0; y < out.height; ++y)
    for (long x = 0; x < out.width; ++x)
      for (long c = 0; c < in.channels; ++c) {
        const long y0 = std::max(0L, 2 * y - 1), x0 = std::max(0L, 2 * x - 1);
        Vector best = load(input + ((y0 * in.width + x0) * in.channels + c) * LANES);
        for (long iy = y0; iy < std::min(in.height, 2 * y + 2); ++iy)
          for (long ix = x0; ix < std::min(in.width, 2 * x + 2); ++ix) {
            const Vector v = load(input + ((iy * in.width + ix) * in.channels + c) * LANES);
            // A NaN is greater than everything, as in PyTorch.
            best = best >= v ? best : (best != best ? best : v);
          }
        store(output + ((y * out.width + x) * out.channels + c) * LANES, best);
      }
}

void widen(const float* input, const Shape& in, float* output, const Shape& out, long stride) {
  for (long y = 0; y < out.height; ++y)
    for (long x = 0; x < out.width; ++x) {
      const float* from = input + (y * stride * in.width + x * stride) * in.channels * LANES;
      float* to = output + (y * out.width + x) * out.channels * LANES;
      for (long c = 0; c < out.channels; ++c) store(to + c * LANES, c < in.channels ? load(from + c * LANES) : Vector{});
    }
}

void mean(const float* input, const Shape& shape, float* output) {
  const long pixels = shape.height * shape.width;
  for (long c = 0; c < shape.channels; ++c) {
    Vector sum{};
    for (long pixel = 0; pixel < pixels; ++pixel) sum += load(input + (pixel * shape.channels + c) * LANES);
    store(output + c * LANES, sum / broadcast(static_cast<float>(pixels)));
  }
}

}  // namespace
}  // namespace der_fast::lanes
