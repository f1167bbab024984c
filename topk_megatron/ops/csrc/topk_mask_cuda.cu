// The launcher: picks the kernel for the shape and launches it on the caller's stream.
#include "topk_mask_cuda.h"

#include "topk_mask.cuh"

namespace {

using ForwardKernel = void (*)(const void*, void*, uint32_t*, int64_t, int, int);

#define TOPK_KERNEL_POINTER(name, ...) topk_mask::name,
const ForwardKernel kForwardKernels[] = {TOPK_FORWARD_KERNELS(TOPK_KERNEL_POINTER)};
#undef TOPK_KERNEL_POINTER

constexpr size_t kSharedWithoutAsking = 48 << 10;

cudaError_t shared_limit(size_t* bytes) {
  int device = 0, limit = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  *bytes = static_cast<size_t>(limit);
  return error;
}

bool launchable(const topk_mask::Plan& plan) { return plan.blocks <= 0x7fffffff; }

}  // namespace

int topk_mask_cuda_forward(const void* x, void* y, uint32_t* bits, int64_t rows, int hidden, int k,
                           int dtype, int mode, void* stream) {
  if (dtype < 0 || dtype > 2 || mode < 0 || mode > 1 || hidden < 1 || k < 1 || k > hidden)
    return cudaErrorInvalidValue;
  if (rows <= 0) return rows == 0 ? cudaSuccess : cudaErrorInvalidValue;
  size_t limit = 0;
  cudaError_t error = shared_limit(&limit);
  if (error != cudaSuccess) return error;
  const bool aligned = topk_mask::rows_aligned(x, y, hidden, topk_mask::element_bytes(dtype));
  const topk_mask::Plan plan = topk_mask::plan_forward(rows, hidden, dtype, aligned, limit);
  if (!launchable(plan)) return cudaErrorInvalidConfiguration;
  const int index = (dtype * 2 + mode) * topk_mask::kNumVariants + plan.variant;
  const ForwardKernel kernel = kForwardKernels[index];
  if (plan.shared_bytes > kSharedWithoutAsking) {
    error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                 cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(plan.shared_bytes));
    if (error != cudaSuccess) return error;
  }
  kernel<<<static_cast<unsigned>(plan.blocks), plan.threads, plan.shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(x, y, bits, rows, hidden, k);
  return cudaGetLastError();
}

int topk_mask_cuda_backward(const void* dy, const uint32_t* bits, void* dx, int64_t rows,
                            int hidden, int dtype, void* stream) {
  if (dtype < 0 || dtype > 2 || hidden < 1) return cudaErrorInvalidValue;
  if (rows <= 0) return rows == 0 ? cudaSuccess : cudaErrorInvalidValue;
  const topk_mask::Plan plan = topk_mask::plan_backward(rows, hidden, dtype);
  if (!launchable(plan)) return cudaErrorInvalidConfiguration;
  const auto kernel =
      dtype == 0 ? topk_mask::topk_mask_backward_32bit : topk_mask::topk_mask_backward_16bit;
  kernel<<<static_cast<unsigned>(plan.blocks), plan.threads, 0,
           static_cast<cudaStream_t>(stream)>>>(dy, bits, dx, rows, hidden, plan.warps_per_row);
  return cudaGetLastError();
}
