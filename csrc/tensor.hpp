// What Python hands over for a tensor: address, shape, strides and dtype code, each checked before anything is read.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

#include "compact.cuh"

namespace der_fast {

using compact::Dtype;
using compact::size_of;

struct Tensor {
  void* data = nullptr;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
  Dtype dtype = Dtype::float32;

  [[nodiscard]] std::int64_t elements() const;
  [[nodiscard]] bool contiguous() const;
};

const char* name_of(Dtype dtype);
Dtype dtype_of(int code, const std::string& name);
std::string text_of(const std::vector<std::int64_t>& shape);

// Throws std::invalid_argument, which Python sees as ValueError; every message begins with the argument's name.
[[noreturn]] void refuse(const std::string& name, const std::string& fault);

// `value` is (address, shape, strides, dtype code).
Tensor tensor_of(const pybind11::handle& value, const std::string& name);
void expect_shape(const Tensor& tensor, const std::vector<std::int64_t>& shape, const std::string& name);

}  // namespace der_fast
