// The CPU loop around the functor of compact.cuh.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "compact.cuh"

namespace der_fast {

// Throws std::invalid_argument unless the jobs follow one another within `bytes` bytes, each at a multiple of 64.
void check(const std::vector<compact::Job>& jobs, std::int64_t bytes);

// Fills `arena` (`bytes` long) with every job's tensor, and the gaps between them with zeros; `check` must have passed. 0 threads: one per
// processor. Returns the first job with an entry that is not finite, or -1.
std::int64_t pack(const std::vector<compact::Job>& jobs, std::byte* arena, std::int64_t bytes, int threads);

}  // namespace der_fast
