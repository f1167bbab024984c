// The CUDA kernels as a shared library that runs them on the CPU, for tests that use ctypes.
#include "cuda_emulation.h"

#include "topk_mask.cuh"

namespace {

using ForwardKernel = void (*)(const void*, void*, uint32_t*, int64_t, int, int);

#define TOPK_KERNEL_POINTER(name, ...) topk_mask::name,
const ForwardKernel kForwardKernels[] = {TOPK_FORWARD_KERNELS(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

}  // namespace

// The launcher's twin. shared_limit: the emulated device's shared memory per block, in bytes.
// seed: determines the schedule. Returns the variant that ran.
extern "C" int emulated_forward(const void* x, void* y, uint32_t* bits, int64_t rows, int hidden,
                                int k, int dtype, int mode, int64_t shared_limit, uint64_t seed) {
  const bool aligned = topk_mask::rows_aligned(x, y, hidden, topk_mask::element_bytes(dtype));
  const topk_mask::Plan plan = topk_mask::plan_forward(rows, hidden, dtype, aligned, shared_limit);
  const int index = (dtype * 2 + mode) * topk_mask::kNumVariants + plan.variant;
  cuda_emulation::Block::current().launch(plan.blocks, plan.threads, plan.shared_bytes, seed,
                                          kForwardKernels[index], x, y, bits, rows, hidden, k);
  return plan.variant;
}

extern "C" void emulated_backward(const void* dy, const uint32_t* bits, void* dx, int64_t rows,
                                  int hidden, int dtype, uint64_t seed) {
  const topk_mask::Plan plan = topk_mask::plan_backward(rows, hidden, dtype);
  const auto kernel =
      dtype == 0 ? topk_mask::topk_mask_backward_32bit : topk_mask::topk_mask_backward_16bit;
  cuda_emulation::Block::current().launch(plan.blocks, plan.threads, plan.shared_bytes, seed,
                                          kernel, dy, bits, dx, rows, hidden, plan.warps_per_row);
}
