// Attention tile schedule: which column blocks each tile of rows visits.   B samples, R rows, C columns
#include "tiles.h"

#include <algorithm>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <string>

namespace mm::planner {
namespace {

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("attention_tiles: " + what); }

void check_bounds(const char* name, const int32_t* cu, int64_t num_samples, int64_t total) {
  if (cu[0] != 0 || cu[num_samples] != total)
    fail(std::string(name) + " runs from " + std::to_string(cu[0]) + " to " + std::to_string(cu[num_samples]) +
         ", expected 0 to " + std::to_string(total));
  for (int64_t b = 0; b < num_samples; ++b)
    if (cu[b + 1] < cu[b]) fail(std::string(name) + " decreases at sample " + std::to_string(b));
}

void check(const TilesInput& in) {
  if (in.block_rows < 1 || in.block_cols < 1)
    fail("block_rows is " + std::to_string(in.block_rows) + " and block_cols " + std::to_string(in.block_cols) +
         ", expected at least 1 each");
  check_bounds("cu_rows", in.cu_rows, in.num_samples, in.num_rows);
  check_bounds("cu_cols", in.cu_cols, in.num_samples, in.num_cols);
  for (int64_t b = 0; b < in.num_samples; ++b) {
    for (int64_t i = in.cu_rows[b]; i < in.cu_rows[b + 1]; ++i) {
      if (in.hi[i] < in.lo[i]) fail("hi is below lo at row " + std::to_string(i));
      if (i > in.cu_rows[b] && (in.lo[i] < in.lo[i - 1] || in.hi[i] < in.hi[i - 1]))
        fail("lo or hi decreases at row " + std::to_string(i));
    }
  }
  const uint32_t* keys = in.rows_are_keys ? in.row_bits : in.col_bits;
  const int64_t num_keys = in.rows_are_keys ? in.num_rows : in.num_cols;
  for (int64_t i = 0; i < num_keys; ++i)
    if (keys[i] == 0 || (keys[i] & (keys[i] - 1)) != 0)
      fail(std::string(in.rows_are_keys ? "row_bits" : "col_bits") + " of key " + std::to_string(i) +
           " does not have exactly one bit");
}

struct Block {
  uint32_t any, all;  // OR and AND of the column bits
  int64_t run_end;    // first later block whose (any, all) differ
};

// The sample being planned: columns [begin, end) in blocks counted from `begin`.
class Sample {
 public:
  Sample(const TilesInput& in, int64_t begin, int64_t end) : in_(in), begin_(begin), end_(end) {
    blocks_.resize((end - begin + in.block_cols - 1) / in.block_cols);
    for (int64_t b = std::ssize(blocks_) - 1; b >= 0; --b) {
      Block& block = blocks_[b];
      block = {0, ~uint32_t{0}, b + 1};
      for (int64_t j = start(b); j < stop(b); ++j) block.any |= in.col_bits[j], block.all &= in.col_bits[j];
      if (b + 1 < std::ssize(blocks_) && blocks_[b + 1].any == block.any && blocks_[b + 1].all == block.all)
        block.run_end = blocks_[b + 1].run_end;
    }
  }

  // Appends the spans of the tile of rows [row_start, row_end) and returns how many blocks they hold.
  int64_t append_spans(int64_t row_start, int64_t row_end, std::vector<std::array<int32_t, 3>>& spans) const {
    uint32_t rows_any = 0, rows_all = ~uint32_t{0};
    for (int64_t i = row_start; i < row_end; ++i) rows_any |= in_.row_bits[i], rows_all &= in_.row_bits[i];
    const bool may_be_full = !in_.rows_are_keys || row_end - row_start == in_.block_rows;
    const int64_t seen_from = lo(row_start), seen_to = hi(row_end - 1);      // by some row
    const int64_t shared_from = lo(row_end - 1), shared_to = hi(row_start);  // by every row
    int64_t visited = 0, open_end = -1, open_class = -1;                     // block after the last span, and its class
    if (seen_to <= seen_from) return 0;
    const int64_t last = block_of(seen_to - 1) + 1;
    for (int64_t b = block_of(seen_from); b < last;) {
      const Block& block = blocks_[b];
      int64_t next = b + 1;
      int64_t masked = 1;
      if ((rows_any & block.any) == 0) {
        b = block.run_end;
        continue;
      }
      if (start(b) >= shared_from && stop(b) <= shared_to) {
        const bool bits_full = in_.rows_are_keys ? (rows_any & ~block.all) == 0 : (block.any & ~rows_all) == 0;
        masked = !(bits_full && may_be_full && whole(b));
        // The class is the same up to the end of the run of equal bits, of the shared columns and of whole blocks.
        if (whole(b)) next = std::max(next, std::min(block.run_end, (shared_to - begin_) / in_.block_cols));
      } else if (!some_row_sees(b, row_start, row_end)) {
        b = next;
        continue;
      }
      const int32_t col_end = static_cast<int32_t>(stop(next - 1));
      if (open_end == b && open_class == masked) {
        spans.back()[1] = col_end;
      } else {
        spans.push_back({static_cast<int32_t>(start(b)), col_end, static_cast<int32_t>(masked)});
      }
      visited += next - b;
      open_end = b = next;
      open_class = masked;
    }
    return visited;
  }

 private:
  int64_t lo(int64_t row) const { return std::clamp<int64_t>(in_.lo[row], begin_, end_); }
  int64_t hi(int64_t row) const { return std::clamp<int64_t>(in_.hi[row], begin_, end_); }
  int64_t start(int64_t block) const { return begin_ + block * in_.block_cols; }
  int64_t stop(int64_t block) const { return std::min(start(block + 1), end_); }
  int64_t block_of(int64_t col) const { return (col - begin_) / in_.block_cols; }
  bool whole(int64_t block) const { return start(block + 1) <= end_; }

  // Exact, for blocks that not every row covers. Each row has at most two blocks it covers in part, so the column
  // scans of a tile are bounded by 2 * block_rows * block_cols.
  bool some_row_sees(int64_t b, int64_t row_start, int64_t row_end) const {
    for (int64_t i = row_start; i < row_end && lo(i) < stop(b); ++i) {
      const int64_t from = std::max(lo(i), start(b)), to = std::min(hi(i), stop(b));
      if (from >= to || (in_.row_bits[i] & blocks_[b].any) == 0) continue;
      if (from == start(b) && to == stop(b)) return true;
      for (int64_t j = from; j < to; ++j)
        if (in_.row_bits[i] & in_.col_bits[j]) return true;
    }
    return false;
  }

  const TilesInput& in_;
  int64_t begin_, end_;
  std::vector<Block> blocks_;
};

}  // namespace

TileSchedule attention_tiles(const TilesInput& in) {
  check(in);
  TileSchedule out;
  std::vector<std::array<int32_t, 4>> tiles;
  std::vector<int64_t> weights;                   // blocks of each tile
  std::vector<int64_t> samples;                   // of each tile
  std::vector<int64_t> heaviest(in.num_samples);  // blocks of each sample's heaviest tile
  int64_t total_blocks = 0;
  for (int64_t b = 0; b < in.num_samples; ++b) {
    const Sample sample(in, in.cu_cols[b], in.cu_cols[b + 1]);
    const int64_t rows_end = in.cu_rows[b + 1];
    for (int64_t row = in.cu_rows[b]; row < rows_end; row += in.block_rows) {
      const int64_t row_end = std::min(row + in.block_rows, rows_end);
      const auto first = static_cast<int32_t>(out.spans.size());
      weights.push_back(sample.append_spans(row, row_end, out.spans));
      if (out.spans.size() > std::numeric_limits<int32_t>::max()) fail("more than 2**31 - 1 spans");
      tiles.push_back(
          {static_cast<int32_t>(row), static_cast<int32_t>(row_end), first, static_cast<int32_t>(out.spans.size())});
      samples.push_back(b);
      heaviest[b] = std::max(heaviest[b], weights.back());
      total_blocks += weights.back();
    }
  }
  std::vector<int64_t> order(tiles.size());
  std::iota(order.begin(), order.end(), int64_t{0});
  // The tiles of a sample stand together: what runs at once then reads one sample's columns, which a cache can hold.
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
    const int64_t sample = samples[a], other = samples[b];
    if (sample == other) return weights[a] > weights[b];
    return heaviest[sample] != heaviest[other] ? heaviest[sample] > heaviest[other] : sample < other;
  });
  out.tiles.reserve(tiles.size());
  for (const int64_t i : order) out.tiles.push_back(tiles[i]);
  out.pairs = total_blocks * in.block_cols * in.block_rows;
  return out;
}

}  // namespace mm::planner
