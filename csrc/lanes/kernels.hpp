// Kernels of the batch-in-lanes executor: every value is laid out (H, W, C, lanes), one image per SIMD lane.
//
// Lanes never mix, so every width works without padding, and an image's features do not depend on the other images in the vector.
// Weights are read in place, (K, R, S, C), one broadcast for several pixels.
#pragma once

namespace der_fast::lanes {

struct Shape {
  long height = 0;
  long width = 0;
  long channels = 0;
};

struct Conv {
  const float* input;
  Shape in;
  float* output;
  Shape out;
  const float* weight;    // (K, R, S, C)
  const float* bias;      // (K,), may be null
  const float* residual;  // as output; may be null or the output itself
  long kernel;
  long stride;
  bool relu;
};

// One instruction set's functions. `lanes` floats make one vector; every buffer is aligned to it.
struct Kernels {
  const char* name;
  long lanes;
  void (*conv)(const Conv& conv);
  // y = x · scale + shift (scale may be null for 1), then ReLU.
  void (*affine)(const float* input, float* output, const Shape& shape, const float* scale, const float* shift, bool relu);
  // 3×3 maximum, stride 2, padding 1.
  void (*pool)(const float* input, const Shape& in, float* output, const Shape& out);
  // Every stride-th row and column; channels that the input lacks are zero.
  void (*widen)(const float* input, const Shape& in, float* output, const Shape& out, long stride);
  // Sum over pixels / pixels into (C, lanes).
  void (*mean)(const float* input, const Shape& shape, float* output);
};

const Kernels* avx512();
const Kernels* avx2();

}  // namespace der_fast::lanes
