// What the translation units of the CPU kernel share. Standard headers are included here, before a
// unit switches its instruction set on, so that no inline function of theirs is compiled with
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

// A buffer of this thread, at least num_bytes, aligned to a page, kept for the next call.
void* scratch(size_t num_bytes);

void portable_rows(const ForwardArgs& args, int64_t begin, int64_t end);
void portable_backward(const BackwardArgs& args, int64_t begin, int64_t end);

#if TOPK_MASK_X86
void avx2_rows(const ForwardArgs& args, int64_t begin, int64_t end);
void avx2_backward(const BackwardArgs& args, int64_t begin, int64_t end);
void avx2_stream_copy(const void* src, void* dst, int64_t num_bytes);
void avx512_rows(const ForwardArgs& args, int64_t begin, int64_t end);
void avx512_backward(const BackwardArgs& args, int64_t begin, int64_t end);
void avx512_stream_copy(const void* src, void* dst, int64_t num_bytes);
#endif

}  // namespace topk_megatron
