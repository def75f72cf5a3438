// The attention kernels of bf16 for CPUs that multiply it (AVX512_BF16: Zen 4, Cooper Lake, Sapphire Rapids and later).
#include <cstring>
#include <utility>

#include "attention.h"

#if MM_ATTENTION_X86
#pragma GCC target("arch=x86-64-v4", "avx512bf16")
#define MM_ISA avx512_bf16
#define MM_TABLE kAvx512Bf16
#define MM_LANES 16
#define MM_ROWS 12
#define MM_TERMS 2
#include "attention_kernels.h"
#endif
