// The batch-in-lanes executor's arguments from Python: checked here, then the GIL is released.
#include "bind.hpp"

#include <pybind11/stl.h>

#include <algorithm>
#include <limits>

#include "../tensor.hpp"
#include "executor.hpp"

namespace py = pybind11;

namespace der_fast::lanes {

namespace {

using Row = std::vector<std::int64_t>;

// What a program was checked against, and what holds the weights must therefore be.
struct Handle {
  Program program;
  std::int64_t bytes;
};

Op op_of(const Row& row, std::size_t index) {
  const std::string name = "ops[" + std::to_string(index) + "]";
  if (row.size() != 10) refuse(name, "must be (kind, source, residual, inputs, outputs, kernel, stride, relu, weight, bias)");
  for (std::size_t i = 0; i < 8; ++i) {
    if (row[i] >= -1 && row[i] <= std::numeric_limits<int>::max()) continue;
    refuse(name, "has the entry " + std::to_string(row[i]) + ", which is out of range");
  }
  Op op;
  op.kind = static_cast<Kind>(row[0]);
  op.source = static_cast<int>(row[1]);
  op.residual = static_cast<int>(row[2]);
  op.inputs = static_cast<long>(row[3]);
  op.outputs = static_cast<long>(row[4]);
  op.kernel = static_cast<long>(row[5]);
  op.stride = static_cast<long>(row[6]);
  op.relu = row[7] != 0;
  op.weight = row[8];
  op.bias = row[9];
  return op;
}

Handle handle_of(long image_channels, const std::vector<Row>& rows, std::int64_t bytes) {
  std::vector<Op> ops;
  for (std::size_t i = 0; i < rows.size(); ++i) ops.push_back(op_of(rows[i], i));
  return {Program(image_channels, std::move(ops), bytes), bytes};
}

void run_lanes(const std::vector<const Handle*>& programs, const std::vector<py::object>& arenas, const py::object& images_value,
               const py::object& output_value, int threads) {
  const Kernels* found = kernels();
  if (!found) throw std::runtime_error("this processor has none of the instruction sets that the lanes executor was built for");
  if (programs.size() != arenas.size()) refuse("arenas", "must be as many as there are programs");
  const Tensor images = tensor_of(images_value, "images"), output = tensor_of(output_value, "output");
  if (images.dtype != Dtype::float32 || output.dtype != Dtype::float32) refuse("images", "and output must be float32");
  if (images.shape.size() != 4) refuse("images", "must have the shape (N, C, H, W), not " + text_of(images.shape));
  constexpr std::int64_t kLargestSide = 1 << 15;
  for (const std::size_t side : {2, 3}) {
    if (images.shape[side] >= 1 && images.shape[side] <= kLargestSide) continue;
    refuse("images", "must be between 1 and 32768 pixels high and wide, not " + text_of(images.shape));
  }
  std::vector<Network> networks;
  long columns = 0;
  for (std::size_t i = 0; i < programs.size(); ++i) {
    const std::string name = "arenas[" + std::to_string(i) + "]";
    if (!programs[i]) refuse("programs", "must not hold None");
    const Program& program = programs[i]->program;
    const Tensor arena = tensor_of(arenas[i], name);
    if (arena.dtype != Dtype::byte || !arena.contiguous()) refuse(name, "must be contiguous uint8");
    expect_shape(arena, {programs[i]->bytes}, name);
    if (reinterpret_cast<std::uintptr_t>(arena.data) % alignof(float)) refuse(name, "must begin at a multiple of 4 bytes");
    if (program.image_channels() != images.shape[1]) {
      refuse("images", "must have " + std::to_string(program.image_channels()) + " channels");
    }
    if (!program.ops().empty()) networks.push_back({&program, static_cast<const std::byte*>(arena.data), columns});
    columns += program.features();
  }
  expect_shape(output, {images.shape[0], columns}, "output");
  if (!output.contiguous()) refuse("output", "must be contiguous");
  Images view{static_cast<const float*>(images.data),   static_cast<long>(images.shape[0]), static_cast<long>(images.shape[1]),
              static_cast<long>(images.shape[2]), static_cast<long>(images.shape[3]), {}};
  std::copy(images.strides.begin(), images.strides.end(), view.strides);
  const py::gil_scoped_release released;
  run(*found, networks, view, static_cast<float*>(output.data), columns, threads);
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
