// The attention kernels for x86-64-v4: 16 floats to a vector.
#include <cstring>
#include <utility>

#include "attention.h"

#if MM_ATTENTION_X86
#pragma GCC target("arch=x86-64-v4")
#define MM_ISA avx512
#define MM_TABLE kAvx512
#define MM_LANES 16
#define MM_ROWS 12
#define MM_TERMS 1
#include "attention_kernels.h"
#endif
