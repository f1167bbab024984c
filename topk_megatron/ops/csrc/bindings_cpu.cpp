// The CPU kernels as torch ops.

#include "bindings.h"

#if !defined(_WIN32)
#include <unistd.h>
#endif

#include <atomic>

namespace {

using namespace topk_megatron;

constexpr int64_t kElementsPerTask = 32768;  // a thread gets at least this many

std::atomic<int> chosen_isa{-1};

Isa current_isa() {
  const int chosen = chosen_isa.load(std::memory_order_relaxed);
  return chosen < 0 ? topk_megatron::cpu_best_isa() : static_cast<Isa>(chosen);
}

int64_t private_cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t size = std::max<int64_t>(sysconf(_SC_LEVEL2_CACHE_SIZE), 1 << 20);
  return size;
#else
  return 1 << 20;
#endif
}

bool too_large_for_cache(const Tensor& out) {
  return out.numel() * static_cast<int64_t>(out.element_size()) >
         private_cache_bytes() * torch::stable::get_num_threads();
}

template <typename Work>
void for_rows(const Shape& shape, const Work& work) {
  const int64_t grain = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, shape.hidden));
  if (shape.rows <= grain) {
    if (shape.rows > 0) work(0, shape.rows);
    return;
  }
  torch::stable::parallel_for(0, shape.rows, grain, work);
}

void forward_cpu_into(const Tensor& x, int64_t k, Mode mode, const Tensor& y, const Tensor& bits) {
  const Shape shape(x);
  check_k(k, shape.hidden);
  const topk_megatron::ForwardArgs args{x.const_data_ptr(),
                                        y.mutable_data_ptr(),
                                        static_cast<uint32_t*>(bits.mutable_data_ptr()),
                                        shape.hidden,
                                        k,
                                        dtype_of(x),
                                        mode,
                                        too_large_for_cache(y)};
  const Isa isa = current_isa();
  for_rows(shape, [&](int64_t begin, int64_t end) {
    topk_megatron::cpu_forward(args, isa, begin, end);
  });
}

std::tuple<Tensor, Tensor> topk_mask_cpu(const Tensor& x, int64_t k, std::string mode) {
  const Tensor input = torch::stable::contiguous(x);
  const Shape shape(input);
  Tensor y = torch::stable::new_empty(input, input.sizes());
  Tensor bits =
      torch::stable::new_empty(input, with_last(input, num_words(shape.hidden)), ScalarType::Int);
  forward_cpu_into(input, k, mode_of(mode), y, bits);
  return {y, bits};
}

void backward_cpu_into(const Tensor& dy, const Tensor& bits, const Tensor& dx) {
  const Shape shape(dy);
  const topk_megatron::BackwardArgs args{
      dy.const_data_ptr(), static_cast<const uint32_t*>(bits.const_data_ptr()),
      dx.mutable_data_ptr(), shape.hidden, dtype_of(dy), too_large_for_cache(dx)};
  const Isa isa = current_isa();
  for_rows(shape, [&](int64_t begin, int64_t end) {
    topk_megatron::cpu_backward(args, isa, begin, end);
  });
}

Tensor topk_mask_backward_cpu(const Tensor& dy, const Tensor& bits) {
  check_bits(bits, dy);
  const Tensor grad = torch::stable::contiguous(dy);
  Tensor dx = torch::stable::new_empty(grad, grad.sizes());
  backward_cpu_into(grad, torch::stable::contiguous(bits), dx);
  return dx;
}

Tensor bits_to_indices_cpu(const Tensor& bits, int64_t hidden, int64_t k) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int && bits.dim() > 0 &&
                      bits.size(bits.dim() - 1) == num_words(hidden),
                  "pack_sparse: bits must be int32 of shape [..., ceil(hidden / 32)]");
  const Tensor words = torch::stable::contiguous(bits);
  const int index_bytes = hidden <= 256 ? 1 : hidden <= 32768 ? 2 : 4;
  const ScalarType dtype = index_bytes == 1   ? ScalarType::Byte
                           : index_bytes == 2 ? ScalarType::Short
                                              : ScalarType::Int;
  Tensor indices = torch::stable::new_empty(words, with_last(words, k), dtype);
  const Shape shape(words);
  const auto* from = static_cast<const uint32_t*>(words.const_data_ptr());
  void* to = indices.mutable_data_ptr();
  std::atomic<int64_t> bad{-1};
  for_rows(shape, [&](int64_t begin, int64_t end) {
    const int64_t row =
        topk_megatron::cpu_bits_to_indices(from, to, hidden, k, index_bytes, begin, end);
    if (row >= 0) bad = row;
  });
  STD_TORCH_CHECK(bad < 0, "pack_sparse: row ", bad.load(), " of bits does not have exactly k = ",
                  k, " bits set");
  return indices;
}

Tensor count_bits_cpu(const Tensor& bits, int64_t hidden) {
  STD_TORCH_CHECK(bits.scalar_type() == ScalarType::Int && bits.dim() > 0 &&
                      bits.size(bits.dim() - 1) == num_words(hidden),
                  "count_bits: bits must be int32 of shape [..., ceil(hidden / 32)]");
  constexpr int64_t kWordsPerTask = 64;  // four cache lines of a row, so that threads share none
  const Tensor words = torch::stable::contiguous(bits);
  const Shape shape(words);
  Tensor counts = torch::stable::new_empty(words, {hidden}, ScalarType::Long);
  auto* to = static_cast<int64_t*>(counts.mutable_data_ptr());
  std::fill_n(to, hidden, 0);
  const auto* from = static_cast<const uint32_t*>(words.const_data_ptr());
  torch::stable::parallel_for(0, shape.hidden, kWordsPerTask, [&](int64_t begin, int64_t end) {
    topk_megatron::cpu_count_bits(from, to, shape.rows, hidden, begin, end);
  });
  return counts;
}

// Write into the caller's tensors: benchmarks time these, free of the page faults of new memory.
void forward_out(const Tensor& x, int64_t k, std::string mode, Tensor y, Tensor bits) {
  STD_TORCH_CHECK(x.is_contiguous() && y.is_contiguous() && bits.is_contiguous() &&
                      y.numel() == x.numel() && y.scalar_type() == x.scalar_type(),
                  "forward_out: expected contiguous x, y, bits with y like x");
  check_bits(bits, x);
  forward_cpu_into(x, k, mode_of(mode), y, bits);
}

void backward_out(const Tensor& dy, const Tensor& bits, Tensor dx) {
  STD_TORCH_CHECK(dy.is_contiguous() && dx.is_contiguous() && bits.is_contiguous() &&
                      dx.numel() == dy.numel() && dx.scalar_type() == dy.scalar_type(),
                  "backward_out: expected contiguous dy, bits, dx with dx like dy");
  check_bits(bits, dy);
  backward_cpu_into(dy, bits, dx);
}

void stream_copy(const Tensor& src, Tensor dst) {
  const int64_t num_bytes = src.numel() * static_cast<int64_t>(src.element_size());
  STD_TORCH_CHECK(src.is_contiguous() && dst.is_contiguous() &&
                      dst.numel() * static_cast<int64_t>(dst.element_size()) == num_bytes,
                  "stream_copy: expected contiguous tensors of the same number of bytes");
  const auto* from = static_cast<const char*>(src.const_data_ptr());
  auto* to = static_cast<char*>(dst.mutable_data_ptr());
  constexpr int64_t kPiece = 64 * 1024;
  const Isa isa = current_isa();
  torch::stable::parallel_for(0, (num_bytes + kPiece - 1) / kPiece, 1, [&](int64_t b, int64_t e) {
    const int64_t begin = b * kPiece, end = std::min(e * kPiece, num_bytes);
    topk_megatron::cpu_stream_copy(from + begin, to + begin, end - begin, isa);
  });
}

// For tests: use a worse instruction set than the CPU's best (-1). Returns the one now in use.
int64_t set_isa(int64_t isa) {
  const auto best = static_cast<int64_t>(topk_megatron::cpu_best_isa());
  STD_TORCH_CHECK(isa >= -1 && isa <= best, "set_isa: this CPU and build have 0 to ", best,
                  " (portable, avx2, avx512), got ", isa);
  chosen_isa = static_cast<int>(isa);
  return static_cast<int64_t>(current_isa());
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(topk_megatron, CPU, m) {
  m.impl("topk_mask", TORCH_BOX(&topk_mask_cpu));
  m.impl("topk_mask_backward", TORCH_BOX(&topk_mask_backward_cpu));
  m.impl("bits_to_indices", TORCH_BOX(&bits_to_indices_cpu));
  m.impl("count_bits", TORCH_BOX(&count_bits_cpu));
}

// Not part of the interface: only for this repository's benchmarks and tests.
STABLE_TORCH_LIBRARY(topk_megatron_internal, m) {
  m.def("forward_out(Tensor x, int k, str mode, Tensor(a!) y, Tensor(b!) bits) -> ()");
  m.def("backward_out(Tensor dy, Tensor bits, Tensor(a!) dx) -> ()");
  m.def("stream_copy(Tensor src, Tensor(a!) dst) -> ()");
  m.def("set_isa(int isa) -> int");
}

STABLE_TORCH_LIBRARY_IMPL(topk_megatron_internal, CPU, m) {
  m.impl("forward_out", TORCH_BOX(&forward_out));
  m.impl("backward_out", TORCH_BOX(&backward_out));
  m.impl("stream_copy", TORCH_BOX(&stream_copy));
}

STABLE_TORCH_LIBRARY_IMPL(topk_megatron_internal, CompositeExplicitAutograd, m) {
  m.impl("set_isa", TORCH_BOX(&set_isa));
}
