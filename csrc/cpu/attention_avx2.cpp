// The attention kernels for x86-64-v3: 8 floats to a vector.
#include <cstring>
#include <utility>

#include "attention.h"

#if MM_ATTENTION_X86
#pragma GCC target("arch=x86-64-v3")
#define MM_ISA avx2
#define MM_TABLE kAvx2
#define MM_LANES 8
#define MM_ROWS 6
#define MM_TERMS 1
#include "attention_kernels.h"
#endif
