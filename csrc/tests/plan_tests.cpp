// The planner without Python, so that it can run under sanitizers.
#include <limits>
#include <random>

#include "check.hpp"
#include "plan.hpp"

using namespace der_fast;
using tests::refused;

namespace {

// Stem, then bottleneck blocks on one stream with two inner groups each; the first block has a projection from the stem.
Network bottlenecks(std::int64_t width, int blocks) {
  Network network;
  network.groups = {width, 4 * width};
  network.streams = {{0}, {1}};
  network.units.push_back({Unit::convolution, -1, Unit::always, {}, {0}, 3, true});
  for (int block = 0; block < blocks; ++block) {
    const int source = block ? 1 : 0;
    const int a = static_cast<int>(network.groups.size());
    network.groups.insert(network.groups.end(), {width, width});
    network.inner.push_back({a, a + 1});
    if (!block) network.units.push_back({Unit::convolution, block, Unit::always, {0}, {1}, 1, true});
    network.units.push_back({Unit::convolution, block, Unit::alive, {source}, {a}, 1, true});
    network.units.push_back({Unit::convolution, block, Unit::alive, {a}, {a + 1}, 3, true});
    network.units.push_back({Unit::convolution, block, Unit::alive, {a + 1}, {1}, 1, true});
    network.units.push_back({Unit::constant, block, Unit::lost, {1}, {1}, 1, false});
  }
  network.units.push_back({Unit::affine, -1, Unit::always, {1}, {1}, 1, false});
  return network;
}

std::int64_t channels_of(const Network& network) {
  std::int64_t sum = 0;
  for (const std::int64_t size : network.groups) sum += size;
  return sum;
}

void test_plan_of_random_masks() {
  std::mt19937 random(1);
  for (int trial = 0; trial < 300; ++trial) {
    const Network network = bottlenecks(1 + trial % 5, 1 + trial % 3);
    std::vector<std::uint8_t> keep(static_cast<std::size_t>(channels_of(network)));
    const double density = (trial % 7) / 6.0;
    for (auto& bit : keep) bit = std::bernoulli_distribution(density)(random);
    const std::int64_t align = 1 + trial % 9;
    const Plan plan = make_plan(network, keep, align, 2, 4);
    std::int64_t end = 0;
    for (const Piece& piece : plan.pieces) {
      CHECK(piece.offset % kAlignment == 0 && piece.offset >= end);
      std::int64_t elements = 1;
      for (const std::int64_t size : piece.shape) elements *= size;
      end = piece.offset + elements * (piece.part == 0 ? 2 : 4);
      const auto unit = static_cast<std::size_t>(piece.unit);
      CHECK(static_cast<std::int64_t>(plan.rows[unit].size()) == piece.shape[0]);
      if (piece.part == 0) CHECK(static_cast<std::int64_t>(plan.columns[unit].size()) == piece.shape[1]);
    }
    CHECK(plan.bytes >= end && plan.bytes % kAlignment == 0 && plan.elements <= plan.stored_elements);
    CHECK(plan.constant == (plan.pieces.empty()));
    std::int64_t offset = 0;
    for (std::size_t g = 0; g < network.groups.size(); ++g) {
      std::int64_t kept = 0;
      for (std::int64_t c = 0; c < network.groups[g]; ++c) {
        const auto position = static_cast<std::size_t>(offset + c);
        kept += plan.keep[position];
        CHECK(plan.keep[position] <= keep[position]);
      }
      offset += network.groups[g];
      CHECK(kept == plan.widths[g] && plan.stored[g] % align == 0 && plan.stored[g] - kept < align);
    }
    for (std::size_t block = 0; block < network.inner.size(); ++block) {
      for (const int group : network.inner[block]) CHECK((plan.widths[static_cast<std::size_t>(group)] == 0) == plan.lost[block]);
    }
    const Plan again = make_plan(network, plan.keep, align, 2, 4);
    CHECK(again.keep == plan.keep && again.bytes == plan.bytes && again.rows == plan.rows);
  }
}

void test_plan_refuses() {
  const Network good = bottlenecks(2, 1);
  const std::vector<std::uint8_t> keep(static_cast<std::size_t>(channels_of(good)), 1);
  refused([&] { make_plan(good, {1, 1}, 1, 4, 4); }, "keep must have");
  refused([&] { make_plan(good, std::vector<std::uint8_t>(keep.size(), 2), 1, 4, 4); }, "keep must hold 0 and 1");
  refused([&] { make_plan(good, keep, 0, 4, 4); }, "align must be a whole number from 1 to 1024, not 0");
  Network bad = good;
  bad.units[1].source = {99};
  refused([&] { make_plan(bad, keep, 1, 4, 4); }, "units[1].source names group 99");
  bad = good;
  bad.groups[0] = std::numeric_limits<std::int64_t>::max();
  refused([&] { make_plan(bad, keep, 1, 4, 4); }, "groups has the width");
}

// Small enough to describe, but too large to count in 64 bits or to exist at all.
void test_plans_too_large_are_refused() {
  constexpr std::int64_t half = std::int64_t{1} << 21;
  const std::vector<std::uint8_t> keep(half, 1);
  Network network;
  network.groups = {half};
  network.streams = {{0}};
  const auto planned = [&] { make_plan(network, keep, 1, 8, 8); };
  network.units.assign(2100, {Unit::convolution, -1, Unit::always, {0}, {0}, 31, false});
  refused(planned, "units are too large: together they have more than 2^48 entries or bytes");
  // 2^42 entries each: only the sum is too large.
  network.units.assign(100, {Unit::convolution, -1, Unit::always, {0}, {0}, 1, false});
  refused(planned, "units are too large");
  network.units = {{Unit::affine, -1, Unit::always, {0}, {0, 0, 0}, 1, false}};
  refused(planned, "units[0] has more than 4194304 channels");
  Network padded;
  padded.groups.assign(8192, 1);
  padded.units.push_back({Unit::affine, -1, Unit::always, {}, {}, 1, false});
  for (int group = 0; group < 8192; ++group) padded.units[0].target.push_back(group);
  const std::vector<std::uint8_t> all(8192, 1);
  refused([&] { make_plan(padded, all, 1024, 4, 4); }, "units[0] has more than 4194304 channels once they are padded");
  CHECK(make_plan(padded, all, 512, 4, 4).stored_elements == 2 * 8192 * 512);
}

}  // namespace

int main() {
  test_plan_of_random_masks();
  test_plan_refuses();
  test_plans_too_large_are_refused();
  std::printf("%d checks\n", tests::checks);
  return 0;
}
