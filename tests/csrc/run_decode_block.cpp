// Decode steps of random blocks on teams of several sizes, for the sanitizers: buffers are exactly as long as the
// contract says, and every team must give the same bits as one thread.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "decode_block.hpp"

namespace {

using petalsd::BlockPointers;
using petalsd::BlockShape;
using petalsd::DecodeRows;
using petalsd::DType;

using Bytes = std::vector<std::uint8_t>;

struct Random {
  std::mt19937 engine{1};

  // Small values of either dtype: the upper half of a float32 is the bfloat16.
  Bytes values(std::int64_t count, DType dtype) {
    const std::size_t size = dtype == DType::kBFloat16 ? 2 : 4;
    Bytes bytes(static_cast<std::size_t>(count) * size);
    std::uniform_real_distribution<float> values(-0.3f, 0.3f);
    for (std::size_t i = 0; i < bytes.size(); i += size) {
      const float value = values(engine);
      std::uint8_t bits[4];
      std::memcpy(bits, &value, 4);
      std::memcpy(&bytes[i], bits + 4 - size, size);
    }
    return bytes;
  }
};

// The block's answer and what it wrote into the pages.
std::vector<Bytes> decode(const BlockShape& shape, DType dtype, int num_threads, int num_steps) {
  Random random;
  const std::int64_t m = shape.hidden_size, d = shape.head_dim, i = shape.intermediate_size;
  const std::int64_t q = shape.num_heads * d, kv = shape.num_kv_heads * d;
  const std::int64_t sizes[] = {m, (q + 2 * kv) * m, q + 2 * kv, d, d, m * q, m, m, 2 * i * m, 2 * i, m * i, m};
  std::vector<Bytes> weights;
  for (const std::int64_t size : sizes) weights.push_back(random.values(size, dtype));
  const auto at = [&](std::size_t k) { return weights[k].data(); };
  const BlockPointers pointers{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9), at(10), at(11)};
  const petalsd::DecodeBlock block(1, shape, pointers, dtype, petalsd::choose_kernels("auto", dtype));
  petalsd::ThreadTeam team(num_threads);

  constexpr std::int64_t num_rows = 7, page_tokens = 4, num_runs = 5, num_blocks = 2;
  const std::int64_t num_pages = 1 + num_rows * num_runs * num_blocks;
  Bytes k = random.values(num_pages * page_tokens * kv, dtype);
  Bytes v = random.values(num_pages * page_tokens * kv, dtype);
  const Bytes cos = random.values(num_rows * d, dtype), sin = random.values(num_rows * d, dtype);
  Bytes hidden = random.values(num_rows * m, dtype);
  Bytes out(hidden.size());
  std::vector<std::int32_t> origins;
  std::vector<std::int64_t> positions;
  for (std::int64_t row = 0; row < num_rows; ++row) {
    for (std::int64_t run = 0; run < num_runs; ++run) {
      origins.push_back(static_cast<std::int32_t>(1 + (row * num_runs + run) * num_blocks));
    }
    positions.push_back(row * 2);
  }
  for (int step = 0; step < num_steps; ++step) {
    const DecodeRows rows{num_rows, hidden.data(), out.data(), cos.data(), sin.data(), k.data(), v.data(),
                          page_tokens, origins.data(), num_runs, positions.data()};
    block.run(rows, team);
    hidden = out;
    for (std::int64_t& position : positions) position = (position + 1) % (page_tokens * num_runs);
  }
  return {out, k, v};
}

}  // namespace

int main() {
  const BlockShape shapes[] = {{40, 6, 2, 10, 37, 0, 1e-5f}, {64, 4, 4, 16, 100, 3, 1e-5f}, {24, 8, 1, 6, 20, 0, 1e-5f}};
  for (const DType dtype : {DType::kFloat32, DType::kBFloat16}) {
    for (const BlockShape& shape : shapes) {
      const auto expected = decode(shape, dtype, 1, 60);
      for (const int num_threads : {2, 4}) {
        if (decode(shape, dtype, num_threads, 60) == expected) continue;
        std::fprintf(stderr, "%d threads give other bits than one\n", num_threads);
        return EXIT_FAILURE;
      }
    }
  }
  std::puts("decode steps are the same on any team");
  return EXIT_SUCCESS;
}
