// The CUDA kernels as a shared library that runs them on the CPU, for tests that use ctypes.
#include "cuda_emulation.h"

#include "topk_mask.cuh"
#include "topk_sparse.cuh"

namespace {

using ForwardKernel = void (*)(const void*, void*, uint32_t*, int64_t, int, int);

#define TOPK_KERNEL_POINTER(name, ...) topk_mask::name,
const ForwardKernel kForwardKernels[] = {TOPK_FORWARD_KERNELS(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

using IndicesKernel = void (*)(const uint32_t*, void*, int64_t, int, int);
#define TOPK_KERNEL_POINTER(index_name, ...) topk_mask::topk_bits_to_indices_##index_name,
const IndicesKernel kIndicesKernels[] = {TOPK_INDEX_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

using SparseKernel = void (*)(const void*, const void*, void*, int64_t, int, int);
#define TOPK_KERNEL_POINTER(index_name, Index, word_bits, Word) \
  topk_mask::topk_gather_row_##word_bits##bit_##index_name,
const SparseKernel kGatherKernels[] = {TOPK_INDEX_AND_WORD_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER
#define TOPK_KERNEL_POINTER(index_name, Index, word_bits, Word) \
  topk_mask::topk_scatter_row_##word_bits##bit_##index_name,
const SparseKernel kScatterKernels[] = {TOPK_INDEX_AND_WORD_TYPES(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

// 0 to 3 for 1, 2, 4 and 8 bytes.
int log2_of(int bytes) { return __builtin_ctz(bytes); }

template <class Kernel, class... Args>
void launch(int64_t blocks, int64_t blocks_y, unsigned threads, size_t shared_bytes, uint64_t seed,
            Kernel kernel, Args... args) {
  const cuda_emulation::Index grid = {static_cast<unsigned>(blocks),
                                      static_cast<unsigned>(blocks_y)};
  cuda_emulation::Block::current().launch(grid, threads, shared_bytes, seed, kernel, args...);
}

}  // namespace

// The launcher's twin. resident: blocks that run at a time on the emulated device. seed: determines
// the schedule. Returns the variant that ran.
extern "C" int emulated_forward(const void* x, void* y, uint32_t* bits, int64_t rows, int hidden,
                                int k, int dtype, int mode, int64_t resident, uint64_t seed) {
  const bool aligned = topk_mask::rows_aligned(x, y, hidden, topk_mask::element_bytes(dtype));
  const topk_mask::Plan plan = topk_mask::plan_forward(rows, hidden, dtype, aligned);
  const int index = (dtype * 2 + mode) * topk_mask::kNumVariants + plan.variant;
  const int64_t blocks = topk_mask::persistent_blocks(plan.blocks, resident);
  launch(blocks, 1, plan.threads, plan.shared_bytes, seed, kForwardKernels[index], x, y, bits, rows,
         hidden, k);
  return plan.variant;
}

extern "C" void emulated_backward(const void* dy, const uint32_t* bits, void* dx, int64_t rows,
                                  int hidden, int dtype, uint64_t seed) {
  const topk_mask::BackwardPlan plan = topk_mask::plan_backward(dy, dx, rows, hidden, dtype);
  const auto flat = dtype == 0 ? topk_mask::topk_mask_backward_32bit_flat
                               : topk_mask::topk_mask_backward_16bit_flat;
  const auto by_rows = dtype == 0 ? topk_mask::topk_mask_backward_32bit_rows
                                  : topk_mask::topk_mask_backward_16bit_rows;
  launch(plan.blocks, 1, topk_mask::kBackwardThreads, 0, seed, plan.flat ? flat : by_rows, dy, bits,
         dx, rows, hidden);
}

extern "C" void emulated_bits_to_indices(const uint32_t* bits, void* indices, int64_t rows,
                                         int hidden, int k, int index_bytes, uint64_t seed) {
  launch(topk_mask::ceil_div(rows, topk_mask::kSparseWarps), 1, topk_mask::kSparseThreads, 0, seed,
         kIndicesKernels[log2_of(index_bytes)], bits, indices, rows, hidden, k);
}

extern "C" void emulated_gather_row(const void* x, const void* indices, void* values, int64_t rows,
                                    int hidden, int k, int word_bytes, int index_bytes,
                                    uint64_t seed) {
  launch(topk_mask::ceil_div(rows, topk_mask::kSparseWarps), 1, topk_mask::kSparseThreads, 0, seed,
         kGatherKernels[log2_of(index_bytes) * 3 + log2_of(word_bytes) - 1], x, indices, values,
         rows, hidden, k);
}

extern "C" void emulated_scatter_row(const void* values, const void* indices, void* x, int64_t rows,
                                     int hidden, int k, int word_bytes, int index_bytes,
                                     uint64_t seed) {
  launch(rows, 1, topk_mask::kSparseThreads, topk_mask::scatter_shared_bytes(hidden, word_bytes),
         seed, kScatterKernels[log2_of(index_bytes) * 3 + log2_of(word_bytes) - 1], values, indices,
         x, rows, hidden, k);
}

extern "C" void emulated_count_bits(const uint32_t* bits, int64_t* counts, int64_t rows, int hidden,
                                    uint64_t seed) {
  launch(topk_mask::ceil_div(hidden, topk_mask::kSparseThreads),
         topk_mask::ceil_div(rows, topk_mask::kCountedRows), topk_mask::kSparseThreads, 0, seed,
         topk_mask::topk_count_bits, bits, reinterpret_cast<unsigned long long*>(counts), rows,
         hidden);
}
