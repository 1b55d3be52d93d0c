#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "check.hpp"
#include "spill_file.hpp"

namespace py = pybind11;

namespace petalsd {
namespace {

using NoGil = py::call_guard<py::gil_scoped_release>;
using SlabPlaces = std::vector<std::pair<std::uintptr_t, std::size_t>>;  // address, page_bytes

std::vector<Transfer> to_transfers(const py::bytearray& triples) {
  PETALSD_CHECK_EQUAL(triples.size() % sizeof(Transfer), std::size_t{0}, "bytes of transfers beyond whole ones = none");
  std::vector<Transfer> transfers(triples.size() / sizeof(Transfer));
  if (!transfers.empty()) std::memcpy(transfers.data(), PyByteArray_AS_STRING(triples.ptr()), triples.size());
  return transfers;
}

std::vector<Slab> to_slabs(const SlabPlaces& places) {
  std::vector<Slab> slabs;
  for (const auto& [address, page_bytes] : places) {
    slabs.push_back({reinterpret_cast<std::byte*>(address), page_bytes});  // NOLINT: this is where addresses come in
  }
  return slabs;
}

template <void (SpillFile::*move)(const std::vector<Transfer>&, const std::vector<Slab>&) const>
void move_pages(const SpillFile& file, const py::bytearray& transfers, const SlabPlaces& slabs) {
  const std::vector<Transfer> checked = to_transfers(transfers);
  const std::vector<Slab> places = to_slabs(slabs);
  const py::gil_scoped_release no_gil;
  (file.*move)(checked, places);
}

}  // namespace

void register_spill_file(py::module_& module) {
  py::class_<SpillFile, std::shared_ptr<SpillFile>>(module, "SpillFile")
      .def(py::init<std::string, std::int64_t, std::int64_t>(), py::arg("directory"), py::arg("max_bytes"),
           py::arg("keep_free_bytes"))
      .def("open", &SpillFile::open, py::arg("page_bytes"), py::arg("pages_elsewhere") = 0, NoGil())
      .def("write", &move_pages<&SpillFile::write>, py::arg("transfers"), py::arg("slabs"))
      .def("read", &move_pages<&SpillFile::read>, py::arg("transfers"), py::arg("slabs"))
      .def("grow_to", &SpillFile::grow_to, py::arg("pages"), NoGil())
      .def("allocated_bytes", &SpillFile::allocated_bytes, NoGil())
      .def("close", &SpillFile::close, NoGil());
}

}  // namespace petalsd
