// The launcher: picks the kernel for the shape and launches it on the caller's stream.
#include "topk_mask_cuda.h"

#include "topk_mask.cuh"

namespace {

using topk_mask::ForwardKernel;
using topk_mask::kMostBlocks;

// How many blocks of the kernel the current device runs at a time. The queries run on the host and
// do not synchronise.
cudaError_t resident_blocks(ForwardKernel kernel, const topk_mask::Plan& plan, int64_t* blocks) {
  int device = 0, processors = 0, per_processor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess)
    error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&per_processor, kernel, plan.threads,
                                                          plan.shared_bytes);
  *blocks = static_cast<int64_t>(processors) * per_processor;
  return error != cudaSuccess || *blocks > 0 ? error : cudaErrorInvalidConfiguration;
}

}  // namespace

int topk_mask_cuda_forward(const void* x, void* y, uint32_t* bits, int64_t rows, int hidden, int k,
                           int dtype, int mode, void* stream) {
  if (dtype < 0 || dtype > 2 || mode < 0 || mode > 1 || hidden < 1 || k < 1 || k > hidden)
    return cudaErrorInvalidValue;
  if (rows <= 0) return rows == 0 ? cudaSuccess : cudaErrorInvalidValue;
  const bool aligned = topk_mask::rows_aligned(x, y, hidden, topk_mask::element_bytes(dtype));
  const topk_mask::Plan plan = topk_mask::plan_forward(rows, hidden, dtype, aligned);
  const ForwardKernel kernel = topk_mask::forward_kernel(dtype, mode, plan.variant);
  int64_t resident = 0;
  const cudaError_t error = resident_blocks(kernel, plan, &resident);
  if (error != cudaSuccess) return error;
  const int64_t blocks = topk_mask::persistent_blocks(plan.blocks, resident);
  kernel<<<static_cast<unsigned>(blocks), plan.threads, plan.shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(x, y, bits, rows, hidden, k);
  return cudaGetLastError();
}

int topk_mask_cuda_backward(const void* dy, const uint32_t* bits, void* dx, int64_t rows,
                            int hidden, int dtype, void* stream) {
  if (dtype < 0 || dtype > 2 || hidden < 1) return cudaErrorInvalidValue;
  if (rows <= 0) return rows == 0 ? cudaSuccess : cudaErrorInvalidValue;
  const topk_mask::BackwardPlan plan = topk_mask::plan_backward(dy, dx, rows, hidden, dtype);
  if (plan.blocks > kMostBlocks) return cudaErrorInvalidConfiguration;
  const auto kernel = topk_mask::backward_kernel(dtype, plan.flat);
  kernel<<<static_cast<unsigned>(plan.blocks), topk_mask::kBackwardThreads, 0,
           static_cast<cudaStream_t>(stream)>>>(dy, bits, dx, rows, hidden);
  return cudaGetLastError();
}
