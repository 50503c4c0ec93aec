#include "pack.hpp"

#include <algorithm>
#include <atomic>
#include <limits>
#include <stdexcept>
#include <string>

#include "sizes.hpp"
#include "threads.hpp"

namespace der_fast {

using compact::Dtype;
using compact::Job;
using compact::Kind;
using compact::Layout;

namespace {

// Rows [begin, end) of one job.
struct Task {
  std::int64_t job = 0;
  std::int64_t begin = 0;
  std::int64_t end = 0;
};

// Large enough that fetching a task costs nothing, small enough that nobody waits for the last thread.
constexpr std::int64_t kTaskElements = std::int64_t{1} << 14;
// Starting a thread takes about as long as packing this much.
constexpr std::int64_t kThreadElements = std::int64_t{1} << 17;

template <class Source, class Target>
bool fill_weight(const Job& job, const Task& task, Target* out) {
  bool good = true;
  const bool krsc = job.layout == Layout::krsc;
  const std::int64_t columns = job.columns;
  const std::int64_t height = job.height;
  const std::int64_t width = job.width;
  const std::int64_t step = krsc ? columns : 1;
  for (std::int64_t k = task.begin; k < task.end; ++k) {
    const compact::Row<Source, Target> row(job, k);
    Target* line = out + k * job.line();
    for (std::int64_t c = 0; c < columns; ++c) {
      const compact::Taps<Source, Target> taps = row.at(job, c);
      Target* entry = line + (krsc ? c : c * height * width);
      for (std::int64_t r = 0; r < height; ++r) {
        for (std::int64_t s = 0; s < width; ++s) {
          const Target value = taps(r, s);
          good &= compact::finite(value);
          *entry = value;
          entry += step;
        }
      }
    }
  }
  return good;
}

template <class Source, class Target>
bool fill(const Job& job, const Task& task, std::byte* arena) {
  auto* out = reinterpret_cast<Target*>(arena + job.offset);
  if (job.kind == Kind::weight) return fill_weight<Source, Target>(job, task, out);
  bool good = true;
  for (std::int64_t k = task.begin; k < task.end; ++k) {
    out[k] = compact::vector_entry<Source, Target>(job, k);
    good &= compact::finite(out[k]);
  }
  return good;
}

template <class Source>
bool fill_from(const Job& job, const Task& task, std::byte* arena) {
  switch (job.target) {
    case Dtype::float64: return fill<Source, double>(job, task, arena);
    case Dtype::bfloat16: return fill<Source, compact::Bfloat16>(job, task, arena);
    case Dtype::float16: return fill<Source, compact::Float16>(job, task, arena);
    default: return fill<Source, float>(job, task, arena);
  }
}

bool run(const Job& job, const Task& task, std::byte* arena) {
  return job.source == Dtype::float64 ? fill_from<double>(job, task, arena) : fill_from<float>(job, task, arena);
}

void clear_gaps(const std::vector<Job>& jobs, std::byte* arena, std::int64_t bytes) {
  std::int64_t end = 0;
  for (const Job& job : jobs) {
    std::fill(arena + end, arena + job.offset, std::byte{0});
    end = job.offset + job.bytes();
  }
  std::fill(arena + end, arena + bytes, std::byte{0});
}

std::vector<Task> tasks_of(const std::vector<Job>& jobs, std::int64_t& elements) {
  std::vector<Task> tasks;
  elements = 0;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    const std::int64_t line = jobs[i].line();
    if (line == 0) continue;
    const std::int64_t step = std::max<std::int64_t>(kTaskElements / line, 1);
    for (std::int64_t begin = 0; begin < jobs[i].rows; begin += step) {
      tasks.push_back({static_cast<std::int64_t>(i), begin, std::min(begin + step, jobs[i].rows)});
    }
    elements += jobs[i].rows * line;
  }
  return tasks;
}

}  // namespace

void check(const std::vector<Job>& jobs, std::int64_t bytes) {
  std::int64_t end = 0;
  for (std::size_t i = 0; i < jobs.size(); ++i) {
    const Job& job = jobs[i];
    const std::string name = "jobs[" + std::to_string(i) + "]";
    const auto line = product({job.columns, job.height, job.width});
    const auto size = line ? product({job.rows, *line, size_of(job.target)}) : std::nullopt;
    if (!size) {
      throw std::invalid_argument(name + " is too large: " + std::to_string(job.rows) + " rows, each of " + std::to_string(job.columns) +
                                  " × " + std::to_string(job.height) + " × " + std::to_string(job.width) + " entries");
    }
    if (job.offset < end) {
      throw std::invalid_argument(name + ".offset is " + std::to_string(job.offset) + ", but the data before it ends at " +
                                  std::to_string(end));
    }
    if (job.offset % kAlignment) {
      throw std::invalid_argument(name + ".offset must be a multiple of 64, not " + std::to_string(job.offset));
    }
    if (job.offset > bytes || *size > bytes - job.offset) {
      const std::uint64_t wanted = static_cast<std::uint64_t>(job.offset) + static_cast<std::uint64_t>(*size);
      throw std::invalid_argument("storage has " + std::to_string(bytes) + " bytes, but " + name + " ends at " + std::to_string(wanted));
    }
    end = job.offset + *size;
  }
}

std::int64_t pack(const std::vector<Job>& jobs, std::byte* arena, std::int64_t bytes, int threads) {
  std::int64_t elements = 0;
  const std::vector<Task> tasks = tasks_of(jobs, elements);
  std::atomic<std::size_t> next{0};
  std::atomic<std::int64_t> bad{std::numeric_limits<std::int64_t>::max()};
  const auto work = [&](std::int64_t thread) {
    if (thread == 0) clear_gaps(jobs, arena, bytes);
    for (std::size_t i = next++; i < tasks.size(); i = next++) {
      if (run(jobs[static_cast<std::size_t>(tasks[i].job)], tasks[i], arena)) continue;
      std::int64_t found = bad.load();
      while (tasks[i].job < found && !bad.compare_exchange_weak(found, tasks[i].job)) {
      }
    }
  };
  const int wanted = threads > 0 ? threads : static_cast<int>(std::thread::hardware_concurrency());
  on_threads(std::min<std::int64_t>(wanted, elements / kThreadElements), work);
  return bad == std::numeric_limits<std::int64_t>::max() ? -1 : bad.load();
}

}  // namespace der_fast
