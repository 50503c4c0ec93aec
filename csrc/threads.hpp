// Several threads for one piece of work, or as many of them as the system can start.
#pragma once

#include <cstdint>
#include <functional>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

namespace der_fast {

constexpr int kMostThreads = 1024;

// Calls work(0) on this thread and work(1) … work(count - 1) on others, and returns when all have ended. If no further thread can be
// started, the remaining calls are left out, so every call must continue until no work is left. Only work(0) may throw.
template <class Work>
void on_threads(std::int64_t count, const Work& work) {
  struct Helpers {
    std::vector<std::thread> threads;
    ~Helpers() {
      for (std::thread& thread : threads) thread.join();
    }
  } helpers;
  try {
    // Reserved first, so that a running thread is never lost for want of room for its handle.
    if (count > 1) helpers.threads.reserve(static_cast<std::size_t>(count - 1));
    for (std::int64_t i = 1; i < count; ++i) helpers.threads.emplace_back(std::cref(work), i);
  } catch (const std::system_error&) {
  } catch (const std::bad_alloc&) {
  }
  work(0);
}

}  // namespace der_fast
