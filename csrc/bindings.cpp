// petalsd._C: what Python sees of the C++ code. petalsd/_C.pyi describes it.
// The parts are compiled as one: each alone would take 11 seconds for pybind11's headers.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <exception>
#include <string>

#include "check.hpp"

namespace py = pybind11;

#include "layer_bindings.inc"
#include "page_pool_bindings.inc"
#include "span_bindings.inc"
#include "spill_file_bindings.inc"
#include "weight_bindings.inc"

namespace petalsd {
namespace {

// Raises petalsd.errors.<name>(message, hint=hint).
void set_error(const char* name, const char* message, const std::string& hint = "") {
  const py::object type = py::module_::import("petalsd.errors").attr(name);
  PyErr_SetObject(type.ptr(), type(message, py::arg("hint") = hint).ptr());
}

void translate(std::exception_ptr error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const OutOfPages& out_of_pages) {
    set_error("OutOfPages", out_of_pages.what(), out_of_pages.hint);
  } catch (const ClosedHandle& closed) {
    set_error("SessionClosed", closed.what());
  } catch (const SpillFailure& failure) {
    set_error("SpillError", failure.what());
  } catch (const PoolError& broken) {
    set_error("KVPoolError", broken.what());
  }
}

}  // namespace
}  // namespace petalsd

PYBIND11_MODULE(_C, module, py::mod_gil_not_used()) {
  module.doc() = "The native part of petalsd: the page pool, its spill file, and the blocks on the CPU. No torch.";
  py::register_local_exception_translator(&petalsd::translate);
  petalsd::register_spill_file(module);
  petalsd::register_page_pool(module);
  petalsd::register_span(module);
  petalsd::register_weight_storage(module);
  petalsd::register_layer_team(module);  // after what spans register
}
