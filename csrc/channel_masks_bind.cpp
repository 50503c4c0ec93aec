// Checks the channel masks' arguments from Python, then releases the GIL.
#include "channel_masks_bind.hpp"

#include <pybind11/stl.h>

#include <optional>

#include "channel_masks.hpp"
#include "tensor.hpp"
#if defined(DER_FAST_WITH_CUDA)
#include "channel_masks_cuda.hpp"
#endif

namespace py = pybind11;

namespace der_fast::channel_masks {

namespace {

struct Tables {
  Structure structure;
  std::int64_t users = 0;
};

Tensor dense(const py::handle& value, const std::string& name, Dtype dtype, const std::vector<std::int64_t>& shape) {
  const Tensor tensor = tensor_of(value, name);
  if (tensor.dtype != dtype) refuse(name, std::string("must be ") + name_of(dtype) + ", not " + name_of(tensor.dtype));
  expect_shape(tensor, shape, name);
  if (!tensor.contiguous()) refuse(name, "must be contiguous");
  return tensor;
}

// One number, in a tensor of any shape.
void* number(const py::handle& value, const std::string& name, Dtype dtype) {
  const Tensor tensor = tensor_of(value, name);
  if (tensor.dtype != dtype || tensor.elements() != 1) refuse(name, std::string("must be one ") + name_of(dtype) + " number");
  return tensor.data;
}

const std::int32_t* table(const py::handle& value, const char* name, std::size_t rank, std::int32_t& length, std::int64_t& columns) {
  const Tensor tensor = tensor_of(value, name);
  if (tensor.dtype != Dtype::int32 || tensor.shape.size() != rank || !tensor.contiguous()) {
    refuse(name, "must be contiguous int32 of " + std::to_string(rank) + " dimension(s)");
  }
  constexpr std::int64_t kLongest = std::int64_t{1} << 24;
  if (tensor.shape[0] > kLongest || (rank == 2 && tensor.shape[1] > kLongest)) refuse(name, "is too long: " + text_of(tensor.shape));
  length = static_cast<std::int32_t>(tensor.shape[0]);
  columns = rank == 2 ? tensor.shape[1] : 1;
  return static_cast<const std::int32_t*>(tensor.data);
}

// (rows, row_offsets, convs, user_offsets, users, full)
Tables tables_of(const py::object& value) {
  constexpr const char* what = "(rows, row_offsets, convs, user_offsets, users, full)";
  const auto parts = field<py::tuple>(value, "structure", what);
  if (parts.size() != 6) refuse("structure", std::string("must be ") + what);
  Tables tables;
  Structure& s = tables.structure;
  std::int32_t length = 0;
  std::int64_t columns = 0;
  s.row = table(parts[0], "rows", 2, s.rows, columns);
  if (columns != 3) refuse("rows", "must have 3 columns, not " + std::to_string(columns));
  s.row_offset = table(parts[1], "row_offsets", 1, length, columns);
  if (length < 2) refuse("row_offsets", "must have one entry more than there are groups, of which there must be at least one");
  s.groups = length - 1;
  s.conv = table(parts[2], "convs", 2, s.convs, columns);
  if (columns < 4 || columns % 2) refuse("convs", "must have 2 + 2·span columns, not " + std::to_string(columns));
  s.span = static_cast<std::int32_t>(columns / 2 - 1);
  s.user_offset = table(parts[3], "user_offsets", 1, length, columns);
  if (length != s.groups + 1) refuse("user_offsets", "must be as long as row_offsets");
  s.user = table(parts[4], "users", 1, length, columns);
  tables.users = length;
  s.full = static_cast<double>(whole(parts[5], "full", 1, std::int64_t{1} << 62));
  return tables;
}

Dtype real(const Tensor& logits) {
  if (logits.dtype != Dtype::float32 && logits.dtype != Dtype::float64) refuse("logits", "must be float32 or float64");
  if (logits.shape.size() != 1 || !logits.contiguous()) refuse("logits", "must be a contiguous vector, not " + text_of(logits.shape));
  return logits.dtype;
}

// Where to run: a CUDA device's number or the CPU, and the stream's handle.
struct Place {
  std::optional<int> device;
  std::uintptr_t stream;

  Place(const py::object& device_value, const py::object& stream_value)
      : stream(field<std::uintptr_t>(stream_value, "stream", "the handle of a CUDA stream")) {
    if (!device_value.is_none()) device = static_cast<int>(whole(device_value, "device", 0, std::numeric_limits<int>::max()));
  }
};

// Tables on the CPU are checked entry by entry; those on a device cannot be read here.
void check_entries(const Tables& tables, const Tensor& logits, std::optional<int> device) {
  if (!device) check(tables.structure, logits.elements(), tables.users);
#if !defined(DER_FAST_WITH_CUDA)
  if (device) throw std::runtime_error("der_fast._C was built without CUDA");
#endif
}

template <class T>
void run_forward(const Structure& s, const Tensor& logits, const void* scale, const Tensor& masks, void* loss, const Tensor& work,
                 std::optional<int> device, std::uintptr_t stream) {
  const auto call = [&](auto&& function, auto... where) {
    const py::gil_scoped_release release;
    function(s, static_cast<const T*>(logits.data), static_cast<const T*>(scale), static_cast<T*>(masks.data), static_cast<T*>(loss),
             static_cast<double*>(work.data), where...);
  };
#if defined(DER_FAST_WITH_CUDA)
  if (device) return call(forward_cuda<T>, *device, reinterpret_cast<void*>(stream));
#endif
  (void)device, (void)stream;
  call(forward<T>);
}

template <class T>
void run_backward(const Structure& s, const Tensor& logits, const Tensor& sides, const void* grad_masks, const void* grad_loss,
                  const Tensor& gradient, std::optional<int> device, std::uintptr_t stream) {
  const auto call = [&](auto&& function, auto... where) {
    const py::gil_scoped_release release;
    function(s, static_cast<const T*>(logits.data), static_cast<const double*>(sides.data), static_cast<const T*>(grad_masks),
             static_cast<const T*>(grad_loss), static_cast<T*>(gradient.data), where...);
  };
#if defined(DER_FAST_WITH_CUDA)
  if (device) return call(backward_cuda<T>, *device, reinterpret_cast<void*>(stream));
#endif
  (void)device, (void)stream;
  call(backward<T>);
}

void forward_binding(const py::object& structure, const py::object& logits_value, const py::object& scale_value,
                     const py::object& masks_value, const py::object& loss_value, const py::object& work_value,
                     const py::object& device_value, const py::object& stream_value) {
  const Tables tables = tables_of(structure);
  const Structure& s = tables.structure;
  const Tensor logits = tensor_of(logits_value, "logits");
  const Dtype dtype = real(logits);
  const void* scale = number(scale_value, "scale", dtype);
  const Tensor masks = dense(masks_value, "masks", dtype, logits.shape);
  void* loss = number(loss_value, "loss", dtype);
  const std::int64_t length = std::int64_t{s.rows} + s.groups + 2 * std::int64_t{s.convs};
  const Tensor work = dense(work_value, "work", Dtype::float64, {length});
  const Place place(device_value, stream_value);
  check_entries(tables, logits, place.device);
  const auto run = dtype == Dtype::float64 ? run_forward<double> : run_forward<float>;
  run(s, logits, scale, masks, loss, work, place.device, place.stream);
}

void backward_binding(const py::object& structure, const py::object& logits_value, const py::object& sides_value,
                      const py::object& grad_masks, const py::object& grad_loss, const py::object& gradient_value,
                      const py::object& device_value, const py::object& stream_value) {
  const Tables tables = tables_of(structure);
  const Tensor logits = tensor_of(logits_value, "logits");
  const Dtype dtype = real(logits);
  const Tensor sides = dense(sides_value, "sides", Dtype::float64, {2 * std::int64_t{tables.structure.convs}});
  const void* masks = grad_masks.is_none() ? nullptr : dense(grad_masks, "grad_masks", dtype, logits.shape).data;
  const void* loss = grad_loss.is_none() ? nullptr : number(grad_loss, "grad_loss", dtype);
  const Tensor gradient = dense(gradient_value, "gradient", dtype, logits.shape);
  const Place place(device_value, stream_value);
  check_entries(tables, logits, place.device);
  const auto run = dtype == Dtype::float64 ? run_backward<double> : run_backward<float>;
  run(tables.structure, logits, sides, masks, loss, gradient, place.device, place.stream);
}

}  // namespace

void bind(py::module_& module) {
  module.def("channel_masks_forward", &forward_binding, py::arg("structure"), py::arg("logits"), py::arg("scale"), py::arg("masks"),
             py::arg("loss"), py::arg("work"), py::arg("device"), py::arg("stream"));
  module.def("channel_masks_backward", &backward_binding, py::arg("structure"), py::arg("logits"), py::arg("sides"), py::arg("grad_masks"),
             py::arg("grad_loss"), py::arg("gradient"), py::arg("device"), py::arg("stream"));
}

}  // namespace der_fast::channel_masks
