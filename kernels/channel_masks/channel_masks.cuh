// Channel masks, group sums, sparsity loss and the compensated gradient, for CPU loops and CUDA kernels alike; the equations are in
// reference.py, the tables in structure.py.
//
// Only additions, multiplications and divisions, in a prescribed order: build with contraction off (-ffp-contract=off, -fmad=false), and
// CPU and GPU give the same bits. Masks are computed in T (float or double), sums in double. In a sum over many terms each of 32 lanes adds
// every 32nd term in order; a tree then adds up the lanes.
#pragma once

#include "host_device.cuh"

namespace der_fast::channel_masks {

constexpr int kLanes = 32;

// Tables of one network; see structure.py.
struct Structure {
  std::int32_t rows = 0;
  std::int32_t groups = 0;
  std::int32_t convs = 0;
  std::int32_t span = 0;
  const std::int32_t* row = nullptr;          // (rows, 3): first channel, one past the last, group
  const std::int32_t* row_offset = nullptr;   // (groups + 1,)
  const std::int32_t* conv = nullptr;         // (convs, 2 + 2·span): image, area, groups read, groups written
  const std::int32_t* user_offset = nullptr;  // (groups + 1,)
  const std::int32_t* user = nullptr;
  double full = 1;

  DER_FAST_HD const std::int32_t* conv_entry(std::int32_t l) const { return conv + static_cast<std::int64_t>(l) * (2 + 2 * span); }
};

// What the stages of the forward pass pass on: row sums, group sums, sides.
struct Work {
  double* rows;
  double* groups;
  double* sides;  // what convolution l reads, then, `convs` further on, what it writes

  DER_FAST_HD Work(double* memory, const Structure& s) : rows(memory), groups(rows + s.rows), sides(groups + s.groups) {}
};

template <class T>
struct Exponential;

// −ln 2 in two parts, the first short enough for its product with the exponent to be exact; the largest argument whose power is a normal
// number; the number of Taylor terms, so that the first omitted term is below a quarter of the last bit.
template <>
struct Exponential<float> {
  static constexpr float high = -0.693359375F, low = 2.12194440054690583e-4F, per_two = 1.44269504F, largest = 87.0F;
  static constexpr int terms = 8;
  DER_FAST_HD static float power_of_two(int n) { return bits_of<float>(static_cast<std::uint32_t>(127 - n) << 23); }
};
template <>
struct Exponential<double> {
  static constexpr double high = -6.93147180369123816490e-01, low = -1.90821492927058770002e-10, per_two = 1.44269504088896340736;
  static constexpr double largest = 708.0;
  static constexpr int terms = 14;
  DER_FAST_HD static double power_of_two(int n) { return bits_of<double>(static_cast<std::uint64_t>(1023 - n) << 52); }
};

// exp(−a) for a ≥ 0; zero where the result would be denormal, and NaN where a is.
template <class T>
DER_FAST_HD T power(T a) {
  using E = Exponential<T>;
  if (!(a <= E::largest)) return a > E::largest ? T(0) : a;
  // exp(−a) = 2^−n · exp(n·ln 2 − a)
  const int n = static_cast<int>(a * E::per_two + T(0.5));
  const T r = -((a + static_cast<T>(n) * E::high) + static_cast<T>(n) * E::low);
  T sum = 1;
#if defined(__CUDACC__)
#pragma unroll
#endif
  for (int k = E::terms - 1; k > 0; --k) sum = T(1) + r * (T(1) / static_cast<T>(k)) * sum;
  return sum * E::power_of_two(n);
}

// σ(x), exactly zero below 2^-24.
template <class T>
DER_FAST_HD T mask_of(T x) {
  const T p = power<T>(x < T(0) ? -x : x);
  const T mask = (x >= T(0) ? T(1) : p) / (T(1) + p);
  return mask < T(5.9604644775390625e-08) ? T(0) : mask;
}

// σ(e)[1 − σ(e)]
template <class T>
DER_FAST_HD T slope_of(T e) {
  const T p = power<T>(e < T(0) ? -e : e);
  return p / ((T(1) + p) * (T(1) + p));
}

// Stage 1, one lane of a row: writes the masks and returns their sum.
template <class T>
DER_FAST_HD double row_lane(const Structure& s, const T* logits, T scale, T* masks, std::int32_t row, int lane) {
  const std::int32_t end = s.row[3 * row + 1];
  double sum = 0;
  for (std::int32_t c = s.row[3 * row] + lane; c < end; c += kLanes) {
    const T mask = mask_of<T>(logits[c] * scale);
    masks[c] = mask;
    sum += static_cast<double>(mask);
  }
  return sum;
}

// Stage 2: the sum of a group.
DER_FAST_HD double group_sum(const Structure& s, const Work& work, std::int32_t group) {
  double sum = 0;
  for (std::int32_t row = s.row_offset[group]; row < s.row_offset[group + 1]; ++row) sum += work.rows[row];
  return sum;
}

// Stage 3: what convolution l reads and writes.
DER_FAST_HD void write_sides(const Structure& s, const Work& work, std::int32_t l) {
  const std::int32_t* entry = s.conv_entry(l);
  double reads = entry[0], writes = 0;
  for (std::int32_t i = 0; i < s.span; ++i) {
    const std::int32_t read = entry[2 + i], written = entry[2 + s.span + i];
    if (read >= 0) reads += work.groups[read];
    if (written >= 0) writes += work.groups[written];
  }
  work.sides[l] = reads;
  work.sides[s.convs + l] = writes;
}

// Stage 4, one lane of the soft parameter count.
DER_FAST_HD double count_lane(const Structure& s, const double* sides, int lane) {
  double sum = 0;
  for (std::int32_t l = lane; l < s.convs; l += kLanes) sum += static_cast<double>(s.conv_entry(l)[1]) * sides[l] * sides[s.convs + l];
  return sum;
}

// Backward, one lane of a group's slope ∂L_S/∂m times `full`.
DER_FAST_HD double slope_lane(const Structure& s, const double* sides, std::int32_t group, int lane) {
  double sum = 0;
  for (std::int32_t i = s.user_offset[group] + lane; i < s.user_offset[group + 1]; i += kLanes) {
    const std::int32_t user = s.user[i];
    sum += static_cast<double>(s.conv_entry(user < s.convs ? user : user - s.convs)[1]) * sides[user];
  }
  return sum;
}

// Backward, one channel. `grad_masks` may be null, as `grad_loss` may; `slope` is the group's.
template <class T>
DER_FAST_HD T gradient_of(const T* logits, const T* grad_masks, const T* grad_loss, double slope, std::int32_t c) {
  T arriving = grad_masks ? grad_masks[c] : T(0);
  if (grad_loss) arriving += static_cast<T>(slope) * *grad_loss;
  return arriving * slope_of<T>(logits[c]);
}

}  // namespace der_fast::channel_masks
