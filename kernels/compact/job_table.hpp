// The table that the CUDA launcher copies to the device: jobs, their first blocks, the first bad job, all indices. Plain C++, so that the
// C++ tests can build one on the host and run every block of it there.
#pragma once

#include <cstddef>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "compact.cuh"

namespace der_fast::compact {

// Offsets in bytes.
struct TableLayout {
  std::size_t first = 0;  // int64 (jobs + 1,): the first block of every job, and the number of blocks
  std::size_t bad = 0;    // int32: the first job with an entry that is not finite, or the largest int
  std::size_t indices = 0;
  std::size_t bytes = 0;

  TableLayout(std::size_t jobs, std::size_t index_count) {
    first = jobs * sizeof(Job);
    bad = first + (jobs + 1) * sizeof(std::int64_t);
    indices = bad + sizeof(std::int64_t);
    bytes = indices + index_count * sizeof(std::int32_t);
  }
  explicit TableLayout(const std::vector<Job>& jobs) : TableLayout(jobs.size(), index_count(jobs)) {}

  static std::size_t index_count(const std::vector<Job>& jobs) {
    std::size_t count = 0;
    for (const Job& job : jobs) count += static_cast<std::size_t>(job.rows + (job.column ? job.columns : 0));
    return count;
  }
};

constexpr int kNoBadJob = std::numeric_limits<int>::max();

// Writes the table into `host`, with pointers to its indices as they will be once it is copied to `device`. Returns the number of blocks.
inline std::int64_t write_table(const std::vector<Job>& jobs, const TableLayout& layout, std::byte* host, std::byte* device) {
  auto* table = reinterpret_cast<Job*>(host);
  auto* first = reinterpret_cast<std::int64_t*>(host + layout.first);
  std::size_t at = layout.indices;
  const auto moved = [&](const std::int32_t* from, std::int64_t length) {
    const std::size_t size = static_cast<std::size_t>(length) * sizeof(std::int32_t);
    if (size) memcpy(host + at, from, size);
    at += size;
    return reinterpret_cast<const std::int32_t*>(device + (at - size));
  };
  first[0] = 0;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    Job job = jobs[i];
    // Threads count the entries of a row in 32 bits.
    if (job.line() > std::numeric_limits<std::int32_t>::max()) {
      throw std::invalid_argument("jobs[" + std::to_string(i) + "] has " + std::to_string(job.line()) + " entries per row: too many");
    }
    job.row = moved(job.row, job.rows);
    if (job.column) job.column = moved(job.column, job.columns);
    memcpy(table + i, &job, sizeof job);
    first[i + 1] = first[i] + blocks_of(job);
  }
  memcpy(host + layout.bad, &kNoBadJob, sizeof kNoBadJob);
  return first[jobs.size()];
}

}  // namespace der_fast::compact
