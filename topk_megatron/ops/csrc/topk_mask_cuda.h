// The operator's entry points on CUDA, with plain pointers and without torch headers.
//
// Both launch on `stream` and return at once, without synchronisation or allocation, so they can be
// captured in a CUDA graph. Every pointer is device memory; rows are contiguous, `hidden` elements
// each.
#pragma once

#include <stdint.h>

// dtype: 0 float32, 1 bfloat16, 2 float16; mode: 0 value, 1 abs; 1 <= k <= hidden.
// bits: rows * ceil(hidden / 32) words. Returns a cudaError_t as int (0 = success).
int topk_mask_cuda_forward(const void* x, void* y, uint32_t* bits, int64_t rows, int hidden, int k,
                           int dtype, int mode, void* stream);

// dx = dy where the bit is set, +0 elsewhere.
int topk_mask_cuda_backward(const void* dy, const uint32_t* bits, void* dx, int64_t rows,
                            int hidden, int dtype, void* stream);
