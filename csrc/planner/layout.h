// Packed layout, built on the host in one pass.   B samples, N segments, T tokens, A position axes, M modalities
#pragma once

#include <cstdint>

namespace mm::planner {

// Where each section starts in the one int32 buffer of a layout; every start is a multiple of 4 (16 bytes).
struct LayoutSections {
  int64_t cu_seqlens, positions, segment_ids, source_rows, segment_cu_seqlens, modality_ids, end;
};

struct LayoutInput {
  const int32_t* segments;     // [N, 4] sample, modality, length with the special token, first source row
  const int32_t* grids;        // [N, 3] time, rows, columns without the special token; 0 = axis not used
  const int32_t* special_ids;  // [M], -1 = none
  int64_t num_segments, num_modalities, num_samples, axes;
};

LayoutSections layout_sections(int64_t num_samples, int64_t num_segments, int64_t total_tokens, int64_t axes);

// Checks every segment and returns T. Throws std::invalid_argument naming the argument at fault.
int64_t check_layout(const LayoutInput& in);

// Fills `buffer` (layout_sections(...).end int32, zeroed). `in` has passed check_layout.
void fill_layout(const LayoutInput& in, int64_t total_tokens, int32_t* buffer);

}  // namespace mm::planner
