// Shared by the translation units of the CPU kernel. Standard headers are included here, before a
// unit enables its instruction set, so that none of their inline functions is compiled with
// instructions that the CPU may lack.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "topk_mask_cpu.h"
#include "topk_mask_cpu_keys.h"

#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#define TOPK_MASK_X86 1
#else
#define TOPK_MASK_X86 0
#endif

namespace topk_megatron {

// This thread's buffer: at least num_bytes, aligned to a page, and kept for the next call.
void* scratch(size_t num_bytes);

// The entry points that one translation unit compiles for its instruction set; they are defined in
// topk_mask_cpu_entry.h.
struct Unit {
  void (*forward)(const ForwardArgs& args, int64_t begin, int64_t end);
  void (*backward)(const BackwardArgs& args, int64_t begin, int64_t end);
  void (*stream_copy)(const void* src, void* dst, int64_t num_bytes);
};

#if TOPK_MASK_X86
extern const Unit kAvx2, kAvx512;
#endif

// Forward by integer keys: for rows that another unit leaves to the portable path.
void portable_rows(const ForwardArgs& args, int64_t begin, int64_t end);

}  // namespace topk_megatron
