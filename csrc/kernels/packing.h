// Moving and summing packed rows on a GPU: parameters and launchers.   T packed tokens, B samples, L padded length,
// N segments, R gathered rows.   No torch here: memory and stream come in, an error comes out, nothing is synchronised.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace mm::cuda {

constexpr int kMaxStreams = 32;

// Rows of one 2-D tensor: contiguous inside a row, any stride between rows.
struct Rows {
  char* data;
  int64_t stride;  // bytes
};

// Token t is row source_rows[t] of stream modality_ids[t].
struct StreamMove {
  Rows packed;
  Rows streams[kMaxStreams];
  int num_streams;
  const uint8_t* modality_ids;  // [T]
  const int32_t* source_rows;   // [T]
  int64_t total, row_bytes;
};
cudaError_t pack_rows(const StreamMove& move, cudaStream_t stream);    // packed <- streams
cudaError_t unpack_rows(const StreamMove& move, cudaStream_t stream);  // streams <- packed

// Token t of sample b is row t - bounds[b] of the sample's L padded rows.
struct PaddedMove {
  Rows packed;
  Rows padded;            // the rows of one sample
  int64_t sample_stride;  // bytes between samples
  const int32_t* bounds;  // [B + 1]
  bool* mask;             // [B, L], for pad_rows
  int64_t samples, length, total, row_bytes;
};
cudaError_t pad_rows(const PaddedMove& move, cudaStream_t stream);    // padded <- packed and zeros; mask
cudaError_t unpad_rows(const PaddedMove& move, cudaStream_t stream);  // packed <- padded

// out[r] = packed[rows[r]]; rows are in range.
struct Gather {
  Rows packed, out;
  const void* rows;  // [R], int64 where `wide`, else int32
  bool wide;
  int64_t count, row_bytes;
};
cudaError_t gather_rows(const Gather& gather, cudaStream_t stream);

enum class DType { kFloat32, kBFloat16, kFloat16, kFloat64 };

// out[t] = sum of grad[order[j]] over the j with sorted[j] == t, in the order of j, in fp32 (fp64 for fp64).
struct SortedSum {
  Rows grad, out;
  const void* sorted;    // [R], rising; int64 where `wide`, else int32
  const int64_t* order;  // [R]
  bool wide;
  DType dtype;
  int64_t count, total, width;
};
cudaError_t sum_sorted_rows(const SortedSum& sum, cudaStream_t stream);

// means[n] is the mean of packed[bounds[n] : bounds[n + 1]]; sums in fp32 (fp64 for fp64), always in the same order.
struct SegmentMean {
  Rows packed, means;
  const int32_t* bounds;  // [N + 1]
  DType dtype;
  int64_t segments, total, width;
};
cudaError_t segment_mean(const SegmentMean& mean, cudaStream_t stream);           // means <- packed
cudaError_t segment_mean_backward(const SegmentMean& mean, cudaStream_t stream);  // packed <- means / length

}  // namespace mm::cuda
