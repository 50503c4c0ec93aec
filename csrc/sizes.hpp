// Sizes come from outside, so their products and sums could be anything: these functions stay within 64 bits.
#pragma once

#include <algorithm>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

namespace der_fast {

// The alignment of every tensor in an arena, in bytes.
constexpr std::int64_t kAlignment = 64;
// Limit for elements and bytes: more than any machine addresses, and far enough from 2^63 for further arithmetic.
constexpr std::int64_t kMost = std::int64_t{1} << 48;

// The product of non-negative sizes, or nothing if it exceeds kMost.
inline std::optional<std::int64_t> product(const std::vector<std::int64_t>& sizes) {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return 0;
  std::int64_t count = 1;
  for (const std::int64_t size : sizes) {
    if (count > kMost / size) return std::nullopt;
    count *= size;
  }
  return count;
}

inline std::string whole_number(std::int64_t low, std::int64_t high) {
  return "a whole number from " + std::to_string(low) + " to " + std::to_string(high);
}

}  // namespace der_fast
