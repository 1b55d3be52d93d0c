// The parts that bindings.cpp puts together.
#pragma once

#include <pybind11/pybind11.h>

namespace petalsd {

void register_spill_file(pybind11::module_& module);
void register_page_pool(pybind11::module_& module);
void register_span(pybind11::module_& module);
void register_layer_team(pybind11::module_& module);  // after what spans register

}  // namespace petalsd
