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

// ---- Sparse rows --------------------------------------------------------------------------------

// The type that ops/reference.py's index_dtype names.
ScalarType index_type(int64_t hidden) {
  return hidden <= 1 << 8    ? ScalarType::Byte
         : hidden <= 1 << 15 ? ScalarType::Short
                             : ScalarType::Int;
}

Tensor bits_to_indices_cuda(const Tensor& bits, int64_t hidden, int64_t k) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int && bits.dim() > 0 && hidden >= 1 &&
                      hidden <= INT32_MAX && bits.size(bits.dim() - 1) == num_words(hidden),
                  "bits_to_indices: bits must be int32 of shape [..., ceil(hidden / 32)]");
  check_k(k, hidden);
  const torch::stable::accelerator::DeviceGuard guard(bits.get_device_index());
  const Tensor words = torch::stable::contiguous(bits);
  Tensor indices = torch::stable::new_empty(words, with_last(words, k), index_type(hidden));
  check_launch(topk_bits_to_indices_cuda(
                   static_cast<const uint32_t*>(words.const_data_ptr()), indices.mutable_data_ptr(),
                   Shape(words).rows, static_cast<int>(hidden), static_cast<int>(k),
                   static_cast<int>(indices.element_size()), current_stream(words)),
               "bits_to_indices");
  return indices;
}

Tensor count_bits_cuda(const Tensor& bits, int64_t hidden) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int && bits.dim() > 0 && hidden >= 1 &&
                      hidden <= INT32_MAX && bits.size(bits.dim() - 1) == num_words(hidden),
                  "count_bits: bits must be int32 of shape [..., ceil(hidden / 32)]");
  const torch::stable::accelerator::DeviceGuard guard(bits.get_device_index());
  const Tensor words = torch::stable::contiguous(bits);
  Tensor counts = torch::stable::fill_(
      torch::stable::new_empty(words, std::vector<int64_t>{hidden}, ScalarType::Long), 0.0);
  check_launch(topk_count_bits_cuda(static_cast<const uint32_t*>(words.const_data_ptr()),
                                    static_cast<int64_t*>(counts.mutable_data_ptr()),
                                    Shape(words).rows, static_cast<int>(hidden),
                                    current_stream(words)),
               "count_bits");
  return counts;
}

void check_indices(const Tensor& like, const Tensor& indices) {
  const ScalarType type = indices.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Byte || type == ScalarType::Short ||
                      type == ScalarType::Int || type == ScalarType::Long,
                  "expected indices of type uint8, int16, int32 or int64");
  STD_TORCH_CHECK(indices.dim() > 0 && indices.dim() == like.dim() &&
                      Shape(indices).rows == Shape(like).rows && indices.device() == like.device(),
                  "expected indices on the tensor's device, with as many rows");
}

Tensor gather_row_cuda(const Tensor& x, const Tensor& indices) {
  const int64_t k = indices.dim() > 0 ? indices.size(indices.dim() - 1) : 0;
  if (k == 0 || x.numel() == 0) return torch::stable::new_empty(x, indices.sizes());
  check_indices(x, indices);
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  const Tensor dense = torch::stable::contiguous(x), at = torch::stable::contiguous(indices);
  Tensor values = torch::stable::new_empty(dense, at.sizes());
  const Shape shape(dense);
  check_launch(
      topk_gather_row_cuda(dense.const_data_ptr(), at.const_data_ptr(), values.mutable_data_ptr(),
                           shape.rows, static_cast<int>(shape.hidden), static_cast<int>(k),
                           static_cast<int>(dense.element_size()),
                           static_cast<int>(at.element_size()), current_stream(dense)),
      "gather_row");
  return values;
}

Tensor scatter_row_cuda(const Tensor& values, const Tensor& indices, int64_t hidden) {
  STD_TORCH_CHECK(values.dim() > 0 && hidden >= 1 && hidden <= INT32_MAX,
                  "scatter_row: expected values [..., k] and 1 <= hidden < 2^31");
  const torch::stable::accelerator::DeviceGuard guard(values.get_device_index());
  const Tensor packed = torch::stable::contiguous(values);
  const Tensor at = torch::stable::contiguous(indices);
  Tensor x = torch::stable::new_empty(packed, with_last(packed, hidden));
  if (packed.numel() == 0) return torch::stable::fill_(x, 0.0);
  check_indices(packed, at);
  const Shape shape(packed);
  check_launch(
      topk_scatter_row_cuda(packed.const_data_ptr(), at.const_data_ptr(), x.mutable_data_ptr(),
                            shape.rows, static_cast<int>(hidden), static_cast<int>(shape.hidden),
                            static_cast<int>(packed.element_size()),
                            static_cast<int>(at.element_size()), current_stream(packed)),
      "scatter_row");
  return x;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(topk_megatron, CUDA, m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask_cuda));
  m.impl("topk_mask_backward", TORCH_BOX(&topk_mask_backward_cuda));
  m.impl("bits_to_indices", TORCH_BOX(&bits_to_indices_cuda));
  m.impl("count_bits", TORCH_BOX(&count_bits_cuda));
  m.impl("gather_row", TORCH_BOX(&gather_row_cuda));
  m.impl("scatter_row", TORCH_BOX(&scatter_row_cuda));
}
