// How the attention of a step is shared out among threads.
#pragma once

#include <cstdint>
#include <memory>
#include <new>
#include <vector>

#include "kernels.hpp"

namespace petalsd {

struct BlockShape;
class ThreadTeam;

// R new tokens of some sequences, one sequence after the other. Sequence s has the rows bounds[s] to bounds[s + 1] - 1 at
// consecutive positions, and its pages at origins + s * origins_stride.
struct Sequences {
  std::vector<std::int64_t> bounds;
  const std::int64_t* positions = nullptr;
  const std::int32_t* origins = nullptr;
  std::int64_t origins_stride = 0;

  std::int64_t num_rows() const { return bounds.back(); }
  // PoolError unless bounds ascend from 0, and pages are whole strips.
  void check(const KVPages& kv) const;
};

// The rows of a step in pieces, which one pass over a sequence's pages serves. One thread takes a piece as a whole where
// there are enough of them for all; where a few long sequences would leave threads idle, their parts are taken one by
// one. Numbers do not depend on that.
class AttentionPlan {
 public:
  // A part of a piece and KV head, and where in the partials it goes.
  struct Part {
    std::int32_t piece;
    std::int32_t kv_head;
    std::int64_t index;
    std::int64_t at;
  };

  // For `num_rows` rows from `first_row` on: cut by sequence, and these so that one pass over a sequence's pages serves as
  // many rows as it can. Allocates only for steps that are larger than all before.
  void choose(const Sequences& sequences, std::int64_t first_row, std::int64_t num_rows, const BlockShape& shape,
              int num_threads);

  std::vector<QueryRows> pieces;  // by sequence and in small pieces; first_row counts from 0

  // Empty where pieces are taken as a whole.
  const std::vector<Part>& parts() const { return parts_; }
  float* partials(const Part& part) const { return partials_.get() + part.at; }
  // Those of all parts of a piece and KV head.
  float* partials(std::int64_t piece, std::int64_t kv_head) const;

 private:
  static constexpr std::align_val_t kAlignment{64};

  struct Free {
    void operator()(float* memory) const { ::operator delete(memory, kAlignment); }
  };

  void cut(const Sequences& sequences, std::int64_t first_row, std::int64_t num_rows, const BlockShape& shape);
  bool is_worth_splitting(const BlockShape& shape, int num_threads) const;

  std::vector<Part> parts_;
  std::vector<std::int64_t> first_parts_;  // in parts_, by piece and KV head
  std::int64_t num_kv_heads_ = 0;
  std::unique_ptr<float, Free> partials_;
  std::int64_t partials_size_ = 0;
};

// Attention of all pieces of the plan, shared out among the team.
void attend(const AttentionTask& task, const AttentionKernels& kernels, const AttentionPlan& plan, ThreadTeam& team);

}  // namespace petalsd
