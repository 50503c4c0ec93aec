// Packing an arena on the GPU: the functor of compact.cuh, all jobs in one launch, a block per row of a weight or 128 vector entries.
//
// Bytes moved: every kept weight is read once and written once. Reads are gathers (rows whole, columns by index), writes are in order.
// The job table goes to the device in one copy. Compaction happens once per incremental step, so launch latency does not matter.
#include "compact_cuda.hpp"
#include "cuda_launch.hpp"
#include "job_table.hpp"

namespace der_fast {

namespace {

using compact::Job;

__global__ void __launch_bounds__(compact::kBlockThreads)
    compact_kernel(const Job* jobs, const std::int64_t* first, int count, std::byte* arena, int* bad) {
  const std::int64_t block = blockIdx.x;
  const int job = compact::job_of_block(first, count, block);
  const bool good = compact::write_thread_of(jobs[job], block - first[job], static_cast<int>(threadIdx.x), arena);
  if (!good) atomicMin(bad, job);
}

}  // namespace

std::size_t pack_cuda_workspace(std::size_t jobs, std::size_t indices) { return compact::TableLayout(jobs, indices).bytes; }

std::int64_t pack_cuda(const std::vector<Job>& jobs, std::byte* arena, std::int64_t bytes, std::byte* workspace, int device,
                       void* stream_handle) {
  if (bytes == 0) return -1;
  const compact::TableLayout layout(jobs);
  std::vector<std::byte> host(layout.bytes);
  const std::int64_t blocks = compact::write_table(jobs, layout, host.data(), workspace);
  if (blocks > std::numeric_limits<std::int32_t>::max()) throw std::invalid_argument("jobs have too many rows in total");
  const DeviceGuard guard(device);
  auto* stream = static_cast<cudaStream_t>(stream_handle);
  checked(cudaMemsetAsync(arena, 0, static_cast<std::size_t>(bytes), stream), "pack_cuda: clearing the arena");
  int bad = compact::kNoBadJob;
  if (blocks > 0) {
    checked(cudaMemcpyAsync(workspace, host.data(), host.size(), cudaMemcpyHostToDevice, stream), "pack_cuda: copying the job table");
    auto* device_bad = reinterpret_cast<int*>(workspace + layout.bad);
    compact_kernel<<<static_cast<unsigned>(blocks), compact::kBlockThreads, 0, stream>>>(
        reinterpret_cast<const Job*>(workspace), reinterpret_cast<const std::int64_t*>(workspace + layout.first),
        static_cast<int>(jobs.size()), arena, device_bad);
    checked(cudaGetLastError(), "pack_cuda: launching");
    checked(cudaMemcpyAsync(&bad, device_bad, sizeof bad, cudaMemcpyDeviceToHost, stream), "pack_cuda: reading the result");
  }
  // Before the host's table is freed, and so that an error of the kernel appears here and not later.
  checked(cudaStreamSynchronize(stream), "pack_cuda: packing");
  return bad == compact::kNoBadJob ? -1 : bad;
}

}  // namespace der_fast
