// Compiled with -mavx2 and -mfma; called only on processors that support them.
#define LANES 8
#define OUT_BLOCK 3
#define PIXEL_BLOCK 4
#include "kernels.inl"

namespace der_fast::lanes {

const Kernels* avx2() {
  static constexpr Kernels kernels{"avx2", LANES, conv, affine, pool, widen, mean};
  return &kernels;
}

}  // namespace der_fast::lanes
