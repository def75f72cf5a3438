// See packing.h.   Sums of packed rows: each output row has one owner and a fixed order, so there are no atomics.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "packing_rows.cuh"

namespace mm::cuda {
namespace {

constexpr int kWarps = kThreads / 32;
constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;

template <class T>
struct AccumulatorOf {
  using type = float;
};
template <>
struct AccumulatorOf<double> {
  using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(__half x) { return __half2float(x); }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(double x, double* to) { *to = x; }
__device__ inline void narrow(float x, __nv_bfloat16* to) { *to = __float2bfloat16(x); }
__device__ inline void narrow(float x, __half* to) { *to = __float2half(x); }

// K neighbouring elements: 16 bytes, or one element where rows are not aligned for that.
template <class T, int K>
struct alignas(sizeof(T) * K) Pack {
  T values[K];
};

template <class T, int K>
__device__ void add_to(Accumulator<T> (&sums)[K], const T* from) {
  const auto read = *reinterpret_cast<const Pack<T, K>*>(from);
#pragma unroll
  for (int k = 0; k < K; ++k) sums[k] += widen(read.values[k]);
}

template <class T, int K>
__device__ void store(const Accumulator<T> (&sums)[K], Accumulator<T> divisor, T* to) {
  Pack<T, K> written;
#pragma unroll
  for (int k = 0; k < K; ++k) narrow(sums[k] / divisor, &written.values[k]);
  *reinterpret_cast<Pack<T, K>*>(to) = written;
}

template <class T>
__device__ T* row_at(const Rows& rows, int64_t row) {
  return reinterpret_cast<T*>(rows.data + row * rows.stride);
}

template <class T, int K, class Index>
__global__ void __launch_bounds__(kThreads, kResident) sum_sorted(__grid_constant__ const SortedSum sum, Lanes lanes) {
  const int64_t t = lanes.row();
  if (t >= sum.total) return;
  const auto* sorted = static_cast<const Index*>(sum.sorted);
  int64_t first = 0, high = sum.count;  // the first j with sorted[j] >= t
  while (first < high) {
    const int64_t middle = (first + high) / 2;
    if (sorted[middle] < t) {
      first = middle + 1;
    } else {
      high = middle;
    }
  }
  T* out = row_at<T>(sum.out, t);
  for (int64_t e = static_cast<int64_t>(lanes.lane()) * K; e < sum.width;
       e += static_cast<int64_t>(lanes.count()) * K) {
    Accumulator<T> sums[K] = {};
    for (int64_t j = first; j < sum.count && sorted[j] == t; ++j) {
      add_to<T, K>(sums, row_at<T>(sum.grad, sum.order[j]) + e);
    }
    store<T, K>(sums, 1, out + e);
  }
}

// A block per segment and strip of columns.  Warp w adds tokens w, w + 8, ...; then the warps' sums are added in order.
template <class T, int K>
__global__ void __launch_bounds__(kThreads, kResident) mean(__grid_constant__ const SegmentMean mean, int strips) {
  __shared__ Accumulator<T> partial[kWarps][32][K];
  const int64_t n = blockIdx.x / strips;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t e = (static_cast<int64_t>(blockIdx.x % strips) * 32 + lane) * K;
  const int64_t begin = mean.bounds[n], end = mean.bounds[n + 1];
  Accumulator<T> sums[K] = {};
  if (e < mean.width) {
    for (int64_t t = begin + warp; t < end; t += kWarps) add_to<T, K>(sums, row_at<T>(mean.packed, t) + e);
  }
#pragma unroll
  for (int k = 0; k < K; ++k) partial[warp][lane][k] = sums[k];
  __syncthreads();
  if (warp != 0 || e >= mean.width) return;
  for (int w = 1; w < kWarps; ++w) {
#pragma unroll
    for (int k = 0; k < K; ++k) sums[k] += partial[w][lane][k];
  }
  store<T, K>(sums, static_cast<Accumulator<T>>(end > begin ? end - begin : 1), row_at<T>(mean.means, n) + e);
}

template <class T, int K>
__global__ void __launch_bounds__(kThreads, kResident) spread(__grid_constant__ const SegmentMean mean, Lanes lanes) {
  const int64_t t = lanes.row();
  if (t >= mean.total) return;
  const int64_t n = run_of(mean.bounds, mean.segments, t);
  const auto length = static_cast<Accumulator<T>>(mean.bounds[n + 1] - mean.bounds[n]);
  const T* from = row_at<T>(mean.means, n);
  T* to = row_at<T>(mean.packed, t);
  for (int64_t e = static_cast<int64_t>(lanes.lane()) * K; e < mean.width;
       e += static_cast<int64_t>(lanes.count()) * K) {
    Accumulator<T> share[K] = {};
    add_to<T, K>(share, from + e);
    store<T, K>(share, length, to + e);
  }
}

// launch(T{}, K) with K = 16 bytes of elements where addresses, strides and the width allow, else 1.
template <class T, class Launch>
void with_pack(uint64_t alignment, int64_t width, const Launch& launch) {
  constexpr int kWide = 16 / sizeof(T);
  if (alignment % 16 == 0 && width % kWide == 0) {
    launch(T{}, std::integral_constant<int, kWide>{});
  } else {
    launch(T{}, std::integral_constant<int, 1>{});
  }
}

template <class Launch>
cudaError_t with_type(DType dtype, uint64_t alignment, int64_t width, const Launch& launch) {
  switch (dtype) {
    case DType::kFloat32:
      with_pack<float>(alignment, width, launch);
      break;
    case DType::kBFloat16:
      with_pack<__nv_bfloat16>(alignment, width, launch);
      break;
    case DType::kFloat16:
      with_pack<__half>(alignment, width, launch);
      break;
    case DType::kFloat64:
      with_pack<double>(alignment, width, launch);
      break;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t sum_sorted_rows(const SortedSum& sum, cudaStream_t stream) {
  if (sum.total == 0 || sum.width == 0) return cudaSuccess;
  return with_type(sum.dtype, places(sum.grad) | places(sum.out), sum.width, [&](auto type, auto pack) {
    using T = decltype(type);
    constexpr int K = decltype(pack)::value;
    const Lanes lanes = lanes_for(sum.width / K);
    unsigned blocks = 0;
    blocks_for(sum.total, lanes, &blocks);
    if (sum.wide) {
      sum_sorted<T, K, int64_t><<<blocks, kThreads, 0, stream>>>(sum, lanes);
    } else {
      sum_sorted<T, K, int32_t><<<blocks, kThreads, 0, stream>>>(sum, lanes);
    }
  });
}

cudaError_t segment_mean(const SegmentMean& what, cudaStream_t stream) {
  if (what.segments == 0 || what.width == 0) return cudaSuccess;
  if (what.segments > kMaxBlocks / (what.width / 32 + 1)) return cudaErrorInvalidConfiguration;
  return with_type(what.dtype, places(what.packed) | places(what.means), what.width, [&](auto type, auto pack) {
    constexpr int K = decltype(pack)::value;
    const int strips = static_cast<int>((what.width + 32 * K - 1) / (32 * K));
    const auto blocks = static_cast<unsigned>(what.segments * strips);
    mean<decltype(type), K><<<blocks, kThreads, 0, stream>>>(what, strips);
  });
}

cudaError_t segment_mean_backward(const SegmentMean& what, cudaStream_t stream) {
  if (what.total == 0 || what.width == 0) return cudaSuccess;
  return with_type(what.dtype, places(what.packed) | places(what.means), what.width, [&](auto type, auto pack) {
    constexpr int K = decltype(pack)::value;
    const Lanes lanes = lanes_for(what.width / K);
    unsigned blocks = 0;
    blocks_for(what.total, lanes, &blocks);
    spread<decltype(type), K><<<blocks, kThreads, 0, stream>>>(what, lanes);
  });
}

}  // namespace mm::cuda
