// A tensor as Python passes it: address, shape, strides and dtype code, each checked before anything is read.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>
#include <vector>

#include "compact.cuh"
#include "field.hpp"

namespace der_fast {

using compact::Dtype;
using compact::size_of;

struct Tensor {
  void* data = nullptr;
  std::vector<std::int64_t> shape;
  std::vector<std::int64_t> strides;  // in elements
  Dtype dtype = Dtype::float32;

  // At most kMost, since tensor_of refuses larger tensors.
  [[nodiscard]] std::int64_t elements() const { return *product(shape); }
  [[nodiscard]] bool contiguous() const;
};

const char* name_of(Dtype dtype);
Dtype dtype_of(int code, const std::string& name);
std::string text_of(const std::vector<std::int64_t>& shape);

// `value` is (address, shape, strides, dtype code).
Tensor tensor_of(const pybind11::handle& value, const std::string& name);
void expect_shape(const Tensor& tensor, const std::vector<std::int64_t>& shape, const std::string& name);

}  // namespace der_fast
