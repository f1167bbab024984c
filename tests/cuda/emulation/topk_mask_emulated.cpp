// The CUDA kernels as a shared library that runs them on the CPU, for tests that use ctypes.
#include "cuda_emulation.h"

#include "topk_mask.cuh"
#include "topk_sparse.cuh"

namespace {

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
  const int64_t blocks = topk_mask::persistent_blocks(plan.blocks, resident);
  launch(blocks, 1, plan.threads, plan.shared_bytes, seed,
         topk_mask::forward_kernel(dtype, mode, plan.variant), x, y, bits, rows, hidden, k);
  return plan.variant;
}

extern "C" void emulated_backward(const void* dy, const uint32_t* bits, void* dx, int64_t rows,
                                  int hidden, int dtype, uint64_t seed) {
  const topk_mask::BackwardPlan plan = topk_mask::plan_backward(dy, dx, rows, hidden, dtype);
  launch(plan.blocks, 1, topk_mask::kBackwardThreads, 0, seed,
         topk_mask::backward_kernel(dtype, plan.flat), dy, bits, dx, rows, hidden);
}

extern "C" void emulated_bits_to_indices(const uint32_t* bits, void* indices, int64_t rows,
                                         int hidden, int k, int index_bytes, uint64_t seed) {
  launch(topk_mask::ceil_div(rows, topk_mask::kSparseWarps), 1, topk_mask::kSparseThreads, 0, seed,
         topk_mask::kIndicesKernels[topk_mask::place_of_index(index_bytes)], bits, indices, rows,
         hidden, k);
}

extern "C" void emulated_gather_row(const void* x, const void* indices, void* values, int64_t rows,
                                    int hidden, int k, int word_bytes, int index_bytes,
                                    uint64_t seed) {
  launch(topk_mask::ceil_div(rows, topk_mask::kSparseWarps), 1, topk_mask::kSparseThreads, 0, seed,
         topk_mask::kGatherKernels[topk_mask::place_of_sparse(word_bytes, index_bytes)], x, indices,
         values, rows, hidden, k);
}

extern "C" void emulated_scatter_row(const void* values, const void* indices, void* x, int64_t rows,
                                     int hidden, int k, int word_bytes, int index_bytes,
                                     uint64_t seed) {
  const int place = topk_mask::place_of_sparse(word_bytes, index_bytes);
  launch(rows, 1, topk_mask::kSparseThreads, topk_mask::scatter_shared_bytes(hidden, word_bytes),
         seed, topk_mask::kScatterKernels[place], values, indices, x, rows, hidden, k);
}

extern "C" void emulated_count_bits(const uint32_t* bits, int64_t* counts, int64_t rows, int hidden,
                                    uint64_t seed) {
  launch(topk_mask::ceil_div(hidden, topk_mask::kSparseThreads),
         topk_mask::ceil_div(rows, topk_mask::kCountedRows), topk_mask::kSparseThreads, 0, seed,
         topk_mask::topk_count_bits, bits, reinterpret_cast<unsigned long long*>(counts), rows,
         hidden);
}
