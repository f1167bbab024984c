// Shared by the CPU and the CUDA bindings: shapes, dtypes and the checks that keep a kernel from
// reading memory that is not its own. Argument checks with advice for the user are in ops/api.py.
//
// Only torch's stable ABI is used, so that one build serves torch TORCH_TARGET_VERSION (set in
// setup.py) and later.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "topk_mask_cpu.h"

namespace topk_megatron {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kWordBits = 32;

inline int64_t num_words(int64_t hidden) { return (hidden + kWordBits - 1) / kWordBits; }

inline Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return Dtype::kFloat32;
    case ScalarType::BFloat16: return Dtype::kBFloat16;
    case ScalarType::Half: return Dtype::kFloat16;
    case ScalarType::Double: return Dtype::kFloat64;
    default: STD_TORCH_CHECK(false, "topk_mask: expected float32, bfloat16, float16 or float64");
  }
}

inline Mode mode_of(const std::string& mode) {
  if (mode == "value") return Mode::kValue;
  STD_TORCH_CHECK(mode == "abs", "topk_mask: mode must be value or abs, got ", mode);
  return Mode::kAbs;
}

// Rows and row length of a tensor [..., hidden].
struct Shape {
  int64_t rows, hidden;
  explicit Shape(const Tensor& x) : rows(0), hidden(0) {
    STD_TORCH_CHECK(x.dim() > 0, "topk_mask: expected at least one dimension, got a scalar");
    hidden = x.size(x.dim() - 1);
    rows = hidden == 0 ? 0 : x.numel() / hidden;
  }
};

inline std::vector<int64_t> with_last(const Tensor& x, int64_t last) {
  const auto sizes = x.sizes();
  std::vector<int64_t> out(sizes.begin(), sizes.end());
  out.back() = last;
  return out;
}

inline void check_bits(const Tensor& bits, const Tensor& x) {
  const Shape shape(x);
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int && bits.dim() == x.dim() &&
                      bits.size(bits.dim() - 1) == num_words(shape.hidden) &&
                      bits.numel() == (x.numel() / std::max<int64_t>(shape.hidden, 1)) *
                                          num_words(shape.hidden),
                  "topk_mask: bits must be int32 of shape [..., ceil(hidden / 32)]");
  STD_TORCH_CHECK(bits.device() == x.device(), "topk_mask: bits is on another device");
}

inline void check_k(int64_t k, int64_t hidden) {
  STD_TORCH_CHECK(k >= 1 && (k <= hidden || hidden == 0),
                  "topk_mask: expected 1 <= k <= hidden size ", hidden, ", got ", k);
}

}  // namespace topk_megatron
