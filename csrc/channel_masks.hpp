// The CPU loops around the functions of channel_masks.cuh.
#pragma once

#include "channel_masks.cuh"

namespace der_fast::channel_masks {

// Throws std::invalid_argument if an entry of the tables points to a channel, row, group or convolution that does not exist.
void check(const Structure& s, std::int64_t channels, std::int64_t users);

// Fills `masks` (C,), `loss` (1,) and `work` (rows + groups + 2·convs,); the last part of `work` holds the sides for the backward pass.
template <class T>
void forward(const Structure& s, const T* logits, const T* scale, T* masks, T* loss, double* work);

// Fills `gradient` (C,) with the gradient of masks and loss together; `grad_masks` (C,) and `grad_loss` (1,) may be null.
template <class T>
void backward(const Structure& s, const T* logits, const double* sides, const T* grad_masks, const T* grad_loss, T* gradient);

}  // namespace der_fast::channel_masks
