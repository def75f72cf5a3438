// See packing_copy.h.   The vector width is chosen at run time: AVX-512, AVX2, or what memcpy does.
#include "packing_copy.h"

#include <cstdio>
#include <cstring>
#include <initializer_list>

#include "dtypes.h"

#if defined(__x86_64__) && defined(__GNUC__)
#define MM_VECTORS 1
#include <immintrin.h>
#endif

namespace mm::cpu {
namespace {

constexpr int64_t kLine = 64;                    // bytes of a cache line
constexpr int64_t kShortest = 8 * kLine;         // shorter runs are mostly ends, which are not streamed
constexpr int64_t kShortestCached = 32 * kLine;  // memcpy is as good on shorter ones
constexpr int64_t kDefaultCache = int64_t{32} << 20;

#if MM_VECTORS
// `lines` whole cache lines; `to` starts on one.  The cached copies are here too because memcpy turns to `rep movsb` at
// a few KiB, which takes twice the time on some AMD cores where source and target lie unluckily.
using Lines = void (*)(char* to, const char* from, int64_t lines);

template <bool kStream>
__attribute__((target("avx512f"))) void copy_avx512(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    const __m512i line = _mm512_loadu_si512(from + i * kLine);
    auto* target = reinterpret_cast<__m512i*>(to + i * kLine);
    kStream ? _mm512_stream_si512(target, line) : _mm512_store_si512(target, line);
  }
}

template <bool kStream>
__attribute__((target("avx2"))) void copy_avx2(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < 2 * lines; ++i) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from) + i);
    auto* target = reinterpret_cast<__m256i*>(to) + i;
    kStream ? _mm256_stream_si256(target, half) : _mm256_store_si256(target, half);
  }
}

__attribute__((target("avx512f"))) void zero_avx512(char* to, const char*, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * kLine), _mm512_setzero_si512());
  }
}

__attribute__((target("avx2"))) void zero_avx2(char* to, const char*, int64_t lines) {
  for (int64_t i = 0; i < 2 * lines; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to) + i, _mm256_setzero_si256());
  }
}

struct Kernels {
  Lines copy = nullptr, stream = nullptr, stream_zeros = nullptr;
};

const Kernels& kernels() {
  static const Kernels chosen = [] {
    if (MM_X86_LEVEL >= 4 && __builtin_cpu_supports("avx512f")) {
      return Kernels{copy_avx512<false>, copy_avx512<true>, zero_avx512};
    }
    if (MM_X86_LEVEL >= 3 && __builtin_cpu_supports("avx2"))
      return Kernels{copy_avx2<false>, copy_avx2<true>, zero_avx2};
    return Kernels{};
  }();
  return chosen;
}

// Bytes before the first cache line that starts in [to, ...).
int64_t head_of(const char* to) { return -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to)) & (kLine - 1); }
#endif

// Size of the last-level cache that a core sees.
int64_t read_cache_bytes() {
#if defined(__linux__)
  // What a core shares in; sysconf adds up the caches of the whole host on some virtual machines.
  for (const char* path :
       {"/sys/devices/system/cpu/cpu0/cache/index3/size", "/sys/devices/system/cpu/cpu0/cache/index2/size"}) {
    if (std::FILE* file = std::fopen(path, "r")) {
      long kilobytes = 0;
      const int read = std::fscanf(file, "%ldK", &kilobytes);
      std::fclose(file);
      if (read == 1 && kilobytes > 0) return int64_t{kilobytes} << 10;
    }
  }
#endif
  return kDefaultCache;
}

}  // namespace

Store store_for(int64_t bytes) {
  static const int64_t cache = read_cache_bytes();
  return bytes > cache / 2 ? Store::kStreaming : Store::kCached;
}

void copy_bytes(char* to, const char* from, int64_t bytes, Store store) {
#if MM_VECTORS
  const bool stream = store == Store::kStreaming;
  const Lines copy = stream ? kernels().stream : kernels().copy;
  if (bytes >= (stream ? kShortest : kShortestCached) && copy != nullptr) {
    const int64_t head = head_of(to), lines = (bytes - head) / kLine, done = head + lines * kLine;
    std::memcpy(to, from, static_cast<size_t>(head));
    copy(to + head, from + head, lines);
    std::memcpy(to + done, from + done, static_cast<size_t>(bytes - done));
    return;
  }
#endif
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

void zero_bytes(char* to, int64_t bytes, Store store) {
#if MM_VECTORS
  if (store == Store::kStreaming && bytes >= kShortest && kernels().stream_zeros != nullptr) {
    const int64_t head = head_of(to), lines = (bytes - head) / kLine, done = head + lines * kLine;
    std::memset(to, 0, static_cast<size_t>(head));
    kernels().stream_zeros(to + head, nullptr, lines);
    std::memset(to + done, 0, static_cast<size_t>(bytes - done));
    return;
  }
#endif
  if (bytes > 0) std::memset(to, 0, static_cast<size_t>(bytes));
}

void finish_stores(Store store) {
#if MM_VECTORS
  if (store == Store::kStreaming) _mm_sfence();
#endif
}

}  // namespace mm::cpu
