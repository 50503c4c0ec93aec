// From binary masks to a plan: which channels stay, which branches are lost, and where every folded tensor is stored.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "sizes.hpp"

namespace der_fast {

constexpr std::int64_t kMostAlign = 1024;

// One stored piece of the network. `source` and `target` are groups that are side by side in the piece's channels.
struct Unit {
  enum Kind { convolution = 0, affine = 1, constant = 2 };
  enum When { always = 0, alive = 1, lost = 2 };
  int kind = convolution;
  int block = -1;
  int when = always;
  std::vector<int> source;  // empty: the image
  std::vector<int> target;
  std::int64_t kernel = 1;
  bool norm = false;  // a batch-norm is folded into the convolution
};

struct Network {
  std::vector<std::int64_t> groups;      // full widths
  std::int64_t image_channels = 3;
  std::vector<std::vector<int>> streams;  // every tensor that makes up the residual streams
  std::vector<std::vector<int>> inner;    // the inner groups of each block
  std::vector<Unit> units;                // in the order in which they are stored
};

// Parts of a unit, numbered as the jobs of `pack`.
struct Piece {
  int unit = 0;
  int part = 0;
  std::vector<std::int64_t> shape;
  std::int64_t offset = 0;  // in bytes
};

struct Plan {
  bool constant = false;
  std::vector<bool> lost;
  std::vector<std::uint8_t> keep;
  std::vector<std::int64_t> widths;
  std::vector<std::int64_t> stored;
  std::vector<Piece> pieces;
  std::vector<std::vector<std::int32_t>> rows;     // per unit: the source index of every stored row, -1 for padding
  std::vector<std::vector<std::int32_t>> columns;  // per unit; empty but for convolutions
  std::int64_t bytes = 0;
  std::int64_t parameters = 0;         // of the unfolded network at the true widths
  std::int64_t elements = 0;           // stored, without padding
  std::int64_t stored_elements = 0;    // stored, with padding
};

// Throws std::invalid_argument if the description contradicts itself; `make_plan` also does if it describes something too large.
void check(const Network& network);

// `keep` has one entry per channel, 0 or 1. Pure: the same arguments give the same plan.
Plan make_plan(const Network& network, const std::vector<std::uint8_t>& keep, std::int64_t align, std::int64_t weight_size,
               std::int64_t vector_size);

}  // namespace der_fast
