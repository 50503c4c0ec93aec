// The batch-in-lanes executor against loops over single numbers; every buffer is exactly as long as it must be.
//
// Images, weights and vectors hold small whole numbers. Then no sum exceeds 2^24, every operation is exact in float32 in any order, and the
// features must be equal bit for bit.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <random>

#include "check.hpp"
#include "lanes/executor.hpp"
#include "scarcity.hpp"

using namespace der_fast::lanes;
using der_fast::tests::refused;

namespace {

constexpr double kExact = 1 << 24;

// One value of one image, (H, W, C).
struct Value {
  Shape shape;
  std::vector<double> data;

  explicit Value(Shape of) : shape(of), data(static_cast<std::size_t>(of.height * of.width * of.channels)) {}
  double& at(long y, long x, long c) { return data[static_cast<std::size_t>((y * shape.width + x) * shape.channels + c)]; }
  double at(long y, long x, long c) const { return data[static_cast<std::size_t>((y * shape.width + x) * shape.channels + c)]; }
  bool inside(long y, long x) const { return y >= 0 && y < shape.height && x >= 0 && x < shape.width; }
};

// A program with its arena, which holds only what the operations point to.
struct Case {
  std::vector<Op> ops;
  std::unique_ptr<float[]> arena;
  std::int64_t floats = 0;

  std::int64_t bytes() const { return 4 * floats; }
  const std::byte* data() const { return reinterpret_cast<const std::byte*>(arena.get()); }
  double number(std::int64_t offset, long index) const { return static_cast<double>(arena[static_cast<std::size_t>(offset / 4 + index)]); }
};

double convolved(const Case& net, const Op& op, const Value& in, long y, long x, long k) {
  double sum = op.bias < 0 ? 0 : net.number(op.bias, k);
  double size = std::fabs(sum);
  const long pad = op.kernel / 2;
  for (long r = 0; r < op.kernel; ++r)
    for (long s = 0; s < op.kernel; ++s) {
      const long iy = y * op.stride - pad + r, ix = x * op.stride - pad + s;
      if (!in.inside(iy, ix)) continue;
      for (long c = 0; c < op.inputs; ++c) {
        const double term = net.number(op.weight, ((k * op.kernel + r) * op.kernel + s) * op.inputs + c) * in.at(iy, ix, c);
        sum += term;
        size += std::fabs(term);
      }
    }
  CHECK(size < kExact);
  return sum;
}

double largest(const Value& in, long y, long x, long c) {
  double best = -std::numeric_limits<double>::infinity();
  for (long iy = 2 * y - 1; iy <= 2 * y + 1; ++iy)
    for (long ix = 2 * x - 1; ix <= 2 * x + 1; ++ix)
      if (in.inside(iy, ix)) best = std::max(best, in.at(iy, ix, c));
  return best;
}

Value applied(const Case& net, const Op& op, const std::vector<Value>& values) {
  const Value& in = values[static_cast<std::size_t>(op.source)];
  const long stride = op.kind == Kind::pool ? 2 : op.stride;
  if (op.kind == Kind::mean) {
    Value out({1, 1, op.outputs});
    const auto pixels = static_cast<float>(in.shape.height * in.shape.width);
    for (long c = 0; c < op.outputs; ++c) {
      double sum = 0;
      for (long y = 0; y < in.shape.height; ++y)
        for (long x = 0; x < in.shape.width; ++x) sum += in.at(y, x, c);
      out.at(0, 0, c) = static_cast<double>(static_cast<float>(sum) / pixels);
    }
    return out;
  }
  Value out({(in.shape.height - 1) / stride + 1, (in.shape.width - 1) / stride + 1, op.outputs});
  for (long y = 0; y < out.shape.height; ++y)
    for (long x = 0; x < out.shape.width; ++x)
      for (long k = 0; k < op.outputs; ++k) {
        double value = 0;
        if (op.kind == Kind::conv) {
          value = convolved(net, op, in, y, x, k);
          if (op.residual >= 0) value += values[static_cast<std::size_t>(op.residual)].at(y, x, k);
        } else if (op.kind == Kind::pool) {
          value = largest(in, y, x, k);
        } else if (op.kind == Kind::widen) {
          value = k < op.inputs ? in.at(y * stride, x * stride, k) : 0;
        } else {
          value = in.at(y, x, k) * (op.weight < 0 ? 1 : net.number(op.weight, k)) + net.number(op.bias, k);
        }
        CHECK(std::fabs(value) < kExact);
        out.at(y, x, k) = op.relu ? std::max(value, 0.0) : value;
      }
  return out;
}

class Drawing {
 public:
  explicit Drawing(unsigned seed) : random_(seed) {}
  long whole(long low, long high) { return std::uniform_int_distribution<long>(low, high)(random_); }
  bool coin() { return whole(0, 1) == 1; }

  // A convolution, what follows it in a network (at most one of each kind), and the mean.
  Case network(long channels) {
    Case net;
    const long width = whole(1, 13);
    conv(net, 0, -1, channels, width, 2 * whole(0, 3) + 1, whole(1, 3));
    int last = 1;
    if (coin()) conv(net, last, last, width, width, 3, 1), ++last;
    if (coin()) conv(net, last, last - 1 > 0 ? last - 1 : -1, width, width, 2 * whole(0, 1) + 1, 1), ++last;
    if (coin()) vectors(net, coin() ? Kind::affine : Kind::bias, last++, width);
    if (coin()) net.ops.push_back({Kind::pool, last++, -1, width, width, 1, 1, false, -1, -1});
    long wide = width;
    if (coin()) {
      wide += whole(0, 3);
      net.ops.push_back({Kind::widen, last++, -1, width, wide, 1, whole(1, 2), false, -1, -1});
    }
    net.ops.push_back({Kind::mean, last, -1, wide, wide, 1, 1, false, -1, -1});
    net.arena = std::make_unique<float[]>(static_cast<std::size_t>(net.floats));
    for (std::int64_t i = 0; i < net.floats; ++i) net.arena[static_cast<std::size_t>(i)] = static_cast<float>(whole(-1, 1));
    return net;
  }

 private:
  static std::int64_t taken(Case& net, long floats) {
    net.floats += floats;
    return 4 * (net.floats - floats);
  }

  void conv(Case& net, int source, int residual, long inputs, long outputs, long kernel, long stride) {
    const std::int64_t weight = taken(net, outputs * inputs * kernel * kernel), bias = coin() ? taken(net, outputs) : -1;
    net.ops.push_back({Kind::conv, source, coin() ? residual : -1, inputs, outputs, kernel, stride, coin(), weight, bias});
  }

  void vectors(Case& net, Kind kind, int source, long width) {
    const std::int64_t scale = kind == Kind::affine ? taken(net, width) : -1;
    net.ops.push_back({kind, source, -1, width, width, 1, 1, coin(), scale, taken(net, width)});
  }

  std::mt19937 random_;
};

// Only what this processor supports; other instruction sets are tested on other machines.
std::vector<const Kernels*> usable() {
  std::vector<const Kernels*> found;
#if defined(DER_FAST_X86)
  if (const Kernels* best = kernels()) {
    found.push_back(avx2());
    if (best != avx2()) found.push_back(avx512());
  }
#endif
  return found;
}

void test_networks_side_by_side(unsigned seed) {
  Drawing draw(seed);
  const long channels = draw.whole(1, 4), height = draw.whole(1, 9), width = draw.whole(1, 9), count = draw.whole(0, 19);
  const long step = draw.whole(1, 2);
  Images images{nullptr, count, channels, height, width, {}};
  const std::int64_t strides[2][4] = {{channels * height * width * step, height * width, width, 1},
                                      {channels * height * width * step, 1, width * channels, channels}};
  std::memcpy(images.strides, strides[draw.coin()], sizeof images.strides);
  const auto pixels = std::make_unique<float[]>(static_cast<std::size_t>(count ? ((count - 1) * step + 1) * channels * height * width : 0));
  for (long n = 0; n < count; ++n)
    for (long i = 0; i < channels * height * width; ++i) {
      pixels[static_cast<std::size_t>(n * images.strides[0] + i)] = static_cast<float>(draw.whole(-2, 2));
    }
  images.data = pixels.get();

  std::vector<Case> nets;
  std::vector<Program> programs;
  for (long i = draw.whole(1, 3); i > 0; --i) nets.push_back(draw.network(channels));
  for (const Case& net : nets) programs.emplace_back(channels, net.ops, net.bytes());
  std::vector<Network> networks;
  long columns = 0;
  for (std::size_t i = 0; i < nets.size(); ++i) {
    networks.push_back({&programs[i], nets[i].data(), columns});
    columns += programs[i].features();
  }
  std::vector<double> wanted;
  for (long n = 0; n < count; ++n)
    for (const Case& net : nets) {
      std::vector<Value> values{Value({height, width, channels})};
      for (long y = 0; y < height; ++y)
        for (long x = 0; x < width; ++x)
          for (long c = 0; c < channels; ++c) {
            const std::int64_t at = n * images.strides[0] + c * images.strides[1] + y * images.strides[2] + x * images.strides[3];
            values[0].at(y, x, c) = static_cast<double>(pixels[static_cast<std::size_t>(at)]);
          }
      for (const Op& op : net.ops) values.push_back(applied(net, op, values));
      wanted.insert(wanted.end(), values.back().data.begin(), values.back().data.end());
    }
  for (const Kernels* kernels : usable())
    for (const int threads : {1, 3}) {
      const auto output = std::make_unique<float[]>(wanted.size());
      std::fill_n(output.get(), wanted.size(), std::numeric_limits<float>::quiet_NaN());
      run(*kernels, networks, images, output.get(), columns, threads);
      for (std::size_t i = 0; i < wanted.size(); ++i) CHECK(static_cast<double>(output[i]) == wanted[i]);
    }
}

// A NaN in one image passes through every operation and does not reach the other images.
void test_not_a_number_stays_in_its_image() {
  const float weight[] = {1.0F}, shift[] = {0.0F};
  const float arena[] = {weight[0], shift[0]};
  const Program program(1,
                        {{Kind::conv, 0, -1, 1, 1, 1, 1, true, 0, -1},
                         {Kind::affine, 1, -1, 1, 1, 1, 1, true, 0, 4},
                         {Kind::pool, 2, -1, 1, 1, 1, 1, false, -1, -1},
                         {Kind::mean, 3, -1, 1, 1, 1, 1, false, -1, -1}},
                        sizeof arena);
  constexpr long count = 17;
  float pixels[count * 9], output[count];
  std::fill_n(pixels, count * 9, 1.0F);
  pixels[5 * 9 + 4] = std::numeric_limits<float>::quiet_NaN();
  const Images images{pixels, count, 1, 3, 3, {9, 9, 3, 1}};
  for (const Kernels* kernels : usable()) {
    run(*kernels, {{&program, reinterpret_cast<const std::byte*>(arena), 0}}, images, output, 1, 2);
    for (long n = 0; n < count; ++n) CHECK(n == 5 ? std::isnan(output[n]) : output[n] == 1.0F);
  }
}

void test_programs_that_do_not_fit_are_refused() {
  const Op conv{Kind::conv, 0, -1, 3, 4, 3, 1, true, 0, 432}, mean{Kind::mean, 1, -1, 4, 4, 1, 1, false, -1, -1};
  const auto with = [&](void (*change)(Op&)) {
    Op op = conv;
    change(op);
    return [op, mean] { Program(3, {op, mean}, 448); };
  };
  CHECK(Program(3, {conv, mean}, 448).features() == 4);
  CHECK(Program(3, {}, 0).features() == 0);
  refused([] { Program(0, {}, 0); }, "image_channels must be a whole number from 1 to 1048576, not 0");
  refused([] { Program(1L << 30, {}, 0); }, "image_channels must be a whole number from 1 to 1048576, not 1073741824");
  refused([] { Program(3, {}, -5); }, "bytes must not be negative, but is -5");
  refused([&] { Program(3, {conv, mean}, 447); }, "operation 0: its bias is outside the arena of 447 bytes");
  refused([&] { Program(3, {conv, mean}, 431); }, "operation 0: its weight is outside the arena");
  refused(with([](Op& op) { op.weight = 2; }), "its weight is outside the arena");
  refused(with([](Op& op) { op.weight = std::numeric_limits<std::int64_t>::max() - 3; }), "its weight is outside the arena");
  refused(with([](Op& op) { op.kind = static_cast<Kind>(6); }), "operation 0: unknown kind 6");
  refused(with([](Op& op) { op.source = 1; }), "reads a value that does not exist yet");
  refused(with([](Op& op) { op.residual = 1; }), "adds a value that does not exist yet");
  refused(with([](Op& op) { op.residual = 0; }), "its residual has another number of channels");
  refused(with([](Op& op) { op.inputs = 2; }), "expects 2 input channels, its source has 3");
  refused(with([](Op& op) { op.outputs = 0; }), "needs between 1 and 2^20 output channels");
  refused(with([](Op& op) { op.kernel = 2; }), "kernel and stride must be small");
  refused(with([](Op& op) { op.kind = Kind::pool; }), "cannot change the number of channels");
  refused([&] { Program(3, {conv}, 448); }, "the mean must be the last operation");
  refused([&] { Program(3, {conv, {Kind::bias, 1, 0, 4, 4, 1, 1, true, -1, 432}, mean}, 448); }, "only a convolution adds a residual");
  refused([&] { Program(3, {conv, {Kind::bias, 1, -1, 4, 4, 1, 1, true, 0, 432}, mean}, 448); }, "a bias has no scale");
  refused([&] { Program(3, {conv, {Kind::bias, 1, -1, 4, 4, 1, 2, true, -1, 432}, mean}, 448); }, "has no stride");
  refused([&] { Program(3, {conv, {Kind::affine, 1, -1, 4, 4, 1, 1, true, 440, 432}, mean}, 448); }, "its scale is outside the arena");
}

void test_where_memory_or_threads_run_out() {
  const Program program(1, {{Kind::mean, 0, -1, 1, 1, 1, 1, false, -1, -1}}, 0);
  constexpr long count = 50;
  float pixels[count], output[count] = {};
  for (long n = 0; n < count; ++n) pixels[n] = static_cast<float>(n);
  const Images images{pixels, count, 1, 1, 1, {1, 1, 1, 1}};
  const std::vector<Network> networks{{&program, nullptr, 0}};
  for (const Kernels* kernels : usable()) {
    const auto call = [&] { run(*kernels, networks, images, output, 1, 3); };
    const auto done = [&] {
      CHECK(std::equal(pixels, pixels + count, output));
      std::fill_n(output, count, 0.0F);
    };
    // Allocations for the handles of two helpers, and two threads: the work must be done without any of them.
    CHECK(der_fast::tests::survived(call, done) >= 3);
    der_fast::tests::without_threads([&] { call(), done(); });
  }
}

// A residual must be as large as the sum; a smaller one would be read past its end.
void test_a_residual_of_another_size_is_refused() {
  const Op halved{Kind::conv, 0, -1, 1, 1, 1, 2, true, 0, -1};
  const auto adding = [&](int source, int residual, long stride) {
    const Op adds{Kind::conv, source, residual, 1, 1, 1, stride, true, 0, -1};
    return Program(1, {halved, adds, {Kind::mean, 2, -1, 1, 1, 1, 1, false, -1, -1}}, 4);
  };
  refused([&] { adding(0, 1, 1); }, "operation 1: its residual has another height and width");
  refused([&] { adding(1, 0, 1); }, "another height and width");
  CHECK(adding(0, 1, 2).features() == 1);
  CHECK(adding(1, 1, 1).features() == 1);
}

}  // namespace

int main() {
  test_programs_that_do_not_fit_are_refused();
  test_a_residual_of_another_size_is_refused();
  test_not_a_number_stays_in_its_image();
  test_where_memory_or_threads_run_out();
  for (unsigned seed = 0; seed < 300; ++seed) test_networks_side_by_side(seed);
  for (const Kernels* kernels : usable()) std::printf("%s, ", kernels->name);
  std::printf("%d checks\n", der_fast::tests::checks);
  return 0;
}
