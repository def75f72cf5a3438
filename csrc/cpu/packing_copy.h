// Copying and zeroing runs of bytes, through the cache or past it.
#pragma once

#include <cstdint>

namespace mm::cpu {

// kStreaming writes around the cache: it saves reading the old contents of `to`, and loses where the result would have
// fitted into the cache and is read next.
enum class Store { kCached, kStreaming };

// How a call that writes `bytes` in all should store: past the cache above half of the last-level cache.
Store store_for(int64_t bytes);

void copy_bytes(char* to, const char* from, int64_t bytes, Store store);
void zero_bytes(char* to, int64_t bytes, Store store);

// Makes streamed bytes visible to other threads: each thread calls it after its last copy.
void finish_stores(Store store);

}  // namespace mm::cpu
