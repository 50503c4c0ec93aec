// The channel masks' CPU loops, in buffers without slack: against the C library's exponential and the loss as it is printed.
#include "channel_masks.hpp"

#include <algorithm>
#include <limits>
#include <memory>
#include <random>
#include <vector>

#include "check.hpp"

using namespace der_fast::channel_masks;
using der_fast::tests::refused;

namespace {

constexpr double kSnap = 5.9604644775390625e-08;

struct Network {
  std::vector<std::int32_t> widths;
  std::vector<std::int32_t> rows, row_offsets{0}, convs, user_offsets{0}, users;
  std::int32_t span = 2, count = 0, channels = 0;
  double full = 0;

  Structure structure() const {
    const auto length = [](const auto& values) { return static_cast<std::int32_t>(values.size()); };
    return {length(rows) / 3,   length(widths),     count,       span, rows.data(), row_offsets.data(), convs.data(),
            user_offsets.data(), users.data(), full};
  }
};

// Random groups (some empty), and convolutions that read zero to two groups and write one or two.
Network draw(std::mt19937& random) {
  const auto whole = [&](int low, int high) { return std::uniform_int_distribution<std::int32_t>(low, high)(random); };
  Network net;
  for (std::int32_t g = whole(2, 6); g > 0; --g) {
    net.widths.push_back(whole(0, 4) ? whole(1, 300) : 0);
    for (std::int32_t left = net.widths.back(), first = net.channels; left > 0; left -= 128, first += 128) {
      net.rows.insert(net.rows.end(), {first, first + std::min(left, 128), static_cast<std::int32_t>(net.widths.size()) - 1});
    }
    net.channels += net.widths.back();
    net.row_offsets.push_back(static_cast<std::int32_t>(net.rows.size()) / 3);
  }
  const auto groups = static_cast<std::int32_t>(net.widths.size());
  net.count = whole(1, 70);
  for (std::int32_t l = 0; l < net.count; ++l) {
    const std::int32_t read = whole(0, groups - 2), written = whole(0, groups - 2), image = whole(0, 3), both = whole(0, 3);
    net.convs.insert(net.convs.end(), {image, whole(1, 49), image ? -1 : read, image || both % 2 ? -1 : read + 1, written,
                                       both / 2 ? -1 : written + 1});
  }
  const auto width = [&](std::int32_t g) { return g < 0 ? 0.0 : static_cast<double>(net.widths[static_cast<std::size_t>(g)]); };
  for (std::int32_t g = 0; g < groups; ++g) {
    for (std::int32_t l = 0; l < net.count; ++l)
      for (std::int32_t i = 0; i < 4; ++i)
        if (net.convs[static_cast<std::size_t>(6 * l + 2 + i)] == g) net.users.push_back(i < 2 ? net.count + l : l);
    net.user_offsets.push_back(static_cast<std::int32_t>(net.users.size()));
  }
  for (std::int32_t l = 0; l < net.count; ++l) {
    const std::int32_t* c = &net.convs[static_cast<std::size_t>(6 * l)];
    net.full += c[1] * (c[0] + width(c[2]) + width(c[3])) * (width(c[4]) + width(c[5]));
  }
  net.full = std::max(net.full, 1.0);
  return net;
}

template <class T>
double sigmoid(T x) {
  return x >= 0 ? 1 / (1 + std::exp(-static_cast<double>(x))) : std::exp(static_cast<double>(x)) / (1 + std::exp(static_cast<double>(x)));
}

// Group sums, every convolution's sides, and the loss times `full`, from given masks.
struct Printed {
  std::vector<double> reads, writes;
  double soft = 0;

  template <class T>
  Printed(const Network& net, const T* masks) {
    std::vector<double> sums;
    std::int64_t at = 0;
    for (const std::int32_t width : net.widths) {
      double sum = 0;
      for (std::int32_t i = 0; i < width; ++i) sum += static_cast<double>(masks[at++]);
      sums.push_back(sum);
    }
    const auto sum_of = [&](std::int32_t g) { return g < 0 ? 0.0 : sums[static_cast<std::size_t>(g)]; };
    for (std::int32_t l = 0; l < net.count; ++l) {
      const std::int32_t* c = &net.convs[static_cast<std::size_t>(6 * l)];
      reads.push_back(c[0] + sum_of(c[2]) + sum_of(c[3]));
      writes.push_back(sum_of(c[4]) + sum_of(c[5]));
      soft += c[1] * reads.back() * writes.back();
    }
  }

  double slope(const Network& net, std::int32_t group) const {
    double sum = 0;
    for (std::int32_t l = 0; l < net.count; ++l) {
      const std::int32_t* c = &net.convs[static_cast<std::size_t>(6 * l)];
      for (int i = 0; i < 4; ++i) {
        if (c[2 + i] == group) sum += c[1] * (i < 2 ? writes : reads)[static_cast<std::size_t>(l)];
      }
    }
    return sum;
  }
};

bool near(double found, double wanted, double relative) { return std::fabs(found - wanted) <= relative * std::fabs(wanted); }

template <class T>
void test_a_network(unsigned seed) {
  std::mt19937 random(seed);
  const Network net = draw(random);
  const Structure s = net.structure();
  check(s, net.channels, static_cast<std::int64_t>(net.users.size()));
  const auto count = static_cast<std::size_t>(net.channels);
  const auto logits = std::make_unique<T[]>(count), masks = std::make_unique<T[]>(count), gradient = std::make_unique<T[]>(count);
  const auto arriving = std::make_unique<T[]>(count);
  const auto work = std::make_unique<double[]>(static_cast<std::size_t>(s.rows + s.groups + 2 * s.convs));
  std::normal_distribution<double> normal(0, 3);
  for (std::size_t c = 0; c < count; ++c) logits[c] = static_cast<T>(normal(random)), arriving[c] = static_cast<T>(normal(random));
  const T scale = static_cast<T>(std::exp(normal(random)));
  T loss = std::numeric_limits<T>::quiet_NaN();
  std::fill_n(masks.get(), count, loss);
  std::fill_n(gradient.get(), count, loss);
  forward<T>(s, logits.get(), &scale, masks.get(), &loss, work.get());
  const double unit = 4 * static_cast<double>(std::numeric_limits<T>::epsilon());
  for (std::size_t c = 0; c < count; ++c) {
    const double exact = sigmoid(logits[c] * scale);
    if (std::fabs(exact - kSnap) < 1e-6 * kSnap) continue;
    CHECK(exact < kSnap ? masks[c] == 0 : near(static_cast<double>(masks[c]), exact, unit));
  }
  const Printed printed(net, masks.get());
  CHECK(near(static_cast<double>(loss), printed.soft / net.full, 1e-12 + unit));
  const double* sides = work.get() + s.rows + s.groups;
  for (const bool with_masks : {false, true})
    for (const bool with_loss : {false, true}) {
      const T weight = static_cast<T>(0.7);
      backward<T>(s, logits.get(), sides, with_masks ? arriving.get() : nullptr, with_loss ? &weight : nullptr, gradient.get());
      std::size_t c = 0;
      for (std::int32_t g = 0; g < s.groups; ++g) {
        const double slope = with_loss ? printed.slope(net, g) / net.full * static_cast<double>(weight) : 0;
        for (std::int32_t i = 0; i < net.widths[static_cast<std::size_t>(g)]; ++i, ++c) {
          const double task = with_masks ? static_cast<double>(arriving[c]) : 0, own = sigmoid(logits[c]) * sigmoid(-logits[c]);
          const double error = std::fabs(static_cast<double>(gradient[c]) - own * (task + slope));
          CHECK(error <= 2 * unit * own * (std::fabs(task) + std::fabs(slope)));
        }
      }
    }
}

template <class T>
void test_extremes() {
  const T none = std::numeric_limits<T>::quiet_NaN(), far = std::numeric_limits<T>::infinity();
  for (const T big : {T(1000), T(1e30), far}) {
    CHECK(mask_of<T>(big) == 1 && mask_of<T>(-big) == 0 && slope_of<T>(big) == 0 && slope_of<T>(-big) == 0);
  }
  CHECK(mask_of<T>(0) == T(0.5) && mask_of<T>(T(-0.0)) == T(0.5) && slope_of<T>(0) == T(0.25));
  CHECK(std::isnan(mask_of<T>(none)) && std::isnan(slope_of<T>(none)));
  for (int i = 0; i <= 20000; ++i) {
    const T a = Exponential<T>::largest * static_cast<T>(i) / 20000;
    // One and a half units in the last place from the polynomial, and half a unit from the library.
    const double two_units = 2 * static_cast<double>(std::numeric_limits<T>::epsilon());
    CHECK(near(static_cast<double>(power<T>(a)), std::exp(-static_cast<double>(a)), two_units));
  }
  CHECK(power<T>(0) == 1);
}

void test_tables_that_contradict_themselves_are_refused() {
  std::mt19937 random(3);
  const Network good = draw(random);
  const auto changed = [&](void (*change)(Network&)) {
    return [&good, change] {
      Network bad = good;
      change(bad);
      check(bad.structure(), bad.channels, static_cast<std::int64_t>(bad.users.size()));
    };
  };
  refused(changed([](Network& net) { net.channels += 1; }), "rows is wrong at entry");
  refused(changed([](Network& net) { net.rows[1] = net.channels + 1; }), "rows is wrong at entry 0");
  refused(changed([](Network& net) { net.rows[0] = -1; }), "rows is wrong at entry 0");
  refused(changed([](Network& net) { net.rows[2] = 99; }), "rows is wrong at entry 0");
  refused(changed([](Network& net) { net.row_offsets[1] = 1000; }), "row_offsets is wrong");
  refused(changed([](Network& net) { net.row_offsets[0] = -1; }), "row_offsets is wrong at entry 0");
  refused(changed([](Network& net) { net.convs[2] = 99; }), "convs is wrong at entry 0");
  refused(changed([](Network& net) { net.convs[5] = -2; }), "convs is wrong at entry 0");
  refused(changed([](Network& net) { net.user_offsets.back() += 1; }), "user_offsets is wrong");
  refused(changed([](Network& net) { net.users[0] = 2 * net.count; }), "users is wrong at entry 0");
}

}  // namespace

int main() {
  test_extremes<float>();
  test_extremes<double>();
  for (unsigned seed = 0; seed < 60; ++seed) {
    test_a_network<float>(seed);
    test_a_network<double>(seed);
  }
  test_tables_that_contradict_themselves_are_refused();
  std::printf("%d checks\n", der_fast::tests::checks);
  return 0;
}
