#pragma once

#include <pybind11/pybind11.h>

namespace der_fast::channel_masks {

// Adds channel_masks_forward and channel_masks_backward to the module.
void bind(pybind11::module_& module);

}  // namespace der_fast::channel_masks
