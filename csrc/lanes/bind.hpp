#pragma once

#include <pybind11/pybind11.h>

namespace der_fast::lanes {

// Adds LanesProgram, lanes_isa and run_lanes to the module.
void bind(pybind11::module_& module);

}  // namespace der_fast::lanes
