// CCCL's batched top-k behind a C interface, for benchmarks/gpu/baselines.py, which loads it by ctypes.
//
// cub::DeviceBatchedTopK comes with CUDA 13.5 and with NVIDIA's wheel of CCCL headers. It bounds the
// row length at compile time, so each length is its own instantiation, and it gives values with
// their indices, unordered, with ties taken anywhere: not the masked row of topk_mask.

#include <cub/device/device_batched_topk.cuh>
#include <cuda/__execution/determinism.h>
#include <cuda/__execution/output_ordering.h>
#include <cuda/__execution/require.h>
#include <cuda/__execution/tie_break.h>
#include <cuda/argument>
#include <cuda/iterator>
#include <cuda/stream>
#include <cuda_bf16.h>

#include <cstdint>

namespace {

constexpr int64_t kLargestK = 1024;

template <typename Key, int64_t kHidden>
cudaError_t select(void* workspace, size_t* bytes, const Key* keys, Key* values, int32_t* indices,
                   int64_t rows, int64_t k, cudaStream_t stream) {
  using cuda::args::immediate;
  const auto rows_of = [](auto* base, int64_t stride) {
    return cuda::make_strided_iterator(cuda::make_counting_iterator(base), stride);
  };
  const auto requirements = cuda::execution::require(cuda::execution::determinism::not_guaranteed,
                                                     cuda::execution::tie_break::unspecified,
                                                     cuda::execution::output_ordering::unsorted);
  const auto env = cuda::std::execution::env{requirements, cuda::stream_ref{stream}};
  return cub::DeviceBatchedTopK::MaxPairs(
      workspace, *bytes, rows_of(keys, kHidden), rows_of(values, k),
      cuda::make_constant_iterator(cuda::make_counting_iterator(int32_t{0})), rows_of(indices, k),
      cuda::args::constant<kHidden>{}, immediate{k, cuda::args::bounds<int64_t{1}, kLargestK>()},
      immediate{rows}, env);
}

template <typename Key>
int select_any(void* workspace, size_t* bytes, const void* keys, void* values, int32_t* indices,
               int64_t rows, int64_t hidden, int64_t k, cudaStream_t stream) {
  const auto run = [&](auto length) {
    return static_cast<int>(select<Key, decltype(length)::value>(
        workspace, bytes, static_cast<const Key*>(keys), static_cast<Key*>(values), indices, rows,
        k, stream));
  };
  if (k < 1 || k > kLargestK || k > hidden) return cudaErrorInvalidValue;
  if (hidden == 1024) return run(cuda::std::integral_constant<int64_t, 1024>{});
  if (hidden == 4096) return run(cuda::std::integral_constant<int64_t, 4096>{});
  return cudaErrorInvalidValue;
}

}  // namespace

// With workspace NULL it only writes the size of the workspace to `bytes`. Returns a cudaError_t.
extern "C" int cccl_topk(void* workspace, size_t* bytes, const void* keys, void* values,
                         int32_t* indices, int64_t rows, int64_t hidden, int64_t k, int bfloat16,
                         void* stream) {
  const auto on = static_cast<cudaStream_t>(stream);
  return bfloat16 ? select_any<__nv_bfloat16>(workspace, bytes, keys, values, indices, rows, hidden,
                                              k, on)
                  : select_any<float>(workspace, bytes, keys, values, indices, rows, hidden, k, on);
}
