// The CUDA launcher of compact.cu, callable from code that a plain C++ compiler builds.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "compact.cuh"

namespace der_fast {

// Bytes of device memory that `pack_cuda` needs besides the arena, for this many jobs with this many rows and columns in total.
std::size_t pack_cuda_workspace(std::size_t jobs, std::size_t indices);

// Like `pack`, on a device: the jobs' rows and columns are on the host; everything else that they point to, `arena` and `workspace`
// (aligned to 8 bytes) are on `device`. Works on `stream` and returns when the arena is complete. Throws std::runtime_error with CUDA's
// message.
std::int64_t pack_cuda(const std::vector<compact::Job>& jobs, std::byte* arena, std::int64_t bytes, std::byte* workspace, int device,
                       void* stream);

}  // namespace der_fast
