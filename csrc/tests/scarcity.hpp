// Makes memory and threads run out at a chosen moment. Replaces operator new, so only one file of a program may include it.
#pragma once

#include <atomic>
#include <cstdlib>
#include <new>
#include <system_error>
#include <thread>

#include "check.hpp"
#if defined(__GLIBC__)
#include <pthread.h>
#endif

namespace der_fast::tests {

// One allocation fails after this many; negative: none fails.
inline std::atomic<long> allocations_left{-1};

// Makes the first allocation of `call` fail, then the second, and so on until none fails. Each time `call` must either throw or do its
// work, which `done` checks. Returns how often it did its work although an allocation had failed.
template <class Call, class Done>
int survived(const Call& call, const Done& done) {
  int count = 0;
  for (long allocation = 0;; ++allocation) {
    allocations_left = allocation;
    bool finished = true;
    try {
      call();
    } catch (const std::bad_alloc&) {
      finished = false;
    }
    const bool enough = allocations_left.exchange(-1) >= 0;
    if (finished) done();
    if (enough) return count;
    count += finished;
  }
}

// Makes the call while no thread can be started, because its stack would not fit.
template <class Call>
void without_threads([[maybe_unused]] const Call& call) {
#if defined(__GLIBC__)
  pthread_attr_t before, huge;
  CHECK(pthread_getattr_default_np(&before) == 0 && pthread_getattr_default_np(&huge) == 0);
  CHECK(pthread_attr_setstacksize(&huge, std::size_t{1} << 47) == 0 && pthread_setattr_default_np(&huge) == 0);
  bool started = true;
  try {
    std::thread([] {}).join();
  } catch (const std::system_error&) {
    started = false;
  }
  CHECK(!started);
  call();
  CHECK(pthread_setattr_default_np(&before) == 0);
#endif
}

}  // namespace der_fast::tests

void* operator new(std::size_t size) {
  auto& left = der_fast::tests::allocations_left;
  if (left.load() >= 0 && left.fetch_sub(1) == 0) throw std::bad_alloc();
  if (void* found = std::malloc(size ? size : 1)) return found;
  throw std::bad_alloc();
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
