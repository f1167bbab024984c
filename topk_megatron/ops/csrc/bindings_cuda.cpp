// The CUDA kernels as torch ops, on torch's current stream.

#include "bindings.h"
#include "topk_mask_cuda.h"

namespace {

using namespace topk_megatron;

int cuda_dtype_of(const Tensor& x) {
  const Dtype dtype = dtype_of(x);
  STD_TORCH_CHECK(dtype != Dtype::kFloat64, "topk_mask: float64 has no CUDA kernel; use float32");
  return static_cast<int>(dtype);
}

void* current_stream(const Tensor& x) {
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  return stream;
}

void check_launch(int error, const char* name) {
  STD_TORCH_CHECK(error == 0, name, ": the CUDA kernel failed to launch, cudaError ", error);
}

std::tuple<Tensor, Tensor> topk_mask_cuda(const Tensor& x, int64_t k, std::string mode) {
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor input = torch::stable::contiguous(x);
  const Shape shape(input);
  check_k(k, shape.hidden);
  Tensor y = torch::stable::new_empty(input, input.sizes());
  Tensor bits =
      torch::stable::new_empty(input, with_last(input, num_words(shape.hidden)), ScalarType::Int);
  if (shape.rows > 0)
    check_launch(topk_mask_cuda_forward(
                     input.const_data_ptr(), y.mutable_data_ptr(),
                     static_cast<uint32_t*>(bits.mutable_data_ptr()), shape.rows,
                     static_cast<int>(shape.hidden), static_cast<int>(k), cuda_dtype_of(input),
                     static_cast<int>(mode_of(mode)), current_stream(input)),
                 "topk_mask");
  return {y, bits};
}

Tensor topk_mask_backward_cuda(const Tensor& dy, const Tensor& bits) {
  check_bits(bits, dy);
  const torch::stable::accelerator::DeviceGuard guard(dy.get_device_index());
  const Tensor grad = torch::stable::contiguous(dy), words = torch::stable::contiguous(bits);
  const Shape shape(grad);
  Tensor dx = torch::stable::new_empty(grad, grad.sizes());
  if (shape.rows > 0)
    check_launch(topk_mask_cuda_backward(grad.const_data_ptr(),
                                         static_cast<const uint32_t*>(words.const_data_ptr()),
                                         dx.mutable_data_ptr(), shape.rows,
                                         static_cast<int>(shape.hidden), cuda_dtype_of(grad),
                                         current_stream(grad)),
                 "topk_mask_backward");
  return dx;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(topk_megatron, CUDA, m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask_cuda));
  m.impl("topk_mask_backward", TORCH_BOX(&topk_mask_backward_cuda));
}
