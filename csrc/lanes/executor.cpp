#include "executor.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <new>
#include <stdexcept>

#include "../sizes.hpp"
#include "../threads.hpp"

namespace der_fast::lanes {
namespace {

constexpr std::size_t kAlignment = 64;

struct Freed {
  void operator()(float* p) const { ::operator delete[](p, std::align_val_t{kAlignment}); }
};
using Buffer = std::unique_ptr<float[], Freed>;

Buffer buffer_of(std::size_t floats) {
  return Buffer(static_cast<float*>(::operator new[](floats * sizeof(float), std::align_val_t{kAlignment})));
}

[[noreturn]] void refuse(std::size_t index, const std::string& fault) {
  throw std::invalid_argument("operation " + std::to_string(index) + ": " + fault);
}

void expect_tensor(std::size_t index, const char* name, std::int64_t offset, std::int64_t elements, std::int64_t bytes) {
  if (offset < 0 || offset % 4 != 0 || elements > (std::numeric_limits<std::int64_t>::max() - offset) / 4 || offset + 4 * elements > bytes)
    refuse(index, std::string("its ") + name + " is outside the arena of " + std::to_string(bytes) + " bytes");
}

Shape shape_after(const Op& op, const Shape& in) {
  if (op.kind == Kind::mean) return {1, 1, op.outputs};
  const long stride = op.kind == Kind::pool ? 2 : op.stride;
  return {(in.height - 1) / stride + 1, (in.width - 1) / stride + 1, op.outputs};
}

long size_of(const Shape& shape) { return shape.height * shape.width * shape.channels; }

// Where every value is stored for one image size, so that a few buffers are reused.
struct Schedule {
  std::vector<Shape> shapes;
  std::vector<int> slots;
  std::vector<long> sizes;  // of the slots, in floats per lane
};

class Slots {
 public:
  explicit Slots(Schedule& schedule) : schedule_(schedule) {}

  int take(long size) {
    int best = -1;
    for (std::size_t i = 0; i < schedule_.sizes.size(); ++i) {
      if (used_[i]) continue;
      // The smallest that is large enough; if there is none, the largest grows.
      const auto rank = [&](std::size_t j) { return schedule_.sizes[j] >= size ? -schedule_.sizes[j] : schedule_.sizes[j] - (1L << 62); };
      if (best < 0 || rank(i) > rank(static_cast<std::size_t>(best))) best = static_cast<int>(i);
    }
    if (best < 0) {
      best = static_cast<int>(schedule_.sizes.size());
      schedule_.sizes.push_back(0);
      used_.push_back(false);
    }
    const auto slot = static_cast<std::size_t>(best);
    schedule_.sizes[slot] = std::max(schedule_.sizes[slot], size);
    used_[slot] = true;
    return best;
  }

  void give(int slot) { used_[static_cast<std::size_t>(slot)] = false; }

 private:
  Schedule& schedule_;
  std::vector<bool> used_;
};

Schedule schedule_of(const Program& program, long height, long width) {
  const auto& ops = program.ops();
  std::vector<std::size_t> last(ops.size() + 1, 0);
  for (std::size_t i = 0; i < ops.size(); ++i) {
    last[static_cast<std::size_t>(ops[i].source)] = i;
    if (ops[i].residual >= 0) last[static_cast<std::size_t>(ops[i].residual)] = i;
  }
  Schedule schedule;
  Slots slots(schedule);
  schedule.shapes.push_back({height, width, program.image_channels()});
  schedule.slots.push_back(slots.take(size_of(schedule.shapes[0])));
  for (std::size_t i = 0; i < ops.size(); ++i) {
    const Op& op = ops[i];
    const auto source = static_cast<std::size_t>(op.source);
    schedule.shapes.push_back(shape_after(op, schedule.shapes[source]));
    // A convolution reads its residual only where it writes, an element-wise operation its source.
    const int same = op.kind == Kind::conv ? op.residual : op.kind == Kind::affine || op.kind == Kind::bias ? op.source : -1;
    const bool in_place = same >= 0 && last[static_cast<std::size_t>(same)] == i && (op.kind != Kind::conv || same != op.source);
    schedule.slots.push_back(in_place ? schedule.slots[static_cast<std::size_t>(same)] : slots.take(size_of(schedule.shapes.back())));
    for (const int value : {op.source, op.residual == op.source ? -1 : op.residual}) {
      if (value < 0 || last[static_cast<std::size_t>(value)] != i || (in_place && value == same)) continue;
      slots.give(schedule.slots[static_cast<std::size_t>(value)]);
    }
  }
  return schedule;
}

void gather(const Images& images, long first, long lanes, float* to) {
  for (long y = 0; y < images.height; ++y)
    for (long x = 0; x < images.width; ++x)
      for (long c = 0; c < images.channels; ++c, to += lanes) {
        const float* from = images.data + first * images.strides[0] + c * images.strides[1] + y * images.strides[2] + x * images.strides[3];
        for (long lane = 0; lane < lanes; ++lane) to[lane] = first + lane < images.count ? from[lane * images.strides[0]] : 0.0f;
      }
}

class Worker {
 public:
  Worker(const Kernels& kernels, const std::vector<long>& sizes) : kernels_(kernels) {
    for (const long size : sizes) slots_.push_back(buffer_of(static_cast<std::size_t>(size * kernels.lanes)));
  }

  void run(const Network& network, const Schedule& schedule, const Images& images, long first, float* output, long row_stride) {
    const auto& ops = network.program->ops();
    gather(images, first, kernels_.lanes, value(schedule, 0));
    for (std::size_t i = 0; i < ops.size(); ++i) apply(network, schedule, i);
    const float* features = value(schedule, static_cast<int>(ops.size()));
    const long count = std::min(kernels_.lanes, images.count - first);
    for (long lane = 0; lane < count; ++lane)
      for (long f = 0; f < network.program->features(); ++f)
        output[(first + lane) * row_stride + network.column + f] = features[f * kernels_.lanes + lane];
  }

 private:
  float* value(const Schedule& schedule, int index) const {
    const int slot = schedule.slots[static_cast<std::size_t>(index)];
    return slots_[static_cast<std::size_t>(slot)].get();
  }

  void apply(const Network& network, const Schedule& schedule, std::size_t index) const {
    const Op& op = network.program->ops()[index];
    const auto tensor = [&](std::int64_t offset) { return offset < 0 ? nullptr : reinterpret_cast<const float*>(network.arena + offset); };
    const float* source = value(schedule, op.source);
    float* target = value(schedule, static_cast<int>(index) + 1);
    const float* residual = op.residual < 0 ? nullptr : value(schedule, op.residual);
    const Shape &in = schedule.shapes[static_cast<std::size_t>(op.source)], &out = schedule.shapes[index + 1];
    switch (op.kind) {
      case Kind::conv:
        kernels_.conv({source, in, target, out, tensor(op.weight), tensor(op.bias), residual, op.kernel, op.stride, op.relu});
        break;
      case Kind::bias:
      case Kind::affine: kernels_.affine(source, target, out, tensor(op.weight), tensor(op.bias), op.relu); break;
      case Kind::pool: kernels_.pool(source, in, target, out); break;
      case Kind::widen: kernels_.widen(source, in, target, out, op.stride); break;
      default: kernels_.mean(source, in, target); break;
    }
  }

  const Kernels& kernels_;
  std::vector<Buffer> slots_;
};

}  // namespace

Program::Program(long image_channels, std::vector<Op> ops, std::int64_t bytes) : image_channels_(image_channels), ops_(std::move(ops)) {
  if (image_channels < 1 || image_channels > kLargest) {
    throw std::invalid_argument("image_channels must be " + whole_number(1, kLargest) + ", not " + std::to_string(image_channels));
  }
  if (bytes < 0) throw std::invalid_argument("bytes must not be negative, but is " + std::to_string(bytes));
  // How much smaller each value is than the image. Two values with the same number are equally large for every image.
  std::vector<long> shrunk{1};
  for (std::size_t i = 0; i < ops_.size(); ++i) {
    check(i, bytes);
    const Op& op = ops_[i];
    const long factor = op.kind == Kind::pool ? 2 : op.stride;
    // Sides are at most 2^15, so after this much shrinking a single pixel is left.
    shrunk.push_back(std::min(shrunk[static_cast<std::size_t>(op.source)] * factor, kLargest));
    if (op.residual >= 0 && shrunk[static_cast<std::size_t>(op.residual)] != shrunk.back()) {
      refuse(i, "its residual has another height and width");
    }
  }
}

void Program::check(std::size_t i, std::int64_t bytes) const {
  const Op& op = ops_[i];
  const bool conv = op.kind == Kind::conv;
  const auto channels = [&](int value) { return value == 0 ? image_channels_ : ops_[static_cast<std::size_t>(value) - 1].outputs; };
  if (op.kind < Kind::conv || op.kind > Kind::mean) refuse(i, "unknown kind " + std::to_string(static_cast<int>(op.kind)));
  if (op.source < 0 || op.source > static_cast<int>(i)) refuse(i, "reads a value that does not exist yet");
  if (op.residual > static_cast<int>(i) || op.residual < -1) refuse(i, "adds a value that does not exist yet");
  if (op.residual >= 0 && !conv) refuse(i, "only a convolution adds a residual");
  if (op.outputs < 1 || op.outputs > kLargest) refuse(i, "needs between 1 and 2^20 output channels");
  if (op.kernel < 1 || op.kernel > 31 || op.kernel % 2 == 0 || op.stride < 1 || op.stride > 31) {
    refuse(i, "kernel and stride must be small and the kernel odd");
  }
  if (channels(op.source) != op.inputs) {
    refuse(i, "expects " + std::to_string(op.inputs) + " input channels, its source has " + std::to_string(channels(op.source)));
  }
  if (op.residual >= 0 && channels(op.residual) != op.outputs) refuse(i, "its residual has another number of channels");
  if ((op.kind == Kind::mean) != (i + 1 == ops_.size())) refuse(i, "the mean must be the last operation, and the last must be the mean");
  if (op.kind == Kind::widen ? op.outputs < op.inputs : !conv && op.outputs != op.inputs) refuse(i, "cannot change the number of channels");
  if (!conv && op.kind != Kind::widen && op.stride != 1) refuse(i, "has no stride");
  if (conv) expect_tensor(i, "weight", op.weight, op.outputs * op.inputs * op.kernel * op.kernel, bytes);
  if (op.kind == Kind::affine) expect_tensor(i, "scale", op.weight, op.outputs, bytes);
  if (op.kind == Kind::affine || op.kind == Kind::bias || (conv && op.bias >= 0)) expect_tensor(i, "bias", op.bias, op.outputs, bytes);
  if (op.kind == Kind::bias && op.weight >= 0) refuse(i, "a bias has no scale");
}

const Kernels* kernels() {
#if defined(DER_FAST_X86)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512bw")) {
    return avx512();
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return avx2();
#endif
  return nullptr;
}

void run(const Kernels& kernels, const std::vector<Network>& networks, const Images& images, float* output, long row_stride, int threads) {
  const long groups = (images.count + kernels.lanes - 1) / kernels.lanes;
  const long items = groups * static_cast<long>(networks.size());
  if (items == 0) return;
  std::vector<Schedule> schedules;
  std::vector<long> sizes;
  for (const Network& network : networks) {
    schedules.push_back(schedule_of(*network.program, images.height, images.width));
    const auto& slots = schedules.back().sizes;
    sizes.resize(std::max(sizes.size(), slots.size()), 0);
    for (std::size_t i = 0; i < slots.size(); ++i) sizes[i] = std::max(sizes[i], slots[i]);
  }
  std::vector<Worker> workers;
  for (long i = 0; i < std::min<long>(std::max(threads, 1), items); ++i) workers.emplace_back(kernels, sizes);
  std::atomic<long> next{0};
  const auto work = [&](std::int64_t thread) {
    Worker& worker = workers[static_cast<std::size_t>(thread)];
    for (long item = next++; item < items; item = next++) {
      const auto which = static_cast<std::size_t>(item / groups);
      worker.run(networks[which], schedules[which], images, item % groups * kernels.lanes, output, row_stride);
    }
  };
  on_threads(static_cast<std::int64_t>(workers.size()), work);
}

}  // namespace der_fast::lanes
