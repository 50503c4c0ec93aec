// Shared by the C++ tests: a check that stays in release builds, and one that a call refuses its arguments.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <functional>
#include <stdexcept>
#include <string>

namespace der_fast::tests {

inline int checks = 0;

#define CHECK(condition)                                                                 \
  do {                                                                                   \
    ++der_fast::tests::checks;                                                           \
    if (!(condition)) {                                                                  \
      std::fprintf(stderr, "%s:%d: %s does not hold\n", __FILE__, __LINE__, #condition); \
      std::exit(1);                                                                      \
    }                                                                                    \
  } while (false)

inline void refused(const std::function<void()>& call, const std::string& words) {
  try {
    call();
  } catch (const std::invalid_argument& error) {
    if (std::string(error.what()).find(words) == std::string::npos) std::fprintf(stderr, "refused with: %s\n", error.what());
    CHECK(std::string(error.what()).find(words) != std::string::npos);
    return;
  }
  CHECK(false && "refused");
}

}  // namespace der_fast::tests
