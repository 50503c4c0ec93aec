// The module der_fast._C: checks arguments from Python, then releases the GIL and runs plain C++.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>

#include "channel_masks_bind.hpp"
#include "compact.cuh"
#include "lanes/bind.hpp"
#include "pack.hpp"
#include "plan.hpp"
#include "tensor.hpp"
#include "threads.hpp"
#if defined(DER_FAST_WITH_CUDA)
#include "compact_cuda.hpp"
#include "job_table.hpp"
#endif

namespace py = pybind11;

namespace der_fast {

namespace {

using compact::Job;
using compact::Kind;
using compact::Layout;

py::dict build_info() {
  py::dict info;
  info["compiler"] = DER_FAST_COMPILER;
  info["flags"] = DER_FAST_FLAGS;
  info["standard"] = static_cast<long>(__cplusplus);
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
#if defined(DER_FAST_WITH_CUDA)
  info["cuda"] = true;
  info["nvcc"] = DER_FAST_NVCC;
  info["cuda_architectures"] = DER_FAST_CUDA_ARCHITECTURES;
#else
  info["cuda"] = false;
  info["nvcc"] = py::none();
  info["cuda_architectures"] = py::none();
#endif
  return info;
}

Unit unit_of(const py::handle& value, const std::string& name) {
  const auto parts = field<py::tuple>(value, name, "a tuple");
  if (parts.size() != 7) refuse(name, "must be (kind, block, when, source, target, kernel, norm)");
  Unit unit;
  unit.kind = field<int>(parts[0], name + ".kind", "a whole number");
  unit.block = field<int>(parts[1], name + ".block", "a whole number");
  unit.when = field<int>(parts[2], name + ".when", "a whole number");
  unit.source = numbers<int>(parts[3], name + ".source", "a list of groups");
  unit.target = numbers<int>(parts[4], name + ".target", "a list of groups");
  unit.kernel = field<std::int64_t>(parts[5], name + ".kernel", "a whole number");
  unit.norm = field<bool>(parts[6], name + ".norm", "true or false");
  return unit;
}

std::vector<std::vector<int>> groups_of(const py::object& value, const std::string& name) {
  std::vector<std::vector<int>> out;
  for (const py::object& item : items(value, name, "a list of lists of groups")) {
    out.push_back(numbers<int>(item, name + "[" + std::to_string(out.size()) + "]", "a list of groups"));
  }
  return out;
}

Network network_of(const py::object& value) {
  const auto description = field<py::dict>(value, "network", "a dict");
  const auto entry = [&](const char* key) -> py::object {
    if (!description.contains(key)) refuse("network", std::string("has no entry ") + key);
    return description[key];
  };
  Network network;
  network.groups = numbers<std::int64_t>(entry("groups"), "groups", "a list of widths");
  network.image_channels = field<std::int64_t>(entry("image_channels"), "image_channels", "a whole number");
  network.streams = groups_of(entry("streams"), "streams");
  network.inner = groups_of(entry("inner"), "inner");
  for (const py::object& item : items(entry("units"), "units", "a list")) {
    network.units.push_back(unit_of(item, "units[" + std::to_string(network.units.size()) + "]"));
  }
  return network;
}

Dtype floating(const py::handle& value, const std::string& name) {
  const Dtype dtype = dtype_of(field<int>(value, name, "a dtype code"), name);
  if (dtype > Dtype::float16) refuse(name, std::string("must be a floating-point type, not ") + name_of(dtype));
  return dtype;
}

py::array_t<std::int32_t> array_of(const std::vector<std::int32_t>& values) {
  return py::array_t<std::int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict plan_binding(const py::object& description, const py::object& keep, const py::object& align_value, const py::object& weight_dtype,
                      const py::object& vector_dtype) {
  const Network network = network_of(description);
  const Tensor mask = tensor_of(keep, "keep");
  if (mask.dtype != Dtype::boolean) refuse("keep", std::string("must be bool, not ") + name_of(mask.dtype));
  if (mask.shape.size() != 1 || !mask.contiguous()) refuse("keep", "must be a contiguous vector, not " + text_of(mask.shape));
  const auto* data = static_cast<const std::uint8_t*>(mask.data);
  const std::vector<std::uint8_t> bits(data, data + mask.elements());
  const std::int64_t align = whole(align_value, "align", 1, kMostAlign);
  const std::int64_t weight_size = size_of(floating(weight_dtype, "weight_dtype"));
  const std::int64_t vector_size = size_of(floating(vector_dtype, "vector_dtype"));
  Plan plan;
  {
    const py::gil_scoped_release release;
    plan = make_plan(network, bits, align, weight_size, vector_size);
  }
  py::dict out;
  out["constant"] = plan.constant;
  out["lost"] = plan.lost;
  out["keep"] = py::array_t<std::uint8_t>(static_cast<py::ssize_t>(plan.keep.size()), plan.keep.data());
  out["widths"] = plan.widths;
  out["stored"] = plan.stored;
  py::list pieces;
  for (const Piece& piece : plan.pieces) {
    pieces.append(py::make_tuple(piece.unit, piece.part, py::tuple(py::cast(piece.shape)), piece.offset));
  }
  out["pieces"] = pieces;
  py::list rows;
  py::list columns;
  for (std::size_t i = 0; i < plan.rows.size(); ++i) {
    rows.append(array_of(plan.rows[i]));
    columns.append(array_of(plan.columns[i]));
  }
  out["rows"] = rows;
  out["columns"] = columns;
  out["bytes"] = plan.bytes;
  out["parameters"] = plan.parameters;
  out["elements"] = plan.elements;
  out["stored_elements"] = plan.stored_elements;
  return out;
}

const std::int32_t* indices_of(const py::handle& value, const std::string& name, std::int64_t bound, std::int64_t& count) {
  const Tensor tensor = tensor_of(value, name);
  if (tensor.dtype != Dtype::int32 || tensor.shape.size() != 1 || !tensor.contiguous()) refuse(name, "must be a contiguous int32 vector");
  count = tensor.shape[0];
  const auto* data = static_cast<const std::int32_t*>(tensor.data);
  for (std::int64_t i = 0; i < count; ++i) {
    if (data[i] < -1 || data[i] >= bound) {
      refuse(name, "has the entry " + std::to_string(data[i]) + ", which is outside -1.." + std::to_string(bound - 1));
    }
  }
  return data;
}

Dtype source_dtype(const Tensor& tensor, const std::string& name) {
  if (tensor.dtype != Dtype::float32 && tensor.dtype != Dtype::float64) {
    refuse(name, std::string("must be float32 or float64, not ") + name_of(tensor.dtype));
  }
  return tensor.dtype;
}

compact::Vector vector_of(const py::handle& value, const std::string& name, std::int64_t length, Dtype dtype) {
  const Tensor tensor = tensor_of(value, name);
  if (tensor.dtype != dtype) refuse(name, std::string("must be ") + name_of(dtype) + ", not " + name_of(tensor.dtype));
  expect_shape(tensor, {length}, name);
  return {tensor.data, tensor.strides[0]};
}

// (kind, offset, target dtype, rows, columns, weight, (gamma, beta, mean, variance)); a part that a kind does not read is None.
Job job_of(const py::handle& value, const std::string& name, Layout layout, double epsilon) {
  const auto parts = field<py::tuple>(value, name, "a tuple");
  if (parts.size() != 7) refuse(name, "must be (kind, offset, dtype, rows, columns, weight, norm)");
  const int kind = field<int>(parts[0], name + ".kind", "a whole number");
  if (kind < 0 || kind > static_cast<int>(Kind::copy)) refuse(name + ".kind", "is unknown: " + std::to_string(kind));
  Job job;
  job.kind = static_cast<Kind>(kind);
  job.layout = layout;
  job.epsilon = epsilon;
  job.offset = field<std::int64_t>(parts[1], name + ".offset", "a whole number");
  job.target = floating(parts[2], name + ".dtype");
  std::int64_t length = 0;
  if (job.kind == Kind::weight || job.kind == Kind::copy) {
    const Tensor weight = tensor_of(parts[5], name + ".weight");
    const std::size_t rank = job.kind == Kind::weight ? 4 : 1;
    if (weight.shape.size() != rank) {
      refuse(name + ".weight", "must have " + std::to_string(rank) + " dimensions, not " + text_of(weight.shape));
    }
    job.source = source_dtype(weight, name + ".weight");
    job.weight = weight.data;
    std::copy(weight.strides.begin(), weight.strides.end(), job.strides);
    length = weight.shape[0];
    if (rank == 4) {
      job.height = weight.shape[2];
      job.width = weight.shape[3];
      job.column = indices_of(parts[4], name + ".columns", weight.shape[1], job.columns);
    }
  }
  if (!parts[6].is_none()) {
    const auto norm = field<py::tuple>(parts[6], name + ".norm", "a tuple or None");
    if (norm.size() != 4) refuse(name + ".norm", "must be (gamma, beta, mean, variance)");
    if (job.kind == Kind::scale || job.kind == Kind::shift) {
      const Tensor gamma = tensor_of(norm[0], name + ".gamma");
      if (gamma.shape.size() != 1) refuse(name + ".gamma", "must be a vector, not " + text_of(gamma.shape));
      job.source = source_dtype(gamma, name + ".gamma");
      length = gamma.shape[0];
    }
    job.gamma = vector_of(norm[0], name + ".gamma", length, job.source);
    job.beta = vector_of(norm[1], name + ".beta", length, job.source);
    job.mean = vector_of(norm[2], name + ".mean", length, job.source);
    job.variance = vector_of(norm[3], name + ".variance", length, job.source);
  } else if (job.kind == Kind::scale || job.kind == Kind::shift) {
    refuse(name + ".norm", "is missing");
  }
  job.row = indices_of(parts[3], name + ".rows", length, job.rows);
  return job;
}

// The arguments of packing that every device shares.
struct Arguments {
  Tensor storage;
  std::vector<Job> jobs;

  Arguments(const py::object& values, const py::object& arena, const py::object& layout_value, const py::object& epsilon_value)
      : storage(tensor_of(arena, "storage")) {
    if (storage.dtype != Dtype::byte || storage.shape.size() != 1 || !storage.contiguous()) {
      refuse("storage", "must be a contiguous uint8 vector");
    }
    if (reinterpret_cast<std::uintptr_t>(storage.data) % kAlignment) refuse("storage", "must start at a multiple of 64 bytes");
    const auto layout = field<int>(layout_value, "layout", "0 (KCRS) or 1 (KRSC)");
    if (layout != 0 && layout != 1) refuse("layout", "must be 0 (KCRS) or 1 (KRSC), not " + std::to_string(layout));
    const double epsilon = finite_number(epsilon_value, "epsilon");
    for (const py::object& value : items(values, "jobs", "a list of jobs")) {
      jobs.push_back(job_of(value, "jobs[" + std::to_string(jobs.size()) + "]", static_cast<Layout>(layout), epsilon));
    }
    check(jobs, storage.elements());
  }
};

std::int64_t pack_binding(const py::object& values, const py::object& storage, const py::object& layout, const py::object& epsilon,
                          const py::object& threads_value) {
  const Arguments given(values, storage, layout, epsilon);
  const int threads = static_cast<int>(whole(threads_value, "threads", 0, kMostThreads));
  const py::gil_scoped_release release;
  return pack(given.jobs, static_cast<std::byte*>(given.storage.data), given.storage.elements(), threads);
}

#if defined(DER_FAST_WITH_CUDA)
std::int64_t pack_cuda_binding(const py::object& values, const py::object& storage, const py::object& workspace_value,
                               const py::object& layout, const py::object& epsilon, const py::object& device_value,
                               const py::object& stream_value) {
  const Arguments given(values, storage, layout, epsilon);
  const int device = static_cast<int>(whole(device_value, "device", 0, std::numeric_limits<int>::max()));
  auto* stream = reinterpret_cast<void*>(field<std::uintptr_t>(stream_value, "stream", "the handle of a CUDA stream"));
  const Tensor workspace = tensor_of(workspace_value, "workspace");
  const compact::TableLayout wanted(given.jobs);
  if (workspace.dtype != Dtype::byte || !workspace.contiguous() || workspace.elements() < static_cast<std::int64_t>(wanted.bytes)) {
    refuse("workspace", "must be contiguous uint8 of at least " + std::to_string(wanted.bytes) + " bytes");
  }
  if (reinterpret_cast<std::uintptr_t>(workspace.data) % alignof(Job)) refuse("workspace", "must start at a multiple of 8 bytes");
  const py::gil_scoped_release release;
  return pack_cuda(given.jobs, static_cast<std::byte*>(given.storage.data), given.storage.elements(),
                   static_cast<std::byte*>(workspace.data), device, stream);
}
#endif

}  // namespace

}  // namespace der_fast

PYBIND11_MODULE(_C, m) {
  using namespace der_fast;
  m.doc() = "Native parts of der_fast; der_fast/native.py documents the functions and is what the package calls.";
  m.def("build_info", &build_info);
  m.def("plan", &plan_binding, py::arg("network"), py::arg("keep"), py::arg("align"), py::arg("weight_dtype"), py::arg("vector_dtype"));
  m.def("pack", &pack_binding, py::arg("jobs"), py::arg("storage"), py::arg("layout"), py::arg("epsilon"), py::arg("threads"));
  channel_masks::bind(m);
  lanes::bind(m);
#if defined(DER_FAST_WITH_CUDA)
  m.def("pack_cuda_workspace", &pack_cuda_workspace, py::arg("jobs"), py::arg("indices"));
  m.def("pack_cuda", &pack_cuda_binding, py::arg("jobs"), py::arg("storage"), py::arg("workspace"), py::arg("layout"), py::arg("epsilon"),
        py::arg("device"), py::arg("stream"));
#endif
}
