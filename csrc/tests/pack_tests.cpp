// The packer without Python, so that it can run under sanitizers: every buffer is exactly as long as it must be.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <numeric>
#include <random>

#include "check.hpp"
#include "job_table.hpp"
#include "pack.hpp"
#include "scarcity.hpp"
#include "sizes.hpp"

using namespace der_fast;
using compact::Dtype;
using compact::Job;
using compact::Kind;
using compact::Layout;
using tests::refused;

namespace {

// Everything that a job points to, in buffers without slack.
template <class Source>
struct Owned {
  std::vector<std::int32_t> rows, columns;
  std::unique_ptr<Source[]> weight, norm;
  Job job;
};

template <class Source>
Owned<Source> draw(std::mt19937& random, Kind kind, Dtype target, std::int64_t offset, Layout layout) {
  const auto size = [&](int low, int high) { return std::uniform_int_distribution<std::int64_t>(low, high)(random); };
  const std::int64_t K = size(1, 6), C = size(1, 6), R = size(1, 3), S = size(1, 3);
  Owned<Source> own;
  own.rows.resize(static_cast<std::size_t>(size(0, 8)));
  own.columns.resize(static_cast<std::size_t>(size(0, 8)));
  for (auto& row : own.rows) row = static_cast<std::int32_t>(size(-1, static_cast<int>(K) - 1));
  for (auto& column : own.columns) column = static_cast<std::int32_t>(size(-1, static_cast<int>(C) - 1));
  own.weight = std::make_unique<Source[]>(static_cast<std::size_t>(K * C * R * S));
  own.norm = std::make_unique<Source[]>(static_cast<std::size_t>(4 * K));
  std::normal_distribution<double> normal;
  for (std::int64_t i = 0; i < K * C * R * S; ++i) own.weight[static_cast<std::size_t>(i)] = static_cast<Source>(normal(random));
  for (std::int64_t i = 0; i < 4 * K; ++i) {
    const double value = normal(random);
    own.norm[static_cast<std::size_t>(i)] = static_cast<Source>(i < 3 * K ? value : value * value + 0.01);
  }
  Job& job = own.job;
  job.kind = kind;
  job.source = sizeof(Source) == 8 ? Dtype::float64 : Dtype::float32;
  job.target = target;
  job.layout = layout;
  job.offset = offset;
  job.rows = static_cast<std::int64_t>(own.rows.size());
  job.row = own.rows.data();
  job.epsilon = 1e-5;
  if (kind == Kind::weight) {
    job.columns = static_cast<std::int64_t>(own.columns.size());
    job.column = own.columns.data();
    job.height = R;
    job.width = S;
    // Half of them channels last.
    const bool last = size(0, 1) == 1;
    const std::int64_t strides[2][4] = {{C * R * S, R * S, S, 1}, {C * R * S, 1, S * C, C}};
    std::memcpy(job.strides, strides[last], sizeof job.strides);
  } else {
    job.strides[0] = C * R * S;
  }
  if (kind == Kind::weight || kind == Kind::copy) job.weight = own.weight.get();
  if (kind == Kind::scale || kind == Kind::shift || (kind == Kind::weight && size(0, 1))) {
    job.gamma = {own.norm.get(), 1};
    job.beta = {own.norm.get() + K, 1};
    job.mean = {own.norm.get() + 2 * K, 1};
    job.variance = {own.norm.get() + 3 * K, 1};
  }
  return own;
}

template <class Source>
double expected(const Owned<Source>& own, std::int64_t k, std::int64_t c, std::int64_t r, std::int64_t s) {
  const Job& job = own.job;
  const std::int64_t i = own.rows[static_cast<std::size_t>(k)];
  if (i < 0) return 0;
  const auto at = [&](const compact::Vector& vector) { return static_cast<double>(static_cast<const Source*>(vector.data)[i]); };
  const double scale = job.gamma.data ? at(job.gamma) / std::sqrt(at(job.variance) + job.epsilon) : 1;
  if (job.kind == Kind::scale) return scale;
  if (job.kind == Kind::shift) return at(job.beta) - scale * at(job.mean);
  if (job.kind == Kind::copy) return static_cast<double>(own.weight[static_cast<std::size_t>(i * job.strides[0])]);
  const std::int64_t j = own.columns[static_cast<std::size_t>(c)];
  if (j < 0) return 0;
  const std::int64_t where = i * job.strides[0] + j * job.strides[1] + r * job.strides[2] + s * job.strides[3];
  return scale * static_cast<double>(own.weight[static_cast<std::size_t>(where)]);
}

// Every block and thread of the CUDA launch, one after the other, with the job table laid out in this memory.
int pack_as_the_device(const std::vector<Job>& jobs, std::byte* arena, std::int64_t bytes) {
  const compact::TableLayout layout(jobs);
  const auto table = std::make_unique<std::byte[]>(layout.bytes);
  const std::int64_t blocks = compact::write_table(jobs, layout, table.get(), table.get());
  const auto* first = reinterpret_cast<const std::int64_t*>(table.get() + layout.first);
  const auto* own = reinterpret_cast<const Job*>(table.get());
  auto* bad = reinterpret_cast<int*>(table.get() + layout.bad);
  std::memset(arena, 0, static_cast<std::size_t>(bytes));
  for (std::int64_t block = 0; block < blocks; ++block) {
    const int job = compact::job_of_block(first, static_cast<int>(jobs.size()), block);
    CHECK(first[job] <= block && block < first[job + 1]);
    for (int thread = 0; thread < compact::kBlockThreads; ++thread) {
      if (!compact::write_thread_of(own[job], block - first[job], thread, arena)) *bad = std::min(*bad, job);
    }
  }
  return *bad;
}

template <class Source, class Target>
void test_pack(Dtype target, int threads) {
  std::mt19937 random(7);
  for (int trial = 0; trial < 200; ++trial) {
    std::vector<Owned<Source>> owned;
    std::vector<Job> jobs;
    std::int64_t end = 0;
    const Layout layout = trial % 2 ? Layout::krsc : Layout::kcrs;
    for (int i = 0; i < 6; ++i) {
      const std::int64_t offset = (end + kAlignment - 1) / kAlignment * kAlignment + kAlignment * (trial % 3);
      owned.push_back(draw<Source>(random, static_cast<Kind>(i % 4), target, offset, layout));
      jobs.push_back(owned.back().job);
      end = offset + jobs.back().bytes();
    }
    const std::int64_t bytes = end + trial % 5;
    std::unique_ptr<std::byte, decltype(&std::free)> arena(
        static_cast<std::byte*>(std::aligned_alloc(kAlignment, static_cast<std::size_t>((bytes + 63) / 64 * 64))), &std::free);
    std::memset(arena.get(), 0xFF, static_cast<std::size_t>(bytes));
    CHECK(pack(jobs, arena.get(), bytes, threads) == -1);
    std::int64_t before = 0;
    for (const Owned<Source>& own : owned) {
      const Job& job = own.job;
      for (; before < job.offset; ++before) CHECK(arena.get()[before] == std::byte{0});
      const auto* out = reinterpret_cast<const Target*>(arena.get() + job.offset);
      for (std::int64_t k = 0; k < job.rows; ++k)
        for (std::int64_t c = 0; c < job.columns; ++c)
          for (std::int64_t r = 0; r < job.height; ++r)
            for (std::int64_t s = 0; s < job.width; ++s) {
              const std::int64_t inside =
                  layout == Layout::krsc ? (r * job.width + s) * job.columns + c : (c * job.height + r) * job.width + s;
              const Target found = out[k * job.line() + inside];
              const Target wanted = compact::rounded<Target>(expected(own, k, c, r, s));
              CHECK(std::memcmp(&found, &wanted, sizeof found) == 0);
            }
      before = job.offset + job.bytes();
    }
    for (; before < bytes; ++before) CHECK(arena.get()[before] == std::byte{0});
    // The device's loop gives the same bytes, including the gaps.
    const auto again = std::unique_ptr<std::byte, decltype(&std::free)>(
        static_cast<std::byte*>(std::aligned_alloc(kAlignment, static_cast<std::size_t>((bytes + 63) / 64 * 64))), &std::free);
    std::memset(again.get(), 0xFF, static_cast<std::size_t>(bytes));
    CHECK(pack_as_the_device(jobs, again.get(), bytes) == compact::kNoBadJob);
    CHECK(std::memcmp(again.get(), arena.get(), static_cast<std::size_t>(bytes)) == 0);
  }
}

void test_rounding() {
  using compact::Bfloat16;
  using compact::Float16;
  using compact::rounded;
  const double step = std::ldexp(1.0, -8);
  CHECK(rounded<Bfloat16>(1.0).bits == 0x3f80 && rounded<Bfloat16>(-2.0).bits == 0xc000);
  CHECK(rounded<Bfloat16>(1 + step).bits == 0x3f80 && rounded<Bfloat16>(1 + 3 * step).bits == 0x3f82);
  CHECK(rounded<Bfloat16>(std::nextafter(1 + step, 2)).bits == 0x3f81 && rounded<Bfloat16>(std::nextafter(1 + 3 * step, 0)).bits == 0x3f81);
  CHECK(rounded<Float16>(65504).bits == 0x7bff && rounded<Float16>(65519.999).bits == 0x7bff && rounded<Float16>(65520).bits == 0x7c00);
  CHECK(rounded<Float16>(std::ldexp(1.0, -24)).bits == 1 && rounded<Float16>(std::ldexp(1.0, -25)).bits == 0);
  CHECK(rounded<Float16>(std::nextafter(std::ldexp(1.0, -25), 1)).bits == 1 && rounded<Float16>(-0.0).bits == 0x8000);
  const double odd[] = {0.0, -0.0, 1e-320, 1e300, -1e300, std::numeric_limits<double>::infinity(), std::nan("")};
  for (const double value : odd) {
    CHECK(compact::finite(rounded<Bfloat16>(value)) == (std::fabs(value) < 1e39));
    CHECK(compact::finite(rounded<Float16>(value)) == (std::fabs(value) < 1e39));
    CHECK(compact::finite(value) == std::isfinite(value));
  }
}

// Enough work for several threads, with faults in two jobs: the first job is reported.
void test_threads_and_faults() {
  constexpr std::int64_t rows = 700, columns = 1100;
  std::vector<float> weight(rows * columns, 1.0F);
  std::vector<std::int32_t> row(rows), column(columns);
  for (std::int64_t i = 0; i < rows; ++i) row[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
  for (std::int64_t i = 0; i < columns; ++i) column[static_cast<std::size_t>(i)] = static_cast<std::int32_t>(i);
  std::vector<float> bad = weight;
  bad[rows * columns / 2] = std::numeric_limits<float>::quiet_NaN();
  std::vector<Job> jobs;
  for (int i = 0; i < 4; ++i) {
    Job job;
    job.rows = rows;
    job.columns = columns;
    job.row = row.data();
    job.column = column.data();
    job.weight = i == 1 || i == 3 ? bad.data() : weight.data();
    job.strides[0] = columns;
    job.strides[1] = job.strides[2] = job.strides[3] = 1;
    job.offset = i * job.bytes();
    jobs.push_back(job);
  }
  std::vector<float> arena(4 * rows * columns);
  check(jobs, static_cast<std::int64_t>(arena.size() * 4));
  for (const int threads : {0, 1, 2, 8}) {
    CHECK(pack(jobs, reinterpret_cast<std::byte*>(arena.data()), static_cast<std::int64_t>(arena.size() * 4), threads) == 1);
  }
  CHECK(pack_as_the_device(jobs, reinterpret_cast<std::byte*>(arena.data()), static_cast<std::int64_t>(arena.size() * 4)) == 1);
  for (std::int64_t i = 0; i < rows * columns; ++i) CHECK(arena[static_cast<std::size_t>(i)] == 1.0F);
}

// Rows, columns and taps of a weight with zero strides cost no memory, and their product can be huge.
void test_jobs_that_do_not_fit_are_refused() {
  Job job;
  job.rows = job.columns = 1 << 8;
  job.height = job.width = 1 << 24;
  refused([&] { check({job}, 1024); }, "jobs[0] is too large: 256 rows, each of 256 × 16777216 × 16777216 entries");
  job.rows = 0;
  refused([&] { check({job}, 1024); }, "jobs[0] is too large");
  job.height = 0;
  check({job}, 0);
  Job vector;
  vector.kind = Kind::copy;
  vector.rows = 16;
  vector.offset = 64;
  check({job, vector}, 128);
  refused([&] { check({job, vector}, 127); }, "storage has 127 bytes, but jobs[1] ends at 128");
  vector.offset = std::numeric_limits<std::int64_t>::max() - 63;
  refused([&] { check({job, vector}, 128); }, "storage has 128 bytes, but jobs[1] ends at 9223372036854775808");
  refused([&] { check({vector, job}, std::numeric_limits<std::int64_t>::max()); }, "but jobs[0] ends at");
  vector.offset = 32;
  refused([&] { check({vector}, 128); }, "jobs[0].offset must be a multiple of 64, not 32");
  vector.offset = 0;
  refused([&] { check({vector, vector}, 128); }, "jobs[1].offset is 0, but the data before it ends at 64");
}

// A weight without entries has no address; only padding is stored for it, or nothing.
void test_weights_without_entries() {
  const std::vector<std::int32_t> rows{0, -1, 1}, padding{-1, -1};
  Job job;
  job.rows = 3;
  job.row = rows.data();
  job.columns = 2;
  job.column = padding.data();
  job.strides[0] = job.strides[1] = 7;
  std::vector<float> arena(6, 1.0F);
  CHECK(pack({job}, reinterpret_cast<std::byte*>(arena.data()), 24, 1) == -1);
  CHECK(std::count(arena.begin(), arena.end(), 0.0F) == 6);
  job.height = 0;
  CHECK(pack({job}, nullptr, 0, 1) == -1);
}

void test_packing_where_memory_or_threads_run_out() {
  constexpr std::int64_t rows = 400, columns = 1000;
  const std::vector<float> weight(rows * columns, 1.0F);
  std::vector<std::int32_t> index(columns);
  std::iota(index.begin(), index.end(), 0);
  Job job;
  job.rows = rows;
  job.columns = columns;
  job.row = job.column = index.data();
  job.weight = weight.data();
  job.strides[0] = columns;
  job.strides[1] = 1;
  const std::vector<Job> jobs{job};
  std::vector<float> arena(rows * columns);
  const auto call = [&] { CHECK(pack(jobs, reinterpret_cast<std::byte*>(arena.data()), job.bytes(), 8) == -1); };
  const auto done = [&] {
    CHECK(arena == weight);
    std::fill(arena.begin(), arena.end(), 0.0F);
  };
  // Allocations for the handles of two helpers, and two threads: packing continues without any of them.
  CHECK(tests::survived(call, done) >= 3);
  tests::without_threads([&] { call(), done(); });
}

void test_nothing() {
  CHECK(pack({}, nullptr, 0, 0) == -1);
  Job empty;
  CHECK(pack({empty}, nullptr, 0, 4) == -1);
}

}  // namespace

int main() {
  test_rounding();
  for (const int threads : {1, 3}) {
    test_pack<float, double>(Dtype::float64, threads);
    test_pack<float, float>(Dtype::float32, threads);
    test_pack<double, compact::Bfloat16>(Dtype::bfloat16, threads);
    test_pack<float, compact::Float16>(Dtype::float16, threads);
  }
  test_threads_and_faults();
  test_jobs_that_do_not_fit_are_refused();
  test_weights_without_entries();
  test_packing_where_memory_or_threads_run_out();
  test_nothing();
  std::printf("%d checks\n", tests::checks);
  return 0;
}
