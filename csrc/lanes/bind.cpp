// Checks the batch-in-lanes executor's arguments from Python, then releases the GIL.
#include "bind.hpp"

#include <algorithm>
#include <iterator>
#include <limits>
#include <stdexcept>

#include "../tensor.hpp"
#include "../threads.hpp"
#include "executor.hpp"

namespace py = pybind11;

namespace der_fast::lanes {

namespace {

// A program, and the arena size that it was checked against, which its arena must therefore have.
struct Handle {
  Program program;
  std::int64_t bytes;
};

Op op_of(const py::handle& value, const std::string& name) {
  constexpr const char* names[] = {"kind", "source", "residual", "inputs", "outputs", "kernel", "stride", "relu", "weight", "bias"};
  constexpr const char* what = "(kind, source, residual, inputs, outputs, kernel, stride, relu, weight, bias)";
  const std::vector<py::object> row = items(value, name, what);
  if (row.size() != std::size(names)) refuse(name, std::string("must be ") + what + ", not " + shown(value));
  std::int64_t numbers[std::size(names)];
  for (std::size_t i = 0; i < row.size(); ++i) {
    const std::int64_t high = i < 8 ? std::numeric_limits<int>::max() : std::numeric_limits<std::int64_t>::max();
    numbers[i] = whole(row[i], name + "." + names[i], -1, high);
  }
  Op op;
  op.kind = static_cast<Kind>(numbers[0]);
  op.source = static_cast<int>(numbers[1]);
  op.residual = static_cast<int>(numbers[2]);
  op.inputs = static_cast<long>(numbers[3]);
  op.outputs = static_cast<long>(numbers[4]);
  op.kernel = static_cast<long>(numbers[5]);
  op.stride = static_cast<long>(numbers[6]);
  op.relu = numbers[7] != 0;
  op.weight = numbers[8];
  op.bias = numbers[9];
  return op;
}

Handle handle_of(const py::object& channels_value, const py::object& ops_value, const py::object& bytes_value) {
  const std::int64_t channels = whole(channels_value, "image_channels", 1, kLargest);
  const std::int64_t bytes = whole(bytes_value, "bytes", 0, std::numeric_limits<std::int64_t>::max());
  std::vector<Op> ops;
  for (const py::object& item : items(ops_value, "ops", "a list of operations")) {
    ops.push_back(op_of(item, "ops[" + std::to_string(ops.size()) + "]"));
  }
  return {Program(static_cast<long>(channels), std::move(ops), bytes), bytes};
}

Images images_of(const py::object& value) {
  const Tensor images = tensor_of(value, "images");
  if (images.dtype != Dtype::float32) refuse("images", std::string("must be float32, not ") + name_of(images.dtype));
  if (images.shape.size() != 4) refuse("images", "must have the shape (N, C, H, W), not " + text_of(images.shape));
  constexpr std::int64_t kLargestSide = 1 << 15;
  for (const std::size_t side : {2, 3}) {
    if (images.shape[side] >= 1 && images.shape[side] <= kLargestSide) continue;
    refuse("images", "must be between 1 and 32768 pixels high and wide, not " + text_of(images.shape));
  }
  Images view{static_cast<const float*>(images.data),   static_cast<long>(images.shape[0]), static_cast<long>(images.shape[1]),
              static_cast<long>(images.shape[2]), static_cast<long>(images.shape[3]), {}};
  std::copy(images.strides.begin(), images.strides.end(), view.strides);
  return view;
}

// A program with the arena that it reads; its features start in column `column` of the output.
Network network_of(const Handle& handle, const py::object& value, const std::string& name, const Images& images, long column) {
  const Tensor arena = tensor_of(value, name);
  if (arena.dtype != Dtype::byte) refuse(name, std::string("must be uint8, not ") + name_of(arena.dtype));
  expect_shape(arena, {handle.bytes}, name);
  if (!arena.contiguous()) refuse(name, "must be contiguous");
  if (reinterpret_cast<std::uintptr_t>(arena.data) % alignof(float)) refuse(name, "must start at a multiple of 4 bytes");
  const long channels = handle.program.image_channels();
  if (channels != images.channels) {
    refuse("images", "must have " + std::to_string(channels) + " channels, not " + std::to_string(images.channels));
  }
  return {&handle.program, static_cast<const std::byte*>(arena.data), column};
}

void run_lanes(const py::object& programs_value, const py::object& arenas_value, const py::object& images_value,
               const py::object& output_value, const py::object& threads_value) {
  const auto programs = items(programs_value, "programs", "a list of LanesPrograms");
  const auto arenas = items(arenas_value, "arenas", "a list of tuples (address, shape, strides, dtype code)");
  if (programs.size() != arenas.size()) {
    refuse("arenas", "must be as many as programs, " + std::to_string(programs.size()) + ", not " + std::to_string(arenas.size()));
  }
  const Images images = images_of(images_value);
  const Tensor output = tensor_of(output_value, "output");
  if (output.dtype != Dtype::float32) refuse("output", std::string("must be float32, not ") + name_of(output.dtype));
  std::vector<Network> networks;
  long columns = 0;
  for (std::size_t i = 0; i < programs.size(); ++i) {
    const std::string index = "[" + std::to_string(i) + "]";
    if (!py::isinstance<Handle>(programs[i])) refuse("programs" + index, "must be a LanesProgram, not " + shown(programs[i]));
    const auto& handle = py::cast<const Handle&>(programs[i]);
    const Network network = network_of(handle, arenas[i], "arenas" + index, images, columns);
    if (!handle.program.ops().empty()) networks.push_back(network);
    columns += handle.program.features();
  }
  expect_shape(output, {images.count, columns}, "output");
  if (!output.contiguous()) refuse("output", "must be contiguous");
  const int threads = static_cast<int>(whole(threads_value, "threads", 1, kMostThreads));
  const Kernels* found = kernels();
  if (!found) throw std::runtime_error("this processor has none of the instruction sets that the lanes executor was built for");
  const py::gil_scoped_release released;
  run(*found, networks, images, static_cast<float*>(output.data), columns, threads);
}

}  // namespace

void bind(py::module_& module) {
  py::class_<Handle>(module, "LanesProgram")
      .def(py::init(&handle_of), py::arg("image_channels"), py::arg("ops"), py::arg("bytes"))
      .def_property_readonly("features", [](const Handle& handle) { return handle.program.features(); });
  module.def("lanes_isa", [] { return kernels() ? py::object(py::str(kernels()->name)) : py::object(py::none()); });
  module.def("run_lanes", &run_lanes, py::arg("programs"), py::arg("arenas"), py::arg("images"), py::arg("output"), py::arg("threads"));
}

}  // namespace der_fast::lanes
