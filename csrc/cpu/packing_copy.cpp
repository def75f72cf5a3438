// See packing_copy.h.   The vector width of streaming stores is chosen at run time: AVX-512, AVX2, or plain memcpy.
#include "packing_copy.h"

#include <cstdio>
#include <cstring>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) && defined(__GNUC__)
#define MM_STREAMING 1
#include <immintrin.h>
#endif

namespace mm::cpu {
namespace {

constexpr int64_t kLine = 64;             // bytes of a cache line
constexpr int64_t kShortest = 8 * kLine;  // shorter runs are mostly ends, which are not streamed
constexpr int64_t kDefaultCache = int64_t{32} << 20;
constexpr int64_t kHugePage = int64_t{2} << 20;

#if MM_STREAMING
// lines whole cache lines; `to` starts on one.
using StreamLines = void (*)(char* to, const char* from, int64_t lines);

__attribute__((target("avx512f"))) void copy_avx512(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * kLine), _mm512_loadu_si512(from + i * kLine));
  }
}

__attribute__((target("avx512f"))) void zero_avx512(char* to, const char*, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to + i * kLine), _mm512_setzero_si512());
  }
}

__attribute__((target("avx2"))) void copy_avx2(char* to, const char* from, int64_t lines) {
  for (int64_t i = 0; i < lines; ++i) {
    const auto* source = reinterpret_cast<const __m256i*>(from + i * kLine);
    auto* target = reinterpret_cast<__m256i*>(to + i * kLine);
    const __m256i low = _mm256_loadu_si256(source), high = _mm256_loadu_si256(source + 1);
    _mm256_stream_si256(target, low);
    _mm256_stream_si256(target + 1, high);
  }
}

__attribute__((target("avx2"))) void zero_avx2(char* to, const char*, int64_t lines) {
  for (int64_t i = 0; i < 2 * lines; ++i) {
    _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i * (kLine / 2)), _mm256_setzero_si256());
  }
}

struct Streaming {
  StreamLines copy = nullptr, zero = nullptr;
};

const Streaming& streaming() {
  static const Streaming chosen = [] {
    if (__builtin_cpu_supports("avx512f")) return Streaming{copy_avx512, zero_avx512};
    if (__builtin_cpu_supports("avx2")) return Streaming{copy_avx2, zero_avx2};
    return Streaming{};
  }();
  return chosen;
}

// Bytes before the first cache line that starts in [to, ...).
int64_t head_of(const char* to) { return -static_cast<int64_t>(reinterpret_cast<uintptr_t>(to)) & (kLine - 1); }
#endif

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

int64_t last_level_cache_bytes() {
  static const int64_t bytes = read_cache_bytes();
  return bytes;
}

Store store_for(int64_t bytes) { return bytes > last_level_cache_bytes() / 2 ? Store::kStreaming : Store::kCached; }

void copy_bytes(char* to, const char* from, int64_t bytes, Store store) {
#if MM_STREAMING
  if (store == Store::kStreaming && bytes >= kShortest && streaming().copy != nullptr) {
    const int64_t head = head_of(to), lines = (bytes - head) / kLine, done = head + lines * kLine;
    std::memcpy(to, from, static_cast<size_t>(head));
    streaming().copy(to + head, from + head, lines);
    std::memcpy(to + done, from + done, static_cast<size_t>(bytes - done));
    return;
  }
#endif
  if (bytes > 0) std::memcpy(to, from, static_cast<size_t>(bytes));
}

void zero_bytes(char* to, int64_t bytes, Store store) {
#if MM_STREAMING
  if (store == Store::kStreaming && bytes >= kShortest && streaming().zero != nullptr) {
    const int64_t head = head_of(to), lines = (bytes - head) / kLine, done = head + lines * kLine;
    std::memset(to, 0, static_cast<size_t>(head));
    streaming().zero(to + head, nullptr, lines);
    std::memset(to + done, 0, static_cast<size_t>(bytes - done));
    return;
  }
#endif
  if (bytes > 0) std::memset(to, 0, static_cast<size_t>(bytes));
}

void finish_stores(Store store) {
#if MM_STREAMING
  if (store == Store::kStreaming) _mm_sfence();
#endif
}

void use_huge_pages(char* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  const auto begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) & ~static_cast<uintptr_t>(kHugePage - 1);
  const auto end =
      (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) & ~static_cast<uintptr_t>(kHugePage - 1);
  // A wish: where the system refuses, pages stay small and everything still works.
  if (begin < end) (void)madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

}  // namespace mm::cpu
