#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "check.hpp"
#include "page_pool.hpp"

namespace py = pybind11;

namespace petalsd {
namespace {

// The GIL is released before the pool's mutex is taken, so neither is ever waited for with the other held.
using NoGil = py::call_guard<py::gil_scoped_release>;

// The int32 numbers of plain structs, flat.
template <typename T>
py::bytearray to_bytes(const std::vector<T>& items) {
  return {reinterpret_cast<const char*>(items.data()), items.size() * sizeof(T)};
}

// Pairs (source, target).
py::bytearray take_copies(PagePool& pool, std::size_t limit) {
  std::vector<Copy> copies;
  {
    const py::gil_scoped_release no_gil;
    copies = pool.take_copies(limit);
  }
  return to_bytes(copies);
}

// Triples (page, slot, pages), here and in start_restores.
std::pair<std::vector<std::size_t>, py::bytearray> plan_batch(PagePool& pool, const std::vector<Handle>& handles,
                                                              const std::vector<std::int64_t>& lengths,
                                                              bool may_spill) {
  BatchPlan plan;
  {
    const py::gil_scoped_release no_gil;
    plan = pool.plan_batch(handles, lengths, may_spill);
  }
  return {std::move(plan.chosen), to_bytes(plan.spills)};
}

std::vector<py::bytearray> start_restores(PagePool& pool) {
  std::vector<std::vector<Transfer>> restores;
  {
    const py::gil_scoped_release no_gil;
    restores = pool.start_restores();
  }
  std::vector<py::bytearray> flat;
  flat.reserve(restores.size());
  for (const auto& transfers : restores) flat.push_back(to_bytes(transfers));
  return flat;
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
      .def_readonly("pages_promisable", &PoolStats::pages_promisable)
      .def_readonly("pages_reserved", &PoolStats::pages_reserved)
      .def_readonly("pages_total", &PoolStats::pages_total)
      .def_readonly("pages_free", &PoolStats::pages_free)
      .def_readonly("pages_mapped", &PoolStats::pages_mapped)
      .def_readonly("pages_spilled", &PoolStats::pages_spilled)
      .def_readonly("pages_shared", &PoolStats::pages_shared)
      .def_readonly("high_water", &PoolStats::high_water)
      .def_readonly("tail_tokens", &PoolStats::tail_tokens)
      .def_readonly("sessions", &PoolStats::sessions)
      .def_readonly("waiters", &PoolStats::waiters)
      .def_readonly("oldest_wait_s", &PoolStats::oldest_wait_s)
      .def_readonly("copies", &PoolStats::copies)
      .def_readonly("pages_moved", &PoolStats::pages_moved)
      .def_readonly("pages_evicted", &PoolStats::pages_evicted)
      .def_readonly("pages_restored", &PoolStats::pages_restored);
}

}  // namespace

void register_page_pool(py::module_& module) {
  register_stats(module);
  constexpr AdmissionRules kRules;
  py::class_<PagePool>(module, "PagePool")
      .def(py::init([](std::int64_t num_pages, std::int64_t page_tokens, std::shared_ptr<SpillFile> spill_file,
                       double max_peer_share, double bypass_wait_s, int max_bypasses) {
             const AdmissionRules rules{max_peer_share, bypass_wait_s, max_bypasses};
             return std::make_unique<PagePool>(num_pages, page_tokens, rules, std::move(spill_file));
           }),
           py::arg("num_pages"), py::arg("page_tokens"), py::arg("spill_file") = py::none(),
           py::arg("max_peer_share") = kRules.max_peer_share, py::arg("bypass_wait_s") = kRules.bypass_wait_s,
           py::arg("max_bypasses") = kRules.max_bypasses)
      .def(
          "request",
          [](PagePool& pool, std::int64_t first_block, std::int64_t num_blocks, std::int64_t batch,
             std::int64_t max_tokens, const std::string& peer) {
            return pool.request({first_block, num_blocks, batch, max_tokens}, peer);
          },
          py::arg("first_block"), py::arg("num_blocks"), py::arg("batch"), py::arg("max_tokens"), py::arg("peer") = "",
          NoGil())
      .def(
          "try_open",
          [](PagePool& pool, std::int64_t first_block, std::int64_t num_blocks, std::int64_t batch,
             std::int64_t max_tokens, const std::string& peer) {
            return pool.try_open({first_block, num_blocks, batch, max_tokens}, peer);
          },
          py::arg("first_block"), py::arg("num_blocks"), py::arg("batch"), py::arg("max_tokens"), py::arg("peer") = "",
          NoGil())
      .def("charge", &PagePool::charge, py::arg("handle"), py::arg("peer"), NoGil())
      .def("granted", &PagePool::granted, NoGil())
      .def("plan_batch", &plan_batch, py::arg("handles"), py::arg("lengths"), py::arg("may_spill"))
      .def("finish_spills", &PagePool::finish_spills, py::arg("are_written"), NoGil())
      .def("start_restores", &start_restores)
      .def("extend", &PagePool::extend, py::arg("handle"), py::arg("length"), NoGil())
      .def("truncate", &PagePool::truncate, py::arg("handle"), py::arg("length"), NoGil())
      .def("reorder", &PagePool::reorder, py::arg("handle"), py::arg("hypo_ids"), NoGil())
      .def("overwrite", &PagePool::overwrite, py::arg("handle"), py::arg("start"), py::arg("end"), NoGil())
      .def("take_copies", &take_copies, py::arg("limit"))
      .def("fill_origins", &fill_origins, py::arg("handles"), py::arg("out"))
      .def("length", &PagePool::length, py::arg("handle"), NoGil())
      .def("close", &PagePool::close, py::arg("handle"), NoGil())
      .def("stats", &PagePool::stats, NoGil())
      .def("check_integrity", &PagePool::check_integrity, NoGil());
}

}  // namespace petalsd
