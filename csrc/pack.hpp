// The CPU loop around the functor of compact.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "compact.cuh"

namespace der_fast {

// Fills `arena` (`bytes` long; the jobs' ranges are ascending and do not overlap) with every job's tensor, and the gaps between them
// with zeros. Returns the first job one of whose entries is not a finite number, or -1.
std::int64_t pack(const std::vector<compact::Job>& jobs, std::byte* arena, std::int64_t bytes, int threads);

}  // namespace der_fast
