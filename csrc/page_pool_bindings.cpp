#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.hpp"
#include "check.hpp"
#include "page_pool.hpp"

namespace py = pybind11;

namespace petalsd {
namespace {

// The GIL is released before the pool's mutex is taken, so neither is ever waited for with the other held.
using NoGil = py::call_guard<py::gil_scoped_release>;

// int32 pairs (source, target), flat.
py::bytearray take_copies(PagePool& pool, std::size_t limit) {
  std::vector<Copy> copies;
  {
    const py::gil_scoped_release no_gil;
    copies = pool.take_copies(limit);
  }
  return {reinterpret_cast<const char*>(copies.data()), copies.size() * sizeof(Copy)};
}

std::int64_t fill_origins(const PagePool& pool, const std::vector<Handle>& handles, const py::buffer& out) {
  const py::buffer_info info = out.request(/*writable=*/true);
  constexpr py::ssize_t item = sizeof(std::int32_t);
  PETALSD_CHECK(info.item_type_is_equivalent_to<std::int32_t>() && info.ndim == 2 && info.strides[1] == item &&
                    info.strides[0] >= info.shape[1] * item && info.strides[0] % item == 0,
                "the origins table must be int32, of two dimensions, with contiguous rows");
  const OriginTable table{static_cast<std::int32_t*>(info.ptr), info.shape[0], info.shape[1], info.strides[0] / item};
  const py::gil_scoped_release no_gil;
  return pool.fill_origins(handles, table);
}

void register_stats(py::module_& module) {
  py::class_<PoolStats>(module, "PoolStats")
      .def_readonly("pages_total", &PoolStats::pages_total)
      .def_readonly("pages_free", &PoolStats::pages_free)
      .def_readonly("pages_mapped", &PoolStats::pages_mapped)
      .def_readonly("pages_reserved", &PoolStats::pages_reserved)
      .def_readonly("pages_shared", &PoolStats::pages_shared)
      .def_readonly("high_water", &PoolStats::high_water)
      .def_readonly("sessions", &PoolStats::sessions)
      .def_readonly("waiters", &PoolStats::waiters)
      .def_readonly("copies", &PoolStats::copies)
      .def_readonly("pages_moved", &PoolStats::pages_moved);
}

}  // namespace

void register_page_pool(py::module_& module) {
  register_stats(module);
  py::class_<PagePool>(module, "PagePool")
      .def(py::init<std::int64_t, std::int64_t>(), py::arg("num_pages"), py::arg("page_tokens"))
      .def(
          "request",
          [](PagePool& pool, std::int64_t first_block, std::int64_t num_blocks, std::int64_t batch,
             std::int64_t max_tokens) { return pool.request({first_block, num_blocks, batch, max_tokens}); },
          py::arg("first_block"), py::arg("num_blocks"), py::arg("batch"), py::arg("max_tokens"), NoGil())
      .def(
          "try_open",
          [](PagePool& pool, std::int64_t first_block, std::int64_t num_blocks, std::int64_t batch,
             std::int64_t max_tokens) { return pool.try_open({first_block, num_blocks, batch, max_tokens}); },
          py::arg("first_block"), py::arg("num_blocks"), py::arg("batch"), py::arg("max_tokens"), NoGil())
      .def("granted", &PagePool::granted, NoGil())
      .def("extend", &PagePool::extend, py::arg("handle"), py::arg("length"), NoGil())
      .def("truncate", &PagePool::truncate, py::arg("handle"), py::arg("length"), NoGil())
      .def("reorder", &PagePool::reorder, py::arg("handle"), py::arg("hypo_ids"), NoGil())
      .def("take_copies", &take_copies, py::arg("limit"))
      .def("fill_origins", &fill_origins, py::arg("handles"), py::arg("out"))
      .def("length", &PagePool::length, py::arg("handle"), NoGil())
      .def("close", &PagePool::close, py::arg("handle"), NoGil())
      .def("stats", &PagePool::stats, NoGil())
      .def("check_integrity", &PagePool::check_integrity, NoGil());
}

}  // namespace petalsd
