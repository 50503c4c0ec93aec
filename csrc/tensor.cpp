#include "tensor.hpp"

namespace py = pybind11;

namespace der_fast {

namespace {

constexpr std::int64_t kLargestSize = std::int64_t{1} << 31;
constexpr std::int64_t kLargestStride = std::int64_t{1} << 40;

std::vector<std::int64_t> integers(const py::handle& value, const std::string& name, std::int64_t bound) {
  std::vector<std::int64_t> out;
  for (const py::handle item : py::reinterpret_borrow<py::tuple>(value)) {
    if (!py::isinstance<py::int_>(item)) refuse(name, "must hold whole numbers");
    const auto number = py::cast<std::int64_t>(item);
    if (number < 0 || number > bound) refuse(name, "has the entry " + std::to_string(number) + ", which is out of range");
    out.push_back(number);
  }
  return out;
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

std::int64_t Tensor::elements() const {
  std::int64_t count = 1;
  for (const std::int64_t size : shape) {
    if (size && count > (std::int64_t{1} << 48) / size) {
      throw std::invalid_argument("a tensor of shape " + text_of(shape) + " is too large");
    }
    count *= size;
  }
  return count;
}

bool Tensor::contiguous() const {
  std::int64_t expected = 1;
  for (std::size_t i = shape.size(); i-- > 0;) {
    if (shape[i] > 1 && strides[i] != expected) return false;
    expected *= shape[i];
  }
  return true;
}

Tensor tensor_of(const py::handle& value, const std::string& name) {
  if (!py::isinstance<py::tuple>(value) || py::len(value) != 4) refuse(name, "must be a tuple (address, shape, strides, dtype code)");
  const auto parts = py::reinterpret_borrow<py::tuple>(value);
  if (!py::isinstance<py::int_>(parts[0]) || !py::isinstance<py::tuple>(parts[1]) || !py::isinstance<py::tuple>(parts[2]) ||
      !py::isinstance<py::int_>(parts[3])) {
    refuse(name, "must be a tuple (address, shape, strides, dtype code)");
  }
  Tensor tensor;
  tensor.shape = integers(parts[1], name + ".shape", kLargestSize);
  tensor.strides = integers(parts[2], name + ".strides", kLargestStride);
  tensor.dtype = dtype_of(py::cast<int>(parts[3]), name);
  if (tensor.shape.size() != tensor.strides.size()) {
    refuse(name, "has " + std::to_string(tensor.shape.size()) + " sizes but " + std::to_string(tensor.strides.size()) + " strides");
  }
  const auto address = py::cast<std::uintptr_t>(parts[0]);
  if (tensor.elements() > 0) {
    if (address == 0) refuse(name, "has no data");
    if (address % static_cast<std::uintptr_t>(size_of(tensor.dtype))) refuse(name, "is not aligned to its dtype");
    tensor.data = reinterpret_cast<void*>(address);
  }
  return tensor;
}

void expect_shape(const Tensor& tensor, const std::vector<std::int64_t>& shape, const std::string& name) {
  if (tensor.shape != shape) refuse(name, "must have the shape " + text_of(shape) + ", not " + text_of(tensor.shape));
}

}  // namespace der_fast
