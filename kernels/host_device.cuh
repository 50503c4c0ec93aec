// For code that both a C++ compiler and nvcc compile.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define DER_FAST_HD __host__ __device__ __forceinline__
#else
#define DER_FAST_HD inline
#endif

namespace der_fast {

template <class To, class From>
DER_FAST_HD To bits_of(const From& value) {
  static_assert(sizeof(To) == sizeof(From));
  To out;
  memcpy(&out, &value, sizeof(To));
  return out;
}

}  // namespace der_fast
