#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "addresses.hpp"
#include "bindings.hpp"
#include "check.hpp"
#include "span.hpp"

namespace py = pybind11;

namespace petalsd {
namespace {

template <typename Value, std::size_t kCount>
Value named(const char* what, const std::string& name, const std::array<std::pair<const char*, Value>, kCount>& values) {
  for (const auto& [known, value] : values) {
    if (name == known) return value;
  }
  throw PoolError(text(what, " = ", name, ": unknown"));
}

constexpr std::array<std::pair<const char*, WeightFormat>, 4> kWeightFormats = {
    {{"float32", WeightFormat::kFloat32},
     {"bfloat16", WeightFormat::kBFloat16},
     {"int8", WeightFormat::kInt8},
     {"int4", WeightFormat::kInt4}}};
constexpr std::array<std::pair<const char*, KVType>, 3> kKVTypes = {
    {{"float32", KVType::kFloat32}, {"bfloat16", KVType::kBFloat16}, {"int8", KVType::kInt8}}};
constexpr std::array<std::pair<const char*, DType>, 2> kDTypes = {
    {{"float32", DType::kFloat32}, {"bfloat16", DType::kBFloat16}}};

std::shared_ptr<SpanBlock> make_block(std::int64_t index, const std::array<std::int64_t, 6>& sizes, double norm_eps,
                                      const std::array<PackedWeight, 4>& matrices,
                                      const std::array<std::vector<float>, 8>& vectors, const std::string& tier) {
  const BlockShape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], static_cast<float>(norm_eps)};
  BlockVectors own{vectors[0], vectors[1], vectors[2], vectors[3], vectors[4], vectors[5], vectors[6], vectors[7]};
  return std::make_shared<SpanBlock>(index, shape, BlockMatrices{matrices[0], matrices[1], matrices[2], matrices[3]},
                                     std::move(own), choose_tier(tier));
}

StepRows make_rows(const std::string& dtype, std::vector<std::int64_t> bounds,
                   const std::array<Address, 3>& cos_sin_positions, Address origins, std::int64_t origins_stride,
                   const KVPages& kv) {
  StepRows rows{};
  rows.dtype = named("dtype", dtype, kDTypes);
  rows.cos = pointer<const void>(cos_sin_positions[0]);
  rows.sin = pointer<const void>(cos_sin_positions[1]);
  rows.positions = pointer<const std::int64_t>(cos_sin_positions[2]);
  rows.kv = kv;
  rows.origins = pointer<const std::int32_t>(origins);
  rows.origins_stride = origins_stride;
  rows.bounds = std::move(bounds);
  return rows;
}

void register_values(py::module_& module) {
  py::class_<PackedWeight>(module, "PackedWeight")
      .def(py::init([](const std::string& format, std::int64_t num_out, std::int64_t num_in, Address data,
                       Address scales) {
             PETALSD_CHECK(num_out > 0 && num_in > 0, "a weight of ", num_out, " x ", num_in);
             return PackedWeight{named("format", format, kWeightFormats), num_out, num_in, pointer<const void>(data),
                                 pointer<const void>(scales)};
           }),
           py::arg("format"), py::arg("num_out"), py::arg("num_in"), py::arg("data"), py::arg("scales"));
  py::class_<KVPages>(module, "KVPages")
      .def(py::init([](const std::string& type, const std::array<Address, 4>& at, std::int64_t page_tokens,
                       std::int64_t num_kv_heads, std::int64_t head_dim) {
             return KVPages{named("type", type, kKVTypes), pointer<void>(at[0]), pointer<void>(at[1]),
                            pointer<float>(at[2]), pointer<float>(at[3]), page_tokens, num_kv_heads, head_dim};
           }),
           py::arg("type"), py::arg("k_v_scales"), py::arg("page_tokens"), py::arg("num_kv_heads"),
           py::arg("head_dim"));
  py::class_<StepRows>(module, "StepRows")
      .def(py::init(&make_rows), py::arg("dtype"), py::arg("bounds"), py::arg("cos_sin_positions"), py::arg("origins"),
           py::arg("origins_stride"), py::arg("kv"));
}

}  // namespace

void register_span(py::module_& module) {
  py::class_<ThreadTeam>(module, "ThreadTeam")
      .def(py::init<int>(), py::arg("num_threads"))
      .def_property_readonly("num_threads", &ThreadTeam::num_threads);
  register_values(module);
  py::class_<SpanBlock, std::shared_ptr<SpanBlock>>(module, "SpanBlock")
      .def(py::init(&make_block), py::arg("index"), py::arg("sizes"), py::arg("norm_eps"), py::arg("matrices"),
           py::arg("vectors"), py::arg("tier"))
      .def_property_readonly("tier", [](const SpanBlock& block) { return block.tier().name; });
  py::class_<Span>(module, "Span")
      .def(py::init([](const std::vector<std::shared_ptr<SpanBlock>>& blocks) {
             return std::make_unique<Span>(std::vector<std::shared_ptr<const SpanBlock>>(blocks.begin(), blocks.end()));
           }),
           py::arg("blocks"))
      .def(
          "run",
          [](Span& span, StepRows& rows, std::int64_t first, std::int64_t count, Address hidden, Address out,
             ThreadTeam& team) {
            rows.hidden = pointer<const void>(hidden);
            rows.out = pointer<void>(out);
            const py::gil_scoped_release no_gil;
            span.run(rows, first, count, team);
          },
          py::arg("rows"), py::arg("first"), py::arg("count"), py::arg("hidden"), py::arg("out"), py::arg("team"));
  module.def(
      "round_int4",
      [](Address values, Address bytes, Address scales, std::int64_t num_groups, const std::string& tier) {
        const Tier chosen = choose_tier(tier);
        const py::gil_scoped_release no_gil;
        chosen.kernels.round_int4(pointer<const float>(values), pointer<std::uint8_t>(bytes), pointer<void>(scales),
                                  num_groups);
      },
      py::arg("values"), py::arg("bytes"), py::arg("scales"), py::arg("num_groups"), py::arg("tier"));
}

}  // namespace petalsd
