// How a group of lanes copies a row, and how launches are shaped.   A row is copied in vectors of 16, 4, 2 or 1 bytes,
// the widest that every address and stride allows, and a tail of bytes.
#pragma once

#include <cstdint>

#include "packing.h"

namespace mm::cuda {

constexpr int kThreads = 256;
constexpr int kUnroll = 4;  // loads in flight per lane
// Blocks per multiprocessor: 64 registers a thread, or ptxas aims lower and spills on sm_80.
constexpr int kResident = 4;

// 2**lane_bits lanes share a row; a block does kThreads >> lane_bits rows.
struct Lanes {
  int bits;
  __device__ int count() const { return 1 << bits; }
  __device__ int lane() const { return static_cast<int>(threadIdx.x) & (count() - 1); }
  // int64: rows * row bytes passes 2**31 at 1M tokens x 3072
  __device__ int64_t row() const {
    return static_cast<int64_t>(blockIdx.x) * (kThreads >> bits) + (static_cast<int>(threadIdx.x) >> bits);
  }
};

template <class Vec>
__device__ void copy_row(const char* __restrict__ from, char* __restrict__ to, int bytes, Lanes lanes) {
  const auto* source = reinterpret_cast<const Vec*>(from);
  auto* target = reinterpret_cast<Vec*>(to);
  const int vectors = bytes / static_cast<int>(sizeof(Vec)), step = lanes.count(), lane = lanes.lane();
  for (int i = lane; i < vectors; i += kUnroll * step) {
    Vec held[kUnroll];
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (i + k * step < vectors) held[k] = source[i + k * step];
    }
#pragma unroll
    for (int k = 0; k < kUnroll; ++k) {
      if (i + k * step < vectors) target[i + k * step] = held[k];
    }
  }
  for (int i = vectors * static_cast<int>(sizeof(Vec)) + lane; i < bytes; i += step) to[i] = from[i];
}

template <class Vec>
__device__ void zero_row(char* to, int bytes, Lanes lanes) {
  const int vectors = bytes / static_cast<int>(sizeof(Vec)), step = lanes.count(), lane = lanes.lane();
  for (int i = lane; i < vectors; i += step) reinterpret_cast<Vec*>(to)[i] = Vec{};
  for (int i = vectors * static_cast<int>(sizeof(Vec)) + lane; i < bytes; i += step) to[i] = 0;
}

// The run that `at` lies in: n with bounds[n] <= at < bounds[n + 1].
__device__ inline int64_t run_of(const int32_t* bounds, int64_t runs, int64_t at) {
  int64_t low = 0, high = runs - 1;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (bounds[middle + 1] > at) {
      high = middle;
    } else {
      low = middle + 1;
    }
  }
  return low;
}

inline uint64_t places(const Rows& rows) {
  return reinterpret_cast<uint64_t>(rows.data) | static_cast<uint64_t>(rows.stride);
}

// Lanes per row: a power of two, at most a warp, no more than there are vectors.
inline Lanes lanes_for(int64_t vectors) {
  int bits = 0;
  while (bits < 5 && (int64_t{1} << bits) < vectors) ++bits;
  return {bits};
}

inline bool blocks_for(int64_t rows, Lanes lanes, unsigned* blocks) {
  const int64_t per_block = kThreads >> lanes.bits, count = (rows + per_block - 1) / per_block;
  *blocks = static_cast<unsigned>(count);
  return count < int64_t{1} << 31;
}

// launch(Vec{}, lanes, blocks) with the widest vector that `alignment` (all addresses and strides, or-ed) allows.
template <class Launch>
cudaError_t with_vectors(uint64_t alignment, int64_t rows, int64_t row_bytes, const Launch& launch) {
  if (rows == 0) return cudaSuccess;
  if (row_bytes >= int64_t{1} << 31) return cudaErrorInvalidValue;
  const auto run = [&](auto vec) {
    const Lanes lanes = lanes_for(row_bytes / static_cast<int64_t>(sizeof(vec)));
    unsigned blocks = 0;
    if (!blocks_for(rows, lanes, &blocks)) return cudaErrorInvalidConfiguration;
    launch(vec, lanes, blocks);
    return cudaGetLastError();
  };
  if (alignment % 16 == 0) return run(uint4{});
  if (alignment % 4 == 0) return run(uint32_t{});
  if (alignment % 2 == 0) return run(uint16_t{});
  return run(uint8_t{});
}

}  // namespace mm::cuda
