// Compiled with -mavx512f and related options; called only on processors that support them.
#define LANES 16
#define OUT_BLOCK 6
#define PIXEL_BLOCK 4
#include "kernels.inl"

namespace der_fast::lanes {

const Kernels* avx512() {
  static constexpr Kernels kernels{"avx512", LANES, conv, affine, pool, widen, mean};
  return &kernels;
}

}  // namespace der_fast::lanes
