// The CUDA launcher of compact.cu, callable from code that a plain C++ compiler builds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "compact.cuh"

namespace der_fast {

// As `pack`, on a device: the jobs' rows and columns lie on the host, everything else that they point to, and `arena`, on `device`.
// Returns when the arena is complete. Throws std::runtime_error with CUDA's message.
std::int64_t pack_cuda(const std::vector<compact::Job>& jobs, std::byte* arena, std::int64_t bytes, int device, void* stream);

}  // namespace der_fast
