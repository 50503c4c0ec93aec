// Runs compact extractors on the CPU, with one image per lane of a vector.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.hpp"

namespace der_fast::lanes {

enum class Kind { conv = 0, bias = 1, affine = 2, pool = 3, widen = 4, mean = 5 };

// Limit for channels, and for the factor by which an image may shrink.
constexpr long kLargest = 1L << 20;

// One operation of der_fast/compaction/program.py. Values are numbered: 0 is the image, i + 1 the result of operation i.
struct Op {
  Kind kind = Kind::conv;
  int source = 0;
  int residual = -1;  // -1: none
  long inputs = 0;
  long outputs = 0;
  long kernel = 1;
  long stride = 1;
  bool relu = false;
  std::int64_t weight = -1;  // bytes into the arena: a convolution's (K, R, S, C) weight or an affine's scale
  std::int64_t bias = -1;    // a convolution's or bias's bias, or an affine's shift
};

// A checked list of operations, independent of the image size and of where its weights are stored.
class Program {
 public:
  // Throws std::invalid_argument if an operation does not fit its inputs or the arena of `bytes` bytes.
  Program(long image_channels, std::vector<Op> ops, std::int64_t bytes);

  [[nodiscard]] long image_channels() const { return image_channels_; }
  [[nodiscard]] long features() const { return ops_.empty() ? 0 : ops_.back().outputs; }
  [[nodiscard]] const std::vector<Op>& ops() const { return ops_; }

 private:
  // Throws if operation `i` does not fit.
  void check(std::size_t i, std::int64_t bytes) const;

  long image_channels_;
  std::vector<Op> ops_;
};

struct Network {
  const Program* program;
  const std::byte* arena;
  long column;  // where its features start in the output's rows
};

struct Images {
  const float* data;
  long count, channels, height, width;
  std::int64_t strides[4];  // in elements: image, channel, row, column
};

// The best kernels that this processor supports, or null.
const Kernels* kernels();

// Writes the features of every network into output (count, row_stride).
void run(const Kernels& kernels, const std::vector<Network>& networks, const Images& images, float* output, long row_stride, int threads);

}  // namespace der_fast::lanes
