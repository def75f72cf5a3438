// Packed layout, built on the host in one pass.   B samples, N segments, T tokens, A position axes, M modalities
#include "layout.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <string>

namespace mm::planner {
namespace {

constexpr int64_t kInt32Max = std::numeric_limits<int32_t>::max();

[[noreturn]] void fail(const std::string& what) { throw std::invalid_argument("build_layout: " + what); }

// One row of `segments` with its grid, widened; `tokens` counts without the special token.
struct Segment {
  int64_t sample, modality, length, first_row, special_id, tokens;
  int64_t time, rows, cols;

  Segment(const LayoutInput& in, int64_t n) {
    const int32_t* segment = in.segments + 4 * n;
    const int32_t* grid = in.grids + 3 * n;
    sample = segment[0], modality = segment[1], length = segment[2], first_row = segment[3];
    time = grid[0], rows = grid[1], cols = grid[2];
    const bool known = modality >= 0 && modality < in.num_modalities;
    special_id = known ? in.special_ids[modality] : -1;
    tokens = length - (has_special() ? 1 : 0);
  }
  bool has_special() const { return special_id >= 0 && length > 0; }
  int64_t used_axes() const { return time > 0 ? 3 : rows > 0 ? 2 : 1; }
};

int64_t align4(int64_t n) { return (n + 3) / 4 * 4; }

}  // namespace

LayoutSections layout_sections(int64_t num_samples, int64_t num_segments, int64_t total_tokens, int64_t axes) {
  LayoutSections at{};
  at.cu_seqlens = 0;
  at.positions = align4(num_samples + 1);
  at.segment_ids = align4(at.positions + axes * total_tokens);
  at.source_rows = align4(at.segment_ids + total_tokens);
  at.segment_cu_seqlens = align4(at.source_rows + total_tokens);
  at.modality_ids = align4(at.segment_cu_seqlens + num_segments + 1);
  at.end = at.modality_ids + (total_tokens + 3) / 4;
  return at;
}

int64_t check_layout(const LayoutInput& in) {
  int64_t total = 0, previous_sample = 0;
  for (int64_t n = 0; n < in.num_segments; ++n) {
    const Segment s(in, n);
    const auto at = [n](const char* name) { return std::string(name) + "[" + std::to_string(n) + "]"; };
    if (s.sample < previous_sample || s.sample >= in.num_samples)
      fail(at("segments") + " has sample " + std::to_string(s.sample) + ", expected samples in order below " +
           std::to_string(in.num_samples));
    if (s.modality < 0 || s.modality >= in.num_modalities)
      fail(at("segments") + " has modality " + std::to_string(s.modality) + ", expected 0 to " +
           std::to_string(in.num_modalities - 1));
    if (s.length < 0 || s.first_row < 0)
      fail(at("segments") + " has length " + std::to_string(s.length) + " and first row " +
           std::to_string(s.first_row) + ", expected no negative number");
    if (s.first_row + s.tokens > kInt32Max) fail(at("segments") + " passes source row 2**31 - 1");
    if (s.time < 0 || s.rows < 0 || s.cols < 0 || (s.time > 0 && s.rows == 0))
      fail(at("grids") + " is (" + std::to_string(s.time) + ", " + std::to_string(s.rows) + ", " +
           std::to_string(s.cols) + "), expected (0, 0, length), (0, rows, columns) or (time, rows, columns)");
    if (s.used_axes() > in.axes)
      fail(at("grids") + " uses " + std::to_string(s.used_axes()) + " axes, expected at most " +
           std::to_string(in.axes));
    // The bound on each product keeps three int32 factors inside int64.
    const int64_t area = std::max<int64_t>(s.rows, 1) * s.cols;
    const int64_t tokens = area > kInt32Max ? area : area * std::max<int64_t>(s.time, 1);
    if (tokens != s.tokens)
      fail(at("grids") + " holds " + std::to_string(tokens) + " tokens, expected " + std::to_string(s.tokens) +
           " as in segments");
    total += s.length;
    previous_sample = s.sample;
  }
  if (total > kInt32Max) fail("segments hold " + std::to_string(total) + " tokens, expected at most 2**31 - 1");
  return total;
}

void fill_layout(const LayoutInput& in, int64_t total_tokens, int32_t* buffer) {
  const LayoutSections at = layout_sections(in.num_samples, in.num_segments, total_tokens, in.axes);
  int32_t* cu_seqlens = buffer + at.cu_seqlens;
  int32_t* segment_cu_seqlens = buffer + at.segment_cu_seqlens;
  uint8_t* modality_ids = reinterpret_cast<uint8_t*>(buffer + at.modality_ids);
  // Plane A - 1 holds the fastest axis (index in a plain segment, column of a grid).
  int32_t* columns = buffer + at.positions + (in.axes - 1) * total_tokens;
  int64_t begin = 0;
  for (int64_t n = 0; n < in.num_segments; ++n) {
    const Segment s(in, n);
    const int32_t shift = s.has_special() ? 1 : 0;
    segment_cu_seqlens[n] = static_cast<int32_t>(begin);
    cu_seqlens[s.sample + 1] = static_cast<int32_t>(begin + s.length);
    std::fill_n(buffer + at.segment_ids + begin, s.length, static_cast<int32_t>(n));
    std::fill_n(modality_ids + begin, s.length, static_cast<uint8_t>(s.modality));
    int32_t* source_rows = buffer + at.source_rows + begin;
    if (shift) source_rows[0] = static_cast<int32_t>(-(s.special_id + 1));
    int32_t* row_axis = columns - total_tokens;
    int32_t* time_axis = columns - 2 * total_tokens;
    int64_t col = 0, row = 0, time = 0;
    for (int64_t i = 0; i < s.tokens; ++i) {
      const int64_t t = begin + shift + i;
      source_rows[shift + i] = static_cast<int32_t>(s.first_row + i);
      columns[t] = static_cast<int32_t>(col) + shift;
      if (s.rows > 0) row_axis[t] = static_cast<int32_t>(row) + shift;
      if (s.time > 0) time_axis[t] = static_cast<int32_t>(time) + shift;
      if (++col == s.cols) {
        col = 0;
        if (++row == s.rows) row = 0, ++time;
      }
    }
    begin += s.length;
  }
  segment_cu_seqlens[in.num_segments] = static_cast<int32_t>(begin);
  for (int64_t b = 0; b < in.num_samples; ++b)  // a sample without segments ends where the one before it ended
    cu_seqlens[b + 1] = std::max(cu_seqlens[b + 1], cu_seqlens[b]);
}

}  // namespace mm::planner
