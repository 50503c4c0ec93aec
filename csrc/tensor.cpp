#include "tensor.hpp"

#include <stdexcept>

namespace py = pybind11;

namespace der_fast {

namespace {

constexpr std::int64_t kLargestSize = std::int64_t{1} << 31;
constexpr std::int64_t kLargestStride = std::int64_t{1} << 40;

std::vector<std::int64_t> integers(const py::handle& value, const std::string& name, std::int64_t bound) {
  std::vector<std::int64_t> out;
  for (const py::handle item : field<py::tuple>(value, name, "a tuple of whole numbers")) {
    out.push_back(whole(item, name + "[" + std::to_string(out.size()) + "]", 0, bound));
  }
  return out;
}

// The distance from the address to the last element must not overflow.
void expect_reach(const Tensor& tensor, const std::string& name) {
  std::int64_t reach = 0;
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
    const auto steps = product({tensor.shape[i] - 1, tensor.strides[i]});
    if (!steps || *steps > kMost - reach) {
      refuse(name, "reaches too far, with the shape " + text_of(tensor.shape) + " and the strides " + text_of(tensor.strides));
    }
    reach += *steps;
  }
}

}  // namespace

void refuse(const std::string& name, const std::string& fault) { throw std::invalid_argument(name + " " + fault); }

const char* name_of(Dtype dtype) {
  constexpr const char* names[] = {"float64", "float32", "bfloat16", "float16", "int32", "bool", "uint8"};
  return names[static_cast<int>(dtype)];
}

Dtype dtype_of(int code, const std::string& name) {
  if (code < 0 || code > static_cast<int>(Dtype::byte)) refuse(name, "has the unknown dtype code " + std::to_string(code));
  return static_cast<Dtype>(code);
}

std::string text_of(const std::vector<std::int64_t>& shape) {
  std::string text = "(";
  for (std::size_t i = 0; i < shape.size(); ++i) {
    if (i) text += ", ";
    text += std::to_string(shape[i]);
  }
  text += ")";
  return text;
}

bool Tensor::contiguous() const {
  if (elements() == 0) return true;
  std::int64_t expected = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] > 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

Tensor tensor_of(const py::handle& value, const std::string& name) {
  constexpr const char* what = "a tuple (address, shape, strides, dtype code)";
  const auto parts = field<py::tuple>(value, name, what);
  if (parts.size() != 4) refuse(name, std::string("must be ") + what + ", not " + shown(value));
  Tensor tensor;
  tensor.shape = integers(parts[1], name + ".shape", kLargestSize);
  tensor.strides = integers(parts[2], name + ".strides", kLargestStride);
  tensor.dtype = dtype_of(field<int>(parts[3], name + ".dtype", "a dtype code"), name);
  if (tensor.shape.size() != tensor.strides.size()) {
    refuse(name, "has " + std::to_string(tensor.shape.size()) + " sizes but " + std::to_string(tensor.strides.size()) + " strides");
  }
  const auto address = field<std::uintptr_t>(parts[0], name + ".address", "an address");
  if (!product(tensor.shape)) refuse(name, "is too large: " + text_of(tensor.shape));
  if (tensor.elements() > 0) {
    if (address == 0) refuse(name, "has no data");
    if (address % static_cast<std::uintptr_t>(size_of(tensor.dtype))) refuse(name, "is not aligned to its dtype");
    expect_reach(tensor, name);
    tensor.data = reinterpret_cast<void*>(address);
  }
  return tensor;
}

void expect_shape(const Tensor& tensor, const std::vector<std::int64_t>& shape, const std::string& name) {
  if (tensor.shape != shape) refuse(name, "must have the shape " + text_of(shape) + ", not " + text_of(tensor.shape));
}

}  // namespace der_fast
