#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <vector>

#include "bindings.hpp"
#include "check.hpp"
#include "decode_span.hpp"

namespace py = pybind11;

namespace petalsd {
namespace {

using Address = std::uintptr_t;  // of a tensor's first element; the caller keeps the tensor alive

template <typename T>
T* pointer(Address address) {
  return reinterpret_cast<T*>(address);  // NOLINT: this is where addresses come in
}

// In the order of BlockPointers; 0 where the block has none.
using Addresses = std::array<Address, 12>;

std::shared_ptr<DecodeBlock> make_block(std::int64_t index, const std::array<std::int64_t, 6>& sizes, double norm_eps,
                                        const Addresses& weights, bool is_bfloat16, const std::string& tier) {
  const DType dtype = is_bfloat16 ? DType::kBFloat16 : DType::kFloat32;
  const BlockShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], static_cast<float>(norm_eps)};
  std::array<const void*, 12> at{};
  for (std::size_t i = 0; i < at.size(); ++i) at[i] = pointer<const void>(weights[i]);
  const BlockPointers pointers{at[0], at[1], at[2], at[3], at[4], at[5], at[6], at[7], at[8], at[9], at[10], at[11]};
  return std::make_shared<DecodeBlock>(index, shape, pointers, dtype, choose_tier(tier, dtype));
}

}  // namespace

void register_decode_block(py::module_& module) {
  py::class_<ThreadTeam>(module, "ThreadTeam")
      .def(py::init<int>(), py::arg("num_threads"))
      .def_property_readonly("num_threads", &ThreadTeam::num_threads);
  py::class_<DecodeRows>(module, "DecodeRows")
      .def(py::init([](std::int64_t num_rows, const std::array<Address, 4>& kv_and_angles, std::int64_t page_tokens,
                       Address origins, std::int64_t origins_stride, Address positions) {
             DecodeRows rows{};
             rows.num_rows = num_rows;
             rows.k = pointer<void>(kv_and_angles[0]);
             rows.v = pointer<void>(kv_and_angles[1]);
             rows.cos = pointer<const void>(kv_and_angles[2]);
             rows.sin = pointer<const void>(kv_and_angles[3]);
             rows.page_tokens = page_tokens;
             rows.origins = pointer<const std::int32_t>(origins);
             rows.origins_stride = origins_stride;
             rows.positions = pointer<const std::int64_t>(positions);
             return rows;
           }),
           py::arg("num_rows"), py::arg("k_v_cos_sin"), py::arg("page_tokens"), py::arg("origins"),
           py::arg("origins_stride"), py::arg("positions"));
  py::class_<DecodeBlock, std::shared_ptr<DecodeBlock>>(module, "DecodeBlock")
      .def(py::init(&make_block), py::arg("index"), py::arg("sizes"), py::arg("norm_eps"), py::arg("weights"),
           py::arg("is_bfloat16"), py::arg("tier"))
      .def_property_readonly("tier", [](const DecodeBlock& block) { return block.tier().name; });
  py::class_<DecodeSpan>(module, "DecodeSpan")
      .def(py::init([](const std::vector<std::shared_ptr<DecodeBlock>>& blocks) {
             return std::make_unique<DecodeSpan>(
                 std::vector<std::shared_ptr<const DecodeBlock>>(blocks.begin(), blocks.end()));
           }),
           py::arg("blocks"))
      .def(
          "run",
          [](DecodeSpan& span, DecodeRows rows, std::int64_t first, std::int64_t count, Address hidden, Address out,
             ThreadTeam& team) {
            rows.hidden = pointer<const void>(hidden);
            rows.out = pointer<void>(out);
            const py::gil_scoped_release no_gil;
            span.run(rows, first, count, team);
          },
          py::arg("rows"), py::arg("first"), py::arg("count"), py::arg("hidden"), py::arg("out"), py::arg("team"));
}

}  // namespace petalsd
