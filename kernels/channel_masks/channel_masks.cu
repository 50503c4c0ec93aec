// Channel masks on the GPU: the functions of channel_masks.cuh, one launch each way.
//
// Forward: one block, because the loss depends on every mask; a warp per row, then a thread per group and per convolution. Its stages pass
// their results on through global memory, which a barrier makes visible within a block. Backward: a block per row.
#include "channel_masks_cuda.hpp"
#include "cuda_launch.hpp"

namespace der_fast::channel_masks {

namespace {

constexpr int kForwardThreads = 1024;
constexpr int kBackwardThreads = 128;

// Sums over the lanes as a tree; every lane gets the sum, since addition commutes.
__device__ __forceinline__ double sum_of_lanes(double value) {
#pragma unroll
  for (int offset = kLanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

template <class T>
__global__ void __launch_bounds__(kForwardThreads)
    channel_masks_forward(Structure s, const T* logits, const T* scale, T* masks, T* loss, double* memory) {
  const Work work(memory, s);
  const int lane = threadIdx.x % kLanes;
  const T factor = *scale;
  for (std::int32_t row = threadIdx.x / kLanes; row < s.rows; row += kForwardThreads / kLanes) {
    const double sum = sum_of_lanes(row_lane<T>(s, logits, factor, masks, row, lane));
    if (lane == 0) work.rows[row] = sum;
  }
  __syncthreads();
  for (std::int32_t group = threadIdx.x; group < s.groups; group += kForwardThreads) work.groups[group] = group_sum(s, work, group);
  __syncthreads();
  for (std::int32_t l = threadIdx.x; l < s.convs; l += kForwardThreads) write_sides(s, work, l);
  __syncthreads();
  if (threadIdx.x < kLanes) {
    const double count = sum_of_lanes(count_lane(s, work.sides, lane));
    if (lane == 0) *loss = static_cast<T>(count / s.full);
  }
}

template <class T>
__global__ void __launch_bounds__(kBackwardThreads)
    channel_masks_backward(Structure s, const T* logits, const double* sides, const T* grad_masks, const T* grad_loss, T* gradient) {
  const std::int32_t row = static_cast<std::int32_t>(blockIdx.x);
  double slope = 0;
  // Every warp of the block computes it: that is less work than sharing the sum.
  if (grad_loss) slope = sum_of_lanes(slope_lane(s, sides, s.row[3 * row + 2], threadIdx.x % kLanes)) / s.full;
  for (std::int32_t c = s.row[3 * row] + static_cast<std::int32_t>(threadIdx.x); c < s.row[3 * row + 1]; c += kBackwardThreads) {
    gradient[c] = gradient_of<T>(logits, grad_masks, grad_loss, slope, c);
  }
}

}  // namespace

template <class T>
void forward_cuda(const Structure& s, const T* logits, const T* scale, T* masks, T* loss, double* work, int device, void* stream) {
  const DeviceGuard guard(device);
  channel_masks_forward<T><<<1, kForwardThreads, 0, static_cast<cudaStream_t>(stream)>>>(s, logits, scale, masks, loss, work);
  checked(cudaGetLastError(), "channel_masks_forward");
}

template <class T>
void backward_cuda(const Structure& s, const T* logits, const double* sides, const T* grad_masks, const T* grad_loss, T* gradient,
                   int device, void* stream) {
  if (s.rows == 0) return;
  const DeviceGuard guard(device);
  channel_masks_backward<T><<<static_cast<unsigned>(s.rows), kBackwardThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      s, logits, sides, grad_masks, grad_loss, gradient);
  checked(cudaGetLastError(), "channel_masks_backward");
}

template void forward_cuda<float>(const Structure&, const float*, const float*, float*, float*, double*, int, void*);
template void forward_cuda<double>(const Structure&, const double*, const double*, double*, double*, double*, int, void*);
template void backward_cuda<float>(const Structure&, const float*, const double*, const float*, const float*, float*, int, void*);
template void backward_cuda<double>(const Structure&, const double*, const double*, const double*, const double*, double*, int, void*);

}  // namespace der_fast::channel_masks
