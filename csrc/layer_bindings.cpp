#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "addresses.hpp"
#include "bindings.hpp"
#include "layer_team.hpp"

namespace py = pybind11;

namespace petalsd {

void register_layer_team(py::module_& module) {
  py::class_<Sequences>(module, "Sequences")
      .def(py::init([](std::vector<std::int64_t> bounds, Address positions, Address origins, std::int64_t origins_stride) {
             return Sequences{std::move(bounds), pointer<const std::int64_t>(positions),
                              pointer<const std::int32_t>(origins), origins_stride};
           }),
           py::arg("bounds"), py::arg("positions"), py::arg("origins"), py::arg("origins_stride"));
  py::class_<ScoreRule>(module, "ScoreRule")
      .def(py::init([](float softcap, Address slopes, float bias_factor, bool rounds_biases, Address sinks) {
             return ScoreRule{softcap, pointer<const float>(slopes), bias_factor, rounds_biases,
                              pointer<const float>(sinks)};
           }),
           py::arg("softcap"), py::arg("slopes"), py::arg("bias_factor"), py::arg("rounds_biases"), py::arg("sinks"));
  py::class_<GatedExperts>(module, "GatedExperts")
      .def(py::init([](std::vector<PackedWeight> gate_up, std::vector<PackedWeight> down,
                       const std::array<Address, 2>& biases, const std::optional<std::array<float, 2>>& clamp) {
             const ExpertGate gate = clamp ? ExpertGate{true, (*clamp)[0], (*clamp)[1]} : ExpertGate{};
             return GatedExperts(std::move(gate_up), std::move(down),
                                 {pointer<const float>(biases[0]), pointer<const float>(biases[1])}, gate);
           }),
           py::arg("gate_up"), py::arg("down"), py::arg("biases"), py::arg("clamp"));
  py::class_<LayerRows>(module, "LayerRows")
      .def(py::init([](Address in, Address out, std::int64_t num_rows, bool is_bfloat16) {
             return LayerRows{pointer<const void>(in), pointer<void>(out), num_rows,
                              is_bfloat16 ? DType::kBFloat16 : DType::kFloat32};
           }),
           py::arg("inputs"), py::arg("outputs"), py::arg("num_rows"), py::arg("is_bfloat16"));
  py::class_<RowNorm>(module, "RowNorm")
      .def(py::init([](Address weight, std::int64_t width, float eps) {
             return RowNorm{pointer<const float>(weight), width, eps};
           }),
           py::arg("weight"), py::arg("width"), py::arg("eps"));
  py::class_<LayerTeam>(module, "LayerTeam")
      .def(py::init([](int num_threads, const std::string& tier) {
             return std::make_unique<LayerTeam>(num_threads, choose_tier(tier));
           }),
           py::arg("num_threads"), py::arg("tier"))
      .def_property_readonly("tier", [](const LayerTeam& team) { return team.tier().name; })
      .def(
          "multiply",
          [](LayerTeam& team, const PackedWeight& weight, Address bias, const LayerRows& rows) {
            const py::gil_scoped_release no_gil;
            team.multiply(weight, pointer<const float>(bias), rows);
          },
          py::arg("weight"), py::arg("bias"), py::arg("rows"))
      .def(
          "run_experts",
          [](LayerTeam& team, const GatedExperts& experts, const std::array<std::int64_t, 2>& sizes,
             const std::array<Address, 4>& experts_shares_in_out, bool is_wide) {
            const auto& [chosen, shares, in, out] = experts_shares_in_out;
            const Routes routes{pointer<const std::int64_t>(chosen), pointer<const float>(shares), sizes[0], sizes[1]};
            const py::gil_scoped_release no_gil;
            team.run_experts(experts, routes, pointer<const float>(in), pointer<float>(out), is_wide);
          },
          py::arg("experts"), py::arg("sizes"), py::arg("experts_shares_in_out"), py::arg("is_wide"))
      .def(
          "normalize",
          [](LayerTeam& team, const RowNorm& norm, const LayerRows& rows) {
            const py::gil_scoped_release no_gil;
            team.normalize(norm, rows);
          },
          py::arg("norm"), py::arg("rows"))
      .def(
          "attend",
          [](LayerTeam& team, const Sequences& sequences, const KVPages& kv, const std::array<std::int64_t, 3>& sizes,
             float scale, const ScoreRule& rule, const std::array<Address, 4>& q_k_v_out) {
            const auto at = [&](int i) { return pointer<const float>(q_k_v_out[static_cast<std::size_t>(i)]); };
            const LayerAttention layer{sizes[0], sizes[1], sizes[2], scale, rule,
                                       at(0),    at(1),    at(2),    pointer<float>(q_k_v_out[3])};
            const py::gil_scoped_release no_gil;
            team.attend(sequences, kv, layer);
          },
          py::arg("sequences"), py::arg("kv"), py::arg("sizes"), py::arg("scale"), py::arg("rule"),
          py::arg("q_k_v_out"));
}

}  // namespace petalsd
