#include "channel_masks.hpp"

#include <stdexcept>
#include <string>

namespace der_fast::channel_masks {

namespace {

// Sums 32 lanes with the same tree as a warp.
template <class Lane>
double sum_of_lanes(const Lane& lane) {
  double values[kLanes];
  for (int i = 0; i < kLanes; ++i) values[i] = lane(i);
  for (int offset = kLanes / 2; offset > 0; offset /= 2)
    for (int i = 0; i < offset; ++i) values[i] += values[i + offset];
  return values[0];
}

void expect(bool right, const std::string& name, std::int64_t position) {
  if (!right) throw std::invalid_argument(name + " is wrong at entry " + std::to_string(position));
}

// Ascending offsets from 0 to `total`.
void check_offsets(const std::int32_t* offsets, std::int32_t count, std::int64_t total, const std::string& name) {
  expect(offsets[0] == 0, name, 0);
  for (std::int32_t i = 0; i < count; ++i) expect(offsets[i] <= offsets[i + 1], name, i + 1);
  expect(offsets[count] == total, name, count);
}

}  // namespace

void check(const Structure& s, std::int64_t channels, std::int64_t users) {
  // The rows must cover every channel once: a channel that is not covered would stay unwritten.
  std::int32_t next = 0;
  for (std::int32_t row = 0; row < s.rows; ++row) {
    const std::int32_t *entry = s.row + 3 * row;
    expect(entry[0] == next && entry[1] > entry[0] && entry[1] <= channels && entry[2] >= 0 && entry[2] < s.groups, "rows", row);
    next = entry[1];
  }
  expect(next == channels, "rows", s.rows);
  check_offsets(s.row_offset, s.groups, s.rows, "row_offsets");
  check_offsets(s.user_offset, s.groups, users, "user_offsets");
  for (std::int32_t l = 0; l < s.convs; ++l)
    for (std::int32_t i = 2; i < 2 + 2 * s.span; ++i) expect(s.conv_entry(l)[i] >= -1 && s.conv_entry(l)[i] < s.groups, "convs", l);
  for (std::int64_t i = 0; i < users; ++i) expect(s.user[i] >= 0 && s.user[i] < 2 * s.convs, "users", i);
}

template <class T>
void forward(const Structure& s, const T* logits, const T* scale, T* masks, T* loss, double* memory) {
  const Work work(memory, s);
  for (std::int32_t row = 0; row < s.rows; ++row) {
    work.rows[row] = sum_of_lanes([&](int lane) { return row_lane<T>(s, logits, *scale, masks, row, lane); });
  }
  for (std::int32_t group = 0; group < s.groups; ++group) work.groups[group] = group_sum(s, work, group);
  for (std::int32_t l = 0; l < s.convs; ++l) write_sides(s, work, l);
  *loss = static_cast<T>(sum_of_lanes([&](int lane) { return count_lane(s, work.sides, lane); }) / s.full);
}

template <class T>
void backward(const Structure& s, const T* logits, const double* sides, const T* grad_masks, const T* grad_loss, T* gradient) {
  for (std::int32_t row = 0; row < s.rows; ++row) {
    double slope = 0;
    if (grad_loss) slope = sum_of_lanes([&](int lane) { return slope_lane(s, sides, s.row[3 * row + 2], lane); }) / s.full;
    for (std::int32_t c = s.row[3 * row]; c < s.row[3 * row + 1]; ++c) {
      gradient[c] = gradient_of<T>(logits, grad_masks, grad_loss, slope, c);
    }
  }
}

template void forward<float>(const Structure&, const float*, const float*, float*, float*, double*);
template void forward<double>(const Structure&, const double*, const double*, double*, double*, double*);
template void backward<float>(const Structure&, const float*, const double*, const float*, const float*, float*);
template void backward<double>(const Structure&, const double*, const double*, const double*, const double*, double*);

}  // namespace der_fast::channel_masks
