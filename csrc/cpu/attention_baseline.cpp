// The attention kernels for any CPU: vectors of 4 floats.
#include "attention.h"

#define MM_ISA baseline
#define MM_TABLE kBaseline
#define MM_LANES 4
#define MM_ROWS 4
#define MM_TERMS 1
#include "attention_kernels.h"
