// Attention tile schedule: which column blocks each tile of rows visits.   B samples, R rows, C columns
#pragma once

#include <array>
#include <cstdint>
#include <vector>

namespace mm::planner {

struct TilesInput {
  const int32_t *cu_rows, *cu_cols;     // [B + 1]
  const int32_t *lo, *hi;               // [R] row i sees columns [lo[i], hi[i]), both non-decreasing within a sample
  const uint32_t *row_bits, *col_bits;  // [R], [C] and of those, the columns with row_bits & col_bits != 0
  int64_t num_samples, num_rows, num_cols;
  int64_t block_rows, block_cols;
  bool rows_are_keys;  // keys carry exactly one bit; a short tile of keys gets masked spans only
};

// Samples by their heaviest tile, in each the heaviest first.
struct TileSchedule {
  std::vector<std::array<int32_t, 4>> tiles;  // row_start, row_end, first span, last span (exclusive)
  std::vector<std::array<int32_t, 3>> spans;  // col_start, col_end, masked
  int64_t pairs = 0;                          // block_rows * padded columns over all tiles
};

// Throws std::invalid_argument naming the argument at fault.
TileSchedule attention_tiles(const TilesInput& in);

}  // namespace mm::planner
