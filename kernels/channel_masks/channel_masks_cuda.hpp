// The CUDA launchers of channel_masks.cu, callable from code that a plain C++ compiler builds.
#pragma once

#include "channel_masks.cuh"

namespace der_fast::channel_masks {

// Like the functions of csrc/channel_masks.hpp, with every pointer (including those in `s`) on `device`. They put one launch on `stream`,
// which may be capturing, and return at once. They throw std::runtime_error with CUDA's message.
template <class T>
void forward_cuda(const Structure& s, const T* logits, const T* scale, T* masks, T* loss, double* work, int device, void* stream);
template <class T>
void backward_cuda(const Structure& s, const T* logits, const double* sides, const T* grad_masks, const T* grad_loss, T* gradient,
                   int device, void* stream);

}  // namespace der_fast::channel_masks
