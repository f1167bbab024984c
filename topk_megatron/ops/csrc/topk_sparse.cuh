// The compact form of selected rows: k values and k indices. Three kernels convert between it and
// dense rows, and one counts how often each coordinate was selected. All read what they need once.
// Legend: topk_mask.cuh.
#pragma once

#include "topk_mask_row.cuh"

namespace topk_mask {

// ---- From bits to indices ---------------------------------------------------------------------

constexpr int kSparseThreads = 128;
constexpr int kSparseWarps = kSparseThreads / kLanes;

// Indices of the set bits in ascending order, at most k per row: a warp per row, a word per lane.
template <class Index>
TOPK_INLINE void bits_to_indices(const uint32_t* bits, Index* indices, int64_t rows, int hidden,
                                 int k) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSparseWarps + threadIdx.x / kLanes;
  if (row >= rows) return;
  const int words = (hidden + 31) / 32;
  const uint32_t* from = bits + row * words;
  Index* to = indices + row * k;
  uint32_t written = 0;
  for (int first = 0; first < words; first += kLanes) {
    const int at = first + lane;
    uint32_t word = at < words ? from[at] : 0;
    const uint32_t count = __popc(word), up_to_here = inclusive_scan(count, lane);
    // More than k bits would be a caller's mistake; it must not write outside the row.
    for (uint32_t place = written + up_to_here - count; word != 0; ++place, word &= word - 1)
      if (place < static_cast<uint32_t>(k))
        to[place] = static_cast<Index>(at * 32 + __ffs(word) - 1);
    written += __shfl_sync(kFullWarp, up_to_here, kLanes - 1);
  }
  // Nor must fewer bits leave what happened to be in memory.
  for (uint32_t place = written + lane; place < static_cast<uint32_t>(k); place += kLanes)
    to[place] = 0;
}

// ---- Values at indices, and back --------------------------------------------------------------

// values[i] = x[indices[i]] in every row: a warp per row. An index outside the row gives 0.
template <class Word, class Index>
TOPK_INLINE void gather_row(const Word* x, const Index* indices, Word* values, int64_t rows,
                            int hidden, int k) {
  const int lane = threadIdx.x % kLanes;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kSparseWarps + threadIdx.x / kLanes;
  if (row >= rows) return;
  const Word* from = x + row * hidden;
#pragma unroll 4
  for (int i = lane; i < k; i += kLanes) {
    const uint64_t at = static_cast<uint64_t>(indices[row * k + i]);
    values[row * k + i] = at < static_cast<uint64_t>(hidden) ? from[at] : Word(0);
  }
}

constexpr int kWindowBytes = 16 << 10;  // of a row that a block assembles in shared memory

// x = values at the indices, +0 elsewhere: a block per row, which is assembled in shared memory, so
// that memory sees whole rows only. An index outside the row is left out.
template <class Word, class Index>
TOPK_INLINE void scatter_row(const Word* values, const Index* indices, Word* x, int hidden, int k) {
  TOPK_SHARED_WORDS(shared);
  Word* window = reinterpret_cast<Word*>(shared);
  constexpr int kWindow = kWindowBytes / sizeof(Word), kPerSlot = kSlotBytes / sizeof(Word);
  const int64_t row = blockIdx.x;
  Word* to = x + row * hidden;
  const bool aligned = rows_aligned(x, x, hidden, sizeof(Word));
  for (int first = 0; first < hidden; first += kWindow) {
    const int size = hidden - first < kWindow ? hidden - first : kWindow;
    for (int slot = threadIdx.x; slot * kPerSlot < size; slot += kSparseThreads)
      reinterpret_cast<uint4*>(window)[slot] = make_uint4(0, 0, 0, 0);
    __syncthreads();
    for (int i = threadIdx.x; i < k; i += kSparseThreads) {
      const int64_t at = static_cast<int64_t>(indices[row * k + i]) - first;
      if (at >= 0 && at < size) window[at] = values[row * k + i];
    }
    __syncthreads();
    if (aligned) {
      for (int slot = threadIdx.x; slot * kPerSlot < size; slot += kSparseThreads)
        reinterpret_cast<uint4*>(to + first)[slot] = reinterpret_cast<const uint4*>(window)[slot];
    } else {
      for (int i = threadIdx.x; i < size; i += kSparseThreads) to[first + i] = window[i];
    }
    __syncthreads();
  }
}

inline size_t scatter_shared_bytes(int64_t hidden, int word_bytes) {
  const int64_t bytes = ceil_div(hidden * word_bytes, kSlotBytes) * kSlotBytes;
  return bytes < kWindowBytes ? bytes : kWindowBytes;
}

// ---- How often was a coordinate selected? -----------------------------------------------------

constexpr int kCountedRows = 512;  // of a block

// counts[i] += rows in which bit i is set. A thread has one coordinate; the 32 threads of a word
// read it together.
TOPK_INLINE void count_bits(const uint32_t* bits, unsigned long long* counts, int64_t rows,
                            int hidden) {
  const int at = blockIdx.x * kSparseThreads + threadIdx.x;
  if (at >= hidden) return;
  const int words = (hidden + 31) / 32;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kCountedRows;
  const int64_t last = first + kCountedRows < rows ? first + kCountedRows : rows;
  const uint32_t* word = bits + first * words + at / 32;
  uint32_t count = 0;
#pragma unroll 8
  for (int64_t row = first; row < last; ++row, word += words) count += *word >> (at % 32) & 1u;
  if (count != 0) atomicAdd(&counts[at], static_cast<unsigned long long>(count));
}

// ---- Kernels ----------------------------------------------------------------------------------

// X(name of the index type, index type)
#define TOPK_INDEX_TYPES(X) X(u8, uint8_t) X(i16, int16_t) X(i32, int32_t) X(i64, int64_t)
// X(name of the index type, index type, bits of a value, value as a word)
#define TOPK_INDEX_AND_WORD_TYPES(X)                                                               \
  X(u8, uint8_t, 16, uint16_t) X(u8, uint8_t, 32, uint32_t) X(u8, uint8_t, 64, uint64_t)           \
  X(i16, int16_t, 16, uint16_t) X(i16, int16_t, 32, uint32_t) X(i16, int16_t, 64, uint64_t)        \
  X(i32, int32_t, 16, uint16_t) X(i32, int32_t, 32, uint32_t) X(i32, int32_t, 64, uint64_t)        \
  X(i64, int64_t, 16, uint16_t) X(i64, int64_t, 32, uint32_t) X(i64, int64_t, 64, uint64_t)

#define TOPK_DEFINE_INDICES(index_name, Index)                                                    \
  extern "C" __global__ void __launch_bounds__(kSparseThreads)                                    \
      topk_bits_to_indices_##index_name(const uint32_t* __restrict__ bits,                        \
                                        void* __restrict__ indices, int64_t rows, int hidden,     \
                                        int k) {                                                  \
    bits_to_indices(bits, static_cast<Index*>(indices), rows, hidden, k);                         \
  }
TOPK_INDEX_TYPES(TOPK_DEFINE_INDICES)
#undef TOPK_DEFINE_INDICES

#define TOPK_DEFINE_SPARSE(index_name, Index, word_bits, Word)                                    \
  extern "C" __global__ void __launch_bounds__(kSparseThreads)                                    \
      topk_gather_row_##word_bits##bit_##index_name(                                              \
          const void* __restrict__ x, const void* __restrict__ indices,                           \
          void* __restrict__ values, int64_t rows, int hidden, int k) {                           \
    gather_row(static_cast<const Word*>(x), static_cast<const Index*>(indices),                   \
               static_cast<Word*>(values), rows, hidden, k);                                      \
  }                                                                                               \
  extern "C" __global__ void __launch_bounds__(kSparseThreads)                                    \
      topk_scatter_row_##word_bits##bit_##index_name(                                             \
          const void* __restrict__ values, const void* __restrict__ indices,                      \
          void* __restrict__ x, int64_t /* rows */, int hidden, int k) {                          \
    scatter_row(static_cast<const Word*>(values), static_cast<const Index*>(indices),             \
                static_cast<Word*>(x), hidden, k);                                                \
  }
TOPK_INDEX_AND_WORD_TYPES(TOPK_DEFINE_SPARSE)
#undef TOPK_DEFINE_SPARSE

extern "C" __global__ void __launch_bounds__(kSparseThreads)
    topk_count_bits(const uint32_t* __restrict__ bits, unsigned long long* __restrict__ counts,
                    int64_t rows, int hidden) {
  count_bits(bits, counts, rows, hidden);
}

// ---- Which kernel? ----------------------------------------------------------------------------

using IndicesKernel = void (*)(const uint32_t*, void*, int64_t, int, int);
#define TOPK_KERNEL_POINTER(index_name, ...) topk_bits_to_indices_##index_name,
const IndicesKernel kIndicesKernels[] = {TOPK_INDEX_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

// Ordered by index type, then by word size.
using SparseKernel = void (*)(const void*, const void*, void*, int64_t, int, int);
#define TOPK_KERNEL_POINTER(index_name, Index, word_bits, Word) \
  topk_gather_row_##word_bits##bit_##index_name,
const SparseKernel kGatherKernels[] = {TOPK_INDEX_AND_WORD_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER
#define TOPK_KERNEL_POINTER(index_name, Index, word_bits, Word) \
  topk_scatter_row_##word_bits##bit_##index_name,
const SparseKernel kScatterKernels[] = {TOPK_INDEX_AND_WORD_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

// The place of a size in these tables; -1 if there is no kernel for it.
inline int place_of_index(int bytes) {
  return bytes == 1 ? 0 : bytes == 2 ? 1 : bytes == 4 ? 2 : bytes == 8 ? 3 : -1;
}
inline int place_of_sparse(int word_bytes, int index_bytes) {
  constexpr int kNumWordSizes = 3;
  const int index = place_of_index(index_bytes);
  const int word = word_bytes == 2 ? 0 : word_bytes == 4 ? 1 : word_bytes == 8 ? 2 : -1;
  return index < 0 || word < 0 ? -1 : index * kNumWordSizes + word;
}

}  // namespace topk_mask
