// The CPU's packing operators on outputs that exist: each checks all that it reads and writes, and splits the work over
// threads.   T tokens, E width, B samples, N segments, L padded length, R gathered rows
#pragma once

#include <cstdint>

#include "bindings/view.h"

namespace mm::bindings {

// Where an output comes from: new pages are in the cache already, since the system has just zeroed them.
enum class Output { kGiven, kNew };

// The layout's table, int32 [N, 4]: sample, modality, length, first row in the modality's stream.
struct Segments {
  const int32_t* table;
  int64_t count;
};

void write_pack(Views streams, Segments segments, const View& out, Output output);
void write_unpack(const View& packed, Segments segments, Views out, Output output);
void write_pad(const View& packed, const View& bounds, const View& out, const View& mask, Output output);
void write_unpad(const View& padded, const View& bounds, const View& out, Output output);
void write_gather_rows(const View& packed, const View& rows, const View& out, Output output);
void write_scatter_rows_sum(const View& grad, const View& rows, const View& out, Output output);
void write_segment_mean(const View& packed, const View& bounds, const View& out, Output output);
void write_segment_mean_backward(const View& grad, const View& bounds, const View& out, Output output);

}  // namespace mm::bindings
