// Reads arguments from Python one by one. A wrong one is refused by name, with what it must be and what it was.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include "sizes.hpp"

namespace der_fast {

// Throws std::invalid_argument, which Python sees as ValueError; every message begins with the argument's name.
[[noreturn]] void refuse(const std::string& name, const std::string& fault);

// A value as shown in a message, shortened.
inline std::string shown(const pybind11::handle& value) {
  try {
    return pybind11::str(pybind11::module_::import("reprlib").attr("repr")(value));
  } catch (const pybind11::error_already_set&) {
    return std::string("a ") + Py_TYPE(value.ptr())->tp_name;
  }
}

// `what` names what the value must be, with its article.
template <class T>
T field(const pybind11::handle& value, const std::string& name, const std::string& what) {
  if constexpr (std::is_base_of_v<pybind11::object, T>) {
    if (pybind11::isinstance<T>(value)) return pybind11::reinterpret_borrow<T>(value);
  } else if (pybind11::isinstance<pybind11::bool_>(value) == std::is_same_v<T, bool>) {
    // Stricter than Python: True is not a number here, and only True and False are booleans.
    try {
      return pybind11::cast<T>(value);
    } catch (const pybind11::cast_error&) {
    }
  }
  refuse(name, "must be " + what + ", not " + shown(value));
}

inline std::int64_t whole(const pybind11::handle& value, const std::string& name, std::int64_t low, std::int64_t high) {
  const std::string what = whole_number(low, high);
  const auto number = field<std::int64_t>(value, name, what);
  if (number < low || number > high) refuse(name, "must be " + what + ", not " + std::to_string(number));
  return number;
}

inline double finite_number(const pybind11::handle& value, const std::string& name) {
  constexpr const char* what = "a finite number of at least 0";
  const auto number = field<double>(value, name, what);
  if (number >= 0 && number <= std::numeric_limits<double>::max()) return number;
  refuse(name, std::string("must be ") + what + ", not " + shown(value));
}

// Separate references, since another thread may change the list while the GIL is released.
inline std::vector<pybind11::object> items(const pybind11::handle& value, const std::string& name, const std::string& what) {
  std::vector<pybind11::object> out;
  if (pybind11::isinstance<pybind11::tuple>(value)) {
    for (const pybind11::handle item : value) out.push_back(pybind11::reinterpret_borrow<pybind11::object>(item));
  } else {
    for (const pybind11::handle item : field<pybind11::list>(value, name, what)) {
      out.push_back(pybind11::reinterpret_borrow<pybind11::object>(item));
    }
  }
  return out;
}

// Whole numbers, without pybind11's conversion to vectors, which also accepts sets, in any order.
template <class T>
std::vector<T> numbers(const pybind11::handle& value, const std::string& name, const std::string& what) {
  std::vector<T> out;
  for (const pybind11::object& item : items(value, name, what)) {
    out.push_back(field<T>(item, name + "[" + std::to_string(out.size()) + "]", "a whole number"));
  }
  return out;
}

}  // namespace der_fast
