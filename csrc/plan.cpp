#include "plan.hpp"

#include <algorithm>
#include <numeric>
#include <stdexcept>

namespace der_fast {

namespace {

constexpr std::int64_t kMostChannels = std::int64_t{1} << 22;
constexpr std::int64_t kLargestKernel = 31;
enum Part { weight = 0, scale = 1, shift = 2, copy = 3 };

std::int64_t rounded_up(std::int64_t value, std::int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

void check_groups(const Network& network, const std::vector<int>& groups, const std::string& name) {
  for (const int group : groups) {
    if (group < 0 || group >= static_cast<int>(network.groups.size())) {
      throw std::invalid_argument(name + " names group " + std::to_string(group) + ", but there are " +
                                  std::to_string(network.groups.size()));
    }
  }
}

std::int64_t width(const std::vector<int>& groups, const std::vector<std::int64_t>& widths) {
  std::int64_t sum = 0;
  for (const int group : groups) sum += widths[static_cast<std::size_t>(group)];
  return sum;
}

class Planner {
 public:
  Planner(const Network& network, std::vector<std::uint8_t> keep, std::int64_t align) : network_(network), align_(align) {
    plan_.keep = std::move(keep);
    offsets_.resize(network.groups.size() + 1, 0);
    std::partial_sum(network.groups.begin(), network.groups.end(), offsets_.begin() + 1);
  }

  Plan run(std::int64_t weight_size, std::int64_t vector_size) {
    decide();
    count();
    plan_.rows.resize(network_.units.size());
    plan_.columns.resize(network_.units.size());
    for (std::size_t i = 0; !plan_.constant && i < network_.units.size(); ++i) place(static_cast<int>(i), weight_size, vector_size);
    plan_.bytes = rounded_up(plan_.bytes, kAlignment);
    return std::move(plan_);
  }

 private:
  const Network& network_;
  const std::int64_t align_;
  std::vector<std::int64_t> offsets_;
  Plan plan_;

  std::int64_t kept(int group) const {
    const auto g = static_cast<std::size_t>(group);
    return std::accumulate(plan_.keep.begin() + offsets_[g], plan_.keep.begin() + offsets_[g + 1], std::int64_t{0});
  }

  void drop(int group) {
    const auto g = static_cast<std::size_t>(group);
    std::fill(plan_.keep.begin() + offsets_[g], plan_.keep.begin() + offsets_[g + 1], std::uint8_t{0});
  }

  void decide() {
    for (const auto& stream : network_.streams) {
      std::int64_t channels = 0;
      for (const int group : stream) channels += kept(group);
      plan_.constant |= channels == 0;
    }
    if (plan_.constant) std::fill(plan_.keep.begin(), plan_.keep.end(), std::uint8_t{0});
    for (const auto& groups : network_.inner) {
      bool lost = false;
      for (const int group : groups) lost |= kept(group) == 0;
      plan_.lost.push_back(lost);
      // All that is left of the block is a constant vector: its other inner channels are no longer needed.
      if (lost) {
        for (const int group : groups) drop(group);
      }
    }
    for (std::size_t g = 0; g < network_.groups.size(); ++g) {
      plan_.widths.push_back(kept(static_cast<int>(g)));
      plan_.stored.push_back(rounded_up(plan_.widths.back(), align_));
    }
  }

  std::int64_t inputs(const Unit& unit, const std::vector<std::int64_t>& widths) const {
    return unit.source.empty() ? network_.image_channels : width(unit.source, widths);
  }

  void count() {
    for (const Unit& unit : network_.units) {
      const std::int64_t outputs = width(unit.target, plan_.widths);
      if (unit.kind == Unit::affine || (unit.kind == Unit::convolution && unit.norm)) add_to(plan_.parameters, {2, outputs});
      if (unit.kind == Unit::convolution) add_to(plan_.parameters, {outputs, inputs(unit, plan_.widths), unit.kernel, unit.kernel});
    }
  }

  // Adds to a total of checked factors before it can overflow.
  static void add_to(std::int64_t& total, const std::vector<std::int64_t>& factors) {
    const auto more = product(factors);
    if (!more || *more > kMost - total) {
      throw std::invalid_argument("units are too large: together they have more than 2^48 entries or bytes");
    }
    total += *more;
  }

  bool present(const Unit& unit) const {
    if (unit.when == Unit::always) return true;
    return plan_.lost[static_cast<std::size_t>(unit.block)] == (unit.when == Unit::lost);
  }

  std::vector<std::int32_t> indices(const std::vector<int>& groups) const {
    std::vector<std::int32_t> out;
    std::int64_t before = 0;
    for (const int group : groups) {
      const auto g = static_cast<std::size_t>(group);
      const auto end = out.size() + static_cast<std::size_t>(plan_.stored[g]);
      for (std::int64_t c = 0; c < network_.groups[g]; ++c) {
        if (plan_.keep[static_cast<std::size_t>(offsets_[g] + c)]) out.push_back(static_cast<std::int32_t>(before + c));
      }
      out.resize(end, -1);
      before += network_.groups[g];
    }
    return out;
  }

  void place(int index, std::int64_t weight_size, std::int64_t vector_size) {
    const auto i = static_cast<std::size_t>(index);
    const Unit& unit = network_.units[i];
    if (!present(unit)) return;
    const std::int64_t outputs = width(unit.target, plan_.stored);
    if (std::max(outputs, inputs(unit, plan_.stored)) > kMostChannels) {
      throw std::invalid_argument("units[" + std::to_string(index) + "] has more than " + std::to_string(kMostChannels) +
                                  " channels once they are padded to multiples of align, " + std::to_string(align_));
    }
    plan_.rows[i] = indices(unit.target);
    const std::int64_t true_outputs = width(unit.target, plan_.widths);
    if (unit.kind == Unit::convolution) {
      plan_.columns[i] = indices(unit.source);
      if (unit.source.empty()) {
        plan_.columns[i].resize(static_cast<std::size_t>(network_.image_channels));
        std::iota(plan_.columns[i].begin(), plan_.columns[i].end(), 0);
      }
      const std::int64_t area = unit.kernel * unit.kernel;
      add(index, weight, {outputs, inputs(unit, plan_.stored), unit.kernel, unit.kernel}, weight_size,
          true_outputs * inputs(unit, plan_.widths) * area);
      if (unit.norm) add(index, shift, {outputs}, vector_size, true_outputs);
    } else if (unit.kind == Unit::affine) {
      add(index, scale, {outputs}, vector_size, true_outputs);
      add(index, shift, {outputs}, vector_size, true_outputs);
    } else {
      add(index, copy, {outputs}, vector_size, true_outputs);
    }
  }

  void add(int unit, int part, std::vector<std::int64_t> shape, std::int64_t size, std::int64_t true_elements) {
    const std::int64_t before = plan_.stored_elements;
    add_to(plan_.stored_elements, shape);
    plan_.bytes = rounded_up(plan_.bytes, kAlignment);
    plan_.pieces.push_back({unit, part, std::move(shape), plan_.bytes});
    add_to(plan_.bytes, {plan_.stored_elements - before, size});
    plan_.elements += true_elements;
  }
};

}  // namespace

void check(const Network& network) {
  std::int64_t channels = network.image_channels;
  if (network.image_channels < 1 || network.image_channels > kMostChannels) throw std::invalid_argument("image_channels is out of range");
  for (const std::int64_t size : network.groups) {
    if (size < 0 || size > kMostChannels) {
      throw std::invalid_argument("groups has the width " + std::to_string(size) + ", which is out of range");
    }
    channels += size;
  }
  if (channels > kMostChannels) throw std::invalid_argument("groups has more than " + std::to_string(kMostChannels) + " channels");
  for (const auto& stream : network.streams) check_groups(network, stream, "streams");
  for (const auto& groups : network.inner) check_groups(network, groups, "inner");
  for (std::size_t i = 0; i < network.units.size(); ++i) {
    const Unit& unit = network.units[i];
    const std::string name = "units[" + std::to_string(i) + "]";
    check_groups(network, unit.source, name + ".source");
    check_groups(network, unit.target, name + ".target");
    // A group may appear more than once, and positions among the channels of a unit are 32 bits wide.
    if (std::max(width(unit.source, network.groups), width(unit.target, network.groups)) > kMostChannels) {
      throw std::invalid_argument(name + " has more than " + std::to_string(kMostChannels) + " channels");
    }
    if (unit.kind < Unit::convolution || unit.kind > Unit::constant) throw std::invalid_argument(name + ".kind is unknown");
    if (unit.when < Unit::always || unit.when > Unit::lost) throw std::invalid_argument(name + ".when is unknown");
    if (unit.when != Unit::always && (unit.block < 0 || unit.block >= static_cast<int>(network.inner.size()))) {
      throw std::invalid_argument(name + ".block names block " + std::to_string(unit.block) + ", but there are " +
                                  std::to_string(network.inner.size()));
    }
    if (unit.kernel < 1 || unit.kernel > kLargestKernel) throw std::invalid_argument(name + ".kernel is out of range");
  }
}

Plan make_plan(const Network& network, const std::vector<std::uint8_t>& keep, std::int64_t align, std::int64_t weight_size,
               std::int64_t vector_size) {
  check(network);
  if (align < 1 || align > kMostAlign) {
    throw std::invalid_argument("align must be " + whole_number(1, kMostAlign) + ", not " + std::to_string(align));
  }
  const std::int64_t channels = std::accumulate(network.groups.begin(), network.groups.end(), std::int64_t{0});
  if (static_cast<std::int64_t>(keep.size()) != channels) {
    throw std::invalid_argument("keep must have " + std::to_string(channels) + " entries, not " + std::to_string(keep.size()));
  }
  for (const std::uint8_t value : keep) {
    if (value > 1) throw std::invalid_argument("keep must hold 0 and 1, not " + std::to_string(value));
  }
  return Planner(network, keep, align).run(weight_size, vector_size);
}

}  // namespace der_fast
