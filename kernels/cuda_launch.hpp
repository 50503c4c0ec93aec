// Helpers that every CUDA launcher uses around its launches; for files that nvcc compiles.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace der_fast {

// Throws std::runtime_error with CUDA's message.
inline void checked(cudaError_t status, const std::string& what) {
  if (status != cudaSuccess) throw std::runtime_error(what + ": " + cudaGetErrorString(status));
}

// Makes `device` the current device during its lifetime.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    checked(cudaGetDevice(&before_), "finding the current device");
    if (before_ != device) checked(cudaSetDevice(device), "choosing device " + std::to_string(device));
    changed_ = before_ != device;
  }
  ~DeviceGuard() {
    if (changed_) cudaSetDevice(before_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

}  // namespace der_fast
