// The launchers of the kernels for sparse rows.
#include "topk_mask_cuda.h"
#include "topk_sparse.cuh"

namespace {

using topk_mask::ceil_div;
using topk_mask::kMostBlocks;
using topk_mask::SparseKernel;

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
  const int type = topk_mask::place_of_index(index_bytes);
  if (type < 0 || hidden < 1 || k < 1 || k > hidden || rows < 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  const int64_t blocks = ceil_div(rows, topk_mask::kSparseWarps);
  if (blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  topk_mask::kIndicesKernels[type]<<<static_cast<unsigned>(blocks), topk_mask::kSparseThreads, 0,
                                     static_cast<cudaStream_t>(stream)>>>(bits, indices, rows,
                                                                          hidden, k);
  return cudaGetLastError();
}

int topk_gather_row_cuda(const void* x, const void* indices, void* values, int64_t rows, int hidden,
                         int k, int word_bytes, int index_bytes, void* stream) {
  const int place = topk_mask::place_of_sparse(word_bytes, index_bytes);
  if (place < 0 || hidden < 1 || k < 1 || rows < 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return launch(topk_mask::kGatherKernels[place], ceil_div(rows, topk_mask::kSparseWarps), 0, x,
                indices, values, rows, hidden, k, stream);
}

int topk_scatter_row_cuda(const void* values, const void* indices, void* x, int64_t rows,
                          int hidden, int k, int word_bytes, int index_bytes, void* stream) {
  const int place = topk_mask::place_of_sparse(word_bytes, index_bytes);
  if (place < 0 || hidden < 1 || k < 0 || rows < 0) return cudaErrorInvalidValue;
  if (rows == 0) return cudaSuccess;
  return launch(topk_mask::kScatterKernels[place], rows,
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
