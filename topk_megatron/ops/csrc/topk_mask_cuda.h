// The operator's entry points on CUDA, with plain pointers and without torch headers.
//
// All launch on `stream` and return at once, without synchronisation or allocation, so they can be
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

// Sparse rows: k values and k indices of 1, 2, 4 or 8 bytes (unsigned, signed, signed, signed).
// Values are words of 2, 4 or 8 bytes, moved bitwise.

// Indices of the set bits in ascending order. Every row should have k: of more the first k are
// taken, and missing ones are 0.
int topk_bits_to_indices_cuda(const uint32_t* bits, void* indices, int64_t rows, int hidden, int k,
                              int index_bytes, void* stream);

// values[i] = x[indices[i]]; 0 for an index outside the row.
int topk_gather_row_cuda(const void* x, const void* indices, void* values, int64_t rows, int hidden,
                         int k, int word_bytes, int index_bytes, void* stream);

// x[indices[i]] = values[i], +0 elsewhere; an index outside the row is left out.
int topk_scatter_row_cuda(const void* values, const void* indices, void* x, int64_t rows,
                          int hidden, int k, int word_bytes, int index_bytes, void* stream);

// counts[i] += the number of rows that selected coordinate i.
int topk_count_bits_cuda(const uint32_t* bits, int64_t* counts, int64_t rows, int hidden,
                         void* stream);
