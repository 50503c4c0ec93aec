// Gather, batch-norm fold, zero padding, cast and layout of one tensor of an arena, for CPU loops and CUDA kernels alike.
//
//   weight  W'[k, c, r, s] = rounded(scale(row[k]) · W[row[k], column[c], r, s])      0 where row[k] or column[c] is -1
//   scale   v[k] = rounded(scale(row[k])),     scale(i) = γ[i] / √(σ²[i] + ε), or 1 for a weight without batch-norm
//   shift   v[k] = rounded(β[row[k]] − scale(row[k]) · μ[row[k]])
//   copy    v[k] = rounded(source[row[k]])
//
// Everything is computed in double and rounded once, to nearest even. Build with contraction off (-ffp-contract=off, -fmad=false): then
// CPU, GPU and kernels/compact/reference.py give the same bits.
#pragma once

#include <cstddef>
#include <type_traits>

#include "host_device.cuh"

namespace der_fast::compact {

enum class Kind : std::int32_t { weight = 0, scale = 1, shift = 2, copy = 3 };
enum class Dtype : std::int32_t { float64 = 0, float32 = 1, bfloat16 = 2, float16 = 3, int32 = 4, boolean = 5, byte = 6 };
enum class Layout : std::int32_t { kcrs = 0, krsc = 1 };

DER_FAST_HD std::int64_t size_of(Dtype dtype) {
  if (dtype == Dtype::float64) return 8;
  if (dtype == Dtype::float32 || dtype == Dtype::int32) return 4;
  return dtype == Dtype::bfloat16 || dtype == Dtype::float16 ? 2 : 1;
}

struct Vector {
  const void* data = nullptr;
  std::int64_t stride = 0;  // in elements, as all strides here
};

// One tensor of the arena. Trivially copyable: the CUDA launcher copies an array of these to the device.
struct Job {
  Kind kind = Kind::weight;
  Dtype source = Dtype::float32;
  Dtype target = Dtype::float32;
  Layout layout = Layout::kcrs;
  std::int64_t offset = 0;  // in bytes from the start of the arena
  std::int64_t rows = 0;
  std::int64_t columns = 1;
  std::int64_t height = 1;
  std::int64_t width = 1;
  const std::int32_t* row = nullptr;
  const std::int32_t* column = nullptr;  // weights only
  const void* weight = nullptr;          // (K, C, R, S), or (K,) for a copy
  std::int64_t strides[4] = {0, 0, 0, 0};
  Vector gamma, beta, mean, variance;  // gamma.data is null for a weight without batch-norm
  double epsilon = 0;

  // Elements per row.
  DER_FAST_HD std::int64_t line() const { return columns * height * width; }
  // Only for jobs that passed `check` in csrc/pack.hpp: unchecked sizes can overflow.
  DER_FAST_HD std::int64_t bytes() const { return rows * line() * size_of(target); }
};

struct Bfloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

// double → float with round to odd: truncated, last bit set where anything was lost. A second rounding to fewer bits is then exact
// (Boldo and Melquiond 2008). Without branches, since whether the nearest float is above or below is practically random.
DER_FAST_HD std::uint32_t odd_float_bits(double value) {
  const auto nearest = static_cast<float>(value);
  const auto back = static_cast<double>(nearest);
  const auto lost = static_cast<std::uint32_t>(back != value);
  const auto above = static_cast<std::uint32_t>(fabs(back) > fabs(value));
  return (bits_of<std::uint32_t>(nearest) - above) | lost;
}

template <class T>
DER_FAST_HD T rounded(double value) {
  if constexpr (std::is_same_v<T, Bfloat16>) {
    std::uint32_t bits = odd_float_bits(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return {static_cast<std::uint16_t>((bits >> 16) | 0x40u)};
    bits += 0x7fffu + ((bits >> 16) & 1u);
    return {static_cast<std::uint16_t>(bits >> 16)};
  } else if constexpr (std::is_same_v<T, Float16>) {
    const std::uint32_t bits = odd_float_bits(value);
    const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
    const std::uint32_t size = bits & 0x7fffffffu;
    if (size > 0x7f800000u) return {static_cast<std::uint16_t>(sign | 0x7e00u)};
    if (size >= 0x47800000u) return {static_cast<std::uint16_t>(sign | 0x7c00u)};  // 65536 and above
    if (size < 0x33000000u) return {sign};                                         // below half of the smallest subnormal
    std::uint32_t kept;
    std::uint32_t lost;
    std::uint32_t half;
    if (size < 0x38800000u) {  // subnormal: the exponent decides how many bits are left
      const std::uint32_t shift = 126u - (size >> 23);
      const std::uint32_t mantissa = (size & 0x7fffffu) | 0x800000u;
      kept = mantissa >> shift;
      lost = mantissa & ((1u << shift) - 1u);
      half = 1u << (shift - 1u);
    } else {
      kept = (size - 0x38000000u) >> 13;
      lost = size & 0x1fffu;
      half = 0x1000u;
    }
    // A carry out of the mantissa moves into the exponent, and the largest number becomes infinity, as it should.
    if (lost > half || (lost == half && (kept & 1u))) kept += 1;
    return {static_cast<std::uint16_t>(sign | kept)};
  } else {
    return static_cast<T>(value);
  }
}

DER_FAST_HD bool finite(double value) { return (bits_of<std::uint64_t>(value) & 0x7ff0000000000000ull) != 0x7ff0000000000000ull; }
DER_FAST_HD bool finite(float value) { return (bits_of<std::uint32_t>(value) & 0x7f800000u) != 0x7f800000u; }
DER_FAST_HD bool finite(Bfloat16 value) { return (value.bits & 0x7f80u) != 0x7f80u; }
DER_FAST_HD bool finite(Float16 value) { return (value.bits & 0x7c00u) != 0x7c00u; }

template <class Source>
DER_FAST_HD double element(const Vector& vector, std::int64_t index) {
  return static_cast<double>(static_cast<const Source*>(vector.data)[index * vector.stride]);
}

template <class Source>
DER_FAST_HD double scale_of(const Job& job, std::int64_t index) {
  return element<Source>(job.gamma, index) / sqrt(element<Source>(job.variance, index) + job.epsilon);
}

// Entries [k, c, :, :] of a weight; what does not depend on the tap is computed once.
template <class Source, class Target>
struct Taps {
  const Source* data;  // null for padding
  std::int64_t down;
  std::int64_t right;
  double scale;

  DER_FAST_HD Target operator()(std::int64_t r, std::int64_t s) const {
    if (data == nullptr) return rounded<Target>(0.0);
    return rounded<Target>(static_cast<double>(data[r * down + s * right]) * scale);
  }
};

// Entries [k, :, :, :] of a weight; what does not depend on the column is computed once.
template <class Source, class Target>
struct Row {
  const Source* data = nullptr;
  double scale = 1;  // without batch-norm: a product with 1 is exact

  DER_FAST_HD Row(const Job& job, std::int64_t k) {
    const std::int64_t index = job.row[k];
    if (index < 0 || job.weight == nullptr) return;  // no address is calculated from null
    data = static_cast<const Source*>(job.weight) + index * job.strides[0];
    if (job.gamma.data != nullptr) scale = scale_of<Source>(job, index);
  }

  DER_FAST_HD Taps<Source, Target> at(const Job& job, std::int64_t c) const {
    const std::int64_t index = job.column[c];
    const bool padding = data == nullptr || index < 0;
    return {padding ? nullptr : data + index * job.strides[1], job.strides[2], job.strides[3], scale};
  }
};

template <class Source, class Target>
DER_FAST_HD Target vector_entry(const Job& job, std::int64_t k) {
  const std::int64_t index = job.row[k];
  if (index < 0) return rounded<Target>(0.0);
  if (job.kind == Kind::copy) return rounded<Target>(element<Source>({job.weight, job.strides[0]}, index));
  const double scale = scale_of<Source>(job, index);
  if (job.kind == Kind::scale) return rounded<Target>(scale);
  return rounded<Target>(element<Source>(job.beta, index) - scale * element<Source>(job.mean, index));
}

// One block of threads writes a row of a weight, or this many entries of a vector.
constexpr int kBlockThreads = 128;

DER_FAST_HD std::int64_t blocks_of(const Job& job) {
  if (job.line() == 0) return 0;
  return job.kind == Kind::weight ? job.rows : (job.rows + kBlockThreads - 1) / kBlockThreads;
}

// The job that `block` belongs to: the last one whose first block is not after it, so that jobs without blocks are skipped.
DER_FAST_HD int job_of_block(const std::int64_t* first, int count, std::int64_t block) {
  int low = 0;
  int high = count;
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    (first[middle] <= block ? low : high) = middle;
  }
  return low;
}

// Writes the entries of thread `thread` in a job's block `block`; neighbouring threads write neighbouring entries. Returns whether all are
// finite.
template <class Source, class Target>
DER_FAST_HD bool write_thread(const Job& job, std::int64_t block, int thread, std::byte* arena) {
  auto* out = reinterpret_cast<Target*>(arena + job.offset);
  if (job.kind != Kind::weight) {
    const std::int64_t k = block * kBlockThreads + thread;
    if (k >= job.rows) return true;
    out[k] = vector_entry<Source, Target>(job, k);
    return finite(out[k]);
  }
  const Row<Source, Target> row(job, block);
  const bool krsc = job.layout == Layout::krsc;
  const auto line = static_cast<std::uint32_t>(job.line());
  const auto columns = static_cast<std::uint32_t>(job.columns);
  const auto width = static_cast<std::uint32_t>(job.width);
  const std::uint32_t taps = line / columns;
  Target* target = out + block * job.line();
  bool good = true;
  for (std::uint32_t i = static_cast<std::uint32_t>(thread); i < line; i += kBlockThreads) {
    const std::uint32_t c = krsc ? i % columns : i / taps;
    const std::uint32_t tap = krsc ? i / columns : i % taps;
    const Target value = row.at(job, c)(tap / width, tap % width);
    good &= finite(value);
    target[i] = value;
  }
  return good;
}

template <class Source>
DER_FAST_HD bool write_thread_from(const Job& job, std::int64_t block, int thread, std::byte* arena) {
  switch (job.target) {
    case Dtype::float64: return write_thread<Source, double>(job, block, thread, arena);
    case Dtype::bfloat16: return write_thread<Source, Bfloat16>(job, block, thread, arena);
    case Dtype::float16: return write_thread<Source, Float16>(job, block, thread, arena);
    default: return write_thread<Source, float>(job, block, thread, arena);
  }
}

DER_FAST_HD bool write_thread_of(const Job& job, std::int64_t block, int thread, std::byte* arena) {
  return job.source == Dtype::float64 ? write_thread_from<double>(job, block, thread, arena)
                                      : write_thread_from<float>(job, block, thread, arena);
}

}  // namespace der_fast::compact
