// The module der_fast._C: arguments from Python are checked here, then the GIL is released and plain C++ runs.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <map>
#include <optional>

#include "channel_masks_bind.hpp"
#include "compact.cuh"
#include "lanes/bind.hpp"
#include "pack.hpp"
#include "plan.hpp"
#include "tensor.hpp"
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

template <class T>
T field(const py::handle& value, const std::string& name, const char* what) {
  if constexpr (std::is_base_of_v<py::object, T>) {
    if (!py::isinstance<T>(value)) refuse(name, std::string("must be ") + what);
    return py::reinterpret_borrow<T>(value);
  } else {
    try {
      return py::cast<T>(value);
    } catch (const py::cast_error&) {
      refuse(name, std::string("must be ") + what);
    }
  }
}

Unit unit_of(const py::handle& value, const std::string& name) {
  const auto parts = field<py::tuple>(value, name, "a tuple");
  if (parts.size() != 7) refuse(name, "must be (kind, block, when, source, target, kernel, norm)");
  Unit unit;
  unit.kind = field<int>(parts[0], name + ".kind", "a whole number");
  unit.block = field<int>(parts[1], name + ".block", "a whole number");
  unit.when = field<int>(parts[2], name + ".when", "a whole number");
  unit.source = field<std::vector<int>>(parts[3], name + ".source", "a list of groups");
  unit.target = field<std::vector<int>>(parts[4], name + ".target", "a list of groups");
  unit.kernel = field<std::int64_t>(parts[5], name + ".kernel", "a whole number");
  unit.norm = field<bool>(parts[6], name + ".norm", "true or false");
  return unit;
}

using GroupLists = std::vector<std::vector<int>>;

Network network_of(const py::dict& description) {
  const auto entry = [&](const char* key) -> py::object {
    if (!description.contains(key)) refuse("network", std::string("has no entry ") + key);
    return description[key];
  };
  Network network;
  network.groups = field<std::vector<std::int64_t>>(entry("groups"), "groups", "a list of widths");
  network.image_channels = field<std::int64_t>(entry("image_channels"), "image_channels", "a whole number");
  network.streams = field<GroupLists>(entry("streams"), "streams", "a list of lists of groups");
  network.inner = field<GroupLists>(entry("inner"), "inner", "a list of lists of groups");
  std::size_t i = 0;
  for (const py::handle item : field<py::list>(entry("units"), "units", "a list")) {
    network.units.push_back(unit_of(item, "units[" + std::to_string(i++) + "]"));
  }
  return network;
}

std::int64_t floating_size(int code, const std::string& name) {
  const Dtype dtype = dtype_of(code, name);
  if (dtype > Dtype::float16) refuse(name, std::string("must be a floating-point type, not ") + name_of(dtype));
  return size_of(dtype);
}

py::array_t<std::int32_t> array_of(const std::vector<std::int32_t>& values) {
  return py::array_t<std::int32_t>(static_cast<py::ssize_t>(values.size()), values.data());
}

py::dict plan_binding(const py::dict& description, const py::tuple& keep, std::int64_t align, int weight_dtype, int vector_dtype) {
  const Network network = network_of(description);
  const Tensor mask = tensor_of(keep, "keep");
  if (mask.dtype != Dtype::boolean) refuse("keep", std::string("must be bool, not ") + name_of(mask.dtype));
  if (mask.shape.size() != 1 || !mask.contiguous()) refuse("keep", "must be a contiguous vector, not " + text_of(mask.shape));
  const auto* data = static_cast<const std::uint8_t*>(mask.data);
  const std::vector<std::uint8_t> bits(data, data + mask.elements());
  const std::int64_t weight_size = floating_size(weight_dtype, "weight_dtype");
  const std::int64_t vector_size = floating_size(vector_dtype, "vector_dtype");
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

// (kind, offset, target dtype, rows, columns, weight, (gamma, beta, mean, variance)); what a kind does not read is None.
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
  const int code = field<int>(parts[2], name + ".dtype", "a whole number");
  floating_size(code, name + ".dtype");
  job.target = static_cast<Dtype>(code);
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

std::vector<Job> jobs_of(const py::list& values, const Tensor& storage, int layout, double epsilon) {
  if (storage.dtype != Dtype::byte || storage.shape.size() != 1 || !storage.contiguous()) {
    refuse("storage", "must be a contiguous uint8 vector");
  }
  if (reinterpret_cast<std::uintptr_t>(storage.data) % kAlignment) refuse("storage", "must begin at a multiple of 64 bytes");
  if (layout != 0 && layout != 1) refuse("layout", "must be 0 (KCRS) or 1 (KRSC), not " + std::to_string(layout));
  if (!(epsilon >= 0)) refuse("epsilon", "must not be negative");
  std::vector<Job> jobs;
  std::int64_t end = 0;
  for (const py::handle value : values) {
    const std::string name = "jobs[" + std::to_string(jobs.size()) + "]";
    jobs.push_back(job_of(value, name, static_cast<Layout>(layout), epsilon));
    const Job& job = jobs.back();
    if (job.offset < end) {
      refuse(name + ".offset", "is " + std::to_string(job.offset) + ", but what lies before ends at " + std::to_string(end));
    }
    if (job.offset % kAlignment) refuse(name + ".offset", "must be a multiple of 64, not " + std::to_string(job.offset));
    end = job.offset + job.bytes();
    if (end > storage.elements()) {
      refuse("storage", "has " + std::to_string(storage.elements()) + " bytes, but " + name + " ends at " + std::to_string(end));
    }
  }
  return jobs;
}

std::int64_t pack_binding(const py::list& values, const py::tuple& storage, int layout, double epsilon, int threads) {
  const Tensor arena = tensor_of(storage, "storage");
  const std::vector<Job> jobs = jobs_of(values, arena, layout, epsilon);
  if (threads < 0 || threads > 1024) refuse("threads", "must lie in 0..1024, not be " + std::to_string(threads));
  const py::gil_scoped_release release;
  return pack(jobs, static_cast<std::byte*>(arena.data), arena.elements(), threads);
}

#if defined(DER_FAST_WITH_CUDA)
std::int64_t pack_cuda_binding(const py::list& values, const py::tuple& storage, const py::tuple& workspace_value, int layout,
                               double epsilon, int device, std::uintptr_t stream) {
  const Tensor arena = tensor_of(storage, "storage");
  const std::vector<Job> jobs = jobs_of(values, arena, layout, epsilon);
  if (device < 0) refuse("device", "must not be negative");
  const Tensor workspace = tensor_of(workspace_value, "workspace");
  const compact::TableLayout wanted(jobs);
  if (workspace.dtype != Dtype::byte || !workspace.contiguous() || workspace.elements() < static_cast<std::int64_t>(wanted.bytes)) {
    refuse("workspace", "must be contiguous uint8 of at least " + std::to_string(wanted.bytes) + " bytes");
  }
  if (reinterpret_cast<std::uintptr_t>(workspace.data) % alignof(Job)) refuse("workspace", "must begin at a multiple of 8 bytes");
  const py::gil_scoped_release release;
  return pack_cuda(jobs, static_cast<std::byte*>(arena.data), arena.elements(), static_cast<std::byte*>(workspace.data), device,
                   reinterpret_cast<void*>(stream));
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
