// The attention kernels for one instruction set, as a table named MM_TABLE.   Included once per attention_<isa>.cpp
//
// Everything here is a template or a function of the namespace MM_ISA: nothing that is compiled for a wide instruction
// set can be merged by the linker with what runs everywhere.
#pragma once

#include "attention_backward.h"
#include "attention_forward.h"

namespace mm::cpu::attention {

const Kernels MM_TABLE = {MM_ISA::forward_scratch, MM_ISA::forward_tile, MM_ISA::backward_scratch,
                          MM_ISA::backward_range, MM_LANES * MM_TERMS};

}  // namespace mm::cpu::attention
