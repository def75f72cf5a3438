// See packing.h.   Copies of packed rows.   Tables of streams stay in the constant bank (__grid_constant__), where an
// index known only at run time costs no local stack.
#include "packing_rows.cuh"

namespace mm::cuda {
namespace {

template <class Vec, bool kUnpack>
__global__ void __launch_bounds__(kThreads, kResident)
    move_streams(__grid_constant__ const StreamMove move, Lanes lanes) {
  const int64_t t = lanes.row();
  if (t >= move.total) return;
  const Rows& rows = move.streams[move.modality_ids[t]];
  char* stream = rows.data + move.source_rows[t] * rows.stride;
  char* packed = move.packed.data + t * move.packed.stride;
  const int bytes = static_cast<int>(move.row_bytes);
  if constexpr (kUnpack) {
    copy_row<Vec>(packed, stream, bytes, lanes);
  } else {
    copy_row<Vec>(stream, packed, bytes, lanes);
  }
}

template <class Vec>
__global__ void __launch_bounds__(kThreads, kResident) pad(__grid_constant__ const PaddedMove move, Lanes lanes) {
  const int64_t row = lanes.row();
  if (row >= move.samples * move.length) return;
  const int64_t b = row / move.length, place = row - b * move.length;
  const int64_t t = move.bounds[b] + place;
  const bool filled = t < move.bounds[b + 1];
  char* padded = move.padded.data + b * move.sample_stride + place * move.padded.stride;
  const int bytes = static_cast<int>(move.row_bytes);
  if (filled) {
    copy_row<Vec>(move.packed.data + t * move.packed.stride, padded, bytes, lanes);
  } else {
    zero_row<Vec>(padded, bytes, lanes);
  }
  if (lanes.lane() == 0) move.mask[row] = filled;
}

template <class Vec>
__global__ void __launch_bounds__(kThreads, kResident) unpad(__grid_constant__ const PaddedMove move, Lanes lanes) {
  const int64_t t = lanes.row();
  if (t >= move.total) return;
  const int64_t b = run_of(move.bounds, move.samples, t);
  const char* padded = move.padded.data + b * move.sample_stride + (t - move.bounds[b]) * move.padded.stride;
  copy_row<Vec>(padded, move.packed.data + t * move.packed.stride, static_cast<int>(move.row_bytes), lanes);
}

template <class Vec, class Index>
__global__ void __launch_bounds__(kThreads, kResident) gather(__grid_constant__ const Gather gather, Lanes lanes) {
  const int64_t r = lanes.row();
  if (r >= gather.count) return;
  const int64_t row = static_cast<const Index*>(gather.rows)[r];
  copy_row<Vec>(gather.packed.data + row * gather.packed.stride, gather.out.data + r * gather.out.stride,
                static_cast<int>(gather.row_bytes), lanes);
}

template <bool kUnpack>
cudaError_t launch_streams(const StreamMove& move, cudaStream_t stream) {
  uint64_t alignment = places(move.packed);
  for (int m = 0; m < move.num_streams; ++m) alignment |= places(move.streams[m]);
  return with_vectors(alignment, move.total, move.row_bytes, [&](auto vec, Lanes lanes, unsigned blocks) {
    move_streams<decltype(vec), kUnpack><<<blocks, kThreads, 0, stream>>>(move, lanes);
  });
}

uint64_t places(const PaddedMove& move) {
  return places(move.packed) | places(move.padded) | static_cast<uint64_t>(move.sample_stride);
}

}  // namespace

cudaError_t pack_rows(const StreamMove& move, cudaStream_t stream) { return launch_streams<false>(move, stream); }

cudaError_t unpack_rows(const StreamMove& move, cudaStream_t stream) { return launch_streams<true>(move, stream); }

cudaError_t pad_rows(const PaddedMove& move, cudaStream_t stream) {
  const int64_t rows = move.samples * move.length;
  return with_vectors(places(move), rows, move.row_bytes, [&](auto vec, Lanes lanes, unsigned blocks) {
    pad<decltype(vec)><<<blocks, kThreads, 0, stream>>>(move, lanes);
  });
}

cudaError_t unpad_rows(const PaddedMove& move, cudaStream_t stream) {
  return with_vectors(places(move), move.total, move.row_bytes, [&](auto vec, Lanes lanes, unsigned blocks) {
    unpad<decltype(vec)><<<blocks, kThreads, 0, stream>>>(move, lanes);
  });
}

cudaError_t gather_rows(const Gather& what, cudaStream_t stream) {
  const uint64_t alignment = places(what.packed) | places(what.out);
  return with_vectors(alignment, what.count, what.row_bytes, [&](auto vec, Lanes lanes, unsigned blocks) {
    if (what.wide) {
      gather<decltype(vec), int64_t><<<blocks, kThreads, 0, stream>>>(what, lanes);
    } else {
      gather<decltype(vec), int32_t><<<blocks, kThreads, 0, stream>>>(what, lanes);
    }
  });
}

}  // namespace mm::cuda
