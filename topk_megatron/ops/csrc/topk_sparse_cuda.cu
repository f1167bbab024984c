// The launchers of the kernels for sparse rows.
#include "topk_mask_cuda.h"
#include "topk_sparse.cuh"

namespace {

using topk_mask::ceil_div;

constexpr int64_t kMostBlocks = 0x7fffffff;
constexpr int kNumWordSizes = 3;

using IndicesKernel = void (*)(const uint32_t*, void*, int64_t, int, int);
#define TOPK_KERNEL_POINTER(index_name, ...) topk_mask::topk_bits_to_indices_##index_name,
const IndicesKernel kIndicesKernels[] = {TOPK_INDEX_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

// Ordered by index type, then by word size.
using SparseKernel = void (*)(const void*, const void*, void*, int64_t, int, int);
#define TOPK_KERNEL_POINTER(index_name, Index, word_bits, Word) \
  topk_mask::topk_gather_row_##word_bits##bit_##index_name,
const SparseKernel kGatherKernels[] = {TOPK_INDEX_AND_WORD_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER
#define TOPK_KERNEL_POINTER(index_name, Index, word_bits, Word) \
  topk_mask::topk_scatter_row_##word_bits##bit_##index_name,
const SparseKernel kScatterKernels[] = {TOPK_INDEX_AND_WORD_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

int index_of_index_type(int bytes) {
  return bytes == 1 ? 0 : bytes == 2 ? 1 : bytes == 4 ? 2 : bytes == 8 ? 3 : -1;
}
int index_of_word(int bytes) { return bytes == 2 ? 0 : bytes == 4 ? 1 : bytes == 8 ? 2 : -1; }

int launch(SparseKernel kernel, int64_t blocks, size_t shared_bytes, const void* from,
           const void* indices, void* to, int64_t rows, int hidden, int k, void* stream) {
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  kernel<<<static_cast<unsigned>(blocks), topk_mask::kSparseThreads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(from, indices, to, rows, hidden, k);
  return cudaGetLastError();
}

}  // namespace

int topk_bits_to_indices_cuda(const uint32_t* bits, void* indices, int64_t rows, int hidden, int k,
                              int index_bytes, void* stream) {
  const int type = index_of_index_type(index_bytes);
  if (type < 0 || hidden < 1 || k < 1 || k > hidden || rows < 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(rows, topk_mask::kSparseWarps);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  kIndicesKernels[type]<<<static_cast<unsigned>(blocks), topk_mask::kSparseThreads, 0,
                          static_cast<cudaStream_t>(stream)>>>(bits, indices, rows, hidden, k);
  return cudaGetLastError();
}

int topk_gather_row_cuda(const void* x, const void* indices, void* values, int64_t rows, int hidden,
                         int k, int word_bytes, int index_bytes, void* stream) {
  const int type = index_of_index_type(index_bytes), word = index_of_word(word_bytes);
  if (type < 0 || word < 0 || hidden < 1 || k < 1 || rows < 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return launch(kGatherKernels[type * kNumWordSizes + word],
                ceil_div(rows, topk_mask::kSparseWarps), 0, x, indices, values, rows, hidden, k,
                stream);
}

int topk_scatter_row_cuda(const void* values, const void* indices, void* x, int64_t rows,
                          int hidden, int k, int word_bytes, int index_bytes, void* stream) {
  const int type = index_of_index_type(index_bytes), word = index_of_word(word_bytes);
  if (type < 0 || word < 0 || hidden < 1 || k < 0 || rows < 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return launch(kScatterKernels[type * kNumWordSizes + word], rows,
                topk_mask::scatter_shared_bytes(hidden, word_bytes), values, indices, x, rows,
                hidden, k, stream);
}

int topk_count_bits_cuda(const uint32_t* bits, int64_t* counts, int64_t rows, int hidden,
                         void* stream) {
  if (hidden < 1 || rows < 0) return cudaErrorInvalidValue;
  constexpr int64_t kMostRows = 65535ll * topk_mask::kCountedRows;  // a grid's limit in y
  for (int64_t first = 0; first < rows; first += kMostRows) {
    const int64_t part = rows - first < kMostRows ? rows - first : kMostRows;
    const dim3 blocks(static_cast<unsigned>(ceil_div(hidden, topk_mask::kSparseThreads)),
                      static_cast<unsigned>(ceil_div(part, topk_mask::kCountedRows)));
    topk_mask::topk_count_bits<<<blocks, topk_mask::kSparseThreads, 0,
                                 static_cast<cudaStream_t>(stream)>>>(
        bits + first * ((hidden + 31) / 32), reinterpret_cast<unsigned long long*>(counts), part,
        hidden);
    if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}
