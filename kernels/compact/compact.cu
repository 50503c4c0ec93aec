// Packing an arena on the GPU: the functor of compact.cuh, one block per row of a weight or per 128 entries of a vector.
//
// Bytes moved: every kept weight is read once and written once. Reads are gathers (rows whole, columns by index), writes are in order.
// The job table goes to the device in one copy; compaction happens once per incremental step, so that launch latency does not matter.
#include <cuda_runtime.h>

#include <limits>
#include <stdexcept>
#include <string>

#include "compact_cuda.hpp"

namespace der_fast {

namespace {

using compact::Dtype;
using compact::Job;
using compact::Kind;
using compact::Layout;

constexpr int kThreads = 128;

void checked(cudaError_t status, const char* what) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("pack_cuda: ") + what + ": " + cudaGetErrorString(status));
}

template <class Source, class Target>
__device__ bool write_block(const Job& job, std::int64_t block, std::byte* arena) {
  auto* out = reinterpret_cast<Target*>(arena + job.offset);
  if (job.kind != Kind::weight) {
    const std::int64_t k = block * kThreads + threadIdx.x;
    if (k >= job.rows) return true;
    out[k] = compact::vector_entry<Source, Target>(job, k);
    return compact::finite(out[k]);
  }
  const compact::Row<Source, Target> row(job, block);
  const auto line = static_cast<std::uint32_t>(job.line());
  const auto columns = static_cast<std::uint32_t>(job.columns);
  const auto width = static_cast<std::uint32_t>(job.width);
  const std::uint32_t taps = line / columns;
  Target* target = out + block * job.line();
  bool good = true;
  for (std::uint32_t i = threadIdx.x; i < line; i += kThreads) {
    const bool krsc = job.layout == Layout::krsc;
    const std::uint32_t c = krsc ? i % columns : i / taps;
    const std::uint32_t tap = krsc ? i / columns : i % taps;
    const Target value = row.at(job, c)(tap / width, tap % width);
    good &= compact::finite(value);
    target[i] = value;
  }
  return good;
}

template <class Source>
__device__ bool write_from(const Job& job, std::int64_t block, std::byte* arena) {
  switch (job.target) {
    case Dtype::float64: return write_block<Source, double>(job, block, arena);
    case Dtype::bfloat16: return write_block<Source, compact::Bfloat16>(job, block, arena);
    case Dtype::float16: return write_block<Source, compact::Float16>(job, block, arena);
    default: return write_block<Source, float>(job, block, arena);
  }
}

// `first` holds the first block of every job, and behind them the number of blocks.
__global__ void __launch_bounds__(kThreads)
    compact_kernel(const Job* jobs, const std::int64_t* first, int count, std::byte* arena, int* bad) {
  const std::int64_t block = blockIdx.x;
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (first[middle] <= block ? low : high) = middle;
  }
  const Job& job = jobs[low];
  const bool good = job.source == Dtype::float64 ? write_from<double>(job, block - first[low], arena)
                                                 : write_from<float>(job, block - first[low], arena);
  if (!good) atomicMin(bad, low);
}

std::int64_t blocks_of(const Job& job) {
  if (job.line() == 0) return 0;
  return job.kind == Kind::weight ? job.rows : (job.rows + kThreads - 1) / kThreads;
}

// The table as the device sees it: jobs, first blocks, all indices, and the first bad job, in one piece of memory.
class Table {
 public:
  Table(const std::vector<Job>& jobs, cudaStream_t stream) : stream_(stream) {
    const std::size_t count = jobs.size();
    std::size_t indices = 0;
    for (const Job& job : jobs) indices += static_cast<std::size_t>(job.rows + (job.column ? job.columns : 0));
    first_at_ = count * sizeof(Job);
    bad_at_ = first_at_ + (count + 1) * sizeof(std::int64_t);
    const std::size_t indices_at = bad_at_ + sizeof(std::int64_t);
    std::vector<std::byte> host(indices_at + indices * sizeof(std::int32_t));
    checked(cudaMallocAsync(&device_, host.size(), stream_), "allocating the job table");
    auto* table = reinterpret_cast<Job*>(host.data());
    auto* first = reinterpret_cast<std::int64_t*>(host.data() + first_at_);
    std::size_t at = indices_at;
    const auto moved = [&](const std::int32_t* from, std::int64_t length) {
      const std::size_t size = static_cast<std::size_t>(length) * sizeof(std::int32_t);
      if (size) memcpy(host.data() + at, from, size);
      at += size;
      return reinterpret_cast<const std::int32_t*>(device_ + at - size);
    };
    for (std::size_t i = 0; i < count; ++i) {
      Job job = jobs[i];
      job.row = moved(job.row, job.rows);
      if (job.column) job.column = moved(job.column, job.columns);
      table[i] = job;
      first[i + 1] = first[i] + blocks_of(job);
    }
    blocks_ = first[count];
    *reinterpret_cast<int*>(host.data() + bad_at_) = std::numeric_limits<int>::max();
    // The host's memory is pageable, so that the copy has left it when this returns.
    checked(cudaMemcpyAsync(device_, host.data(), host.size(), cudaMemcpyHostToDevice, stream_), "copying the job table");
  }
  ~Table() { cudaFreeAsync(device_, stream_); }
  Table(const Table&) = delete;
  Table& operator=(const Table&) = delete;

  std::int64_t blocks() const { return blocks_; }
  const Job* jobs() const { return reinterpret_cast<const Job*>(device_); }
  const std::int64_t* first() const { return reinterpret_cast<const std::int64_t*>(device_ + first_at_); }
  int* bad() const { return reinterpret_cast<int*>(device_ + bad_at_); }

 private:
  cudaStream_t stream_;
  std::byte* device_ = nullptr;
  std::size_t first_at_ = 0;
  std::size_t bad_at_ = 0;
  std::int64_t blocks_ = 0;
};

class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    checked(cudaGetDevice(&before_), "finding the current device");
    checked(cudaSetDevice(device), "choosing the device");
  }
  ~DeviceGuard() { cudaSetDevice(before_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
};

}  // namespace

std::int64_t pack_cuda(const std::vector<Job>& jobs, std::byte* arena, std::int64_t bytes, int device, void* stream_handle) {
  if (bytes == 0) return -1;
  const DeviceGuard guard(device);
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  checked(cudaMemsetAsync(arena, 0, static_cast<std::size_t>(bytes), stream), "clearing the arena");
  if (jobs.empty()) return -1;
  const Table table(jobs, stream);
  if (table.blocks() > std::numeric_limits<int>::max()) throw std::runtime_error("pack_cuda: the arena has too many rows");
  int bad = std::numeric_limits<int>::max();
  if (table.blocks() > 0) {
    const auto blocks = static_cast<unsigned>(table.blocks());
    compact_kernel<<<blocks, kThreads, 0, stream>>>(table.jobs(), table.first(), static_cast<int>(jobs.size()), arena, table.bad());
    checked(cudaGetLastError(), "launching");
  }
  checked(cudaMemcpyAsync(&bad, table.bad(), sizeof bad, cudaMemcpyDeviceToHost, stream), "reading the result");
  checked(cudaStreamSynchronize(stream), "packing");
  return bad == std::numeric_limits<int>::max() ? -1 : bad;
}

}  // namespace der_fast
